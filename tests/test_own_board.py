"""The notebook of a user's own board: what it says of wrong files, power, clocks and a kill."""

import numpy as np
import pandas as pd
import pytest

from dynlib.boards.board import Opp
from dynlib.machine.bind import host_board, load_board
from dynlib.machine.control import Missing
from dynlib.manager.policy import Placement
from suite.plots import own_board as plots
from suite.record.figures import set_style
from suite.studies import own_board
from suite.studies.own_board import (
    Capped,
    free_of_charge,
    judge_clocks,
    judge_power,
    kill_throttled,
    models_drawn,
    unpowered,
    wrong_files,
)


@pytest.fixture(scope="module")
def judged():
    return judge_power("jetson-nano", clocks=4)


def latencies(board, share, noise=0.0):
    unit = board.units[0]
    rng = np.random.default_rng(0)
    rows = [
        (unit.name, mhz, 20 * (share + (1 - share) * unit.max_mhz / mhz) * rng.normal(1, noise))
        for mhz in unit.freqs * 5
    ]
    return pd.DataFrame(rows, columns=["unit", "freq_mhz", "latency_ms"])


@pytest.mark.faults
def test_every_fault_is_refused_alone_and_named_among_the_others(tmp_path):
    table = wrong_files(tmp_path)
    alone, together = table.iloc[:-1], table.iloc[-1]
    assert (alone["refused"] == 1).all()
    assert together["refused"] == together["faults"] == len(own_board.WRONG)
    assert not alone["said"].str.contains(str(tmp_path)).any()


def test_a_file_that_loads_counts_as_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(own_board, "WRONG", {"none": ("capacity = 1024", "capacity = 1023")})
    assert wrong_files(tmp_path)["refused"].tolist() == [0, 1, 0]


def test_power_is_judged_where_nothing_was_measured(judged):
    truth = load_board("jetson-nano")
    off = (judged["predicted_mw"] / judged["power_mw"] - 1).abs()
    assert off.mean() < 0.05
    measured = 4 * len(truth.units)
    assert len(judged) == 3 * (sum(len(unit.freqs) for unit in truth.units) - measured)
    assert set(judged["busy"]) == {0.25, 0.5, 0.75}
    assert unpowered(truth).static_mw is None


def test_a_clock_is_predicted_from_the_others():
    board = host_board()
    table = judge_clocks(latencies(board, 0.4), board)
    off = (table["predicted_ms"] / table["latency_ms"] - 1).abs().groupby(table["model"]).max()
    assert off["calibrated"] < 1e-6
    assert off["work over clock"] > 0.1
    assert len(table) == 2 * len(board.units[0].freqs)


def test_a_capped_network_keeps_to_what_is_allowed():
    policy = Capped("largest", {"camera": Placement("large", "cpu")})
    state = type("State", (), {"apps": ()})()
    assert policy.decide(state, {"cpu": 400.0}).clocks == {"cpu": 400.0}


def test_power_that_nobody_knows_counts_as_zero_for_a_policy():
    board = free_of_charge(host_board())
    assert board.units[0].power_mw(board.units[0].max_mhz) == 0.0
    known = load_board("jetson-nano")
    assert free_of_charge(known) == known
    assert board.units[0].opps[0] == Opp(board.units[0].min_mhz, 0.0)


@pytest.mark.faults
def test_a_program_killed_while_throttled_leaves_nothing_behind():
    killed = kill_throttled(1)
    if isinstance(killed, Missing):
        assert "control group" in killed.reason
    else:
        assert killed["restored"].tolist() == [True]


def test_the_figures_draw_with_and_without_clocks(judged):
    set_style()
    board = host_board()
    here = latencies(board, 0.1, noise=0.05)
    both = models_drawn(here, judge_clocks(here, board), judged, "jetson-nano")
    power = models_drawn(None, None, judged, "jetson-nano")
    assert [len(plots.own_board_models(table).axes) for table in (both, power)] == [2, 1]
    frames = pd.DataFrame({
        "policy": ["largest network", "manager"] * 3, "arrival_s": [0, 0, 1, 1, 2, 2],
        "latency_ms": [5, 5, 9, 4, np.nan, 4], "deadline_ms": 8.0,
        "on_time": [True, True, False, True, False, True], "network": [2, 2, 2, 1, np.nan, 1],
        "networks": 2, "allowed_pct": [100, 100, 40, 40, 40, 40],
    })  # fmt: skip
    titles = [axes.get_title() for axes in plots.own_board_managed(frames).axes]
    assert "manager: 100 % of the frames in time" in titles
