"""Fake trees of real boards, and a kernel that answers as the real one does, or fails on request.

What a write leads to follows Linux 6.1 and 6.12: tests/kernel tries the same cases on both.
"""

import errno
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path

from dynlib.machine.knobs import CPU, CPUFREQ, DEVFREQ, Names, find_knobs
from dynlib.machine.machine import Machine
from dynlib.machine.sensors import find_sensors
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import cpu_files

KHZ = (800_000, 1_000_000, 1_200_000, 1_600_000, 2_000_000, 2_400_000)  # those of the guest's SSDT
GPU_MHZ = (114.75, 510.0, 1109.25)
GPU_PATHS = {
    "nano-jp4": "sys/devices/57000000.gpu/devfreq/57000000.gpu",
    "tx2-jp4": "sys/devices/17000000.gp10b/devfreq/17000000.gp10b",
    "tx2-alias": "sys/devices/gpu.0/devfreq/17000000.gp10b",
    "xavier-jp5": "sys/devices/17000000.gv11b/devfreq/17000000.gv11b",
    "orin-jp5": "sys/devices/17000000.ga10b/devfreq/17000000.ga10b",
    "orin-jp6": "sys/devices/platform/17000000.gpu/devfreq_dev",
    "orin-jp6-class": "sys/class/devfreq/17000000.gpu",
    "orin-jp6-bus": "sys/devices/platform/bus@0/17000000.gpu/devfreq/17000000.gpu",
    "thor-jp7": "sys/class/devfreq/gpu-gpc-0",
    "rk3588": "sys/class/devfreq/fb000000.gpu",
    "adreno": "sys/class/kgsl/kgsl-3d0/devfreq",
}
POLICY = f"{CPU}/cpufreq/policy0"
EMC = "sys/kernel/debug/bpmp/debug/clk/emc"


def devfreq_files(folder: str, mhz: Sequence[float]) -> dict[str, object]:
    hz = [round(1e6 * value) for value in sorted(mhz)]
    values = {
        "available_frequencies": " ".join(map(str, hz)), "cur_freq": hz[0], "min_freq": hz[0],
        "max_freq": hz[-1], "available_governors": "performance userspace simple_ondemand",
        "governor": "simple_ondemand",
    }  # fmt: skip
    return {f"{folder}/{name}": value for name, value in values.items()}


def ina3221(hwmon: str, rails: dict[str, tuple[int, int]]) -> dict[str, object]:
    files: dict[str, object] = {f"{hwmon}/name": "ina3221"}
    for channel, (label, (volts, amps)) in enumerate(rails.items(), 1):
        files[f"{hwmon}/in{channel}_label"] = label
        files[f"{hwmon}/in{channel}_input"] = volts
        files[f"{hwmon}/curr{channel}_input"] = amps
    return files


def zone(number: int, kind: str, millidegrees: int) -> dict[str, object]:
    folder = f"sys/class/thermal/thermal_zone{number}"
    return {f"{folder}/type": kind, f"{folder}/temp": millidegrees}


def rapl(name: str, zone: str, uj: int, span_uj: object) -> dict[str, object]:
    folder = f"sys/class/powercap/{zone}"
    files = {f"{folder}/name": name, f"{folder}/energy_uj": uj}
    return files | ({f"{folder}/max_energy_range_uj": span_uj} if span_uj is not None else {})


def jetson() -> dict[str, object]:
    """Two CPU clusters, GPU, memory clock, three rails, two zones."""
    return {
        **cpu_files([((0, 1), KHZ), ((2, 3), KHZ)]),
        **devfreq_files(GPU_PATHS["xavier-jp5"], GPU_MHZ),
        **ina3221("sys/class/hwmon/hwmon3", {
            "VDD_IN": (5000, 1200), "VDD_CPU_GPU_CV": (5000, 400), "NC": (0, 0)}),
        **zone(0, "CPU-therm", 41_500), **zone(1, "GPU-therm", 39_000),
        **{f"{EMC}/{name}": value for name, value in {
            "rate": 1_600_000_000, "min_rate": 204_000_000, "max_rate": 1_866_000_000,
            "mrq_rate_locked": 1, "state": 1}.items()},
        "sys/firmware/acpi/platform_profile": "balanced",
        "sys/firmware/acpi/platform_profile_choices": "low-power balanced performance",
    }  # fmt: skip


class FakeKernel(SysFs):
    """A tree whose frequency domains and CPUs react; every other file just keeps what it is told.

    `asked` remembers each user's request as the kernel does: a limit that was cut comes back when
    the other one moves. `cap` (folder: kHz or Hz) is a thermal or firmware limit.
    """

    def __init__(self, root: str | Path):
        super().__init__(root)
        self.plain = SysFs(root)
        self.asked: dict[str, int] = {}
        self.cap: dict[str, int] = {}

    def read(self, path: str) -> str:
        """As the kernel would answer."""
        self._refuse_offline(path)
        return self.plain.read(path)

    def write(self, path: str, text: str) -> None:
        """As the kernel would take it; raises `OSError` where it would refuse."""
        folder, _, name = path.rpartition("/")
        if not text:
            return
        self._refuse_offline(path)
        for names in (CPUFREQ, DEVFREQ):
            domain = folder.removesuffix("/userspace")
            if (self.root / domain / names.governor).exists():
                known = (names.low, names.high, names.governor, Path(names.setspeed).name)
                if name not in known:
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
                self._domain(domain, names, name, text)
                return
        if name == "online":
            _integer(text, choices=(0, 1))
            text = text.strip()
        self.plain.write(path, text)

    def _domain(self, folder: str, names: Names, name: str, text: str) -> None:
        governor = self.plain.read(f"{folder}/{names.governor}")
        if name == names.governor:
            words = text.split()
            chosen = words[0].lower() if words and len(text) <= 16 else ""
            if chosen not in self.plain.read(f"{folder}/{names.governors}").split():
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
            self.plain.write(f"{folder}/{name}", chosen)
            governor = chosen
            self.asked.pop(f"{folder}/speed", None)
        elif name == Path(names.setspeed).name:
            if governor != "userspace":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
            self.asked[f"{folder}/speed"] = _integer(text, leading=True)
        else:
            self.asked[f"{folder}/{name}"] = _integer(text)
        self._apply(folder, names, governor)

    def _apply(self, folder: str, names: Names, governor: str) -> None:
        """Recompute limits and clock: the lower limit gives way, then the table rounds."""
        table = sorted(int(w) for w in self.plain.read(f"{folder}/{names.table}").split())
        high = self.asked.get(f"{folder}/{names.high}", table[-1])
        high = min(high, self.cap.get(folder, table[-1]))
        high = max([t for t in table if t <= high] or table[:1])
        low = min(max(self.asked.get(f"{folder}/{names.low}", table[0]), table[0]), high)
        cur = int(self.plain.read(f"{folder}/{names.cur}"))
        speed = self.asked.setdefault(f"{folder}/speed", cur)
        wanted = {"performance": high, "powersave": low, "userspace": speed}.get(governor, low)
        wanted = min(max(wanted, low), high)
        cur = min([t for t in table if t >= wanted] or table[-1:])
        for name, value in ((names.low, low), (names.high, high), (names.cur, cur)):
            self.plain.write(f"{folder}/{name}", f"{value}\n")
        setspeed = f"{folder}/{names.setspeed}"
        if names is CPUFREQ:
            held = f"{cur}\n" if governor == "userspace" else "<unsupported>\n"
            self.plain.write(setspeed, held)

    def _refuse_offline(self, path: str) -> None:
        if "/cpufreq/policy" in path:
            cpus = self.plain.words(str(Path(path).parent / "related_cpus"))
            states = [self.root / CPU / f"cpu{cpu}/online" for cpu in cpus]
            if states and all(s.exists() and s.read_text().strip() == "0" for s in states):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)


def _integer(text: str, choices: Sequence[int] = (), leading: bool = False) -> int:
    digits = text.strip()
    if leading:  # setspeed is read with sscanf: what follows the number is not looked at
        digits = digits[: len(digits) - len(digits.lstrip("0123456789"))]
    if not digits.isdigit() or (choices and int(digits) not in choices):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), text)
    return min(int(digits), 2**32 - 1)


class FaultyKernel(FakeKernel):
    """Fails as planned: `plan` holds (read or write, path pattern, first access, times, errno)."""

    def __init__(self, root, plan=()):
        super().__init__(root)
        self.plan = [list(entry) for entry in plan]
        self.counts: dict[int, int] = {}
        self.written: list[tuple[str, str]] = []

    def fail(self, how: str, pattern: str, number: int, first: int = 1, times: int = 1_000_000):
        self.plan.append([how, pattern, first, times, number])

    def _check(self, how: str, path: str) -> None:
        for i, (kind, pattern, first, times, number) in enumerate(self.plan):
            if kind == how and fnmatch.fnmatch(path, f"*{pattern}"):
                self.counts[i] = self.counts.get(i, 0) + 1
                if first <= self.counts[i] < first + times:
                    raise OSError(number, os.strerror(number), path)

    def read(self, path):
        self._check("read", path)
        return super().read(path)

    def write(self, path, text):
        self._check("write", path)
        super().write(path, text)
        self.written.append((path, text))


def make_machine(fs: SysFs, folder: Path, **options) -> Machine:
    """All knobs and sensors of a tree, its lease in `folder`."""
    knobs = find_knobs(fs)
    return Machine("fake", knobs + find_sensors(fs, knobs.knobs), fs, folder=folder, **options)


def tree_state(root) -> dict[str, str]:
    """Every file that a knob may touch, without what the kernel computes by itself."""
    return {
        p.relative_to(root).as_posix(): p.read_text().strip()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name not in ("scaling_cur_freq", "cur_freq", "rate")
    }


DENIED, BUSY = errno.EACCES, errno.EBUSY
