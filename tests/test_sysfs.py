"""Knobs and sensors found in trees of many boards, and what each number becomes."""

import errno
import os

import fake_tree
import pytest
from fake_tree import POLICY, FakeKernel, FaultyKernel, devfreq_files, make_board, tree_state

from dynlib.machine.control import Missing, Reading
from dynlib.machine.knobs import find_devfreq, find_knobs
from dynlib.machine.machine import Machine
from dynlib.machine.sensors import find_sensors
from dynlib.machine.virtual import VirtualClock
from dynlib.machine.window import Window
from dynlib.sysfs import SysFs
from suite.studies.knobs import cpu_files, write_tree


def board_of(memory, files, kernel=FakeKernel):
    return make_board(kernel(write_tree(memory / "root", files)), memory)


@pytest.mark.parametrize("board", fake_tree.GPU_PATHS)
def test_gpu_is_found_by_name_and_counts_in_hz(memory, board):
    files = devfreq_files(fake_tree.GPU_PATHS[board], fake_tree.GPU_MHZ)
    files |= devfreq_files("sys/class/devfreq/1d84000.ufshc", [37.5, 300.0])
    live = board_of(memory, files)
    assert live.knobs["gpu", "clock_mhz"].choices == fake_tree.GPU_MHZ
    with live:
        assert live.set("gpu", "clock_mhz", 510.0).in_force == 510.0
        folder = memory / "root" / fake_tree.GPU_PATHS[board]
        assert (folder / "max_freq").read_text().strip() == "510000000"
    assert "memory clock: no such device" in live.lacks


def test_gpu_behind_an_address_is_found_by_its_node(memory):
    files = devfreq_files("sys/class/devfreq/17000000.x", [306.0]) | {
        "sys/class/devfreq/17000000.x/device/of_node/name": "gv11b\0"}  # fmt: skip
    fs = SysFs(write_tree(memory, files))
    assert find_devfreq(fs) == {"gpu": "sys/class/devfreq/17000000.x"}


def test_memory_is_a_devfreq_device_or_the_jetson_lock(memory):
    live = board_of(memory, devfreq_files("sys/class/devfreq/dmc", [528.0, 2112.0]))
    assert live.knobs["memory", "clock_mhz"].choices == (528.0, 2112.0)
    files = fake_tree.jetson() | {
        f"{fake_tree.EMC}/mrq_rate_locked": 0, f"{fake_tree.EMC}/state": 0}  # fmt: skip
    root = write_tree(memory / "jetson", files)
    parts = find_knobs(SysFs(root), memory_points=(102.0, 1331.2, 1866.0))
    with Machine("jetson", parts, SysFs(root), folder=memory) as board:
        assert board.knobs["memory", "clock_mhz"].choices == (204.0, 1331.2, 1866.0)
        assert board.set("memory", "clock_mhz", 1331.2).in_force == 1331.2
        assert (root / fake_tree.EMC / "mrq_rate_locked").read_text() == "1"
    assert (root / fake_tree.EMC / "mrq_rate_locked").read_text() == "0"


def test_limits_never_cross_and_only_listed_values_are_written(memory):
    board = board_of(memory, fake_tree.jetson(), FaultyKernel)
    low = high = None
    with board:
        for mhz in (2400.0, 800.0, 1600.0, 1200.0, 2400.0, 1000.0):
            assert board.set("policy0", "clock_mhz", mhz).problem == ""
    for path, text in board.fs.written:
        low = int(text) if path == f"{POLICY}/scaling_min_freq" else low
        high = int(text) if path == f"{POLICY}/scaling_max_freq" else high
        if "policy0/scaling_m" in path:
            assert int(text) in fake_tree.KHZ
            assert (low or 0) <= (high or 2_400_000)


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


def test_no_table_of_clocks(memory):
    files = cpu_files([((0,), fake_tree.KHZ)])
    del files[f"{POLICY}/scaling_available_frequencies"]
    root = write_tree(memory, files)
    parts = find_knobs(SysFs(root))
    (clock,) = [knob for knob in parts.knobs if knob.kind == "clock_mhz"]
    assert clock.choices == (800.0, 2400.0)
    assert any("no table of clocks" in lack for lack in parts.lacks)


def test_userspace_clock_is_put_back(memory):
    board = board_of(memory, fake_tree.jetson())
    board.fs.write(f"{POLICY}/scaling_governor", "userspace")
    board.fs.write(f"{POLICY}/scaling_setspeed", "1600000")
    before = tree_state(memory / "root")
    with board:
        assert board.set("policy0", "clock_mhz", 1000.0).in_force == 1000.0
        assert board.set("policy0", "governor", "powersave").in_force == "powersave"
    assert tree_state(memory / "root") == before
    assert board.get("policy0", "clock_mhz") == 1600.0


def test_offline_policy_answers_busy(memory):
    board = board_of(memory, fake_tree.jetson())
    before = tree_state(memory / "root")
    with board:
        assert board.set("policy2", "cores", 0).in_force == 0
        assert board.set("policy2", "clock_mhz", 1200.0).problem == os.strerror(errno.EBUSY)
        assert board.set("policy0", "cores", 1).in_force == 1
        assert board.get("policy0", "clock_mhz") == 800.0
    assert board.problems == {}
    assert tree_state(memory / "root") == before


NVPMODEL = """#!/bin/sh
[ "$1" = -m ] || exit 2
printf 'pmode:%04d' "$2" > {root}/var/lib/nvpmodel/status
"""


def test_power_modes_are_found_by_name(memory):
    root = write_tree(memory / "root", {
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=15W_6CORE >",
        "var/lib/nvpmodel/status": "pmode:0002", "usr/sbin/nvpmodel": ""})  # fmt: skip
    program = root / "usr/sbin/nvpmodel"
    program.write_text(NVPMODEL.format(root=root))
    program.chmod(0o755)
    with Machine("jetson", find_knobs(SysFs(root)), SysFs(root), folder=memory) as board:
        assert board.get("board", "mode") == "15W_6CORE"
        assert board.set("board", "mode", "MAXN").in_force == "MAXN"
    assert board.get("board", "mode") == "15W_6CORE"
    program.write_text("#!/bin/sh\necho NVPM ERROR\n")
    with board:
        assert "refused mode MAXN" in board.set("board", "mode", "MAXN").problem


def test_power_sensors_and_what_adds_up_to_the_board(memory):
    board = board_of(memory, fake_tree.jetson())
    assert board.read("VDD_CPU_GPU_CV.power").value == 2000.0
    assert [s.name for s in board.sensors.values() if s.total] == ["VDD_IN.power"]
    assert not any("NC" in name for name in board.sensors)


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


def test_window_energy_power_and_uncertainty():
    clock, calls = VirtualClock(), iter(range(100))
    from dynlib.machine.control import Sensor

    meter = Sensor("in", "power_mw", lambda: 1000.0 + 10 * (next(calls) % 2), 0.1, total=True)
    with Window([meter], clock) as window:
        for _ in range(50):
            clock.sleep(0.1)
            window.sample()
    assert window.power_mw == pytest.approx(1005, rel=0.001)
    assert window.energy_mj == pytest.approx(5025, rel=0.001)
    assert 2 < window.uncertainty_pct < 2.1  # one period in fifty, and little spread
    with Window([meter], clock) as window:
        clock.sleep(0.3)
    assert "too short" in window.energy_mj.reason
    assert "at least 1000 ms" in window.energy_mj.reason


def test_suspended_and_incomplete_windows_give_no_number():
    from dynlib.machine.control import Sensor

    clock = VirtualClock()
    flaky = Sensor("in", "power_mw", lambda: float("nan"), 0.01, total=True)
    with Window([flaky], clock) as window:
        clock.sleep(1)
    assert "0 samples" in window.power_mw.reason
    assert window.dropped > 0
    assert isinstance(Sensor("in", "power_mw", lambda: 5.0).read(clock), Reading)
