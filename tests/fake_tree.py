"""Fake trees of real boards, and a kernel that fails on request."""

import contextlib
import errno
import fnmatch
import os
import tempfile
from pathlib import Path

from dynlib.hardware.faketree import FakeKernel, cpu_files, devfreq_files

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
EMC = "sys/kernel/debug/bpmp/debug/clk/emc"


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


@contextlib.contextmanager
def memory_folder():
    """A scratch folder in memory, as sysfs is: a busy disk makes truncating files slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def tree_state(root) -> dict[str, str]:
    """Every file that a knob may touch, without what the kernel computes by itself."""
    return {
        p.relative_to(root).as_posix(): p.read_text().strip()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name not in ("scaling_cur_freq", "cur_freq", "rate")
    }


DENIED, BUSY = errno.EACCES, errno.EBUSY
