from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from runtime_cases import (
    board,
    cases,
    energy_mj,
    fixed,
    frames_of,
    periodic,
    run,
    summarise,
    tables,
    timeline,
    unit,
)

from dynlib.errors import DynlibError, TableError
from dynlib.log import DecisionLog
from dynlib.runtime.case import Case
from dynlib.runtime.summary import Run
from dynlib.workload import Change
from suite.record.statistics import mean_interval
from suite.studies.compare import compare_policies, headline, published_ladder, reductions
from suite.studies.manage import simulate_many

BOARD = board(unit(noise_cv=0.02))
TABLES = tables(BOARD)


def test_a_log_read_back_gives_the_same_numbers(tmp_path):
    workload = periodic(45.0, horizon_s=5.0)
    log = run(workload, BOARD, TABLES, fixed("large", 500.0), 4)
    again = DecisionLog.read(log.write(tmp_path / "log.jsonl"))
    assert summarise(again, workload, TABLES, BOARD) == summarise(log, workload, TABLES, BOARD)


def test_a_log_of_another_case_is_refused_or_said(tmp_path, caplog):
    case = Case(periodic(45.0, horizon_s=1.0), BOARD, TABLES)
    path = case.simulate(fixed("large")).log.write(tmp_path / "log.jsonl")
    assert Run.read(case, path).summary()["offered"] == 22
    assert not caplog.records
    Run.read(case.under(periodic(50.0)), path)
    assert "log.jsonl: another workload_sha256 than the case's" in caplog.text
    elsewhere = replace(BOARD, name="other")
    for other in (Case(case.workload, BOARD, {}), Case(case.workload, elsewhere, TABLES)):
        with pytest.raises(TableError, match=r"log\.jsonl: a log of \['net'\] on 'tiny', expected"):
            Run.read(other, path)


def test_energy_is_additive_over_time():
    log = run(periodic(45.0, horizon_s=5.0), BOARD, TABLES, fixed("large", 500.0), 4)
    samples = [(e["t_s"], e["power_mw"]) for e in log if e["event"] == "sample"]
    middle = len(samples) // 2
    parts = []
    for piece in (samples[: middle + 1], samples[middle:]):
        part = DecisionLog()
        for t_s, power_mw in piece:
            part.add(t_s, "sample", power_mw=power_mw)
        parts.append(energy_mj(part))
    assert sum(parts) == pytest.approx(energy_mj(log))


def test_frames_below_the_floor_and_late_ones_are_missed():
    changes = [Change(1.0, "app", accuracy_floor_pct=75.0), Change(2.0, "app", deadline_ms=5.0)]
    workload = periodic(100.0, horizon_s=3.0, changes=changes)
    log = run(workload, BOARD, TABLES, fixed("small", 1000.0))
    frames = frames_of(log, workload, TABLES)
    counts = frames.groupby(["on_time", "reason"]).size().to_dict()
    assert counts == {(True, ""): 10, (False, "below floor"): 10, (False, "late"): 10}
    summary = summarise(log, workload, TABLES, BOARD)
    assert (summary["on_time"], summary["below_floor"], summary["late"]) == (10, 10, 10)
    assert summary["deadline_miss_pct"] == pytest.approx(200 / 3)
    assert summary["accuracy_mean_pct"] == 70.0
    assert summary["energy_per_frame_mj"] == pytest.approx(summary["energy_mj"] / 10)
    idle_mj = BOARD.power_mw({}, {}) * 3
    assert summary["above_idle_mj"] == pytest.approx(summary["energy_mj"] - idle_mj)


def _runs(misses, energies, scenario="S"):
    """One row per (policy, seed): misses and energies are (baseline, manager) lists."""
    return pd.DataFrame([
        {"scenario": scenario, "policy": policy, "seed": seed, "deadline_miss_pct": miss,
         "energy_mj": energy, "energy_per_frame_mj": energy, "above_idle_per_frame_mj": energy - 50,
         "latency_p95_ms": energy, "accuracy_mean_pct": 75.0}
        for policy, ms, es in zip(("linux", "manager"), misses, energies, strict=True)
        for seed, (miss, energy) in enumerate(zip(ms, es, strict=True))
    ])  # fmt: skip


def test_a_reduction_counts_only_without_more_misses():
    runs = _runs(([0, 0, 5, 0], [0.9, 1.1, 4, 2]), ([100] * 4, [80, 80, 80, 130]))
    saved = reductions(runs)
    assert saved["energy_reduction_pct"].tolist() == pytest.approx([20, 0, 20, -30])
    assert saved["above_idle_reduction_pct"].tolist() == pytest.approx([40, 0, 40, -60])
    assert saved["latency_reduction_pct"].tolist() == pytest.approx([20, 20, 20, -30])
    table = compare_policies(runs)
    assert table["counted_pct"].item() == 50
    assert table["energy_reduction_pct"].item() == pytest.approx(2.5)
    assert table["deadline_miss_pct_manager"].item() == pytest.approx(2.0)


def test_a_timeline_holds_what_the_log_says():
    workload = periodic(100.0, horizon_s=2.0)
    log = run(workload, BOARD, TABLES, fixed("large", 500.0), 1)
    table = timeline(log, workload, TABLES)
    assert table["t_s"].is_monotonic_increasing
    frames = frames_of(log, workload, TABLES)
    shown = table.loc[table["what"] == "latency_ms", "value"]
    assert list(shown) == list(frames["latency_ms"].dropna())
    power_mw = table.loc[table["what"] == "power_mw", "value"]
    assert power_mw.sum() * 0.25 == pytest.approx(energy_mj(log))
    assert set(table.loc[table["what"] == "clock_mhz", "value"]) <= set(BOARD.unit("gpu").freqs)


def test_heat_is_read_from_the_log():
    log = DecisionLog(
        scenario="S", policy="p", seed=0, source="estimated", models={}, horizon_s=10.0
    )
    for t_s, temp_c, cap_mhz in ((0, 30.0, None), (2, 60.0, 500.0), (3, 61.0, 250.0),
                                 (5, 50.0, 1000.0), (9, 59.0, 500.0)):  # fmt: skip
        if cap_mhz:
            log.add(t_s, "set", unit="gpu", gpu_mhz=cap_mhz, reason="heat")
        log.add(t_s, "sample", power_mw=1000.0, temp_c=temp_c)
    log.add(10, "sample", power_mw=1000.0, temp_c=58.0)
    workload = periodic(horizon_s=10.0)
    summary = summarise(log, workload, TABLES, BOARD)
    assert (summary["temp_max_c"], summary["throttled_pct"]) == (61.0, pytest.approx(40))
    table = timeline(log, workload, TABLES, bin_s=1.0).set_index(["what", "t_s"])["value"]
    assert table["temp_c"][[0.0, 1.0, 2.0, 4.0]].tolist() == [30, 45, 60, 55.5]
    assert table["cap_mhz"].tolist() == [500, 250, 250, 1000, 1000, 1000, 1000, 500]
    wide = timeline(log, workload, TABLES, bin_s=2.0).query("what == 'cap_mhz'")
    assert wide["value"].tolist() == [375, 625, 1000, 750]  # means over the bins


def test_headline_has_mean_and_best_scenario():
    runs = pd.concat([_runs(([0] * 3, [0] * 3), ([100] * 3, [80] * 3), "A"),
                      _runs(([0] * 3, [0] * 3), ([100] * 3, [60, 61, 59]), "B")])  # fmt: skip
    numbers = headline(runs)
    assert numbers["energy_reduction_mean_pct"][0] == pytest.approx(30)
    assert numbers["energy_reduction_best_pct"][0] == pytest.approx(40)
    value, low, high = numbers["energy_reduction_best_pct"]
    assert low < value < high
    assert numbers["accuracy_mean_pct"][0] == 75.0


def test_nobody_served_anything_is_no_reduction():
    runs = _runs(([100, 100], [100, 0]), ([np.inf, np.inf], [np.inf, 10]))
    assert reductions(runs)["energy_reduction_pct"].tolist() == [0, 100]


def test_unpaired_runs_are_refused():
    runs = _runs(([0, 0], [0, 0]), ([1, 1], [1, 1]))
    with pytest.raises(DynlibError, match=r"2 and 0"):
        compare_policies(runs, baseline="nobody")
    with pytest.raises(DynlibError, match=r"1 and 2"):
        compare_policies(runs.iloc[:3])


def test_the_ladder_names_its_rungs():
    row = compare_policies(_runs(([0] * 2, [0] * 2), ([100] * 2, [80] * 2))).iloc[0]
    ladder = published_ladder(row, row)
    assert ladder["reduction_pct"].tolist() == pytest.approx([20, 20, 20, 40])


def test_interval_over_seeds():
    # Student's table: 2.776 for 4 degrees of freedom and 97.5 %.
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * np.std([1, 2, 3, 4, 5], ddof=1) / 5**0.5
    assert (mean, low, high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-3)
    assert all(np.isnan(mean_interval([1.0])[1:]))


def test_simulate_many_gives_one_labelled_row_per_run():
    make = cases(lambda seed: periodic(100.0, horizon_s=2.0), BOARD, TABLES)
    policies = {"a": lambda make: fixed("large"), "none": lambda make: None,
                "b": lambda make: fixed("small")}  # fmt: skip
    frame = simulate_many({"x": make, "y": make}, BOARD, TABLES, policies, seeds=(1, 2))
    assert frame[["scenario", "policy", "seed"]].duplicated().sum() == 0
    assert len(frame) == 8
    # The tiny board's coefficients are marked as guesses.
    assert set(frame["source"]) == {"estimated"}
    assert compare_policies(frame, "a", "b")["n"].tolist() == [2, 2]
