"""The manager without one of its mechanisms: what each brings, in energy and misses.

A mechanism is taken out by replacing the function or the constant that it is, in the process that
runs it; the manager itself knows no switches.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd

from dynlib.boards.board import Board
from dynlib.manager import learner, manager, pacer, planner
from dynlib.manager.manager import Manager
from dynlib.points import PointTable, Tables
from dynlib.runtime.case import Case
from dynlib.workload import Change, Workload
from suite.studies.random_workloads import random_case
from suite.studies.scenarios import Scale, scenario
from suite.studies.untuned import L_MS, UNTUNED, on_board, per_frame_mj

PAYS_PCT, PAYS_POINTS = 1.0, 0.1  # what a mechanism has to bring somewhere, to stay


def _learnt(**values: Any) -> Callable:
    """The learner with these values instead of what it has measured."""
    measured = learner.Times.measured

    def replaced(self, *args):
        return measured(self, *args)._replace(**values)

    return replaced


def _only_said(self, said_ms: float, times) -> learner.Gaps:
    return learner.Gaps(said_ms, (), said_ms)


def _never_forgets(self, now_ms: float, calm: bool = False) -> learner.Times:
    return self


def _one_clock(self, now_ms, now_mhz, work, least, low, top) -> pacer.Pace:
    longest_ms = work.worst * work.point.latency_ms[low] + self.unit.settle_ms
    return pacer.Pace(self.unit.freqs[low], now_ms + longest_ms)


_in_time = pacer.Pacer.in_time


def _without_rescue(self, now_ms, now_mhz, work, streams, index, then, sure=True) -> bool:
    return _in_time(self, now_ms, now_mhz, work, streams, index, index)


def _without_streams(self, now_ms, now_mhz, work, streams, index, then, sure=True) -> bool:
    return _in_time(self, now_ms, now_mhz, work, (), index, then, sure)


def _no_queue(ms: float, period_ms: float, target: float) -> float:
    return 0.0 if ms < period_ms else math.inf


def _nothing_given_up(self, *args) -> float:
    return -math.inf


@staticmethod
def _never_again(work, times, now_ms: float) -> bool:
    return False


# What is taken out -> (where it is, its name, what takes its place).
MECHANISMS: dict[str, tuple[Any, str, Any] | None] = {
    "all there": None,
    "learning speed": (learner.Times, "measured", _learnt(typical=1.0)),
    "learning noise": (learner.Times, "measured", _learnt(spread=1.0)),
    "margin for shocks that keep coming": (learner.Times, "measured", _learnt(peak=1.0)),
    "margin for the shock under way": (learner.Times, "measured", _learnt(worst=1.0)),
    "forgetting slow units": (learner.Times, "aged", _never_forgets),
    "learning periods": (learner.Gaps, "seen", _only_said),
    "raising the clock inside a frame": (pacer.Pacer, "_alone", _one_clock),
    "leaving the rest to the highest clock": (pacer.Pacer, "in_time", _without_rescue),
    "looking ahead to frames to come": (pacer.Pacer, "in_time", _without_streams),
    "room for what the model leaves out": (manager, "_ROOM", 0.0),
    "room for queues": (planner, "queue_ms", _no_queue),
    "giving up what is late anyway": (Manager, "_least_ms", _nothing_given_up),
    "trying again what was too slow": (Manager, "_tries", _never_again),
    "keeping a plan for a while": (manager, "_DWELL_MS", -1.0),
}  # fmt: skip


@contextmanager
def without(mechanism: str) -> Iterator[None]:
    """Take a mechanism out for as long as this lasts."""
    change = MECHANISMS[mechanism]
    if change is None:
        yield
        return
    where, name, instead = change
    before = inspect.getattr_static(where, name)
    setattr(where, name, instead)
    try:
        yield
    finally:
        setattr(where, name, before)


# Group of cases -> (objective, (board, tables, seed) -> case).
_SINGLE, _TWO = ("S2", "S3", "S5", "S9"), ("T1", "T2", "T3", "T4", "T5")


def _of(name: str, objective: str = "energy") -> tuple[str, Callable[..., Case]]:
    return objective, partial(scenario, name)


def _takes_turns(stretch: float, on: Board, tables: Tables, seed: int) -> Case:
    """On two CPU clusters alone somebody else's program runs on one from a sixth of the run to a
    third, then on the other; period and deadline three times what the largest network takes."""
    model, table = next(iter(tables.items()))
    clusters = [unit.name for unit in on.units if unit.kind == "cpu"][:2]
    table = PointTable(table.frame[table.frame["unit"].isin(clusters)], on)
    scale = Scale(table)
    slower = scale.l_ms / L_MS
    turns = ((10.0, 0, stretch), (20.0, 0, 1.0), (20.0, 1, stretch), (50.0, 1, 1.0))
    changes = tuple(
        Change(at_s * slower, unit=clusters[i], stretch=each, announced=False)
        for at_s, i, each in turns
    )
    app = scale.app(3, scale.a_min)
    return Case(Workload("takes turns", 60.0 * slower, (app,), changes), on, {model: table})


def _stays_a_while(stretch: float, on: Board, tables: Tables, seed: int) -> Case:
    """Somebody else's program stretches times from a sixth of the run to a third, so much that
    hardly a frame is in time; period and deadline 6 L."""
    scale = Scale(next(iter(tables.values())))
    slower = scale.l_ms / L_MS
    changes = tuple(
        Change(at_s * slower, unit=scale.unit, stretch=each, announced=False)
        for at_s, each in ((10.0, stretch), (20.0, 1.0))
    )
    app = scale.app(6, scale.a_min)
    return Case(Workload("stays a while", 60.0 * slower, (app,), changes), on, tables)


def _flickers(on: Board, tables: Tables, seed: int) -> Case:
    """Somebody else's program doubles times for a tenth of a second, five times a second."""
    scale = Scale(next(iter(tables.values())))
    slower = scale.l_ms / L_MS
    changes = tuple(
        Change((2 + 0.1 * i) * slower, unit=scale.unit, stretch=1.0 + i % 2, announced=False)
        for i in range(500)
    )
    return Case(
        Workload("flickers", 60.0 * slower, (scale.app(2.2, scale.a_min),), changes), on, tables
    )


GROUPS: Mapping[str, list[tuple[str, Callable[..., Case]]]] = {
    "one app": [_of(name) for name in _SINGLE],
    "a shared unit (S4)": [_of("S4")],
    "a lost unit (S7)": [_of("S7")],
    "random arrivals (S8)": [_of("S8"), _of("S8", "accuracy")],
    "several apps": [_of(name) for name in _TWO],
    "overload (T6)": [_of("T6")],
    "more noise": [("energy", UNTUNED["noise 0.15, S1"][1])],
    "other periods": [
        ("energy", UNTUNED[name][1]) for name in UNTUNED if UNTUNED[name][0] == "period"
    ],
    "competitors": [
        ("energy", UNTUNED[name][1]) for name in UNTUNED if UNTUNED[name][0] == "competitor"
    ],
    "a competitor that changes units": [
        ("energy", partial(_takes_turns, stretch)) for stretch in (2.0, 4.0, 8.0)
    ],
    "a competitor that stays a while": [
        ("energy", partial(_stays_a_while, stretch)) for stretch in (8.0, 16.0)
    ],
    "a competitor that flickers": [("accuracy", _flickers)],
    "random workloads": [("energy", random_case)] * 20,
}  # fmt: skip


def take_out(board: str, mechanism: str, seeds: Iterable[int]) -> list[dict]:
    """The manager without a mechanism, in every group of cases: a row per group, with the geometric
    mean of the energy per on-time frame (energy_per_frame_mj), and the means of miss_pct and of
    network_switches."""
    on, tables = on_board(board)
    rows = []
    for group, cases in GROUPS.items():
        logs, missed, switches = [], [], []
        for number, (objective, make) in enumerate(cases):
            for seed in seeds:
                if make is random_case:
                    seed = 5000 + 20 * seed + number
                case = make(on, tables, seed)
                with without(mechanism):
                    done = case.simulate(Manager(on, case.tables, objective=objective), seed)
                source = done.log.header["source"]
                summary = done.summary()
                missed.append(summary["deadline_miss_pct"])
                switches.append(summary["network_switches"])
                each_mj = per_frame_mj(done)
                if math.isfinite(each_mj):
                    logs.append(math.log(each_mj))
        rows.append({
            "board": board, "without": mechanism, "group": group, "cases": len(missed),
            "energy_per_frame_mj": math.exp(sum(logs) / len(logs)) if logs else math.nan,
            "miss_pct": sum(missed) / len(missed),
            "network_switches": sum(switches) / len(switches), "source": source,
        })  # fmt: skip
    return rows


def what_each_brings(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of `take_out`: energy_pct, miss_points and switches by which each group has more
    without the mechanism, positive where it pays."""
    keys = ["board", "group"]
    whole = runs[runs["without"] == "all there"].set_index(keys)
    rest = runs[runs["without"] != "all there"].copy()
    base = whole.loc[list(zip(rest["board"], rest["group"], strict=True))].reset_index()
    rest = rest.reset_index(drop=True)
    rest["energy_pct"] = 100 * (rest["energy_per_frame_mj"] / base["energy_per_frame_mj"] - 1)
    rest["miss_points"] = rest["miss_pct"] - base["miss_pct"]
    rest["switches"] = rest["network_switches"] - base["network_switches"]
    return rest


def most_of_each(brought: pd.DataFrame) -> pd.DataFrame:
    """A row per mechanism: the group in which it brings most energy and the one in which it brings
    most misses, the most switches, and whether the first two are enough (`PAYS_PCT`,
    `PAYS_POINTS`)."""
    rows = []
    for name, some in brought.groupby("without", sort=False):
        energy = some.loc[some["energy_pct"].idxmax()]
        missed = some.loc[some["miss_points"].idxmax()]
        rows.append({
            "without": name,
            "energy_pct": energy["energy_pct"], "where_energy": energy["group"],
            "miss_points": missed["miss_points"], "where_missed": missed["group"],
            "switches": some["switches"].max(),
            "pays": energy["energy_pct"] >= PAYS_PCT or missed["miss_points"] >= PAYS_POINTS,
        })  # fmt: skip
    return pd.DataFrame(rows)
