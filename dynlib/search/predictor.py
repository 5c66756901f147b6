"""Accuracy of a sub-network predicted from a few hundred measured ones, and how good that can be.

A Gaussian process over the choices on every axis and the logarithm of the work; its length and its
noise are those of greatest likelihood on a small grid (Rasmussen and Williams 2006, chapter 5).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import linalg, stats

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
        self.space, self.work = space, work
        self._scales = np.array([max(1, len(choices) - 1) for _, choices in space.axes()])
        self._seen: dict[SubnetConfig, np.ndarray] = {}

    def fit(self, configs: Sequence[SubnetConfig], accuracy_pct: Sequence[float]):
        """Learn; returns itself. Raises `SearchError` for fewer than 5 sub-networks."""
        if len(configs) < 5:
            raise SearchError(f"learning needs 5 measured sub-networks, got {len(configs)}")
        self._x, y = self._features(configs), np.asarray(accuracy_pct, float)
        self._mean, self._sd = y.mean(), y.std() or 1.0
        y = (y - self._mean) / self._sd
        fits = (self._condition(y, *pair) for pair in itertools.product(_LENGTHS, _NOISES))
        _, self._length, self._factor, self._weights, self._scale = max(fits, key=lambda f: f[0])
        return self

    def _condition(self, y: np.ndarray, length: float, noise: float):
        """Log likelihood of the process with its best scale, and what predicting needs."""
        kernel = _kernel(self._x, self._x, length) + noise * np.eye(len(y))
        factor = linalg.cho_factor(kernel, lower=True)
        weights = linalg.cho_solve(factor, y)
        scale = max(float(y @ weights) / len(y), 1e-12)
        likelihood = -np.log(np.diag(factor[0])).sum() - len(y) / 2 * np.log(scale)
        return likelihood, length, factor, weights, scale

    def predict(self, configs: Sequence[SubnetConfig]) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy in percent and its standard deviation, noise of a measurement excluded."""
        cross = _kernel(self._features(configs), self._x, self._length)
        spread = linalg.cho_solve(self._factor, cross.T)
        prior = _kernel(self._features(configs), None, self._length)
        variance = self._scale * (prior - (cross * spread.T).sum(axis=1))
        mean = self._mean + self._sd * (cross @ self._weights)
        return mean, self._sd * np.sqrt(variance.clip(0))

    def _features(self, configs: Iterable[SubnetConfig]) -> np.ndarray:
        for config in configs:
            if config not in self._seen:
                choices = self.space.encode(config) / self._scales
                self._seen[config] = np.append(choices, np.log(self.work(config)))
        return np.array([self._seen[config] for config in configs])


def _kernel(x: np.ndarray, z: np.ndarray | None, length: float) -> np.ndarray:
    """A linear trend and smooth deviations from it; with `z` None only the diagonal of (x, x)."""
    if z is None:
        return 2 + (x**2).sum(axis=1)
    distance = ((x[:, None] - z) ** 2).sum(axis=2)
    return 1 + x @ z.T + np.exp(-distance / (2 * length**2))


def stratified(
    space: SearchSpace, work: WorkOf, count: int, rng: np.random.Generator, *, strata: int = 10,
    avoid: Iterable[SubnetConfig] = (), draws: int = 200,
) -> list[SubnetConfig]:  # fmt: skip
    """Random sub-networks spread evenly over the logarithm of their work, at most `count`."""
    low, high = (np.log(work(config)) for config in (space.smallest, space.largest))
    avoid, groups = set(avoid), [[] for _ in range(strata)]
    for config in dict.fromkeys(space.sample(rng) for _ in range(draws * strata)):
        share = (np.log(work(config)) - low) / (high - low)
        if config not in avoid:
            groups[min(int(share * strata), strata - 1)].append(config)
    by_turns = itertools.zip_longest(*groups)
    return [config for turn in by_turns for config in turn if config is not None][:count]


def kendall(one: Sequence[float], two: Sequence[float]) -> float:
    """Kendall's rank correlation (tau-b), 1 for the same order."""
    return float(stats.kendalltau(one, two).statistic)


def tau_ceiling(
    half_one: np.ndarray, half_two: np.ndarray, rng: np.random.Generator, *, draws: int = 400
) -> float:
    """Mean tau between true accuracies and measured ones: what a perfect predictor would have.

    Every sub-network is measured on the same two halves of the images. Half the spread of the
    differences is the noise of their mean (what both halves share moves no rank), and the true
    accuracies are the measured ones, drawn together until their variance lacks that noise.

    Raises `SearchError` for fewer than 10 sub-networks, or if noise is all there is.
    """
    half_one, half_two = np.asarray(half_one, float), np.asarray(half_two, float)
    if len(half_one) < 10:
        raise SearchError(f"a ceiling needs 10 measured sub-networks, got {len(half_one)}")
    measured = (half_one + half_two) / 2
    noise = np.std(half_one - half_two, ddof=1) / 2
    spread = measured.std(ddof=1)
    if spread <= noise:
        raise SearchError("the measured accuracies differ by no more than their noise")
    share = 1 - (noise / spread) ** 2
    true = measured.mean() + np.sqrt(share) * (measured - measured.mean())
    noisy = true + noise * rng.standard_normal((draws, len(true)))
    return float(np.mean([kendall(true, row) for row in noisy]))
