"""The manager's upper level: an operating point for every app, and a clock for every unit.

A pure function of demands and limits. The apps of a unit must be schedulable (non-preemptive
earliest deadline first, any phase) at its clock; among all that is, the objective decides. Where
not all can be, the least important apps of a unit get what time is left (`Plan.spare`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynlib.manager.policy import Placement

if TYPE_CHECKING:
    from dynlib.boards.board import Board
    from dynlib.points import Point, Tables

OBJECTIVES = ("energy", "accuracy", "latency", "balanced")
MAX_ASSIGNMENTS = 128  # of apps to units, that are all tried
_ACCURACY_MW = 1e6  # per percent: more than any clock costs
_LIKELY = 0.9  # share of its frames that an app which gets what time is left is given credit for
_STAY = 0.02  # of its power: what moving has to save
_SHORTER = 0.95  # an app that leaves room to others takes a point at least so much shorter


class Speed(NamedTuple):
    """Execution times of an app on a unit over those of its table: the present ones; the spread of
    their noise, over that of the table; and the longest to plan for whatever the noise."""

    typical: float = 1.0
    spread: float = 1.0
    peak: float = 1.0


class Demand(NamedTuple):
    """What one app wants. `table`: the name of its points; `random`: its frames do not come at
    known times; `speeds`: by unit, where another one than the table's; `batch`: many are due together,
    so that their noise averages out."""

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


class _Load(NamedTuple):
    """The apps of one unit: their points, the index of its clock, the share of frames given up,
    weighed by importance, and what the rest costs."""

    points: Mapping[str, "Point"]
    clock: int
    lost: float
    cost: float
    spare: tuple[str, ...] = ()
    hopeless: tuple[str, ...] = ()
    below: tuple[str, ...] = ()


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


def queue_ms(ms: float, period_ms: float, target: float) -> float:
    """How long frames that come at random every `period_ms` and take `ms` wait at most, but for
    the share `target`: M/D/1 in heavy traffic (Kingman 1962)."""
    load = ms / period_ms
    if load >= 1:
        return math.inf
    return max(math.log(load / target), 0.0) * ms / (2 * (1 - load))


class _Points:
    """The points of one table on one unit, as arrays (clocks, points)."""

    def __init__(self, points: Sequence["Point"]):
        self.points = points
        self.time_ms = np.array([p.latency_ms for p in points]).T
        self.energy_uj = self.time_ms * np.array([p.active_mw for p in points]).T
        self.accuracy_pct = np.array([p.accuracy_val_pct for p in points])
        self.memory_mb = np.array([p.memory_mb for p in points])
        self.sigma = np.array([p.sigma for p in points])


class _Choice(NamedTuple):
    """What an app could do on a unit, arrays (clocks, points): times planned with, and costs, inf
    where a point does not do."""

    points: Sequence["Point"]
    planned_ms: np.ndarray
    cost: np.ndarray
    best: np.ndarray


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

    def margin(self, sigma: float, speed: Speed) -> float:
        """Longest to typical time of a frame, but for the target."""
        return max(math.exp(self.z * speed.spread * sigma), speed.peak / speed.typical)

    def _plan(
        self,
        demands: tuple[Demand, ...],
        limits: tuple[tuple[str, float], ...],
        memory_mb: float = math.inf,
        present: tuple[tuple[str, str], ...] = (),
    ) -> Plan:
        """The best plan; `present`: where apps are now.

        Memory is shared as it comes: no network above a size that is as large as possible. Where
        not even the smallest ones fit together, the least important app is not served.
        """
        demands = tuple(sorted(demands, key=lambda d: (-d.priority, d.period_ms, d.app)))
        refused: tuple[str, ...] = ()
        kept = demands
        while kept:
            found = self._fitting(kept, limits, memory_mb, dict(present))
            if found is not None:
                break
            refused = (*refused, kept[-1].app)
            kept = kept[:-1]
        placements = {demand.app: None for demand in demands}
        clocks, spare, hopeless = {}, [], []
        degraded = [f"{app} refused: memory" for app in refused]
        for unit, load in (found if kept else {}).items():
            clocks[unit] = self.units[unit].freqs[load.clock]
            for app, point in load.points.items():
                placements[app] = Placement(point.subnet, unit, point.setting)
            spare += load.spare
            hopeless += load.hopeless
            degraded += [f"{app} below its floor" for app in load.below]
        degraded += [f"{app} late" for app in hopeless]
        degraded += [f"{app} now and then" for app in spare if app not in hopeless]
        return Plan(placements, clocks, frozenset(spare), frozenset(hopeless), tuple(degraded))

    def _fitting(self, demands, limits, memory_mb: float, present: Mapping[str, str]):
        """The best loads whose networks fit together; None where there are none."""
        found = self._search(demands, limits, math.inf, present)
        if found is None or _memory_mb(found) <= memory_mb:
            return found
        pairs = [(d.table, unit) for d in demands for unit in self.units]
        sizes = {mb for pair in pairs if pair in self.on for mb in self.on[pair].memory_mb.tolist()}
        sizes, best = sorted(sizes), None
        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            found = self._search(demands, limits, sizes[middle], present)
            if _memory_mb(found) <= memory_mb:
                best, low = found, middle + 1
            else:
                high = middle
        return best

    def _search(self, demands, limits, most_mb: float, present: Mapping[str, str]):
        """Unit -> load: of all assignments to units if they are few; else by moving one app at a
        time as long as that pays, from where each would be best off alone."""
        limit = {unit: mhz for unit, mhz in limits if mhz}
        options = {d: [unit for unit in limit if (d.table, unit) in self.on] for d in demands}
        demands = [demand for demand in demands if options[demand]]

        def loads(where: Mapping[Demand, str]) -> dict[str, _Load]:
            groups: dict[str, list[Demand]] = {}
            for demand in demands:
                groups.setdefault(where[demand], []).append(demand)
            return {
                unit: self.load(unit, tuple(group), limit[unit], most_mb)
                for unit, group in groups.items()
            }

        def score(where: Mapping[Demand, str]) -> tuple[float, float]:
            found = loads(where).values()
            return round(sum(load.lost for load in found), 6), sum(load.cost for load in found)

        def alone(demand: Demand, unit: str) -> tuple[float, float]:
            load = self.load(unit, (demand,), limit[unit], most_mb)
            return load.lost, load.cost

        best = {d: min(options[d], key=partial(alone, d)) for d in demands}
        if math.prod(map(len, options.values())) <= MAX_ASSIGNMENTS:
            units = product(*(options[demand] for demand in demands))
            best = min((dict(zip(demands, each, strict=True)) for each in units), key=score)
        else:
            improves = True
            while improves:
                moves = [best | {d: unit} for d in demands for unit in options[d]]
                better = min(moves, key=score)
                improves = score(better) < (score(best)[0], score(best)[1] - 1e-9)
                best = better if improves else best
        stay = {d: present.get(d.app, best[d]) for d in demands}
        if stay != best and all(stay[d] in options[d] for d in demands):
            (lost, cost), (least_lost, least_cost) = score(stay), score(best)
            if lost <= least_lost and cost - least_cost <= _STAY * abs(least_cost):
                best = stay
        return loads(best)

    def _choice(self, demand: Demand, unit: str, limit_mhz: float, most_mb: float, strict: bool):
        """What `demand` could do on `unit` up to a clock, with networks of at most `most_mb`, or
        its smallest; `strict`: with the margin."""
        here, spec = self.on[demand.table, unit], self.units[unit]
        speed = dict(demand.speeds).get(unit, Speed())
        clocks = spec.freqs.index(limit_mhz) + 1
        times_ms = here.time_ms[:clocks] * speed.typical
        planned_ms = times_ms
        if strict and not demand.batch:
            planned_ms = times_ms * [self.margin(sigma, speed) for sigma in here.sigma]
        allowed = here.accuracy_pct >= demand.floor_pct - 1e-9
        allowed &= here.memory_mb <= max(most_mb, here.memory_mb.min())
        needed_ms = planned_ms
        if demand.random:  # such a frame finds the clock low, and others before it
            needed_ms = planned_ms + spec.settle_ms + spec.stall_ms
            if strict:
                wait_ms = [queue_ms(ms, demand.period_ms, self.target) for ms in planned_ms[-1]]
                needed_ms = needed_ms + wait_ms
        if not strict:  # the fastest of them is late least often
            fastest = np.where(allowed, times_ms[-1], np.inf).argmin()
            allowed = allowed & (np.arange(len(here.points)) == fastest)
        cost = here.energy_uj[:clocks] * (speed.typical / demand.period_ms)
        if self.objective == "accuracy":
            cost = cost - _ACCURACY_MW * here.accuracy_pct
        cost = np.where(allowed & (needed_ms <= demand.deadline_ms), cost, np.inf)
        return _Choice(here.points, planned_ms, cost, cost.min(axis=1))

    def _load(self, unit: str, group: tuple[Demand, ...], limit_mhz: float, most_mb: float):
        """The best load: as many apps as possible in time, the most important ones, then those that
        take least of the unit."""
        top = self.units[unit].freqs.index(limit_mhz)

        def claim(demand: Demand) -> tuple[float, float, str]:
            share = self.on[demand.table, unit].time_ms[top].min() / demand.period_ms
            return -demand.priority, share, demand.app

        group = sorted(group, key=claim)
        ranks = [demand.priority for demand in group]
        # Equals share what there is: none of them is given up for another.
        tries = [(ranks.index(rank), True) for rank in {*ranks} if rank < ranks[0]]
        tries = sorted([*tries, (len(group), True)], reverse=True)
        for count, strict in [*tries, (ranks.count(ranks[0]), False)]:
            firm = group[:count]
            choices = [self.choice(demand, unit, limit_mhz, most_mb, strict) for demand in firm]
            found = self._together(firm, choices, strict)
            if found is not None:
                return self._with_spare(unit, found, firm, group[count:], limit_mhz, most_mb)
        return self._with_spare(unit, _Load({}, 0, 0.0, 0.0), (), group, limit_mhz, most_mb)

    def _together(self, demands: Sequence[Demand], choices: Sequence[_Choice], strict: bool):
        """The cheapest points and clock at which all are in time; None without."""
        least = np.sum([choice.best for choice in choices], axis=0)
        best = None
        order = np.argsort(least, kind="stable") if strict else [len(least) - 1]
        for clock in order:
            if not math.isfinite(least[clock]) or (best and least[clock] >= best.cost):
                break
            picks = self._at(int(clock), demands, choices, strict)
            if picks is None:
                continue
            cost = sum(c.cost[clock, i] for c, i in zip(choices, picks, strict=True))
            if best is None or cost < best.cost:
                pairs = zip(demands, choices, picks, strict=True)
                points = {demand.app: choice.points[i] for demand, choice, i in pairs}
                best = _Load(points, int(clock), 0.0, float(cost))
        return best

    def _at(self, clock: int, demands, choices: Sequence[_Choice], strict: bool):
        """The best point of each app at one clock such that all are in time; None without.

        Each begins with its cheapest. While they are not in time together, the one that takes most
        of the unit takes its cheapest among those that are shorter.
        """
        costs = [choice.cost[clock].copy() for choice in choices]
        times = [choice.planned_ms[clock] for choice in choices]
        while True:
            picks = [int(cost.argmin()) for cost in costs]
            tasks = [
                (float(ms[i]), d.period_ms, self._due_ms(d, float(ms[i])))
                for ms, i, d in zip(times, picks, demands, strict=True)
            ]
            if strict and schedulable(tasks):
                return picks
            if not strict and sum([c / min(p, d) for c, p, d in tasks]) <= 1:
                return picks
            shares = [c / p for c, p, _ in tasks]
            for heaviest in sorted(range(len(tasks)), key=lambda i: -shares[i]):
                cost, ms = costs[heaviest], times[heaviest]
                shorter = np.where(ms <= _SHORTER * tasks[heaviest][0], cost, np.inf)
                if np.isfinite(shorter).any():
                    costs[heaviest] = shorter
                    break
            else:
                return None

    def _due_ms(self, demand: Demand, ms: float) -> float:
        """The deadline of a task; earlier where frames queue."""
        if not demand.random:
            return min(demand.deadline_ms, 10 * demand.period_ms)
        return demand.deadline_ms - queue_ms(ms, demand.period_ms, self.target)

    def _with_spare(self, unit: str, load: _Load, firm, spare, limit_mhz: float, most_mb: float):
        """`load`, of the apps `firm`, and those that get what it leaves at the highest clock: each
        its fastest network that meets its floor, else the best below it that is in time."""
        if not spare:
            return load
        top = self.units[unit].freqs.index(limit_mhz)
        points, lost, cost = dict(load.points), 0.0, load.cost
        hopeless, below = [], []
        speeds = {demand: dict(demand.speeds).get(unit, Speed()) for demand in (*firm, *spare)}
        left = 1.0
        for demand in firm:
            ms = points[demand.app].latency_ms[top] * speeds[demand].typical
            left -= ms / demand.period_ms
        for demand in spare:
            here, speed = self.on[demand.table, unit], speeds[demand]
            ms = here.time_ms[top] * speed.typical
            fits = here.memory_mb <= max(most_mb, here.memory_mb.min())
            in_time = fits & (ms <= demand.deadline_ms)
            above = fits & (here.accuracy_pct >= demand.floor_pct - 1e-9)
            good = in_time & above
            if good.any():
                i = int(np.where(good, ms, np.inf).argmin())
            elif in_time.any():
                i = int(np.where(in_time, here.accuracy_pct, -np.inf).argmax())
                below.append(demand.app)
            else:
                i = int(np.where(above if above.any() else fits, ms, np.inf).argmin())
                hopeless.append(demand.app)
            need = float(ms[i]) / demand.period_ms
            share = min(max(left, 0.0) / need, 1.0) if in_time[i] else 0.0
            left -= share * need
            lost += 10.0**demand.priority * (1 - _LIKELY * share * bool(good[i]))
            cost += share * float(here.energy_uj[top, i]) * speed.typical / demand.period_ms
            points[demand.app] = here.points[i]
        clock = load.clock if len(hopeless) == len(spare) else top
        names = tuple(demand.app for demand in spare)
        return _Load(points, clock, lost, cost, names, tuple(hopeless), tuple(below))


def _memory_mb(loads: Mapping[str, _Load]) -> float:
    return sum(point.memory_mb for load in loads.values() for point in load.points.values())
