"""A policy on the machine it runs on: real frames, real time, a real load beside it.

The loop here does for this computer what the engine does for a simulated board: it shows a policy
what can be observed and carries out what it decides. The networks come in as callables. It turns
the sub-network, the threads (a unit of the board for each number of them) and the CPU quota, so
that we never take much more than the plan needs; clocks are left to the kernel.

What breaks costs one step each, and is said once, in `LiveRun.problems` and as a warning:
- a knob that is given up (see `Machine`) stays as it is;
- where a switch fails, the network before it goes on; it is tried again when next decided for;
- an app whose answer fails, or that no network could be switched to, is dead: its frames are
  dropped, and the others go on;
- a policy that fails is not asked again: what it decided last stays;
- a frame during which the machine was suspended counts for nobody's estimate.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from dynlib.boards.board import Board
from dynlib.errors import MachineError, WorkloadError
from dynlib.log import DecisionLog
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine
from dynlib.manager.policy import Finished, Placement, Policy, State
from dynlib.points import Tables
from dynlib.runtime.jobs import ORDERS, AppRun, Job
from dynlib.workload import CLOSED_LOOP, Workload

LIVE_KNOBS = ("threads", "quota_pct")
_QUOTA_ROOM = 2.0  # CPU time allowed, over what the points in use take while nobody disturbs
_LEAST_PCT = 20  # room for the program around the networks
_NAP_S = 0.0005  # the end of a wait, which is spent awake: a sleep may last that much longer
_SUSPENDED_S = 1.0  # two clocks apart by more than being put aside between reading them explains
_LOG = logging.getLogger(__name__)


class Served(NamedTuple):
    """One app's network: `switch(subnet)`, and what answers frame k, its work done on return."""

    switch: Callable[[str], object]
    answer: Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What a live run left: its log; (app, frame) -> answer; CPU seconds of this process spent
    in the policy and on the knobs; wall seconds; what broke -> why: a knob by its kind, `policy`,
    "app cam", or "app cam, switch to small"."""

    log: DecisionLog
    answers: Mapping[tuple[str, int], Any]
    policy_s: float
    wall_s: float
    problems: Mapping[str, str]

    @property
    def overhead_pct(self) -> float:
        """Share of one core that deciding and acting took."""
        return 100 * self.policy_s / self.wall_s


def run_live(
    workload: Workload,
    board: Board,
    tables: Tables,
    policy: Policy,
    served: Mapping[str, Served],
    knobs: Machine | None = None,
    journal: str | Path | None = None,
) -> LiveRun:
    """Serve `workload`, whose times are now real ones, under `policy`, and log as the engine does.

    One frame runs at a time. Like in the engine a frame is dropped when its deadline has passed
    before it starts, and one that runs is never aborted; the policy is asked at the start, and when
    frames arrived or ended.

    Args:
        workload: apps in open loop, whose requirements do not change.
        board: of `live_board`. tables: measured points on it.
        served: app -> its network.
        knobs: the opened board, held with ``with``; None: only sub-networks change.
        journal: file that gets every event of the log as it comes (`DecisionLog.journal`).

    Raises `WorkloadError` for a workload with changes or in closed loop, and whatever the policy
    raises before any app was placed.
    """
    if workload.changes or any(app.arrival in CLOSED_LOOP for app in workload.apps):
        raise WorkloadError(f"{workload.name}: live runs take neither changes nor closed loops")
    loop = _Loop(workload, board, tables, policy, served, knobs)
    if journal:
        loop.log.journal(journal)
    collects = gc.isenabled()
    gc.disable()  # a collection takes longer than many a frame
    try:
        return loop.run()
    finally:
        if collects:
            gc.enable()


class _Loop:
    def __init__(self, workload, board, tables, policy, served, knobs):
        self.board, self.tables, self.policy, self.served = board, tables, policy, served
        self.knobs, known = knobs, knobs.knobs if knobs else {}
        self.turned = {kind: None for kind in LIVE_KNOBS if ("process", kind) in known}
        self.clocks = {unit.name: unit.max_mhz for unit in board.units}
        self.apps = [AppRun(app, workload, tables[app.model], 0, (1.0,)) for app in workload.apps]
        self.coming = [next(run.arrivals, None) for run in self.apps]
        self.news, self.finished, self.memory, self.policy_s = True, [], None, 0.0
        self.wanted: dict[str, Placement | None] = {}
        self.answers: dict[tuple[str, int], Any] = {}
        self.problems: dict[str, str] = {}
        self.log = DecisionLog(
            scenario=workload.name, policy=policy.name, seed=0, board=board.name,
            board_sha256=board.digest, workload_sha256=workload.digest,
            table_sha256={name: table.digest for name, table in tables.items()},
            source="measured", horizon_s=workload.horizon_s, knobs=["subnet", *self.turned],
        )  # fmt: skip

    def run(self) -> LiveRun:
        asked, self.begin = False, time.perf_counter()
        while True:
            self._tick()
            if self.news and not (asked and self.policy.static):
                self._decide()
            asked, self.news = True, False
            ready = [run.waiting[0] for run in self.apps if run.waiting and run.placement]
            ahead = [item[0] for item in self.coming if item]
            if ready:
                self._serve(min(ready, key=ORDERS[self.policy.order]))
            elif ahead:
                self._sleep(min(ahead))
            else:
                break
        wall_s = self._now_ms() / 1000
        return LiveRun(self.log, self.answers, self.policy_s, wall_s, self.problems)

    def _now_ms(self) -> float:
        return (time.perf_counter() - self.begin) * 1000

    def _sleep(self, until_ms: float) -> None:
        time.sleep(max((until_ms - self._now_ms()) / 1000 - _NAP_S, 0.0))
        while self._now_ms() < until_ms:
            pass

    def _log(self, t_ms: float, event: str, job: Job | None = None, **values) -> None:
        who = {"app": job.app.app.name, "frame": job.frame} if job else {}
        self.log.add(t_ms / 1000, event, **who, **values)

    def _problem(self, what: str, why: str) -> None:
        if what not in self.problems:
            self.problems[what] = why
            _LOG.warning("%s: %s", what, why)

    def _died(self, run: AppRun, why: str) -> None:
        run.gone, run.placement = True, None
        self._problem(f"app {run.app.name}", why)

    def _tick(self) -> float:
        """The time (ms), with everything due by then taken in, and expired frames dropped."""
        now_ms, due = self._now_ms(), []
        for i, run in enumerate(self.apps):
            while self.coming[i] and self.coming[i][0] <= now_ms:
                due.append((run, *self.coming[i]))
                self.coming[i] = next(run.arrivals, None)
        for run, arrival_ms, need in sorted(due, key=itemgetter(1)):
            job = run.arrive(arrival_ms, need)
            # It came when it was due, even if another frame ran then.
            self._log(arrival_ms, "arrive", job, deadline_ms=need.deadline_ms)
        for run in self.apps:
            reason = "app died" if run.gone else "deadline passed"
            while run.waiting and (run.gone or run.waiting[0].deadline_at_ms <= now_ms):
                self._log(now_ms, "drop", run.waiting.popleft(), reason=reason)
        self.news = self.news or bool(due)
        return now_ms

    def _serve(self, job: Job) -> None:
        run, begin_ms = job.app, self._tick()
        if not run.waiting or run.waiting[0] is not job:
            return  # it expired at the last moment
        run.waiting.popleft()
        where = {"subnet": run.placement.subnet, "unit": run.placement.unit}
        self._log(begin_ms, "start", job, **where)
        self.news, asleep_s = True, _asleep_s()
        answer = self.served[run.app.name].answer
        try:
            self.answers[run.app.name, job.frame] = answer(job.frame)
        except Exception as error:  # whatever it is, the other apps are served
            self._died(run, repr(error))
            self._log(self._tick(), "drop", job, reason=f"app died: {error!r}")
            return
        end_ms = self._tick()
        late = {"latency_ms": end_ms - job.arrival_ms}
        if _asleep_s() - asleep_s > _SUSPENDED_S:
            self._log(end_ms, "finish", job, **where, **late, reason="suspended")
            return
        self._log(end_ms, "finish", job, **where, **late)
        ran = ((self.clocks[where["unit"]], end_ms - begin_ms),)
        self.finished.append(Finished(run.app.name, **where, ran=ran))

    def _decide(self) -> None:
        if "policy" in self.problems:
            self.finished = []
            return
        now_ms, begin = self._tick(), time.process_time()
        seen = tuple(app for run in self.apps if (app := run.observe(now_ms)))
        state = State(now_ms, seen, self.clocks, self.clocks, math.nan, tuple(self.finished),
                      self.memory)  # fmt: skip
        try:
            action = self.policy.decide(state, dict(self.clocks))
        except Exception as error:  # the board must not be left to nobody
            if all(run.placement is None for run in self.apps):
                raise
            self._problem("policy", repr(error))
            self.log.add(now_ms / 1000, "decide", reason=f"policy failed: {error!r}")
            return
        self.memory, self.finished = action.memory, []
        changed = False
        for run in self.apps:
            name, old = run.app.name, self.wanted.get(run.app.name)
            wanted = action.placements.get(name, old)
            if wanted == old or run.gone:
                continue
            self.wanted[name], changed = wanted, True
            run.placement = self._switched(run, wanted)
            where = run.placement._asdict() if run.placement else {}
            reason = action.reason if run.placement == wanted else "switch failed"
            self.log.add(now_ms / 1000, "decide", app=name, **where, reason=reason)
        if changed:
            self._turn(now_ms)
        self.policy_s += time.process_time() - begin

    def _switched(self, run: AppRun, wanted: Placement | None) -> Placement | None:
        """Switch; what serves from then on: where that fails, the network before."""
        if wanted is None:
            return None
        for where in filter(None, (wanted, run.placement)):
            try:
                self.served[run.app.name].switch(where.subnet)
                return where
            except Exception as error:  # out of memory, say, half way
                self._problem(f"app {run.app.name}, switch to {where.subnet}", repr(error))
        self._died(run, "no network could be switched to")
        return None

    def _turn(self, now_ms: float) -> None:
        """Threads and quota for the points now in use."""
        threads, busy = 1, 0.0
        for run in self.apps:
            if run.placement:
                cores = self.board.unit(run.placement.unit).cores
                threads = max(threads, cores)
                point = run.table.point(*run.placement)
                busy += cores * point.latency_ms[-1] / run.known.period_ms
        quota_pct = max(round(100 * _QUOTA_ROOM * busy), _LEAST_PCT)
        wanted = {"threads": threads, "quota_pct": quota_pct}
        for kind in list(self.turned):
            bounds = self.knobs.knobs["process", kind].bounds
            value = min(wanted[kind], bounds[1]) if bounds else wanted[kind]
            if value == self.turned[kind]:
                continue
            self.turned[kind] = value
            try:
                applied = self.knobs.set("process", kind, value)
                in_force, problem = applied.in_force, applied.problem
            except MachineError as error:  # not a value of this knob
                in_force, problem = self.knobs.get("process", kind), str(error)
            field = {"threads": "cores", "quota_pct": "quota"}[kind]
            known = {} if isinstance(in_force, Missing) else {field: in_force}
            self.log.add(now_ms / 1000, "set", unit="process", **known, reason=problem or kind)
            if problem:
                self._problem(kind, problem)
            if ("process", kind) in self.knobs.refused:
                del self.turned[kind]


def _asleep_s() -> float:
    """How long the machine has been suspended so far, where the system tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.clock_gettime(clock) - time.monotonic()
