"""Figure 7 of Dynamic-OFA again: a competitor comes to the GPU, and who is in time again when."""

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from dynlib.boards.board import Board
from dynlib.manager.manager import Manager
from dynlib.points import Tables
from dynlib.runtime.case import Case
from suite.papers.dynamic_ofa import PUBLISHED_TRACE, PUBLISHED_TRACE_RECOVERY_S, Reactive
from suite.studies.compare import recovery_frames
from suite.studies.scenarios import scenario

BEFORE_S = 10.0  # in which everybody finds the level to begin with; the figure shows its end
SHOWN_S = 10.0
COMES_S = 2.5


def trace_case(board: Board, tables: Tables, seed: int) -> Case:
    """Scenario S4 with one competitor alone, which comes `COMES_S` into the figure and stays."""
    plain = scenario("S4", board, tables, seed)
    comes = replace(plain.workload.changes[0], t_s=BEFORE_S + COMES_S)
    horizon_s = BEFORE_S + SHOWN_S
    return plain.under(replace(plain.workload, horizon_s=horizon_s, changes=(comes,)))


def replay_trace(board: Board, tables: Tables, seeds: Iterable[int]) -> tuple[pd.DataFrame, ...]:
    """The trace of the first seed for a figure, and what it took over all seeds.

    The first has a row per frame, of the published trace one per level: policy, t_s (the
    competitor comes at `COMES_S`), end_s and high_ms (published levels), latency_ms, accuracy_pct,
    deadline_ms, recovery_s, source. The second a row per policy and seed: recovery_s, from the
    competitor's coming until ten frames are in time one after the other, and lost_points, accuracy
    before minus at the end.
    """
    policies = {
        "the public loop, here": Reactive(board, tables),
        "manager, for accuracy": Manager(board, tables, objective="accuracy"),
    }
    shown, took = [], []
    for seed in seeds:
        case = trace_case(board, tables, seed)
        (app,) = case.workload.apps
        for name, policy in policies.items():
            done = case.simulate(policy, seed)
            frames = done.frames()
            (late,) = recovery_frames(frames, case.workload)
            t_s = frames["arrival_s"] - BEFORE_S
            before = frames.loc[t_s.between(0, COMES_S), "accuracy_pct"].mean()
            after = frames.loc[t_s > SHOWN_S - COMES_S, "accuracy_pct"].mean()
            took.append({
                "policy": name, "seed": seed, "recovery_s": late * app.period_ms / 1000,
                "lost_points": before - after,
            })  # fmt: skip
            rows = frames.assign(
                policy=name, seed=seed, t_s=t_s, recovery_s=took[-1]["recovery_s"],
                source=done.log.header["source"],
            )  # fmt: skip
            shown.append(rows[rows["t_s"] >= 0])
    published = pd.DataFrame(PUBLISHED_TRACE, columns=_LEVEL).assign(
        policy="published", recovery_s=PUBLISHED_TRACE_RECOVERY_S, source="published",
        deadline_ms=60.0,
    )  # fmt: skip
    frames = pd.concat(shown)
    first = frames[frames["seed"] == frames["seed"].iloc[0]]
    return pd.concat([published, first])[_COLUMNS], pd.DataFrame(took)


_LEVEL = ["t_s", "end_s", "accuracy_pct", "latency_ms", "high_ms"]
_COLUMNS = ["policy", *_LEVEL, "deadline_ms", "recovery_s", "source"]
