"""The study of workloads that nobody tuned the manager for, at small sizes."""

import math

import pandas as pd
import pytest

from dynlib.machine.bind import load_board
from dynlib.points import make_table
from dynlib.runtime.oracle import offered
from dynlib.runtime.rivals import linux_default
from suite.papers.dynamic_ofa import published_tables
from suite.studies import untuned
from suite.studies.code_size import manager_tokens, tokens
from suite.studies.life import largest_loads
from suite.studies.manage import as_accurate, published_and_own
from suite.studies.parallel import in_parallel
from suite.studies.scenarios import scenario

NAME = "jetson-xavier-nx"
BOARD = load_board(NAME)
TABLES = published_tables(BOARD)


def test_own_points_are_those_of_this_board_s_gpu():
    row = {"model": "own", "batch": 1, "latency_ms": 5.0, "accuracy_val_pct": 70.0,
           "source": "estimated", "subnet": "n"}  # fmt: skip
    gpu = BOARD.gpu.name
    where = [(BOARD.name, gpu), (BOARD.name, BOARD.cpus[0].name), ("another board", gpu)]
    points = make_table(row | {"board": board, "unit": unit} for board, unit in where)
    tables = published_and_own(BOARD, points)
    assert tables["published"].keys() == TABLES.keys()
    assert tables["own"]["own"].units == (gpu,)
    assert published_and_own(BOARD, points.iloc[1:]).keys() == {"published"}


def number(value: int) -> list[dict]:
    """A job for other processes."""
    return [{"value": value}, {"value": -value}]


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_keep_their_order(processes):
    table = in_parallel(number, [(1,), (2,), (3,)], processes)
    assert table["value"].to_list() == [1, -1, 2, -2, 3, -3]


def test_a_run_without_misses_is_held_against_its_own_frames():
    (row,) = untuned.same_frames("hikey960", "S9", [400])
    assert row["energy_over_same_frames"] >= 1 - 1e-9
    assert row["miss_points"] == row["miss_pct"] - row["simple_miss_pct"]
    assert row["miss_feasible_pct"] <= row["miss_pct"] + 1e-9


def test_what_nobody_could_serve_is_no_fault():
    (row,) = untuned.same_frames("hikey960", "T6", [400])
    assert row["miss_pct"] > 10
    assert row["infeasible_pct"] > 10
    assert row["miss_feasible_pct"] < row["miss_pct"]


@pytest.mark.parametrize("name", untuned.UNTUNED)
def test_every_case_offers_frames(name):
    group, make = untuned.UNTUNED[name]
    assert group in {"noise 0.08", "noise 0.15", "period", "offline", "competitor"}
    assert len(offered(make(BOARD, TABLES, 1), 1)) > 50


def test_a_batch_is_judged_as_a_whole():
    rows = pd.DataFrame(untuned.untuned(NAME, "batch alone, 30 %", [400]))
    assert set(rows["policy"]) == {"manager", "just in time", "linux"}
    assert rows.loc[rows["policy"] == "manager", "batch_in_time"].item() == 1
    table = untuned.untuned_table(rows).set_index("policy")
    assert table.loc["linux", "energy_over_linux"] == 1


def test_floors_become_the_accuracy_of_the_static_network():
    def make(seed):
        return scenario("S3", BOARD, TABLES, seed)

    linux = linux_default(make)
    case = as_accurate(make(1), linux)
    (app,) = case.workload.apps
    point = TABLES[app.model].point(*linux.placements["app"])
    floors = {need.floor_pct for _, need in case.workload.timeline(app)}
    assert floors == {point.accuracy_val_pct}
    assert case.simulate(linux, 1).summary()["below_floor"] == 0


@pytest.mark.parametrize("governor", ["", "schedutil"])
def test_at_equal_accuracy_nobody_is_less_accurate(governor):
    seeds = {"energy": [400, 401], untuned.BEST_STATIC: [400]}
    runs = pd.DataFrame(untuned.at_equal_accuracy(NAME, "S1", seeds, governor))
    table = untuned.beside_baseline(runs).set_index(["policy", "seed"])
    assert table.index.to_list() == [("energy", 400), ("energy", 401), (untuned.BEST_STATIC, 400)]
    assert set(table["baseline"]) == {governor or "linux"}
    assert (table["accuracy_points"] >= -1e-6).all()
    assert (table.loc["energy", "energy_reduction_pct"] > 5).all()
    assert (table.loc["energy", "p95_ratio"] > 1.2).all()  # what it costs


def test_less_accuracy_is_no_saving():
    row = {"scenario": "S", "seed": 1, "baseline": "linux", "deadline_miss_pct": 0.0,
           "latency_p95_ms": 10.0, "energy_mj": 5.0, "above_idle_per_frame_mj": 1.0,
           "source": "estimated"}  # fmt: skip
    runs = pd.DataFrame([
        row | {"policy": "linux", "accuracy_mean_pct": 80.0, "energy_per_frame_mj": 2.0},
        row | {"policy": "energy", "accuracy_mean_pct": 79.9, "energy_per_frame_mj": 1.0},
        row | {"policy": "latency", "accuracy_mean_pct": 80.0, "energy_per_frame_mj": 1.0},
    ])  # fmt: skip
    saved = untuned.beside_baseline(runs).set_index("policy")["energy_reduction_pct"]
    assert saved.to_dict() == {"energy": 0.0, "latency": 50.0}


def test_what_was_published_stands_beside_schedutil():
    assert untuned.published(1)["energy_reduction_pct"].to_list() == [19.0, 16.5]
    (two,) = untuned.published(2).to_dict("records")
    assert (two["baseline"], two["source"]) == ("schedutil", "published")
    assert (two["energy_reduction_pct"], two["p95_ratio"]) == (89.0, pytest.approx(0.77))


def test_the_overload_is_what_it_says():
    case = untuned.overload_case(BOARD, TABLES)
    loads = largest_loads(case.workload, TABLES)
    assert loads["gpu"] == pytest.approx(untuned.OVERLOAD)


def test_the_right_networks_just_fit():
    case = untuned.memory_case(BOARD, TABLES)
    (table,) = case.tables.values()
    sizes_mb = sorted(point.memory_mb for point in table.on("gpu"))
    (cap,) = case.workload.changes
    assert sizes_mb[0] + sizes_mb[-1] < cap.memory_mb < sizes_mb[1] + sizes_mb[-1]


def test_the_manager_is_no_worse_than_the_simple_rule_here():
    pairs = pd.DataFrame(untuned.random_pairs(NAME, [5002, 5003]))
    assert not pairs["is_worse"].any()
    worst = untuned.worst_pairs(pairs, 1)
    assert len(worst) == 1


def test_a_mean_leaves_out_what_is_unknown():
    runs = pd.DataFrame({"x": [1.0, math.nan, 3.0]})
    assert untuned.paired(runs, "x")["value"] == 2
    assert untuned.paired(runs, "x")["n"] == 2


def test_comments_and_docstrings_are_no_code():
    assert tokens('"""A module."""\n\n\ndef f(x):  # nothing\n    """Doc."""\n    return x\n') == 8


def test_all_that_the_manager_loads_counts():
    sizes = manager_tokens()
    assert "dynlib.manager.manager" in sizes
    assert "dynlib.setting" in sizes
    assert not any(name.startswith("dynlib.runtime") for name in sizes)
