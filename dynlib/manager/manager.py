"""The hierarchical manager: operating points above, clocks below.

Upper level (`planner`): whenever requirements, limits or the measured slowdown of a unit change,
every app gets the operating point, and every unit the clock, that meet floors and deadlines best.
Lower level, at every frame: the planned clock, or the lowest one above it that still meets the
deadlines of the frames at hand; the lowest clock between frames, raised in time for the next.

It knows of competitors only through measured times. `decide` is pure: its memory travels through
`Action.memory` and `State.memory`.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from dynlib.errors import DynlibError, PolicyError, near
from dynlib.manager.pace import Pacer, Stream, Work
from dynlib.manager.planner import OBJECTIVES, Demand, Plan, Planner, schedulable
from dynlib.manager.policy import Action, AppState, State, edf
from dynlib.manager.slowdown import Slowdown
from dynlib.points import Tables
from dynlib.workload import CLOSED_LOOP, Requirement

if TYPE_CHECKING:
    from dynlib.boards.board import Board

_SAFETY_MS = 0.1


class Memory(NamedTuple):
    """What the manager remembers between two decisions."""

    slowdowns: Mapping[str, Slowdown]
    key: tuple = ()
    wanted: Plan | None = None  # the best plan for `key`
    plan: Plan | None = None  # the one in force
    since_ms: float = -math.inf


def _reason(why: str, plan: Plan) -> str:
    return f"infeasible: {', '.join(plan.degraded)}" if plan.degraded else why


class Manager:
    """The hierarchical manager as a policy (see `dynlib.manager.policy`).

    Args:
        tables: model -> points; under the name of an app, the points that this app may use.
        objective: `energy` (default): least board energy such that every floor and deadline is met;
            `accuracy`: highest accuracy such that every deadline is met, then least energy;
            `latency`: the networks of least energy, at the highest clock while a frame is there.
        margin_sigma: planned execution times lie so many standard deviations above the mean. The
            default was chosen on seeds 0 to 19; evaluate on others.
        dwell_ms: a change that nothing forces (a better plan, not a broken one) waits so long after
            the last change and must save `gain_pct` of the power above idle.
        governors: units whose clocks it leaves to the kernel.

    >>> board = load_board("jetson-nano")
    >>> points = read_points("points.csv", board)  # as the example of `read_points` wrote it
    >>> camera = App("camera", "example", deadline_ms=33.0, period_ms=33.0)
    >>> case = Case(Workload("street", 10.0, (camera,)), board, points)
    >>> runs = {
    ...     goal: case.simulate(Manager(board, case.tables, objective=goal)).summary()
    ...     for goal in ("energy", "accuracy")
    ... }
    >>> [runs[goal]["accuracy_mean_pct"] for goal in runs]
    [70.0, 80.0]
    >>> runs["energy"]["energy_mj"] < runs["accuracy"]["energy_mj"]
    True
    """

    name = "manager"
    choose = staticmethod(edf)
    static = False

    def __init__(
        self,
        board: "Board",
        tables: Tables,
        *,
        objective: str = "energy",
        margin_sigma: float = 2.6,
        dwell_ms: float = 500.0,
        gain_pct: float = 2.0,
        governors: Mapping[str, str] = MappingProxyType({}),
    ):
        if objective not in OBJECTIVES:
            raise DynlibError(f"unknown objective {objective!r}; expected one of {OBJECTIVES}")
        self.board, self.tables, self.governors = board, tables, governors
        self.units = {unit.name: unit for unit in board.units}
        self.index = {u.name: {f: i for i, f in enumerate(u.freqs)} for u in board.units}
        self.lowest = {unit.name: unit.min_mhz for unit in board.units}
        self.paced = any(len(unit.freqs) > 1 for unit in board.units)
        self.lead_ms = {u.name: u.settle_ms + u.stall_ms + _SAFETY_MS for u in board.units}
        self.longest_lead_ms = max(self.lead_ms.values())
        self.pacers = {unit.name: Pacer(unit) for unit in board.units}
        self.planner = Planner(board, tables, objective, margin_sigma)
        self.objective, self.dwell_ms, self.gain_pct = objective, dwell_ms, gain_pct

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """Operating points, clocks, and when to look again."""
        memory = state.memory or Memory(dict.fromkeys(self.units, Slowdown()))
        slowdowns = self._learn(memory.slowdowns, state)
        used = {name: slowdown.used for name, slowdown in slowdowns.items()}
        if state.emc != 1:  # the most that a slower memory stretches any frame on the unit
            for name, unit in self.units.items():
                used[name] *= unit.memory_scale(unit.max_mhz, state.emc)
        key, wanted, plan, since_ms, reason = self._choose(state, memory, used, limits)
        clocks, wake_ms = {}, math.inf
        at_hand = self._at_hand(state, plan, used) if self.paced else {}
        for name in self.units:
            if name not in at_hand or limits[name] == 0:  # nothing to do there, or taken away
                clocks[name] = self.lowest[name]
                continue
            clocks[name], again_ms = self._clock(
                name, state, at_hand[name], used[name], limits[name]
            )
            wake_ms = min(wake_ms, again_ms)
        return Action(
            placements=plan.placements,
            clocks=clocks,
            wake_ms=None if math.isinf(wake_ms) else wake_ms,
            memory=Memory(slowdowns, key, wanted, plan, since_ms),
            reason=reason,
        )

    def _learn(self, slowdowns: Mapping[str, Slowdown], state: State) -> Mapping[str, Slowdown]:
        """Update the slowdowns from measured frames: without one, the shares ms / latency that a
        frame ran at each clock add up to 1."""
        if not state.finished:
            return slowdowns
        slowdowns, seen = dict(slowdowns), set()
        tables = {app.name: self._table(app) for app in state.apps}
        for frame in state.finished:
            if frame.app not in tables:
                continue
            point = tables[frame.app].point(frame.subnet, frame.unit, frame.setting)
            ratio = self._share(frame.unit, point, frame.ran, state.emc)
            if math.isfinite(ratio) and ratio > 0:
                slowdowns[frame.unit] = slowdowns[frame.unit].measured(
                    ratio, point.sigma, self.planner.margin_sigma
                )
                seen.add(frame.unit)
        for name in slowdowns.keys() - seen:
            slowdowns[name] = slowdowns[name].unseen(len(state.finished))
        return slowdowns

    def _table(self, app: AppState):
        return self.tables.get(app.name) or self.tables[app.model]

    def _share(self, name: str, point, ran, emc: float) -> float:
        """The part of a job done after running `ran`, were there no slowdown but the memory's."""
        index, unit, done = self.index[name], self.units[name], 0.0
        for mhz, ms in ran:
            expected_ms = point.latency_ms[index[mhz]]
            done += ms / (expected_ms if emc == 1 else expected_ms * unit.memory_scale(mhz, emc))
        return done

    def _choose(self, state: State, memory: Memory, used: Mapping[str, float], limits):
        demands = tuple([self._demand(app, state) for app in state.apps])
        key = (demands, tuple(used.items()), tuple(limits.items()), state.memory_mb)
        same = key == memory.key
        wanted = memory.wanted if same else self.planner.plan(*key)
        plan, since_ms, why = memory.plan, memory.since_ms, ""
        if wanted is plan or wanted == plan:
            return key, wanted, plan, since_ms, why
        if plan is None or wanted.placements.keys() != plan.placements.keys():
            why = "apps"
        # Under the same key it held at the last decision.
        elif not (same or self._holds(plan, demands, used, limits, state.memory_mb)):
            why = "requirement"
        elif state.t_ms - since_ms >= self.dwell_ms and (
            not plan.feasible or self._gain(plan, wanted, demands, used)
        ):
            why = "saves"
        if why:
            return key, wanted, wanted, state.t_ms, _reason(why, wanted)
        return key, wanted, plan, since_ms, why

    def _demand(self, app: AppState, state: State) -> Demand:
        """The strictest of what applies now, to frames that wait, and to those about to come.

        A frame that arrives shortly before an announced change still occupies its unit after it,
        so a change counts from one old deadline ahead.
        """
        deadline_ms, period_ms, floor_pct = app.need
        ahead_ms = state.t_ms + deadline_ms + self.longest_lead_ms
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
        model = app.name if app.name in self.tables else app.model
        if model not in self.tables:
            known = near(model, self.tables)
            raise PolicyError(f"app {app.name!r}: no points of model {model!r}; {known}")
        return Demand(app.name, model, need, jitter, app.priority)

    def _tasks(self, plan: Plan, demands):
        """(unit, index of its clock, demand, point) of every app under `plan`."""
        for demand in demands:
            placement = plan.placements[demand.app]
            if placement is None:
                continue
            point = self.tables[demand.model].point(*placement)
            unit = placement.unit
            yield unit, self.index[unit][plan.clocks[unit]], demand, point

    def _holds(self, plan: Plan, demands, used, limits, memory_mb: float) -> bool:
        """Whether `plan` still meets everything it does not give up."""
        tasks: dict[str, list] = {}
        for unit, index, demand, point in self._tasks(plan, demands):
            if point.accuracy_val_pct < demand.need.floor_pct - 1e-9 and plan.feasible:
                return False
            if point.memory_mb * len(demands) > memory_mb:
                return False
            if plan.clocks[unit] > limits[unit]:
                return False
            spec = self.units[unit]
            ms = self.planner.planned_ms(point, index, used[unit], demand, spec)
            tasks.setdefault(unit, []).append((ms, demand.need.period_ms, demand.need.deadline_ms))
        return all(schedulable(group) for group in tasks.values())

    def _gain(self, plan: Plan, wanted: Plan, demands, used) -> bool:
        if (wanted.placements, wanted.clocks) == (plan.placements, plan.clocks):
            return False  # only the slowdown is another than when it was chosen
        power_mw = accuracy_pct = 0.0
        for unit, index, demand, point in self._tasks(plan, demands):
            energy_uj = point.active_mw[index] * point.latency_ms[index] * used[unit]
            power_mw += energy_uj / demand.need.period_ms
            accuracy_pct += point.accuracy_val_pct
        if self.objective == "accuracy" and wanted.accuracy_pct > accuracy_pct + 1e-9:
            return True
        return wanted.power_mw < power_mw * (1 - self.gain_pct / 100)

    def _clock(self, name: str, state: State, at_hand, slow: float, limit: float):
        """(clock in MHz, time to look again) for one unit."""
        unit, lead_ms, now_ms = self.units[name], self.lead_ms[name], state.t_ms
        running, waiting, streams, least_mhz = at_hand
        waiting.sort(key=lambda w: w.deadline_ms)
        work, start_ms, mhz = running + waiting, now_ms, state.clocks[name]
        least_mhz = min(max(least_mhz, self.lowest[name]), limit)
        if not work:
            if not streams:
                return least_mhz, math.inf
            # A gap shorter than the two transitions it takes is not worth a lower clock.
            start_ms = min(stream.next_ms for stream in streams)
            if start_ms - now_ms > 3 * lead_ms:
                return least_mhz, start_ms - lead_ms
            work, streams = self._arrive(streams, start_ms)
            # What is asked for now acts before the frames are there.
            if start_ms - now_ms >= unit.settle_ms + unit.stall_ms:
                mhz = None
        pace = self.pacers[name].choose(
            start_ms, mhz, work, streams, bool(running), least_mhz, limit, slow
        )
        return pace.mhz, pace.again_ms

    @staticmethod
    def _arrive(streams, start_ms: float):
        """The frames that come at `start_ms`, by deadline, and what comes after them."""
        work, later = [], []
        for s in streams:
            if s.next_ms <= start_ms + _SAFETY_MS:
                work.append(Work(start_ms + s.deadline_ms, 1.0, s.margin, s.point))
                s = s._replace(next_ms=start_ms + s.period_ms)
            later.append(s)
        return sorted(work, key=lambda w: w.deadline_ms), later

    def _at_hand(self, state: State, plan: Plan, used: Mapping[str, float]):
        """Unit -> (frames that run, that wait, streams of those to come, lowest clock)."""
        found = defaultdict(lambda: [[], [], [], 0.0])
        for app in state.apps:
            table = self._table(app)
            for job in app.running:
                point = table.point(job.subnet, job.unit, job.setting)
                done = self._share(job.unit, point, job.ran, 1.0) / used[job.unit]
                worst = self.planner.margin(point) - done
                found[job.unit][0].append(
                    Work(job.deadline_at_ms, max(1 - done, 0.0), worst, point, done)
                )
            placement = plan.placements.get(app.name)
            if placement is None:
                continue
            here, point = found[placement.unit], table.point(*placement)
            margin = self.planner.margin(point)
            here[1] += [Work(w.deadline_at_ms, 1.0, margin, point) for w in app.waiting]
            if app.arrival == "periodic":
                next_ms = self._next_arrival_ms(app, state.t_ms)
                need = app.need
                here[2].append(Stream(next_ms, need.period_ms, need.deadline_ms, margin, point))
            elif app.waiting or app.running:
                here[3] = max(here[3], plan.clocks[placement.unit])
            if self.objective == "latency" and (app.waiting or app.running):
                here[3] = self.units[placement.unit].max_mhz
        return found

    @staticmethod
    def _next_arrival_ms(app: AppState, now_ms: float) -> float:
        if app.last_arrival_ms is None:
            return max(app.start_ms, now_ms)
        next_ms = app.last_arrival_ms + app.need.period_ms
        for t_ms, need in app.upcoming:
            if t_ms < next_ms:
                next_ms = min(next_ms, max(app.last_arrival_ms + need.period_ms, t_ms))
        return max(next_ms, now_ms)
