"""How well the knobs do: the quota granted, the cost of a write and a look, the faults survived."""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd

from dynlib.errors import MachineError
from dynlib.machine.control import Knob, Missing
from dynlib.machine.knobs import CPU, find_knobs
from dynlib.machine.machine import Machine
from dynlib.machine.process import process_parts
from dynlib.machine.sensors import find_sensors
from dynlib.profile.timing import profile_latency
from dynlib.sysfs import SysFs

_GOVERNOR_NAMES = (
    "conservative",
    "ondemand",
    "userspace",
    "powersave",
    "performance",
    "schedutil",
)


def quota_tracking(
    shares_pct=(10.0, 20.0, 30.0, 40.0, 50.0, 60.0), *, window_s: float = 5.0
) -> list[dict[str, float]] | Missing:
    """Live: CPU time over wall time of a busy process under each quota of one core.

    One row per share: `asked_pct`, `got_pct`, `error_pct` (|got - asked| in % of what was asked)
    and `throttled`, the share of periods in which the quota held the process back: where that is
    not nearly all, another load took the core and the row says nothing about the quota. `Missing`
    with the reason where control groups are not writable or the quota is refused.
    """
    fs = SysFs("/")
    parts = process_parts(fs)
    knob = next((knob for knob in parts.knobs if knob.kind == "quota_pct"), None)
    if knob is None:
        return Missing("; ".join(lack for lack in parts.lacks if "quota" in lack))
    parts.knobs = [knob]
    try:
        with Machine("host", parts, fs) as machine:
            return [_tracked(machine, knob, share, window_s) for share in shares_pct]
    except MachineError as error:
        return Missing(str(error))


def _tracked(machine: Machine, knob: Knob, share: float, window_s: float) -> dict[str, float]:
    applied = machine.set("process", "quota_pct", share)
    if applied.problem:
        raise MachineError(f"quota of {share} %: {applied.problem}")
    knob.prefer()
    _burn(2 * knob.period_us / 1e6)  # the first period may still have time left over
    before, cpu, wall = knob.throttled(), time.process_time(), time.perf_counter()
    _burn(window_s)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    got = 100 * cpu / wall
    return {
        "asked_pct": share, "got_pct": got, "error_pct": 100 * abs(got - share) / share,
        "throttled": (knob.throttled() - before) * knob.period_us / 1e6 / wall,
    }  # fmt: skip


def reached(tracked: pd.DataFrame, throttled: float = 0.9) -> pd.DataFrame:
    """Rows of `quota_tracking` with the error only where the quota did hold the process back."""
    held = tracked["throttled"] >= throttled
    return tracked.assign(error_pct=tracked["error_pct"].where(held))


def write_tree(root: Path, files: dict[str, object]) -> Path:
    """Make the files (path below the root: text) of a tree; returns its root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def cpu_files(policies: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, object]:
    """The cpufreq and hotplug files of some policies, each (CPUs, clocks in kHz)."""
    files: dict[str, object] = {"proc/sys/kernel/random/boot_id": "fake-boot"}
    for cpus, khz in policies:
        folder, names = f"{CPU}/cpufreq/policy{cpus[0]}", " ".join(map(str, cpus))
        values = {
            "related_cpus": names, "affected_cpus": names,
            "scaling_available_frequencies": " ".join(map(str, sorted(khz, reverse=True))),
            "scaling_available_governors": " ".join(_GOVERNOR_NAMES),
            "scaling_governor": "schedutil",
            "scaling_min_freq": min(khz), "scaling_max_freq": max(khz),
            "cpuinfo_min_freq": min(khz), "cpuinfo_max_freq": max(khz),
            "scaling_cur_freq": min(khz), "scaling_setspeed": "<unsupported>",
            "cpuinfo_transition_latency": 10000,
        }  # fmt: skip
        files |= {f"{folder}/{name}": value for name, value in values.items()}
        files |= {f"{CPU}/cpu{cpu}/online": 1 for cpu in cpus if cpu}
    return files


def machine_costs_us(repeats: int = 1000) -> dict[str, float]:
    """CPU time of this process, 99th percentile, on a fake tree of plain files.

    `board_snapshot_us_p99`: 22 files, of 16 sensors. `board_write_us_p99`: one clock set,
    with both limits, read-back and the check for other managers.
    """
    clocks = [408_000 + 204_000 * i for i in range(10)]
    files = cpu_files([((0, 1), clocks), ((2, 3), clocks)])
    for i in range(8):
        zone = f"sys/class/thermal/thermal_zone{i}"
        files |= {f"{zone}/type": f"zone{i}", f"{zone}/temp": 40_000 + i}
    for chip in range(2):
        hwmon = f"sys/class/hwmon/hwmon{chip}"
        files[f"{hwmon}/name"] = "ina3221"
        for channel in (1, 2, 3):
            files[f"{hwmon}/in{channel}_label"] = f"RAIL{chip}{channel}"
            files[f"{hwmon}/in{channel}_input"] = 5000
            files[f"{hwmon}/curr{channel}_input"] = 400
    memory = Path("/dev/shm")  # as sysfs is: truncating a file on disk costs more than all else
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        root = write_tree(Path(folder) / "root", files)
        for cur in root.glob("sys/devices/system/cpu/cpufreq/*/scaling_cur_freq"):
            cur.unlink()  # the clock follows its limits at once, at no cost
            cur.symlink_to("scaling_max_freq")
        fs = SysFs(root)
        knobs = find_knobs(fs)
        parts = knobs + find_sensors(fs, knobs.knobs)
        with Machine("fake", parts, fs, folder=Path(folder)) as machine:
            turn = itertools.cycle((clocks[0] / 1000, clocks[1] / 1000))
            return {
                "board_snapshot_us_p99": _p99_us(machine.snapshot, repeats),
                "board_write_us_p99": _p99_us(
                    lambda: machine.set("policy0", "clock_mhz", next(turn)), repeats
                ),
            }


def inject_faults(tests: Path) -> tuple[set[int], set[int]] | Missing:
    """Run the tests of a folder: rows of the fault list that were injected, and that were survived.

    A row is survived when every test named after it (``test_fault_07_...``) passed.
    """
    if not tests.is_dir():
        return Missing(f"no tests here: {tests.name} is no folder")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   f"--junitxml={report}", tests.name]  # fmt: skip
        fixed = os.environ | {"CI": "1"}  # no random examples
        done = subprocess.run(
            command, cwd=tests.parent, env=fixed, capture_output=True, text=True, check=False
        )
        if not report.exists():
            return Missing(f"pytest wrote no report: {(done.stdout + done.stderr)[-200:].strip()}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcome: dict[int, bool] = {}
    for case in cases:
        row = re.match(r"test_fault_(\d+)_", case.get("name", ""))
        if row and case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            outcome[int(row[1])] = outcome.get(int(row[1]), True) and passed
    return set(outcome), {row for row, passed in outcome.items() if passed}


def _p99_us(run: Callable[[], object], repeats: int) -> float:
    samples = profile_latency(run, repeats=max(repeats, 459), min_seconds=0.0, cpu_time=True)
    return 1000 * samples.percentile_ms(0.99)


def _burn(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
