"""What a run is worth, from its log, board and tables alone: any program can do the same sums.

A dropped, late or below-floor frame is missed; energy is that of the board, static power included.
"""

import logging
import math
from collections import Counter
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.boards.board import Board
from dynlib.errors import TableError
from dynlib.log import DecisionLog
from dynlib.points import Point
from dynlib.runtime.conditions import Setup

MISS_LIMIT_PCT = 1.0
_EPS_MS = 1e-6
_LOG = logging.getLogger(__name__)


class Run:
    """What a policy did with a case: its log, and the numbers that follow from it.

    Args:
        case: the run's, or an equal one.
        log: of this run.
    """

    def __init__(self, case: Setup, log: DecisionLog):
        self.case, self.log = case, log

    @classmethod
    def read(cls, case: Setup, path: str | Path) -> "Run":
        """A run of `case` from its stored log.

        Raises `TableError` naming file and line, and for the log of another board or of models that
        the case has no table of; tables and workloads may be written differently and still be
        equal, so that another digest of them is a warning.
        """
        log = DecisionLog.read(path)
        header, tables = log.header, case.tables
        board_name, models = header.get("board"), set(header.get("models", {}).values())
        if board_name != case.board.name or not models <= set(tables):
            raise TableError(
                f"{path}: a log of {sorted(models)} on {board_name!r}, expected one of "
                f"{sorted(tables)} on {case.board.name!r}"
            )
        here = {
            "board_sha256": case.board.digest,
            "workload_sha256": case.workload.digest,
            "table_sha256": {model: table.digest for model, table in tables.items()},
        }
        others = [key for key, digest in here.items() if header.get(key) != digest]
        if others:
            _LOG.warning("%s: another %s than the case's", path, ", ".join(others))
        return cls(case, log)

    @property
    def energy_mj(self) -> float:
        """Board energy: power is constant from one sample to the next; NaN without any."""
        samples = [(e["t_s"], e["power_mw"]) for e in self.log if "power_mw" in e]
        if not samples:  # a live run measures no power
            return np.nan
        return sum((t1 - t0) * power_mw for (t0, power_mw), (t1, _) in pairwise(samples))

    def frames(self) -> pd.DataFrame:
        """One row per offered frame: when, where and with what it ran, and what came of it.

        Columns: app, frame, arrival_s, deadline_ms, floor_pct, subnet, unit, setting, start_s,
        finish_s, latency_ms, accuracy_val_pct, accuracy_pct (test), on_time, reason (late, below
        floor, or why it was dropped; empty for one in time).
        """
        frames = pd.DataFrame(self._rows(), columns=list(_FRAME_COLUMNS))
        return frames.astype({"on_time": bool})  # also without any frame

    def _rows(self) -> list[dict]:
        """As `frames`; a row lacks what has not happened."""
        rows: dict[tuple[str, int], dict] = {}
        for event in self.log:
            kind = event["event"]
            if kind == "arrive":
                rows[event["app"], event["frame"]] = {
                    "app": event["app"],
                    "frame": event["frame"],
                    "arrival_s": event["t_s"],
                    "deadline_ms": event["deadline_ms"],
                    "floor_pct": event["accuracy_floor_pct"],
                    "on_time": False,
                    "reason": "unfinished",
                }
                continue
            row = rows.get((event.get("app"), event.get("frame")))
            if row is None:  # it came before the first event that a long run has kept
                continue
            if kind == "start":
                point = self._point(event)
                row |= {"start_s": event["t_s"], "subnet": point.subnet, "unit": point.unit}
                row["setting"] = point.setting
            elif kind == "drop":
                row["reason"] = event["reason"]
            elif kind == "finish":
                row |= {"finish_s": event["t_s"], **self._outcome(row, event)}
        return list(rows.values())

    def _point(self, event: dict) -> Point:
        model = self.log.header["models"][event["app"]]
        return self.case.tables[model].named(event)

    def _outcome(self, row: dict, event: dict) -> dict:
        """What came of a finished frame."""
        point = self._point(event)
        late = event["latency_ms"] > row["deadline_ms"] + _EPS_MS
        below = point.accuracy_val_pct < row["floor_pct"] - 1e-9
        return {
            "latency_ms": event["latency_ms"],
            "accuracy_val_pct": point.accuracy_val_pct,
            "accuracy_pct": point.accuracy_test_pct,
            "on_time": not late and not below,
            "reason": "late" if late else "below floor" if below else "",
        }

    def summary(self) -> dict:
        """The numbers of the run.

        Keys: scenario, policy, seed; offered, on_time, missed, dropped, late, below_floor;
        deadline_miss_pct; accuracy_mean_pct over on-time frames (test accuracy); energy_mj of the
        board and above_idle_mj over the horizon, both also per on-time frame (`..._per_frame_mj`,
        infinite without any; all four NaN in a live run); latency_p50_ms and
        latency_p95_ms of finished frames; network_switches, clock_changes, decisions (changes of
        placement); source; apps: per app offered, missed and miss_pct, accuracy_mean_pct. Where
        heat plays a part also temp_max_c, and throttled_pct: share of the time with a cap from it.
        """
        header, board = self.log.header, self.case.board
        frames = self._rows()  # no table, which takes as long as many a run
        apps = {name: _of_app(frames, name) for name in header["models"]}
        offered, on_time = len(frames), sum(frame["on_time"] for frame in frames)
        reasons = Counter(frame["reason"] for frame in frames)
        late, below = reasons["late"], reasons["below floor"]
        kinds = Counter(event["event"] for event in self.log)
        acted = sum(e["event"] == "set" and e["reason"] == "acts" for e in self.log)
        done_ms = [frame["latency_ms"] for frame in frames if "latency_ms" in frame]
        p50_ms, p95_ms = np.percentile(done_ms, (50, 95)) if done_ms else (np.nan, np.nan)
        return {
            "scenario": header["scenario"],
            "policy": header["policy"],
            "seed": header["seed"],
            "offered": offered,
            "on_time": on_time,
            "missed": offered - on_time,
            "dropped": offered - on_time - late - below,
            "late": late,
            "below_floor": below,
            "deadline_miss_pct": _pct(offered - on_time, offered),
            "accuracy_mean_pct": _accuracy_pct(frames),
            **self._energies(on_time),
            "latency_p50_ms": float(p50_ms),
            "latency_p95_ms": float(p95_ms),
            "network_switches": _switches(frames),
            "clock_changes": acted,
            "decisions": kinds["decide"],
            "source": header["source"],
            "apps": apps,
            **_heat(self.log, board, header["horizon_s"]),
        }

    def _energies(self, on_time: int) -> dict[str, float]:
        board, horizon_s = self.case.board, self.log.header["horizon_s"]
        known = board.static_mw is not None
        total_mj = self.energy_mj if known else np.nan
        above_mj = total_mj - board.power_mw({}, {}) * horizon_s if known else np.nan
        return {
            "energy_mj": total_mj,
            "above_idle_mj": above_mj,
            "energy_per_frame_mj": total_mj / on_time if on_time else np.inf,
            "above_idle_per_frame_mj": above_mj / on_time if on_time else np.inf,
        }

    def timeline(self, bin_s: float = 0.25) -> pd.DataFrame:
        """The run as a figure shows it.

        Columns: t_s, what, name, value. `what` is latency_ms, deadline_ms and accuracy_pct of the
        frame of app `name` that arrived then; stretch, what competitors multiply times on unit
        `name` by from then on; and per bin of `bin_s` seconds the means of clock_mhz of unit
        `name`, of cap_mhz, what heat allowed it (where heat plays a part), and of power_mw of the
        board, and temp_c, its temperature at the start.
        """
        rows: list[tuple[float, str, str, float]] = []
        for frame in self.frames().to_dict("records"):
            for what in ("latency_ms", "deadline_ms", "accuracy_pct"):
                rows.append((frame["arrival_s"], what, frame["app"], frame[what]))
        for change in self.case.workload.changes:
            if change.stretch:
                rows.append((change.t_s, "stretch", change.unit, change.stretch))
        horizon_s = self.log.header["horizon_s"]
        edges = np.append(np.arange(0, horizon_s, bin_s), horizon_s)
        begins = edges[:-1]
        for (what, name), steps in _steps(self.log).items():
            means = _means(steps, edges)
            for t_s, mean in zip(begins, means, strict=True):
                rows.append((t_s, what, name, mean))
        heat = [event for event in self.log if "temp_c" in event]
        if heat:
            at_s = [event["t_s"] for event in heat]
            measured_c = [event["temp_c"] for event in heat]
            temps_c = np.interp(begins, at_s, measured_c)
            for t_s, temp_c in zip(begins, temps_c, strict=True):
                rows.append((t_s, "temp_c", "board", temp_c))
        table = pd.DataFrame(rows, columns=["t_s", "what", "name", "value"])
        known = table.dropna()
        return known.sort_values("t_s", kind="stable", ignore_index=True)


_FRAME_COLUMNS = (
    "app",
    "frame",
    "arrival_s",
    "deadline_ms",
    "floor_pct",
    "subnet",
    "unit",
    "setting",
    "start_s",
    "finish_s",
    "latency_ms",
    "accuracy_val_pct",
    "accuracy_pct",
    "on_time",
    "reason",
)


def _of_app(frames: list[dict], name: str) -> dict[str, float]:
    mine = [frame for frame in frames if frame["app"] == name]
    missed = sum(not frame["on_time"] for frame in mine)
    return {
        "offered": len(mine),
        "missed": missed,
        "miss_pct": _pct(missed, len(mine)),
        "accuracy_mean_pct": _accuracy_pct(mine),
    }


def _accuracy_pct(frames: list[dict]) -> float:
    """Mean test accuracy of the frames in time, as far as it is known; else NaN."""
    known = [frame["accuracy_pct"] for frame in frames if frame["on_time"]]
    known = [pct for pct in known if not math.isnan(pct)]
    return float(np.mean(known)) if known else math.nan


def _switches(frames: list[dict]) -> int:
    """How often an app ran another sub-network than for its frame before."""
    started = [frame for frame in frames if "start_s" in frame]
    started.sort(key=itemgetter("app", "start_s", "frame"))
    return sum(
        before["app"] == frame["app"] and before["subnet"] != frame["subnet"]
        for before, frame in pairwise(started)
    )


def _heat(log: DecisionLog, board: Board, horizon_s: float) -> dict[str, float]:
    """Highest temperature, and the share of the time with a cap from heat on any unit."""
    temps_c = [event["temp_c"] for event in log if "temp_c" in event]
    if not temps_c:
        return {}
    capped: set[str] = set()
    since_s, total_s = 0.0, 0.0
    for event in log:
        if event["event"] != "set" or event["reason"] != "heat":
            continue
        if capped:
            total_s += event["t_s"] - since_s
        since_s = event["t_s"]
        unit = event["unit"]
        mhz = event.get("gpu_mhz", event.get("cpu_mhz"))
        if mhz < board.unit(unit).max_mhz:
            capped.add(unit)
        else:
            capped.discard(unit)
    if capped:
        total_s += horizon_s - since_s
    return {"temp_max_c": max(temps_c), "throttled_pct": 100 * total_s / horizon_s}


def _steps(log: DecisionLog) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(what, name) -> [(s, value from then on)] of clocks, caps from heat, and power."""
    steps: dict[tuple[str, str], list[tuple[float, float]]] = {}
    kinds = {"acts": "clock_mhz", "heat": "cap_mhz"}
    for event in log:
        if event["event"] == "set" and event["reason"] in kinds:
            key = kinds[event["reason"]], event["unit"]
            value = event.get("gpu_mhz", event.get("cpu_mhz"))
        elif "power_mw" in event:
            key, value = ("power_mw", "board"), event["power_mw"]
        else:
            continue
        steps.setdefault(key, []).append((event["t_s"], value))
    return steps


def _means(steps: list[tuple[float, float]], edges: np.ndarray) -> np.ndarray:
    """The mean of a step function within each bin; NaN in those that begin before it does."""
    t_s = np.array([t for t, _ in steps])
    values = np.array([value for _, value in steps])
    ends = np.append(t_s, max(t_s[-1], edges[-1]))
    # The sum up to every edge is piecewise linear between steps, so its differences are exact.
    areas = np.diff(ends) * values
    sums = np.append(0.0, np.cumsum(areas))
    at_edges = np.interp(edges, ends, sums)
    means = np.diff(at_edges) / np.diff(edges)
    return np.where(edges[:-1] >= t_s[0], means, np.nan)


def _pct(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
