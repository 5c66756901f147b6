import pytest
from runtime_cases import (
    board,
    cases,
    events,
    fixed,
    frames_of,
    periodic,
    run,
    summarise,
    tables,
    unit,
)

from dynlib.errors import WorkloadError
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Placement
from dynlib.runtime.conditions import conditions
from dynlib.runtime.rivals import Static
from dynlib.workload import App, Change, Workload, dump_workload, load_workload
from suite.papers.dynamic_ofa import Reactive, published_tables
from suite.studies.compare import recovery_frames
from suite.studies.manage import only
from suite.studies.scenarios import scenario

BOARD = board(unit(memory_share=0.5), unit("cpu", "cpu", cores=2))
TABLES = tables(BOARD, units=("gpu", "cpu"))


def test_a_power_cap_holds_with_every_unit_busy():
    on = load_board("jetson-xavier-nx")
    steps = conditions(Workload("w", 9.0, (), (Change(1, power_mw=9000.0),)), on)
    clocks = dict(zip((u.name for u in on.units), steps[-1][1].cap_mhz, strict=True))
    busy = {u.name: float(u.cores if u.kind == "cpu" else 1) for u in on.units}
    assert on.power_mw(clocks, busy) <= 9000
    assert clocks["gpu"] < on.unit("gpu").max_mhz
    assert conditions(Workload("w", 9.0, (), (Change(1, power_mw=0.0),)), on)[-1][1].cap_mhz == (
        steps[0][1].cap_mhz
    )


def test_the_air_changes_and_stays():
    on = load_board("hikey960")
    changes = (Change(1, ambient_c=40.0), Change(2, unit="big", cap_mhz=1500.0))
    steps = conditions(Workload("w", 9.0, (), changes), on)
    assert [now.ambient_c for _, now in steps] == [25.0, 40.0, 40.0]
    assert dict(zip((u.name for u in on.units), steps[2][1].cap_mhz, strict=True))["big"] == 1421
    assert conditions(Workload("w", 9.0, (), changes[1:]), on)[-1][1].ambient_c is None


def test_a_slower_memory_stretches_the_share_that_waits_for_it():
    gpu = BOARD.unit("gpu")
    assert gpu.memory_scale(1000.0, 1.0) == 1.0
    assert gpu.memory_scale(1000.0, 2.0) == pytest.approx(0.5 * 2 + 0.5)
    assert gpu.memory_scale(500.0, 2.0) == pytest.approx((0.5 * 2 + 1) / 1.5)
    with pytest.raises(WorkloadError, match=r"emc_mhz.*no memory clock"):
        conditions(Workload("w", 1.0, (), (Change(0.5, emc_mhz=1.0),)), BOARD)


def test_frames_on_a_lost_unit_start_again_elsewhere():
    changes = (Change(1.01, unit="gpu", lost=True), Change(3.0, unit="gpu", lost=False))
    workload = periodic(500.0, horizon_s=5.0, changes=changes)
    log = run(workload, BOARD, TABLES, Manager(BOARD, TABLES))
    assert summarise(log, workload, TABLES, BOARD)["missed"] == 0
    units = {e["frame"]: e["unit"] for e in events(log, "start")}
    assert [units[i] for i in range(10)] == ["gpu"] * 2 + ["cpu"] * 4 + ["gpu"] * 4
    assert [e["frame"] for e in events(log, "start")].count(2) == 2
    # A policy that stays loses what comes meanwhile, and nothing after.
    frames = frames_of(run(workload, BOARD, TABLES, fixed()), workload, TABLES)
    assert set(frames["frame"][~frames["on_time"]]) == {2, 3, 4, 5}


def test_what_cannot_be_met_is_given_up_in_the_declared_order():
    apps = tuple(App(n, "net", 30.0, period_ms=30.0, accuracy_floor_pct=75.0, priority=p)
                 for n, p in (("low", 0), ("high", 1)))  # fmt: skip
    log = run(Workload("w", 1.0, apps), BOARD, TABLES, Manager(BOARD, TABLES))
    assert {e["reason"] for e in events(log, "decide")} == {"low now and then"}
    assert {e["app"] for e in events(log, "finish")} == {"high"}  # no gap is long enough for both
    apps = tuple(App(n, "net", 45.0, period_ms=45.0, accuracy_floor_pct=75.0) for n in "abc")
    log = run(Workload("w", 1.0, apps[:2]), BOARD, TABLES, Manager(BOARD, TABLES))
    assert {e["reason"] for e in events(log, "decide")} == {"best"}
    log = run(Workload("w", 1.0, apps), BOARD, TABLES, Manager(BOARD, TABLES))
    assert {e["reason"] for e in events(log, "decide")} == {
        "a now and then; b now and then; c now and then"
    }
    # Said once, not at every frame.
    assert len(events(log, "decide")) <= 3


def test_a_memory_cap_forces_points_out():
    frame = TABLES["net"].frame.assign(
        memory_mb=lambda t: t["subnet"].map({"small": 40, "large": 90})
    )
    points = {"net": type(TABLES["net"])(frame, BOARD)}
    workload = periodic(100.0, horizon_s=3.0, changes=(Change(1.0, memory_mb=50.0),))
    log = run(workload, BOARD, points, Manager(BOARD, points, objective="accuracy"))
    subnets = [e["subnet"] for e in events(log, "start")]
    assert subnets == ["large"] * 10 + ["small"] * 20


@pytest.mark.parametrize("name", ["S7", "S10", "S11"])
def test_new_scenarios_survive_a_file_and_are_met(name, tmp_path):
    on = load_board("jetson-xavier-nx")
    points = published_tables(on)
    workload = scenario(name, on, points, 1).workload
    assert load_workload(dump_workload(workload, tmp_path / "w.toml")) == workload
    log = run(workload, on, points, Manager(on, points), 1)
    assert summarise(log, workload, points, on)["deadline_miss_pct"] <= 1.0


def test_the_reactive_loop_goes_down_after_twenty_slow_frames():
    on = board(unit(governor="performance"))
    points = tables(on)
    changes = [Change(2.0, unit="gpu", stretch=2.0, announced=False)]
    workload = periodic(50.0, deadline_ms=38.0, horizon_s=6.0, changes=changes)
    log = run(workload, on, points, Reactive(on, points))
    decided = [(e["t_s"], e["subnet"]) for e in events(log, "decide")]
    assert [net for _, net in decided] == ["large", "small"]
    assert 2.0 < decided[1][0] < 2.0 + 25 * 0.05
    found = recovery_frames(frames_of(log, workload, points), workload)
    assert 10 <= found[0] <= 25


@pytest.mark.parametrize("knob", ["clocks", "network", "placement"])
def test_one_knob_moves_nothing_else(knob):
    def make(seed):
        return periodic(100.0, deadline_ms=60.0, horizon_s=3.0)

    manager = only(knob, cases(make, BOARD, TABLES))
    log = run(make(0), BOARD, TABLES, manager)
    placed = {(e["subnet"], e["unit"]) for e in events(log, "start")}
    policy = {e["reason"] for e in events(log, "set")} - {"acts"}
    assert placed == {("small" if knob == "network" else "large", "gpu")}
    assert ("policy" in policy) == (knob == "clocks")
    with pytest.raises(Exception, match="clocks"):
        only("colour", cases(make, BOARD, TABLES))


def test_any_static_placement_may_be_refused():
    workload = periodic(100.0, horizon_s=1.0)
    log = run(workload, BOARD, TABLES, Static("none", {"app": None}))
    assert {e["reason"] for e in events(log, "drop")} <= {"deadline passed", "horizon"}
    assert not events(log, "start")
    assert Placement("small", "gpu") in TABLES["net"].points
