"""One discrete-event engine for managers and schedulers.

A job is one frame: a list of segments (a whole network is one), run on one unit at a time. Its
speed follows the clock of the unit, competitors there stretch it, and power is constant between
events. A unit runs one job at a time; at a segment boundary a more urgent one may overtake.

Rules a number depends on:
- a frame whose deadline has passed before it starts is dropped; one that runs is never aborted;
- a requested clock acts after the unit's settling time, a newer request replaces an older one, and
  when it acts the unit stands still for the stall time (drawing the power of the new clock);
- competitors that stretch execution by x keep 1 - 1/x of the unit busy while none of our jobs runs;
- changing an app's sub-network costs `switch_ms` before its next frame, at full power;
- heat plays a part only where the workload changes the air (see `heat`); a cap from it is a `set`
  for the reason "heat", with the highest clock the unit may have;
- noise of frame k of app a is a function of (seed, a, k) alone: every policy meets the same frames.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from time import process_time

from dynlib.boards.board import Board
from dynlib.boards.governors import make_governor
from dynlib.errors import PolicyError
from dynlib.log import DecisionLog
from dynlib.manager.policy import Action, Finished, Policy, State
from dynlib.points import Tables
from dynlib.runtime.conditions import Conditions, conditions
from dynlib.runtime.heat import Heat
from dynlib.runtime.jobs import EPS_MS, ORDERS, AppRun, Job, UnitRun
from dynlib.source import weakest
from dynlib.workload import ANNOUNCE_MS, CLOSED_LOOP, Requirement, Workload, requirement_at

SWITCH_MS = 1.0  # bar of the switching notebook: p99 below 1 ms in one process
# Among events at one instant: requirements first, then the hardware, then frames, then decisions.
_CHANGE, _DONE, _CLOCK, _ARRIVE, _TICK, _WAKE = range(6)


class Engine:
    """One run of a workload on a board; `run` does it all."""

    def __init__(
        self,
        workload: Workload,
        board: Board,
        tables: Tables,
        policy: Policy,
        seed: int = 0,
        *,
        switch_ms: float = SWITCH_MS,
        segments: Mapping[str, Sequence[float]] | None = None,
        decision_ms: list[float] | None = None,
    ):
        self.workload, self.board, self.tables, self.policy = workload, board, tables, policy
        self.switch_ms, self.decision_ms = switch_ms, decision_ms
        board.power_mw({}, {})  # raises for a board without a power model
        self.now_ms, self.heap, self.order, self.wake = 0.0, [], 0, 0
        self.units: dict[str, UnitRun] = {}
        for unit in board.units:
            name = policy.governors.get(unit.name)
            self.units[unit.name] = UnitRun(unit, make_governor(name, unit) if name else None)
        self.apps: dict[str, AppRun] = {}
        for app in workload.apps:
            if app.model not in tables:
                raise PolicyError(f"app {app.name!r}: no table for model {app.model!r}; "
                                  f"there are {sorted(tables)}")  # fmt: skip
            shares = (segments or {}).get(app.model, (1.0,))
            self.apps[app.name] = AppRun(app, workload, tables[app.model], seed, shares)
        self.under = conditions(workload, board)
        self.now = self.under[0][1]
        self.heat = None if self.now.ambient_c is None else Heat(board, self.now)
        self.finished: list[Finished] = []
        self.memory = None
        self.ask = False
        self.last_power_mw = math.nan
        self.limits = {name: unit.cap_mhz for name, unit in self.units.items()}
        self.urgency = ORDERS[policy.order]
        self.log = DecisionLog(
            scenario=workload.name, policy=policy.name, seed=seed, board=board.name,
            board_sha256=board.digest, workload_sha256=workload.digest,
            table_sha256={name: table.digest for name, table in tables.items()},
            source=str(weakest("estimated" if self.heat else board.power_source,
                               *(t.source for t in tables.values()))),
            horizon_s=workload.horizon_s,
        )  # fmt: skip

    def run(self) -> DecisionLog:
        """Run to the horizon; the log ends with a sample there."""
        horizon_ms = self.workload.horizon_s * 1000
        self._sample()
        self._schedule()
        handlers = {_CHANGE: self._on_change, _CLOCK: self._on_clock, _DONE: self._on_done,
                    _ARRIVE: self._on_arrive, _TICK: self._on_tick}  # fmt: skip
        self._push(0.0, _WAKE)
        heap = self.heap
        while heap and heap[0][0] < horizon_ms:
            self.now_ms = now_ms = heap[0][0]
            while heap and heap[0][0] <= now_ms:
                _, kind, _, item = heapq.heappop(heap)
                if kind == _WAKE:
                    self.ask = self.ask or item in (None, self.wake)
                else:
                    handlers[kind](item)
            self._settle()
        self.now_ms = horizon_ms
        for run in self.apps.values():
            for job in (*run.jobs, *run.waiting):
                self._log("drop", app=run.app.name, frame=job.frame, reason="horizon")
        self._sample(last=True)
        return self.log

    def _push(self, t_ms: float, kind: int, item=None) -> None:
        # The running number makes ties deterministic and keeps items from being compared.
        self.order += 1
        heapq.heappush(self.heap, (t_ms, kind, self.order, item))

    def _log(self, event: str, **values) -> None:
        self.log.add(self.now_ms / 1000, event, **values)

    def _schedule(self) -> None:
        if self.heat:
            self._push(0.0, _CHANGE, self.heat)
        for t_ms, now in self.under[1:]:
            self._push(t_ms, _CHANGE, now)
        for change in self.workload.changes:
            t_ms = change.t_s * 1000
            if change.app:
                self._push(t_ms, _CHANGE, change)
                if change.announced and not self.policy.static:
                    self._push(max(t_ms - ANNOUNCE_MS, 0.0), _WAKE)
        for run in self.apps.values():
            start_ms = run.app.start_s * 1000
            self._push(start_ms, _CHANGE, run)
            if run.app.announced and not self.policy.static:
                self._push(max(start_ms - ANNOUNCE_MS, 0.0), _WAKE)
            if run.app.end_s is not None:
                self._push(run.app.end_s * 1000, _CHANGE, run)
            if run.app.arrival in CLOSED_LOOP:
                self._push(start_ms, _ARRIVE, run)
            else:
                self._next_arrival(run)
        for unit in self.units.values():
            if unit.governor:
                self._push(unit.governor.period_ms, _TICK, unit)

    def _settle(self) -> None:
        # After all events of an instant: decide, start what can start, write down the power.
        if self.ask:
            self.ask = False
            self._decide()
        ready: dict[str, list[Job]] = {}
        idle = [unit for unit in self.units.values() if unit.job is None and not unit.lost]
        for run in self.apps.values() if idle else ():
            if run.waiting:
                self._drop_expired(run)
            for job in run.jobs:
                ready.setdefault(job.point.unit, []).append(job)
            if run.waiting and run.placement is not None:
                ready.setdefault(run.placement.unit, []).append(run.waiting[0])
        for unit in idle:
            if jobs := ready.get(unit.spec.name):
                self._dispatch(unit, min(jobs, key=self.urgency))
        self._sample()

    def _sample(self, last: bool = False) -> None:
        static_mw, more = (self.heat or self.board).static_mw, {}
        power_mw = static_mw + sum([u.power_mw() for u in self.units.values()])
        if self.heat:
            last = last or self.heat.polled_ms == self.now_ms
            more["temp_c"] = self.heat.draws(self.now_ms, power_mw, [*self.units.values()])
        if power_mw != self.last_power_mw or last:
            self.last_power_mw = power_mw
            self._log("sample", power_mw=power_mw, **more)

    def _on_change(self, change) -> None:
        if isinstance(change, Conditions):
            self._impose(change)
            return
        if isinstance(change, Heat):
            self._poll(change)
            return
        self.ask = True
        if isinstance(change, AppRun):
            change.gone = self.now_ms >= self.workload.end_ms(change.app)
            return
        run = self.apps[change.app]
        need = requirement_at(run.steps, self.now_ms)
        # What is asked for is known; how often others ask only when they say so.
        run.known = need if change.announced else need._replace(period_ms=run.known.period_ms)

    def _poll(self, heat: Heat) -> None:
        capped = heat.poll(self.now_ms, [*self.units.values()])
        for unit, cap_mhz in capped:
            self._log_clock(unit, cap_mhz, "heat")
        if capped:
            self._impose(heat.outside)
        self._push(self.now_ms + heat.wait_ms, _CHANGE, heat)

    def _impose(self, now: Conditions) -> None:
        now = self.heat.limit(self.now_ms, now) if self.heat else now
        for unit, stretch, cap_mhz in zip(self.units.values(), now.stretch, now.cap_mhz,
                                          strict=True):  # fmt: skip
            unit.advance(self.now_ms)
            self._wake_governor(unit)
            unit.impose(stretch, cap_mhz, now.emc)
            self.limits[unit.spec.name] = cap_mhz
            self._request(unit, min(unit.target_mhz, unit.cap_mhz), "cap")
            if unit.lost:
                unit.job = None
                for run in self.apps.values():
                    run.evict(unit.spec.name)
            self._reschedule(unit)
        # Competitors and memory clocks announce nothing: they are no reason to ask the policy.
        before, self.now = self.now, now
        self.ask |= (before.cap_mhz, before.memory_mb) != (now.cap_mhz, now.memory_mb)

    def _next_arrival(self, run: AppRun) -> None:
        item = next(run.arrivals, None)
        if item is not None:
            self._push(item[0], _ARRIVE, (run, item[1]))

    def _on_arrive(self, item) -> None:
        if isinstance(item, AppRun):
            need = requirement_at(item.steps, self.now_ms)
            ended = self.now_ms >= self.workload.end_ms(item.app)
            if ended or not self.workload.fits(self.now_ms, need):
                return
            for _ in range(item.app.frames if item.app.arrival == "multi-stream" else 1):
                self._arrive(item, need)
        else:
            self._arrive(*item)
            self._next_arrival(item[0])

    def _arrive(self, run: AppRun, need: Requirement) -> None:
        job = run.arrive(self.now_ms, need)
        self._log("arrive", app=run.app.name, frame=job.frame, deadline_ms=need.deadline_ms)
        self.ask = self.ask or not self.policy.static

    def _drop_expired(self, run: AppRun) -> None:
        # Deadlines within an app need not be in order of arrival when the requirement changes.
        for job in [j for j in run.waiting if self.now_ms >= j.deadline_at_ms - EPS_MS]:
            run.waiting.remove(job)
            self._log("drop", app=run.app.name, frame=job.frame, reason="deadline passed")
            self._next_query(run)

    def _dispatch(self, unit: UnitRun, best: Job) -> None:
        unit.advance(self.now_ms)
        self._wake_governor(unit)
        run = best.app
        if best.point is None:
            point = run.start(best, self.switch_ms)
            self._log("start", app=run.app.name, frame=best.frame, subnet=point.subnet,
                      unit=point.unit, cores=point.cores)  # fmt: skip
        if best.share <= 0:
            best.share = run.segments[best.segment]
        unit.job = best
        self._reschedule(unit)

    def _reschedule(self, unit: UnitRun) -> None:
        unit.token += 1
        if unit.job is not None:
            begin_ms = max(self.now_ms, unit.frozen_ms) + unit.job.fixed_ms
            left_ms = max(unit.job.share, 0.0) * unit.job_ms(unit.job)
            self._push(begin_ms + left_ms, _DONE, (unit, unit.token))

    def _on_done(self, item) -> None:
        unit, token = item
        if token != unit.token:
            return
        unit.advance(self.now_ms)
        job, unit.job = unit.job, None
        job.share = 0.0
        job.segment += 1
        if job.segment < len(job.app.segments):
            return
        run = job.app
        run.jobs.remove(job)
        latency_ms = self.now_ms - job.arrival_ms
        subnet, where = job.point.subnet, job.point.unit
        self._log("finish", app=run.app.name, frame=job.frame, subnet=subnet, unit=where,
                  latency_ms=latency_ms)  # fmt: skip
        self.finished.append(Finished(run.app.name, subnet, where, tuple(job.ran.items())))
        self._next_query(run)
        self.ask = self.ask or not self.policy.static

    def _next_query(self, run: AppRun) -> None:
        if run.app.arrival in CLOSED_LOOP and not run.jobs and not run.waiting:
            self._push(self.now_ms, _ARRIVE, run)

    def _on_clock(self, item) -> None:
        unit, mhz, asked = item
        if asked != unit.asked:
            return
        unit.advance(self.now_ms)
        unit.mhz = mhz
        unit.frozen_ms = self.now_ms + unit.spec.stall_ms
        self._log_clock(unit, mhz, "acts")
        self._reschedule(unit)

    def _request(self, unit: UnitRun, mhz: float, reason: str) -> None:
        if mhz == unit.target_mhz:
            return
        if mhz not in unit.freq_index:
            raise PolicyError(f"{unit.spec.name}: {mhz} MHz is not one of its clocks "
                              f"{unit.spec.freqs}")  # fmt: skip
        mhz = min(mhz, unit.cap_mhz)
        if mhz != unit.target_mhz:
            unit.target_mhz = mhz
            unit.asked += 1
            self._log_clock(unit, mhz, reason)
            # A request that returns to the present clock only cancels the one under way.
            if mhz != unit.mhz:
                self._push(self.now_ms + unit.spec.settle_ms, _CLOCK, (unit, mhz, unit.asked))

    def _log_clock(self, unit: UnitRun, mhz: float, reason: str) -> None:
        field = "gpu_mhz" if unit.spec.kind == "gpu" else "cpu_mhz"
        self._log("set", unit=unit.spec.name, reason=reason, **{field: mhz})

    def _on_tick(self, unit: UnitRun) -> None:
        unit.advance(self.now_ms)
        self._request(unit, unit.tick(self.now_ms), unit.spec.governor)
        if not unit.asleep:
            self._push(self.now_ms + unit.governor.period_ms, _TICK, unit)

    def _wake_governor(self, unit: UnitRun) -> None:
        if unit.asleep:
            self._push(unit.catch_up(self.now_ms), _TICK, unit)

    def _decide(self) -> None:
        state = self._state()
        timed = self.decision_ms is not None
        begin = process_time() if timed else 0.0
        action = self.policy.decide(state, dict(self.limits))
        if timed:
            self.decision_ms.append((process_time() - begin) * 1000)
        self.finished = []
        self._apply(action)

    def _apply(self, action: Action) -> None:
        self.memory = action.memory
        for name, placement in action.placements.items():
            run = self.apps[name]
            if placement != run.placement:
                run.placement = placement
                where = {}
                if placement is not None:
                    run.table.point(*placement)  # raises for an unknown one
                    where = {"subnet": placement.subnet, "unit": placement.unit}
                self._log("decide", app=name, **where, reason=action.reason)
        for name, mhz in action.clocks.items():
            if name not in self.units:
                raise PolicyError(f"board {self.board.name!r} has no unit {name!r}")
            unit = self.units[name]
            if mhz != unit.target_mhz and unit.governor is None:
                self._request(unit, mhz, "policy")
        if action.wake_ms is not None and action.wake_ms > self.now_ms:
            self.wake += 1
            self._push(action.wake_ms, _WAKE, self.wake)

    def _state(self) -> State:
        for unit in self.units.values():
            if unit.job is not None:
                unit.advance(self.now_ms)
        seen = [run.observe(self.now_ms) for run in self.apps.values()]
        clocks = {name: unit.mhz for name, unit in self.units.items()}
        targets = {name: unit.target_mhz for name, unit in self.units.items()}
        return State(self.now_ms, tuple([app for app in seen if app]), clocks, targets,
                     self.last_power_mw, tuple(self.finished), self.memory, self.now.emc,
                     self.now.memory_mb,
                     self.heat.advance(self.now_ms) if self.heat else math.nan)  # fmt: skip


def run(
    workload: Workload, board: Board, tables: Tables, policy: Policy, seed: int = 0, **options
) -> DecisionLog:
    """Simulate `workload` on `board` under `policy`; same arguments, same log, bit for bit.

    Args:
        tables: model name -> its points; the engine reads latencies there and powers from `board`,
            so that a board with other coefficients can be run against the tables of the first.
        policy: see `dynlib.manager.policy`.
        seed: of arrivals and noise.
        options: `switch_ms` (cost of another sub-network), `segments` (model -> shares of its
            latency between which it can be preempted), `decision_ms` (a list that collects how
            much CPU time each decision took).

    Raises `PolicyError` for a clock, unit, sub-network or model that does not exist.
    """
    return Engine(workload, board, tables, policy, seed, **options).run()
