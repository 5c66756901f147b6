"""Sensors found in trees of many boards, and what each number becomes."""

import errno

import fake_tree
import pytest
from fake_tree import FakeKernel, FaultyKernel, make_machine

from dynlib.machine.control import Missing
from dynlib.machine.sensors import find_sensors
from dynlib.machine.virtual import VirtualClock
from dynlib.machine.window import Window
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import write_tree


def machine_of(memory, files, kernel=FakeKernel):
    return make_machine(kernel(write_tree(memory / "root", files)), memory)


def test_only_a_discharging_battery_says_what_the_board_draws(memory):
    folder = "sys/class/power_supply"
    files = {f"{folder}/{name}/{key}": value for name, kind, status in (
        ("BAT0", "Battery", "Discharging"), ("usb", "USB", "Unknown"))
        for key, value in (("type", kind), ("status", status), ("current_now", -2_000_000),
                           ("voltage_now", 12_000_000))}  # fmt: skip
    root = write_tree(memory, files)
    (battery,) = [s for s in find_sensors(SysFs(root)).sensors if s.kind == "power_mw"]
    assert battery.read(VirtualClock()).value == 24_000
    (root / folder / "BAT0" / "status").write_text("Not charging")
    assert "Not charging" in battery.read(VirtualClock()).reason


def test_power_sensors_and_what_adds_up_to_the_board(memory):
    machine = machine_of(memory, fake_tree.jetson())
    assert machine.read("VDD_CPU_GPU_CV.power").value == 2000.0
    assert [s.name for s in machine.sensors.values() if s.total] == ["VDD_IN.power"]
    assert not any("NC" in name for name in machine.sensors)


def test_ina3221_of_jetpack_4_and_ina231(memory):
    chip = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    files = {f"{chip}/rail_name_0": "POM_5V_IN", f"{chip}/in_power0_input": 2990,
             f"{chip}/rail_name_1": "POM_5V_GPU", f"{chip}/in_power1_input": 400}  # fmt: skip
    sensors = {s.name: s for s in find_sensors(SysFs(write_tree(memory / "a", files))).sensors}
    assert sensors["POM_5V_IN.power"].fetch() == 2990
    assert [s.name for s in sensors.values() if s.total] == ["POM_5V_IN.power"]
    files = {f"sys/bus/i2c/drivers/INA231/4-00{a}/sensor_W": w
             for a, w in (("40", "1.25"), ("41", "0.1"), ("44", "0.5"), ("45", "0.2"))}  # fmt: skip
    sensors = find_sensors(SysFs(write_tree(memory / "b", files))).sensors
    assert {s.name: s.fetch() for s in sensors}["a15.power"] == 1250.0
    assert sum(s.fetch() for s in sensors if s.total) == pytest.approx(2050.0)


def test_rapl_counters(memory):
    files = (
        fake_tree.rapl("package-0", "intel-rapl:0", 1_000_000, 262_143_328_850)
        | fake_tree.rapl("core", "intel-rapl:0:0", 600_000, 262_143_328_850)
        | fake_tree.rapl("dram", "intel-rapl:0:1", 100_000, None)
    )
    sensors = {s.name: s for s in find_sensors(SysFs(write_tree(memory, files))).sensors}
    assert sensors["package-0.energy"].fetch() == 1000.0
    assert sensors["package-0.energy"].span_mj == 262_143_328.85
    assert sensors["dram.energy"].span_mj is None
    assert {name for name, s in sensors.items() if s.total} == {"package-0.energy", "dram.energy"}


def test_unreadable_counter_is_missing_not_zero(memory):
    files = fake_tree.rapl("package-0", "intel-rapl:0", 1_000_000, 10**9)
    fs = FaultyKernel(write_tree(memory, files))
    fs.fail("read", "energy_uj", errno.EACCES)
    parts = find_sensors(fs)
    clock = VirtualClock()
    assert parts.sensors[0].read(clock) == Missing("Permission denied")
    assert any("root only" in lack for lack in parts.lacks)
    with Window(parts.sensors, clock) as window:
        clock.sleep(1)
    assert window.energy_mj == Missing("package-0.energy: no reading")
