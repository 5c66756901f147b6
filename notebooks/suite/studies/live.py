"""Live runs side by side: the manager, fixed networks, and the best of these in hindsight.

What counts is an answer that is right and in time. All policies serve the same frames under the
same load, one after the other in every repetition, so that they are compared in pairs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dynlib.machine.machine import Machine
from dynlib.manager.policy import Placement, Policy
from dynlib.runtime import Case, LiveRun, Served, Static
from dynlib.workload import Change, Workload
from suite.record.statistics import mean_interval
from suite.studies.load import Burst

_APART = 997  # frames between two repetitions, so that each sees other images


class Labelled(NamedTuple):
    """A network whose answers can be judged.

    `switch(subnet)` makes it ready, `answer(k)` answers frame k, `right(k, answer)` says which
    share of that answer is right.
    """

    switch: Callable[[str], object]
    answer: Callable[[int], Any]
    right: Callable[[int, Any], float]


def bursts(seconds: float, cycle_s: float, workers: int) -> list[Burst]:
    """Load of 45 % of the time, once in every cycle."""
    starts = np.arange(0, seconds - 0.5 * cycle_s, cycle_s)
    return [Burst(t + 0.3 * cycle_s, t + 0.75 * cycle_s, workers) for t in starts]


def fixed_policies(case: Case, subnets: Sequence[str]) -> dict[str, Static]:
    """Each network for all apps, alone: "fixed 1" is the smallest."""
    cpu = case.board.units[0]
    clocks = {cpu.name: cpu.max_mhz}
    policies = {}
    for i, subnet in enumerate(subnets, start=1):
        placements = {app.name: Placement(subnet, cpu.name) for app in case.workload.apps}
        policies[f"fixed {i}"] = Static(f"fixed {i}", placements, clocks)
    return policies


def serve_all(
    case: Case,
    policies: Mapping[str, Policy],
    networks: Mapping[str, Labelled],
    start: Callable[[], None],
    machine: Machine | None,
    repetitions: int,
    script: Sequence[Burst] = (),
) -> tuple[pd.DataFrame, dict[tuple[str, int], LiveRun]]:
    """(frames, runs): every policy in every repetition.

    Args:
        networks: app -> its network.
        start: starts the load by `script`.

    Columns of the frames: those of `Run.frames`; policy, repetition; right, the share of the answer
    that is, 0 without one in time; answered, the same of any answer, NaN without one; loaded.
    """
    tables, runs = [], {}
    for repetition in range(repetitions):
        first = _APART * repetition
        served = {app: _from(network, first) for app, network in networks.items()}
        for label, policy in policies.items():
            for network in served.values():  # awake, and the caches warm
                for k in range(5):
                    network.answer(k)
            start()
            run = runs[label, repetition] = case.serve(policy, served, machine=machine)
            frames = run.frames().assign(policy=label, repetition=repetition)
            frames["answered"] = [
                networks[app].right(k + first, run.answers[app, k])
                if (app, k) in run.answers
                else np.nan
                for app, k in zip(frames["app"], frames["frame"], strict=True)
            ]
            tables.append(frames)
    frames = pd.concat(tables, ignore_index=True)
    frames["right"] = frames["answered"].where(frames["on_time"], 0.0)
    arrival_s = frames["arrival_s"]
    frames["loaded"] = np.any([arrival_s.between(b.start_s, b.end_s) for b in script], axis=0)
    return frames, runs


def _from(network: Labelled, first: int) -> Served:
    return Served(network.switch, lambda k: network.answer(k + first))


def compare_live(frames: pd.DataFrame) -> pd.DataFrame:
    """What came of each policy, and of one that knew the load ahead, in percent.

    Columns: policy, right_in_time_pct, missed_pct, accuracy_pct (of the answers given); gain_pp,
    low, high: percentage points right and in time over the fixed network that is best over all
    repetitions, 95 % over repetitions.

    The oracle takes one network while there is load and one while there is none, the best of each
    in hindsight: its row is what they reached then.
    """
    fixed = frames[frames["policy"] != "manager"]
    rival = fixed.groupby("policy")["right"].mean().idxmax()
    by_load = fixed.groupby(["loaded", "policy"])["right"].mean().unstack()
    best = fixed["loaded"].map(by_load.idxmax(axis=1))
    oracle = fixed[fixed["policy"] == best].assign(policy="oracle")
    rows = []
    for policy, mine in pd.concat([frames, oracle]).groupby("policy", sort=False):
        base = frames[frames["policy"] == rival]
        gain = _right_pct(mine) - _right_pct(base)
        mean, low, high = mean_interval(gain)
        rows.append({
            "policy": policy, "right_in_time_pct": 100 * mine["right"].mean(),
            "missed_pct": 100 - 100 * mine["on_time"].mean(),
            "accuracy_pct": 100 * mine["answered"].mean(),
            "gain_pp": mean, "low": low, "high": high,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _right_pct(frames: pd.DataFrame) -> pd.Series:
    return 100 * frames.groupby("repetition")["right"].mean()


def harm_points(
    cases: Sequence[Case],
    policy: Callable[[Case], Policy],
    networks: Mapping[str, Served],
    machine: Machine,
    repetitions: int,
) -> list[float]:
    """On-time share without knobs minus with, in points: per repetition, the mean over `cases`."""
    harm = []
    for _ in range(repetitions):
        points = []
        for case in cases:
            shares = [
                100 * case.serve(policy(case), networks, machine=knobs).frames()["on_time"].mean()
                for knobs in (None, machine)
            ]
            points.append(shares[0] - shares[1])
        harm.append(float(np.mean(points)))
    return harm


def duty_sweep(
    case: Case, subnet: str, network: Served, machine: Machine, repetitions: int
) -> pd.DataFrame:
    """One network at every clock of the first unit: a row per clock and repetition.

    Columns: share_pct of the highest clock, repetition, cpu_s of this process, on_time_pct,
    latency_ms (median from start to end).
    """
    unit, rows = case.board.units[0], []
    (app,) = case.workload.apps
    for repetition in range(repetitions):
        for mhz in unit.freqs:
            policy = Static("duty", {app.name: Placement(subnet, unit.name)}, {unit.name: mhz})
            begin_s = time.process_time()
            frames = case.serve(policy, {app.name: network}, machine=machine).frames()
            took_s = frames["finish_s"] - frames["start_s"]
            rows.append({
                "share_pct": 100 * mhz / unit.max_mhz, "repetition": repetition,
                "cpu_s": time.process_time() - begin_s,
                "on_time_pct": 100 * frames["on_time"].mean(),
                "latency_ms": 1000 * took_s.median(),
            })  # fmt: skip
    return pd.DataFrame(rows)


def predict(case: Case, frames: pd.DataFrame, script: Sequence[Burst]) -> pd.DataFrame:
    """Fixed networks simulated on this machine's board beside what they did live.

    How much the load stretches execution is calibrated on the first repetition, with the largest
    network; the others are judged. Columns: policy, on_time_pct and busy_pct (time that frames
    take), each also as ..._live.
    """
    ran = frames.assign(took_s=frames["finish_s"] - frames["start_s"])
    first, others = ran[ran["repetition"] == 0], ran[ran["repetition"] > 0]
    policies = fixed_policies(case, case.tables[case.workload.apps[0].model].frame["subnet"])
    cpu = case.board.units[0].name
    largest = first[(first["policy"] == list(policies)[-1]) & first["loaded"]]
    alone_ms = case.tables[case.workload.apps[0].model].on(cpu)[-1].latency_ms[-1]
    stretch = max(1000 * largest["took_s"].mean() / alone_ms, 1.0)
    changes = [
        Change(t_s, unit=cpu, stretch=by, announced=False)
        for burst in script
        for t_s, by in ((burst.start_s, stretch), (burst.end_s, 1.0))
    ]
    loaded = Workload("predicted", case.workload.horizon_s, case.workload.apps, tuple(changes))
    known = Case(loaded, replace(case.board, static_mw=0.0), case.tables)
    rows = []
    for label, policy in policies.items():
        live = others[others["policy"] == label]
        runs = live["repetition"].nunique()
        simulated = known.simulate(policy, switch_ms=0.0).frames()
        took_s = simulated["finish_s"] - simulated["start_s"]
        rows.append({
            "policy": label, "on_time_pct": 100 * simulated["on_time"].mean(),
            "on_time_pct_live": 100 * live["on_time"].mean(),
            "busy_pct": 100 * took_s.sum() / known.workload.horizon_s,
            "busy_pct_live": 100 * live["took_s"].sum() / runs / known.workload.horizon_s,
        })  # fmt: skip
    return pd.DataFrame(rows)
