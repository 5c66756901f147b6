"""Incremental training: one group of channels after the other, the earlier ones frozen.

Increment i learns what those before it leave over (Xun et al., arXiv 2105.03600, section 3):

    loss_i = CE(z_{i-1}(x) + W_i f_i(x), y)

with the logits z of the earlier increments constant. No gradient and no statistic of an earlier
one is computed, so it cannot change.
"""

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from dynlib.data import augment
from dynlib.images import Dataset
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.training.recipes import Recipe
from dynlib.training.step import bf16_pays, normalise_, optimisers, rate
from dynlib.training.trainer import calibration_batches
from suite.papers.incremental import add_increment, increment, next_increment


def grow(
    supernet: Supernet, dataset: Dataset, recipe: Recipe, *, seed: int = 0, until: int | None = None
) -> pd.DataFrame:
    """Train the increments that `supernet` lacks, in place; one row per increment and epoch.

    Every draw of an epoch comes from (seed, increment, epoch). A super-network that has its first
    increments, loaded from a checkpoint, goes on as if it had just trained them.

    Args:
        recipe: its epochs are those of one increment; what concerns sub-networks is not used.
        until: stop when there are so many increments; None: all.
    """
    rows, bf16 = [], bf16_pays(next(supernet.parameters()).device)
    while (index := len(supernet.statistics)) < (until or supernet.space.size):
        earlier = [increment(supernet, i) for i in range(index)]
        alone = next_increment(supernet)
        solvers = optimisers(alone, recipe)
        steps = recipe.epochs * max(1, len(dataset.train) // recipe.batch_size)
        schedules = [
            LambdaLR(solver, lambda step, steps=steps: rate(step / steps, recipe.warmup))
            for solver in solvers
        ]
        for epoch in range(recipe.epochs):
            losses = []
            for images, labels in _batches(dataset, recipe, [seed, index, epoch]):
                losses.append(_learn(alone, earlier, images, labels, recipe, bf16))
                for solver, schedule in zip(solvers, schedules, strict=True):
                    solver.step()
                    solver.zero_grad()
                    schedule.step()
                normalise_(solvers[0])
            rows.append({"increment": index + 1, "epoch": epoch + 1, "loss": np.mean(losses)})
        calibrate(alone, alone.space.smallest, calibration_batches(dataset), bf16=bf16)
        add_increment(supernet, alone)
    return pd.DataFrame(rows)


def _batches(dataset: Dataset, recipe: Recipe, seed: list[int]):
    """Yields the augmented, normalised images and the labels of every batch of an epoch."""
    draws = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))
    order = torch.randperm(len(dataset.train), generator=draws)
    for index in order.split(recipe.batch_size)[: max(1, len(order) // recipe.batch_size)]:
        batch = dataset.train.take(index)
        flip = torch.rand(len(batch), generator=draws) < 0.5
        images = augment(batch.images, draws, flip=flip, pad=recipe.pad, cutout=recipe.cutout)
        yield dataset.normalise(images), batch.labels


def _learn(alone: Supernet, earlier, images, labels, recipe: Recipe, bf16: bool) -> float:
    """Accumulate the gradients of one batch and return its loss."""
    device = next(alone.parameters()).device
    images, labels = images.to(device), labels.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        with torch.inference_mode():
            given = [net(images).float() for net in earlier]
        logits = alone(images, alone.space.smallest).float()
    loss = F.cross_entropy(sum(given, logits), labels, label_smoothing=recipe.label_smoothing)
    loss.backward()
    return loss.item()
