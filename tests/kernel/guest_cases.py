"""Runs inside the guest, on its own /sys: the table of cases, the machine contract, the lease."""

import os
import signal
import subprocess
import sys
import time

import pytest
from cases import CASES, KHZ, path, reset, run
from machine_contract import MachineContract

from dynlib.machine.control import Reading
from dynlib.machine.knobs import find_knobs
from dynlib.machine.lease import lease_file
from dynlib.machine.machine import Machine
from dynlib.machine.sensors import find_sensors
from dynlib.sysfs import SysFs

FS = SysFs("/")
STATE = [f"{p}/{n}" for p in ("policy0", "policy1") for n in
         ("scaling_governor", "scaling_min_freq", "scaling_max_freq")]  # fmt: skip


def make_machine():
    knobs = find_knobs(FS)
    return Machine("guest", knobs + find_sensors(FS, knobs.knobs), FS, settle_s=0.3)


def state():
    return {name: FS.read(path(name)) for name in [*STATE, "cpu1/online"]}


@pytest.fixture(autouse=True)
def _as_booted():
    reset(FS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case):
    run(FS, case)


class TestContract(MachineContract):
    @pytest.fixture
    def machine(self):
        return make_machine()

    def state(self, machine):
        return state()

    def values(self, knob):
        values = list(super().values(knob))
        if knob.kind == "governor":  # last, so that the clocks do not wait for work to appear
            return sorted(values, key="userspace".__eq__)
        # An offline CPU answers EBUSY for its whole policy.
        return values[1:] if knob.kind == "cores" else values


def test_finds_units_and_sensors():
    machine = make_machine()
    assert {"policy0", "policy1"} <= set(machine.units)
    assert machine.knobs["policy0", "clock_mhz"].choices == tuple(khz / 1000 for khz in KHZ)
    assert isinstance(machine.read("acpitz"), Reading)


def holder():
    child = subprocess.Popen([sys.executable, "/t/holder.py", "/", "", "sleep"],
                             stdout=subprocess.PIPE, text=True, cwd="/t")  # fmt: skip
    return child, int(child.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed(number):
    before = state()
    child, _ = holder()
    assert FS.read(path("policy0/scaling_governor")) == "userspace"
    assert FS.read(path("policy0/scaling_max_freq")) == "1200000"
    child.send_signal(number)
    child.wait()
    end = time.monotonic() + 20
    while lease_file(FS).exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert state() == before


def test_both_killed_and_started_again():
    before = state()
    child, guardian = holder()
    os.kill(guardian, signal.SIGKILL)
    child.kill()
    child.wait()
    assert state_or_offline() != before
    with make_machine():
        assert state() == before
    assert not lease_file(FS).exists()


def state_or_offline():
    try:
        return state()
    except OSError:  # the holder took cpu1 offline
        return None


def test_another_tool_takes_over():
    with make_machine() as machine:
        assert machine.set("policy0", "governor", "userspace").problem == ""
        FS.write(path("policy0/scaling_governor"), "ondemand")
        assert "another program" in machine.set("policy0", "clock_mhz", 1200.0).problem
    assert FS.read(path("policy0/scaling_governor")) == "ondemand"
