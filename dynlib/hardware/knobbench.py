"""How well the knobs do: the quota this machine really grants, and what a write and a look cost."""

import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import psutil

from dynlib.hardware.control import Missing, SysFs
from dynlib.hardware.faketree import cpu_files, write_tree
from dynlib.hardware.host import process_parts
from dynlib.hardware.live import LiveBoard
from dynlib.hardware.profiler import profile_latency
from dynlib.hardware.sensors import find_sensors
from dynlib.hardware.sysfs import find_knobs


def quota_tracking(
    shares_pct=(10.0, 20.0, 30.0, 40.0, 50.0, 60.0), *, window_s: float = 5.0
) -> list[dict[str, float]] | Missing:
    """Live: CPU time over wall time of a busy process under each quota of one core.

    One row per share: `asked_pct`, `got_pct`, `error_pct` (|got - asked| in % of what was asked)
    and `throttled`, the share of periods in which the quota held the process back: where that is
    not nearly all, another load took the core and the row says nothing about the quota. `Missing`
    with the reason where control groups are not writable.
    """
    fs = SysFs("/")
    parts = process_parts(fs)
    knob = next((knob for knob in parts.knobs if knob.kind == "quota_pct"), None)
    if knob is None:
        return Missing("; ".join(lack for lack in parts.lacks if "quota" in lack))
    parts.knobs, rows = [knob], []
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveBoard("host", parts, fs, folder=Path(folder)) as board,
    ):
        for share in shares_pct:
            applied = board.set("process", "quota_pct", share)
            if applied.problem:
                return Missing(applied.problem)
            knob.prefer()
            _burn(2 * knob.period_us / 1e6)  # the first period may still have time left over
            before, cpu, wall = knob.throttled(), time.process_time(), time.perf_counter()
            _burn(window_s)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            got = 100 * cpu / wall
            rows.append({
                "asked_pct": share, "got_pct": got, "error_pct": 100 * abs(got - share) / share,
                "throttled": (knob.throttled() - before) * knob.period_us / 1e6 / wall,
            })  # fmt: skip
    return rows


def quota_tracking_error_pct(rows: list[dict[str, float]], throttled: float = 0.9) -> float | None:
    """Median error of the rows in which the quota did hold the process back; None without any."""
    errors = [row["error_pct"] for row in rows if row["throttled"] >= throttled]
    return statistics.median(errors) if errors else None


def board_costs_us(repeats: int = 1000) -> dict[str, float]:
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
        with LiveBoard("fake", parts, fs, folder=Path(folder)) as board:
            turn = itertools.cycle((clocks[0] / 1000, clocks[1] / 1000))
            return {
                "board_snapshot_us_p99": _p99_us(board.snapshot, repeats),
                "board_write_us_p99": _p99_us(
                    lambda: board.set("policy0", "clock_mhz", next(turn)), repeats
                ),
            }


def fault_counts(junit: Path) -> tuple[set[int], set[int]]:
    """Rows of the fault list that a test run's JUnit report injected, and those that survived.

    A row is survived when every test named after it (``test_fault_07_...``) passed.
    """
    outcome: dict[int, bool] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
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


def machine_load() -> float:
    """Share of all CPUs that is busy now, 0..1: what a live measurement has to share with."""
    return psutil.cpu_percent(0.5) / 100
