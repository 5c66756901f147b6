"""The study of the knobs, on this machine and on a tree of plain files."""

import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pandas as pd
import pytest

from dynlib.errors import MachineError
from dynlib.machine.control import Missing
from suite.studies import judge_machine
from suite.studies.judge_machine import (
    inject_faults,
    machine_costs_us,
    quota_tracking,
    reached,
)

TASKS = Path("/proc/self/task")


def test_live_quota_tracks():
    rows = quota_tracking((20.0,), window_s=1.0)
    if isinstance(rows, Missing):
        pytest.skip(f"no CPU quota here: {rows.reason}")
    (error,) = reached(pd.DataFrame(rows))["error_pct"]
    if math.isnan(error):
        pytest.skip(f"another load kept the quota from being reached: {rows}")
    assert error < 10  # a second is short; the notebook takes five or more


def test_a_machine_that_another_holds_has_no_quota_for_us(monkeypatch):
    held = MagicMock()
    held.__enter__.side_effect = MachineError("held by process 1")
    knob = SimpleNamespace(kind="quota_pct", name="process")
    parts = SimpleNamespace(knobs=[knob], sensors=[], lacks=[])
    monkeypatch.setattr(judge_machine, "process_parts", lambda fs: parts)
    monkeypatch.setattr(judge_machine, "Machine", lambda *_, **__: held)
    assert quota_tracking((20.0,), window_s=0.1) == Missing("held by process 1")


def test_a_machine_without_control_groups_says_what_it_lacks(monkeypatch):
    parts = SimpleNamespace(knobs=[], sensors=[], lacks=["quota: no cgroup", "memory: none"])
    monkeypatch.setattr(judge_machine, "process_parts", lambda fs: parts)
    assert quota_tracking((20.0,)) == Missing("quota: no cgroup")


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
