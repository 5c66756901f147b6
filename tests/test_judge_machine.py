"""The study of the knobs, on this machine and on a tree of plain files."""

import math
from pathlib import Path

import pandas as pd
import pytest

from dynlib.errors import MachineError
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine
from dynlib.machine.process import process_parts
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import (
    inject_faults,
    machine_costs_us,
    quota_tracking,
    reached,
)

TASKS = Path("/proc/self/task")


def quota_knob(fs):
    return next((k for k in process_parts(fs).knobs if k.kind == "quota_pct"), None)


def test_live_quota_tracks():
    rows = quota_tracking((20.0,), window_s=1.0)
    if isinstance(rows, Missing):
        pytest.skip(f"no CPU quota here: {rows.reason}")
    (error,) = reached(pd.DataFrame(rows))["error_pct"]
    if math.isnan(error):
        pytest.skip(f"another load kept the quota from being reached: {rows}")
    assert error < 10  # a second is short; the notebook takes five or more


def test_a_machine_that_another_holds_has_no_quota_for_us(monkeypatch):
    def held(self):
        raise MachineError("held by process 1")

    monkeypatch.setattr(Machine, "__enter__", held)
    answer = quota_tracking((20.0,), window_s=0.1)
    assert isinstance(answer, Missing)
    assert "held by process 1" in answer.reason or quota_knob(SysFs("/")) is None


def test_only_what_was_throttled_is_judged():
    rows = pd.DataFrame({"throttled": [0.95, 0.4], "error_pct": [0.1, 70.0]})
    assert reached(rows)["error_pct"].dropna().tolist() == [0.1]


def test_faults_are_counted_from_a_real_run(tmp_path):
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults/test_some.py").write_text(
        "import pytest\n"
        "def test_fault_01_holds(): pass\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_fault_02_breaks_once(n): assert n == 1\n"
        "def test_fault_03_cannot_run(): pytest.skip('not here')\n"
    )
    assert inject_faults(tmp_path / "faults") == ({1, 2}, {1})
    assert "no folder" in inject_faults(tmp_path / "gone").reason


def test_costs_of_a_board_are_positive():
    assert all(us > 0 for us in machine_costs_us(459).values())
