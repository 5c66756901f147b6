"""What a manager is compared with: the Linux default, and the best static setting in hindsight."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from dynlib.boards.board import Board
from dynlib.errors import PolicyError
from dynlib.manager.policy import Action, Placement, Ready, State, edf, fifo, share_done
from dynlib.points import Point, PointTable, Tables
from dynlib.runtime.case import Case
from dynlib.runtime.summary import MISS_LIMIT_PCT
from dynlib.workload import App, Workload

TRIAL_SEEDS = (9001, 9002, 9003)
MAX_TRIALS = 400
_EARLY_MS = 0.5
_LONG = 0.15


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


class JustInTime:
    """A simple manager, to see what a rule of a screen reaches: everything just in time.

    Every app runs the smallest network that meets its floor on its start unit (elsewhere while that
    is lost); every unit the lowest clock at which the frames at hand are in time if they are as
    slow as the slowest of the last five, the lowest of all between frames, raised just before the
    next; and the highest for a frame that turns out longer.
    """

    name, static, governors = "just in time", False, {}
    choose = staticmethod(edf)

    def __init__(self, board: Board, tables: Tables):
        self.units, self.tables = {unit.name: unit for unit in board.units}, tables

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """See `dynlib.manager.policy`."""
        last = dict(state.memory or {})  # app -> measured over expected times
        for name, subnet, unit, ran, setting in state.finished:
            app = next((app for app in state.apps if app.name == name), None)
            if app:
                point = self.tables[app.model].point(subnet, unit, setting)
                ratio = share_done(point, ran, self.units[unit].freqs)
                last[name] = (*last.get(name, ()), ratio)[-5:]
        placements, wake_ms = {}, math.inf
        frames = {name: [] for name in self.units}  # (deadline, share left, point, share done)
        begin_ms = dict.fromkeys(self.units, state.t_ms)
        for app in state.apps:
            table, slow = self.tables[app.model], max(last.get(app.name, (1.0,)))
            units = [name for name in table.units if limits[name]] or table.units
            where = app.start_unit or table.main_unit
            points = table.on(where if where in units else units[0])
            good = [p for p in points if p.accuracy_val_pct >= app.need.floor_pct - 1e-9]
            point = (good or points)[0]
            placements[app.name] = Placement(point.subnet, point.unit, point.setting)
            for job in app.running:
                runs = table.point(job.subnet, job.unit, job.setting)
                done = share_done(runs, job.ran, self.units[job.unit].freqs)
                frames[job.unit].append((job.deadline_at_ms, slow - done, runs, done))
            here = frames[point.unit]
            here += [(frame.deadline_at_ms, slow, point, 0.0) for frame in app.waiting]
            if app.arrival == "periodic" and not app.waiting and not app.running:
                next_ms = app.next_arrival_ms(state.t_ms)
                raise_ms = next_ms - self.units[point.unit].settle_ms - _EARLY_MS
                if raise_ms <= state.t_ms:
                    here.append((next_ms + app.need.deadline_ms, slow, point, 0.0))
                    begin_ms[point.unit] = next_ms if len(here) == 1 else state.t_ms
                else:
                    wake_ms = min(wake_ms, raise_ms)
        clocks = {}
        for name, unit in self.units.items():
            clocks[name] = unit.min_mhz
            if not frames[name] or not limits[name]:
                continue
            # What runs goes first, then the earliest deadline.
            work = sorted(frames[name], key=lambda frame: (not frame[3], frame[0]))
            for index, mhz in enumerate(unit.freqs):
                clocks[name] = mhz
                if mhz >= limits[name] or self._in_time(begin_ms[name], work, index):
                    break
            deadline_ms, share, point, done = work[0]
            if mhz < limits[name]:
                # The last moment at which the highest clock still saves a frame that is long.
                slow_ms = point.latency_ms[index]
                fast_ms = point.latency_ms[unit.freqs.index(limits[name])]
                left = share + _LONG - unit.settle_ms / slow_ms
                spare_ms = deadline_ms - begin_ms[name] - unit.settle_ms - left * fast_ms
                wait_ms = spare_ms / (1 - fast_ms / slow_ms)
                if wait_ms <= 0.1:
                    clocks[name] = limits[name]
                else:
                    wake_ms = min(wake_ms, state.t_ms + wait_ms)
        return Action(placements, clocks, None if math.isinf(wake_ms) else wake_ms, last, self.name)

    @staticmethod
    def _in_time(now_ms: float, frames: list, index: int) -> bool:
        for deadline_ms, share, point, _ in frames:
            now_ms += share * point.latency_ms[index]
            if now_ms > deadline_ms - _EARLY_MS:
                return False
        return True
