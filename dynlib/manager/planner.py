"""The manager's upper level: an operating point for every app, and a clock for every unit.

A pure function of demands and slowdowns. Each unit's frames must be schedulable (non-preemptive
earliest deadline first, any phase); among all that is, the objective decides.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynlib.manager.policy import Placement
from dynlib.points import Point, Tables
from dynlib.workload import Requirement

if TYPE_CHECKING:
    from dynlib.boards.board import Board

OBJECTIVES = ("energy", "accuracy", "latency")
MAX_ASSIGNMENTS = 128


class Candidates(NamedTuple):
    """Points of one model on one unit, fastest first; arrays (points,) and (clocks, points).

    Args:
        beaten_pct: accuracy of the best point that beats this one in time and power at every clock
            and takes no more memory.
        margin: factor from the mean execution time to the one planned with.
        time_ms, energy_uj: of a frame at each clock.
        fastest_ms, cheapest_uj: for each point, the best that it and those after it do at each
            clock; lists, which are quicker to go through than arrays so short.
        least_margin: for each point, of it and those after it.
        largest_mb: the most memory that any point takes.
    """

    points: tuple[Point, ...]
    accuracy_pct: np.ndarray
    beaten_pct: np.ndarray
    memory_mb: np.ndarray
    margin: np.ndarray
    time_ms: np.ndarray
    energy_uj: np.ndarray
    fastest_ms: list[list[float]]
    cheapest_uj: list[list[float]]
    least_margin: list[float]
    largest_mb: float

    @classmethod
    def of(cls, points: Iterable[Point], margin: Callable[[Point], float]) -> "Candidates":
        """All `points`, with the margin that `margin` gives each."""
        points = sorted(points, key=lambda p: (p.latency_ms[-1], -p.accuracy_val_pct))
        columns = ("accuracy_val_pct", "memory_mb", "latency_ms", "active_mw")
        arrays = (np.array([getattr(p, name) for p in points]) for name in columns)
        accuracy_pct, memory_mb, time_ms, power_mw = arrays
        costs = np.column_stack([time_ms, power_mw, memory_mb])
        beats = (costs[:, None] <= costs).all(axis=2)  # rows beat columns
        beats = np.triu(beats, 1)  # a faster one comes first; so does the first of equals
        beaten_pct = np.where(beats, accuracy_pct[:, None], -np.inf).max(axis=0)
        margins, energy_uj = np.array([margin(p) for p in points]), time_ms * power_mw
        best = (
            np.minimum.accumulate(a[::-1])[::-1].tolist() for a in (time_ms, energy_uj, margins)
        )
        by_clock = (np.ascontiguousarray(array.T) for array in (time_ms, energy_uj))
        return cls(
            tuple(points),
            accuracy_pct,
            beaten_pct,
            memory_mb,
            margins,
            *by_clock,
            *best,
            float(memory_mb.max()),
        )

    def useful(self, floor_pct: float, share_mb: float, *, unbeaten: bool) -> np.ndarray:
        """Ascending indices of the points that meet a floor and fit into memory; with `unbeaten`,
        where energy alone counts, without those that another such point beats."""
        floor_pct -= 1e-9
        kept = self.accuracy_pct >= floor_pct
        if unbeaten:
            kept &= self.beaten_pct < floor_pct
        if share_mb < self.largest_mb:
            kept &= self.memory_mb <= share_mb
        return kept.nonzero()[0]


class Demand(NamedTuple):
    """What one app wants. `jitter`: its frames do not come at known times."""

    app: str
    model: str
    need: Requirement
    jitter: bool
    priority: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Placements per app (None: refused) and clocks (MHz) per unit; `power_mw` is the expected mean
    above idle, `degraded` what is given up, in the order in which it was."""

    placements: Mapping[str, Placement | None]
    clocks: Mapping[str, float]
    power_mw: float
    accuracy_pct: float
    degraded: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether every demand is met."""
        return not self.degraded


class Rules(NamedTuple):
    """Memory for each app; and whether frames must be in time with the margin whatever the phases
    of the apps are (strict), or may be late now and then: the fastest points at the highest clock,
    if on average one after the other is in time."""

    share_mb: float
    strict: bool = True


class _Load(NamedTuple):
    """The apps of one unit: their points, the index of the clock, mean power, sum of accuracies."""

    points: tuple[Point, ...]
    index: int
    power_mw: float
    accuracy_pct: float


def schedulable(tasks: Sequence[tuple[float, float, float]]) -> bool:
    """Whether (execution, period, deadline) in ms always meet under non-preemptive EDF.

    Demand-bound test for sporadic tasks (Jeffay et al. 1991; George et al. 1996), sufficient for
    any phase: for every interval t the work due within t, plus the longest job due later that may
    just have started, takes at most t.
    """
    if any(c > d for c, _, d in tasks):
        return False
    load = sum([c / p for c, p, _ in tasks])
    if load > 1 - 1e-9:
        return False
    if len(tasks) == 1 and tasks[0][1] >= tasks[0][2]:
        return True
    busy_ms = sum([max(p - d, 0.0) * c / p for c, p, d in tasks]) / (1 - load)
    longest_ms = max([d for _, _, d in tasks])
    if busy_ms > 20 * longest_ms:
        return False  # so close to full that checking costs more than it is worth
    limit_ms = max(longest_ms, busy_ms)
    times = {d + k * p for _, p, d in tasks for k in range(int((limit_ms - d) // p) + 1)}
    for t in times:
        demand = blocking = 0.0
        for c, p, d in tasks:
            if d <= t:
                demand += (math.floor((t - d) / p + 1e-9) + 1) * c
            elif c > blocking:
                blocking = c
        if demand + blocking > t + 1e-9:
            return False
    return True


_alike = attrgetter("kind", "opps", "cores")


class Planner:
    """Chooses plans for one board and its tables.

    Args:
        objective: `energy`, least board energy that meets floors and deadlines; or `accuracy`, the
            highest sum of accuracies that meets the deadlines, then least energy. (`latency` plans
            as `energy` does: the least work; the lower level does it at the highest clock.)
        margin_sigma: execution times are taken so many standard deviations above their mean.
    """

    def __init__(self, board: "Board", tables: Tables, objective: str, margin_sigma: float):
        self.board, self.tables, self.objective = board, tables, objective
        self.margin_sigma = margin_sigma
        self._margins: dict[float, float] = {}
        self.plan = lru_cache(maxsize=512)(self._plan)
        self._twins = {
            unit.name: [twin.name for twin in board.units[:i] if _alike(twin) == _alike(unit)]
            for i, unit in enumerate(board.units)
        }
        self._every = {
            (model, unit): Candidates.of(table.on(unit), self.margin)
            for model, table in tables.items()
            for unit in table.units
        }
        self._candidates = lru_cache(maxsize=1024)(self._useful)
        self._best = lru_cache(maxsize=4096)(self._best_load)

    def margin(self, point: Point) -> float:
        """Factor from the mean execution time to the one planned with (log-normal noise)."""
        found = self._margins.get(point.noise_cv)
        if found is None:
            found = math.exp(self.margin_sigma * point.sigma)
            self._margins[point.noise_cv] = found
        return found

    def _plan(
        self,
        demands: tuple[Demand, ...],
        slowdowns: tuple[tuple[str, float], ...],
        limits: tuple[tuple[str, float], ...],
        memory_mb: float = math.inf,
    ) -> Plan:
        """The best plan; where demands cannot be met together, the declared order of giving up.

        From the least important app on (lowest priority, then last in `demands`): serve it below
        its floor; refuse it. The most important one is never refused: if it cannot be served alone
        in time it gets its fastest point that meets its floor (the fastest, if none does), at the
        highest clock.
        """
        if not demands:
            return Plan({}, {}, 0.0, 0.0)
        slow, limit = dict(slowdowns), dict(limits)
        kept, degraded = list(demands), []

        def place(*strict: bool):
            for rules in (Rules(memory_mb / len(kept), each) for each in strict):
                found = self._place(tuple(kept), slow, limit, rules)
                if found is not None:
                    return found
            return None

        ranks = sorted(range(len(demands)), key=lambda i: (demands[i].priority, -i))
        for weakest in (demands[i] for i in ranks):
            if (found := place(True, False)) is not None:
                break
            at = kept.index(weakest)
            kept[at] = weakest._replace(need=weakest.need._replace(floor_pct=0.0))
            if (found := place(True)) is not None:
                degraded.append(f"{weakest.app} below its floor")
                break
            if len(kept) == 1:
                return self._fastest(weakest, demands, slow, limit, (*degraded,))
            del kept[at]
            degraded.append(f"{weakest.app} refused")
        return self._merge(found, demands, tuple(degraded))

    def _place(self, demands, slow, limit, rules: Rules):
        units = [u.name for u in self.board.units if limit[u.name]]
        options = [[u for u in units if (d.model, u) in self._every] for d in demands]
        exhaustive = math.prod(map(len, options)) <= MAX_ASSIGNMENTS
        return (self._search if exhaustive else self._greedy)(demands, options, slow, limit, rules)

    def _search(self, demands, options, slow, limit, rules):
        best, best_score = None, None
        for units in product(*options):
            if not self._canonical(units, slow):
                continue
            loads = self._loads(demands, units, slow, limit, rules)
            if loads is not None:
                score = self._score(loads.values())
                if best_score is None or score < best_score:
                    best, best_score = loads, score
        return best

    def _greedy(self, demands, options, slow, limit, rules):
        """Insert the apps one by one where they cost least; important and heavy ones first."""
        order = sorted(
            range(len(demands)),
            key=lambda i: (-demands[i].priority, demands[i].need.period_ms, demands[i].app),
        )
        placed: list[tuple[Demand, str]] = []
        loads = None
        for i in order:
            best = None
            for unit in options[i]:
                some = [*placed, (demands[i], unit)]
                candidate = self._loads(*zip(*some, strict=True), slow, limit, rules)
                if candidate is None:
                    continue
                score = self._score(candidate.values())
                if best is None or score < best[0]:
                    best = score, unit, candidate
            if best is None:
                return None
            placed.append((demands[i], best[1]))
            loads = best[2]
        return loads

    def _loads(self, demands, units, slow, limit, rules):
        groups: dict[str, list[Demand]] = {}
        for demand, unit in zip(demands, units, strict=True):
            groups.setdefault(unit, []).append(demand)
        loads = {}
        for unit, group in groups.items():
            load = self._best(unit, tuple(group), slow[unit], limit[unit], rules)
            if load is None:
                return None
            loads[unit] = (group, load)
        return loads

    def _score(self, loads) -> tuple[float, float]:
        power_mw = sum(load.power_mw for _, load in loads)
        accuracy_pct = sum(load.accuracy_pct for _, load in loads)
        if self.objective != "accuracy":
            return power_mw, -accuracy_pct
        return -round(accuracy_pct, 9), power_mw

    def _canonical(self, units: Sequence[str], slow) -> bool:
        """Of assignments that differ only by swapping equal clusters, keep one."""
        first_use = list(dict.fromkeys(units))
        return not any(
            slow[twin] == slow[name] and twin not in first_use[:i]
            for i, name in enumerate(first_use)
            for twin in self._twins[name]
        )

    def _best_load(
        self, unit: str, demands: tuple[Demand, ...], slow: float, limit: float, rules: Rules
    ):
        spec, strict = self.board.unit(unit), rules.strict
        best, best_score, groups = None, None, []
        # Bounds per clock up to the limit: load of the fastest points, power of the cheapest ones.
        share = least_mw = [0.0] * bisect_right(spec.freqs, limit)
        for demand in demands:
            every = self._every[demand.model, unit]
            kept = self._candidates(demand.model, unit, demand.need.floor_pct, rules.share_mb)
            if not len(kept):
                return None
            kept, first = kept if strict else kept[:1], kept[0]
            margin = every.margin[kept] if strict else 1.0
            deadline_ms, period_ms, _ = demand.need
            groups.append((demand, every, kept, slow * margin))
            least = slow * (every.least_margin[first] if strict else 1.0)
            share = [
                some + ms * least / period_ms if ms * least <= deadline_ms else math.inf
                for some, ms in zip(share, every.fastest_ms[first], strict=False)
            ]
            least_mw = [
                some + uj * slow / period_ms
                for some, uj in zip(least_mw, every.cheapest_uj[first], strict=False)
            ]
        clocks = [i for i, some in enumerate(share) if some <= 1]
        if not strict:
            clocks = clocks[-1:]
        cheap_first = self.objective != "accuracy"
        if cheap_first:
            clocks.sort(key=least_mw.__getitem__)
        for index in clocks:
            if cheap_first and best_score is not None and least_mw[index] > best_score[0] + 1e-9:
                break
            load = self._load_at(spec, demands, groups, index, slow, best_score, strict)
            if load is not None:
                score = self._score([(demands, load)])
                if best_score is None or score < best_score:
                    best, best_score = load, score
        return best

    def _useful(self, model: str, unit: str, floor_pct: float, share_mb: float) -> np.ndarray:
        every = self._every[model, unit]
        return every.useful(floor_pct, share_mb, unbeaten=self.objective != "accuracy")

    def _load_at(self, spec, demands, groups, index: int, slow: float, beat, strict: bool):
        """The best points at one clock: from each app's own best, shrinking the heaviest."""
        ladders = []
        for demand, every, kept, factor in groups:
            planned_ms = every.time_ms[index].take(kept) * factor
            if demand.jitter:
                planned_ms += spec.settle_ms + spec.stall_ms
            fits = (planned_ms <= demand.need.deadline_ms).nonzero()[0]
            if not len(fits):
                return None
            top = 0
            if len(fits) > 1:
                those = kept.take(fits)
                keys = (-every.accuracy_pct.take(those), every.energy_uj[index].take(those))
                # The last key counts first.
                top = np.lexsort(keys if self.objective != "accuracy" else keys[::-1])[0]
            # Fastest first: everything before the favourite is a way to shrink.
            ladder = fits[: top + 1].tolist()
            ladders.append((every.points, kept, planned_ms, ladder))
        while True:
            chosen = [points[kept[ladder[-1]]] for points, kept, _, ladder in ladders]
            times = [float(planned_ms[ladder[-1]]) for _, _, planned_ms, ladder in ladders]
            power_mw = sum(
                [
                    p.active_mw[index] * p.latency_ms[index] * slow / d.need.period_ms
                    for p, d in zip(chosen, demands, strict=True)
                ]
            )
            load = _Load(tuple(chosen), index, power_mw, sum([p.accuracy_val_pct for p in chosen]))
            shrinkable = [i for i, ladder in enumerate(ladders) if len(ladder[-1]) > 1]
            if not shrinkable and beat is not None and self._score([(demands, load)]) >= beat:
                return None  # not worth asking whether it can be scheduled
            tasks = [
                (ms, d.need.period_ms, d.need.deadline_ms)
                for ms, d in zip(times, demands, strict=True)
            ]
            if schedulable(tasks) if strict else sum(c / min(p, d) for c, p, d in tasks) <= 1:
                return load
            if not shrinkable:
                return None
            ladders[max(shrinkable, key=lambda i: tasks[i][0] / tasks[i][1])][-1].pop()

    def planned_ms(
        self, point: Point, index: int, slow: float, demand: Demand, spec, strict: bool = True
    ) -> float:
        """Execution time to plan with; an unforeseen frame finds the clock still low."""
        wake_ms = spec.settle_ms + spec.stall_ms if demand.jitter else 0.0
        margin = self.margin(point) if strict else 1.0
        return point.latency_ms[index] * slow * margin + wake_ms

    def _merge(self, loads, demands, degraded) -> Plan:
        placements, clocks = {}, {}
        for unit, (group, load) in loads.items():
            clocks[unit] = self.board.unit(unit).freqs[load.index]
            for demand, point in zip(group, load.points, strict=True):
                placements[demand.app] = Placement(point.subnet, unit, point.setting)
        placements = {d.app: placements.get(d.app) for d in demands}
        power_mw = sum(load.power_mw for _, load in loads.values())
        accuracy_pct = sum(load.accuracy_pct for _, load in loads.values())
        return Plan(placements, clocks, power_mw, accuracy_pct, degraded)

    def _fastest(self, demand: Demand, demands, slow, limit, degraded) -> Plan:
        best = None
        for unit in self.board.units:
            points = self.tables[demand.model].on(unit.name)
            if not points or not limit[unit.name]:
                continue
            good = [p for p in points if p.accuracy_val_pct >= demand.need.floor_pct - 1e-9]
            point = (good or points)[0]
            ms = point.latency_ms[unit.freqs.index(limit[unit.name])] * slow[unit.name]
            score = not good, ms > demand.need.deadline_ms, ms
            if best is None or score < best[0]:
                best = score, point
        placements, clocks = dict.fromkeys(d.app for d in demands), {}
        if best is not None:
            placements[demand.app] = Placement(best[1].subnet, best[1].unit, best[1].setting)
            clocks[best[1].unit] = limit[best[1].unit]
        return Plan(placements, clocks, math.inf, 0.0, (*degraded, f"{demand.app} late"))
