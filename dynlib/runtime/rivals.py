"""What a manager is compared with: the Linux default, and the best static setting in hindsight."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from dynlib.errors import PolicyError
from dynlib.manager.policy import Action, Placement, Ready, State, fifo
from dynlib.points import Point, PointTable
from dynlib.runtime.case import Case
from dynlib.runtime.summary import MISS_LIMIT_PCT
from dynlib.workload import App, Workload

TRIAL_SEEDS = (9001, 9002, 9003)
MAX_TRIALS = 400


@dataclass(frozen=True)
class Static:
    """Fixed sub-networks and placements, with fixed clocks (MHz per unit) or kernel governors."""

    name: str
    placements: Mapping[str, Placement]
    clocks: Mapping[str, float] = field(default_factory=dict)
    governors: Mapping[str, str] = field(default_factory=dict)
    choose: Callable[[Sequence[Ready], float], Ready] = fifo
    static: bool = True

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """Always the same; see `dynlib.manager.policy`."""
        here = {app.name: self.placements[app.name] for app in state.apps}
        return Action(placements=here, clocks=self.clocks, reason=self.name)


def linux_default(
    make: Callable[[int], Case],
    seeds: Iterable[int] = TRIAL_SEEDS,
    name: str = "linux",
    governor: str = "",
) -> Static:
    """The Linux default: the board's own governors and a fixed set-up.

    Every app stays on its start unit and runs the largest *static* network with which this whole
    set-up misses at most 1 % of frames. That is found by simulating: all start with the largest,
    and while too many frames are missed the app that misses most takes its next smaller network;
    if even the smallest miss too many, the smallest it is. With one app this is the exact answer.

    Args:
        make: seed -> case; its apps, board and tables are the same for all seeds.
        seeds: of the trials; keep them apart from those of the evaluation.
        governor: one kernel governor for all units, instead of the board's own.
    """
    cases = {seed: make(seed) for seed in seeds}
    first = next(iter(cases.values()))
    governors = {unit.name: governor or unit.governor for unit in first.board.units}
    # Largest first: a network no more accurate than a faster one is of no use to anybody.
    ladders = {}
    for app in first.workload.apps:
        ladders[app.name] = ladder_of(first.tables[app.model], app.start_unit)
    step = dict.fromkeys(ladders, 0)
    while True:
        placements = {app: ladders[app][i] for app, i in step.items()}
        policy = Static(name, placements, governors=governors)
        offered, missed = _missed(policy, cases)
        movable = [app for app, i in step.items() if i + 1 < len(ladders[app])]
        if 100 * sum(missed.values()) <= MISS_LIMIT_PCT * offered or not movable:
            return policy
        worst = max(movable, key=missed.__getitem__)
        step[worst] += 1


def _missed(policy: Static, cases: Mapping[int, Case]) -> tuple[int, dict[str, int]]:
    """(frames offered, app -> frames missed) of a policy in all cases."""
    offered = 0
    missed: dict[str, int] = {}
    for seed, case in cases.items():
        summary = case.simulate(policy, seed).summary()
        offered += summary["offered"]
        for app, values in summary["apps"].items():
            missed[app] = missed.get(app, 0) + values["missed"]
    return offered, missed


def best_static(
    make: Callable[[int], Case],
    seeds: Iterable[int] = TRIAL_SEEDS,
    name: str = "static",
) -> Static | None:
    """The best fixed networks, placements and clocks for a scenario, in hindsight.

    Settings are simulated in the order of the energy a run without misses would take, so the first
    that misses at most 1 % is the best. Where none does (T6 asks for what cannot be done), it is
    the one of least energy per on-time frame among those that miss at most 1 % more than the one
    that misses fewest. None when no setting could serve every app, and when there are more than
    `MAX_TRIALS` and none of those is good enough.
    """
    cases = {seed: make(seed) for seed in seeds}
    first = next(iter(cases.values()))
    policies = sorted(_settings(name, first), key=lambda item: item[0])
    tried, fewest_pct = [], math.inf
    for _, policy in policies[:MAX_TRIALS]:
        offered, missed, energy_mj = 0, 0, 0.0
        for seed, case in cases.items():
            summary = case.simulate(policy, seed).summary()
            offered, missed = offered + summary["offered"], missed + summary["missed"]
            energy_mj += summary["energy_mj"]
            # The other seeds offer about as much: this one cannot get below the limit any more.
            missed_pct = 100 * missed / max(offered, 1)
            if missed_pct / len(cases) > MISS_LIMIT_PCT + min(fewest_pct, 100):
                break
        else:
            if missed_pct <= MISS_LIMIT_PCT:
                return policy
            fewest_pct = min(fewest_pct, missed_pct)
            tried.append((energy_mj / max(offered - missed, 1e-9), missed_pct, policy))
    if not tried or len(policies) > MAX_TRIALS:
        return None
    near = [entry for entry in tried if entry[1] <= fewest_pct + MISS_LIMIT_PCT]
    return min(near, key=lambda entry: entry[0])[2]


def ladder_of(table: PointTable, start_unit: str) -> list[Placement]:
    """The networks of a unit, most accurate first, without those that a faster one beats."""
    unit = start_unit or table.main_unit
    best, ladder = -1.0, []
    for point in table.on(unit):
        if point.accuracy_val_pct > best:
            best = point.accuracy_val_pct
            ladder.append(Placement(point.subnet, unit, point.setting))
    if not ladder:
        raise PolicyError(
            f"model {table.model!r} has no points on {unit!r}, expected one of {table.units}"
        )
    return ladder[::-1]


def _settings(name: str, case: Case):
    """(energy per second of use at full time, policy) of all settings that are not hopeless."""
    board, apps = case.board, case.workload.apps
    for points in product(*(_hopeful(case, app) for app in apps)):
        used = [board.unit(unit) for unit in sorted({point.unit for point in points})]
        for clocks in product(*(unit.freqs for unit in used)):
            clock = {unit.name: mhz for unit, mhz in zip(used, clocks, strict=True)}
            mean_mw = _mean_mw(case, points, clock)
            if mean_mw is not None:
                placements = {
                    app.name: Placement(point.subnet, point.unit, point.setting)
                    for app, point in zip(apps, points, strict=True)
                }
                yield mean_mw, Static(name, placements, clock)


def _hopeful(case: Case, app: App) -> list[Point]:
    """The points of an app that meet its lowest floor and, at full clock, its loosest deadline."""
    table = case.tables[app.model]
    needs = [need for _, need in case.workload.timeline(app)]
    loosest_ms = max(need.deadline_ms for need in needs)
    floor_pct = min(need.floor_pct for need in needs)
    return [
        point
        for point in table.points.values()
        if point in table.on(point.unit)  # of the smallest batch
        and point.accuracy_val_pct >= floor_pct
        and point.latency_ms[-1] <= loosest_ms
    ]


def _mean_mw(case: Case, points: Sequence[Point], clock: Mapping[str, float]) -> float | None:
    """Mean power of a setting above all units waiting at their lowest clocks; None if hopeless."""
    load = dict.fromkeys(clock, 0.0)
    waiting_mw = {}
    for name, mhz in clock.items():
        unit = case.board.unit(name)
        waiting_mw[name] = unit.idle_mw(mhz) - unit.idle_mw(unit.min_mhz)
    mean_mw = sum(waiting_mw.values())
    for app, point in zip(case.workload.apps, points, strict=True):
        steps = case.workload.timeline(app)
        loosest_ms = max(need.deadline_ms for _, need in steps)
        freqs = case.board.unit(point.unit).freqs
        index = freqs.index(clock[point.unit])
        latency_ms = point.latency_ms[index]
        if latency_ms > loosest_ms:
            return None
        share = latency_ms / _mean_period_ms(case.workload, app, steps)
        more_mw = point.active_mw[index] - waiting_mw[point.unit]
        load[point.unit] += share
        mean_mw += more_mw * share
    return mean_mw if max(load.values()) <= 1 else None


def _mean_period_ms(workload: Workload, app: App, steps) -> float:
    """The horizon over the number of frames that an app's periods make."""
    end_ms = workload.end_ms(app)
    starts = [max(t_ms, app.start_s * 1000) for t_ms, _ in steps]
    ends = [*starts[1:], end_ms]
    frames = 0.0
    for start_ms, stop_ms, (_, need) in zip(starts, ends, steps, strict=True):
        span_ms = max(min(stop_ms, end_ms) - start_ms, 0.0)
        frames += span_ms / need.period_ms
    return workload.horizon_s * 1000 / max(frames, 1e-9)
