"""A policy on the machine it runs on: real frames, real time, a real load beside it.

The loop here does for this computer what the engine does for a simulated board: it shows a policy
what can be observed and carries out what it decides. The networks come in as callables. It turns
the sub-network, the threads (a unit of the board for each number of them) and the CPU quota, so
that we never take much more than the plan needs; clocks are left to the kernel.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dynlib.hardware.board import Board
from dynlib.hardware.live import LiveBoard
from dynlib.points import DecisionLog
from dynlib.runtime.parts import ORDERS, AppRun, Job
from dynlib.runtime.state import Finished, Policy, State
from dynlib.runtime.tables import Tables
from dynlib.runtime.workload import CLOSED_LOOP, Workload, WorkloadError

KNOBS = ("threads", "quota_pct")
_QUOTA_ROOM = 2.0  # CPU time allowed, over what the points in use take while nobody disturbs
_LEAST_PCT = 20  # room for the program around the networks
_NAP_S = 0.0005  # the end of a wait, which is spent awake: a sleep may last that much longer


class Served(NamedTuple):
    """One app's network: `switch(subnet)`, and what answers frame k, its work done on return."""

    switch: Callable[[str], object]
    answer: Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What a live run left: its log; (app, frame) -> answer; CPU seconds of this process spent
    in the policy and on the knobs; wall seconds; knob -> why it was not turned."""

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
    knobs: LiveBoard | None = None,
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

    Raises `WorkloadError` for a workload with changes or in closed loop.
    """
    if workload.changes or any(app.arrival in CLOSED_LOOP for app in workload.apps):
        raise WorkloadError(f"{workload.name}: live runs take neither changes nor closed loops")
    loop = _Loop(workload, board, tables, policy, served, knobs)
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
        self.turned = {kind: None for kind in KNOBS if ("process", kind) in known}
        self.clocks = {unit.name: unit.max_mhz for unit in board.units}
        self.apps = [AppRun(app, workload, tables[app.model], 0, (1.0,)) for app in workload.apps]
        self.coming = [next(run.arrivals, None) for run in self.apps]
        self.news, self.finished, self.memory, self.policy_s = True, [], None, 0.0
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

    def _tick(self) -> float:
        """The time (ms), with everything due by then taken in, and expired frames dropped."""
        now_ms, due = self._now_ms(), []
        for i, run in enumerate(self.apps):
            while self.coming[i] and self.coming[i][0] <= now_ms:
                due.append(Job(run, run.frames, *self.coming[i]))
                run.frames, run.last_arrival_ms = run.frames + 1, self.coming[i][0]
                self.coming[i] = next(run.arrivals, None)
        for job in sorted(due, key=lambda job: job.arrival_ms):
            job.app.waiting.append(job)
            # It came when it was due, even if another frame ran then.
            self._log(job.arrival_ms, "arrive", job, deadline_ms=job.need.deadline_ms)
        for run in self.apps:
            while run.waiting and run.waiting[0].deadline_at_ms <= now_ms:
                self._log(now_ms, "drop", run.waiting.popleft(), reason="deadline passed")
        self.news = self.news or bool(due)
        return now_ms

    def _serve(self, job: Job) -> None:
        run, begin_ms = job.app, self._tick()
        if not run.waiting or run.waiting[0] is not job:
            return  # it expired at the last moment
        run.waiting.popleft()
        where = {"subnet": run.placement.subnet, "unit": run.placement.unit}
        self._log(begin_ms, "start", job, **where)
        self.answers[run.app.name, job.frame] = self.served[run.app.name].answer(job.frame)
        end_ms = self._tick()
        self._log(end_ms, "finish", job, **where, latency_ms=end_ms - job.arrival_ms)
        ran = ((self.clocks[where["unit"]], end_ms - begin_ms),)
        self.finished.append(Finished(run.app.name, **where, ran=ran))
        self.news = True

    def _decide(self) -> None:
        now_ms, begin = self._tick(), time.process_time()
        seen = tuple(app for run in self.apps if (app := run.observe(now_ms)))
        state = State(now_ms, seen, self.clocks, self.clocks, math.nan, tuple(self.finished),
                      self.memory)  # fmt: skip
        action = self.policy.decide(state, dict(self.clocks))
        self.memory, self.finished = action.memory, []
        changed = False
        for run in self.apps:
            placement = action.placements.get(run.app.name, run.placement)
            if placement != run.placement:
                run.placement, changed = placement, True
                where = placement._asdict() if placement else {}
                if placement:
                    self.served[run.app.name].switch(placement.subnet)
                self.log.add(now_ms / 1000, "decide", app=run.app.name, **where,
                             reason=action.reason)  # fmt: skip
        if changed:
            self._turn(now_ms)
        self.policy_s += time.process_time() - begin

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
        for kind in self.turned:
            bounds = self.knobs.knobs["process", kind].bounds
            value = min(wanted[kind], bounds[1]) if bounds else wanted[kind]
            if value == self.turned[kind]:
                continue
            applied = self.knobs.set("process", kind, value)
            self.turned[kind] = value
            field = {"threads": "cores", "quota_pct": "quota"}[kind]
            self.log.add(now_ms / 1000, "set", unit="process", **{field: applied.in_force},
                         reason=applied.problem or kind)  # fmt: skip
            if applied.problem:
                self.problems[kind] = applied.problem
