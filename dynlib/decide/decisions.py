"""Decisions of a walk: each a pure function of what is seen behind a step, one route an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from dynlib.decide.walk import Seen
from dynlib.errors import ModelError


def confidence(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The largest probability of each image, (N,)."""
    return (logits / temperature).softmax(1).amax(1)


@dataclass(frozen=True)
class Sure:
    """Route 0 where the head is at least so confident of an image, else 1; 1 for NaN too.

    Args:
        threshold: of the confidence, 0 to 1.
        temperature: that calibrates the head; see `fit_temperature`.

    Raises `ModelError` for a threshold outside 0 to 1 or a temperature that is not positive.
    """

    threshold: float
    temperature: float = 1.0

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ModelError(f"threshold {self.threshold}; expected a confidence, 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise ModelError(f"temperature {self.temperature}; expected a number above 0")

    def __call__(self, seen: Seen) -> torch.Tensor:
        """A NaN is never sure, and so goes on to the larger network."""
        sure = confidence(seen.said, self.temperature) >= self.threshold
        return (~sure).long()


@dataclass(frozen=True)
class Given:
    """The route of each image by its number in the batch: a fixed, a random or an oracle's choice.

    >>> Given.fixed(2, 4), Given.random([0.5, 0.5], 4, torch.Generator())  # of four images
    (Given(routes=tensor([2, 2, 2, 2])), Given(routes=tensor([...])))
    """

    routes: torch.Tensor

    @classmethod
    def fixed(cls, route: int, count: int) -> "Given":
        """The same route for all of `count` images."""
        return cls(torch.full((count,), route))

    @classmethod
    def random(cls, shares: Sequence[float], count: int, generator: torch.Generator) -> "Given":
        """Each route with its probability, independently."""
        weights = torch.tensor(shares, dtype=torch.float)
        return cls(torch.multinomial(weights, count, replacement=True, generator=generator))

    @classmethod
    def oracle(cls, right: torch.Tensor) -> "Given":
        """The first route that is right about the image, else the last; `right` (N, routes)."""
        first = right.long().argmax(1)
        last = right.shape[1] - 1
        return cls(torch.where(right.any(1), first, last))

    def __call__(self, seen: Seen) -> torch.Tensor:
        """Whatever is seen."""
        return self.routes[seen.rows]


@dataclass(frozen=True)
class Highest:
    """The route that a gate gives the highest score; the last, the largest, if any is NaN.

    `bonus` for each route is added to the scores: the knob that turns a trained gate, up to more
    work for more accuracy.
    """

    bonus: Sequence[float] | None = None

    def __call__(self, seen: Seen) -> torch.Tensor:
        """As in the class."""
        scores = seen.said
        if self.bonus is not None:
            scores = scores + torch.tensor(self.bonus)
        unknown = scores.isnan().any(1)
        return scores.argmax(1).masked_fill(unknown, scores.shape[1] - 1)


@dataclass(frozen=True)
class Kept:
    """1, to run it, for each part whose logit to keep is at least that to drop; for NaN too.

    Takes two logits a part, (n, 2, *parts), as of `maskers`. `bonus` is added to those to keep: the
    knob that turns a trained masker.
    """

    bonus: float = 0.0

    def __call__(self, seen: Seen) -> torch.Tensor:
        """(n, *parts)."""
        keep, drop = seen.said.unbind(1)
        return (~(keep + self.bonus < drop)).long()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature at which probabilities fit held-out labels best (arXiv 1706.04599)."""

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_t), labels))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def threshold_table(
    right: np.ndarray, sure: np.ndarray, cost: Sequence[float], thresholds: Sequence[float]
) -> pd.DataFrame:
    """What each threshold, common to all positions, costs an image on average.

    Args:
        right, sure: of each image at each of P positions, (N, P); the last always answers.
        cost: what an image has cost that leaves at each position, in any unit.

    Returns:
        One row per threshold: exit_threshold, accuracy_pct, cost, and stays_pct, images that come
        to the last position.
    """
    rows = []
    everyone = np.arange(len(right))
    for threshold in thresholds:
        leaves = sure >= threshold
        leaves[:, -1] = True
        position = leaves.argmax(1)
        row = {
            "exit_threshold": threshold,
            "accuracy_pct": 100 * right[everyone, position].mean(),
            "cost": np.asarray(cost)[position].mean(),
            "stays_pct": 100 * (position == right.shape[1] - 1).mean(),
        }
        rows.append(row)
    return pd.DataFrame(rows)
