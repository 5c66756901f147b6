"""What a manager is compared with: the Linux default, and the best static setting in hindsight."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from dynlib.boards.board import Board
from dynlib.errors import PolicyError, near
from dynlib.manager.policy import Action, Placement, Ready, State, edf, fifo, share_done
from dynlib.points import Point, PointTable, Tables
from dynlib.runtime.case import Case
from dynlib.runtime.conditions import conditions
from dynlib.runtime.summary import MISS_LIMIT_PCT
from dynlib.workload import App, Workload

TRIAL_SEEDS = (9001, 9002, 9003)
MAX_TRIALS = 400
MAX_SETUPS = 100  # of `linux_default`: networks per app, and set-ups after its walk
_SAME_PCT = 1e-9  # as for a frame below its floor
_EARLY_MS = 0.5  # `JustInTime` is so much earlier than it has to be
_LONG = 0.15  # and saves frames that are longer than the longest of the last five by this share


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
        """Always the same; see `dynlib.manager.policy`.

        Raises `PolicyError` for an app that has no placement.
        """
        here = {}
        for app in state.apps:
            if app.name not in self.placements:
                placed = near(app.name, self.placements)
                raise PolicyError(f"{self.name}: no placement for app {app.name!r}; {placed}")
            here[app.name] = self.placements[app.name]
        return Action(placements=here, clocks=self.clocks, reason=self.name)


class _Trial(NamedTuple):
    """What came of a policy; one that was stopped early has not met all frames.

    `missed`: frames per app; `energy_mj`: of the board, per on-time frame.
    """

    policy: Static
    missed_pct: float
    missed: Counter
    energy_mj: float


def _try(policy: Static, cases: Mapping[int, Case], hopeless_pct: float) -> _Trial:
    """Run a policy in all cases (seed -> case), until it must miss more than `hopeless_pct`."""
    offered, energy_mj = 0, 0.0
    missed: Counter = Counter()
    missed_pct = 0.0
    for seed, case in cases.items():
        summary = case.simulate(policy, seed).summary()
        offered += summary["offered"]
        energy_mj += summary["energy_mj"]
        for app, values in summary["apps"].items():
            missed[app] += values["missed"]
        missed_pct = 100 * missed.total() / max(offered, 1)
        # The other seeds offer about as much: this one cannot get below the limit any more.
        if missed_pct / len(cases) > hopeless_pct:
            break
    on_time = offered - missed.total()
    return _Trial(policy, missed_pct, missed, energy_mj / max(on_time, 1e-9))


def linux_default(
    make: Callable[[int], Case],
    seeds: Iterable[int] = TRIAL_SEEDS,
    name: str = "linux",
    governor: str = "",
) -> Static:
    """The Linux default: the board's own governors and a fixed set-up.

    Every app stays on its start unit and runs the largest *static* network with which this whole
    set-up misses at most 1 % of frames; where none does, the set-up is the one tried that misses
    fewest, and of equals the most accurate.

    That is found by simulating: all start with the largest, and while too many frames are missed
    the app that misses most takes its next smaller network that meets all its floors, and when no
    app has one any more, one that meets the lowest of them. With one app these are all that could
    do. With several, the other set-ups that meet all floors follow, if they are at most
    `MAX_SETUPS`. Of an app with more networks than that, so many are looked at, evenly spread.
    Set-ups whose networks do not fit the least memory that the workload leaves to the apps are
    never tried.

    Args:
        make: seed -> case; its apps, board and tables are the same for all seeds.
        seeds: of the trials; keep them apart from those of the evaluation.
        governor: one kernel governor for all units, instead of the board's own.

    Raises `PolicyError` for an app without a network on its start unit, and where no set-up fits
    the memory.
    """
    cases = {seed: make(seed) for seed in seeds}
    search = _Search(cases, name, governor)
    search.walk()
    if not search.found:
        search.try_others()
    if search.best is None:
        raise PolicyError(
            f"{name}: no networks of {[*search.floors]} fit {search.cap_mb:g} MB together, "
            "expected some that do"
        )
    return search.best.policy


class _Search:
    """Looks for the set-up of `linux_default`: a network per app, each from a ladder of them.

    Attributes:
        ladders: app -> its networks, the most accurate first.
        floors: app -> all floors (%) that it has over time.
        cap_mb: what all networks may take together.
        best: the best trial so far; None before the first.
    """

    def __init__(self, cases: Mapping[int, Case], name: str, governor: str):
        case = next(iter(cases.values()))
        self.cases, self.name = cases, name
        self.governors = {unit.name: governor or unit.governor for unit in case.board.units}
        self.cap_mb = _least_mb(case)
        self.ladders: dict[str, list[Point]] = {}
        self.floors: dict[str, list[float]] = {}
        for app in case.workload.apps:
            table = case.tables[app.model]
            rungs = _rungs(table, app.start_unit, self.cap_mb)
            count = min(len(rungs), MAX_SETUPS)
            spread = [i * (len(rungs) - 1) // max(count - 1, 1) for i in range(count)]
            self.ladders[app.name] = [rungs[i] for i in spread]
            self.floors[app.name] = [need.floor_pct for _, need in case.workload.timeline(app)]
        self.best: _Trial | None = None
        self.best_key = (math.inf, 0.0)
        self.tried: set[tuple[Point, ...]] = set()

    @property
    def found(self) -> bool:
        """Whether a set-up misses few enough frames."""
        return self.best is not None and self.best.missed_pct <= MISS_LIMIT_PCT

    def attempt(self, points: tuple[Point, ...]) -> Counter:
        """Try a set-up; the frames that each app missed."""
        self.tried.add(points)
        placements = {}
        for app, point in zip(self.ladders, points, strict=True):
            placements[app] = _placement(point)
        policy = Static(self.name, placements, governors=self.governors)
        fewest_pct, _ = self.best_key
        trial = _try(policy, self.cases, max(fewest_pct, MISS_LIMIT_PCT))
        key = trial.missed_pct, -_accuracy_pct(points)
        if key < self.best_key:
            self.best, self.best_key = trial, key
        return trial.missed

    def walk(self) -> None:
        """Down the ladders, one network at a time, until few enough frames are missed."""
        rung = dict.fromkeys(self.ladders, 0)
        movable = [*rung] if all(self.ladders.values()) else []
        while movable:
            points = tuple(ladder[rung[app]] for app, ladder in self.ladders.items())
            movable = self.movable(rung, max) or self.movable(rung, min)
            if _fits(points, self.cap_mb):
                weight: Mapping[str, float] = self.attempt(points)
            else:
                weight = {app: p.memory_mb for app, p in zip(rung, points, strict=True)}
                # What cannot be loaded is worse than what serves below a floor.
                movable = movable or self.movable(rung, lambda floors: 0.0)
            if self.found:
                return
            if movable:
                worst = max(movable, key=weight.__getitem__)
                rung[worst] += 1

    def movable(self, rung: Mapping[str, int], of: Callable) -> list[str]:
        """The apps whose next network meets a floor of theirs, such as their `max`."""
        found = []
        for app, ladder in self.ladders.items():
            rest = ladder[rung[app] + 1 :]
            if rest and _meets(rest[0], of(self.floors[app])):
                found.append(app)
        return found

    def try_others(self) -> None:
        """All set-ups that meet every floor, the most accurate first, if they are not too many."""
        meeting = []
        for app, ladder in self.ladders.items():
            floor_pct = max(self.floors[app])
            meeting.append([point for point in ladder if _meets(point, floor_pct)])
        if math.prod(map(len, meeting)) > MAX_SETUPS:
            return
        for points in sorted(product(*meeting), key=_accuracy_pct, reverse=True):
            if points not in self.tried and _fits(points, self.cap_mb):
                self.attempt(points)
            if self.found:
                return


def _meets(point: Point, floor_pct: float) -> bool:
    return point.accuracy_val_pct >= floor_pct - _SAME_PCT


def _accuracy_pct(points: Iterable[Point]) -> float:
    """Sum of the accuracies, by which set-ups are ranked."""
    return sum(point.accuracy_val_pct for point in points)


def _fits(points: Iterable[Point], cap_mb: float) -> bool:
    return sum(point.memory_mb for point in points) <= cap_mb


def _least_mb(case: Case) -> float:
    """The least memory that the apps may hold together at any time."""
    return min(now.memory_mb for _, now in conditions(case.workload, case.board))


def best_static(
    make: Callable[[int], Case],
    seeds: Iterable[int] = TRIAL_SEEDS,
    name: str = "static",
) -> Static | None:
    """The best fixed networks, placements and clocks for a scenario, in hindsight.

    Settings are simulated in the order of the energy a run without misses would take, so the first
    that misses at most 1 % is the best. Where none does, as the workload asks for too much, it is
    the one of least energy per on-time frame among those that miss at most 1 % more than the one
    that misses fewest. Settings whose networks do not fit the least memory that the workload leaves
    to the apps do not count.

    None when no setting could serve every app; and when there are more than `MAX_TRIALS` and none
    of the first so many misses at most 1 %: nobody knows the best then, and the ones tried are
    those of least energy, not a fair sample.
    """
    cases = {seed: make(seed) for seed in seeds}
    first = next(iter(cases.values()))
    policies = sorted(_settings(name, first), key=lambda item: item[0])
    tried, fewest_pct = [], 100.0
    for _, policy in policies[:MAX_TRIALS]:
        trial = _try(policy, cases, MISS_LIMIT_PCT + fewest_pct)
        if trial.missed_pct <= MISS_LIMIT_PCT:
            return policy
        # One that was stopped early misses too many to be near, now and later.
        fewest_pct = min(fewest_pct, trial.missed_pct)
        tried.append(trial)
    if not tried or len(policies) > MAX_TRIALS:
        return None
    near_best = [trial for trial in tried if trial.missed_pct <= fewest_pct + MISS_LIMIT_PCT]
    return min(near_best, key=lambda trial: trial.energy_mj).policy


def ladder_of(table: PointTable, start_unit: str) -> list[Placement]:
    """The networks of a unit, most accurate first, without those that a faster one beats."""
    return [_placement(point) for point in _rungs(table, start_unit)]


def _rungs(table: PointTable, start_unit: str, cap_mb: float = math.inf) -> list[Point]:
    """As `ladder_of`, of the networks that take at most `cap_mb` alone."""
    unit = start_unit or table.main_unit
    points = table.on(unit)
    if not points:
        raise PolicyError(
            f"model {table.model!r} has no points on {unit!r}, expected one of {table.units}"
        )
    best, rungs = -1.0, []
    for point in points:
        if point.accuracy_val_pct > best and point.memory_mb <= cap_mb:
            best = point.accuracy_val_pct
            rungs.append(point)
    return rungs[::-1]


def _placement(point: Point) -> Placement:
    return Placement(point.subnet, point.unit, point.setting)


def _settings(name: str, case: Case):
    """(energy per second of use at full time, policy) of all settings that are not hopeless."""
    board, apps = case.board, case.workload.apps
    cap_mb = _least_mb(case)
    for points in product(*(_hopeful(case, app) for app in apps)):
        if not _fits(points, cap_mb):
            continue
        used = [board.unit(unit) for unit in sorted({point.unit for point in points})]
        for clocks in product(*(unit.freqs for unit in used)):
            clock = {unit.name: mhz for unit, mhz in zip(used, clocks, strict=True)}
            mean_mw = _mean_mw(case, points, clock)
            if mean_mw is not None:
                placements = {
                    app.name: _placement(point) for app, point in zip(apps, points, strict=True)
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
        and _meets(point, floor_pct)
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
