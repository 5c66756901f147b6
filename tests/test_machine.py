"""The contract of a machine on every back end."""

import os
from types import SimpleNamespace

import fake_tree
import pytest
from fake_tree import FakeKernel
from machine_contract import MachineContract

from dynlib.machine import lease, nvml
from dynlib.machine.bind import load_board, open_machine
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine
from dynlib.machine.nvml import nvml_parts
from dynlib.machine.process import process_parts
from dynlib.machine.sensors import find_sensors
from dynlib.machine.virtual import VirtualClock, load, virtual_parts
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import write_tree


class TestSysfs(MachineContract):
    @pytest.fixture
    def machine(self, memory, root):
        return fake_tree.make_machine(FakeKernel(root), memory)


class TestHost(MachineContract):
    @pytest.fixture
    def machine(self, memory, monkeypatch):
        monkeypatch.setattr(lease, "state_dir", lambda: memory)
        fs = SysFs("/")
        # Only what concerns this process: no test turns a real machine's clocks or cores.
        parts = process_parts(fs) + find_sensors(fs)
        return Machine("host", parts, fs)


class TestSimulated(MachineContract):
    @pytest.fixture(params=["jetson-nano", "hikey960"])
    def machine(self, request):
        return open_machine(request.param)


class FakeNvml:
    """As much of the library as is used, with one GPU."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_GRAPHICS, NVML_TEMPERATURE_GPU = 0, 0

    def __init__(self):
        self.locked, self.limit, self.calls = None, 300_000, []

    def nvmlInit(self):
        self.calls.append("init")

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetSupportedMemoryClocks(self, handle):
        return [405, 2619]

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle, memory):
        return [1980, 1200, 345] if memory == 2619 else [345]

    def nvmlDeviceGetClockInfo(self, handle, which):
        return self.locked or 1980

    def nvmlDeviceSetGpuLockedClocks(self, handle, low, high):
        self.locked = high

    def nvmlDeviceResetGpuLockedClocks(self, handle):
        self.locked = None

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle):
        return [200_000, 700_000]

    def nvmlDeviceGetPowerManagementLimit(self, handle):
        return self.limit

    def nvmlDeviceSetPowerManagementLimit(self, handle, limit):
        self.limit = limit

    def nvmlDeviceGetPowerUsage(self, handle):
        return 71_234

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetTemperature(self, handle, which):
        return 34

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=12)


class TestNvml(MachineContract):
    @pytest.fixture
    def library(self, monkeypatch):
        fake = FakeNvml()
        monkeypatch.setattr(nvml, "_library", lambda: fake)
        return fake

    @pytest.fixture
    def machine(self, library, memory):
        (memory / "root").mkdir()
        return Machine("gpu", nvml_parts(), SysFs(memory / "root"), folder=memory)

    def test_a_gpu_that_answers_nothing_is_left_out(self, library):
        def fails(index):
            raise library.NVMLError("GPU is lost")

        library.nvmlDeviceGetHandleByIndex = fails
        parts = nvml_parts()
        assert not parts.units
        assert any("GPU is lost" in lack for lack in parts.lacks)

    def test_a_gpu_without_a_list_of_clocks_has_no_clock_knob(self, library):
        library.nvmlDeviceGetSupportedMemoryClocks = lambda handle: []
        assert "clock_mhz" not in {knob.kind for knob in nvml_parts().knobs}

    def test_says_what_the_gpu_lacks(self, machine):
        assert any("energy: Not Supported" in lack for lack in machine.lacks)
        assert machine.read("nvidia0.power").value == 71_234

    def test_error_becomes_a_problem(self, machine, library):
        def refuse(*_):
            raise library.NVMLError("Insufficient Permissions")

        library.nvmlDeviceSetGpuLockedClocks = refuse
        with machine:
            applied = machine.set("nvidia0", "clock_mhz", 1200.0)
        assert applied.problem == "Insufficient Permissions"
        assert applied.in_force == 1980


def test_simulated_energy_is_exact():
    clock = VirtualClock()
    model = load_board("hikey960")
    parts = virtual_parts(model, clock)
    with Machine("model", parts, None, clock=clock) as machine:
        machine.set("big", "clock_mhz", 903.0)
        with load(parts.knobs, "big", 4.0), machine.measure() as window:
            clock.sleep(2.0)
    expected = model.power_mw({"big": 903.0, "little": 1844.0}, {"big": 4.0})
    assert window.power_mw == pytest.approx(expected)
    assert window.energy_mj == pytest.approx(2 * expected)


def test_auto_finds_this_machine_and_says_what_it_lacks():
    machine = open_machine("auto")
    assert ("process", "affinity") in machine.knobs
    assert machine.lacks
    assert not any(isinstance(v, Missing) and not v.reason for v in machine.snapshot().values())


def test_auto_on_an_injected_root(memory):
    root = write_tree(memory, fake_tree.jetson())
    machine = open_machine("auto", root=root)
    assert {"policy0", "policy2", "gpu", "memory", "board"} <= set(machine.units)
    assert machine.read("VDD_IN.power").value == 6000.0


def test_what_this_user_may_not_write_is_refused_and_needs_no_lock(root, memory, monkeypatch):
    """Else two programs of an ordinary user, who sets only their own processes, exclude another."""
    monkeypatch.setattr(SysFs, "writable", lambda self, path: False, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    fs = FakeKernel(root)
    with fake_tree.make_machine(fs, memory) as machine, fake_tree.make_machine(fs, memory):
        applied = machine.set("policy0", "clock_mhz", 1200.0)
        assert applied.problem == "Permission denied"
        assert machine.level == "watch"
        assert not any(memory.glob("*.lock"))
