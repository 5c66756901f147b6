"""What a run is worth, computed from its log: any other program can do the same sums.

A dropped, late or below-floor frame is missed; energy is that of the board, static power included.
"""

from itertools import pairwise

import numpy as np
import pandas as pd

from dynlib.boards.board import Board
from dynlib.log import DecisionLog
from dynlib.points import Tables
from dynlib.workload import Workload, requirement_at

MISS_LIMIT_PCT = 1.0
_EPS_MS = 1e-6


def energy_mj(log: DecisionLog) -> float:
    """Board energy of a run: power is constant from one sample to the next."""
    samples = [(e["t_s"], e["power_mw"]) for e in log if e["event"] == "sample"]
    return sum((t1 - t0) * power_mw for (t0, power_mw), (t1, _) in pairwise(samples))


def frames_of(log: DecisionLog, workload: Workload, tables: Tables) -> pd.DataFrame:
    """One row per offered frame: when, where and with what it ran, and what came of it.

    Columns: app, frame, arrival_s, deadline_ms, floor_pct, subnet, unit, start_s, finish_s,
    latency_ms, accuracy_val_pct, accuracy_pct (test), on_time, reason.
    """
    apps = {app.name: (app.model, workload.timeline(app)) for app in workload.apps}
    rows: dict[tuple[str, int], dict] = {}
    for event in log:
        kind = event["event"]
        if kind == "arrive":
            need = requirement_at(apps[event["app"]][1], event["t_s"] * 1000)
            rows[event["app"], event["frame"]] = {
                "app": event["app"], "frame": event["frame"], "arrival_s": event["t_s"],
                "deadline_ms": event["deadline_ms"], "floor_pct": need.floor_pct,
                "on_time": False, "reason": "unfinished",
            }  # fmt: skip
        elif kind == "start":
            rows[event["app"], event["frame"]] |= {
                "subnet": event["subnet"], "unit": event["unit"], "start_s": event["t_s"]
            }  # fmt: skip
        elif kind == "drop":
            rows[event["app"], event["frame"]]["reason"] = event["reason"]
        elif kind == "finish":
            row = rows[event["app"], event["frame"]]
            point = tables[apps[event["app"]][0]].point(event["subnet"], event["unit"])
            late = event["latency_ms"] > row["deadline_ms"] + _EPS_MS
            below = point.accuracy_val_pct < row["floor_pct"] - 1e-9
            row |= {
                "finish_s": event["t_s"], "latency_ms": event["latency_ms"],
                "accuracy_val_pct": point.accuracy_val_pct,
                "accuracy_pct": point.accuracy_test_pct, "on_time": not late and not below,
                "reason": "late" if late else "below floor" if below else "",
            }  # fmt: skip
    frames = pd.DataFrame(list(rows.values()), columns=list(_FRAME_COLUMNS))
    return frames.astype({"on_time": bool})  # also without any frame


_FRAME_COLUMNS = (
    "app", "frame", "arrival_s", "deadline_ms", "floor_pct", "subnet", "unit", "start_s",
    "finish_s", "latency_ms", "accuracy_val_pct", "accuracy_pct", "on_time", "reason",
)  # fmt: skip


def summarise(log: DecisionLog, workload: Workload, tables: Tables, board: Board) -> dict:
    """The numbers of one run.

    Keys: offered, on_time, missed, dropped, late, below_floor; deadline_miss_pct; accuracy_mean_pct
    over on-time frames (test accuracy); energy_mj of the board and above_idle_mj over the horizon,
    both also per on-time frame (`..._per_frame_mj`, infinite without any); latency_p50_ms and
    latency_p95_ms of finished frames; network_switches, clock_changes, decisions (changes of
    placement); source; apps: per app offered, missed and miss_pct, accuracy_mean_pct. Where heat
    plays a part also temp_max_c, and throttled_pct: share of the time with a cap from it.
    """
    frames = frames_of(log, workload, tables)
    good = frames[frames["on_time"]]
    offered, on_time = len(frames), len(good)
    total_mj = energy_mj(log)
    above_mj = total_mj - board.power_mw({}, {}) * workload.horizon_s
    done = frames["latency_ms"].dropna()
    ran = frames.dropna(subset=["start_s"]).sort_values(["app", "start_s", "frame"])
    switched = (ran["subnet"] != ran["subnet"].shift()) & (ran["app"] == ran["app"].shift())
    kinds = [e["event"] for e in log]
    acted = sum(e["event"] == "set" and e["reason"] == "acts" for e in log)
    reasons = frames["reason"].value_counts()
    late, below = (int(reasons.get(r, 0)) for r in ("late", "below floor"))
    apps = {}
    for app in workload.apps:
        mine = frames[frames["app"] == app.name]
        missed = int((~mine["on_time"]).sum())
        apps[app.name] = {
            "offered": len(mine), "missed": missed, "miss_pct": _pct(missed, len(mine)),
            "accuracy_mean_pct": _mean(mine[mine["on_time"]]["accuracy_pct"]),
        }  # fmt: skip
    return {
        "scenario": workload.name, "policy": log.header["policy"], "seed": log.header["seed"],
        "offered": offered, "on_time": on_time, "missed": offered - on_time,
        "dropped": offered - on_time - late - below, "late": late, "below_floor": below,
        "deadline_miss_pct": _pct(offered - on_time, offered),
        "accuracy_mean_pct": _mean(good["accuracy_pct"]),
        "energy_mj": total_mj, "above_idle_mj": above_mj,
        "energy_per_frame_mj": total_mj / on_time if on_time else np.inf,
        "above_idle_per_frame_mj": above_mj / on_time if on_time else np.inf,
        "latency_p50_ms": float(done.quantile(0.5)) if len(done) else np.nan,
        "latency_p95_ms": float(done.quantile(0.95)) if len(done) else np.nan,
        "network_switches": int(switched.sum()), "clock_changes": acted,
        "decisions": kinds.count("decide"), "source": log.header["source"], "apps": apps,
        **_heat(log, board, workload.horizon_s),
    }  # fmt: skip


def _heat(log: DecisionLog, board: Board, horizon_s: float) -> dict[str, float]:
    temps_c = [e["temp_c"] for e in log if "temp_c" in e]
    if not temps_c:
        return {}
    capped, since_s, total_s = set(), 0.0, 0.0
    for event in log:
        if event["event"] == "set" and event["reason"] == "heat":
            total_s += event["t_s"] - since_s if capped else 0.0
            since_s, unit = event["t_s"], event["unit"]
            below = event.get("gpu_mhz", event.get("cpu_mhz")) < board.unit(unit).max_mhz
            (capped.add if below else capped.discard)(unit)
    total_s += horizon_s - since_s if capped else 0.0
    return {"temp_max_c": max(temps_c), "throttled_pct": 100 * total_s / horizon_s}


def timeline(
    log: DecisionLog, workload: Workload, tables: Tables, bin_s: float = 0.25
) -> pd.DataFrame:
    """A run as a figure shows it, from its log.

    Columns: t_s, what, name, value. `what` is latency_ms, deadline_ms and accuracy_pct of the frame
    of app `name` that arrived then; stretch, what competitors multiply times on unit `name` by from
    then on; and per bin of `bin_s` seconds the means of clock_mhz of unit `name`, of cap_mhz, what
    heat allowed it (where heat plays a part), and of power_mw of the board, and temp_c, its
    temperature at the start.
    """
    rows = []
    for frame in frames_of(log, workload, tables).to_dict("records"):
        for what in ("latency_ms", "deadline_ms", "accuracy_pct"):
            rows.append((frame["arrival_s"], what, frame["app"], frame[what]))
    rows += [(c.t_s, "stretch", c.unit, c.stretch) for c in workload.changes if c.stretch]
    edges = np.append(np.arange(0, workload.horizon_s, bin_s), workload.horizon_s)
    steps: dict[tuple[str, str], list[tuple[float, float]]] = {}
    kinds = {"acts": "clock_mhz", "heat": "cap_mhz"}
    for event in log:
        if event["event"] == "set" and event["reason"] in kinds:
            mhz = event.get("gpu_mhz", event.get("cpu_mhz"))
            key = kinds[event["reason"]], event["unit"]
            steps.setdefault(key, []).append((event["t_s"], mhz))
        elif event["event"] == "sample":
            steps.setdefault(("power_mw", "board"), []).append((event["t_s"], event["power_mw"]))
    for key, values in steps.items():
        means = _means(values, edges)
        rows += [(t, *key, v) for t, v in zip(edges[:-1], means, strict=True)]
    temps = [(e["t_s"], e["temp_c"]) for e in log if "temp_c" in e]
    if temps:
        temps_c = np.interp(edges[:-1], *zip(*temps, strict=True))
        rows += [(t, "temp_c", "board", v) for t, v in zip(edges[:-1], temps_c, strict=True)]
    table = pd.DataFrame(rows, columns=["t_s", "what", "name", "value"])
    return table.dropna().sort_values("t_s", kind="stable", ignore_index=True)


def _means(steps: list[tuple[float, float]], edges: np.ndarray) -> np.ndarray:
    """The mean of a step function within each bin; NaN in those that begin before it does."""
    t_s, values = (np.array(column) for column in zip(*steps, strict=True))
    ends = np.append(t_s, max(t_s[-1], edges[-1]))
    # The sum up to every edge is piecewise linear between steps, so its differences are exact.
    sums = np.append(0.0, np.cumsum(np.diff(ends) * values))
    means = np.diff(np.interp(edges, ends, sums)) / np.diff(edges)
    return np.where(edges[:-1] >= t_s[0], means, np.nan)


def _pct(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _mean(values: pd.Series) -> float:
    return float(values.mean()) if len(values) else float("nan")
