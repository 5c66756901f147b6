"""A run on the machine itself: real frames, real time, a real load beside it.

The networks come in as callables, and frames by a timetable or as they are pushed (`Live.submit`).
What a policy decides is carried out by switching networks and by the knobs of the machine: clocks
and governors of its units (`bind`), and threads, CPU quota and affinity of this process. One frame
runs at a time, so a clock is set before a frame and not within one. At every decision a `sample`
says what was seen of the machine: from the log alone `replay` repeats every decision.

What breaks costs one step each, and is said once, in `LiveRun.problems` and as a warning:
- a knob that is lacking, or given up (see `Machine`), stays as it is;
- a frame that our own quota held back counts for nobody's estimate, and a quota that makes frames
  late is let go;
- where a switch fails, the network before it goes on; it is tried again when next decided for;
- an app whose answer fails, or that no network could be switched to, is dead: its frames are
  dropped, and the others go on;
- a policy that fails is not asked again: what it decided last stays, first come, first served;
- a frame during which the machine was suspended counts for nobody's estimate.
"""

import gc
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, NamedTuple

from dynlib.boards.board import Board
from dynlib.errors import MachineError, WorkloadError
from dynlib.log import DecisionLog
from dynlib.machine.bind import Binding, bind
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine
from dynlib.machine.usage import Usage
from dynlib.manager.policy import Action, Placement, Policy, State, fifo
from dynlib.points import Point, PointTable
from dynlib.runtime.conditions import Setup
from dynlib.runtime.jobs import AppRun, Job
from dynlib.runtime.loop import CLOCK, DONE, Loop, Observed
from dynlib.runtime.summary import Run
from dynlib.workload import App

# Of the process -> field of the log, if there is one.
LIVE_KNOBS = {"threads": "cores", "quota_pct": "quota", "affinity": ""}
_HELD = (5, 10)  # so many of the last frames late and held back: the quota does harm
_CAPS_MS = 100.0  # how often limits of clocks are read
_NAP_S = 0.0005  # the end of a wait, which is spent awake: a sleep may last that much longer
_IDLE_S = 0.02  # a wait in which there is time to collect garbage
_KEPT = 10_000  # events in memory of a run without an end
_SUSPENDED_S = 1.0  # two clocks apart by more than being put aside between reading them explains
_LOG = logging.getLogger(__name__)


class Served(NamedTuple):
    """One app's network.

    `switch(subnet)`, or ``switch(subnet, setting)`` with `takes_setting`, makes it ready;
    `answer(k)` answers frame k, its work done on return; of an app whose frames are pushed it is
    given what was submitted instead.
    """

    switch: Callable[..., object]
    answer: Callable[[int], Any]
    takes_setting: bool = False


class LiveRun(Run):
    """What a live run left, beside its log.

    Attributes:
        answers: (app, frame) -> answer, of frames that were not pushed.
        policy_s: CPU seconds of this process spent in the policy and on the knobs.
        wall_s: seconds in all.
        problems: what broke -> why: a knob by its kind, `policy`, "app cam", or "app cam, switch to
            small".
    """

    def __init__(
        self,
        case: Setup,
        log: DecisionLog,
        answers: Mapping[tuple[str, int], Any],
        policy_s: float,
        wall_s: float,
        problems: Mapping[str, str],
    ):
        super().__init__(case, log)
        self.answers, self.problems = answers, problems
        self.policy_s, self.wall_s = policy_s, wall_s

    @property
    def overhead_pct(self) -> float:
        """Share of one core that deciding and acting took."""
        return 100 * self.policy_s / self.wall_s


def serve(
    case: Setup,
    policy: Policy,
    networks: Mapping[str, Served],
    *,
    machine: Machine | None = None,
    journal: str | Path | None = None,
    seed: int = 0,
) -> LiveRun:
    """Serve a case in real time, on the machine this runs on, and log as a simulation does.

    Requirements change, apps come and go, and limits are set as the workload says; its competitors
    have to be real ones. See `Live` for a run that is steered while it goes on.

    Args:
        networks: app -> its network.
        machine: opened, and held with ``with``; None: only sub-networks change.
        journal: file that gets every event of the log as it comes (`DecisionLog.journal`).
        seed: of arrivals.

    Raises `WorkloadError` for an app without a network, and for a workload that stretches units,
    changes the memory clock or the air; and whatever the policy raises before any app was placed.

    >>> from dynlib.points import PointTable, make_table
    >>> from dynlib.profile import at_full_clock
    >>> board = at_full_clock(load_board("auto"))
    >>> table = make_table([{
    ...     "model": "example", "board": board.name, "unit": board.units[0].name, "batch": 1,
    ...     "subnet": "large", "latency_ms": 1.0, "accuracy_val_pct": 80.0, "source": "measured",
    ... }])
    >>> camera = App("camera", "example", deadline_ms=33.0, period_ms=33.0, accuracy_floor_pct=75.0)
    >>> case = Case(Workload("street", 0.5, (camera,)), board, PointTable.of_models(table, board))
    >>> from dynlib.runtime import Served
    >>> networks = {"camera": Served(switch=lambda subnet: None, answer=lambda k: f"frame {k}")}
    >>> run = serve(case, Manager(board, case.tables, objective="accuracy"), networks)
    >>> run.answers["camera", 0], len(run.frames())
    ('frame 0', 15)
    """
    return Live(case, policy, networks, machine=machine, journal=journal, seed=seed).serve()


class Live(Loop):
    """The machine as a world: it has one place, where one frame runs at a time.

    Of a run without an end the log holds the last 10,000 events at least, its `journal` all, and
    only frames that are pushed have their answers kept: by who pushed them.

    Arguments and errors are those of `serve`. While one thread is in `serve`, others may push
    frames, change what apps ask for, have apps join and leave, and end the run:

    >>> import math
    >>> from threading import Thread
    >>> from dynlib.points import PointTable, make_table
    >>> from dynlib.profile import at_full_clock
    >>> from dynlib.runtime.live import Live, Served
    >>> board = at_full_clock(load_board("auto"))
    >>> table = make_table([{
    ...     "model": "example", "board": board.name, "unit": board.units[0].name, "batch": 1,
    ...     "subnet": "large", "latency_ms": 1.0, "accuracy_val_pct": 80.0, "source": "measured",
    ... }])
    >>> camera = App("camera", "example", deadline_ms=500.0, arrival="pushed")
    >>> door = Workload("door", math.inf, (camera,))
    >>> case = Case(door, board, PointTable.of_models(table, board))
    >>> network = Served(switch=lambda subnet: None, answer=str.upper)
    >>> live = Live(case, Manager(board, case.tables), {"camera": network})
    >>> thread = Thread(target=live.serve)
    >>> thread.start()
    >>> live.set_requirement("camera", deadline_ms=200.0)
    >>> live.submit("camera", "who is there").result()
    'WHO IS THERE'
    >>> live.stop()
    >>> thread.join()
    """

    def __init__(
        self,
        case: Setup,
        policy: Policy,
        networks: Mapping[str, Served],
        *,
        machine: Machine | None = None,
        journal: str | Path | None = None,
        seed: int = 0,
    ):
        _check(case, networks)
        self.case = case
        known = machine.knobs if machine else {}
        self.turned = {kind: None for kind in LIVE_KNOBS if ("process", kind) in known}
        bound = bind(case.board, machine) if machine else None
        clocked = _clocked(bound) if bound else set()
        knobs = ["subnet", *self.turned, *sorted(f"{unit} clock_mhz" for unit in clocked)]
        super().__init__(case, policy, seed, "measured", knobs=knobs)
        self.networks, self.machine = dict(networks), machine
        self.bound, self.clocked = bound, clocked - set(policy.governors)
        self.clocks = {unit.name: unit.max_mhz for unit in self.board.units}
        self.targets = dict(self.clocks)
        self.caps: dict[str, float] = {}
        self.caps_ms = -math.inf
        self.usage = _usage(self.board)
        self.held: deque[bool] = deque(maxlen=_HELD[1])
        self.answers: dict[tuple[str, int], Any] = {}
        self.problems: dict[str, str] = {}
        self.dead: dict[str, str] = {}
        self.policy_s = 0.0
        self.handlers |= {DONE: self.on_done, CLOCK: self.on_clock}
        if math.isinf(self.horizon_ms):
            self.log.most = _KEPT
        if journal:
            self.log.journal(journal)
        self.begin = time.perf_counter()

    def serve(self) -> LiveRun:
        """Serve to the end; what is left of it."""
        collects = gc.isenabled()
        gc.disable()  # a collection takes longer than many a frame
        self.begin = time.perf_counter()
        try:
            log = self.run()
        finally:
            if collects:
                gc.enable()
        case = replace(self.case, workload=self.workload, tables=self.tables)
        return LiveRun(case, log, self.answers, self.policy_s, self.wall_s(), self.problems)

    def add_app(
        self,
        app: App,
        network: Served,
        table: PointTable | None = None,
        policy: Policy | None = None,
    ) -> None:
        """An app joins with its network; see `Loop.add_app`."""
        super().add_app(app, table, policy)
        self.networks[app.name] = network

    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begin

    def clock_ms(self) -> float:
        """Since the start, in whole microseconds, which the seconds of a log tell exactly."""
        return round(self.wall_s() * 1e6) / 1e3

    def wait(self, until_ms: float) -> float:
        """Sleep until then, if that is not yet, or until something is posted."""
        left_s = until_ms / 1000 - self.wall_s() - _NAP_S
        if left_s > _IDLE_S:
            gc.collect(0)
        if left_s > 0:
            self.bell.wait(min(left_s, TIMEOUT_MAX))
        while (now_ms := self.clock_ms()) < until_ms and not self.bell.is_set():
            pass
        self.bell.clear()  # what was posted is taken in next
        return min(now_ms, self.horizon_ms)

    def free(self) -> tuple[str]:
        """The machine: whatever ran there has ended."""
        return ("machine",)

    def ready(self) -> dict[str, list[Job]]:
        """All units share the one place; one that is lost has none."""
        on = super().ready().items()
        return {"machine": [job for unit, jobs in on if self.limits[unit] for job in jobs]}

    def dispatch(self, place: str, job: Job) -> None:
        """Answer a frame; its end is an event, as others may have happened meanwhile."""
        if self.clock_ms() >= job.deadline_at_ms:
            self.drop(job, "deadline passed")  # at the last moment
            self.push(self.now_ms, DONE)
            return
        asleep_s, throttled, problem = _asleep_s(), self._throttled(), ""
        begin_ms = self.clock_ms()  # deciding took its time
        self.start(job, 0.0, latency_ms=begin_ms - job.arrival_ms)
        try:
            self._answer(job)
        except Exception as error:  # whatever it is, the other apps are served
            problem = repr(error)
            _tell(job, error)
        end_ms = self.clock_ms()
        why = "suspended" if _asleep_s() - asleep_s > _SUSPENDED_S else ""
        if self._throttled() > throttled:
            self.held.append(end_ms > job.deadline_at_ms)
            why = why or self._held_back(job.point)
        elif throttled:
            self.held.append(False)
        self.on_clock(job.point.unit)
        job.ran[self.clocks[job.point.unit]] = end_ms - begin_ms
        self.push(end_ms, DONE, (job, why, problem))

    def _answer(self, job: Job) -> None:
        answer = self.networks[job.app].answer
        if job.answer is not None:
            _tell(job, answer(job.content))
            return
        answered = answer(job.frame)
        if math.isfinite(self.horizon_ms):  # else they would fill the memory
            self.answers[job.app, job.frame] = answered

    def on_done(self, item) -> None:
        """A frame has its answer, or its app has died of it."""
        if item is None:
            return  # a frame was dropped at the last moment: time to look for another
        job, why, problem = item
        if job not in job.run.jobs:  # its unit was lost meanwhile: it has to start again
            if problem:
                self._dies(job.run, problem)
        elif problem:
            job.run.jobs.remove(job)
            self._dies(job.run, problem)
            self.record("drop", job, reason=f"app died: {problem}")
        elif why:  # it says nothing of how long frames take
            self.finish(job, reason=why)
            self.finished.pop()
        else:
            self.finish(job)

    def finish(self, job: Job, **values: Any) -> None:
        """Where no clock could be lowered meanwhile, what it tells is in time with the next one."""
        asked = self.ask
        super().finish(job, **values)
        if not self.clocked and not any(run.waiting or run.jobs for run in self.apps.values()):
            self.ask = asked

    def drop_expired(self, run: AppRun) -> None:
        """A dead app's frames are dropped at once."""
        if run.app.name not in self.dead:
            super().drop_expired(run)
            return
        for job in list(run.waiting):
            self.drop(job, "app died")

    def next_query(self, run: AppRun) -> None:
        """A dead app asks for nothing more."""
        if run.app.name not in self.dead:
            super().next_query(run)

    def settle(self) -> None:
        """A dead app is nothing to decide about."""
        for name in self.dead:
            self.drop_expired(self.apps[name])
        super().settle()

    def consult(self, state: State, limits: Mapping[str, float]) -> Action:
        """Ask the policy; one that fails is not asked again."""
        if "policy" in self.problems:
            return Action(memory=self.memory)
        capped = {unit: min(mhz, self.caps.get(unit, mhz)) for unit, mhz in limits.items()}
        try:
            return super().consult(state, capped)
        except Exception as error:  # the board must not be left to nobody
            if all(run.placement is None for run in self.apps.values()):
                raise
            self._policy_fails(error)
            return Action(memory=self.memory)

    def choose(self, jobs: list[Job]) -> Job:
        """The policy's choice, or the first come after it has failed."""
        if "policy" not in self.problems:
            try:
                return super().choose(jobs)
            except Exception as error:  # as above
                self._policy_fails(error)
        return fifo(jobs, self.now_ms)

    def _policy_fails(self, error: Exception) -> None:
        self._problem("policy", repr(error))
        reason = f"policy failed: {error!r}"
        self.log.add(self.now_ms / 1000, "decide", reason=reason)

    def decide(self) -> None:
        """Deciding and acting are timed: they are what managing costs."""
        before, begin = self.placements(), time.process_time()
        self._read_caps()
        super().decide()
        if self.placements() != before:
            self._turn()
        self.policy_s += time.process_time() - begin

    def apply(self, action: Action) -> None:
        """Carry out what concerns the living."""
        placements = {k: where for k, where in action.placements.items() if k not in self.dead}
        super().apply(replace(action, placements=placements))

    def placements(self) -> list[Placement | None]:
        """Where every app is."""
        return [run.placement for run in self.apps.values()]

    def observe_units(self) -> Observed:
        """Clocks, and how busy others keep the CPUs; power is not measured here."""
        others_pct = {}
        for name, usage in self.usage.items():
            share = usage.others()
            if not isinstance(share, Missing):
                others_pct[name] = round(100 * share, 1)
        for name in self.clocks:
            seen = {"others_pct": others_pct[name]} if name in others_pct else {}
            self.log.add(self.now_ms / 1000, "sample", unit=name, **seen)
        clocks, targets = dict(self.clocks), dict(self.targets)
        return Observed(clocks, targets, math.nan, others_pct=others_pct)

    def schedule(self) -> None:
        """Governors that the policy leaves clocks to; for the others one that acts at once.

        Under schedutil a clock that was set acts when its CPU next has work, and until then every
        look at it waits in vain.
        """
        super().schedule()
        for unit in self.clocked:
            if self.board.unit(unit).kind == "cpu" and self.bound.has(unit, "governor"):
                self.bound.set(unit, "governor", "performance")
        for unit, governor in self.policy.governors.items():
            if self.bound and len(self.board.unit(unit).freqs) > 1:
                applied = self.bound.set(unit, "governor", governor)
                if applied.problem:
                    self._problem(f"{unit} governor", applied.problem)

    def request(self, unit: str, mhz: float) -> None:
        """A clock that the policy wants; what is asked for acts when it has settled."""
        if unit not in self.clocked or mhz == self.targets[unit]:
            return
        self.targets[unit] = mhz
        self._log_clock(unit, mhz, "policy")
        applied = self.bound.set(unit, "clock_mhz", mhz)
        if applied.problem:
            self._problem(f"{unit} clock_mhz", applied.problem)
        if not self.bound.has(unit, "clock_mhz"):
            self.clocked.discard(unit)
        self.push(self.now_ms + self.board.unit(unit).settle_ms, CLOCK, unit)

    def on_clock(self, unit: str) -> None:
        """A clock has settled."""
        if self._read_clock(unit):
            self._log_clock(unit, self.clocks[unit], "acts")

    def _read_clock(self, unit: str) -> bool:
        """Read back the clock in force; whether it is another one."""
        if not self.bound or self.clocks[unit] == self.targets[unit]:
            return False
        before, in_force = self.clocks[unit], self.bound.get(unit, "clock_mhz")
        if not isinstance(in_force, Missing):
            self.clocks[unit] = self.board.unit(unit).at_or_below(in_force)
        return self.clocks[unit] != before

    def _log_clock(self, unit: str, mhz: float, reason: str) -> None:
        field = "cpu_mhz" if self.board.unit(unit).kind == "cpu" else "gpu_mhz"
        self.log.add(self.now_ms / 1000, "set", unit=unit, reason=reason, **{field: mhz})

    def _read_caps(self) -> None:
        """Limits that the kernel, firmware or a power mode set to clocks."""
        if not self.clocked or self.now_ms < self.caps_ms + _CAPS_MS:
            return
        caps = {unit: self.board.unit(unit).at_or_below(mhz)
                for unit, mhz in self.bound.caps().items() if unit in self.clocks}  # fmt: skip
        for unit in caps.keys() | self.caps.keys():
            mhz = caps.get(unit, self.board.unit(unit).max_mhz)
            if mhz != self.caps.get(unit):
                self._log_clock(unit, mhz, "limit")
        self.caps, self.caps_ms = caps, self.now_ms

    def switch(self, run: AppRun, placement: Placement | None) -> Placement | None:
        """Switch; where that fails, the network before serves on."""
        name = run.app.name
        if placement is None:
            return None
        for where in filter(None, (placement, run.placement)):
            try:
                run.table.point(*where)
                network = self.networks[name]
                how = (where.setting,) if network.takes_setting else ()
                network.switch(where.subnet, *how)
                return where
            except Exception as error:  # out of memory, say, half way
                self._problem(f"app {name}, switch to {where.subnet}", repr(error))
        self._dies(run, "no network could be switched to")
        return None

    def _turn(self) -> None:
        """Threads, quota and CPUs for the points now in use: what a setting says, no less."""
        placed = [run for run in self.apps.values() if run.placement]
        points = [run.table.point(*run.placement) for run in placed]
        if not points:
            return
        wanted = {"threads": int(max(p.setting.threads or p.cores for p in points))}
        if "quota_pct" in self.turned:
            quotas = [point.setting.quota for point in points]
            most_pct = self.machine.knobs["process", "quota_pct"].bounds[1]
            # A quota is for the process: with an app that knows none it would be for that one too.
            asked_pct = most_pct if None in quotas else min(sum(quotas), most_pct)
            if asked_pct < most_pct or self.turned["quota_pct"] is not None:
                wanted["quota_pct"] = asked_pct
        clusters = [unit for unit in self.board.units if unit.kind == "cpu" and unit.cpus]
        if len(clusters) > 1:
            used = {point.unit for point in points}
            cpus = {cpu for unit in clusters if unit.name in used for cpu in unit.cpus}
            if cpus:
                wanted["affinity"] = tuple(sorted(cpus))
        for kind, value in wanted.items():
            if kind in self.turned:
                self._turn_knob(kind, value)

    def _turn_knob(self, kind: str, value) -> None:
        if value == self.turned[kind]:
            return
        self.turned[kind] = value
        try:
            applied = self.machine.set("process", kind, value)
            in_force, problem = applied.in_force, applied.problem
        except MachineError as error:  # not a value of this knob
            in_force, problem = self.machine.get("process", kind), str(error)
        field = LIVE_KNOBS[kind]
        known = {} if isinstance(in_force, Missing) or not field else {field: in_force}
        self.log.add(self.now_ms / 1000, "set", unit="process", reason=problem or kind, **known)
        if problem:
            self._problem(kind, problem)
        if ("process", kind) in self.machine.refused:
            del self.turned[kind]

    def _throttled(self) -> int:
        """How many periods our own quota has held us back in so far; 0 while there is none."""
        if self.turned.get("quota_pct") is None:
            return 0
        throttled = getattr(self.machine.knobs["process", "quota_pct"], "throttled", None)
        try:
            return throttled() + 1 if throttled else 0
        except OSError:
            return 0

    def _held_back(self, point: Point) -> str:
        """Why a frame that the quota held back is none to learn from."""
        if sum(self.held) >= _HELD[0]:
            self.held.clear()
            self._turn_knob("quota_pct", self.machine.knobs["process", "quota_pct"].bounds[1])
            self.turned.pop("quota_pct", None)
            self._problem("quota_pct", f"let go: it made {_HELD[0]} of {_HELD[1]} frames late")
        # Where a point was measured with its quota, that is how long it takes.
        return "throttled" if point.setting.quota is None else ""

    def _join(self, app: App, table: PointTable | None, policy: Policy | None) -> None:
        self.dead.pop(app.name, None)
        super()._join(app, table, policy)

    def _dies(self, run: AppRun, why: str) -> None:
        run.gone, run.placement = True, None
        self.dead[run.app.name] = why
        self._problem(f"app {run.app.name}", why)

    def _problem(self, what: str, why: str) -> None:
        if what not in self.problems:
            self.problems[what] = why
            _LOG.warning("%s: %s", what, why)


def _check(case: Setup, networks: Mapping[str, Served]) -> None:
    for change in case.workload.changes:
        if change.stretch or change.emc_mhz or change.ambient_c is not None:
            raise WorkloadError(
                f"{case.workload.name}: at {change.t_s:g} s: a live run cannot set stretch, "
                "emc_mhz or ambient_c; expected changes of apps, caps or memory_mb"
            )
    known = {name for name, network in networks.items() if network is not None}
    for app in case.workload.apps:
        if app.name not in known:
            raise WorkloadError(
                f"{case.workload.name}: app {app.name!r} has no network; there are {sorted(known)}"
            )


def _tell(job: Job, result: Any) -> None:
    """Whoever waits for the answer of a pushed frame gets it, or the error there was instead."""
    if job.answer is None:
        return
    with suppress(InvalidStateError):  # nobody waits any more
        if isinstance(result, Exception):
            job.answer.set_exception(result)
        else:
            job.answer.set_result(result)


def _clocked(bound: Binding) -> set[str]:
    """The units that have several clocks which can be set."""
    units = [unit for unit in bound.board.units if len(unit.freqs) > 1]
    return {unit.name for unit in units if bound.has(unit.name, "clock_mhz")}


def _usage(board: Board) -> dict[str, Usage]:
    """Who looks at the CPUs of each unit that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return {}
    allowed = os.sched_getaffinity(0)
    shared = {unit.name: allowed.intersection(unit.cpus) for unit in board.units}
    return {name: Usage(cpus) for name, cpus in shared.items() if cpus}


def _asleep_s() -> float:
    """How long the machine has been suspended so far, where the system tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.clock_gettime(clock) - time.monotonic()
