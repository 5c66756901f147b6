"""The hierarchical manager: operating points above, clocks below.

Upper level (`planner`): whenever requirements, limits or the measured slowdown of a unit change,
every app gets the operating point, and every unit the clock, that meet floors and deadlines best.
Lower level, at every frame: the planned clock, or the lowest one above it that still meets the
deadlines of the frames at hand; the lowest clock between frames, raised in time for the next.

It knows of competitors only through measured times. `decide` is pure: its memory travels through
`Action.memory` and `State.memory`.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from dynlib import DynlibError
from dynlib.hardware.board import Board
from dynlib.runtime.planner import OBJECTIVES, Demand, Plan, Planner, schedulable
from dynlib.runtime.state import Action, AppState, State
from dynlib.runtime.tables import Tables
from dynlib.runtime.workload import CLOSED_LOOP, Requirement

_SAFETY_MS = 0.1


class Slowdown(NamedTuple):
    """Measured over expected time on one unit: the estimate, the one planned with, last low one."""

    mean: float = 1.0
    used: float = 1.0
    low: float | None = None


class Memory(NamedTuple):
    """What the manager remembers between two decisions."""

    slowdowns: Mapping[str, Slowdown]
    key: tuple = ()
    plan: Plan | None = None
    since_ms: float = -math.inf


class Manager:
    """The hierarchical manager as a policy (see `dynlib.runtime.state`).

    Args:
        objective: `energy` (default): least board energy such that every floor and deadline is met;
            `accuracy`: highest accuracy such that every deadline is met, then least energy.
        margin_sigma: planned execution times lie so many standard deviations above the mean. The
            default was chosen on seeds 100 to 104; evaluate on others.
        dwell_ms: a change that nothing forces (a better plan, not a broken one) waits so long after
            the last change and must save `gain_pct` of the power above idle.
    """

    name = "manager"
    order = "edf"
    static = False
    governors: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        board: Board,
        tables: Tables,
        *,
        objective: str = "energy",
        margin_sigma: float = 2.3,
        dwell_ms: float = 500.0,
        gain_pct: float = 2.0,
    ):
        if objective not in OBJECTIVES:
            raise DynlibError(f"unknown objective {objective!r}; expected one of {OBJECTIVES}")
        self.board, self.tables = board, tables
        self.units = {unit.name: unit for unit in board.units}
        self.index = {u.name: {f: i for i, f in enumerate(u.freqs)} for u in board.units}
        self.lead_ms = {u.name: u.settle_ms + u.stall_ms + _SAFETY_MS for u in board.units}
        self.planner = Planner(board, tables, objective, margin_sigma)
        self.objective, self.dwell_ms, self.gain_pct = objective, dwell_ms, gain_pct

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """Operating points, clocks, and when to look again."""
        memory = state.memory or Memory(dict.fromkeys(self.units, Slowdown()))
        slowdowns = self._learn(memory.slowdowns, state)
        plan, key, since_ms, reason = self._choose(state, memory, slowdowns, limits)
        clocks, wake_ms = {}, math.inf
        for name in self.units:
            clock_mhz, again_ms = self._clock(name, state, plan, slowdowns[name].used, limits[name])
            clocks[name] = clock_mhz
            wake_ms = min(wake_ms, again_ms)
        return Action(
            placements=plan.placements,
            clocks=clocks,
            wake_ms=None if math.isinf(wake_ms) else wake_ms,
            memory=Memory(slowdowns, key, plan, since_ms),
            reason=reason,
        )

    def _learn(self, slowdowns: Mapping[str, Slowdown], state: State) -> Mapping[str, Slowdown]:
        """Update the slowdowns from measured frames.

        Without a slowdown the shares ms / latency that a frame ran at each clock add up to 1.
        Within 3.5 sigma of the estimate the mean moves slowly; above, the estimate jumps at once;
        below, when a second frame agrees.
        """
        if not state.finished:
            return slowdowns
        slowdowns = dict(slowdowns)
        models = {app.name: app.model for app in state.apps}
        for frame in state.finished:
            if frame.app not in models:
                continue
            point = self.tables[models[frame.app]].point(frame.subnet, frame.unit)
            ratio, old = self._share(frame.unit, point, frame.ran), slowdowns[frame.unit]
            if not (math.isfinite(ratio) and ratio > 0):
                continue
            band = math.exp(3.5 * point.noise_cv)
            low = None
            if ratio > old.mean * band:
                mean = ratio
            elif ratio >= old.mean / band:
                mean = old.mean + 0.1 * (ratio - old.mean)
            elif old.low is None:
                mean, low = old.mean, ratio
            else:
                mean = max(ratio, old.low)
            # Plans follow in steps of 2 %, and not back by less than two of them.
            step = math.ceil(round(mean / 0.02, 6)) * 0.02
            used = step if step > old.used or step < old.used - 0.03 else old.used
            slowdowns[frame.unit] = Slowdown(mean, round(used, 6), low)
        return slowdowns

    def _share(self, unit: str, point, ran) -> float:
        """The part of a job done after running `ran`, were there no slowdown."""
        index = self.index[unit]
        return sum(ms / point.latency_ms[index[mhz]] for mhz, ms in ran)

    def _choose(self, state: State, memory: Memory, slowdowns, limits):
        demands = tuple(self._demand(app, state) for app in state.apps)
        used = tuple((name, s.used) for name, s in slowdowns.items())
        key = (demands, used, tuple(limits.items()))
        wanted = self.planner.plan(*key)
        plan, since_ms = memory.plan, memory.since_ms
        if plan is None or wanted.placements.keys() != plan.placements.keys():
            return wanted, key, state.t_ms, "apps"
        if wanted == plan:
            return plan, key, since_ms, ""
        if not self._holds(plan, demands, dict(used), limits):
            return wanted, key, state.t_ms, "requirement" if wanted.feasible else "infeasible"
        better = not plan.feasible or self._gain(plan, wanted, demands, dict(used))
        if better and state.t_ms - since_ms >= self.dwell_ms:
            return wanted, key, state.t_ms, "saves"
        return plan, key, since_ms, ""

    def _demand(self, app: AppState, state: State) -> Demand:
        """The strictest of what applies now, to frames that wait, and to those about to come.

        A frame that arrives shortly before an announced change still occupies its unit after it,
        so a change counts from one old deadline ahead.
        """
        deadline_ms, period_ms, floor_pct = app.need
        ahead_ms = state.t_ms + deadline_ms + max(self.lead_ms.values())
        for t_ms, need in app.upcoming:
            if t_ms <= ahead_ms:
                deadline_ms = min(deadline_ms, need.deadline_ms)
                period_ms = min(period_ms, need.period_ms)
                floor_pct = max(floor_pct, need.floor_pct)
        for frame in app.waiting:
            floor_pct = max(floor_pct, frame.floor_pct)
        if app.arrival in CLOSED_LOOP:
            period_ms = deadline_ms
        jitter = app.arrival != "periodic"
        if app.arrival == "server":
            period_ms /= 2  # two at once are common in a Poisson stream
        need = Requirement(deadline_ms, period_ms, floor_pct)
        return Demand(app.name, app.model, need, jitter, app.priority)

    def _tasks(self, plan: Plan, demands):
        """(unit, index of its clock, demand, point) of every app under `plan`."""
        for demand in demands:
            subnet, unit = plan.placements[demand.app]
            point = self.tables[demand.model].point(subnet, unit)
            yield unit, self.index[unit][plan.clocks[unit]], demand, point

    def _holds(self, plan: Plan, demands, used, limits) -> bool:
        """Whether `plan` still meets everything."""
        tasks: dict[str, list] = {}
        for unit, index, demand, point in self._tasks(plan, demands):
            if point.accuracy_val_pct < demand.need.floor_pct - 1e-9:
                return False
            if plan.clocks[unit] > limits[unit]:
                return False
            spec = self.units[unit]
            ms = self.planner.planned_ms(point, index, used[unit], demand, spec)
            tasks.setdefault(unit, []).append((ms, demand.need.period_ms, demand.need.deadline_ms))
        return all(schedulable(group) for group in tasks.values())

    def _gain(self, plan: Plan, wanted: Plan, demands, used) -> bool:
        power_mw = accuracy_pct = 0.0
        for unit, index, demand, point in self._tasks(plan, demands):
            energy_uj = point.active_mw[index] * point.latency_ms[index] * used[unit]
            power_mw += energy_uj / demand.need.period_ms
            accuracy_pct += point.accuracy_val_pct
        if self.objective == "accuracy" and wanted.accuracy_pct > accuracy_pct + 1e-9:
            return True
        return wanted.power_mw < power_mw * (1 - self.gain_pct / 100)

    def _clock(self, name: str, state: State, plan: Plan, slow: float, limit: float):
        """(clock in MHz, time to look again) for one unit."""
        unit, lead_ms, now_ms = self.units[name], self.lead_ms[name], state.t_ms
        planned_mhz = min(plan.clocks.get(name, unit.min_mhz), limit)
        jobs, next_ms = self._jobs(name, state, plan, slow)
        if jobs:
            mhz = self._pace(name, jobs, state, planned_mhz, slow, limit)
            running = jobs[0][2]
            if not running or mhz >= limit:
                return mhz, math.inf
            # Should it still run when it ought to be done, it is overdue: the highest clock.
            return mhz, now_ms + self._finish_ms(name, jobs[0], mhz, state, slow) + _SAFETY_MS
        # A gap shorter than the two transitions it takes is not worth a lower clock.
        if next_ms - now_ms <= 3 * lead_ms:
            return planned_mhz, math.inf
        return unit.min_mhz, next_ms - lead_ms

    def _jobs(self, name: str, state: State, plan: Plan, slow: float):
        """Frames at hand as (deadline, share left with its margin, runs already, point), running
        ones first, then by deadline; and when the next one is expected."""
        running, waiting, next_ms = [], [], math.inf
        for app in state.apps:
            table = self.tables[app.model]
            for job in app.running:
                if job.unit == name:
                    point = table.point(job.subnet, name)
                    left = self.planner.margin(point) - self._share(name, point, job.ran) / slow
                    running.append((job.deadline_at_ms, left, True, point))
            placement = plan.placements.get(app.name)
            if placement is None or placement.unit != name:
                continue
            point = table.point(*placement)
            waiting += [(w.deadline_at_ms, self.planner.margin(point), False, point)
                        for w in app.waiting]  # fmt: skip
            if app.arrival == "periodic":
                next_ms = min(next_ms, self._next_arrival_ms(app, state.t_ms))
        waiting.sort(key=lambda job: job[0])
        return running + waiting, next_ms

    @staticmethod
    def _next_arrival_ms(app: AppState, now_ms: float) -> float:
        if app.last_arrival_ms is None:
            return max(app.start_ms, now_ms)
        next_ms = app.last_arrival_ms + app.need.period_ms
        for t_ms, need in app.upcoming:
            if t_ms < next_ms:
                next_ms = min(next_ms, max(app.last_arrival_ms + need.period_ms, t_ms))
        return max(next_ms, now_ms)

    def _pace(self, name, jobs, state: State, planned_mhz: float, slow: float, limit: float):
        """The lowest clock from the planned one up at which all frames at hand are in time."""
        if jobs[0][1] <= 0:
            return limit  # overdue: something is slower than anybody knew
        for mhz in self.units[name].freqs:
            if not planned_mhz <= mhz < limit:
                continue
            index = self.index[name][mhz]
            end_ms = state.t_ms + self._finish_ms(name, jobs[0], mhz, state, slow)
            if end_ms > jobs[0][0]:
                continue
            for deadline_at_ms, left, _, point in jobs[1:]:
                end_ms += left * point.latency_ms[index] * slow
                if end_ms > deadline_at_ms:
                    break
            else:
                return mhz
        return limit

    def _finish_ms(self, name: str, job, mhz: float, state: State, slow: float) -> float:
        """How long the first job still takes if `mhz` is asked for now."""
        _, left, _, point = job
        unit, index = self.units[name], self.index[name]
        now_mhz = state.clocks[name]
        now_latency_ms = point.latency_ms[index[now_mhz]] * slow
        if mhz == now_mhz:
            return left * now_latency_ms
        wait_ms = unit.settle_ms + unit.stall_ms
        left -= unit.settle_ms / now_latency_ms
        if left <= 0:
            return (left + unit.settle_ms / now_latency_ms) * now_latency_ms
        return wait_ms + left * point.latency_ms[index[mhz]] * slow
