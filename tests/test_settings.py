"""An operating point is sub-network, unit and setting: tables with engines, precisions and threads
go to the manager as they are, and what it chose can be told from the log."""

import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_cases import board, periodic, unit

from dynlib.boards.board import Board, Opp
from dynlib.errors import TableError
from dynlib.log import LOG_FIELDS
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Action, AppState, Placement, State, fifo
from dynlib.points import (
    PLAIN,
    PointTable,
    Setting,
    make_table,
    read_points,
    read_table,
    write_table,
)
from dynlib.profile import at_full_clock
from dynlib.runtime.case import Case
from dynlib.workload import Requirement

ON = board(unit(), unit("cpu", "cpu", cores=4))


def row(subnet="a", ms=10.0, unit_name="gpu", **values):
    return {
        "model": "net", "subnet": subnet, "board": "tiny", "unit": unit_name, "batch": 1,
        "accuracy_val_pct": 70.0, "latency_ms": ms, "source": "measured",
    } | values  # fmt: skip


ENGINES = [
    row("a", 10.0, backend="torch", precision="fp32"),
    row("a", 6.0, backend="onnxruntime", precision="fp32"),
    row("a", 4.0, backend="onnxruntime", precision="int8", accuracy_val_pct=66.0),
    row("b", 20.0, backend="torch", precision="fp32", accuracy_val_pct=80.0),
    row("b", 12.0, backend="onnxruntime", precision="fp32", accuracy_val_pct=80.0),
]
THREADS = [row(ms=24.0 / threads + 4, unit_name="cpu", threads=threads) for threads in (1, 2, 4)]


def case(rows, period_ms=30.0, **need):
    workload = periodic(period_ms, horizon_s=1.0, **need)
    return Case(workload, ON, PointTable.of_models(make_table(rows), ON))


@pytest.mark.parametrize(
    ("floor_pct", "objective", "chosen"),
    [
        (60.0, "energy", ("a", "onnxruntime", "int8")),
        (68.0, "energy", ("a", "onnxruntime", "fp32")),
        (75.0, "energy", ("b", "onnxruntime", "fp32")),
        (0.0, "accuracy", ("b", "onnxruntime", "fp32")),
    ],
)
def test_the_manager_chooses_engine_and_precision(floor_pct, objective, chosen):
    of = case(ENGINES, accuracy_floor_pct=floor_pct)
    done = of.simulate(Manager(ON, of.tables, objective=objective))
    frames = done.frames()
    assert frames["on_time"].all()
    (setting,) = set(frames["setting"])
    assert (frames["subnet"].iloc[0], setting.backend, setting.precision) == chosen
    named = {(e["subnet"], e["backend"], e["precision"]) for e in done.log if "subnet" in e}
    assert named == {chosen}


@pytest.mark.parametrize(("deadline_ms", "threads"), [(30.0, 1), (18.0, 2), (11.0, 4)])
def test_no_more_threads_than_the_deadline_needs(deadline_ms, threads):
    # Of one clock: else many threads at a low one are the better choice.
    on = board(unit(), unit("cpu", "cpu", cores=4, opps=(Opp(1000.0, 1000.0),)))
    workload = periodic(60.0, horizon_s=1.0, deadline_ms=deadline_ms)
    of = Case(workload, on, PointTable.of_models(make_table(THREADS), on))
    done = of.simulate(Manager(on, of.tables))
    assert done.frames()["on_time"].all()
    assert {e["cores"] for e in done.log if e["event"] == "finish"} == {float(threads)}
    assert {p.setting.threads for p in of.tables["net"].on("cpu")} == {1, 2, 4}


def test_changing_the_setting_costs_a_switch():
    of = case(ENGINES, period_ms=100.0)

    class Turning:
        name, static = "turning", False
        governors: ClassVar = {}
        choose = staticmethod(fifo)

        def decide(self, state, limits):
            engine = "torch" if state.t_ms < 450 else "onnxruntime"
            where = Placement("a", "gpu", Setting(backend=engine, precision="fp32"))
            return Action({"app": where}, {"gpu": 1000.0})

    latency_ms = of.simulate(Turning(), switch_ms=3.0).frames()["latency_ms"].tolist()
    assert latency_ms[2:] == pytest.approx([10, 10, 10, 6 + 3, 6, 6, 6, 6])


def test_without_a_setting_the_first_of_the_table_is_meant():
    table = case(ENGINES).tables["net"]
    assert table.point("a", "gpu").setting == Setting(backend="torch", precision="fp32")
    assert table.point("a", "gpu", Setting(backend="torch", precision="fp32")).latency_ms[-1] == 10
    with pytest.raises(TableError, match=r"'a' on 'gpu' with Setting\(.*tflite"):
        table.point("a", "gpu", Setting(backend="tflite"))


def test_a_setting_that_says_nothing_is_the_plain_one():
    table = case(ENGINES).tables["net"]
    assert table.point("a", "gpu", Setting()) is table.point("a", "gpu")


@pytest.mark.parametrize("rows", [
    [row(threads=1), row(threads=2, ms=5.0)],  # a GPU is one core
    [row(unit_name="cpu"), row(unit_name="cpu", threads=4, ms=5.0)],  # all four, where unknown
])  # fmt: skip
def test_two_points_that_a_log_could_not_tell_apart_are_refused(rows):
    with pytest.raises(TableError, match="as many as cores"):
        PointTable(make_table(rows), ON)


@pytest.mark.parametrize("blocks_ms", [(), (0.0, 0.0), (-1.0, 2.0), (1.0, math.nan)])
def test_segments_are_times(blocks_ms):
    with pytest.raises(TableError, match=r"'a' on 'gpu', segments: got .*, expected times >= 0"):
        PointTable(make_table([row()]), ON, {"a": blocks_ms})
    shares = PointTable(make_table([row()]), ON, {"a": (1.0, 0.0, 3.0)}).point("a", "gpu").segments
    assert shares == (0.25, 0.0, 0.75)


def test_a_frame_is_what_the_smallest_batch_takes():
    table = case([row(batch=8, ms=10.0), row(batch=64, ms=60.0)]).tables["net"]
    assert [point.setting.batch for point in table.on("gpu")] == [8]
    assert table.point("a", "gpu", Setting(batch=64)).latency_ms[-1] == 60


def test_points_of_another_board_are_left_out_and_none_is_an_error(tmp_path):
    rows = [row(), row(board="other"), row(model="second")]
    path = write_table(make_table(rows), tmp_path / "points.csv")
    assert set(read_points(path, ON)) == {"net", "second"}
    path = write_table(make_table(rows[1:2]), tmp_path / "points.csv")
    with pytest.raises(TableError, match=r"no points on board 'tiny'; .*known: other"):
        read_points(path, ON)


def test_a_board_without_a_power_model_takes_the_power_of_the_table():
    bare = replace(ON, units=(replace(ON.unit("gpu"), c_uw_mhz_v2=None),), static_mw=None)
    rows = [row(power_mw=3000.0, idle_power_mw=1000.0), row("b", 20.0)]
    table = PointTable(make_table(rows), bare)
    assert table.point("a", "gpu").active_mw == (2000.0,) * 3
    assert table.point("b", "gpu").active_mw == (0.0,) * 3


values = st.fixed_dictionaries({
    "exit_threshold": st.none() | st.floats(0, 1), "backend": st.none() | st.sampled_from("xyz"),
    "precision": st.none() | st.sampled_from(["fp32", "int8"]),
    "quota": st.none() | st.floats(1, 99),
    "batch": st.integers(1, 4), "cores": st.integers(1, 4),
})  # fmt: skip


@given(st.lists(values, min_size=1, max_size=8, unique_by=lambda v: tuple(v.values())))
def test_the_log_names_every_point_that_is_not_another(settings):
    """What is logged of a point is found again as that point, whatever its setting."""
    keys = [{k: v for k, v in s.items() if k != "cores"} for s in settings]
    once = [s for i, s in enumerate(settings) if keys[i] not in keys[:i]]
    table = PointTable(make_table([row(**s) for s in once]), ON)
    assert len(table.points) == len(once)
    for point in table.points.values():
        assert table.named({"event": "start", "t_s": 1.0, **point.logged}) is point
        assert set(point.logged) <= LOG_FIELDS
        assert not any(isinstance(v, float) and math.isnan(v) for v in point.logged.values())
    found = {point.setting for point in table.points.values()}
    assert (PLAIN in found) == any(Setting(**key) == PLAIN for key in keys)


HOST = Board(
    "host", "", (unit("cpu", "cpu", cores=2, c_uw_mhz_v2=None, opps=(Opp(1000.0, 0.0),)),), None,
    None, "estimated", (), None, (), (), "0" * 64,
)  # fmt: skip


TABLES = ("02_profile_board/operating_points", "04_switch_subnets/backends")


@pytest.mark.parametrize("table", TABLES)
def test_what_notebooks_measured_is_managed_as_it_is(table):
    """Threads (02), engines and precisions (04) are settings of one unit."""
    frame = read_table(Path(__file__).parents[1] / "data" / "results" / f"{table}.csv")
    (points,) = PointTable.of_models(frame, HOST).values()
    assert points.units == ("cpu",)
    assert len(points.points) == (frame["board"] == "host").sum()
    here = at_full_clock(HOST)
    (points,) = PointTable.of_models(frame, here).values()
    slowest = points.largest
    manager = Manager(here, {points.model: points}, objective="accuracy")
    app = AppState(
        "app", points.model, Requirement(1.5 * slowest.latency_ms[-1], 1e3, 0.0), "periodic", 0, "",
        0.0, None, (), (), (),
    )  # fmt: skip
    clocks = {"cpu": 1000.0}
    chosen = manager.decide(State(0.0, (app,), clocks, clocks, 0.0, (), None), clocks)
    placed = points.point(*chosen.placements["app"])
    best_pct = max(point.accuracy_val_pct for point in points.on("cpu"))
    assert placed.accuracy_val_pct == best_pct
    assert {s.threads for s in (p.setting for p in points.on("cpu"))} >= {1.0}
