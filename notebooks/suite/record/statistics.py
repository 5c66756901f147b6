"""Means, ratios and hypervolumes of repeated runs, with their intervals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

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
