"""A run on the machine itself: real frames, real time, a real load beside it.

The networks come in as callables, and frames by a timetable or as they are pushed (`Live.submit`).
What a policy decides is carried out by switching networks and by the
machine's knobs for this process: threads, and a CPU quota, so that we never take much more than the
plan needs, or as much as a setting says; clocks are left to the kernel. One frame runs at a time.

What breaks costs one step each, and is said once, in `LiveRun.problems` and as a warning:
- a knob that is given up (see `Machine`) stays as it is;
- where a switch fails, the network before it goes on; it is tried again when next decided for;
- an app whose answer fails, or that no network could be switched to, is dead: its frames are
  dropped, and the others go on;
- a policy that fails is not asked again: what it decided last stays, first come, first served;
- a frame during which the machine was suspended counts for nobody's estimate.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, NamedTuple

from dynlib.errors import MachineError, WorkloadError
from dynlib.log import DecisionLog
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine
from dynlib.manager.policy import Action, Placement, Policy, State, fifo
from dynlib.points import Point, PointTable
from dynlib.runtime.conditions import Setup
from dynlib.runtime.jobs import AppRun, Job
from dynlib.runtime.loop import DONE, Loop, Observed
from dynlib.runtime.summary import Run
from dynlib.workload import App

LIVE_KNOBS = {"threads": "cores", "quota_pct": "quota"}  # of the process -> field of the log
_QUOTA_ROOM = 2.0  # CPU time allowed, over what the points in use take while nobody disturbs
_LEAST_PCT = 20  # room for the program around the networks
_NAP_S = 0.0005  # the end of a wait, which is spent awake: a sleep may last that much longer
_IDLE_S = 0.02  # a wait in which there is time to collect garbage
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

    Arguments and errors are those of `serve`. While one thread is in `serve`, others may push
    frames, change what apps ask for, have apps join and leave, and end the run:

    >>> import math
    >>> from threading import Thread
    >>> from dynlib.points import PointTable, make_table
    >>> from dynlib.profile import at_full_clock
    >>> from dynlib.runtime import Served
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
        super().__init__(case, policy, seed, "measured", knobs=["subnet", *self.turned])
        self.networks, self.machine = dict(networks), machine
        self.clocks = {unit.name: unit.max_mhz for unit in self.board.units}
        self.answers: dict[tuple[str, int], Any] = {}
        self.problems: dict[str, str] = {}
        self.dead: dict[str, str] = {}
        self.policy_s = 0.0
        self.handlers[DONE] = self.on_done
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
        self.start(job, 0.0)
        asleep_s, problem = _asleep_s(), ""
        begin_ms = self.clock_ms()
        try:
            self._answer(job)
        except Exception as error:  # whatever it is, the other apps are served
            problem = repr(error)
            _tell(job, error)
        end_ms = self.clock_ms()
        suspended = _asleep_s() - asleep_s > _SUSPENDED_S
        job.ran[self.clocks[job.point.unit]] = end_ms - begin_ms
        self.push(end_ms, DONE, (job, suspended, problem))

    def _answer(self, job: Job) -> None:
        answer = self.networks[job.app].answer
        if job.answer is None:
            self.answers[job.app, job.frame] = answer(job.frame)
        else:
            _tell(job, answer(job.content))

    def on_done(self, item) -> None:
        """A frame has its answer, or its app has died of it."""
        if item is None:
            return  # a frame was dropped at the last moment: time to look for another
        job, suspended, problem = item
        if job not in job.run.jobs:  # its unit was lost meanwhile: it has to start again
            if problem:
                self._dies(job.run, problem)
        elif problem:
            job.run.jobs.remove(job)
            self._dies(job.run, problem)
            self.record("drop", job, reason=f"app died: {problem}")
        elif suspended:
            self.finish(job, reason="suspended")
            self.finished.pop()
        else:
            self.finish(job)

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
        try:
            return super().consult(state, limits)
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
        """Clocks are the kernel's business, and power is not measured here."""
        return Observed(self.clocks, self.clocks, math.nan)

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
        """Threads and quota for the points now in use."""
        placed = [run for run in self.apps.values() if run.placement]
        points = [run.table.point(*run.placement) for run in placed]
        threads = max((p.setting.threads or p.cores for p in points), default=1)
        shares_pct = [
            point.setting.quota or 100 * _QUOTA_ROOM * _busy_cores(point, run.known.period_ms)
            for run, point in zip(placed, points, strict=True)
        ]
        quota_pct = max(round(sum(shares_pct)), _LEAST_PCT)
        wanted = {"threads": int(threads), "quota_pct": quota_pct}
        for kind in list(self.turned):
            self._turn_knob(kind, wanted[kind])

    def _turn_knob(self, kind: str, value: float) -> None:
        bounds = self.machine.knobs["process", kind].bounds
        value = min(value, bounds[1]) if bounds else value
        if value == self.turned[kind]:
            return
        self.turned[kind] = value
        try:
            applied = self.machine.set("process", kind, value)
            in_force, problem = applied.in_force, applied.problem
        except MachineError as error:  # not a value of this knob
            in_force, problem = self.machine.get("process", kind), str(error)
        known = {} if isinstance(in_force, Missing) else {LIVE_KNOBS[kind]: in_force}
        self.log.add(self.now_ms / 1000, "set", unit="process", reason=problem or kind, **known)
        if problem:
            self._problem(kind, problem)
        if ("process", kind) in self.machine.refused:
            del self.turned[kind]

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
    for app in case.workload.apps:
        if app.name not in networks:
            raise WorkloadError(
                f"{case.workload.name}: app {app.name!r} has no network; "
                f"there are {sorted(networks)}"
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


def _busy_cores(point: Point, period_ms: float) -> float:
    """Cores that a point keeps busy on average while nobody disturbs."""
    return point.cores * point.latency_ms[-1] / period_ms


def _asleep_s() -> float:
    """How long the machine has been suspended so far, where the system tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.clock_gettime(clock) - time.monotonic()
