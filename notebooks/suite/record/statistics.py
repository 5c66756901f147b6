"""Means, ratios, ranks and hypervolumes of repeated runs, with their intervals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from scipy.stats import kendalltau

from dynlib.pareto import hypervolume
from suite.errors import SuiteError


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds; the bounds are NaN for a single value."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    n = len(values)
    if n < 2:
        return mean, math.nan, math.nan
    quantile = stdtrit(n - 1, 0.975)
    half = float(quantile * values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def spread(draws: Sequence[float]) -> dict[str, float]:
    """`low` and `high`, between which 95 % of independent draws lie, and `n`, how many there are:
    how far coefficients that nobody knows move a number, not how well its mean is known."""
    low, high = np.quantile(np.asarray(draws, float), (0.025, 0.975))
    return {"low": float(low), "high": float(high), "n": len(draws)}


def same_sign_pct(draws: Sequence[float]) -> float:
    """Share of the draws, in %, that have the sign of their median; none has it where that is 0."""
    draws = np.asarray(draws, float)
    return float(100 * (np.sign(draws) * np.sign(np.median(draws)) > 0).mean())


def geometric_ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of ours / theirs over paired runs, with a 95 % t interval on the logarithms.

    Returns (mean, low, high). Raises `SuiteError` for fewer than 5 pairs.
    """
    if len(ours) < 5 or len(ours) != len(theirs):
        raise SuiteError(f"comparing needs at least 5 paired runs, got {len(ours)}")
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    mean, low, high = (math.exp(value) for value in mean_interval(logs))
    return mean, low, high


def tau_ceiling(
    half_one: np.ndarray, half_two: np.ndarray, rng: np.random.Generator, *, draws: int = 400
) -> float:
    """Mean tau between true accuracies and measured ones: what a perfect predictor would have.

    Every sub-network is measured on the same two halves of the images. Half the spread of the
    differences is the noise of their mean (what both halves share moves no rank), and the true
    accuracies are the measured ones, drawn together until their variance lacks that noise.

    Raises `SuiteError` for fewer than 10 sub-networks, or if noise is all there is.
    """
    half_one = np.asarray(half_one, float)
    half_two = np.asarray(half_two, float)
    if len(half_one) < 10:
        raise SuiteError(f"a ceiling needs 10 measured sub-networks, got {len(half_one)}")
    measured = (half_one + half_two) / 2
    difference = half_one - half_two
    noise = np.std(difference, ddof=1) / 2
    spread = measured.std(ddof=1)
    if spread <= noise:
        raise SuiteError("the measured accuracies differ by no more than their noise")
    share = 1 - (noise / spread) ** 2
    mean = measured.mean()
    true = mean + np.sqrt(share) * (measured - mean)
    errors = rng.standard_normal((draws, len(true)))
    noisy = true + noise * errors
    taus = [kendalltau(true, again).statistic for again in noisy]
    return float(np.mean(taus))


def growth(tables: Sequence[pd.DataFrame], directions: Mapping[str, str]) -> list[np.ndarray]:
    """Hypervolume of each table after each of its trials.

    The reference point of all is the worst corner of their union.
    """
    minimised, reference = _minimised(tables, directions)
    curves = []
    for points in minimised:
        trials = range(1, len(points) + 1)
        curves.append(np.array([hypervolume(points[:trial], reference) for trial in trials]))
    return curves


def volumes(tables: Sequence[pd.DataFrame], directions: Mapping[str, str]) -> np.ndarray:
    """Hypervolume of each table of trials at its end; see `growth`."""
    minimised, reference = _minimised(tables, directions)
    return np.array([hypervolume(points, reference) for points in minimised])


def _minimised(tables: Sequence[pd.DataFrame], directions: Mapping[str, str]):
    """The objectives of each table, all to be low, and the worst corner of their union."""
    signs = np.array([1.0 if way == "minimize" else -1.0 for way in directions.values()])
    minimised = [table[list(directions)].to_numpy(float) * signs for table in tables]
    return minimised, np.concatenate(minimised).max(axis=0)
