"""Somebody else's program: every number of a run from its log, the board file and the table alone.

It imports nothing of the project. ``python recompute.py LOG BOARD.toml TABLE.csv`` prints JSON.
"""

import csv
import json
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from statistics import fmean

SETTING = ("exit_threshold", "backend", "precision", "quota", "batch")


def recompute(log_path, board_path, table_path):
    header, *events = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    with Path(table_path).open() as file:
        table = [row for row in csv.DictReader(file) if row["board"] == header["board"]]
    frames = {}
    for event in events:
        key = event.get("app"), event.get("frame")
        if event["event"] == "arrive":
            frames[key] = {"arrive": event}
        elif event["event"] in ("start", "finish", "drop"):
            frames[key][event["event"]] = event
    outcome = {key: judge(frame, header["models"][key[0]], table) for key, frame in frames.items()}
    good = [accuracy for reason, accuracy in outcome.values() if not reason]
    energy_mj = energy(events)
    idle_mw = at_rest(tomllib.loads(Path(board_path).read_text()))
    above_mj = energy_mj - idle_mw * header["horizon_s"]
    latencies = sorted(f["finish"]["latency_ms"] for f in frames.values() if "finish" in f)
    reasons = [reason for reason, _ in outcome.values()]
    late, below = reasons.count("late"), reasons.count("below floor")
    kinds = [event["event"] for event in events]
    return {
        "scenario": header["scenario"], "policy": header["policy"], "seed": header["seed"],
        "offered": len(frames), "on_time": len(good), "missed": len(frames) - len(good),
        "late": late, "below_floor": below,
        "dropped": len(frames) - len(good) - late - below,
        "deadline_miss_pct": percent(len(frames) - len(good), len(frames)),
        "accuracy_mean_pct": fmean(good) if good else None,
        "energy_mj": energy_mj, "above_idle_mj": above_mj,
        "energy_per_frame_mj": energy_mj / len(good) if good else None,
        "above_idle_per_frame_mj": above_mj / len(good) if good else None,
        "latency_p50_ms": quantile(latencies, 0.5), "latency_p95_ms": quantile(latencies, 0.95),
        "network_switches": switches(frames), "decisions": kinds.count("decide"),
        "clock_changes": sum(e["event"] == "set" and e["reason"] == "acts" for e in events),
        "source": header["source"],
        "apps": {app: of_app(app, outcome) for app in header["models"]},
    }  # fmt: skip


def judge(frame, model, table):
    """(why a frame was missed, "" if it was not; its test accuracy)."""
    if "finish" not in frame:
        return frame["drop"]["reason"], None
    row = next(row for row in table if is_row(row, frame["finish"], model))
    test = row["accuracy_test_pct"] or row["accuracy_val_pct"]
    val = row["accuracy_val_pct"] or row["accuracy_test_pct"]
    if frame["finish"]["latency_ms"] > frame["arrive"]["deadline_ms"] + 1e-6:
        return "late", float(test)
    if float(val) < frame["arrive"]["accuracy_floor_pct"] - 1e-9:
        return "below floor", float(test)
    return "", float(test)


def is_row(row, event, model):
    if (row["model"], row["subnet"], row["unit"]) != (model, event["subnet"], event["unit"]):
        return False
    plain = {"batch": 1}
    if not all(same(row[name], event.get(name, plain.get(name))) for name in SETTING):
        return False
    cores = row["cores"] or row["threads"]
    return not cores or row["gpu_mhz"] or float(cores) == event["cores"]


def same(cell, value):
    if value is None:
        return cell == ""
    return cell == value if isinstance(value, str) else cell != "" and float(cell) == value


def energy(events):
    samples = [(e["t_s"], e["power_mw"]) for e in events if e["event"] == "sample"]
    return sum((b[0] - a[0]) * a[1] for a, b in pairwise(samples))


def at_rest(board):
    """mW of a board with nothing to do, all units at their lowest clocks: C f V^2 of all cores."""
    total = board["power"]["static_mw"]
    gpus = [board["gpu"]] if "gpu" in board else []
    for unit in (*board.get("cluster", ()), *gpus, *board.get("npu", ())):
        mhz, mv = unit["opps"][0]
        cores = len(unit.get("cpus", ())) or 1
        busy_mw = cores * unit["c_uw_mhz_v2"] * mhz * mv**2 / 1e9
        total += unit["idle_fraction"] * busy_mw
    return total


def switches(frames):
    started = {}
    for (app, number), frame in frames.items():
        if "start" in frame:
            started.setdefault(app, []).append((frame["start"]["t_s"], number, frame["start"]))
    count = 0
    for starts in started.values():
        subnets = [event["subnet"] for _, _, event in sorted(starts, key=lambda s: s[:2])]
        count += sum(a != b for a, b in pairwise(subnets))
    return count


def of_app(app, outcome):
    mine = [found for (name, _), found in outcome.items() if name == app]
    good = [accuracy for reason, accuracy in mine if not reason]
    missed = len(mine) - len(good)
    return {
        "offered": len(mine), "missed": missed, "miss_pct": percent(missed, len(mine)),
        "accuracy_mean_pct": fmean(good) if good else None,
    }  # fmt: skip


def percent(part, whole):
    return 100 * part / whole if whole else 0.0


def quantile(values, share):
    """Between the two nearest ranks, as most programs do."""
    if not values:
        return None
    at = share * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


if __name__ == "__main__":
    json.dump(recompute(*sys.argv[1:]), sys.stdout)
