"""The contract of the log: a program of somebody else finds every number of a run again."""

import hashlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import recompute

from dynlib.boards.file import BOARD_DIR
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.points import read_points
from dynlib.runtime.case import Case
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import Reactive, published_frame
from suite.studies.scenarios import scenario


def engines(frame):
    """Two engines for every network: the second takes three quarters of the time."""
    faster = frame.assign(backend="fast", latency_ms=0.75 * frame["latency_ms"])
    return pd.concat([frame.assign(backend="slow"), faster], ignore_index=True)


def busy(case):
    """A second app that comes and goes, a floor that nobody meets for a while, a competitor."""
    model, table = next(iter(case.tables.items()))
    unit = table.main_unit
    period_ms = 4 * table.largest.latency_ms[-1]
    apps = (
        App("a", model, period_ms, period_ms=period_ms, accuracy_floor_pct=75.0),
        App("b", model, 2 * period_ms, "server", 2 * period_ms, start_s=2.0, end_s=6.0),
    )
    changes = (
        Change(3.0, "a", accuracy_floor_pct=99.0), Change(4.0, "a", accuracy_floor_pct=70.0),
        Change(5.0, unit=unit, stretch=2.5, announced=False), Change(7.0, unit=unit, stretch=1.0),
    )  # fmt: skip
    return case.under(Workload("busy", 8.0, apps, changes))


def a_case(name, board_name, tmp_path):
    board = load_board(board_name)
    frame = published_frame(board)
    frame = engines(frame) if name == "engines" else frame
    path = tmp_path / "points.csv"
    elsewhere = frame.assign(board="another", accuracy_val_pct=1.0, accuracy_test_pct=1.0)
    pd.concat([elsewhere, frame]).to_csv(path, index=False)
    case = Case(Workload("none", 1.0, ()), board, read_points(path, board))
    if name in ("engines", "busy"):
        return busy(case), path
    whole = scenario(name, board, case.tables, seed=2).workload
    kept = tuple(change for change in whole.changes if change.t_s < 20)
    return case.under(replace(whole, horizon_s=20.0, changes=kept)), path


def equal(found, expected):
    for key, value in expected.items():
        if isinstance(value, dict):
            equal(found[key], value)
        elif value is None:
            assert not math.isfinite(found[key]), key
        else:
            assert found[key] == (
                pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            ), key


@pytest.mark.parametrize(
    ("name", "board", "policy"),
    [
        ("busy", "jetson-xavier-nx", "manager"), ("busy", "hikey960", "reactive"),
        ("engines", "jetson-xavier-nx", "manager"), ("S4", "jetson-xavier-nx", "manager"),
        ("T2", "jetson-xavier-nx", "manager"), ("S6", "hikey960", "manager"),
    ],
)  # fmt: skip
def test_every_number_is_found_again(name, board, policy, tmp_path):
    case, table = a_case(name, board, tmp_path)
    kind = Manager if policy == "manager" else Reactive
    done = case.simulate(kind(case.board, case.tables), seed=5)
    log = done.log.write(tmp_path / "log.jsonl")
    file = BOARD_DIR / f"{board}.toml"
    found = recompute.recompute(log, file, table)
    summary = done.summary()
    equal(summary, found)
    heat = {"temp_max_c", "throttled_pct"}
    assert set(summary) - heat == set(found)
    if (name, policy) == ("busy", "manager"):
        assert found["missed"]  # so that something is told apart
    assert done.log.header["board_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_it_is_a_program_of_its_own(tmp_path):
    """It runs without the project, and imports nothing of it."""
    case, table = a_case("S4", "jetson-xavier-nx", tmp_path)
    log = case.simulate(Manager(case.board, case.tables)).log.write(tmp_path / "log.jsonl")
    program = Path(recompute.__file__)
    assert "dynlib" not in program.read_text()
    board = BOARD_DIR / "jetson-xavier-nx.toml"
    run = [sys.executable, "-I", str(program), str(log), str(board), str(table)]
    assert '"offered"' in subprocess.check_output(run, text=True, cwd=tmp_path)
