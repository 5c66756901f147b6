"""The manager's upper level: an operating point for every app, and a clock for every unit.

A pure function of demands and slowdowns. Each unit's frames must be schedulable (non-preemptive
earliest deadline first, any phase); among all that is, the objective decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from dynlib.hardware.board import Board
from dynlib.runtime.state import Placement
from dynlib.runtime.tables import Point, Tables
from dynlib.runtime.workload import Requirement

OBJECTIVES = ("energy", "accuracy")
MAX_ASSIGNMENTS = 128


class Demand(NamedTuple):
    """What one app wants. `jitter`: its frames do not come at known times."""

    app: str
    model: str
    need: Requirement
    jitter: bool
    priority: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Placements per app and clocks (MHz) per unit; `power_mw` is the expected mean above idle."""

    placements: Mapping[str, Placement]
    clocks: Mapping[str, float]
    power_mw: float
    accuracy_pct: float
    feasible: bool = True


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
    load = sum(c / p for c, p, _ in tasks)
    if load > 1 - 1e-9:
        return False
    if len(tasks) == 1 and tasks[0][1] >= tasks[0][2]:
        return True
    busy_ms = sum(max(p - d, 0.0) * c / p for c, p, d in tasks) / (1 - load)
    longest_ms = max(d for *_, d in tasks)
    if busy_ms > 20 * longest_ms:
        return False  # so close to full that checking costs more than it is worth
    limit_ms = max(longest_ms, busy_ms)
    times = {d + k * p for _, p, d in tasks for k in range(int((limit_ms - d) // p) + 1)}
    for t in times:
        demand = sum((math.floor((t - d) / p + 1e-9) + 1) * c for c, p, d in tasks if d <= t)
        blocking = max((c for c, _, d in tasks if d > t), default=0.0)
        if demand + blocking > t + 1e-9:
            return False
    return True


class Planner:
    """Chooses plans for one board and its tables.

    Args:
        objective: `energy`, least board energy that meets floors and deadlines; or `accuracy`, the
            highest sum of accuracies that meets the deadlines, then least energy.
        margin_sigma: execution times are taken so many standard deviations above their mean.
    """

    def __init__(self, board: Board, tables: Tables, objective: str, margin_sigma: float):
        self.board, self.tables, self.objective = board, tables, objective
        self.margin_sigma = margin_sigma
        self.plan = lru_cache(maxsize=512)(self._plan)
        self._best = lru_cache(maxsize=4096)(self._best_load)

    def margin(self, point: Point) -> float:
        """Factor from the mean execution time to the one planned with (log-normal noise)."""
        return math.exp(self.margin_sigma * math.sqrt(math.log1p(point.noise_cv**2)))

    def _plan(
        self,
        demands: tuple[Demand, ...],
        slowdowns: tuple[tuple[str, float], ...],
        limits: tuple[tuple[str, float], ...],
    ) -> Plan:
        """The best plan; when nothing is feasible, the declared fallback (`Plan.feasible` False).

        Fallback: every app its fastest point that meets its floor (the fastest, if none does), all
        clocks at the highest allowed, spread so that the fullest unit is as empty as possible.
        """
        if not demands:
            return Plan({}, {}, 0.0, 0.0)
        slow, limit = dict(slowdowns), dict(limits)
        units = [unit.name for unit in self.board.units]
        options = [[u for u in units if self.tables[d.model].on(u)] for d in demands]
        count = math.prod(len(o) for o in options)
        exhaustive = count <= MAX_ASSIGNMENTS
        found = (self._search if exhaustive else self._greedy)(demands, options, slow, limit)
        if found is None:
            return self._fallback(demands, slow, limit)
        return self._merge(found, demands, limit)

    def _search(self, demands, options, slow, limit):
        best, best_score = None, None
        for units in product(*options):
            if not self._canonical(units, slow):
                continue
            loads = self._loads(demands, units, slow, limit)
            if loads is not None:
                score = self._score(loads.values())
                if best_score is None or score < best_score:
                    best, best_score = loads, score
        return best

    def _greedy(self, demands, options, slow, limit):
        """Insert the apps one by one where they cost least; important and heavy ones first."""
        order = sorted(range(len(demands)), key=lambda i: (
            -demands[i].priority, demands[i].need.period_ms, demands[i].app))  # fmt: skip
        placed: list[tuple[Demand, str]] = []
        loads = None
        for i in order:
            best = None
            for unit in options[i]:
                some = [*placed, (demands[i], unit)]
                candidate = self._loads(*zip(*some, strict=True), slow, limit)
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

    def _loads(self, demands, units, slow, limit):
        groups: dict[str, list[Demand]] = {}
        for demand, unit in zip(demands, units, strict=True):
            groups.setdefault(unit, []).append(demand)
        loads = {}
        for unit, group in groups.items():
            load = self._best(unit, tuple(group), slow[unit], limit[unit])
            if load is None:
                return None
            loads[unit] = (group, load)
        return loads

    def _score(self, loads) -> tuple[float, float]:
        power_mw = sum(load.power_mw for _, load in loads)
        accuracy_pct = sum(load.accuracy_pct for _, load in loads)
        if self.objective == "energy":
            return power_mw, -accuracy_pct
        return -round(accuracy_pct, 9), power_mw

    def _canonical(self, units: Sequence[str], slow) -> bool:
        """Of assignments that differ only by swapping equal clusters, keep one."""
        first_use = list(dict.fromkeys(units))
        for i, name in enumerate(first_use):
            unit = self.board.unit(name)
            for twin in self.board.units:
                if twin.name == name:
                    break
                same = (twin.kind, twin.opps, twin.cores) == (unit.kind, unit.opps, unit.cores)
                if same and slow[twin.name] == slow[name] and twin.name not in first_use[:i]:
                    return False
        return True

    def _best_load(self, unit: str, demands: tuple[Demand, ...], slow: float, limit: float):
        spec = self.board.unit(unit)
        best, best_score = None, None
        candidates = []
        for demand in demands:
            points = self.tables[demand.model].on(unit)
            floor_pct = demand.need.floor_pct - 1e-9
            candidates.append([p for p in points if p.accuracy_val_pct >= floor_pct])
        for index, mhz in enumerate(spec.freqs):
            if mhz > limit:
                break
            load = self._load_at(spec, demands, candidates, index, slow)
            if load is not None:
                score = self._score([(demands, load)])
                if best_score is None or score < best_score:
                    best, best_score = load, score
        return best

    def _load_at(self, spec, demands, candidates, index: int, slow: float) -> _Load | None:
        """The best points at one clock: from each app's own best, shrinking the heaviest."""
        ladders = []
        for demand, points in zip(demands, candidates, strict=True):
            fits = [
                p
                for p in points
                if self.planned_ms(p, index, slow, demand, spec) <= demand.need.deadline_ms
            ]
            if not fits:
                return None
            energy = {p.subnet: p.active_mw[index] * p.latency_ms[index] for p in fits}
            if self.objective == "energy":
                top = min(fits, key=lambda p: (energy[p.subnet], -p.accuracy_val_pct))
            else:
                top = max(fits, key=lambda p: (p.accuracy_val_pct, -energy[p.subnet]))
            # `fits` is sorted by latency: everything before the favourite is a way to shrink.
            ladders.append(fits[: fits.index(top) + 1])
        while True:
            chosen = [ladder[-1] for ladder in ladders]
            tasks = [
                (self.planned_ms(p, index, slow, d, spec), d.need.period_ms, d.need.deadline_ms)
                for p, d in zip(chosen, demands, strict=True)
            ]
            if schedulable(tasks):
                break
            shrinkable = [i for i, ladder in enumerate(ladders) if len(ladder) > 1]
            if not shrinkable:
                return None
            ladders[max(shrinkable, key=lambda i: tasks[i][0] / tasks[i][1])].pop()
        power_mw = sum(p.active_mw[index] * p.latency_ms[index] * slow / d.need.period_ms
                       for p, d in zip(chosen, demands, strict=True))  # fmt: skip
        return _Load(tuple(chosen), index, power_mw, sum(p.accuracy_val_pct for p in chosen))

    def planned_ms(self, point: Point, index: int, slow: float, demand: Demand, spec) -> float:
        """Execution time to plan with; an unforeseen frame finds the clock still low."""
        wake_ms = spec.settle_ms + spec.stall_ms if demand.jitter else 0.0
        return point.latency_ms[index] * slow * self.margin(point) + wake_ms

    def _merge(self, loads, demands, limit) -> Plan:
        placements, clocks = {}, {}
        for unit, (group, load) in loads.items():
            clocks[unit] = self.board.unit(unit).freqs[load.index]
            for demand, point in zip(group, load.points, strict=True):
                placements[demand.app] = Placement(point.subnet, unit)
        placements = {d.app: placements[d.app] for d in demands}
        power_mw = sum(load.power_mw for _, load in loads.values())
        accuracy_pct = sum(load.accuracy_pct for _, load in loads.values())
        return Plan(placements, clocks, power_mw, accuracy_pct)

    def _fallback(self, demands, slow, limit) -> Plan:
        placements, share = {}, dict.fromkeys(limit, 0.0)
        for demand in sorted(demands, key=lambda d: (-d.priority, d.app)):
            table, best = self.tables[demand.model], None
            for unit in table.units:
                points = table.on(unit)
                good = [p for p in points if p.accuracy_val_pct >= demand.need.floor_pct - 1e-9]
                point = (good or points)[0]
                index = self.board.unit(unit).freqs.index(limit[unit])
                ms = point.latency_ms[index] * slow[unit]
                late = ms > demand.need.deadline_ms
                used = share[unit] + ms / demand.need.period_ms
                score = (not good, late, used, ms)
                if best is None or score < best[0]:
                    best = score, point, used
            placements[demand.app] = Placement(best[1].subnet, best[1].unit)
            share[best[1].unit] = best[2]
        clocks = {p.unit: limit[p.unit] for p in placements.values()}
        ordered = {d.app: placements[d.app] for d in demands}
        return Plan(ordered, clocks, math.inf, 0.0, feasible=False)
