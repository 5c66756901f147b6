"""The one loop of every run: arrivals, drops, observation, decisions and log, in either world.

What happens is a heap of timed events. The loop waits for the next, takes in all that are due, lets
the policy decide, and has every unit that is free start the job that the policy chooses. The world
behind it is a simulated board (`simulate`) or the machine this runs on (`live`); it says how long
waiting and running take, and what can be observed.

Rules a number depends on:
- a frame whose deadline has passed before it starts is dropped, unless the policy's `late` says
  otherwise; one that runs is never aborted;
- every frame that waits is a candidate for its unit, and so is every job between two segments;
- at the end of the horizon what still waits or runs is dropped;
- where memory is capped, the networks of the apps, those that run included, fit together at any
  time: the least important apps that do not are not served, and their frames have to start again;
- noise of frame k of app a is a function of (seed, a, k) alone: every policy meets the same frames.
"""

import heapq
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from threading import Event
from types import MappingProxyType
from typing import Any, NamedTuple

from dynlib.errors import PolicyError, near
from dynlib.log import DecisionLog
from dynlib.manager.policy import Action, Finished, Placement, Policy, State
from dynlib.runtime.conditions import Conditions, Setup, conditions
from dynlib.runtime.jobs import EPS_MS, AppRun, Job
from dynlib.runtime.steering import Steered
from dynlib.workload import ANNOUNCE_MS, CLOSED_LOOP, Requirement, requirement_at

# Among events at one instant: requirements first, then the hardware, then frames, then decisions,
# then what was asked for from outside.
CHANGE, DONE, CLOCK, ARRIVE, TICK, WAKE, ASKED = range(7)

# What becomes of frames late before they start: they go, wait on, or run when no other can.
LATE = ("drop", "keep", "last")


class Observed(NamedTuple):
    """What a board shows of itself, as in `State`."""

    clocks: Mapping[str, float]
    targets: Mapping[str, float]
    power_mw: float
    temp_c: float = math.nan
    others_pct: Mapping[str, float] = MappingProxyType({})


class Loop(Steered, ABC):
    """One run of a case under a policy; a world is a subclass, and `run` does it all.

    It may be steered while it goes on, see `Steered`.

    Attributes:
        now_ms: the time of what is being handled.
        happened: the kinds of its events.
        apps: name -> `AppRun`.
        limits: the highest clock that each unit may have now, in MHz; 0 where it is lost.
        log: what has happened.

    Raises `PolicyError` for a model without table, and for a policy that answers what cannot be
    done.
    """

    def __init__(self, case: Setup, policy: Policy, seed: int, source: str, **header: Any):
        self.workload, self.board, self.tables = case.workload, case.board, case.tables
        self.policy = policy
        self.horizon_ms = self.workload.horizon_s * 1000
        self.now_ms, self.heap, self.wake = 0.0, [], 0
        self.pushed, self.seed = 0, seed
        self.happened: set[int] = set()
        self.stopped = self.ended = False
        # What was posted and not taken in yet, and what wakes the loop up.
        self.inbox: deque[tuple[float, Callable, Future | None]] = deque()
        self.bell = Event()
        self.late = getattr(policy, "late", LATE[0])
        if self.late not in LATE:
            raise PolicyError(f"{policy.name}: late {self.late!r}; {near(self.late, LATE)}")
        self.apps: dict[str, AppRun] = {}
        for app in self.workload.apps:
            self._known_model(app)
            self.apps[app.name] = AppRun(app, self.workload, self.tables[app.model], seed)
        self.names = set(self.apps)
        # Whether there may be more than what is on the heap.
        pushes = any(app.arrival == "pushed" for app in self.workload.apps)
        self.open = pushes or math.isinf(self.horizon_ms)
        self.under = conditions(self.workload, self.board)
        self.now = self.under[0][1]
        self.memory_capped = any(math.isfinite(now.memory_mb) for _, now in self.under)
        self.limits = {unit.name: unit.max_mhz for unit in self.board.units}
        self.finished: list[Finished] = []
        self.memory: Any = None
        self.ask = False
        self.hold: frozenset[str] = frozenset()
        self.reason = ""
        self.handlers = {
            CHANGE: self.on_change,
            ARRIVE: self.on_arrive,
            WAKE: self.on_wake,
            ASKED: lambda item: item[0](),
        }
        self.log = DecisionLog(
            scenario=self.workload.name,
            policy=policy.name,
            seed=seed,
            board=self.board.name,
            board_sha256=self.board.digest,
            workload_sha256=self.workload.digest,
            table_sha256={name: table.digest for name, table in self.tables.items()},
            models={app.name: app.model for app in self.workload.apps},
            source=source,
            horizon_s=None if math.isinf(self.horizon_ms) else self.workload.horizon_s,
            **header,
        )

    # What a world is.

    @abstractmethod
    def wait(self, until_ms: float) -> float:
        """Let time pass until then, or until the `bell`; the time now, in ms, at most that of the
        horizon."""

    @abstractmethod
    def clock_ms(self) -> float:
        """The time now; asked from any thread."""

    @abstractmethod
    def free(self) -> Iterable[Any]:
        """The places where a job could start now."""

    @abstractmethod
    def dispatch(self, place: Any, job: Job) -> None:
        """Run the next segment of a job in a free place; a DONE event tells its end."""

    @abstractmethod
    def observe_units(self) -> Observed:
        """What the board shows of itself."""

    def constrain(self, unit: str, stretch: float, cap_mhz: float, emc: float) -> None:
        """Others do this to a unit from now on."""

    def switch(self, run: AppRun, placement: Placement | None) -> Placement | None:
        """Take an app elsewhere; where its next frames do run."""
        if placement is not None:
            run.table.point(*placement)  # raises for an unknown one
        return placement

    def request(self, unit: str, mhz: float) -> None:
        """The policy wants this clock."""

    def sample(self, last: bool = False) -> None:
        """Write down the power, if it is another one or it is the `last` time."""

    # What every world shares.

    def run(self) -> DecisionLog:
        """Run to the horizon, or until it is stopped."""
        try:
            self._run()
            self._close()
        finally:
            self.ended = True
            self._cancel()
        return self.log

    def _run(self) -> None:
        self.sample()
        self.schedule()
        self.push(0.0, WAKE)
        heap, handlers = self.heap, self.handlers
        while not self._over():
            next_ms = heap[0][0] if heap else math.inf
            now_ms = self.wait(min(next_ms, self.horizon_ms))
            while self.inbox:
                asked_ms, *item = self.inbox.popleft()
                # Not before what has been handled; and what came before the start comes now.
                self.push(max(min(asked_ms, now_ms), self.now_ms), ASKED, item)
            self.happened.clear()
            while heap and heap[0][0] <= now_ms:
                self.now_ms, kind, _, item = heapq.heappop(heap)
                handlers[kind](item)
                self.happened.add(kind)
            self.now_ms = now_ms
            if now_ms < self.horizon_ms:
                self.settle()

    def _over(self) -> bool:
        if self.stopped:  # what runs is finished
            return not any(run.jobs for run in self.apps.values())
        if self.open:
            return self.now_ms >= self.horizon_ms
        return not self.heap or self.heap[0][0] >= self.horizon_ms

    def _close(self) -> None:
        if not self.stopped:
            self.now_ms = self.horizon_ms
        elif self.now_ms > 0:
            self.workload = replace(self.workload, horizon_s=self.now_ms / 1000)
        for run in self.apps.values():
            for job in (*run.jobs, *run.waiting):
                self.record("drop", job, reason="horizon")
        self.sample(last=True)
        if self.stopped:
            self.log.add(self.now_ms / 1000, "set", reason="stopped")

    def _cancel(self) -> None:
        """Whoever waits for an answer that will not come is told so."""
        jobs = [job for run in self.apps.values() for job in (*run.jobs, *run.waiting)]
        waiting = [job.answer for job in jobs]
        waiting += [item[1] for _, kind, _, item in self.heap if kind == ASKED]
        while self.inbox:
            *_, answer = self.inbox.popleft()
            waiting.append(answer)
        for answer in waiting:
            if answer is not None:
                answer.cancel()

    # What happens.

    def push(self, t_ms: float, kind: int, item: Any = None) -> None:
        """Something will happen."""
        # The running number makes ties deterministic and keeps items from being compared.
        self.pushed += 1
        heapq.heappush(self.heap, (t_ms, kind, self.pushed, item))

    def record(self, event: str, job: Job, **values: Any) -> None:
        """Log an event of one frame."""
        self.log.add(self.now_ms / 1000, event, app=job.app, frame=job.frame, **values)
        if event == "drop" and job.answer is not None:
            job.answer.cancel()

    def schedule(self) -> None:
        """Everything that is known ahead."""
        for t_ms, now in self.under[1:]:
            self.push(t_ms, CHANGE, now)
        for change in self.workload.changes:
            if change.app:
                self._schedule_known(change.t_s * 1000, change, change.announced)
        for run in self.apps.values():
            self._schedule_app(run)

    def _schedule_app(self, run: AppRun) -> None:
        start_ms = run.app.start_s * 1000
        self._schedule_known(start_ms, run, run.app.announced)
        if run.app.end_s is not None:
            self.push(run.app.end_s * 1000, CHANGE, run)
        if run.app.arrival in CLOSED_LOOP:
            self.push(start_ms, ARRIVE, run)
        else:
            self._schedule_arrival(run)

    def _schedule_known(self, t_ms: float, change, announced: bool) -> None:
        self.push(t_ms, CHANGE, change)
        if announced and not self.policy.static:
            self.push(max(t_ms - ANNOUNCE_MS, self.now_ms), WAKE)

    def _schedule_arrival(self, run: AppRun) -> None:
        item = next(run.arrivals, None)
        if item is not None:
            t_ms, _ = item
            self.push(t_ms, ARRIVE, run)

    def settle(self) -> None:
        """After all events of an instant: decide, start what can start, write down the power."""
        if self.ask:
            self.ask = False
            self.decide()
        places = self.free()
        ready = self.ready() if places else {}
        for place in places:
            if jobs := ready.get(place):
                self.dispatch(place, self.choose(jobs))
        self.sample()

    def choose(self, jobs: list[Job]) -> Job:
        """The policy's choice; raises `PolicyError`, with the log, for one that is not there."""
        if self.late == "last":
            jobs = [job for job in jobs if self.now_ms < job.deadline_at_ms - EPS_MS] or jobs
        job = self.policy.choose(jobs, self.now_ms)
        if job not in jobs:
            error = PolicyError(f"{self.policy.name}: chose {job!r}, expected one of {jobs}")
            error.log = self.log
            raise error
        return job

    def ready(self) -> dict[Any, list[Job]]:
        """Place -> the jobs that could run there; a place is a unit, if the world says no other."""
        ready: dict[Any, list[Job]] = {}
        for run in self.apps.values():
            if run.waiting and self.late == "drop":
                self.drop_expired(run)
            for job in run.jobs:
                ready.setdefault(job.point.unit, []).append(job)
            if run.waiting and run.placement is not None and run.app.name not in self.hold:
                ready.setdefault(run.placement.unit, []).extend(run.waiting)
        return ready

    def drop_expired(self, run: AppRun) -> None:
        """Drop the frames that nobody can serve in time any more."""
        # Deadlines within an app need not be in order of arrival when the requirement changes.
        for job in [j for j in run.waiting if self.now_ms >= j.deadline_at_ms - EPS_MS]:
            self.drop(job, "deadline passed")

    def drop(self, job: Job, reason: str) -> None:
        """Drop a frame that waits."""
        job.run.waiting.remove(job)
        self.record("drop", job, reason=reason)
        self.next_query(job.run)

    def evict(self, job: Job) -> None:
        """A frame that runs can do so no longer."""
        job.run.restart(job)

    def start(self, job: Job, switch_ms: float, **values: Any) -> None:
        """Begin with a frame that waits; `values` go into the log."""
        point = job.run.start(job, switch_ms)
        self.record("start", job, **point.logged, **values)

    def finish(self, job: Job, **values: Any) -> None:
        """A frame is done, and may be learnt from; `values` go into the log."""
        point = job.point
        job.run.jobs.remove(job)
        latency_ms = self.now_ms - job.arrival_ms
        self.record("finish", job, latency_ms=latency_ms, **point.logged, **values)
        ran = tuple(job.ran.items())
        self.finished.append(Finished(job.app, point.subnet, point.unit, ran, point.setting))
        self.next_query(job.run)
        self.ask = self.ask or not self.policy.static

    def next_query(self, run: AppRun) -> None:
        """In a closed loop the next query comes when those before are done."""
        if run.app.arrival in CLOSED_LOOP and not run.jobs and not run.waiting:
            self.push(self.now_ms, ARRIVE, run)

    # Events.

    def on_wake(self, number: int | None) -> None:
        """A policy wanted to be asked now (void if it has changed its mind), or is due."""
        self.ask = self.ask or number in (None, self.wake)

    def on_change(self, change) -> None:
        """Conditions, an app that comes or goes, or another requirement."""
        if isinstance(change, Conditions):
            self.impose(change)
            return
        self.ask = True
        if isinstance(change, AppRun):
            # One that has died before it came does not come.
            change.gone = change.gone or self.now_ms >= self.workload.end_ms(change.app)
            return
        run = self.apps[change.app]
        need = requirement_at(run.steps, self.now_ms)
        # What is asked for is known; how often others ask only when they say so.
        run.known = need if change.announced else need._replace(period_ms=run.known.period_ms)

    def on_arrive(self, run: AppRun) -> None:
        """A frame in open loop, or the next query of a closed one."""
        if run.left or self.stopped:
            return
        need = requirement_at(run.steps, self.now_ms)
        if run.app.arrival not in CLOSED_LOOP:
            self._arrive(run, need)
            self._schedule_arrival(run)
            return
        ended = self.now_ms >= self.workload.end_ms(run.app)
        if ended or not self.workload.fits(self.now_ms, need):
            return
        for _ in range(run.app.frames if run.app.arrival == "multi-stream" else 1):
            self._arrive(run, need)

    def _arrive(self, run: AppRun, need: Requirement) -> Job:
        job = run.arrive(self.now_ms, need)
        self.record("arrive", job, deadline_ms=need.deadline_ms, accuracy_floor_pct=need.floor_pct)
        self.ask = self.ask or not self.policy.static
        return job

    def impose(self, now: Conditions) -> None:
        """Other conditions hold from now on."""
        for unit, stretch, cap_mhz in zip(self.board.units, now.stretch, now.cap_mhz, strict=True):
            self.limits[unit.name] = cap_mhz
            self.constrain(unit.name, stretch, cap_mhz, now.emc)
            if cap_mhz == 0:
                for job in [job for run in self.apps.values() for job in run.jobs]:
                    if job.point.unit == unit.name:
                        self.evict(job)
        # Competitors and memory clocks announce nothing: they are no reason to ask the policy.
        before, self.now = self.now, now
        self.ask |= (before.cap_mhz, before.memory_mb) != (now.cap_mhz, now.memory_mb)

    # Decisions.

    def decide(self) -> None:
        """Ask the policy and do what it says."""
        action = self.consult(self.state(), dict(self.limits))
        self.finished = []
        self.apply(action)

    def consult(self, state: State, limits: Mapping[str, float]) -> Action:
        """Ask the policy; raises `PolicyError` for an answer that cannot be carried out."""
        return self.checked(self.policy.decide(state, limits))

    def checked(self, action: Action) -> Action:
        """`action`; raises `PolicyError` unless it is one, about apps and units that there are."""
        who = self.policy.name
        if not isinstance(action, Action):
            raise PolicyError(f"{who}: decided {action!r}, expected an Action")
        for name, placement in action.placements.items():
            if name not in self.apps:
                raise PolicyError(f"{who}: no app {name!r}; {near(name, self.apps)}")
            if not isinstance(placement, Placement | None):
                got = f"placed {name!r} at {placement!r}"
                raise PolicyError(f"{who}: {got}, expected a Placement or None")
        for name in action.clocks:
            if name not in self.limits:
                raise PolicyError(f"board {self.board.name!r} has no unit {name!r}")
        for name in (*action.hold, *action.give_up):
            if name not in self.apps:
                raise PolicyError(f"{who}: no app {name!r} to hold; {near(name, self.apps)}")
        return action

    def state(self) -> State:
        """What can be observed now."""
        units = self.observe_units()
        seen = [run.observe(self.now_ms) for run in self.apps.values()]
        apps = tuple([app for app in seen if app])
        finished = tuple(self.finished)
        now = self.now
        # By position, which is quicker: this is built for every decision.
        return State(
            self.now_ms, apps, units.clocks, units.targets, units.power_mw, finished, self.memory,
            now.emc, now.memory_mb, units.temp_c, units.others_pct,
        )  # fmt: skip

    def apply(self, action: Action) -> None:
        """Carry out what a policy decided."""
        self.memory, self.hold, changed = action.memory, action.hold, False
        for name, placement in action.placements.items():
            run = self.apps[name]
            if placement != run.wanted:
                run.wanted, changed = placement, True
                run.placement = now = self.switch(run, placement)
                reason = action.reason if now == placement else "switch failed"
                where = {} if now is None else run.table.point(*now).logged
                self.log.add(self.now_ms / 1000, "decide", app=name, reason=reason, **where)
        if action.reason and not changed and action.reason != self.reason:
            # Nobody moves, but something is given up or taken up again.
            self.log.add(self.now_ms / 1000, "decide", reason=action.reason)
        self.reason = action.reason or self.reason
        for name, due_ms in action.give_up.items():
            run = self.apps[name]
            for job in [job for job in run.waiting if job.deadline_at_ms < due_ms]:
                self.drop(job, "given up")
        if self.memory_capped:
            self.fit_memory()
        for name, mhz in action.clocks.items():
            self.request(name, mhz)
        if action.wake_ms is not None and action.wake_ms > self.now_ms:
            self.wake += 1
            self.push(action.wake_ms, WAKE, self.wake)

    def fit_memory(self) -> None:
        """Serve the apps whose networks fit together, the most important first."""
        room_mb = self.now.memory_mb
        for run in sorted(self.apps.values(), key=lambda run: -run.app.priority):
            held_mb = run.held_mb
            fits = held_mb <= room_mb
            if fits:
                room_mb -= held_mb
            else:
                for job in list(run.jobs):
                    self.evict(job)
            if fits == (run.placement is None) and run.wanted is not None:
                run.placement = self.switch(run, run.wanted) if fits else None
                where = run.table.point(*run.placement).logged if run.placement else {}
                reason = "memory is free again" if fits else "out of memory"
                self.log.add(self.now_ms / 1000, "decide", app=run.app.name, reason=reason, **where)
