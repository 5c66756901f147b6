"""What a process sets for itself: affinity, threads, and the CPU quota in both kinds of group."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynlib.errors import MachineError
from dynlib.machine.lease import UNDOERS
from dynlib.machine.machine import Machine
from dynlib.machine.process import process_parts
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import write_tree

TASKS = Path("/proc/self/task")


def quota_knob(fs):
    return next((k for k in process_parts(fs).knobs if k.kind == "quota_pct"), None)


def cgroups(path: str) -> dict[str, str]:
    return {f"proc/{os.getpid()}/cgroup": path}


def v1(root, knob):
    """What the kernel would put into a new group."""
    return {f"{knob.group}/{name}": text for name, text in {
        "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000", "cgroup.procs": "",
        "cpu.stat": "nr_periods 5\nnr_throttled 3"}.items()}  # fmt: skip


def test_quota_of_version_1(tmp_path):
    home = "sys/fs/cgroup/cpu/jobs"
    root = write_tree(tmp_path, cgroups("4:memory:/x\n1:cpu,cpuacct:/jobs") | {
        f"{home}/cpu.cfs_quota_us": "-1", f"{home}/cgroup.procs": ""})  # fmt: skip
    fs = SysFs(root)
    knob = quota_knob(fs)
    write_tree(root, v1(root, knob))
    knob.put(37.5)
    assert fs.read(f"{knob.group}/cpu.cfs_quota_us") == "37500"
    assert fs.read(f"{knob.group}/cgroup.procs") == str(os.getpid())
    assert knob.get() == 37.5
    assert knob.throttled() == 3
    (step,) = knob.undo()
    for file in (root / knob.group).iterdir():
        if file.name != "cgroup.procs":
            file.unlink()
    with pytest.raises(OSError, match="not empty"):  # a real group's files vanish with it
        UNDOERS["cgroup"](fs, step)
    assert fs.read(f"{home}/cgroup.procs") == str(os.getpid())


def test_quota_of_version_2_goes_where_the_controller_is_handed_on(tmp_path):
    slice_ = "sys/fs/cgroup/user.slice"
    root = write_tree(tmp_path, cgroups("0::/user.slice/shell.scope") | {
        "sys/fs/cgroup/cgroup.controllers": "cpu memory",
        "sys/fs/cgroup/cgroup.subtree_control": "cpu memory",
        f"{slice_}/cgroup.subtree_control": "cpu memory",
        f"{slice_}/shell.scope/cgroup.subtree_control": "",
        f"{slice_}/shell.scope/cgroup.procs": ""})  # fmt: skip
    fs = SysFs(root)
    knob = quota_knob(fs)
    assert knob.group == f"{slice_}/dynlib-{os.getpid()}"
    write_tree(root, {f"{knob.group}/cpu.max": "max 100000", f"{knob.group}/cgroup.procs": ""})
    assert knob.get() == knob.bounds[1]
    knob.put(25.0)
    assert fs.read(f"{knob.group}/cpu.max") == "25000 100000"
    assert knob.get() == 25.0
    assert knob.undo()[0].value == f"{slice_}/shell.scope"


def test_a_group_with_blanks_in_its_name(tmp_path):
    home = "sys/fs/cgroup/cpu/jobs of (deleted)"
    root = write_tree(tmp_path, cgroups("1:cpu:/jobs of (deleted)") | {
        f"{home}/cpu.cfs_quota_us": "-1", f"{home}/cgroup.procs": ""})  # fmt: skip
    assert quota_knob(SysFs(root)).group.startswith(home)


@pytest.mark.parametrize("files", [{}, {"sys/fs/cgroup/cgroup.controllers": "memory"}])
def test_no_quota_says_why(tmp_path, files):
    parts = process_parts(SysFs(write_tree(tmp_path, files | cgroups("0::/a"))))
    assert any("process.quota_pct" in lack for lack in parts.lacks)


def test_affinity_reaches_every_thread_and_comes_back(tmp_path):
    parts = process_parts(SysFs("/"))
    knob = next(k for k in parts.knobs if k.kind == "affinity")
    before = os.sched_getaffinity(0)
    parts.knobs = [knob]
    with Machine("host", parts, SysFs("/"), folder=tmp_path) as machine:
        one = (min(before),)
        assert machine.set("process", "affinity", one).in_force == one
        masks = {frozenset(os.sched_getaffinity(int(t.name))) for t in TASKS.iterdir()}
        assert masks == {frozenset(one)}
        for bad in ((), (10**6,)):
            with pytest.raises(MachineError, match="expected some of"):
                machine.set("process", "affinity", bad)
    assert os.sched_getaffinity(0) == before


def test_threads_of_a_loaded_torch(tmp_path, monkeypatch):
    held = [4]
    fake = SimpleNamespace(get_num_threads=lambda: held[-1], set_num_threads=held.append)
    monkeypatch.setitem(sys.modules, "torch", fake)
    parts = process_parts(SysFs("/"))
    with Machine("host", parts, SysFs("/"), folder=tmp_path) as machine:
        assert machine.set("process", "threads", 1).in_force == 1
    assert held[-1] == 4
