"""One policy against another: reductions, each beside what it costs."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from dynlib.errors import DynlibError
from dynlib.runtime.summary import MISS_LIMIT_PCT
from dynlib.workload import Workload
from suite.record.statistics import mean_interval


def reductions(
    runs: pd.DataFrame,
    baseline: str = "linux",
    manager: str = "manager",
    equal_accuracy: bool = False,
) -> pd.DataFrame:
    """What the manager saves against the baseline, in percent: one row per scenario and seed.

    `runs`: from `simulate_many`; raises `DynlibError` unless both policies ran every scenario with
    the same seeds. Columns: scenario, seed, counts; energy_reduction_pct (board energy per on-time
    frame), above_idle_reduction_pct (energy above idle per on-time frame), same_time_reduction_pct
    (board energy over the horizon), latency_reduction_pct (p95).

    An energy reduction counts only where the manager misses no more than the baseline or 1 %,
    whichever is larger: elsewhere at most 0 is reported, for missing frames always saves energy. A
    latency reduction counts likewise only at no more energy per on-time frame; with
    `equal_accuracy` both only where the manager delivers the baseline's mean accuracy or more.
    """
    pairs = runs.set_index(["scenario", "seed"])
    base, managed = (pairs[pairs["policy"] == name] for name in (baseline, manager))
    if base.empty or set(base.index) != set(managed.index) or not base.index.is_unique:
        raise DynlibError(
            f"cannot compare {manager!r} with {baseline!r}: expected one run of each per scenario "
            f"and seed, got {len(managed)} and {len(base)}"
        )
    managed = managed.loc[base.index]
    allowed = np.maximum(base["deadline_miss_pct"], MISS_LIMIT_PCT)
    gained = managed["accuracy_mean_pct"] - base["accuracy_mean_pct"]
    accurate = (gained >= -1e-6) | (not equal_accuracy)
    out = pd.DataFrame({"counts": accurate & (managed["deadline_miss_pct"] <= allowed + 1e-9)})
    for key, column in _REDUCTIONS.items():
        saved = _reduction_pct(base[column], managed[column])
        out[key] = np.where(out["counts"], saved, np.minimum(saved, 0.0))
    faster = _reduction_pct(base["latency_p95_ms"], managed["latency_p95_ms"])
    cheaper = managed["energy_per_frame_mj"] <= base["energy_per_frame_mj"]
    out["latency_reduction_pct"] = np.where(cheaper & accurate, faster, np.minimum(faster, 0.0))
    return out.reset_index()


_REDUCTIONS = {
    "energy_reduction_pct": "energy_per_frame_mj",
    "above_idle_reduction_pct": "above_idle_per_frame_mj",
    "same_time_reduction_pct": "energy_mj",
}
_SIDE_BY_SIDE = ("deadline_miss_pct", "accuracy_mean_pct", "energy_per_frame_mj", "latency_p95_ms")


def compare_policies(
    runs: pd.DataFrame, baseline: str = "linux", manager: str = "manager"
) -> pd.DataFrame:
    """`reductions` per scenario: means over seeds, each with the bounds of its 95 % t-interval.

    Columns: scenario, n, counted_pct (seeds whose reduction counts), each reduction with _low and
    _high, and side by side with _baseline and _manager: deadline_miss_pct, accuracy_mean_pct,
    energy_per_frame_mj, latency_p95_ms.
    """
    rows = []
    for name, saved in reductions(runs, baseline, manager).groupby("scenario", sort=False):
        row = {"scenario": name, "n": len(saved), "counted_pct": 100 * saved["counts"].mean()}
        for key in (*_REDUCTIONS, "latency_reduction_pct"):
            row[key], row[f"{key}_low"], row[f"{key}_high"] = mean_interval(saved[key])
        mine = runs[runs["scenario"] == name].groupby("policy")
        means = mine[list(_SIDE_BY_SIDE)].mean()
        for column in _SIDE_BY_SIDE:
            row[f"{column}_baseline"] = means.loc[baseline, column]
            row[f"{column}_manager"] = means.loc[manager, column]
        rows.append(row)
    return pd.DataFrame(rows)


def headline(
    runs: pd.DataFrame, baseline: str = "linux", manager: str = "manager"
) -> dict[str, tuple[float, float, float]]:
    """The numbers for a notebook's metrics: key -> (value, low, high), 95 % over seeds.

    energy_reduction_mean_pct over the scenarios, energy_reduction_best_pct (the scenario with the
    best mean), deadline_miss_pct and accuracy_mean_pct of the manager, and of the baseline as
    deadline_miss_baseline_pct and accuracy_mean_baseline_pct.
    """
    saved = reductions(runs, baseline, manager)
    by_scenario = saved.groupby("scenario")["energy_reduction_pct"]
    best = saved[saved["scenario"] == by_scenario.mean().idxmax()]
    result = {
        "energy_reduction_mean_pct": saved.groupby("seed")["energy_reduction_pct"].mean(),
        "energy_reduction_best_pct": best["energy_reduction_pct"],
    }
    for what in ("deadline_miss", "accuracy_mean"):
        for side, policy in (("", manager), ("_baseline", baseline)):
            mine = runs[runs["policy"] == policy]
            result[f"{what}{side}_pct"] = mine.groupby("seed")[f"{what}_pct"].mean()
    return {key: mean_interval(values) for key, values in result.items()}


def recovery_frames(frames: pd.DataFrame, workload: Workload) -> list[int]:
    """Frames from each unannounced arrival of a competitor until the next 10 are on time."""
    found, ok = [], frames.sort_values("arrival_s")
    before = dict.fromkeys((c.unit for c in workload.changes), 1.0)
    for change in workload.changes:
        if change.stretch is None:
            continue
        if change.stretch > before[change.unit]:
            # The frame that runs when the competitor comes is the first it can hurt.
            later = ok[ok["arrival_s"] + ok["deadline_ms"] / 1000 > change.t_s][
                "on_time"
            ].to_numpy()
            runs = (i for i in range(len(later)) if later[i : i + 10].all())
            found.append(next(runs, len(later)))
        before[change.unit] = change.stretch
    return found


def published_ladder(same_unit: Mapping, on_cpu: Mapping) -> pd.DataFrame:
    """On which rung a published reduction such as 89 % is reached.

    `same_unit` and `on_cpu` are rows of `compare_policies`: the baseline runs both models on the
    GPU (T1), or the second one on the CPU cluster (T2). Columns: rung, reduction_pct, low, high.
    """
    rungs = [
        ("same board time", same_unit, "same_time_reduction_pct"),
        ("same work (per on-time frame)", same_unit, "energy_reduction_pct"),
        ("second model on the CPU, same work", on_cpu, "energy_reduction_pct"),
        ("second model on the CPU, above idle", on_cpu, "above_idle_reduction_pct"),
    ]
    return pd.DataFrame(
        [{"rung": rung, "reduction_pct": row[key], "low": row[f"{key}_low"],
          "high": row[f"{key}_high"]} for rung, row, key in rungs]
    )  # fmt: skip


def _reduction_pct(base: pd.Series, managed: pd.Series) -> np.ndarray:
    base, managed = base.to_numpy(float), managed.to_numpy(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        saved = 100 * (1 - managed / base)
    # Equal is no reduction, also where nobody served a frame and both are infinite.
    return np.where(base == managed, 0.0, saved)
