"""Accuracy of a sub-network predicted from a few hundred measured ones.

A Gaussian process over the choices on every axis and the logarithm of the work; its length and its
noise are those of greatest likelihood on a small grid (Rasmussen and Williams 2006, chapter 5).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import linalg

from dynlib.errors import SearchError
from dynlib.space import SearchSpace, SubnetConfig

_LENGTHS = (0.5, 1.0, 2.0, 4.0)
_NOISES = (0.02, 0.1, 0.3, 1.0, 3.0)  # variance of the noise over that of the process

WorkOf = Callable[[SubnetConfig], float]


class AccuracyPredictor:
    """Learns accuracy from measured sub-networks.

    Args:
        space: whose sub-networks it sees.
        work: MACs of a sub-network, or anything else known before it is measured.
    """

    def __init__(self, space: SearchSpace, work: WorkOf):
        self.space = space
        self.work = work
        lasts = [len(choices) - 1 for _, choices in space.axes()]
        self._scales = np.array(lasts).clip(1)  # every axis from 0 to 1
        self._seen: dict[SubnetConfig, np.ndarray] = {}

    def fit(self, configs: Sequence[SubnetConfig], accuracy_pct: Sequence[float]):
        """Learn; returns itself. Raises `SearchError` for fewer than 5 sub-networks."""
        if len(configs) < 5:
            raise SearchError(f"learning needs 5 measured sub-networks, got {len(configs)}")
        self._x = self._features(configs)
        accuracy = np.asarray(accuracy_pct, float)
        self._mean = accuracy.mean()
        self._sd = accuracy.std() or 1.0
        y = (accuracy - self._mean) / self._sd
        grid = itertools.product(_LENGTHS, _NOISES)
        fits = (self._condition(y, length, noise) for length, noise in grid)
        likeliest = max(fits, key=lambda fit: fit[0])
        _, self._length, self._factor, self._weights, self._scale = likeliest
        return self

    def _condition(self, y: np.ndarray, length: float, noise: float):
        """Log likelihood of the process with its best scale, and what predicting needs."""
        n = len(y)
        kernel = _kernel(self._x, self._x, length)
        noisy = kernel + noise * np.eye(n)
        factor = linalg.cho_factor(noisy, lower=True)
        weights = linalg.cho_solve(factor, y)
        fit = float(y @ weights)
        scale = max(fit / n, 1e-12)
        triangle, _ = factor
        half_log_determinant = np.log(np.diag(triangle)).sum()
        likelihood = -half_log_determinant - n / 2 * np.log(scale)
        return likelihood, length, factor, weights, scale

    def predict(self, configs: Sequence[SubnetConfig]) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy in percent and its standard deviation, noise of a measurement excluded."""
        x = self._features(configs)
        cross = _kernel(x, self._x, self._length)
        deviation = cross @ self._weights
        mean = self._mean + self._sd * deviation
        # What the measured ones say about these takes away from what is unknown without them.
        solved = linalg.cho_solve(self._factor, cross.T).T
        explained = (cross * solved).sum(axis=1)
        variance = self._scale * (_prior(x) - explained)
        spread = np.sqrt(variance.clip(0))
        return mean, self._sd * spread

    def _features(self, configs: Iterable[SubnetConfig]) -> np.ndarray:
        for config in configs:
            if config not in self._seen:
                shares = self.space.encode(config) / self._scales
                log_work = np.log(self.work(config))
                self._seen[config] = np.append(shares, log_work)
        return np.array([self._seen[config] for config in configs])


def _kernel(x: np.ndarray, z: np.ndarray, length: float) -> np.ndarray:
    """A linear trend and smooth deviations from it."""
    trend = 1 + x @ z.T
    difference = x[:, None] - z
    distance = (difference**2).sum(axis=2)
    return trend + np.exp(-distance / (2 * length**2))


def _prior(x: np.ndarray) -> np.ndarray:
    """The diagonal of the kernel of `x` with itself."""
    return 2 + (x**2).sum(axis=1)


def stratified(
    space: SearchSpace,
    work: WorkOf,
    count: int,
    rng: np.random.Generator,
    *,
    strata: int = 10,
    avoid: Iterable[SubnetConfig] = (),
    draws: int = 200,
) -> list[SubnetConfig]:
    """Random sub-networks spread evenly over the logarithm of their work, at most `count`."""
    low = np.log(work(space.smallest))
    high = np.log(work(space.largest))
    avoid = set(avoid)
    groups: list[list[SubnetConfig]] = [[] for _ in range(strata)]
    # Few draws are small or large, so many are needed until the outer strata have theirs.
    drawn = dict.fromkeys(space.sample(rng) for _ in range(draws * strata))
    for config in drawn:
        if config in avoid:
            continue
        above = np.log(work(config)) - low
        share = above / (high - low)
        stratum = min(int(share * strata), strata - 1)
        groups[stratum].append(config)
    turns = itertools.zip_longest(*groups)
    by_turns = itertools.chain.from_iterable(turns)
    evenly = [config for config in by_turns if config is not None]
    return evenly[:count]
