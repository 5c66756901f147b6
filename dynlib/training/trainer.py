"""One trainer for super-networks: sandwich sampling with in-place distillation.

Every step trains the largest sub-network on the labels and smaller ones on its softened outputs
(US-Nets, arXiv 1903.05134, sections 3.2-3.3; BigNAS, arXiv 2003.11142). Convolutions are updated
by Muon, whose orthogonalised steps suit short training (Jordan 2024), and kept at a fixed norm, so
that the learning rate alone says how far a step turns them; head and biases by SGD.
"""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from dynlib import DynlibError
from dynlib.data import Dataset, Images, augment
from dynlib.nets.resnet import whiten_stem
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace, SubnetConfig

log = logging.getLogger(__name__)


class ResumeError(DynlibError):
    """A training state cannot be resumed; names the file and why."""


@dataclass(frozen=True)
class Recipe:
    """How to train; every field is a plain number, so that a recipe is data.

    Args:
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate of the convolutions (Muon); warmed up, then linear to zero.
        lr_head, lr_bias: peak learning rates of the classifier and of the normalisations' biases
            (SGD), whose small gradients bear large rates (arXiv 2404.00498, 3.4).
        momentum: of Muon.
        weight_decay: of the classifier.
        warmup: share of the steps in which the rates rise from zero.
        label_smoothing: of the largest sub-network's loss.
        students: sub-networks per step beside the largest: in turn the smallest and a random one.
        distill: weight of each distillation loss.
        pad: pixels of the padded crop.
        cutout: side in pixels of the blanked square, 0 for none.
    """

    epochs: int = 30
    batch_size: int = 500
    lr: float = 0.15
    lr_head: float = 0.02
    lr_bias: float = 10.0
    momentum: float = 0.6
    weight_decay: float = 5e-4
    warmup: float = 0.02
    label_smoothing: float = 0.1
    students: int = 2
    distill: float = 1.0
    pad: int = 2
    cutout: int = 0


def bf16_pays() -> bool:
    """Whether this processor multiplies bfloat16 natively; without that autocast is slower."""
    available = torch.backends.mkldnn.is_available()
    return available and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def optimisers(supernet: Supernet, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions, SGD for head and biases; scales of normalisations stay at one."""
    from dynlib._vision import timm

    for module in supernet.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)
    free = [p for p in supernet.net.parameters() if p.requires_grad]
    muon = timm.optim.Muon(
        [p for p in free if p.ndim == 4], lr=recipe.lr, momentum=recipe.momentum, nesterov=True,
        weight_decay=0.0, adjust_lr_fn="original",
    )  # fmt: skip
    head = {
        "params": [p for p in free if p.ndim == 2], "lr": recipe.lr_head,
        "weight_decay": recipe.weight_decay,
    }  # fmt: skip
    biases = {"params": [p for p in free if p.ndim == 1], "lr": recipe.lr_bias}
    return [muon, torch.optim.SGD([head, biases], lr=0.0, momentum=0.85, nesterov=True)]


@torch.no_grad()
def normalise_(solver: torch.optim.Optimizer) -> None:
    """Scale each convolution (O, I, H, W) to the norm sqrt(O); a normalisation undoes the scale."""
    for group in solver.param_groups:
        for weight in group["params"]:
            weight.mul_(len(weight) ** 0.5 / weight.norm())


def draw_configs(space: SearchSpace, step: int, students: int, rng) -> list[SubnetConfig]:
    """The sandwich of one step: the largest, then in turn the smallest and a random sub-network."""
    turns = range(step * students, (step + 1) * students)
    return [space.largest, *(space.sample(rng) if t % 2 else space.smallest for t in turns)]


def train(
    supernet: Supernet, dataset: Dataset, recipe: Recipe, *, seed: int = 0,
    state_file: str | Path | None = None, stop_after_epochs: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Train in place and return one row per epoch: losses, validation accuracies, images/s.

    Every draw of an epoch comes from (seed, epoch), so a run that was killed and resumed from
    `state_file` (written after every epoch) ends bit-equal to one that was not.

    Args:
        state_file: where to keep the training state; an existing one is resumed.
        stop_after_epochs: end early after so many epochs of this call, to be resumed later.

    Raises:
        ResumeError: the state belongs to another recipe, space or seed, or cannot be read.
    """
    device = next(supernet.parameters()).device
    whiten_stem(supernet.net.stem, dataset.normalise(dataset.train.images[:5000]).to(device))
    supernet.net.stem.requires_grad_(False)
    solvers = optimisers(supernet, recipe)
    peaks = [[group["lr"] for group in s.param_groups] for s in solvers]
    per_epoch = max(1, len(dataset.train) // recipe.batch_size)
    total = per_epoch * recipe.epochs
    identity = {
        "recipe": asdict(recipe), "space": supernet.space.to_dict(), "seed": seed,
        "images": len(dataset.train),
    }  # fmt: skip
    history = _resume(state_file, identity, supernet, solvers)
    bf16 = bf16_pays() or device.type == "cuda"
    last = min(recipe.epochs, len(history) + (stop_after_epochs or recipe.epochs))
    with tqdm(total=last * per_epoch, initial=len(history) * per_epoch, disable=None) as bar:
        for epoch in range(len(history), last):
            rng = np.random.default_rng([seed, epoch])
            draws = torch.Generator().manual_seed(int(rng.integers(2**62)))
            order = torch.randperm(len(dataset.train), generator=draws)
            started, losses = time.perf_counter(), []
            for i in range(per_epoch):
                _set_rates(solvers, peaks, (epoch * per_epoch + i) / total, recipe.warmup)
                index = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
                batch = dataset.train.take(index)
                flip = _alternating_flip(index, seed, epoch)
                views = augment(
                    batch.images, draws, flip=flip, pad=recipe.pad, cutout=recipe.cutout
                )
                images = dataset.normalise(views.to(device))
                configs = draw_configs(supernet.space, i, recipe.students, rng)
                losses.append(sandwich_step(supernet, images, batch.labels, configs, recipe, bf16))
                for solver in solvers:
                    solver.step()
                    solver.zero_grad()
                normalise_(solvers[0])
                rate = (i + 1) * recipe.batch_size / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {losses[-1][0]:.3f}, {rate:.0f} images/s", refresh=False)
                bar.update()
            seconds = time.perf_counter() - started
            means = np.mean([(first, last) for first, *_, last in losses], axis=0)
            accuracy = quick_accuracies(supernet, dataset, bf16=bf16)
            history.append({
                "epoch": epoch + 1, "loss_max": float(means[0]), "loss_student": float(means[1]),
                **accuracy, "seconds": seconds,
                "images_per_s": per_epoch * recipe.batch_size / seconds,
            })  # fmt: skip
            log.info("epoch %d: %s", epoch + 1, history[-1])
            _store(state_file, identity, supernet, solvers, history)
    return pd.DataFrame(history)


def sandwich_step(supernet, images, labels, configs, recipe: Recipe, bf16: bool) -> list[float]:
    """Accumulate the gradients of one sandwich and return the losses.

    The first configuration learns from the labels (N,) and teaches the others.
    """
    labels, losses, target = labels.to(images.device), [], None
    for config in configs:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = supernet(images, config)
        logits = logits.float()
        if target is None:
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            target = logits.detach().softmax(1)
        else:
            loss = recipe.distill * F.cross_entropy(logits, target)
        loss.backward()
        losses.append(loss.item())
    return losses


def _set_rates(solvers, peaks, progress: float, warmup: float) -> None:
    factor = progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)
    for solver, rates in zip(solvers, peaks, strict=True):
        for group, rate in zip(solver.param_groups, rates, strict=True):
            group["lr"] = rate * max(factor, 0.01)


def _alternating_flip(index: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Mirror each image in every second epoch, half of them starting with the first."""
    parity = (index * 2654435761 + seed * 40503) >> 7  # a fixed hash of image and seed
    return (parity + epoch) % 2 == 0


@torch.no_grad()
def accuracy_pct(net: nn.Module, dataset: Dataset, images: Images, *, bf16: bool = False) -> float:
    """Top-1 accuracy in percent of a network on `images`, in the layout it was trained in."""
    net.eval()
    device = next(net.parameters()).device
    hits = 0
    for start in range(0, len(images), 500):
        part = images.take(slice(start, start + 500))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            guess = net(dataset.normalise(part.images).to(device)).argmax(1).cpu()
        hits += int((guess == part.labels).sum())
    return 100 * hits / len(images)


def calibration_batches(dataset: Dataset, count: int = 2000, batch: int = 500):
    """Normalised batches of the first `count` training images, un-augmented."""
    for start in range(0, min(count, len(dataset.train)), batch):
        yield dataset.normalise(dataset.train.images[start : min(start + batch, count)])


def evaluate(
    supernet: Supernet, config: SubnetConfig, dataset: Dataset, images: Images, *,
    bf16: bool = False, calibration: int = 2000,
) -> float:  # fmt: skip
    """Accuracy in percent of one sub-network; its statistics are computed if they are missing."""
    if config not in supernet.statistics:
        calibrate(supernet, config, calibration_batches(dataset, calibration), bf16=bf16)
    return accuracy_pct(supernet.prepare(config), dataset, images, bf16=bf16)


def quick_accuracies(supernet: Supernet, dataset: Dataset, *, bf16: bool) -> dict[str, float]:
    """Validation accuracy of the two ends of the space, on at most 2,000 images each."""
    held = dataset.val.take(slice(0, 2000))
    result = {}
    for name, config in (("max", supernet.space.largest), ("min", supernet.space.smallest)):
        supernet.statistics.pop(config, None)  # the weights have moved since
        result[f"accuracy_val_{name}_pct"] = evaluate(supernet, config, dataset, held, bf16=bf16)
        del supernet.statistics[config]
    return result


def _store(path, identity, supernet, solvers, history) -> None:
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    state = {
        "identity": identity, "net": supernet.net.state_dict(), "history": history,
        "solvers": [solver.state_dict() for solver in solvers],
    }  # fmt: skip
    torch.save(state, part)
    part.replace(path)


def _resume(path, identity, supernet, solvers) -> list[dict]:
    if path is None or not Path(path).is_file():
        return []
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise ResumeError(f"{path}: no readable training state: {error}") from error
    for key, value in identity.items():
        if state["identity"].get(key) != value:
            raise ResumeError(
                f"{path}: belongs to another run: {key} is {state['identity'].get(key)}, "
                f"expected {value}; delete the file to start again"
            )
    supernet.net.load_state_dict(state["net"])
    for solver, saved in zip(solvers, state["solvers"], strict=True):
        solver.load_state_dict(saved)
    return state["history"]
