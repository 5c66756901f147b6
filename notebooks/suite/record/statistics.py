"""Means and their intervals."""

import math

import numpy as np
from scipy.special import stdtrit


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds; the bounds are NaN for a single value."""
    values = np.asarray(values, float)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half
