"""What a process sets for itself: affinity, threads, and the CPU quota in both kinds of group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_tree
import pytest

from dynlib.errors import MachineError
from dynlib.machine import lease
from dynlib.machine.knobs import find_knobs
from dynlib.machine.lease import UNDOERS
from dynlib.machine.machine import Machine
from dynlib.machine.process import process_parts
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import write_tree

TASKS = Path("/proc/self/task")


@pytest.fixture
def states(memory, monkeypatch):
    """The folder where leases of this machine are kept, for this test."""
    monkeypatch.setattr(lease, "state_dir", lambda: memory)
    return memory


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


def test_affinity_reaches_every_thread_and_comes_back():
    parts = process_parts(SysFs("/"))
    knob = next(k for k in parts.knobs if k.kind == "affinity")
    before = os.sched_getaffinity(0)
    parts.knobs = [knob]
    with Machine("host", parts, SysFs("/")) as machine:
        one = (min(before),)
        assert machine.set("process", "affinity", one).in_force == one
        masks = {frozenset(os.sched_getaffinity(int(t.name))) for t in TASKS.iterdir()}
        assert masks == {frozenset(one)}
        for bad in ((), (10**6,)):
            with pytest.raises(MachineError, match="expected some of"):
                machine.set("process", "affinity", bad)
    assert os.sched_getaffinity(0) == before


def test_threads_of_a_loaded_torch(states, monkeypatch):
    held = [4]
    fake = SimpleNamespace(get_num_threads=lambda: held[-1], set_num_threads=held.append)
    monkeypatch.setitem(sys.modules, "torch", fake)
    parts = process_parts(SysFs("/"))
    with Machine("host", parts, SysFs("/")) as machine:
        assert machine.set("process", "threads", 1).in_force == 1
    assert held[-1] == 4


def test_without_affinity_masks_it_says_linux(monkeypatch, tmp_path):
    """As on macOS, which has neither them nor /proc nor control groups."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(lease, "_PROC", tmp_path / "no-proc")
    parts = find_knobs(SysFs(tmp_path)) + process_parts(SysFs(tmp_path)) + process_parts(SysFs("/"))
    assert ("process", "affinity") not in {(knob.unit, knob.kind) for knob in parts.knobs}
    assert any("process.affinity" in lack and "Linux" in lack for lack in parts.lacks)
    parts.knobs = [knob for knob in parts.knobs if knob.kind != "quota_pct"]
    with Machine("host", parts, SysFs("/")):
        pass


HOLDS_QUOTA = """\
import os, sys, time
from pathlib import Path
from dynlib.machine import lease
from dynlib.machine.machine import Machine
from dynlib.machine.process import process_parts
from dynlib.sysfs import SysFs
lease.state_dir = lambda: Path(sys.argv[1])
parts = process_parts(SysFs("/"))
parts.knobs = [knob for knob in parts.knobs if knob.kind == "quota_pct"]
with Machine("host", parts, SysFs("/")) as machine:
    problem = machine.set("process", "quota_pct", 50.0).problem
    print(parts.knobs[0].group, machine._lease.guardian_pid, problem, flush=True)
    time.sleep(30)
"""


@pytest.fixture
def quota_holder(states):
    """A process with a quota: it, its control group, and its guardian's pid."""
    if quota_knob(SysFs("/")) is None:
        pytest.skip("no control group can be made here")
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS_QUOTA, str(states)], stdout=subprocess.PIPE, text=True
    )
    group, guardian, *problem = child.stdout.readline().split()
    assert not problem
    yield child, Path("/") / group, int(guardian)
    child.kill()
    child.communicate(timeout=20)


def test_a_quota_of_this_process_needs_no_lock_on_the_machine(quota_holder, states):
    assert quota_holder[1].exists()
    for folder in (None, states / "tree"):  # beside it: our own quota, and a whole machine
        fs = SysFs("/") if folder is None else SysFs(write_tree(folder, fake_tree.jetson()))
        parts = process_parts(fs) if folder is None else find_knobs(fs)
        with Machine("host", parts, fs, folder=folder) as machine:
            assert machine.knobs
    assert quota_holder[0].poll() is None


def test_one_process_does_not_hold_itself_twice(states):
    parts = process_parts(SysFs("/"))
    if quota_knob(SysFs("/")) is None:
        pytest.skip("no control group can be made here")
    with Machine("host", parts, SysFs("/")):
        with pytest.raises(MachineError, match=f"held by process {os.getpid()}"):
            Machine("host", parts, SysFs("/")).__enter__()
        assert any(states.glob("lease-*.json"))


def test_the_guardian_takes_a_killed_process_s_quota_away(quota_holder, states):
    child, group, _ = quota_holder
    child.kill()
    for _ in range(400):
        if not any(states.glob("lease-*")):
            break
        time.sleep(0.02)
    assert not group.exists()
    assert not any(states.glob("lease-*"))


def test_the_next_start_of_anybody_takes_it_away_where_the_guardian_died_too(quota_holder, states):
    child, group, guardian = quota_holder
    os.kill(guardian, signal.SIGKILL)
    child.kill()
    child.wait()
    assert group.exists()
    with Machine("host", process_parts(SysFs("/")), SysFs("/")):
        assert not group.exists()
    assert not any(states.glob("lease-*"))
