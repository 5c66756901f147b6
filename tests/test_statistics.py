"""Ratios, ranks and hypervolumes of repeated runs."""

import numpy as np
import pytest
from scipy.stats import kendalltau
from test_search import GOALS, SPACE, objective

from dynlib.searching import search
from suite.errors import SuiteError
from suite.record.statistics import (
    geometric_ratio,
    growth,
    same_sign_pct,
    spread,
    tau_ceiling,
    volumes,
)


def test_volumes_use_one_reference_and_ratios_need_five_pairs():
    tables = [search(SPACE, objective, GOALS, trials=30, seed=s) for s in range(2)]
    one, two = volumes(tables, GOALS)
    assert one > 0
    assert two > 0
    same = volumes([tables[0]] * 2, GOALS)
    assert same[0] == same[1]
    for curve, end in zip(growth(tables, GOALS), (one, two), strict=True):
        assert (np.diff(curve) >= 0).all()
        assert curve[-1] == end
    mean, low, high = geometric_ratio(np.array([2, 2.2, 1.8, 2, 2]), np.ones(5))
    assert low < mean < high
    assert mean == pytest.approx(2, rel=0.05)
    with pytest.raises(SuiteError, match="at least 5"):
        geometric_ratio(np.ones(4), np.ones(4))


def test_a_spread_is_of_draws_and_not_of_their_mean():
    draws = np.arange(-10.0, 91.0)
    assert spread(draws) == {"low": -7.5, "high": 87.5, "n": 101}
    assert spread(np.tile(draws, 100))["low"] == pytest.approx(-7.5, abs=0.6)


def test_the_share_of_a_sign():
    assert same_sign_pct([1, 2, 3, -1]) == same_sign_pct([-1, -2, -3, 1]) == 75
    assert same_sign_pct([0, 0, 1]) == 0


@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_the_ceiling_is_the_tau_of_the_truth(noise):
    """Estimated from two noisy halves alone, it meets the tau that the known truth has."""
    rng = np.random.default_rng(1)
    estimates, taus = [], []
    for _ in range(30):
        true, shared = rng.normal(85, 1, 80), rng.normal(0, 1)  # images that are hard for all
        one, two = (true + shared + rng.normal(0, noise * 2**0.5, 80) for _ in range(2))
        estimates.append(tau_ceiling(one, two, rng, draws=20))
        taus.append(kendalltau(true, (one + two) / 2).statistic)
    assert np.mean(estimates) == pytest.approx(np.mean(taus), abs=0.03)


def test_a_ceiling_of_noise_or_of_nothing_is_an_error():
    rng = np.random.default_rng(0)
    with pytest.raises(SuiteError, match="needs 10"):
        tau_ceiling([1, 2], [1, 2], rng)
    half = rng.normal(size=20)
    with pytest.raises(SuiteError, match="no more than their noise"):
        tau_ceiling(half, -half, rng)
