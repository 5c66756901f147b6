"""Training recipes as data: which sub-networks learn in a step, from whom, and on which view.

Every published way to train a super-network is a value of `Recipe`; one trainer runs them all.
"""

import copy
from dataclasses import dataclass, fields

import numpy as np
import torch

from dynlib.errors import RecipeError
from dynlib.nets.supernet import Supernet
from dynlib.space import DIMENSIONS, SearchSpace, SubnetConfig
from dynlib.toml import is_number, is_whole

SAMPLINGS = ("sandwich", "ladder", "shrink", "best-up")
TEACHERS = ("labels", "live", "ema", "ensemble", "frozen")
SOLVERS = ("muon", "adamw", "muon+adamw")
# Progressive shrinking unlocks one group after the other, in equal parts of the training
# (Once-for-All, arXiv 1908.09791, section 3.3); before the first only the largest is trained.
PHASES = (("resolution", "kernel"), ("depth",), ("width", "expand", "heads"))


@dataclass(frozen=True)
class Recipe:
    """How to train; every field is plain data.

    Args:
        sampling: which sub-networks a step trains. ``sandwich``: the largest, then in turn the
            smallest and a random one (US-Nets, arXiv 1903.05134); ``ladder``: `students` + 1 rungs
            from smallest to largest (slimmable networks, arXiv 1812.08928); ``shrink``: the largest
            alone, then random ones of a growing space (Once-for-All); ``best-up``: a sandwich whose
            random one is the best of three of about the same work (AttentiveNAS, arXiv 2011.09011).
        teacher: what all but the largest learn from. ``labels``; ``live``, the largest as it is in
            this step (in-place distillation, US-Nets); ``ema``, the largest of a moving average of
            the weights (in-place bootstrapping, DS-Net, arXiv 2103.13258); ``ensemble``, where the
            smallest learns from the mean of that and the other averaged sub-networks of the step;
            ``frozen``, the largest at the end of the first phase, beside the labels (Once-for-All).
        own_view: each student sees an augmentation of its own and is taught by the teacher's answer
            to another one (multi-view consistency, DS-Net++, arXiv 2109.10060).
        ema: decay of the moving average per step.
        epochs: passes over the training images.
        batch_size: images per step.
        solver: ``muon`` trains from scratch: convolutions by Muon, each kept at a fixed norm, the
            rest by SGD. ``adamw`` moves all weights from where they are (`Recipe.finetune`).
            ``muon+adamw`` trains transformers from scratch: all layers but the last by Muon, the
            rest by AdamW.
        lr: peak learning rate of the convolutions (Muon), or of all (with AdamW); warmed up, then
            linear to zero.
        lr_head, lr_bias: beside Muon, peak learning rates of the classifier, tokens and scales, and
            of the biases (SGD) for batches of 500, in proportion for others; the biases' small
            gradients bear large rates (arXiv 2404.00498, 3.4).
        momentum: of Muon.
        decay: share of linear weights and, beside Muon, of biases that a step at the peak rate
            takes away.
        warmup: share of the steps in which the rates rise from zero.
        label_smoothing: of the losses on labels.
        students: sub-networks per step beside the largest.
        distill: weight of each distillation loss.
        pad: pixels of the padded crop.
        cutout: side in pixels of the blanked square, 0 for none.
        cutmix: share of the batches in which a patch of each image is replaced by that of another,
            and the labels are mixed by area (CutMix, arXiv 1905.04899).

    Raises:
        RecipeError: an unknown sampling, teacher or solver, or a number that is not finite, is
            negative or, of epochs, images and learning rates, zero.

    >>> Recipe(epochs=3).sampling, Recipe(sampling="ladder", students=3).teacher
    ('sandwich', 'live')
    """

    sampling: str = "sandwich"
    teacher: str = "live"
    own_view: bool = False
    ema: float = 0.997
    epochs: int = 30
    batch_size: int = 500
    solver: str = "muon"
    lr: float = 0.08
    lr_head: float = 0.01
    lr_bias: float = 5.0
    momentum: float = 0.6
    decay: float = 1e-3
    warmup: float = 0.02
    label_smoothing: float = 0.1
    students: int = 2
    distill: float = 1.0
    pad: int = 2
    cutout: int = 0
    cutmix: float = 0.0

    def __post_init__(self):
        choices = (("sampling", SAMPLINGS), ("teacher", TEACHERS), ("solver", SOLVERS))
        for name, known in choices:
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(f"recipe, {name}: {value!r}, expected one of {known}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                least = 1 if field.name in ("epochs", "batch_size") else 0
                fits = is_whole(value) and value >= least
                expected = f"a whole number of at least {least}"
            elif field.type is float:
                is_rate = field.name.startswith("lr")  # weight decay is divided by it
                fits = is_number(value) and (value > 0 if is_rate else value >= 0)
                expected = f"a finite number {'above' if is_rate else 'of at least'} 0"
            else:
                continue
            if not fits:
                raise RecipeError(f"recipe, {field.name}: {value!r}, expected {expected}")

    @classmethod
    def finetune(cls, **changes) -> "Recipe":
        """A recipe that keeps what pretrained weights know, with `changes` of its fields.

        The default one begins by bringing each convolution to its norm and at once takes large
        steps, which is right for random weights and undoes trained ones.

        >>> Recipe.finetune(epochs=5).solver
        'adamw'
        """
        return cls(**FINETUNE | changes)


FINETUNE = {
    "epochs": 8, "batch_size": 32, "solver": "adamw", "lr": 2e-4, "decay": 0.0, "warmup": 0.1,
    "label_smoothing": 0.0, "pad": 8,
}  # fmt: skip

# The published recipes by name, each with its fields beside the common ones.
PUBLISHED = {
    "slimmable": {"sampling": "ladder", "teacher": "labels"},
    "in-place distillation": {},
    "progressive shrinking": {"sampling": "shrink", "teacher": "frozen"},
    "bootstrapping": {"teacher": "ema"},
    "ensemble bootstrapping": {"teacher": "ensemble"},
    "multi-view": {"teacher": "ema", "own_view": True},
    "best-up": {"sampling": "best-up"},
}


def draw_configs(
    recipe: Recipe, space: SearchSpace, step: int, progress: float, rng: np.random.Generator
) -> list[SubnetConfig]:
    """The sub-networks of one step, the largest first if it is among them.

    Args:
        step: number of the step, which decides whose turn it is.
        progress: share of the training that is done, 0 to 1.
    """
    if space.size == 1:
        return [space.largest]
    if recipe.sampling == "ladder":
        return space.ladder(recipe.students + 1)[::-1]
    if recipe.sampling == "shrink":
        phase = min(int(progress * (len(PHASES) + 1)), len(PHASES))
        if not phase:
            return [space.largest]
        free = {name for group in PHASES[:phase] for name in group}
        grown = unlocked(space, free)
        return [grown.sample(rng) for _ in range(recipe.students)]
    first = step * recipe.students
    turns = range(first, first + recipe.students)
    students = [space.sample(rng) if turn % 2 else space.smallest for turn in turns]
    return [space.largest, *students]


def unlocked(space: SearchSpace, free: set[str]) -> SearchSpace:
    """`space` with every dimension that is not in `free` held at its largest choice."""
    resolution = space.resolution if "resolution" in free else space.resolution[-1:]
    places = {}
    for name in DIMENSIONS:
        choices = getattr(space, name)
        places[name] = choices if name in free else tuple(values[-1:] for values in choices)
    return SearchSpace(resolution, **places)


class Average:
    """An exponential moving average of a super-network's weights, as a super-network.

    The decay grows from zero with the number of updates, so that a short training is not averaged
    with its random start. A `frozen` one copies the weights when told to and then stays.
    """

    def __init__(self, supernet: Supernet, decay: float):
        self.supernet = copy.deepcopy(supernet).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, supernet: Supernet) -> None:
        """Move towards the weights of `supernet`."""
        self.updates += 1
        decay = min(self.decay, self.updates / (10 + self.updates))
        for mean, new in zip(self.supernet.parameters(), supernet.parameters(), strict=True):
            mean.lerp_(new.detach(), 1 - decay)

    def state_dict(self) -> dict:
        """Weights and count, for a training state."""
        return {"net": self.supernet.net.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.supernet.net.load_state_dict(state["net"])
        self.updates = state["updates"]
