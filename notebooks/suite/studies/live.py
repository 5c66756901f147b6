"""Live runs side by side: the manager, fixed networks, and the best of these in hindsight.

What counts is an answer that is right and in time. All policies serve the same frames under the
same load, one after the other in every repetition, so that they are compared in pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dynlib.machine.machine import Machine
from dynlib.manager.policy import Placement, Policy
from dynlib.runtime import Case, LiveRun, Served, Static
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


def side_by_side(frames: pd.DataFrame) -> pd.DataFrame:
    """Per policy, in percent: right_in_time, missed, and right of the answers given."""
    by_policy = frames.groupby("policy", sort=False)
    return pd.DataFrame({
        "right_in_time_pct": 100 * by_policy["right"].mean(),
        "missed_pct": 100 - 100 * by_policy["on_time"].mean(),
        "accuracy_pct": 100 * by_policy["answered"].mean(),
    })  # fmt: skip


class Gain(NamedTuple):
    """Percentage points right and in time over the best fixed network: (mean, low, high), 95 % over
    repetitions. `rival` is that network, `hindsight` the best without and with load."""

    manager: tuple[float, float, float]
    oracle: tuple[float, float, float]
    rival: str
    hindsight: tuple[str, str]


def gain_of(frames: pd.DataFrame, manager: str = "manager") -> Gain:
    """What the manager gains, and what it would if it knew the load ahead.

    The rival is the fixed network that is best over all repetitions. The oracle takes one network
    while there is load and one while there is none, the best of each over all repetitions.
    """
    fixed = frames[frames["policy"] != manager]
    rival = fixed.groupby("policy")["right"].mean().idxmax()
    by_load = fixed.groupby(["loaded", "policy"])["right"].mean().unstack()
    hindsight = by_load.idxmax(axis=1)

    def per_repetition(rows: pd.DataFrame) -> pd.Series:
        return 100 * rows.groupby("repetition")["right"].mean()

    base = per_repetition(frames[frames["policy"] == rival])
    known = fixed[fixed["policy"] == fixed["loaded"].map(hindsight)]
    mine = per_repetition(frames[frames["policy"] == manager])
    return Gain(
        mean_interval(mine - base),
        mean_interval(per_repetition(known) - base),
        rival,
        (hindsight.get(False, ""), hindsight.get(True, "")),
    )


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
