"""The manager's upper level: an operating point for every app, and a clock for every unit.

A pure function of demands and limits. The apps of a unit must be schedulable (non-preemptive
earliest deadline first, any phase) at its clock; among all that is, the objective decides. Where
not all can be, the least important apps of a unit share what time is left (`Plan.spare`).
"""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynlib.manager.policy import Placement

if TYPE_CHECKING:
    from dynlib.boards.board import Board
    from dynlib.points import Point, Tables

OBJECTIVES = ("energy", "accuracy", "latency", "balanced")
_ACCURACY_MW = 1e6  # per percent: more than any clock costs
_SEARCHED = 6  # apps that are moved about to save energy; more, only to be in time
_LIKELY = 0.9  # of its frames that an app which gets what time is left is given credit for
_SHORTER = 0.95  # an app that leaves room to others takes a point at least so much shorter


class Speed(NamedTuple):
    """Execution times of an app on a unit over those of its table: the present ones; the spread of
    their noise, over that of the table; the longest to plan for whatever the noise; and that of
    the sub-networks which are known by frames of their own."""

    typical: float = 1.0
    spread: float = 1.0
    peak: float = 1.0
    own: tuple[tuple[str, float], ...] = ()


class Demand(NamedTuple):
    """What one app wants.

    Args:
        table: name of its points.
        random: its frames do not come at known times.
        speeds: by unit, where another one than the table's.
        batch: many frames are due together, so that their noise averages out.
    """

    app: str
    table: str
    deadline_ms: float
    period_ms: float
    floor_pct: float
    random: bool = False
    priority: int = 0
    speeds: tuple[tuple[str, Speed], ...] = ()
    batch: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do until something changes.

    Args:
        placements: per app; None where memory does not suffice.
        clocks: MHz per unit that is used.
        spare: apps that get the time that others leave.
        hopeless: those of which no frame can be in time.
        degraded: what is given up, in words.
    """

    placements: Mapping[str, Placement | None]
    clocks: Mapping[str, float]
    spare: frozenset[str] = frozenset()
    hopeless: frozenset[str] = frozenset()
    degraded: tuple[str, ...] = ()


class _Points:
    """The points of one table on one unit, fastest first, as arrays (points, clocks).

    `beaten_pct`: accuracy of the best point that beats one in time and energy at every clock, and
    takes no more memory.
    """

    def __init__(self, points: Sequence["Point"]):
        self.points = points
        self.time_ms = np.array([p.latency_ms for p in points])
        self.energy_uj = self.time_ms * np.array([p.active_mw for p in points])
        columns = ("accuracy_val_pct", "memory_mb", "sigma")
        arrays = [np.array([getattr(p, name) for p in points]) for name in columns]
        self.accuracy_pct, self.memory_mb, self.sigma = arrays
        costs = np.column_stack([self.time_ms, self.energy_uj, self.memory_mb, self.sigma])
        beats = [(costs[:i] <= costs[i]).all(axis=1) for i in range(len(points))]
        self.beaten_pct = np.array(
            [self.accuracy_pct[: len(each)][each].max(initial=-1.0) for each in beats]
        )

    def allowed(self, floor_pct: float, most_mb: float, *, unbeaten: bool) -> np.ndarray:
        """Indices of the points above a floor, of at most such a size, or the smallest; `unbeaten`,
        where energy alone counts: that no other one of these beats."""
        floor_pct -= 1e-9
        kept = self.accuracy_pct >= floor_pct
        if unbeaten:
            kept &= self.beaten_pct < floor_pct
        if most_mb < math.inf:
            kept &= self.memory_mb <= max(most_mb, self.memory_mb.min())
        return kept.nonzero()[0]


class _Load(NamedTuple):
    """The apps of one unit: the share of frames given up, weighed by importance; what the rest
    costs; index of the clock; points; those that get what time is left, and without hope;
    whether there is too little."""

    lost: float
    cost: float
    clock: int
    points: Mapping[str, "Point"]
    spare: frozenset[str] = frozenset()
    hopeless: frozenset[str] = frozenset()
    crowded: bool = False

    @property
    def memory_mb(self) -> float:
        return sum(point.memory_mb for point in self.points.values())


def schedulable(tasks: Sequence[tuple[float, float, float]]) -> bool:
    """Whether (execution, period, deadline) in ms always meet under non-preemptive EDF.

    Demand-bound test for sporadic tasks (Jeffay et al. 1991; George et al. 1996), sufficient for
    any phase: for every interval t the work due within t, plus the longest job due later that may
    just have started, takes at most t.
    """
    if not tasks:
        return True
    load = sum([c / p for c, p, _ in tasks])
    if load > 1 - 1e-9 or any(c > d for c, _, d in tasks):
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
        due = sum([(math.floor((t - d) / p + 1e-9) + 1) * c for c, p, d in tasks if d <= t])
        blocking = max([c for c, _, d in tasks if d > t], default=0.0)
        if due + blocking > t + 1e-9:
            return False
    return True


def queue_ms(ms: float, period_ms: float, target: float) -> float:
    """How long frames that come at random every `period_ms` and take `ms` wait at most, but for
    the share `target`: M/D/1 in heavy traffic (Kingman 1962)."""
    load = ms / period_ms
    if load >= 1:
        return math.inf
    return max(math.log(load / target), 0.0) * ms / (2 * (1 - load))


class Planner:
    """Chooses plans for one board and its tables.

    Args:
        objective: `accuracy`, the highest sum of accuracies, then least energy; else least energy.
        target: share of frames that may be late.
    """

    def __init__(self, board: "Board", tables: "Tables", objective: str, target: float):
        self.units = {unit.name: unit for unit in board.units}
        self.objective, self.target = objective, target
        # What is known of speed and noise is an estimate too: a quarter of the target is for noise.
        self.z = NormalDist().inv_cdf(1 - target / 4)
        self.on = {
            (name, unit): _Points(table.on(unit))
            for name, table in tables.items()
            for unit in table.units
        }
        self.plan = lru_cache(maxsize=256)(self._plan)
        self.load = lru_cache(maxsize=4096)(self._load)
        self.choice = lru_cache(maxsize=1024)(self._choice)
        self.attainable = lru_cache(maxsize=256)(self._attainable)

    def margin(self, point: "Point", speed: Speed) -> float:
        """Longest to typical time of a frame, but for the target."""
        for subnet, peak in speed.own:
            if subnet == point.subnet:
                return peak / speed.typical
        sigma = point.sigma
        return max(math.exp(self.z * speed.spread * sigma), speed.peak / speed.typical)

    def _plan(
        self,
        demands: tuple[Demand, ...],
        limits: tuple[tuple[str, float], ...],
        memory_mb: float = math.inf,
    ) -> Plan:
        """The best plan.

        Where memory is short no network is larger than a size that is as large as possible; where
        not even the smallest ones fit together, the least important app is not served.
        """
        kept = [self.attainable(demand, limits) for demand in demands]
        kept.sort(key=lambda d: (-d.priority, d.period_ms, d.app))

        def needed_mb(most_mb: float) -> float:
            return sum(load.memory_mb for load in self._search(kept, limits, most_mb).values())

        most_mb, degraded = math.inf, []
        if math.isfinite(memory_mb) and needed_mb(math.inf) > memory_mb:
            most_mb = 0.0
            while kept and needed_mb(most_mb) > memory_mb:
                degraded.append(f"{kept.pop().app} refused: memory")
            sizes = sorted({mb for some in self.on.values() for mb in some.memory_mb.tolist()})
            most_mb = [0.0, *sizes][bisect(sizes, memory_mb, key=needed_mb)]
        loads = self._search(kept, limits, most_mb)
        placements: dict[str, Placement | None] = dict.fromkeys(demand.app for demand in demands)
        clocks: dict[str, float] = {}
        for unit, load in loads.items():
            clocks[unit] = self.units[unit].freqs[load.clock]
            for app, point in load.points.items():
                placements[app] = Placement(point.subnet, unit, point.setting)
        spare, hopeless = (
            frozenset().union(*(getattr(load, what) for load in loads.values()))
            for what in ("spare", "hopeless")
        )
        below = {demand.app for demand in demands if demand not in kept}
        for what, apps in (
            ("late", hopeless),
            ("below its floor", below),
            ("now and then", spare - hopeless - below),
        ):
            degraded += [f"{app} {what}" for app in sorted(apps)]
        crowded = [load.spare for load in loads.values() if load.crowded]
        return Plan(placements, clocks, frozenset().union(*crowded), hopeless, tuple(degraded))

    def _attainable(self, demand: Demand, limits) -> Demand:
        """Without its floor, where a network is in time, but none above it."""
        best_pct = -1.0
        for unit, mhz in limits:
            here = self.on.get((demand.table, unit))
            if here and mhz:
                ms = here.time_ms[:, self.units[unit].freqs.index(mhz)]
                ms = ms * dict(demand.speeds).get(unit, Speed()).typical
                in_time = here.accuracy_pct[ms <= demand.deadline_ms]
                best_pct = max(best_pct, in_time.max(initial=-1.0))
        lost = 0 <= best_pct < demand.floor_pct - 1e-9
        return demand._replace(floor_pct=0.0) if lost else demand

    def _search(self, demands, limits, most_mb: float) -> dict[str, _Load]:
        """Unit -> load: from where each app would be best off alone, by moving the one that it pays
        most to move, as long as it does."""
        limit = {unit: mhz for unit, mhz in limits if mhz}
        options = {d: [unit for unit in limit if (d.table, unit) in self.on] for d in demands}

        def loads(where: Mapping[Demand, str]) -> dict[str, _Load]:
            groups: dict[str, tuple[Demand, ...]] = {}
            for demand, unit in where.items():
                groups[unit] = (*groups.get(unit, ()), demand)
            return {u: self.load(u, group, limit[u], most_mb) for u, group in groups.items()}

        def score(where: Mapping[Demand, str]) -> tuple[float, float]:
            found = loads(where).values()
            return round(sum([load.lost for load in found]), 6), sum([load.cost for load in found])

        best = {
            d: min(units, key=lambda u, d=d: score({d: u})) if len(units) > 1 else units[0]
            for d, units in options.items()
            if units
        }
        while len(best) <= _SEARCHED or score(best)[0]:
            moves = [best | {d: unit} for d in best for unit in options[d] if unit != best[d]]
            better = min(moves, key=score, default=best)
            if score(better) >= score(best):
                break
            best = better
        return loads(best)

    def _choice(self, demand: Demand, unit: str, limit_mhz: float, most_mb: float, strict: bool):
        """(points, planned times, costs, least costs, least shares of the time): what `demand`
        could do on `unit` up to a clock; arrays (clocks, points), costs inf where it could not, and
        (clocks,). With networks of at most `most_mb`, or the smallest; `strict`: with the margin,
        else the fastest alone."""
        here, spec = self.on[demand.table, unit], self.units[unit]
        speed = dict(demand.speeds).get(unit, Speed())
        clocks = spec.freqs.index(limit_mhz) + 1
        unbeaten = self.objective != "accuracy"
        kept = here.allowed(demand.floor_pct, most_mb, unbeaten=unbeaten)
        if not strict:
            kept = kept[:1]
        planned_ms = here.time_ms[kept, :clocks].T * speed.typical
        if strict and not demand.batch:
            planned_ms *= [self.margin(here.points[i], speed) for i in kept]
        needed_ms = planned_ms
        if demand.random:  # such a frame finds the clock low, and others before it
            needed_ms = planned_ms + spec.settle_ms + spec.stall_ms
            if strict:
                last_ms = planned_ms[-1].tolist()
                needed_ms += [queue_ms(ms, demand.period_ms, self.target) for ms in last_ms]
        cost = here.energy_uj[kept, :clocks].T * (speed.typical / demand.period_ms)
        if self.objective == "accuracy":
            cost -= _ACCURACY_MW * here.accuracy_pct[kept]
        in_time = needed_ms <= demand.deadline_ms
        cost = np.where(in_time, cost, np.inf)
        least = cost.min(axis=1, initial=np.inf)
        shares = planned_ms.min(axis=1, where=in_time, initial=np.inf) / demand.period_ms
        return [here.points[i] for i in kept], planned_ms, cost, least, shares

    def _likely(self, demand: Demand, unit: str, point: "Point", limit_mhz: float) -> float:
        """Share of the frames of an app, of which not all are in time, that it has credit for: of
        those that are at the highest clock, were it alone."""
        speed = dict(demand.speeds).get(unit, Speed())
        ms = point.latency_ms[self.units[unit].freqs.index(limit_mhz)] * speed.typical
        room = math.log(demand.deadline_ms / ms) / (point.sigma * speed.spread + 1e-9)
        return _LIKELY * NormalDist().cdf(room)

    def _least_share(self, demand: Demand, unit: str) -> float:
        return self.on[demand.table, unit].time_ms.min() / demand.period_ms

    def _load(self, unit: str, group: tuple[Demand, ...], limit_mhz: float, most_mb: float):
        """The best load: the most important apps in time; those of one importance that are not
        share what is left, so that none of them is given up for another."""
        group = sorted(group, key=lambda d: (-d.priority, self._least_share(d, unit), d.app))
        ranks = [demand.priority for demand in group]
        counts = sorted({len(group), *map(ranks.index, ranks)} - {0}, reverse=True)
        tries = [(count, True) for count in counts]
        if counts[-1] == 1:
            tries.append((1, False))  # one may be late now and then
        for count, strict in tries:
            firm = group[:count]
            choices = [self.choice(demand, unit, limit_mhz, most_mb, strict) for demand in firm]
            load = self._together(firm, choices, strict)
            if load is not None:
                if not strict:
                    likely = self._likely(firm[0], unit, load.points[firm[0].app], limit_mhz)
                    load = load._replace(lost=10.0 ** ranks[0] * (1 - likely))
                break
        else:
            firm, load = [], _Load(0.0, 0.0, 0, {})
        return self._with_spare(unit, load, firm, group[len(firm) :], limit_mhz, most_mb)

    def _together(self, demands, choices, strict: bool):
        """The cheapest load at which all are in time; None without."""
        least = sum(best for *_, best, _ in choices).tolist()
        best = None
        clocks = [len(least) - 1]
        if strict:  # not at clocks at which there is no time for all, whatever they take
            lowest = int((sum(shares for *_, shares in choices) >= 1).sum())
            clocks = sorted(range(lowest, len(least)), key=least.__getitem__)
        for clock in clocks:
            if least[clock] >= (best.cost if best else math.inf):
                break
            times = [planned_ms[clock] for _, planned_ms, *_ in choices]
            costs = [cost[clock] for _, _, cost, *_ in choices]
            picks = self._at(demands, times, costs, strict)
            cost = sum(cost[i] for cost, i in zip(costs, picks, strict=False))
            if picks and (best is None or cost < best.cost):
                pairs = zip(demands, choices, picks, strict=True)
                points = {demand.app: some[i] for demand, (some, *_), i in pairs}
                best = _Load(0.0, float(cost), clock, points)
        return best

    def _at(self, demands, times, costs, strict: bool) -> list[int]:
        """The best point of each app at one clock such that all are in time; none without.

        Each begins with its cheapest. While they are not in time together, the one that takes most
        of the unit takes its cheapest among those that are shorter.
        """
        while True:
            picks = [int(cost.argmin()) for cost in costs]
            tasks = [self._task(d, ms[i]) for d, ms, i in zip(demands, times, picks, strict=True)]
            if schedulable(tasks) if strict else sum([c / min(p, d) for c, p, d in tasks]) <= 1:
                return picks
            shares = [c / p for c, p, _ in tasks]
            for heaviest in sorted(range(len(tasks)), key=lambda i: -shares[i]):
                shorter = times[heaviest] <= _SHORTER * tasks[heaviest][0]
                cost = np.where(shorter, costs[heaviest], np.inf)
                if np.isfinite(cost).any():
                    costs[heaviest] = cost
                    break
            else:
                return []

    def _task(self, demand: Demand, ms: float) -> tuple[float, float, float]:
        """(execution, period, deadline); an earlier deadline where frames queue."""
        due_ms = min(demand.deadline_ms, 10 * demand.period_ms)
        if demand.random:
            due_ms = demand.deadline_ms - queue_ms(ms, demand.period_ms, self.target)
        return float(ms), demand.period_ms, due_ms

    def _with_spare(self, unit: str, load: _Load, firm, spare, limit_mhz: float, most_mb: float):
        """The load with the apps that get what time those in `firm` leave at the highest clock:
        each its fastest network above its floor."""
        if not spare:
            return load
        top = self.units[unit].freqs.index(limit_mhz)

        def times_ms(demand: Demand) -> np.ndarray:
            speed = dict(demand.speeds).get(unit, Speed())
            return self.on[demand.table, unit].time_ms[:, top] * speed.typical

        left, lost, cost, points = 1.0, load.lost, load.cost, dict(load.points)
        for demand in firm:
            chosen = self.on[demand.table, unit].points.index(points[demand.app])
            left -= times_ms(demand)[chosen] / demand.period_ms
        hopeless = set()
        for demand in spare:
            here, ms = self.on[demand.table, unit], times_ms(demand)
            small = here.memory_mb <= max(most_mb, here.memory_mb.min())
            above = small & (here.accuracy_pct >= demand.floor_pct - 1e-9)
            i = int(np.where(above if above.any() else small, ms, np.inf).argmin())
            need, served = ms[i] / demand.period_ms, 0.0
            if ms[i] > demand.deadline_ms:
                hopeless.add(demand.app)
                # The nearer the better.
                lost += 10.0**demand.priority * min(float(ms[i]) / demand.deadline_ms, 100.0) / 1000
            else:
                served = min(max(left, 0.0) / need, 1.0)
                left -= served * need
                cost += float(served * here.energy_uj[i, top] / demand.period_ms)
            served *= self._likely(demand, unit, here.points[i], limit_mhz)
            lost += 10.0**demand.priority * (1 - float(served))
            points[demand.app] = here.points[i]
        names = frozenset(demand.app for demand in spare)
        clock = load.clock if len(hopeless) == len(spare) else top
        # Where all fit, but for margins, nobody has to make room for anybody.
        crowded = left < 1e-9 or bool(hopeless)
        return _Load(lost, cost, clock, points, names, frozenset(hopeless), crowded)
