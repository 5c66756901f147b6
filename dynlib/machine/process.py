"""What a process can set for itself: threads and, on Linux, affinity and a CPU quota."""

import contextlib
import os
import sys
from pathlib import Path

from dynlib.errors import MachineError
from dynlib.machine.control import Knob, MachineUnit, Missing, Parts, Undo
from dynlib.sysfs import SysFs


class _AffinityKnob(Knob):
    """The CPUs that all threads of this process may use, as a sorted tuple."""

    unit, kind, local = "process", "affinity", True

    def __init__(self):
        self.choices = tuple(sorted(os.sched_getaffinity(0)))

    def allowed(self, value) -> tuple[int, ...]:
        cpus = tuple(sorted(set(value)))
        if not cpus or not set(cpus) <= set(self.choices):
            raise MachineError(f"process.affinity: {value!r}; expected some of {self.choices}")
        return cpus

    def get(self) -> tuple[int, ...]:
        return tuple(sorted(os.sched_getaffinity(0)))

    def put(self, value) -> None:
        # The mask is each thread's own: without this, pools made earlier would stay where they are.
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), value)


class _ThreadsKnob(Knob):
    """Threads of the numeric library, if the program has loaded torch; never loads it."""

    unit, kind, local = "process", "threads", True

    def __init__(self, library):
        self.library = library
        self.choices = tuple(range(1, (os.cpu_count() or 1) + 1))

    def get(self) -> int:
        return self.library.get_num_threads()

    def put(self, value: int) -> None:
        self.library.set_num_threads(value)


class _QuotaKnob(Knob):
    """Share of one core that this process may use, in percent, enforced by a control group.

    The process moves into a new group, of version 1 or 2, and back when everything is put back.
    """

    unit, kind = "process", "quota_pct"
    period_us = 100_000

    def __init__(self, fs: SysFs, home: str, version: int):
        self.fs, self.home, self.version = fs, home, version
        self.group = f"{home}/dynlib-{os.getpid()}"
        self.back = home
        if version == 2:
            _, _, own = fs.read(f"proc/{os.getpid()}/cgroup").rpartition("::/")
            self.back = f"sys/fs/cgroup/{own}".rstrip("/")
        self.unlimited = 100.0 * (os.cpu_count() or 1)
        self.bounds = (1.0, self.unlimited)

    def get(self) -> float:
        try:
            if self.version == 2:
                quota, period = self.fs.read(f"{self.group}/cpu.max").split()
            else:
                quota = self.fs.read(f"{self.group}/cpu.cfs_quota_us")
                period = self.fs.read(f"{self.group}/cpu.cfs_period_us")
        except FileNotFoundError:
            return self.unlimited
        if quota in ("max", "-1"):
            return self.unlimited
        return 100 * int(quota) / int(period)

    def put(self, value: float) -> None:
        if not self.fs.exists(self.group):
            self.fs.mkdir(self.group)
        quota_us = round(self.period_us * value / 100)
        if self.version == 2:
            self.fs.write(f"{self.group}/cpu.max", f"{quota_us} {self.period_us}")
        else:
            self.fs.write(f"{self.group}/cpu.cfs_period_us", str(self.period_us))
            self.fs.write(f"{self.group}/cpu.cfs_quota_us", str(quota_us))
        self.fs.write(f"{self.group}/cgroup.procs", str(os.getpid()))

    def undo(self) -> list[Undo]:
        return [Undo("cgroup", self.group, self.back)]

    def prefer(self) -> None:
        """Go before other groups, so that on a busy machine only the quota holds us back."""
        name, text = ("cpu.weight", "10000") if self.version == 2 else ("cpu.shares", "262144")
        self.fs.write(f"{self.group}/{name}", text)

    def throttled(self) -> int:
        """How many periods ended with the process held back."""
        words = self.fs.words(f"{self.group}/cpu.stat")
        counts = dict(zip(words[::2], words[1::2], strict=False))
        return int(counts.get("nr_throttled", 0))


def process_parts(fs: SysFs) -> Parts:
    """What this process can set for itself, and what it looked for in vain."""
    parts = Parts(units=[MachineUnit("process", "process")])
    if not hasattr(os, "sched_getaffinity"):
        parts.lacks.append("process.affinity: only Linux has it")
    elif fs.root == Path("/"):
        parts.knobs.append(_AffinityKnob())
    if torch := sys.modules.get("torch"):
        parts.knobs.append(_ThreadsKnob(torch))
    else:
        parts.lacks.append("process.threads: torch is not loaded")
    home = _cgroup(fs)
    if isinstance(home, Missing):
        parts.lacks.append(f"process.quota_pct: {home.reason}")
    else:
        parts.knobs.append(_QuotaKnob(fs, *home))
    return parts


def _cgroup(fs: SysFs) -> tuple[str, int] | Missing:
    """Where a group with a CPU quota can be made, and the version of the control groups there."""
    own = _own_groups(fs)
    for mount in ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"):
        home = f"{mount}/{own.get('cpu', '')}".rstrip("/")
        if "cpu" in own and fs.exists(f"{home}/cpu.cfs_quota_us"):
            return _writable(fs, home, 1)
    if not fs.exists("sys/fs/cgroup/cgroup.controllers"):
        return Missing("no control groups with a CPU controller are mounted")
    # Version 2 takes no processes beside groups, so ours goes beside our own, or further up.
    top = Path("sys/fs/cgroup")
    group = top / own.get("", "")
    for home in (group, *group.parents):
        if not home.is_relative_to(top):
            break
        if "cpu" in fs.words(f"{home}/cgroup.subtree_control"):
            return _writable(fs, str(home), 2)
    return Missing("no group above this process hands on the cpu controller")


def _own_groups(fs: SysFs) -> dict[str, str]:
    """Controller -> the control group of this process; version 2 has the controller ""."""
    own = {}
    with contextlib.suppress(OSError):
        for line in fs.read(f"proc/{os.getpid()}/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                own[controller] = path.strip("/")
    return own


def _writable(fs: SysFs, home: str, version: int) -> tuple[str, int] | Missing:
    if os.access(fs.path(home), os.W_OK):
        return home, version
    return Missing(f"no permission to write {home}")
