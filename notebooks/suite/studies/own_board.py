"""A user's own board: files that are wrong, its power and its clocks judged, its manager killed."""

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.boards.board import Board, Opp
from dynlib.boards.calibration import calibrate
from dynlib.boards.file import BOARD_DIR
from dynlib.errors import BoardError
from dynlib.machine.bind import load_board, open_machine
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine
from dynlib.manager.policy import Action, State
from dynlib.profile.measuring import measure_board
from dynlib.runtime.rivals import Static
from suite.studies.serve_many import in_time

# What is wrong -> what stands in the Xavier NX's file, and what is written instead.
WRONG = {
    "static power in microwatts: 4,285 W": ("static_mw = 4285", "static_mw = 4285000"),
    "a voltage that falls while the clock rises": ("[306, 846]", "[306, 746]"),
    "a voltage in volts": ("[1109.25, 950]", "[1109.25, 0.95]"),
    "a clock in kHz": ("[115.2, ", "[115200, "),
    "the same CPU in two clusters": ("cpus = [2, 3]", "cpus = [1, 3]"),
    "a cluster without capacity": ("capacity = 1024", "capacity = 0"),
    "a share in percent": ("memory_share = 0.15", "memory_share = 15"),
    "a key with a typo": ("idle_fraction = 0.386", "idle_fractoin = 0.386"),
    "a source nobody knows": ('c_status = "fitted"', 'c_status = "guess"'),
}
# Coefficients that are sound alone.
TOGETHER = ("c_uw_mhz_v2 = 9523", "c_uw_mhz_v2 = 999000")
HOLD = """
import sys, time
from dynlib import open_machine
with open_machine("auto") as machine:
    quota = machine.knobs["process", "quota_pct"]
    machine.set("process", "quota_pct", 50.0)
    print(quota.fs.path(quota.group), flush=True)
    time.sleep(60)
"""


def wrong_files(folder: Path) -> pd.DataFrame:
    """Every fault of `WRONG` in a board file of its own, then all of them in one.

    Columns: fault; faults, how many the file has; refused, with how many lines, 0 where it loads;
    said, without the file's name.
    """
    whole = (BOARD_DIR / "jetson-xavier-nx.toml").read_text()
    changes = [(fault, [change]) for fault, change in WRONG.items()]
    changes += [("1,000 W of coefficients that are sound alone", [TOGETHER])]
    changes += [("all of these but the last in one file", list(WRONG.values()))]
    rows = []
    for fault, swaps in changes:
        text = whole
        for old, new in swaps:
            if old not in text:
                raise ValueError(f"{fault}: {old!r} is not in the file")
            text = text.replace(old, new, 1)
        path = folder / "wrong.toml"
        path.write_text(text)
        lines = _refusal(path)
        said = lines[0].removeprefix(f"{path}: ") if len(lines) == 1 else f"{len(lines)} lines"
        rows.append({"fault": fault, "faults": len(swaps), "refused": len(lines), "said": said})
    return pd.DataFrame(rows)


def _refusal(path: Path) -> list[str]:
    try:
        load_board(path)
    except BoardError as error:
        return str(error).splitlines()
    return []


def unpowered(board: Board) -> Board:
    """The board as a file has it whose owner knows clocks alone."""
    units = tuple(
        replace(
            unit, c_uw_mhz_v2=None, idle_fraction=0.0, voltage_status="estimated",
            opps=tuple(Opp(mhz, 0.0) for mhz in unit.freqs),
        )
        for unit in board.units
    )  # fmt: skip
    return replace(board, static_mw=None, units=units, notes=())


def judge_power(name: str, clocks: int) -> pd.DataFrame:
    """Power calibrated on a built-in board's virtual twin, at clocks and loads it has not seen.

    Measured are `clocks` of each unit, idle and busy. Columns: unit, freq_mhz, busy, power_mw, and
    predicted_mw of the calibrated board.
    """
    truth, machine = load_board(name), open_machine(name)
    samples = measure_board(machine, unpowered(truth), clocks=clocks, shares=(0.0, 1.0))
    found = calibrate(samples, unpowered(truth))
    seen = set(zip(samples["unit"], samples["freq_mhz"], strict=True))
    rows = []
    for unit in truth.units:
        for mhz in unit.freqs:
            if (unit.name, mhz) in seen:
                continue
            for share in (0.25, 0.5, 0.75):
                held, busy = {unit.name: mhz}, {unit.name: share * unit.cores}
                rows.append({
                    "unit": unit.name, "freq_mhz": mhz, "busy": share,
                    "power_mw": truth.power_mw(held, busy),
                    "predicted_mw": found.power_mw(held, busy),
                })  # fmt: skip
    return pd.DataFrame(rows)


def judge_clocks(latencies: pd.DataFrame, board: Board) -> pd.DataFrame:
    """Latency at each clock, predicted from those at the other clocks.

    Columns: model (`calibrated`, or `work over clock`, where all of the time goes with the clock),
    freq_mhz, latency_ms (median), predicted_ms.
    """
    name = latencies["unit"].iloc[0]
    middle_ms = latencies.groupby("freq_mhz")["latency_ms"].median()
    plain = _with_share(board, name, 0.0)
    rows = []
    for mhz, latency_ms in middle_ms.items():
        others = latencies[latencies["freq_mhz"] != mhz]
        for model, known in (("calibrated", calibrate(others, board)), ("work over clock", plain)):
            scale = known.unit(name).clock_scale
            full_ms = np.median([ms / scale(f) for f, ms in middle_ms.drop(mhz).items()])
            rows.append({"model": model, "freq_mhz": mhz, "latency_ms": latency_ms,
                         "predicted_ms": full_ms * scale(mhz)})  # fmt: skip
    return pd.DataFrame(rows)


def _with_share(board: Board, name: str, share: float) -> Board:
    units = [
        replace(unit, memory_share=share) if unit.name == name else unit for unit in board.units
    ]
    return replace(board, units=tuple(units))


def free_of_charge(board: Board) -> Board:
    """A board as a policy sees it for which power that nobody knows counts as zero."""
    units = [replace(unit, c_uw_mhz_v2=unit.c_uw_mhz_v2 or 0.0) for unit in board.units]
    return replace(board, units=tuple(units))


@dataclass(frozen=True)
class Capped(Static):
    """A fixed network, at the highest clock that it may have."""

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """See `dynlib.manager.policy`."""
        return replace(super().decide(state, limits), clocks=dict(limits))


def kill_throttled(times: int) -> pd.DataFrame | Missing:
    """Kill -9 of a program that has throttled itself through a machine's lease.

    One row a kill: restored, whether its control group is gone within 10 s, and restored_ms.
    `Missing` where no control group can be made.
    """
    if ("process", "quota_pct") not in open_machine("auto").knobs:
        return Missing("no control group with a CPU quota can be made here")
    rows = []
    for _ in range(times):
        command = [sys.executable, "-c", HOLD]
        # What its guardian says when it puts things back is no news here.
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as holder:
            group = Path(holder.stdout.readline().strip())
            held = group.is_dir() and group != Path()
            holder.kill()
        killed_s = time.monotonic()
        restored = held and in_time(lambda: not group.exists())  # noqa: B023  called at once
        rows.append({"restored": restored, "restored_ms": 1000 * (time.monotonic() - killed_s)})
    return pd.DataFrame(rows)


def kept_to(machine: Machine) -> dict[str, object]:
    """What this process is kept to: its CPUs and its quota, as far as the machine has them."""
    kinds = [kind for unit, kind in machine.knobs if unit == "process"]
    return {kind: machine.get("process", kind) for kind in kinds}


def models_drawn(
    latencies: pd.DataFrame | None, clocks: pd.DataFrame | None, judged: pd.DataFrame, twin: str
) -> pd.DataFrame:
    """The table of the figure of both: panel, label (of its values), series, line, freq_mhz, value
    and source; without latencies, the power of the twin's GPU alone."""
    parts = []

    def part(panel, label, series, table, column, source, line=0.0):
        parts.append(pd.DataFrame({
            "panel": panel, "label": label, "series": series, "line": line,
            "freq_mhz": table["freq_mhz"], "value": table[column], "source": source,
        }))  # fmt: skip

    if latencies is not None:
        here = "latency on this machine", "latency of a frame (ms)"
        fitted = clocks[clocks["model"] == "calibrated"]
        plain = clocks[clocks["model"] == "work over clock"]
        for series, table, column in (
            ("answers", latencies, "latency_ms"),
            ("median of the answers", fitted, "latency_ms"),
            ("predicted from the other clocks", fitted, "predicted_ms"),
            ("all work over the clock", plain, "predicted_ms"),
        ):
            part(*here, series, table, column, "measured")
    there = f"GPU busy 25, 50 and 75 %, twin of {twin}", "power of the board (W)"
    watts = judged.copy()
    watts["power_w"], watts["predicted_w"] = judged["power_mw"] / 1e3, judged["predicted_mw"] / 1e3
    for busy, table in watts[watts["unit"] == "gpu"].groupby("busy"):
        part(*there, "the twin", table, "power_w", "estimated", busy)
        part(*there, "predicted", table, "predicted_w", "estimated", busy)
    return pd.concat(parts)
