"""The upper level against trying everything."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import NETS, board, net_table, unit

from dynlib.manager.planner import Demand, Planner, schedulable
from dynlib.workload import Requirement

BOARD = board(unit(noise_cv=0.05))
MHZ = BOARD.units[0].freqs
LIMITS = (("gpu", MHZ[-1]),)
SLOW = (("gpu", 1.0),)


def demand(deadline_ms, floor_pct=0.0, app="app", period_ms=100.0):
    return Demand(app, "net", Requirement(deadline_ms, period_ms, floor_pct), False, 0)


@given(NETS, st.floats(5, 150), st.integers(50, 90), st.floats(1, 2))
@settings(max_examples=60)
def test_one_app_gets_the_best_of_all_points_and_clocks(nets, deadline_ms, floor_pct, slow):
    for objective in ("energy", "accuracy"):
        planner = Planner(BOARD, {"net": net_table(nets)}, objective, 2.6)
        floor = float(floor_pct) if objective == "energy" else 0.0
        wanted = demand(deadline_ms, floor)
        plan = planner.plan((wanted,), (("gpu", slow),), LIMITS)
        found = [
            (p.active_mw[i] * p.latency_ms[i] * slow / 100, p.accuracy_val_pct)
            for p in planner.tables["net"].on("gpu") for i in range(len(MHZ))
            if p.accuracy_val_pct >= floor
            and schedulable([(p.latency_ms[i] * slow * planner.margin(p), 100.0, deadline_ms)])
        ]  # fmt: skip
        if not found:
            continue  # what is given up then is another test's subject
        assert plan.feasible
        if objective == "energy":
            assert plan.power_mw == pytest.approx(min(found)[0])
        else:
            best = max(accuracy for _, accuracy in found)
            assert plan.accuracy_pct == best
            assert plan.power_mw == pytest.approx(min(mw for mw, a in found if a == best))


@given(NETS, st.floats(10, 150), st.floats(10, 150), st.integers(50, 80))
@settings(max_examples=60)
def test_a_feasible_plan_of_two_apps_keeps_every_promise(nets, one_ms, two_ms, floor_pct):
    planner = Planner(BOARD, {"net": net_table(nets)}, "energy", 2.6)
    wanted = (demand(one_ms, float(floor_pct), "a"), demand(two_ms, 0.0, "b", 120.0))
    plan = planner.plan(wanted, SLOW, LIMITS)
    assert set(plan.placements) == {"a", "b"}
    if not plan.feasible:
        assert plan.degraded
        return
    index = MHZ.index(plan.clocks["gpu"])
    total = 0.0
    for app in wanted:
        point = planner.tables["net"].point(*plan.placements[app.app])
        assert point.accuracy_val_pct >= app.need.floor_pct
        total += point.latency_ms[index] / min(app.need.period_ms, app.need.deadline_ms)
    assert total <= 1 + 1e-9


def test_a_point_is_not_given_up_for_one_that_does_not_fit():
    """The small point is worse in time and power, but there is memory only for it."""
    planner = Planner(BOARD, {"net": net_table([(80, 10, 4), (80, 12, 1)])}, "energy", 2.6)
    assert planner.plan((demand(50.0),), SLOW, LIMITS, math.inf).placements["app"].subnet == "n0"
    tight = planner.plan((demand(50.0),), SLOW, LIMITS, 2.0)
    assert tight.feasible
    assert tight.placements["app"].subnet == "n1"
