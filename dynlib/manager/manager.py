"""The hierarchical manager: operating points above, clocks below.

Upper level (`planner`): whenever requirements, limits or what was learnt change, every app gets the
operating point, and every unit the clock, that meet floors and deadlines best. Lower level
(`pacer`), at every frame: the lowest clock that still meets the deadlines of the frames at hand;
the lowest of all between frames, raised in time for the next.

What it knows of competitors, noise and random arrivals it has measured (`learner`). `decide` is
pure: its memory travels through `Action.memory` and `State.memory`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from dynlib.errors import DynlibError, PolicyError, near
from dynlib.manager.learner import SLOW, Gaps, Times
from dynlib.manager.pacer import SAFETY_MS, Pacer, Stream, Work, in_order
from dynlib.manager.planner import OBJECTIVES, Demand, Plan, Planner, Speed
from dynlib.manager.policy import Action, AppState, State, edf, share_done

if TYPE_CHECKING:
    from dynlib.boards.board import Board
    from dynlib.points import Point, PointTable, Tables

_STEP = 0.05  # changes of what was learnt that are too small to plan anew
_ROOM = 0.02  # of a frame, for what the model of a board leaves out
_BALANCE = 0.36  # between the shortest time and the deadline, on a logarithmic scale
# After so long a frame that should be late is tried again: the longer it is, the later.
_RETRY_MS, _RETRY_MOST_MS = 200.0, 1000.0
_DWELL_MS = 500.0  # that a plan lives at least if only what was learnt has changed
_NEVER_MS = 1e9
_NO_TIMES = Times()


class Memory(NamedTuple):
    """What the manager remembers between two decisions.

    Args:
        times, gaps: what was learnt, by (app, unit) and by app.
        busy: how busy others keep each unit, in halves; what was learnt holds for this.
        apart: what was learnt while they kept it otherwise, by (app, unit, halves).
        speeds: what follows from it, by app and unit, at this clock of the memory (`emc`).
        key: what the plan was made for.
    """

    times: Mapping[tuple[str, str], Times] = MappingProxyType({})
    gaps: Mapping[str, Gaps] = MappingProxyType({})
    busy: Mapping[str, int] = MappingProxyType({})
    apart: Mapping[tuple[str, str, int], Times] = MappingProxyType({})
    speeds: Mapping[str, Mapping[str, Speed]] = MappingProxyType({})
    emc: float = 1.0
    key: tuple = ()
    plan: Plan = Plan({}, {})
    since_ms: float = -math.inf


@dataclass(slots=True)
class _Hand:
    """What a unit has to do.

    Args:
        free_ms: when it is done with what runs, at the highest clock.
        work: the frames at hand.
        streams, coming: those to come, that have to be in time and all.
        spare: the next frame of each app that gets what time is left.
        next_ms: when another frame of such an app may come.
        give_up: apps, frames of which that are due before a time are given up.
    """

    free_ms: float
    work: list[Work] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    coming: list[Stream] = field(default_factory=list)
    spare: dict[str, Work] = field(default_factory=dict)
    next_ms: float = math.inf
    give_up: dict[str, float] = field(default_factory=dict)


class Manager:
    """The hierarchical manager as a policy (see `dynlib.manager.policy`).

    Args:
        tables: model -> points; under the name of an app, the points that this app may use.
        objective: `energy` (default): least board energy such that every floor and deadline is met;
            `accuracy`: highest accuracy such that every deadline is met, then least energy;
            `latency`: the networks of least energy, at the highest clock while a frame is there;
            `balanced`: the same, at clocks between those for latency and for energy.
        target_miss_pct: frames that may be late, of those that can be in time.
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
        tables: "Tables",
        *,
        objective: str = "energy",
        target_miss_pct: float = 0.5,
        governors: Mapping[str, str] = MappingProxyType({}),
    ):
        if objective not in OBJECTIVES:
            raise DynlibError(f"objective: got {objective!r}, expected one of {OBJECTIVES}")
        if not 0 < target_miss_pct < 50:
            raise DynlibError(f"target_miss_pct: got {target_miss_pct}, expected 0 to 50")
        self.board, self.tables, self.governors = board, tables, governors
        self.objective = objective
        self.units = {unit.name: unit for unit in board.units}
        self.pacers = {unit.name: Pacer(unit) for unit in board.units}
        self.longest_lead_ms = max(pacer.switch_ms for pacer in self.pacers.values()) + SAFETY_MS
        self.planner = Planner(board, tables, objective, target_miss_pct / 100)
        self.work = lru_cache(maxsize=1024)(self._make_work)

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """Operating points, clocks, and when to look again."""
        memory = self._learn(state.memory or Memory(), state)
        memory, reason = self._replan(memory, state, limits)
        plan, clocks, wake_ms, held, late = memory.plan, {}, math.inf, set(), {}
        hands = self._at_hand(state, memory, limits)
        for name, pacer in self.pacers.items():
            hand, clocks[name] = hands[name], pacer.unit.min_mhz
            if limits[name]:
                waits = self._held(state, memory, pacer, hand, limits[name])
                late |= hand.give_up
                held |= waits
                if len(pacer.unit.freqs) == 1:
                    continue  # no clock to choose
                # For those that get what time is left a unit makes room as fast as it can.
                last_ms = max([frame.deadline_ms for frame in hand.work], default=-math.inf)
                room = hand.spare and (waits - hand.give_up.keys() or hand.next_ms < last_ms)
                fast = self.objective == "latency" or room
                least_mhz = limits[name] if fast else pacer.unit.min_mhz
                clocks[name], again_ms = self._clock(state, pacer, hand, least_mhz, limits[name])
                wake_ms = min(wake_ms, again_ms)
        return Action(
            placements=plan.placements,
            clocks=clocks,
            wake_ms=None if math.isinf(wake_ms) else wake_ms,
            memory=memory,
            reason=reason,
            hold=frozenset(held),
            give_up=late,
        )

    # What is learnt.

    def _learn(self, memory: Memory, state: State) -> Memory:
        """With the frames that came and that finished."""
        gaps = {}
        for app in state.apps:
            said_ms = app.need.period_ms
            before = memory.gaps.get(app.name) or Gaps(said_ms, (), said_ms)
            if app.last_arrival_ms is not None:
                came = [frame.arrival_ms for frame in app.waiting]
                before = before.seen(said_ms, [*came, app.last_arrival_ms])
            gaps[app.name] = before
        before, memory = memory.busy, self._beside(memory._replace(gaps=gaps), state)
        same = memory.emc == state.emc and memory.busy == before
        if not state.finished and memory.speeds.keys() == gaps.keys() and same:
            return memory
        calm = {  # unit -> when a frame was last at its speed
            unit: each.last_ms
            for (_, unit), each in sorted(memory.times.items(), key=lambda item: item[1].last_ms)
            if each.frames and each.typical < SLOW
        }
        times = {
            (app, unit): each.aged(state.t_ms, calm.get(unit, -math.inf) > each.last_ms)
            for (app, unit), each in memory.times.items()
        }
        apps = {app.name: app for app in state.apps}
        for frame in state.finished:
            if frame.app in apps:
                point = self._points(apps[frame.app]).point(frame.subnet, frame.unit, frame.setting)
                ratio = self._done(point, frame.ran) / self._slower(frame.unit, state.emc)
                if math.isfinite(ratio) and ratio > 0:
                    key, z = (frame.app, frame.unit), self.planner.z
                    known = times.get(key) or self._times(memory, *key)
                    # Where others are seen, what is learnt is of those alike: no model is needed.
                    own = point.subnet if point.unit in memory.busy else ""
                    times[key] = known.measured(ratio, point.sigma, state.t_ms, z, own)
        memory = memory._replace(times=times, emc=state.emc)
        speeds = {app.name: self._speeds(app, memory) for app in state.apps}
        return memory._replace(speeds=speeds)

    def _beside(self, memory: Memory, state: State) -> Memory:
        """With what was learnt while others kept the units as busy as they do now.

        What others take can be seen before it is felt, and so can its end: there is nothing to try,
        and no frame of a burst is taken for noise.
        """
        busy = {unit: round(share_pct / 50) for unit, share_pct in state.others_pct.items()}
        if busy == memory.busy:
            return memory
        times, apart = dict(memory.times), dict(memory.apart)
        for (app, unit), learnt in memory.times.items():
            before, now = memory.busy.get(unit, 0), busy.get(unit, 0)
            if now != before:
                apart[app, unit, before] = learnt
                del times[app, unit]
                if found := apart.get((app, unit, now)):
                    times[app, unit] = found
        return memory._replace(busy=busy, times=times, apart=apart, since_ms=-math.inf)

    def _times(self, memory: Memory, app: str, unit: str) -> Times:
        """What was learnt of an app on a unit; at first, that it shares all CPUs with others."""
        learnt = memory.times.get((app, unit))
        if learnt is None and memory.busy.get(unit):
            learnt = Times.expected(1.0 + memory.busy[unit] / 2)
        return learnt or _NO_TIMES

    def _speeds(self, app: AppState, memory: Memory) -> dict[str, Speed]:
        """Of an app on every unit, as learnt; where it was not lately, what slows all others. Too
        small a change is none, lest plans change with every frame."""
        speeds = {}
        for unit in self._points(app).units:
            mine = self._times(memory, app.name, unit)
            others = [
                times.typical
                for (_, where), times in memory.times.items()
                if where == unit and times.frames
            ]
            typical = mine.typical if mine.frames else min(others, default=mine.typical)
            slower = self._slower(unit, memory.emc)
            spread, peak = mine.spread, max(mine.peak, typical)
            own = self._own(mine, typical, slower)
            now = Speed(typical * slower, spread, peak * slower, own)
            before = memory.speeds.get(app.name, {}).get(unit, now)
            same = before.own == own and all(
                abs(b - a) <= _STEP * a for a, b in zip(before[:3], now[:3], strict=True)
            )
            speeds[unit] = before if same else now
        return speeds

    def _own(self, mine: Times, typical: float, slower: float) -> tuple[tuple[str, float], ...]:
        """The longest to plan for by the frames of a sub-network itself, in steps of `_STEP`."""
        peaks = {each.subnet: each.longest(self.planner.target) for each in mine.own}
        steps = {
            subnet: round(math.log(max(peak, typical)) / _STEP)
            for subnet, peak in peaks.items()
            if peak
        }
        return tuple([(subnet, math.exp(_STEP * n) * slower) for subnet, n in steps.items()])

    def _slower(self, unit: str, emc: float) -> float:
        """The most that a slower memory stretches any frame on a unit."""
        spec = self.units[unit]
        return 1.0 if emc == 1 else spec.memory_scale(spec.max_mhz, emc)

    def _table(self, app: AppState) -> str:
        name = app.name if app.name in self.tables else app.model
        if name not in self.tables:
            known = near(name, self.tables)
            raise PolicyError(f"app {app.name!r}: no points of model {name!r}; {known}")
        return name

    def _points(self, app: AppState) -> "PointTable":
        return self.tables[self._table(app)]

    def _done(self, point: "Point", ran) -> float:
        """The share of a frame that is done, or how long a finished one took, by the table."""
        return share_done(point, ran, self.units[point.unit].freqs)

    # The plan.

    def _replan(self, memory: Memory, state: State, limits) -> tuple[Memory, str]:
        """A plan for what is wanted now, and why it is another than before."""
        demands = tuple([self._demand(app, memory, state) for app in state.apps])
        key = demands, tuple(limits.items()), state.memory_mb
        if key == memory.key:
            return memory, ""
        if (
            memory.key
            and state.t_ms < memory.since_ms + _DWELL_MS
            and not self._hopeless(memory.plan, key)
            and _asked(key) == _asked(memory.key)
        ):
            return memory, ""
        plan = self.planner.plan(*key)
        if plan.degraded and any(app.upcoming for app in state.apps):
            # What is to come cannot be prepared for: first of all what is asked for now.
            apps = [app._replace(upcoming=()) for app in state.apps]
            key = tuple([self._demand(app, memory, state) for app in apps]), *key[1:]
            plan = self.planner.plan(*key)
        reason = "" if plan == memory.plan else "; ".join(plan.degraded) or "best"
        return memory._replace(key=key, plan=plan, since_ms=state.t_ms), reason

    def _hopeless(self, plan: Plan, key: tuple) -> bool:
        """Whether by what was learnt some app's frames cannot be in time at their point."""
        demands, limits, _ = key
        limits = dict(limits)
        for demand in demands:
            where = plan.placements.get(demand.app)
            if where is None:
                continue
            point = self.tables[demand.table].point(*where)
            speed = dict(demand.speeds)[point.unit]
            margin = self.planner.margin(point, speed) if speed.own else 1.0
            if speed.typical * margin * self._least_ms(point, limits) > demand.deadline_ms:
                return True
        return False

    def _demand(self, app: AppState, memory: Memory, state: State) -> Demand:
        """The strictest of what applies now, to frames that wait, and to those about to come.

        A frame that arrives shortly before an announced change still occupies its unit after it,
        so a change counts from one old deadline ahead.
        """
        deadline_ms, _, floor_pct = app.need
        random, batch = app.arrival in ("server", "trace"), app.arrival == "offline"
        if random or app.arrival == "periodic":
            period_ms = memory.gaps[app.name].period_ms
        elif batch:
            period_ms = _share_ms(app, state.t_ms)
        else:  # a closed loop
            period_ms = deadline_ms
        until_ms = state.t_ms + deadline_ms + self.longest_lead_ms
        for t_ms, need in app.upcoming:
            if t_ms <= until_ms:
                deadline_ms = min(deadline_ms, need.deadline_ms)
                period_ms = min(period_ms, need.period_ms)
                floor_pct = max(floor_pct, need.floor_pct)
        return Demand(
            app.name,
            self._table(app),
            deadline_ms,
            period_ms,
            max([floor_pct, *(frame.floor_pct for frame in app.waiting)]),
            random,
            app.priority,
            tuple(memory.speeds[app.name].items()),
            batch,
        )

    # The clocks.

    def _at_hand(self, state: State, memory: Memory, limits) -> dict[str, _Hand]:
        """Unit -> what it has to do now and soon."""
        hands = {unit: _Hand(state.t_ms) for unit in self.units}
        for app in state.apps:
            for job in app.running:
                point = self._points(app).point(job.subnet, job.unit, job.setting)
                work, done = self._work(app, point, memory), self._done(point, job.ran)
                left = work._replace(
                    deadline_ms=job.deadline_at_ms - self._sooner_ms(app, point, limits),
                    typical=work.typical - done,
                    worst=work.worst - done,
                    done=done,
                )
                hand = hands[job.unit]
                hand.work.append(left)
                hand.free_ms += max(left.typical, 0.0) * self._least_ms(point, limits)
        plan = memory.plan
        placed = [each.unit for each in plan.placements.values() if each]
        for app, demand in zip(state.apps, memory.key[0], strict=True):
            placement = plan.placements.get(app.name)
            if placement is None or not limits[placement.unit]:
                continue
            point, hand = self._points(app).point(*placement), hands[placement.unit]
            work, sooner_ms = self._work(app, point, memory), self._sooner_ms(app, point, limits)
            # No frame that is due before it could be done, unless to see whether that still holds.
            times = self._times(memory, app.name, placement.unit)
            again = self._tries(work, times, state.t_ms)
            due_ms = hand.free_ms + work.typical * self._least_ms(point, limits)
            if again:
                due_ms = 0.0
            waiting = [frame for frame in app.waiting if frame.deadline_at_ms >= due_ms]
            if len(waiting) < len(app.waiting):
                hand.give_up[app.name] = due_ms
            coming = []
            if app.arrival == "periodic" and app.name not in plan.hopeless:
                frame = work._replace(deadline_ms=app.need.deadline_ms - sooner_ms)
                next_ms = app.next_arrival_ms(state.t_ms, demand.period_ms)
                coming.append(Stream(next_ms, demand.period_ms, frame))
            hand.coming += coming
            if app.name in plan.spare and placed.count(placement.unit) > 1:
                hand.next_ms = min([hand.next_ms, coming[0].next_ms if coming else state.t_ms])
                if waiting:
                    first_ms = min(frame.deadline_at_ms for frame in waiting)
                    first_ms = math.inf if again else first_ms
                    hand.spare[app.name] = work._replace(deadline_ms=first_ms)
                continue
            hand.streams += coming
            for frame_ms, frames in groupby(waiting, key=attrgetter("deadline_at_ms")):
                # Of those that are due together, each has its share of the time.
                share_ms = (frame_ms - state.t_ms) / len(list(frames))
                hand.work.append(work._replace(deadline_ms=state.t_ms + share_ms - sooner_ms))
        return hands

    @staticmethod
    def _tries(work: Work, times: Times | None, now_ms: float) -> bool:
        """Whether a frame that should be late, because those before it were, runs all the same: the
        last was faster, or it is long ago."""
        if times is None or work.typical <= 1:
            return work.typical > 1
        over = times.frames and times.ratios[-1] < 0.9 * times.typical
        retry_ms = min(_RETRY_MS * work.typical**1.5, _RETRY_MOST_MS)
        return bool(over) or now_ms - times.last_ms > retry_ms

    def _least_ms(self, point: "Point", limits) -> float:
        """What a frame takes at the highest clock allowed, by the table."""
        unit = self.units[point.unit]
        return point.latency_ms[self.pacers[unit.name].index[limits[unit.name] or unit.max_mhz]]

    def _sooner_ms(self, app: AppState, point: "Point", limits) -> float:
        """How much earlier than at its deadline a frame shall be done."""
        if self.objective != "balanced" or app.arrival == "offline":
            return 0.0
        deadline_ms = app.need.deadline_ms
        room = max(deadline_ms / self._least_ms(point, limits), 1.0)
        return deadline_ms - deadline_ms * room ** (_BALANCE - 1)

    def _work(self, app: AppState, point: "Point", memory: Memory) -> Work:
        """A frame of `app` at `point`, without its deadline."""
        times = self._times(memory, app.name, point.unit)
        least = times.worst * self._slower(point.unit, memory.emc)
        return self.work(point, memory.speeds[app.name][point.unit], least)

    def _make_work(self, point: "Point", speed: Speed, least: float) -> Work:
        worst = max(speed.typical * self.planner.margin(point, speed), least)
        sigma = point.sigma * speed.spread
        return Work(0.0, speed.typical, worst + _ROOM, point, sigma=sigma)

    def _held(self, state: State, memory: Memory, pacer: Pacer, hand: _Hand, limit) -> set[str]:
        """The spare apps whose next frame has to wait, because it would be late itself or make
        another one late. Frames that need not are added to the work at hand."""
        name, held = pacer.unit.name, set(hand.spare)
        mhz = state.targets[name]
        last_ms = {app: memory.times.get((app, name), _NO_TIMES).last_ms for app in hand.spare}
        # The one that was served least recently comes first.
        for app, frame in sorted(hand.spare.items(), key=lambda item: (last_ms[item[0]], item[0])):
            likely = frame._replace(worst=frame.typical)
            work = in_order([*hand.work, likely])
            before = work[: work.index(likely) + 1]
            top = pacer.index[limit]
            if pacer.in_time(state.t_ms, mhz, work, hand.streams, top, top):
                hand.work[:] = in_order([*hand.work, frame])
                held.remove(app)
            elif not pacer.in_time(state.t_ms, mhz, before, (), top, top, sure=False):
                hand.give_up[app] = frame.deadline_ms + SAFETY_MS
        return held

    def _clock(self, state: State, pacer: Pacer, hand: _Hand, least_mhz: float, limit: float):
        """(clock in MHz, time to look again) of one unit."""
        unit, now_ms = pacer.unit, state.t_ms
        work, streams, start_ms, mhz = hand.work, hand.streams, now_ms, state.targets[unit.name]
        if not work:
            streams = hand.coming
            if not streams:
                return unit.min_mhz, math.inf
            # A gap shorter than the two transitions it takes is not worth a lower clock.
            lead_ms = pacer.switch_ms + SAFETY_MS
            start_ms = min(stream.next_ms for stream in streams)
            if start_ms - now_ms > 3 * lead_ms:
                return unit.min_mhz, start_ms - lead_ms
            streams = list(streams)
            for i, stream in enumerate(streams):
                if stream.next_ms <= start_ms + SAFETY_MS:
                    work.append(stream.at(start_ms))
                    streams[i] = stream._replace(next_ms=start_ms + stream.period_ms)
            # What is asked for now acts before the frames are there.
            if start_ms - now_ms >= pacer.switch_ms:
                mhz = None
        return pacer.choose(start_ms, mhz, in_order(work), streams, least_mhz, limit)


def _share_ms(app: AppState, now_ms: float) -> float:
    """What each frame of a batch that has not started may take, in steps of a twentieth, so that
    plans last."""
    left, spent_ms = app.frames, 0.0
    if app.last_arrival_ms is not None:
        left, spent_ms = len(app.waiting), max(now_ms - app.start_ms, 0.0)
    if not left:
        return _NEVER_MS
    share_ms = max(app.need.deadline_ms - spent_ms, 1.0) / left
    return math.exp(math.floor(math.log(share_ms) / _STEP) * _STEP)


def _asked(key: tuple) -> tuple:
    """What a plan is made for, without what was learnt."""
    return tuple([demand._replace(speeds=()) for demand in key[0]]), *key[1:]
