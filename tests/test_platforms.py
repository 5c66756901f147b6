"""What works on other systems than Linux, and what is refused there by name."""

import os
import socket
import subprocess
import sys

import pytest

from dynlib.deploy import door
from dynlib.errors import ServiceError
from dynlib.machine import lease
from dynlib.machine.bind import host_board, open_machine


@pytest.fixture
def macos(monkeypatch, tmp_path):
    """As much of macOS as can be told apart: what Python lacks there, and an empty /proc."""
    monkeypatch.setattr(sys, "platform", "darwin")
    for module, name in (
        (os, "sched_getaffinity"), (os, "sched_setaffinity"), (os, "eventfd"), (os, "pidfd_open"),
        (socket, "SO_PEERCRED"),
    ):  # fmt: skip
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setattr(lease, "_PROC", tmp_path / "no-proc")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_windows_is_refused_when_it_is_imported():
    code = "import sys; sys.platform = 'win32'; import dynlib.files"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: dynlib: this is win32; expected Linux or macOS" in done.stderr


def test_macos_has_no_service(macos, tmp_path):
    with pytest.raises(ServiceError, match=r"darwin .* expected Linux"):
        door.Door(tmp_path / "manager.sock", "", None)


def test_a_machine_of_macos_opens_and_says_what_it_lacks(macos):
    with open_machine("auto", root=macos) as machine:
        assert not machine.problems
        assert {kind for _, kind in machine.knobs} <= {"threads"}
    assert any("affinity" in lack and "Linux" in lack for lack in machine.lacks)
    assert host_board(macos / "cpufreq").units
