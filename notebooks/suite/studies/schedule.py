"""Schedulers compared on the same requests: mean slowdown, misses, accuracy, and the bounds."""

from collections.abc import Callable, Sequence
from functools import cache
from time import process_time
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import LinearConstraint, milp

from dynlib.runtime.drain import Drained, Row, drain, ladder, rows
from dynlib.runtime.schedulers import Index, Scheduler, Strict
from suite.errors import SuiteError
from suite.papers.dysta import (
    ENTRIES,
    SLO,
    WORKLOADS,
    Benchmark,
    Dysta,
    known,
    plain_loop,
    poisson,
    profiles,
    summary,
    traces,
)
from suite.record import geometric_ratio

# Once-for-All on ResNet-50 D: 79.8 % at 4.1 and 75.0 % at 0.6 billion MACs, as published; between
# them accuracy is taken as linear in the logarithm of the work, and time as linear in the work.
LADDER = (1.0, 0.8, 0.64, 0.5)
_POINTS_PER_LOG = (79.8 - 75.0) / np.log(4.1 / 0.6)
DROP_PP = tuple(-_POINTS_PER_LOG * np.log(scale) for scale in LADDER)


class Variant(NamedTuple):
    """What is compared: an estimate, a scheduler, and how it is run."""

    estimate: str
    scheduler: Callable[[], Scheduler]
    ladder: bool = False
    static: int = 0  # level that serves everything
    switch_ms: float = 0.0


def _index(**options) -> Callable[[], Scheduler]:
    return lambda: Index(**options)


KNEE = {"dear": 2.8, "patience": 1.7}
VARIANTS: dict[str, Variant] = {
    **{name: Variant(entry.estimate, entry.scheduler) for name, entry in ENTRIES.items()},
    "balanced": Variant("time", Index),
    "knee": Variant("time", _index(**KNEE)),
    "strict": Variant("time", Strict),
    "loose": Variant("time", lambda: Strict(2.0)),
    "balanced gamma": Variant("density", Index),
    "knee gamma": Variant("density", _index(**KNEE)),
    "clairvoyant": Variant("exact", _index(dear=0.0)),
    "ageing": Variant("time", _index(**KNEE, old=30.0)),
    "ladder": Variant("time", _index(dear=12.0, patience=3.0, backlog=5.0), True),
    "ladder, overload": Variant("time", _index(dear=12.0, patience=3.0, backlog=3.5), True),
    "static 0.8": Variant("time", Index, static=1),
    **{f"Dysta, {ms:g} ms": Variant("density", Dysta, switch_ms=ms) for ms in (1.0, 5.0)},
    **{f"balanced, {ms:g} ms": Variant("time", _index(switch_ms=ms), switch_ms=ms)
       for ms in (1.0, 5.0)},
}  # fmt: skip


@cache
def levels(workload: str, estimate: str) -> dict[str, list[Row]]:
    """The rows of a workload, each with its ladder of cheaper networks."""
    found = {}
    for name, trace in traces(workload).items():
        profile = profiles(workload, True)[name]
        found[name] = ladder(*(rows(trace, profile, estimate, scale) for scale in LADDER))
    return found


def serve(bench: Benchmark, variant: str) -> Drained:
    """What one of `VARIANTS` makes of requests."""
    how = VARIANTS[variant]
    offered = known(bench.workload, how.estimate)
    if how.ladder:
        offered = levels(bench.workload, how.estimate)
    elif how.static:
        offered = levels(bench.workload, how.estimate)
        offered = {
            name: [row.cheaper[how.static - 1] for row in of] for name, of in offered.items()
        }
    done = drain(bench.offered.requests(offered), how.scheduler(), switch_ms=how.switch_ms)
    if how.static:
        done = done._replace(level=np.full_like(done.level, how.static))
    return done


def compare_schedulers(
    workload: str, rate: float, count: int, seed: int, names: Sequence[str], slo: float = SLO
) -> list[dict]:
    """A row per variant on the requests of one seed.

    `antt` is the mean of turnaround over the full network's time alone; `longest` the longest
    turnaround over the mean time alone; `drop_pp` the mean accuracy given up.
    """
    bench = poisson(workload, rate, count, seed, slo)
    found = []
    for name in names:
        done = serve(bench, name)
        measures = summary(bench, done.finish_ms)
        turnaround_ms = done.finish_ms - np.asarray(bench.offered.arrival_ms)
        found.append({
            "workload": workload, "rate": rate, "slo": slo, "seed": seed, "scheduler": name,
            "antt": measures["antt"], "violation_pct": 100 * measures["violation"],
            "longest": float(turnaround_ms.max() / bench.alone_ms.mean()),
            "drop_pp": float(np.take(DROP_PP, done.level).mean()),
            "switches": done.switches / count, "requests": count,
        })  # fmt: skip
    return found


# The optimum.


def fewest_late(arrival_ms, due_ms, work_ms, limit_s: float = 30.0) -> float:
    """The fewest requests that must be late, whoever chooses and whatever he knows.

    Exact where a request may be interrupted anywhere, a bound where only between segments. A set of
    requests can be in time if and only if, from every arrival r to every deadline d, those of the
    set that come and are due in between take no more than d - r; those demands are added to an
    integer programme as its answers break them. Busy periods are independent.

    Example: two requests of 3 ms come at 0 and are due at 4: one is late.

    Returns HiGHS's bound instead where it does not finish within `limit_s` a busy period.
    """
    arrival_ms, due_ms, work_ms = (np.asarray(v, float) for v in (arrival_ms, due_ms, work_ms))
    before = work_ms.cumsum() - work_ms
    idle = arrival_ms > before + np.maximum.accumulate(np.append(0.0, arrival_ms - before)[:-1])
    periods = np.split(np.arange(len(work_ms)), np.flatnonzero(idle))
    return sum(_late_in(arrival_ms[p], due_ms[p], work_ms[p], limit_s) for p in periods if len(p))


def _late_in(arrival_ms, due_ms, work_ms, limit_s: float) -> float:
    keep = np.ones(len(work_ms))
    demands, room = [], []
    while True:
        broken = _broken(arrival_ms, due_ms, work_ms * (keep > 0.5))
        if not broken:
            return len(keep) - keep.sum()
        for first, last in broken:
            inside = (arrival_ms >= arrival_ms[first]) & (due_ms <= due_ms[last])
            demands.append(work_ms * inside)
            room.append(due_ms[last] - arrival_ms[first])
        found = milp(
            -np.ones(len(keep)), integrality=np.ones(len(keep)), bounds=(0, 1),
            constraints=LinearConstraint(np.array(demands), -np.inf, room),
            options={"time_limit": limit_s},
        )  # fmt: skip
        if found.status != 0:
            return len(keep) + np.ceil(found.mip_dual_bound - 1e-6)
        keep = found.x.round()


def _broken(arrival_ms, due_ms, work_ms) -> list[tuple[int, int]]:
    """For every deadline that cannot be kept, the arrival from which on most is too much."""
    found = []
    taken = np.flatnonzero(work_ms)
    for last in taken:
        inside = taken[due_ms[taken] <= due_ms[last]]
        demand_ms = work_ms[inside][::-1].cumsum()[::-1]
        over_ms = demand_ms - (due_ms[last] - arrival_ms[inside])
        worst = int(over_ms.argmax())
        if over_ms[worst] > 1e-6:
            found.append((int(inside[worst]), int(last)))
    return found


def late_against_optimum(workload: str, rate: float, count: int, seed: int) -> list[dict]:
    """Misses of the strict scheduler and of the exact offline optimum on the same requests."""
    bench = poisson(workload, rate, count, seed)
    arrival_ms = np.asarray(bench.offered.arrival_ms)
    due_ms = arrival_ms + bench.offered.deadline_ms
    best = fewest_late(arrival_ms, due_ms, bench.alone_ms)
    strict, dysta = (serve(bench, name).finish_ms > due_ms for name in ("strict", "Dysta"))
    return [{"workload": workload, "rate": rate, "seed": seed, "requests": count,
             "strict_pct": 100 * strict.mean(), "dysta_pct": 100 * dysta.mean(),
             "optimum_pct": 100 * best / count}]  # fmt: skip


# Numbers of the notebook.


def seed_ratio(
    table: pd.DataFrame, measure: str, ours: str, theirs: str
) -> tuple[float, float, float]:
    """Geometric mean over seeds of one scheduler's measure over another's, and its interval.

    Where a run has no miss at all the ratio is that of the means, its interval by bootstrap.
    """
    wide = table.pivot(index="seed", columns="scheduler", values=measure)
    mine, other = wide[ours].to_numpy(), wide[theirs].to_numpy()
    if (mine > 0).all() and (other > 0).all():
        return geometric_ratio(mine, other)
    draws = np.random.default_rng(0).integers(len(mine), size=(2000, len(mine)))
    means = mine[draws].mean(1) / other[draws].mean(1)
    return (mine.mean() / other.mean(), *np.quantile(means, (0.025, 0.975)))


def front_rows(
    runs: pd.DataFrame, bounds: pd.DataFrame, names: Sequence[str], ours: Sequence[str],
    few: Sequence[int], few_requests: int = 20_000,
) -> pd.DataFrame:  # fmt: skip
    """Mean slowdown and misses of each scheduler over Dysta's, with intervals, and their bounds.

    Rivals are slow, so they have the seeds `few` and at most `few_requests`; as many for Dysta.
    """
    found = []
    for workload, group in runs.groupby("workload"):
        count = group["requests"].max()
        long = group[group["requests"] == count]
        short = group[(group["requests"] == min(count, few_requests)) & group["seed"].isin(few)]
        for name in names:
            role = "ours" if name in ours else "rival"
            values = {"workload": workload, "scheduler": name, "role": role}
            for measure, key in (("antt", "antt"), ("violation_pct", "violation")):
                shown = long if name in ours else short
                value, low, high = seed_ratio(shown, measure, name, "Dysta")
                values |= {key: value, f"{key}_low": low, f"{key}_high": high}
            found.append(values)
        least = bounds.loc[bounds["workload"] == workload, ["optimum_pct", "dysta_pct"]].sum()
        found += [
            {"workload": workload, "scheduler": "clairvoyant mean slowdown", "role": "bound",
             "measure": "antt", "antt": seed_ratio(long, "antt", "clairvoyant", "Dysta")[0]},
            {"workload": workload, "scheduler": "fewest misses possible", "role": "bound",
             "measure": "violation", "violation": least["optimum_pct"] / least["dysta_pct"]},
        ]  # fmt: skip
    return pd.DataFrame(found)


def queue_error(workload: str, count: int, seed: int) -> list[dict]:
    """Mean turnaround of first come, first served, beside Pollaczek and Khinchine's formula."""
    rate = WORKLOADS[workload]
    bench = poisson(workload, rate, count, (seed, 1))
    done = serve(bench, "FCFS")
    seen_ms = (done.finish_ms - np.asarray(bench.offered.arrival_ms)).mean()
    work_ms = [trace.ms.sum(1) for trace in traces(workload).values()]
    mean_ms = np.mean([ms.mean() for ms in work_ms])
    square = np.mean([(ms**2).mean() for ms in work_ms])
    per_ms = rate / 1000
    wait_ms = per_ms * square / (2 * (1 - per_ms * mean_ms))
    return [{"workload": workload, "seed": seed, "requests": count, "seen_ms": seen_ms,
             "formula_ms": mean_ms + wait_ms}]  # fmt: skip


def speed(workload: str, count: int, repeats: int = 3) -> dict[str, float]:
    """CPU microseconds a request of Dysta: the plain loop, the kernel asked always, the kernel.

    The best of `repeats`, in turn. Raises `SuiteError` if they do not finish at the same times.
    """
    bench = poisson(workload, WORKLOADS[workload], count, 0)
    offered = known(workload, "density")

    def serve_dysta(**options) -> np.ndarray:
        return drain(bench.offered.requests(offered), Dysta(), **options).finish_ms

    ways: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: plain_loop(bench),
        "always": lambda: (
            drain(bench.offered.requests(offered), Dysta(), ask_always=True).finish_ms
        ),
        "kernel": lambda: drain(bench.offered.requests(offered), Dysta()).finish_ms,
    }
    best, finish_ms = dict.fromkeys(ways, np.inf), {}
    for _ in range(repeats):
        for name, way in ways.items():
            begin_s = process_time()
            finish_ms[name] = way()
            best[name] = min(best[name], 1e6 * (process_time() - begin_s) / count)
    exact = (finish_ms["kernel"] == finish_ms["always"]).all()
    if not exact or not np.allclose(finish_ms["plain"], finish_ms["kernel"], rtol=0, atol=1e-4):
        raise SuiteError(f"{workload}: the kernel and the plain loop finish at other times")
    return best


def who_runs(
    workload: str, names: Sequence[str], fewest: int = 16, most: int = 24, count: int = 10_000
) -> pd.DataFrame:
    """When requests ran in the busy period in which the first scheduler is late most often.

    Of `count` requests those busy periods count that have `fewest` to `most`; a row per stretch.
    """
    bench = poisson(workload, WORKLOADS[workload], count, 3)
    arrival_ms = np.asarray(bench.offered.arrival_ms)
    due_ms = arrival_ms + bench.offered.deadline_ms
    trails = {}
    for name in names:
        how, trail = VARIANTS[name], []
        requests = bench.offered.requests(known(workload, how.estimate))
        trails[name] = drain(requests, how.scheduler(), trail=trail).finish_ms, trail
    finish_ms = trails[names[0]][0]
    starts = np.flatnonzero(arrival_ms[1:] >= np.maximum.accumulate(finish_ms)[:-1]) + 1
    periods = [p for p in np.split(np.arange(count), starts) if fewest <= len(p) <= most]
    shown = max(periods, key=lambda p: (finish_ms[p] > due_ms[p]).sum())
    found = []
    for name, (finish_ms, trail) in trails.items():
        for frame, begin_ms, end_ms, *_ in trail:
            if shown[0] <= frame <= shown[-1]:
                t_ms = {"begin_ms": begin_ms, "end_ms": end_ms, "arrival_ms": arrival_ms[frame],
                        "deadline_at_ms": due_ms[frame]}  # fmt: skip
                found.append({
                    "scheduler": name, "request": frame - shown[0] + 1,
                    "model": bench.offered.model[frame].split("_")[2 if workload == "attnn" else 0],
                    **{key: value - arrival_ms[shown[0]] for key, value in t_ms.items()},
                    "late": bool(finish_ms[frame] > due_ms[frame]),
                    "slowdown": (finish_ms[frame] - arrival_ms[frame]) / bench.alone_ms[frame],
                })  # fmt: skip
    return pd.DataFrame(found)
