"""One trainer for super-networks: every recipe of `dynlib.training.recipes`, resumed bit for bit.

From scratch, convolutions are updated by Muon, whose orthogonalised steps suit short training
(Jordan 2024), and kept at a fixed norm, so that the learning rate alone says how far a step turns
them; head and biases by SGD. Pretrained weights are moved on by AdamW (`Recipe.finetune`).
"""

import hashlib
import io
import json
import logging
import math
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from dynlib.data import augment
from dynlib.errors import CheckpointError, ModelError
from dynlib.files import atomic_write
from dynlib.images import Dataset, Images
from dynlib.nets.resnet import STEM_CHANNELS, whiten_stem
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SubnetConfig
from dynlib.training.recipes import Recipe
from dynlib.training.step import Step

_LOG = logging.getLogger(__name__)


def train(
    supernet: Supernet,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int = 0,
    state_file: str | Path | None = None,
    stop_after_epochs: int | None = None,
    finish_in: int | None = None,
    watch: int = 2000,
    guide: Callable[[torch.Tensor], torch.Tensor] | None = None,
    about: Mapping[str, object] | None = None,
    hook: str = "exact",
) -> pd.DataFrame:
    """Train in place and return one row per epoch: losses, validation accuracies, images/s.

    Statistics of sub-networks stored before are dropped: `calibrate` again what shall serve.

    Every draw of an epoch comes from (seed, epoch), so a run that was killed and resumed from
    `state_file` (written after every epoch) ends bit-equal to one that was not.

    Started by torchrun, the processes share every batch and learn what one process would; the first
    one writes and reads the state. `hook` is what becomes of gradients on their way, as in
    `dynlib.training.parallel.Peers`.

    Args:
        state_file: where to keep the training state; an existing one is resumed.
        stop_after_epochs: end early after so many epochs of this call, to be resumed later.
        finish_in: do the rest of the schedule in so many epochs of this call, for a run that must
            end before its time: the rates still fall to zero, only faster.
        watch: validation images for the accuracies of each epoch's row; 0 leaves them out.
        guide: a trained network, images -> logits, that teaches all sub-networks in place of the
            labels and of the recipe's teacher.
        about: what else a state must have in common with this call to be resumed, such as the
            names of the teachers; plain data.
        hook: ``exact``, ``fp16`` or ``powersgd``.

    Raises:
        CheckpointError: the state belongs to another recipe, space, seed or other images, or to
            another `about`, or cannot be read.
        ModelError: the network has more or fewer outputs than there are classes.
        PeerError: a process that torchrun announces does not come.

    >>> images = load_dataset("generated", generated=(400, 100))
    >>> space = SearchSpace(resolution=(32,), depth=((1,),), width=((8, 16),))

    >>> supernet = Supernet(space, classes=len(images.classes))
    >>> history = train(supernet, images, Recipe(epochs=1, batch_size=100), watch=0)
    >>> len(history)
    1
    """
    if supernet.classes != len(dataset.classes):
        raise _other_outputs(supernet, dataset)
    if recipe.solver == "muon":
        whiten(supernet, dataset)
    step = Step(supernet, recipe, guide, hook)
    per_epoch = max(1, len(dataset.train) // recipe.batch_size)
    identity = {
        "recipe": asdict(recipe),
        "space": supernet.space.to_dict(),
        "seed": seed,
        "dataset": dataset.name,
        "images": len(dataset.train),
        "hash of the images": _hash(dataset.train),
        **(about or {}),
    }
    history, at = _resume(state_file, identity, supernet, step)
    peers = step.peers
    first = peers.rank == 0
    done = len(history)
    ahead = recipe.epochs - at  # epochs of the schedule
    rest = math.ceil(min(ahead, finish_in or recipe.epochs) - 1e-9)
    if first and not rest:
        _LOG.warning("already trained, from %s; delete the file to start again", state_file)
    pace = ahead / max(rest, 1)  # epochs of the schedule per epoch of this call
    last = done + min(rest, stop_after_epochs or rest)

    def schedule(epochs: float) -> float:
        """Epochs of the schedule gone through after so many epochs of all calls."""
        skipped = at - done + (pace - 1) * (epochs - done)
        return epochs + skipped

    with tqdm(total=last * per_epoch, initial=done * per_epoch, disable=None) as bar:
        for epoch in range(done, last):
            rng = np.random.default_rng([seed, epoch])
            started = time.perf_counter()
            losses = []
            for i, (view, labels) in enumerate(_batches(dataset, recipe, seed, epoch, rng)):
                reached = schedule(epoch + i / per_epoch)
                progress = reached / recipe.epochs
                losses.append(step(view, labels, step=i, progress=progress, rng=rng))
                rate = (i + 1) * recipe.batch_size / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {losses[-1][0]:.3f}, {rate:.0f} images/s", refresh=False)
                bar.update()
            seconds = time.perf_counter() - started
            ends = [(some[0], some[-1]) for some in losses]
            loss_max, loss_student = np.mean(ends, axis=0).tolist()
            row = {
                "epoch": epoch + 1,
                "loss_max": loss_max,
                "loss_student": loss_student,
                **(quick_accuracies(supernet, dataset, watch, bf16=step.bf16) if first else {}),
                "seconds": seconds,
                "images_per_s": per_epoch * recipe.batch_size / seconds,
            }
            row = json.loads(peers.tell(json.dumps(row).encode()))  # all have the first one's
            _LOG.info("epoch %d: %s", epoch + 1, row)
            history.append(row)
            if first:
                _store(state_file, identity, supernet, step, history, schedule(epoch + 1))
            supernet.statistics.clear()  # those of weights that have moved since
    return pd.DataFrame(history)


def _other_outputs(supernet: Supernet, dataset: Dataset) -> ModelError:
    names = textwrap.shorten(", ".join(dataset.classes), 80, placeholder=" ...")
    return ModelError(
        f"the network has {supernet.classes} outputs, "
        f"{dataset.name} has {len(dataset.classes)} classes ({names})"
    )


def _hash(images: Images) -> str:
    """Of pixels and labels, which are read where they lie."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in (images.images, images.labels):
        hashed.update(part.contiguous().numpy())
    return hashed.hexdigest()


def whiten(supernet: Supernet, dataset: Dataset) -> None:
    """Set the stem, if the family has one of that kind, from training images and fix it."""
    stem = getattr(supernet.net, "stem", None)
    if isinstance(stem, nn.Conv2d) and len(stem.weight) == STEM_CHANNELS:
        images = dataset.normalise(dataset.train.images[:5000]).to(stem.weight.device)
        whiten_stem(stem, images)
        stem.requires_grad_(False)


def _batches(dataset: Dataset, recipe: Recipe, seed: int, epoch: int, rng):
    """Yields (view, labels) for every batch of an epoch; `view()` draws an augmentation of it."""
    draws = torch.Generator().manual_seed(int(rng.integers(2**62)))
    order = torch.randperm(len(dataset.train), generator=draws)
    size = min(recipe.batch_size, len(order))
    for start in range(0, len(order) - size + 1, size):
        index = order[start : start + size]
        batch = dataset.train.take(index)
        flip = _alternating_flip(index, seed, epoch)
        labels = batch.labels
        patch = None
        if recipe.cutmix and rng.random() < recipe.cutmix:
            # The patch is that of the image before in the batch, which is in random order anyway.
            patch, share = _patch(batch.images.shape[-1], rng)
            truth = F.one_hot(labels, len(dataset.classes)).float()
            labels = share * truth + (1 - share) * truth.roll(1, 0)

        def view(images=batch.images, flip=flip, patch=patch):
            drawn = augment(images, draws, flip=flip, pad=recipe.pad, cutout=recipe.cutout)
            if patch:
                pixels = (..., *patch)
                drawn[pixels] = drawn.roll(1, 0)[pixels]
            return dataset.normalise(drawn)

        yield view, labels


def _patch(size: int, rng: np.random.Generator):
    """A random patch (rows, columns) of a square image, and the share that it leaves."""
    half = size * (1 - rng.random()) ** 0.5 / 2

    def cut(centre: float) -> slice:
        return slice(round(max(centre - half, 0)), round(min(centre + half, size)))

    rows, columns = (cut(centre) for centre in size * rng.random(2))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return (rows, columns), 1 - area / size**2


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
            pixels = dataset.normalise(part.images).to(device)
            guess = net(pixels).argmax(1).cpu()
        hits += int((guess == part.labels).sum())
    return 100 * hits / len(images)


def calibration_batches(dataset: Dataset, count: int = 2000, batch: int = 500):
    """Normalised batches of the first `count` training images, un-augmented."""
    images = dataset.train.images[:count]
    for part in images.split(batch):
        yield dataset.normalise(part)


def evaluate(
    supernet: Supernet,
    config: SubnetConfig,
    dataset: Dataset,
    images: Images,
    *,
    bf16: bool = False,
    calibration: int = 2000,
) -> float:
    """Accuracy in percent of one sub-network; its statistics are computed if they are missing.

    Raises `ModelError` for a network with fewer outputs than there are classes.

    >>> images = load_dataset("generated", generated=(400, 100))
    >>> supernet, _ = pretrained(images)
    >>> accuracy_pct = evaluate(supernet, supernet.space.largest, images, images.test)
    >>> 80 < accuracy_pct <= 100
    True
    """
    if supernet.classes < len(dataset.classes):
        raise _other_outputs(supernet, dataset)
    if supernet.lacks_statistics(config):
        calibrate(supernet, config, calibration_batches(dataset, calibration), bf16=bf16)
    return accuracy_pct(supernet.prepare(config), dataset, images, bf16=bf16)


def quick_accuracies(
    supernet: Supernet, dataset: Dataset, count: int = 2000, *, bf16: bool
) -> dict[str, float]:
    """Validation accuracy of the two ends of the space, on at most `count` images; none for 0."""
    if not count:
        return {}
    result = {}
    held = dataset.val.take(slice(0, count))
    for name, end in (("max", supernet.space.largest), ("min", supernet.space.smallest)):
        config = supernet.canonical(end)
        supernet.statistics.pop(config, None)  # the weights have moved since
        result[f"accuracy_val_{name}_pct"] = evaluate(supernet, config, dataset, held, bf16=bf16)
        supernet.statistics.pop(config, None)
    return result


def _store(path, identity, supernet, step, history, reached: float) -> None:
    if path is None:
        return
    state = {
        "identity": identity,
        "net": supernet.net.state_dict(),
        "history": history,
        "reached": reached,
        "step": step.state_dict(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    atomic_write(path, file.getvalue())


def _resume(path, identity, supernet, step) -> tuple[list[dict], float]:
    """The rows of the epochs done, and how many epochs of the schedule they went through."""
    stored = b""
    if path is not None and step.peers.rank == 0 and Path(path).is_file():
        stored = b"+" + Path(path).read_bytes()
    stored = step.peers.tell(stored)
    if not stored:
        return [], 0.0
    try:
        state = torch.load(io.BytesIO(stored[1:]), weights_only=True)
        known = dict(state["identity"])
        history = state["history"]
        reached = state["reached"]
    except Exception as error:
        raise CheckpointError(f"{path}: no readable training state: {error!r}") from error
    if differing := _differences(known, identity):
        raise CheckpointError(
            f"{path}: belongs to another run: {'; '.join(differing)}; "
            "delete the file to start again"
        )
    supernet.net.load_state_dict(state["net"])
    step.load_state_dict(state["step"])
    return history, reached


def _differences(known: dict, expected: dict, within: str = "") -> list[str]:
    """What differs, field by field, such as ``recipe.epochs is 2000, expected 1``."""
    found = []
    for key in known | expected:
        one, other = known.get(key), expected.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{within}{key}.")
        elif one != other:
            found.append(f"{within}{key} is {one}, expected {other}")
    return found
