"""What knowing the noise ahead is worth, and that no policy ends below what it says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import board, periodic, tables, unit

from dynlib.boards.board import Opp
from dynlib.errors import DynlibError
from dynlib.machine.bind import load_board
from dynlib.runtime.case import Case
from suite.papers.dynamic_ofa import published_tables
from suite.studies.foresight import foresight
from suite.studies.manage import against_optimum

OPPS = tuple(Opp(f, 400 + f / 2) for f in (250.0, 400.0, 500.0, 625.0, 800.0, 1000.0))


def worth(noise_cv, period_ms=50.0, late_pct=1.0):
    on = board(unit(opps=OPPS, noise_cv=noise_cv))
    workload = periodic(period_ms, accuracy_floor_pct=75.0)
    return foresight(Case(workload, on, tables(on)), late_pct=late_pct)


def test_without_noise_it_is_worth_nothing():
    assert worth(0.0) == pytest.approx(1, abs=1e-3)
    assert worth(0.1, period_ms=1000.0) == pytest.approx(1, abs=0.02)  # the lowest clock will do


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 0.15), st.floats(35, 75))
def test_it_is_worth_something_and_more_if_fewer_may_be_late(noise_cv, period_ms):
    usual, strict = (worth(noise_cv, period_ms, late) for late in (1.0, 0.1))
    assert usual >= 0.995  # the two sides are summed on different grids
    assert strict >= usual * 0.995


def test_where_nothing_is_in_time_it_says_so():
    with pytest.raises(DynlibError, match=r"case: no network with 75 %.*15 ms.*99 %"):
        worth(0.1, period_ms=15.0)


def test_the_manager_never_ends_below_it():
    on = load_board("hikey960")
    points = published_tables(on)
    table = against_optimum(["S1", "S4"], on, points, seeds=range(6))
    calm, disturbed = (table[table["scenario"] == name] for name in ("S1", "S4"))
    assert calm["above_idle_over_oracle"].mean() >= calm["above_idle_least"].iloc[0] > 1.05
    assert disturbed["above_idle_least"].isna().all()  # a competitor is there too
