"""The knobs that Linux shows as files: clocks, governors, cores, memory clock, power mode.

cpufreq counts in kHz, devfreq and the memory controller in Hz; both become MHz here and nowhere
else. Paths follow the kernel's documentation and the Jetson releases JetPack 4, 5 and 6; devices
are found by name, because their addresses differ from board to board.
"""

import contextlib
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynlib.machine.control import Knob, MachineUnit, Parts, Undo
from dynlib.machine.lease import run_command
from dynlib.sysfs import SysFs

CPU = "sys/devices/system/cpu"
EMC = "sys/kernel/debug/bpmp/debug/clk/emc"
_DEVFREQ = (
    "sys/class/devfreq/*",
    "sys/devices/*/devfreq/*",
    "sys/devices/platform/*/devfreq_dev",
    "sys/devices/platform/*/devfreq/*",
    "sys/devices/platform/*/*/devfreq/*",
    "sys/class/kgsl/*/devfreq",
)
_GPU = re.compile(r"gpu|gv11b|gp10b|ga10b|gb10b|gm20b|mali|kgsl")
_MEMORY = re.compile(r"emc|dmc|memory|ddr")
_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")


@dataclass(frozen=True, slots=True)
class Names:
    """How cpufreq and devfreq call the same things, and how many of their units are one MHz."""

    cur: str
    low: str
    high: str
    governor: str
    governors: str
    table: str
    setspeed: str
    per_mhz: int


CPUFREQ = Names(
    "scaling_cur_freq",
    "scaling_min_freq",
    "scaling_max_freq",
    "scaling_governor",
    "scaling_available_governors",
    "scaling_available_frequencies",
    "scaling_setspeed",
    per_mhz=1_000,
)
DEVFREQ = Names(
    "cur_freq",
    "min_freq",
    "max_freq",
    "governor",
    "available_governors",
    "available_frequencies",
    "userspace/set_freq",
    per_mhz=1_000_000,
)


def _held(fs: SysFs, *paths: str) -> list[Undo]:
    """Steps back to the texts in force; nothing for a file that is not there."""
    return [Undo("write", path, fs.read(path)) for path in paths if fs.exists(path)]


class ClockKnob(Knob):
    """The clock of a frequency domain, held by setting both of its limits.

    That works under every governor, `userspace` included, where writing another value than the
    limits allow would be clamped in silence. Raising moves the upper limit first, lowering the
    lower one, so that the two never cross.
    """

    kind = "clock_mhz"

    def __init__(self, fs: SysFs, folder: str, names: Names, unit: str):
        self.fs, self.unit, self.per_mhz = fs, unit, names.per_mhz
        self.cur = f"{folder}/{names.cur}"
        self.low = f"{folder}/{names.low}"
        self.high = f"{folder}/{names.high}"
        table = f"{folder}/{names.table}"
        listed = fs.integers(table)
        if len(listed) < len(fs.words(table)):  # words that are no numbers: no table
            listed = ()
        self.table = bool(listed)
        if not listed and names is CPUFREQ:  # the two ends are all the kernel lists
            lowest = fs.integers(f"{folder}/cpuinfo_min_freq")
            listed = lowest + fs.integers(f"{folder}/cpuinfo_max_freq")
        mhz = {number / self.per_mhz for number in listed if number}
        self.choices = tuple(sorted(mhz))

    def get(self) -> float:
        """The clock the kernel reports, in MHz."""
        return self.fs.number(self.cur) / self.per_mhz

    def put(self, value: float) -> None:
        """Hold this clock."""
        number = round(value * self.per_mhz)
        order = [self.high, self.low]
        with contextlib.suppress(ValueError):
            if number < self.fs.number(self.high):
                order.reverse()
        for path in order:
            self.fs.write(path, str(number))

    def undo(self) -> list[Undo]:
        """Both limits."""
        return _held(self.fs, self.high, self.low)


class TextKnob(Knob):
    """A file that takes one of the words another file lists: a governor, a platform profile."""

    def __init__(self, fs: SysFs, unit: str, kind: str, path: str, choices: Sequence[str]):
        self.fs, self.unit, self.kind, self.path = fs, unit, kind, path
        self.choices = tuple(choices)
        self.targets = (path,)

    def get(self) -> str:
        """The word in force; some files list all and mark it with brackets."""
        text = self.fs.read(self.path)
        marked = re.search(r"\[(\S+)\]", text)
        return marked[1] if marked else text

    def put(self, value: str) -> None:
        """Write the word."""
        self.fs.write(self.path, value)

    def undo(self) -> list[Undo]:
        """The word."""
        return [Undo("write", self.path, self.get())]


class GovernorKnob(TextKnob):
    """The governor of a frequency domain; a value that is not ours means somebody else governs."""

    exclusive = True

    def __init__(self, fs: SysFs, folder: str, names: Names, unit: str):
        words = fs.words(f"{folder}/{names.governors}")
        super().__init__(fs, unit, "governor", f"{folder}/{names.governor}", words)
        self.setspeed = f"{folder}/{names.setspeed}"
        self.targets = (self.path, self.setspeed)

    def undo(self) -> list[Undo]:
        """The governor and, under `userspace`, the clock it held."""
        held = super().undo()
        if held[0].value == "userspace":
            clock = _held(self.fs, self.setspeed)
            held += [step for step in clock if step.value.isdigit()]
        return held


class CoresKnob(Knob):
    """How many CPUs of a cluster are online; the last ones go first."""

    kind = "cores"

    def __init__(self, fs: SysFs, unit: str, cpus: Sequence[int]):
        self.fs, self.unit = fs, unit
        files = [f"{CPU}/cpu{cpu}/online" for cpu in sorted(cpus)]
        self.files = [file for file in files if fs.exists(file)]  # cpu0 often has none
        self.fixed = len(files) - len(self.files)
        self.choices = tuple(range(self.fixed, len(files) + 1))

    def get(self) -> int:
        """CPUs online."""
        return self.fixed + sum(self.fs.number(file) for file in self.files)

    def put(self, value: int) -> None:
        """Bring this many CPUs online, the others offline."""
        for i, file in enumerate(self.files, self.fixed + 1):
            state = "1" if i <= value else "0"
            if self.fs.read(file) != state:
                self.fs.write(file, state)

    def undo(self) -> list[Undo]:
        """Each CPU's own state."""
        return _held(self.fs, *self.files)


class EmcKnob(Knob):
    """The memory clock of a Jetson, locked through its power processor (root, debugfs).

    The kernel lists only the lowest and highest rate; `points` of a board file may add more.
    """

    unit, kind = "memory", "clock_mhz"

    def __init__(self, fs: SysFs, points: Sequence[float] = ()):
        self.fs = fs
        rates = fs.integers(f"{EMC}/min_rate") + fs.integers(f"{EMC}/max_rate")
        ends = [rate / 1e6 for rate in rates]
        inside = [mhz for mhz in points if ends and ends[0] <= mhz <= ends[-1]]
        self.choices = tuple(sorted({*ends, *inside}))

    def get(self) -> float:
        """The rate in force, in MHz."""
        return self.fs.number(f"{EMC}/rate") / 1e6

    def put(self, value: float) -> None:
        """Lock this rate."""
        self.fs.write(f"{EMC}/mrq_rate_locked", "1")
        self.fs.write(f"{EMC}/rate", str(round(value * 1e6)))
        self.fs.write(f"{EMC}/state", "1")

    def undo(self) -> list[Undo]:
        """The lock; the rate too if it was locked before, else the firmware chooses it."""
        lock = _held(self.fs, f"{EMC}/mrq_rate_locked", f"{EMC}/state")
        if lock and lock[0].value == "1":
            return _held(self.fs, f"{EMC}/rate") + lock
        return lock


class NvpmodelKnob(Knob):
    """The power mode of a Jetson, by name; ids differ between releases. It survives a reboot."""

    unit, kind = "board", "mode"
    status = "var/lib/nvpmodel/status"

    def __init__(self, fs: SysFs):
        self.fs = fs
        modes = _MODE.findall(fs.read("etc/nvpmodel.conf"))
        self.ids = {name: int(number) for number, name in modes}
        self.choices = tuple(self.ids)

    def get(self) -> str:
        """Name of the mode in force."""
        _, _, text = self.fs.read(self.status).rpartition(":")
        number = int(text)
        for name, known in self.ids.items():
            if known == number:
                return name
        raise ValueError(f"{self.status}: mode {number}; expected one of {self.ids}")

    def put(self, value: str) -> None:
        """Switch; a mode that would need a reboot is not taken."""
        if not run_command(self._command(value)):
            raise OSError(errno.EIO, f"nvpmodel refused mode {value}")

    def undo(self) -> list[Undo]:
        """The mode in force."""
        value = f"{self.fs.read(self.status)}\n{self._command(self.get())}"
        return [Undo("command", self.status, value, persistent=True)]

    def _command(self, name: str) -> str:
        return f"{self.fs.root / 'usr/sbin/nvpmodel'} -m {self.ids[name]}"


def find_knobs(fs: SysFs, memory_points: Sequence[float] = ()) -> Parts:
    """Every unit and knob below the root that can be set, and what is missing.

    Their order is that of the way back: first the power mode, because it rewrites the limits; then
    the cores, because without them the rest answers EBUSY.
    """
    parts = _mode(fs) + _cpus(fs) + _devices(fs)
    if not any(unit.name == "memory" for unit in parts.units):
        emc = EmcKnob(fs, memory_points)
        if len(emc.choices) > 1:
            parts.units.append(MachineUnit("memory", "memory"))
            parts.knobs.append(emc)
    names = {unit.name for unit in parts.units}
    missing = [kind for kind in ("gpu", "memory") if kind not in names]
    parts.lacks += [f"{kind} clock: no such device" for kind in missing]
    return parts


def _mode(fs: SysFs) -> Parts:
    """The power mode of the whole board: nvpmodel's, else the platform profile."""
    if fs.exists("etc/nvpmodel.conf"):
        mode = NvpmodelKnob(fs)
    else:
        profile = "sys/firmware/acpi/platform_profile"
        mode = TextKnob(fs, "board", "mode", profile, fs.words(f"{profile}_choices"))
    if not mode.choices:
        return Parts(lacks=["power mode: neither nvpmodel nor a platform profile"])
    return Parts([MachineUnit("board", "board")], [mode])


def _cpus(fs: SysFs) -> Parts:
    """A unit for each cpufreq policy, else one for all CPUs."""
    parts = Parts()
    for folder in fs.glob(f"{CPU}/cpufreq/policy*"):
        cpus = fs.integers(f"{folder}/related_cpus")
        if cpus:
            unit = MachineUnit(Path(folder).name, "cpu", cpus)
            parts += _domain(fs, folder, CPUFREQ, unit)
        else:
            parts.lacks.append(f"{folder}: all of its CPUs are offline")
    if not parts.units:
        folders = fs.glob(f"{CPU}/cpu[0-9]*")
        cpus = tuple(int(folder.rpartition("cpu")[2]) for folder in folders)
        parts.units.append(MachineUnit("cpu", "cpu", cpus))
        parts.lacks.append(f"CPU clocks: no {CPU}/cpufreq/policy*")
    cores = [CoresKnob(fs, unit.name, unit.cpus) for unit in parts.units]
    parts.knobs = [knob for knob in cores if len(knob.choices) > 1] + parts.knobs
    return parts


def _devices(fs: SysFs) -> Parts:
    parts = Parts()
    for kind, folder in find_devfreq(fs).items():
        parts += _domain(fs, folder, DEVFREQ, MachineUnit(kind, kind))
        railgate = f"{folder}/device/power/control"
        if kind == "gpu" and fs.exists(railgate):
            parts.knobs.append(TextKnob(fs, kind, "power_control", railgate, ("on", "auto")))
    return parts


def _domain(fs: SysFs, folder: str, names: Names, unit: MachineUnit) -> Parts:
    """Governor and clock of a frequency domain."""
    governor = GovernorKnob(fs, folder, names, unit.name)
    clock = ClockKnob(fs, folder, names, unit.name)
    parts = Parts([unit], [knob for knob in (governor, clock) if knob.choices])
    if not clock.table:
        parts.lacks.append(f"{unit.name}: no table of clocks ({folder}/{names.table})")
    return parts


def find_devfreq(fs: SysFs) -> dict[str, str]:
    """Folder of the GPU's and of the memory's devfreq device, found by name."""
    found: dict[str, str] = {}
    for folder in (f for pattern in _DEVFREQ for f in fs.glob(pattern)):
        if not fs.exists(f"{folder}/{DEVFREQ.cur}"):
            continue
        # The name may be that of the link, of what it leads to, or of the device tree's node.
        target = Path(fs.path(folder)).resolve().name
        node = "".join(fs.words(f"{folder}/device/of_node/name")).replace("\0", "")
        name = "/".join([*Path(folder).parts[-3:], target, node])
        if _GPU.search(name):
            found.setdefault("gpu", folder)
        elif _MEMORY.search(name):
            found.setdefault("memory", folder)
    return found
