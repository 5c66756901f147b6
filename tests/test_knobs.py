"""Knobs found in trees of many boards, and what each number becomes."""

import errno
import os

import fake_tree
import pytest
from fake_tree import POLICY, FakeKernel, FaultyKernel, devfreq_files, make_machine, tree_state

from dynlib.machine.knobs import find_devfreq, find_knobs
from dynlib.machine.machine import Machine
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import cpu_files, write_tree


def machine_of(memory, files, kernel=FakeKernel):
    return make_machine(kernel(write_tree(memory / "root", files)), memory)


@pytest.mark.parametrize("machine", fake_tree.GPU_PATHS)
def test_gpu_is_found_by_name_and_counts_in_hz(memory, machine):
    files = devfreq_files(fake_tree.GPU_PATHS[machine], fake_tree.GPU_MHZ)
    files |= devfreq_files("sys/class/devfreq/1d84000.ufshc", [37.5, 300.0])
    live = machine_of(memory, files)
    assert live.knobs["gpu", "clock_mhz"].choices == fake_tree.GPU_MHZ
    with live:
        assert live.set("gpu", "clock_mhz", 510.0).in_force == 510.0
        folder = memory / "root" / fake_tree.GPU_PATHS[machine]
        assert (folder / "max_freq").read_text().strip() == "510000000"
    assert "memory clock: no such device" in live.lacks


def test_gpu_behind_an_address_is_found_by_its_node(memory):
    files = devfreq_files("sys/class/devfreq/17000000.x", [306.0]) | {
        "sys/class/devfreq/17000000.x/device/of_node/name": "gv11b\0"}  # fmt: skip
    fs = SysFs(write_tree(memory, files))
    assert find_devfreq(fs) == {"gpu": "sys/class/devfreq/17000000.x"}


def test_memory_is_a_devfreq_device_or_the_jetson_lock(memory):
    live = machine_of(memory, devfreq_files("sys/class/devfreq/dmc", [528.0, 2112.0]))
    assert live.knobs["memory", "clock_mhz"].choices == (528.0, 2112.0)
    files = fake_tree.jetson() | {
        f"{fake_tree.EMC}/mrq_rate_locked": 0, f"{fake_tree.EMC}/state": 0}  # fmt: skip
    root = write_tree(memory / "jetson", files)
    parts = find_knobs(SysFs(root), memory_points=(102.0, 1331.2, 1866.0))
    with Machine("jetson", parts, SysFs(root), folder=memory) as machine:
        assert machine.knobs["memory", "clock_mhz"].choices == (204.0, 1331.2, 1866.0)
        assert machine.set("memory", "clock_mhz", 1331.2).in_force == 1331.2
        assert (root / fake_tree.EMC / "mrq_rate_locked").read_text() == "1"
    assert (root / fake_tree.EMC / "mrq_rate_locked").read_text() == "0"


def test_limits_never_cross_and_only_listed_values_are_written(memory):
    machine = machine_of(memory, fake_tree.jetson(), FaultyKernel)
    low = high = None
    with machine:
        for mhz in (2400.0, 800.0, 1600.0, 1200.0, 2400.0, 1000.0):
            assert machine.set("policy0", "clock_mhz", mhz).problem == ""
    for path, text in machine.fs.written:
        low = int(text) if path == f"{POLICY}/scaling_min_freq" else low
        high = int(text) if path == f"{POLICY}/scaling_max_freq" else high
        if "policy0/scaling_m" in path:
            assert int(text) in fake_tree.KHZ
            assert (low or 0) <= (high or 2_400_000)


def test_no_table_of_clocks(memory):
    files = cpu_files([((0,), fake_tree.KHZ)])
    del files[f"{POLICY}/scaling_available_frequencies"]
    root = write_tree(memory, files)
    parts = find_knobs(SysFs(root))
    (clock,) = [knob for knob in parts.knobs if knob.kind == "clock_mhz"]
    assert clock.choices == (800.0, 2400.0)
    assert any("no table of clocks" in lack for lack in parts.lacks)


def test_userspace_clock_is_put_back(memory):
    machine = machine_of(memory, fake_tree.jetson())
    machine.fs.write(f"{POLICY}/scaling_governor", "userspace")
    machine.fs.write(f"{POLICY}/scaling_setspeed", "1600000")
    before = tree_state(memory / "root")
    with machine:
        assert machine.set("policy0", "clock_mhz", 1000.0).in_force == 1000.0
        assert machine.set("policy0", "governor", "powersave").in_force == "powersave"
    assert tree_state(memory / "root") == before
    assert machine.get("policy0", "clock_mhz") == 1600.0


def test_offline_policy_answers_busy(memory):
    machine = machine_of(memory, fake_tree.jetson())
    before = tree_state(memory / "root")
    with machine:
        assert machine.set("policy2", "cores", 0).in_force == 0
        assert machine.set("policy2", "clock_mhz", 1200.0).problem == os.strerror(errno.EBUSY)
        assert machine.set("policy0", "cores", 1).in_force == 1
        assert machine.get("policy0", "clock_mhz") == 800.0
    assert machine.problems == {}
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
    with Machine("jetson", find_knobs(SysFs(root)), SysFs(root), folder=memory) as machine:
        assert machine.get("board", "mode") == "15W_6CORE"
        assert machine.set("board", "mode", "MAXN").in_force == "MAXN"
    assert machine.get("board", "mode") == "15W_6CORE"
    program.write_text("#!/bin/sh\necho NVPM ERROR\n")
    with machine:
        assert "refused mode MAXN" in machine.set("board", "mode", "MAXN").problem


def test_a_power_mode_that_hangs_is_given_up(memory, monkeypatch):
    """At once: a second try would hold the manager up for as long again."""
    monkeypatch.setattr("dynlib.machine.lease._COMMAND_S", 0.3)
    root = write_tree(memory / "root", {
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=15W >",
        "var/lib/nvpmodel/status": "pmode:0002", "usr/sbin/nvpmodel": ""})  # fmt: skip
    program = root / "usr/sbin/nvpmodel"
    calls = root / "calls"
    program.write_text(f"#!/bin/sh\necho $2 >> {calls}\nexec sleep 3\n")
    program.chmod(0o755)
    machine = Machine("jetson", find_knobs(SysFs(root)), SysFs(root), folder=memory)
    with machine:
        for _ in range(2):
            assert "nvpmodel: no answer" in machine.set("board", "mode", "MAXN").problem
        SysFs(root).write("var/lib/nvpmodel/status", "pmode:0000")  # it had come as far as this
    assert "no answer" in machine.problems["var/lib/nvpmodel/status"]
    assert calls.read_text().split() in (["0", "2"], ["0", "2", "2"])  # the guardian tries too
