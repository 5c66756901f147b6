from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import (
    NOISY,
    NOISY_TABLES,
    board,
    cases,
    energy_mj,
    events,
    fixed,
    frames_of,
    optimum,
    periodic,
    run,
    tables,
    unit,
)

from dynlib.boards.board import Thermal
from dynlib.errors import DynlibError
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Placement, edf
from dynlib.points import PointTable
from dynlib.runtime import programme as programme_module
from dynlib.runtime.case import Case
from dynlib.runtime.oracle import offered
from dynlib.runtime.rivals import Static, linux_default
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import published_tables
from suite.studies.manage import against_optimum
from suite.studies.scenarios import scenario

GPU = NOISY.unit("gpu")


def bound(workload, log, seed=0, on=NOISY, points=NOISY_TABLES, **options):
    """Optimum for the frames that a run served in time."""
    frames = frames_of(log, workload, points)
    done = frames[frames["on_time"]]
    only = zip(done["app"], done["frame"], strict=True)
    return optimum(workload, on, points, seed, only, **options)


@settings(deadline=None, max_examples=20)
@given(
    needs=st.lists(st.tuples(st.floats(15, 300), st.floats(20, 300), st.sampled_from([0.0, 75.0])),
                   min_size=1, max_size=3),
    subnet=st.sampled_from(["small", "large"]),
    mhz=st.sampled_from(GPU.freqs),
    governed=st.booleans(),
    stretch=st.floats(1, 2),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_no_policy_takes_less(needs, subnet, mhz, governed, stretch, seed):
    apps = tuple(App(f"a{i}", "net", d, period_ms=p, accuracy_floor_pct=f)
                 for i, (d, p, f) in enumerate(needs))  # fmt: skip
    changes = (Change(0.4, unit="gpu", stretch=stretch), Change(0.8, unit="gpu", cap_mhz=500.0),
               Change(1.0, unit="gpu", lost=True), Change(1.2, unit="gpu", lost=False))  # fmt: skip
    workload = Workload("w", 1.5, apps, changes)
    placed = {app.name: Placement(subnet, "gpu") for app in apps}
    governors = {"gpu": "simple_ondemand"} if governed else {}
    rivals = (Manager(NOISY, NOISY_TABLES), Manager(NOISY, NOISY_TABLES, objective="accuracy"),
              Static("fixed", placed, {"gpu": mhz}, governors, choose=edf))  # fmt: skip
    # What a search has proved when it stops is a bound, too; others let it end.
    best = optimum(workload, NOISY, NOISY_TABLES, seed, search_s=0.1)
    for policy in rivals:
        log = run(workload, NOISY, NOISY_TABLES, policy, seed)
        least = bound(workload, log, seed, search_s=0.1)
        assert energy_mj(log) >= least.energy_mj * (1 - 1e-9)
        served = int(frames_of(log, workload, NOISY_TABLES)["on_time"].sum())
        assert served <= best.served


@settings(deadline=None, max_examples=5)
@given(
    air_c=st.floats(-20, 60),
    period_ms=st.floats(22, 60),
    subnet=st.sampled_from(["small", "large"]),
)
def test_heat_only_adds_to_it(air_c, period_ms, subnet):
    facts = Thermal("zone", "published", passive_c=(35.0, 45.0), polling_ms=1000.0,
                    passive_polling_ms=100.0, sustainable_power_mw=3000.0)  # fmt: skip
    warm = replace(NOISY, thermal=facts, static_slope_per_c=0.01)
    workload = periodic(period_ms, horizon_s=8.0, changes=[Change(1.0, ambient_c=air_c)])
    best = optimum(workload, warm, NOISY_TABLES)
    for policy in (Manager(warm, NOISY_TABLES), fixed(subnet, 1000.0)):
        log = run(workload, warm, NOISY_TABLES, policy)
        assert energy_mj(log) >= bound(workload, log, 0, warm).energy_mj * (1 - 1e-9)
        served = int(frames_of(log, workload, NOISY_TABLES)["on_time"].sum())
        assert served <= best.served
    coldest_c = min(air_c, 25.0)
    nobody = optimum(replace(workload, apps=()), warm, NOISY_TABLES)
    assert nobody.energy_mj == pytest.approx(8 * warm.power_mw({}, {}, coldest_c))


@pytest.mark.parametrize("floor_pct", [0.0, 75.0])
def test_equals_brute_force_where_a_frame_runs_at_one_clock(floor_pct):
    on = board(unit(settle_ms=0.0))
    points = tables(on)
    # Windows as long as a clock takes exactly: no mix of clocks is better than the best one.
    for deadline_ms in (20.0, 40.0, 80.0):
        workload = periodic(100.0, deadline_ms=deadline_ms, horizon_s=1.0,
                            accuracy_floor_pct=floor_pct)  # fmt: skip
        found = []
        for subnet, mhz in product(("small", "large"), on.unit("gpu").freqs):
            point = points["net"].point(subnet, "gpu")
            ms = point.latency_ms[on.unit("gpu").freqs.index(mhz)]
            if ms <= deadline_ms and point.accuracy_val_pct >= floor_pct:
                gpu = on.unit("gpu")
                found.append(ms * (gpu.power_mw(mhz) - gpu.idle_mw(250.0)) / 1000)
        best = optimum(workload, on, points)
        assert best.energy_mj == pytest.approx(best.idle_mj + 10 * min(found))
        assert best.served == 10


def test_a_window_between_two_clocks_mixes_them():
    on = board(unit(settle_ms=0.0))
    workload = periodic(100.0, deadline_ms=30.0, horizon_s=1.0, accuracy_floor_pct=75.0)
    gpu, best = on.unit("gpu"), optimum(workload, on, tables(on))
    cost = {mhz: ms * (gpu.power_mw(mhz) - gpu.idle_mw(250.0)) / 1000
            for mhz, ms in ((1000.0, 20.0), (500.0, 40.0))}  # fmt: skip
    assert best.energy_mj - best.idle_mj == pytest.approx(10 * (cost[1000.0] + cost[500.0]) / 2)


def test_a_frame_stays_on_its_unit_where_that_can_be_decided(monkeypatch):
    # The CPU is ten times slower, takes a fraction of the power and is in time for one of two
    # frames: 150 ms of the other half there and the rest on the GPU would be cheaper still.
    on = board(unit(settle_ms=0.0, c_uw_mhz_v2=40000.0), unit("cpu", "cpu", c_uw_mhz_v2=1.0))
    points = tables(on, nets=(("large", 80.0, 20.0),), units=("gpu", "cpu"))
    apps = tuple(App(name, "net", 300.0, period_ms=1000.0) for name in "ab")
    workload = Workload("w", 5.0, apps)
    one = optimum(replace(workload, apps=apps[:1]), on, points)
    stays = optimum(workload, on, points)
    at_250_mj = 80.0 * (on.unit("gpu").power_mw(250.0) - on.unit("gpu").idle_mw(250.0)) / 1000
    assert stays.energy_mj == pytest.approx(one.energy_mj + 5 * at_250_mj, rel=1e-5)
    assert stays.served == 10
    assert 0 <= stays.gap <= 1e-4
    loose = [optimum(workload, on, points, search_s=0.0)]
    for limit in ("MOST_BINARIES", "MOST_COLUMNS"):
        with monkeypatch.context() as patch:
            patch.setattr(programme_module, limit, 0)
            loose.append(optimum(workload, on, points))
    for best in loose:
        assert best.energy_mj < stays.energy_mj - 1
        assert best.served == 10


def test_only_the_optimum_says_what_is_infeasible():
    changes = [Change(1.0, "app", deadline_ms=15.0), Change(2.0, "app", deadline_ms=100.0)]
    workload = periodic(100.0, horizon_s=3.0, changes=changes, accuracy_floor_pct=75.0)
    best = optimum(workload, board(), tables(board()))
    assert {frame for _, frame in best.infeasible} == set(range(10, 20))
    assert best.spans_s[0][0] == pytest.approx(1.0)
    assert best.spans_s[-1][1] == pytest.approx(1.915)
    assert best.served == 20  # whole frames: 10 in three quarters are none


def test_two_frames_at_once_share_the_unit():
    on = board(unit(settle_ms=0.0))
    apps = tuple(App(n, "net", 40.0, period_ms=100.0, accuracy_floor_pct=75.0) for n in "ab")
    one, two = (optimum(Workload("w", 1.0, apps[:n]), on, tables(on)) for n in (1, 2))
    # Alone each would run at 500 MHz; together only the highest clock is in time.
    assert two.energy_mj - two.idle_mj > 2.5 * (one.energy_mj - one.idle_mj)
    assert not two.infeasible


def test_offered_frames_are_those_of_the_engine():
    workload = Workload("w", 5.0, (App("a", "net", 100.0, "server", 60.0),))
    log = run(workload, NOISY, NOISY_TABLES, fixed(app="a"), 4)
    expected = [(e["frame"], e["t_s"] * 1000) for e in events(log, "arrive")]
    found = [(f.frame, f.start_ms) for f in offered(Case(workload, NOISY, NOISY_TABLES), 4)]
    assert [n for n, _ in found] == [n for n, _ in expected]
    assert [t for _, t in found] == pytest.approx([t for _, t in expected])
    closed = Workload("w", 1.0, (App("a", "net", 9.0, "single-stream"),))
    with pytest.raises(DynlibError, match="closed loop"):
        offered(Case(closed, NOISY, NOISY_TABLES), 0)
    nobody = optimum(Workload("w", 2.0, ()), NOISY, NOISY_TABLES)
    assert nobody.energy_mj == nobody.idle_mj == pytest.approx(2 * NOISY.power_mw({}, {}))


@pytest.mark.parametrize("name", ["S4", "S7", "T6"])
def test_the_manager_is_near_and_linux_is_not_below(name):
    on = load_board("jetson-xavier-nx")
    points = published_tables(on)

    def make(seed):
        return scenario(name, on, points, seed).workload

    near = against_optimum([name], on, points, seeds=[200]).iloc[0]
    assert 1 <= near["energy_over_oracle"] <= 1.15
    assert near["above_idle_over_oracle"] <= 1.35
    assert 1 <= near["energy_over_oracle_same_frames"] <= 1.15
    assert 0.9 <= near["served_of_optimum"] <= 1
    assert near["deadline_miss_pct"] <= 1.0
    assert (near["infeasible_pct"] > 5) == (name == "T6")
    linux = linux_default(cases(make, on, points), seeds=[9001])
    log = run(make(200), on, points, linux, 200)
    assert energy_mj(log) >= bound(make(200), log, 200, on, points).energy_mj
    times = [e["t_s"] for e in log]
    assert all(a <= b for a, b in pairwise(times))


def test_networks_that_run_together_fit_the_memory_together():
    # On either unit alone both frames are in time; next to each other only without the cap.
    units = unit("gpu", settle_ms=0.0), unit("other", settle_ms=0.0)
    on = board(*units)
    sized = tables(on, nets=(("large", 80.0, 20.0),), units=("gpu", "other"))["net"].frame
    points = {"net": PointTable(sized.assign(memory_mb=60.0), on)}
    apps = tuple(App(name, "net", 20.0, period_ms=100.0) for name in "ab")

    def served(apps, cap_mb):
        workload = Workload("w", 1.0, apps, (Change(0.0, memory_mb=cap_mb),))
        return optimum(workload, on, points).served

    assert served(apps, 120.0) == 20
    assert served(apps, 119.0) == 10
    assert served(apps[:1], 60.0) == 10
    # Frames of one app run the same network.
    twice = (replace(apps[0], arrival="offline", frames=2),)
    assert served(twice, 60.0) == 2


def test_a_frame_may_stay_on_the_twin_that_is_left():
    # Halfway one of two equal clusters is taken away: the other is the same unit as before.
    on = board(unit("a", settle_ms=0.0), unit("b", settle_ms=0.0))
    points = tables(on, units=("a", "b"))
    workload = periodic(100.0, horizon_s=0.1, accuracy_floor_pct=75.0,
                        changes=[Change(0.05, unit="a", lost=True)])  # fmt: skip
    best = optimum(workload, on, points)
    assert best.served == 1
    gpu = on.unit("a")
    slow_mj = 80.0 * (gpu.power_mw(250.0) - gpu.idle_mw(250.0)) / 1000
    assert best.energy_mj - best.idle_mj == pytest.approx(slow_mj, rel=1e-5)
    # A twin that nobody has operating points for is no twin.
    only_b = tables(on, units=("b",))
    assert optimum(workload, on, only_b).served == 1


@pytest.mark.parametrize("deadline_ms", [1000.0, 8000.0])
def test_a_batch_is_bundled_and_the_shortest_frames_are_served(deadline_ms, monkeypatch):
    on = board(unit(noise_cv=0.3))
    points = tables(on, nets=(("large", 80.0, 20.0),))
    batch = App("batch", "net", deadline_ms, "offline", frames=200)
    workload = Workload("w", deadline_ms / 1000, (batch,))
    case = Case(workload, on, points)
    times = sorted(20 * points["net"].point("large", "gpu").noise(f.draw) for f in offered(case, 0))
    most = int((np.cumsum(times) <= deadline_ms).sum())
    best = optimum(workload, on, points)
    assert most <= best.served <= most * 1.02
    assert len(best.infeasible) >= 200 - best.served
    # Beside a camera there are blocks of time; one frame at a time it is the same, and slower.
    camera = App("camera", "net", 90.0, period_ms=100.0)
    both = replace(workload, apps=(replace(batch, frames=40), camera))
    bundled = optimum(both, on, points, search_s=0.0)
    monkeypatch.setattr(programme_module, "FEW_FRAMES", 40)
    monkeypatch.setattr(programme_module, "FEW_CELLS", 10**6)
    each = optimum(both, on, points, search_s=0.0)
    assert bundled.served >= each.served >= bundled.served * 0.98
    assert each.energy_mj * 0.98 <= bundled.energy_mj <= each.energy_mj * (1 + 1e-6)


def test_a_search_that_comes_to_a_limit_of_the_solver_leaves_a_bound():
    on = board(unit(noise_cv=0.036, stall_ms=0.1))
    period_ms = 33.6134
    apps = tuple(
        App(name, "net", period_ms, period_ms=period_ms, accuracy_floor_pct=75.0, start_s=start_s)
        for name, start_s in (("a", 0.0), ("b", period_ms / 2000))
    )
    best = optimum(Workload("half a period apart", 10.0, apps), on, tables(on), 0, search_s=1.0)
    assert 450 < best.served < 594
    assert 0 < best.gap < 0.2
