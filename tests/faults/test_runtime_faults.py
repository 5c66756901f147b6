"""Faults of manager and simulator: one test id per row of the fault list.

A row that is tested where its subject is tested is not written again: it stands in `ELSEWHERE`.
The live loop is in `test_live_faults.py`; tables, checkpoints and logs in `test_file_faults.py`.
"""

import ast
from itertools import pairwise
from pathlib import Path

import pytest
from runtime_cases import (
    NOISY,
    NOISY_TABLES,
    events,
    frames_of,
    periodic,
    queue_lengths,
    run,
    summarise,
)

from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import published_tables

pytestmark = pytest.mark.faults
TESTS = Path(__file__).parents[1]
ROWS = {*range(5, 10), *range(15, 29), *range(31, 35)}
ELSEWHERE = {
    8: ["test_engine.py::test_a_policy_cannot_ask_for_what_is_not_there"],
    16: ["test_conditions.py::test_frames_on_a_lost_unit_start_again_elsewhere"],
    19: ["faults/test_machine_faults.py::test_fault_19_impossible_latency",
         "test_manager.py::test_bad_measurements_leave_the_estimate_alone"],
    20: ["faults/test_machine_faults.py::test_fault_20_counter_wraps",
         "faults/test_machine_faults.py::test_fault_20_wrap_of_unknown_range_or_reset"],
    21: ["faults/test_machine_faults.py::test_fault_21_two_wraps"],
    23: ["test_manager.py::test_a_deadline_storm_does_not_make_it_oscillate"],
    24: ["test_manager.py::test_where_nothing_can_be_in_time_nothing_is_spent",
         "test_conditions.py::test_what_cannot_be_met_is_given_up_in_the_declared_order",
         "test_manager.py::test_any_demand_gets_an_answer"],
    28: ["test_supernet.py::test_a_bad_checkpoint_is_refused_before_a_weight_is_touched",
         "test_training.py::test_a_foreign_or_broken_state_is_refused"],
    31: ["faults/test_machine_faults.py::test_fault_31_journal_cut"],
    32: ["test_serve.py::test_a_refused_switch_leaves_the_old_network_serving"],
    33: ["test_serve.py::test_a_switch_in_flight_never_mixes_two_configurations"],
    34: ["test_serve.py::test_a_refused_switch_leaves_the_old_network_serving",
         "test_supernet.py::test_missing_statistics_and_foreign_configurations_are_refused"],
}  # fmt: skip


def names(file):
    body = ast.parse((TESTS / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_test_that_exists():
    files = (f"faults/{file.name}" for file in Path(__file__).parent.glob("test_*.py"))
    here = {int(n.split("_")[2]) for n in set.union(*map(names, files)) if "_fault_" in n}
    assert here | ELSEWHERE.keys() >= ROWS
    for place in (place for places in ELSEWHERE.values() for place in places):
        file, _, name = place.partition("::")
        assert name in names(file), place


def test_fault_07_a_clock_is_clamped():
    workload = periodic(45.0, horizon_s=3.0, changes=[Change(1.0, unit="gpu", cap_mhz=500.0)])
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES, objective="accuracy"))
    late = [e for e in log if e["t_s"] >= 1.0]
    assert {e["gpu_mhz"] for e in late if e["event"] == "set"} <= {250.0, 500.0}
    # Frames under the cap take as long as the table's rows of that clock say, not the faster ones.
    slow = [e for e in late if e["event"] == "finish" and e["t_s"] > 1.1]
    for event in slow:
        expected = NOISY_TABLES["net"].point(event["subnet"], "gpu").latency_ms[1]
        assert event["latency_ms"] > 0.85 * expected


def test_fault_16_every_unit_is_lost_for_a_while():
    changes = [Change(t, unit=name, lost=t == 1.0) for t in (1.0, 2.0) for name in ("gpu", "cpu")]
    workload = periodic(100.0, horizon_s=4.0, changes=changes)
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES))
    frames = frames_of(log, workload, NOISY_TABLES)
    missed = frames[~frames["on_time"]]
    assert missed["arrival_s"].between(0.9, 2.0).all()
    assert 9 <= len(missed) <= 11
    reasons = [e["reason"] for e in events(log, "decide")]
    assert reasons == ["best", "best", "best"]


def test_fault_22_thermal_ramp():
    on = load_board("jetson-xavier-nx")
    points, freqs = published_tables(on), on.gpu.freqs
    ramp = [*freqs[-2:3:-1], *freqs[4:]]
    changes = [Change(2 + i, unit="gpu", cap_mhz=mhz) for i, mhz in enumerate(ramp)]
    app = App("app", "ofa-mbv3-w1.2", 110.0, period_ms=110.0)
    workload = Workload("ramp", 30.0, (app,), tuple(changes))
    log = run(workload, on, points, Manager(on, points, objective="accuracy"), 300)
    assert summarise(log, workload, points, on)["deadline_miss_pct"] <= 1.0
    caps = [(0.0, freqs[-1]), *((c.t_s, c.cap_mhz) for c in changes)]
    for event in (e for e in events(log, "set") if e["unit"] == "gpu"):
        assert event["gpu_mhz"] <= [mhz for t_s, mhz in caps if t_s <= event["t_s"]][-1]
    steps = [(e["t_s"], int(e["subnet"][-1])) for e in events(log, "decide")]
    hottest = 2 + len(freqs[-2:3:-1])
    down = [level for t_s, level in steps if t_s < hottest]
    up = [level for t_s, level in steps if t_s >= hottest]
    assert len(down) > 1
    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert all(b - a >= 0.5 for (a, _), (b, _) in pairwise(steps))


def test_fault_23_every_frame_is_late_for_a_minute():
    storm = [Change(5.0, unit=u, stretch=8.0) for u in ("gpu", "cpu")]
    calm = [Change(65.0, unit=u, stretch=1.0) for u in ("gpu", "cpu")]
    workload = periodic(25.0, deadline_ms=60.0, horizon_s=75.0, changes=[*storm, *calm])
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES, objective="accuracy"), 3)
    decided = [(e["t_s"], e["subnet"], e["unit"]) for e in events(log, "decide")]
    assert len([d for d in decided if d[0] >= 5]) <= 4  # into the storm, and out of it
    assert not [d for d in decided if 6 < d[0] < 65]  # it has settled
    served = [e for e in events(log, "start") if 6 < e["t_s"] < 65]
    assert {(e["subnet"], e["unit"]) for e in served} == {("small", "gpu")}
    assert len(served) <= 5 * 60  # nothing is spent on what cannot be in time but to see if it can
    assert max(queue_lengths(log)) <= (60 + 8 * 20) / 25 + 1  # what comes while one runs
    frames = frames_of(log, workload, NOISY_TABLES)
    assert frames[frames["arrival_s"] > 66]["on_time"].all()


def test_fault_25_a_burst_of_a_hundred_frames():
    app = App("app", "net", 200.0, "trace", trace_ms=(1000.0,) * 100)
    workload = Workload("burst", 3.0, (app,))
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES))
    summary = summarise(log, workload, NOISY_TABLES, NOISY)
    assert summary["offered"] == 100 == summary["on_time"] + summary["dropped"] + summary["late"]
    assert summary["on_time"] >= 16  # of at most 20 that fit
    assert events(log, "sample")[-1]["power_mw"] == NOISY.power_mw({}, {})
