"""Ratios and hypervolumes of repeated runs."""

import numpy as np
import pytest
from test_search import GOALS, SPACE, objective

from dynlib.searching import search
from suite.errors import SuiteError
from suite.record.statistics import geometric_ratio, growth, same_sign_pct, spread, volumes


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
