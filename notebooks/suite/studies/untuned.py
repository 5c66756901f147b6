"""What the manager does on workloads nobody tuned it for.

The scenarios on several boards, times that scatter otherwise than tables say, periods that change
without a word, offline batches, a competitor that comes again and again, overload, too little
memory, random workloads, and workloads from life. Everything is simulated beside `JustInTime`, the
rule of a screen, and the Linux default.

Each function makes the rows of one job, so that `in_parallel` can spread them over the cores;
boards are given by name. Energies are of the board, in mJ; where `JustInTime` is the rival its
columns begin with `simple_`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial

import numpy as np
import pandas as pd

from dynlib.boards.board import Board
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.points import PointTable, Tables
from dynlib.runtime.case import Case
from dynlib.runtime.oracle import optimum
from dynlib.runtime.rivals import JustInTime, best_static, linux_default
from dynlib.runtime.summary import Run
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import published_tables
from suite.record.statistics import mean_interval
from suite.studies.bound import attackers, below_optimum
from suite.studies.compare import reductions
from suite.studies.life import life_case
from suite.studies.manage import as_accurate, within
from suite.studies.random_workloads import noise_wrong, random_case
from suite.studies.scenarios import Scale, scenario

BOARDS = ("jetson-xavier-nx", "jetson-agx-xavier", "jetson-nano", "rock-5b", "hikey960")
SCENARIOS = (
    "S1", "S2", "S3", "S4", "S5", "S7", "S8", "S9", "S10", "T1", "T2", "T3", "T4", "T5", "T6",
)  # fmt: skip
FAST_BOARDS = BOARDS[:-1]  # on the last a frame takes seconds, too long to learn anything in two
MUCH_ENERGY_PCT, MUCH_MISSED = 3.0, 0.5  # more than so much above `JustInTime` is worse
L_MS = 61.735  # of the published table on Xavier NX, for which the times below are given
OVERLOAD = 1.19
ROOM_MB = 1.03  # memory that is allowed over what the right networks need
_SEARCH_S = 1.0  # of the optimum, for what is feasible


@lru_cache
def on_board(board: str) -> tuple[Board, Tables]:
    """A board by its name, and the published points on it."""
    found = load_board(board)
    return found, published_tables(found)


def per_frame_mj(done: Run) -> float:
    """Board energy per on-time frame, in mJ; NaN where none is."""
    on_time = int(done.frames()["on_time"].sum())
    return done.energy_mj / on_time if on_time else math.nan


def _missed_pct(frames: pd.DataFrame) -> float:
    return 100 * float((~frames["on_time"]).mean()) if len(frames) else 0.0


def _beside_simple(case: Case, done: Run, seed: int) -> dict[str, float]:
    """The manager's run beside that of `JustInTime`: misses and energy per on-time frame."""
    simple = case.simulate(JustInTime(case.board, case.tables), seed)
    frame_mj, simple_mj = per_frame_mj(done), per_frame_mj(simple)
    missed_pct, simple_pct = _missed_pct(done.frames()), _missed_pct(simple.frames())
    return {
        "miss_pct": missed_pct, "simple_miss_pct": simple_pct,
        "miss_points": missed_pct - simple_pct,
        "energy_per_frame_mj": frame_mj, "simple_energy_per_frame_mj": simple_mj,
        "energy_pct": 100 * (frame_mj / simple_mj - 1), "source": done.log.header["source"],
    }  # fmt: skip


def same_frames(board: str, name: str, seeds: Iterable[int]) -> list[dict]:
    """The manager in a scenario against the optimum for the same frames, and `JustInTime`.

    A row per seed: energy_over_same_frames (board energy over the least for the frames it had on
    time), miss_feasible_pct (frames missed outside the spans that the optimum calls infeasible),
    infeasible_pct (frames in these), gap (of the optima); energy_pct and miss_points: manager over
    and minus `JustInTime`, NaN where one of them serves nothing.
    """
    on, tables = on_board(board)
    rows = []
    for seed in seeds:
        case = scenario(name, on, tables, seed)
        done = case.simulate(Manager(on, tables), seed)
        frames = done.frames()
        served = frames[frames["on_time"]]
        only = zip(served["app"], served["frame"], strict=True)
        same = optimum(case, seed, only, search_s=0.0)
        inside, gap = pd.Series(False, frames.index), same.gap
        if len(served) < len(frames):  # else everything is feasible
            best = optimum(case, seed, search_s=_SEARCH_S)
            inside, gap = within(frames, best.spans_s), max(gap, best.gap)
        rows.append({
            "board": board, "scenario": name, "seed": seed,
            "energy_over_same_frames": done.energy_mj / same.energy_mj,
            "miss_feasible_pct": _missed_pct(frames[~inside]),
            "infeasible_pct": 100 * inside.mean(), "gap": gap,
            **_beside_simple(case, done, seed),
        })  # fmt: skip
    return rows


def paired(runs: pd.DataFrame, column: str) -> dict[str, float]:
    """value, low and high (95 %) of the mean over all runs, and n, for a metric."""
    known = runs[column].dropna()
    value, low, high = mean_interval(known)
    return {"value": value, "low": low, "high": high, "n": len(known)}


# Cases that no scenario has. Times are those on Xavier NX, and in proportion to L elsewhere.


def _noise(cv: float, name: str, on: Board, tables: Tables, seed: int) -> Case:
    return noise_wrong(scenario(name, on, tables, seed), cv)


def _case(on: Board, tables: Tables, horizon_s: float, build: Callable) -> Case:
    """`build`, with a scale and the factor of all times, gives apps and changes."""
    scale = Scale(next(iter(tables.values())))
    slower = scale.l_ms / L_MS
    apps, changes = build(scale, slower)
    return Case(Workload("untuned", horizon_s * slower, apps, tuple(changes)), on, tables)


def _period(k: float, deadline: float, then: float, on: Board, tables: Tables, seed: int) -> Case:
    """After 20 s frames come every `then` L instead of `k` L, and nobody says so. The deadline, in
    L, stays; without one it is the period, before and after."""

    def build(scale: Scale, slower: float):
        app = scale.app(k, scale.a_min, deadline_ms=(deadline or k) * scale.l_ms)
        then_ms = then * scale.l_ms
        what = {"period_ms": then_ms} | ({} if deadline else {"deadline_ms": then_ms})
        return (app,), [Change(20 * slower, "app", announced=False, **what)]

    return _case(on, tables, 60.0, build)


def _offline(share: float, beside: bool, on: Board, tables: Tables, seed: int) -> Case:
    """A batch due after 20 s, for which the smallest network needs a share of that time; beside
    it, if so, an app that comes every 4 L, whose smallest one needs no more than a fifth."""

    def build(scale: Scale, slower: float):
        due_ms = 20e3 * slower
        frames = int(share * due_ms / scale.table.smallest.latency_ms[-1])
        batch = App("batch", scale.model, due_ms, "offline", frames=frames, start_s=slower,
                    accuracy_floor_pct=scale.a_min, start_unit=scale.unit)  # fmt: skip
        return (batch, scale.app(4, scale.a_min)) if beside else (batch,), []

    return _case(on, tables, 30.0, build)


def _competitor(k: float, floor: float, on: Board, tables: Tables, seed: int) -> Case:
    """Somebody else's program comes every 2 to 4 s, stays for 1 to 2.5 s, and stretches times by
    1.1 to 2.5; period and deadline k L, the floor from the lowest (0) to the highest (1)."""

    def build(scale: Scale, slower: float):
        rng, t_s, changes = np.random.default_rng([seed, 77]), 2.0, []
        while t_s < 58:
            end_s = min(t_s + rng.uniform(1, 2.5), 59.5)
            for at_s, stretch in ((t_s, float(rng.uniform(1.1, 2.5))), (end_s, 1.0)):
                changes.append(
                    Change(at_s * slower, unit=scale.unit, stretch=stretch, announced=False)
                )
            t_s = end_s + rng.uniform(2, 4)
        return (scale.app(k, scale.a_min + floor * (scale.a_max - scale.a_min)),), changes

    return _case(on, tables, 60.0, build)


# Name -> (group, (board, tables, seed) -> case).
UNTUNED: dict[str, tuple[str, Callable[..., Case]]] = {
    **{f"noise {cv:g}, {name}": (f"noise {cv:g}", partial(_noise, cv, name))
       for cv in (0.08, 0.15) for name in ("S1", "S3", "T1")},
    "period 2.5 to 1.25 L": ("period", partial(_period, 2.5, 0.0, 1.25)),
    "period 2.5 to 1.1 L, due in 1.5 L": ("period", partial(_period, 2.5, 1.5, 1.1)),
    "batch alone, 30 %": ("offline", partial(_offline, 0.3, False)),
    "batch alone, 85 %": ("offline", partial(_offline, 0.85, False)),
    "batch beside, 65 %": ("offline", partial(_offline, 0.65, True)),
    "competitor, 2 L": ("competitor", partial(_competitor, 2, 0.0)),
    "competitor, 3 L": ("competitor", partial(_competitor, 3, 0.5)),
}  # fmt: skip
_LEARNT_S = {"period": 22.0}  # from when on misses count


def untuned(board: str, name: str, seeds: Iterable[int]) -> list[dict]:
    """One of `UNTUNED`, by the manager, `JustInTime` and the Linux default: a row per policy and
    seed, with miss_pct (for periods from 2 s after the change on), energy_per_frame_mj, and for
    batches batch_in_time: whether all of it was, NaN elsewhere. All batches can be."""
    on, tables = on_board(board)
    group, make = UNTUNED[name]
    make = partial(make, on, tables)
    case = make(0)
    slower = next(iter(tables.values())).largest.latency_ms[-1] / L_MS
    policies = {"manager": Manager(on, tables), "just in time": JustInTime(on, tables),
                "linux": linux_default(make)}  # fmt: skip
    rows = []
    for seed in seeds:
        case = make(seed)
        for policy, each in policies.items():
            done = case.simulate(each, seed)
            frames = done.frames()
            batch = frames.loc[frames["app"] == "batch", "on_time"]
            frames = frames[frames["arrival_s"] >= slower * _LEARNT_S.get(group, 0.0)]
            rows.append({
                "board": board, "case": name, "group": group, "seed": seed, "policy": policy,
                "miss_pct": _missed_pct(frames), "energy_per_frame_mj": per_frame_mj(done),
                "batch_in_time": float(batch.all()) if len(batch) else math.nan,
                "source": done.log.header["source"],
            })  # fmt: skip
    return rows


def untuned_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `untuned` as a figure shows them: means over boards and seeds per case and policy
    of miss_pct and of energy_over_linux (energy per on-time frame; boards count alike)."""
    keys = ["board", "case", "policy"]
    means = runs.groupby(keys, sort=False)[["miss_pct", "energy_per_frame_mj"]].mean().reset_index()
    linux = means[means["policy"] == "linux"].set_index(["board", "case"])["energy_per_frame_mj"]
    base = [linux[pair] for pair in zip(means["board"], means["case"], strict=True)]
    means["energy_over_linux"] = means["energy_per_frame_mj"] / base
    table = means.groupby(keys[1:], sort=False)[["miss_pct", "energy_over_linux"]].mean()
    return table.reset_index().assign(source=runs["source"].iloc[0])


# The same accuracy as the Linux default.


BEST_STATIC = "best static"


def at_equal_accuracy(
    board: str, name: str, seeds: Mapping[str, Iterable[int]], governor: str = ""
) -> list[dict]:
    """A baseline and others, where floors are the accuracy of the baseline's networks.

    Args:
        name: a scenario or one of `UNTUNED`.
        seeds: policy -> its seeds: an objective of the manager, or `BEST_STATIC`, the best fixed
            setting in hindsight for these floors (left out where there is none).
        governor: of the baseline, and then its name, for all units; "": the board's own, and the
            baseline is "linux".

    A row per policy and seed, with what `Run.summary` says, `scenario` and `baseline`; for
    `beside_baseline`. The baseline meets the seeds of all.
    """
    on, tables = on_board(board)
    make = partial(UNTUNED[name][1] if name in UNTUNED else partial(scenario, name), on, tables)
    baseline = linux_default(make, name=governor or "linux", governor=governor)
    jobs = [(baseline.name, baseline, sorted(set().union(*seeds.values())))]
    for policy, mine in seeds.items():
        if policy == BEST_STATIC:
            built = best_static(lambda seed: as_accurate(make(seed), baseline))
        else:
            built = Manager(on, tables, objective=policy)
        if built is not None:
            jobs.append((policy, built, mine))
    rows = []
    for policy, built, mine in jobs:
        for seed in mine:
            row = as_accurate(make(seed), baseline).simulate(built, seed).summary()
            del row["apps"]
            row |= {"board": board, "scenario": name, "policy": policy, "baseline": baseline.name}
            rows.append(row)
    return rows


def beside_baseline(runs: pd.DataFrame) -> pd.DataFrame:
    """`reductions` at equal accuracy for all baselines and policies of `at_equal_accuracy`, with
    what a saving costs: a row per baseline, policy, scenario and seed.

    More columns: p95_ratio (of latency, over the baseline's), accuracy_points (more than the
    baseline), miss_pct, baseline_miss_pct, source.
    """
    tables = []
    for (baseline, policy), mine in runs.groupby(["baseline", "policy"], sort=False):
        if policy == baseline:
            continue
        keys = ["scenario", "seed"]
        base = runs[(runs["policy"] == baseline) & (runs["baseline"] == baseline)].set_index(keys)
        mine = mine.set_index(keys)
        base = base.loc[mine.index]
        both = pd.concat([base, mine]).reset_index()
        saved = reductions(both, baseline, policy, equal_accuracy=True).set_index(keys)
        tables.append(saved.loc[mine.index].assign(
            baseline=baseline, policy=policy,
            p95_ratio=mine["latency_p95_ms"] / base["latency_p95_ms"],
            accuracy_points=mine["accuracy_mean_pct"] - base["accuracy_mean_pct"],
            miss_pct=mine["deadline_miss_pct"], baseline_miss_pct=base["deadline_miss_pct"],
            source=mine["source"],
        ).reset_index())  # fmt: skip
    return pd.concat(tables, ignore_index=True)


# Models -> (who, saved energy in %, saved latency in %), against `schedutil`.
_PUBLISHED = {
    1: (("2401.08965, best", 19.0, 9.0), ("2022", 16.5, math.nan)),
    2: (("2401.08965, best", 89.0, 23.0),),
}


def published(models: int) -> pd.DataFrame:
    """What was published of one model or of two at a time, as rows beside `beside_baseline`'s."""
    rows = [
        {"baseline": "schedutil", "scenario": "published", "policy": who, "source": "published",
         "energy_reduction_pct": energy_pct, "p95_ratio": 1 - latency_pct / 100}
        for who, energy_pct, latency_pct in _PUBLISHED[models]
    ]  # fmt: skip
    return pd.DataFrame(rows)


# Two applications.


def overload_case(on: Board, tables: Tables, seed: int = 0) -> Case:
    """Two apps of equal priority that only the best network serves: `OVERLOAD` times what fits. A
    frame of the second may take 1.5 periods."""
    scale = Scale(next(iter(tables.values())))
    period = 2 / OVERLOAD
    first = scale.app(period, scale.a_max, "a")
    second = scale.app(period, scale.a_max, "b", deadline_ms=1.5 * first.deadline_ms)
    return Case(Workload("overload", 30.0, (first, second)), on, tables)


def memory_case(on: Board, tables: Tables, seed: int = 0) -> Case:
    """Two apps, floors at the highest and the lowest accuracy, period 4 L each, and so little
    memory that just the two networks fit which take least; weights of 4 bytes count as memory."""
    model, table = next(iter(tables.items()))
    frame = table.frame[table.frame["unit"] == table.main_unit]
    table = PointTable(frame.assign(memory_mb=4 * frame["params_m"]), on)
    scale = Scale(table)
    apps = scale.app(4, scale.a_max, "a"), scale.app(4, scale.a_min, "b")
    least = [min(point.memory_mb for point in table.on(table.main_unit)
                 if point.accuracy_val_pct >= app.accuracy_floor_pct) for app in apps]  # fmt: skip
    cap = Change(0.0, memory_mb=ROOM_MB * sum(least))
    return Case(Workload("memory", 30.0, apps, (cap,)), on, {model: table})


_TIGHT: Mapping[str, Callable[..., Case]] = {"overload": overload_case, "memory": memory_case}


def short_of_optimum(board: str, name: str, seeds: Iterable[int]) -> list[dict]:
    """The manager in the case "overload" or "memory": a row per seed with feasible_miss_pct: by
    how much the frames on time fall short of the most that anybody serves."""
    on, tables = on_board(board)
    case, rows = _TIGHT[name](on, tables), []
    for seed in seeds:
        done = case.simulate(Manager(on, case.tables), seed)
        on_time = int(done.frames()["on_time"].sum())
        best = optimum(case, seed, search_s=_SEARCH_S)
        rows.append({
            "case": name, "seed": seed, "on_time": on_time, "most_on_time": best.served,
            "feasible_miss_pct": 100 * (1 - on_time / best.served), "gap": best.gap,
            "source": done.log.header["source"],
        })  # fmt: skip
    return rows


# Workloads by chance and from life.


def random_pairs(board: str, seeds: Iterable[int]) -> list[dict]:
    """Manager and `JustInTime` on `random_case`: a row per seed, with energy_pct and miss_points as
    `same_frames` has them, apps (how their frames arrive), changes (what changes), and is_worse:
    more than `MUCH_ENERGY_PCT` or `MUCH_MISSED` above the other."""
    on, tables = on_board(board)
    rows = []
    for seed in seeds:
        case = random_case(on, tables, seed)
        row = _beside_simple(case, case.simulate(Manager(on, tables), seed), seed)
        changed = {name for change in case.workload.changes for name in _changed(change)}
        much = row["energy_pct"] > MUCH_ENERGY_PCT or row["miss_points"] > MUCH_MISSED
        rows.append({
            "seed": seed, "apps": " + ".join(app.arrival for app in case.workload.apps),
            "changes": ", ".join(sorted(changed)) or "none", "is_worse": much, **row,
        })  # fmt: skip
    return rows


def _changed(change: Change) -> list[str]:
    """What a change changes, without units."""
    names = ("deadline_ms", "period_ms", "accuracy_floor_pct", "cap_mhz", "stretch", "lost",
             "power_mw", "memory_mb")  # fmt: skip
    return [name.split("_")[0] for name in names if getattr(change, name) is not None]


def worst_pairs(pairs: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """The rows of `random_pairs` in which the manager is furthest above either limit."""
    over = np.maximum(pairs["energy_pct"] / MUCH_ENERGY_PCT, pairs["miss_points"] / MUCH_MISSED)
    worst = pairs.loc[over.sort_values(ascending=False).index[:count]]
    columns = ["seed", "energy_pct", "miss_points", "miss_pct", "simple_miss_pct", "is_worse",
               "apps", "changes"]  # fmt: skip
    return worst[columns].round(2)


def zoo_below(board: str, seeds: Iterable[int], every: int = 1) -> list[dict]:
    """`below_optimum` of `attackers` on `random_case`: a row per seed and policy; one in `every`
    policies, others for the next seed."""
    on, tables = on_board(board)
    rows = []
    for seed in seeds:
        case = random_case(on, tables, seed)
        chosen = dict(list(attackers(case, seed).items())[seed % every :: every])
        rows += [{"seed": seed, **row} for row in below_optimum(case, chosen, seed, 0.0)]
    return rows


def life(board: str, name: str, seeds: Iterable[int]) -> list[dict]:
    """A workload from life by the manager, `JustInTime` and the Linux default: a row per policy and
    seed, with miss_pct, accuracy_mean_pct, energy_per_frame_mj and energy_over_linux."""
    on, tables = on_board(board)
    case = life_case(name, on, tables)
    policies = {"linux": linux_default(lambda seed: case), "manager": Manager(on, tables),
                "just in time": JustInTime(on, tables)}  # fmt: skip
    rows, base_mj = [], math.nan
    for seed in seeds:
        for policy, each in policies.items():
            done = case.simulate(each, seed)
            frame_mj = per_frame_mj(done)
            base_mj = frame_mj if policy == "linux" else base_mj
            rows.append({
                "workload": name, "seed": seed, "policy": policy,
                "miss_pct": _missed_pct(done.frames()), "energy_per_frame_mj": frame_mj,
                "accuracy_mean_pct": done.summary()["accuracy_mean_pct"],
                "energy_over_linux": frame_mj / base_mj, "source": done.log.header["source"],
            })  # fmt: skip
    return rows
