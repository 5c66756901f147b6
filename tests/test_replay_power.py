"""Runs of somebody else's devices against a board's model: invented ones, and the measured."""

import numpy as np
import pandas as pd
import pytest

from dynlib.machine.bind import load_board
from suite.studies.judge_boards import find_data
from suite.studies.replay_power import METHODS, calibrations, replay

NX = load_board("jetson-xavier-nx")


def write_runs(folder, scale=1.0, count=12):
    """Runs whose work costs `scale` times what the model says, on an idle base that it lacks."""
    rng = np.random.default_rng(0)
    rows = []
    for run in range(count):
        for device, base_mw in (("nx0", 2300), ("nx1", 2200)):
            for i in range(40):
                mhz, busy = rng.choice(NX.gpu.freqs), rng.integers(0, 100) / 100
                fast = rng.integers(2)
                work_mw = NX.gpu.power_mw(mhz, busy) - NX.gpu.power_mw(mhz, 0.0)
                power_mw = base_mw + 1800 * fast + scale * work_mw
                rows.append((f"run{run:02}", device, 5 + i / 4, int(mhz), 100 * busy,
                             (204, 1600)[fast], power_mw))  # fmt: skip
    columns = ["run", "device", "t_s", "gpu_mhz", "gpu_load_pct", "emc_mhz", "power_mw"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "samples.csv", index=False)


def worst_pct(table):
    return table["error_pct"].abs().groupby(table["method"]).max()


def test_runs_of_the_model_on_another_idle_base_are_predicted(tmp_path):
    write_runs(tmp_path)
    table = replay(tmp_path, NX)
    assert len(table) == 3 * len(METHODS) * 16  # of 12 runs on two devices two thirds
    assert worst_pct(table)[["idle base", "idle base and work"]].max() < 1e-6
    assert table.loc[table["method"] == "idle base", "mae_mw"].max() < 1e-6
    sums = table.groupby(["run", "device"])["measured_j"].nunique()
    assert (sums == 1).all()


def test_only_a_fit_of_the_work_finds_that_it_costs_twice_as_much(tmp_path):
    write_runs(tmp_path, scale=2.0)
    worst = worst_pct(replay(tmp_path, NX))
    assert worst["idle base and work"] < 1e-6
    assert worst["idle base"] > 1


def test_what_is_not_here_leaves_a_table_without_values():
    assert replay(None, NX)["measured_j"].isna().all()
    assert list(replay(None, NX)["method"]) == list(METHODS)
    assert calibrations(None, 3, np.random.default_rng(0)).empty


def test_the_measured_runs_and_boards_hold_the_bars():
    runs, power = find_data("loudva_runs"), find_data("boards/measured_power_jetson.csv")
    if not (runs and power):
        pytest.skip("the published measurements are not here: set DYNLIB_DATA")
    error = replay(runs, NX).query("method == 'idle base'")["error_pct"].abs()
    assert error.median() <= 3
    assert error.max() <= 10
    table = calibrations(power, 3, np.random.default_rng(1))
    assert table.groupby("board")["error_pct"].max().max() <= 6
