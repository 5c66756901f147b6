"""A live run again, from its log alone: the same policy has to decide the same, bit for bit.

What came from outside is in the log: when frames came, began and ended, when the policy was asked,
what was seen of the machine, what a switch and a knob answered. What the policy says is done again,
and lands in a new log, which ends where it differs from the first.
"""

import heapq
import math
from dataclasses import replace
from typing import Any

from dynlib.errors import TableError
from dynlib.log import DecisionLog
from dynlib.manager.policy import Placement, Policy
from dynlib.runtime.conditions import Setup
from dynlib.runtime.jobs import AppRun, Job
from dynlib.runtime.loop import CHANGE, Loop, Observed
from dynlib.workload import CLOSED_LOOP, requirement_at


def replay(case: Setup, policy: Policy, log: DecisionLog) -> DecisionLog:
    """The log of a live run of `case`, decided anew; equal to `log` if the policy decides the same.

    `case` is that of the `LiveRun`, whose workload has what joined and changed meanwhile. Raises
    `TableError` for a log that is not one of `case`. A policy that failed in the run, or was
    exchanged, decides otherwise from there on.

    >>> from dynlib.points import PointTable, make_table
    >>> from dynlib.profile import at_full_clock
    >>> from dynlib.runtime import Served
    >>> board = at_full_clock(load_board("auto"))
    >>> table = make_table([{
    ...     "model": "example", "board": board.name, "unit": board.units[0].name, "batch": 1,
    ...     "subnet": "large", "latency_ms": 1.0, "accuracy_val_pct": 80.0, "source": "measured",
    ... }])
    >>> camera = App("camera", "example", deadline_ms=33.0, period_ms=33.0)
    >>> case = Case(Workload("street", 0.5, (camera,)), board, PointTable.of_models(table, board))
    >>> network = Served(switch=lambda subnet: None, answer=lambda k: f"frame {k}")
    >>> run = case.serve(Manager(board, case.tables), {"camera": network})
    >>> replay(run.case, Manager(board, case.tables), run.log).events == run.log.events
    True
    """
    return _Replay(case, policy, log).run()


class _Replay(Loop):
    """The log of a live run as a world: each line is what came from outside, or the policy's."""

    def __init__(self, case: Setup, policy: Policy, log: DecisionLog):
        self.told, self.whole = log.events, case.workload
        said = [(e["reason"], e["app"], e["t_s"]) for e in self.told if e["event"] == "set"
                and "app" in e]  # fmt: skip
        joined = {app for reason, app, _ in said if reason == "joins"}
        asked = {(app, t_s) for reason, app, t_s in said if reason == "requires"}
        # What was asked for while it ran was not known before.
        known = replace(
            case.workload,
            changes=tuple(c for c in case.workload.changes if (c.app, c.t_s) not in asked),
            apps=tuple(app for app in case.workload.apps if app.name not in joined),
        )
        known = replace(case, workload=known)
        super().__init__(known, policy, log.header["seed"], "measured", knobs=log.header["knobs"])
        self.log.header = log.header
        self.clocks = {unit.name: unit.max_mhz for unit in self.board.units}
        self.targets = dict(self.clocks)
        self.caps: dict[str, float] = {}
        self.others_pct: dict[str, float] = {}
        clocked = {knob.removesuffix(" clock_mhz") for knob in log.header["knobs"]}
        self.clocked = clocked & set(self.clocks) - set(policy.governors)

    def run(self) -> DecisionLog:
        """Line by line, to where the new log is another."""
        self.schedule()
        for number, event in enumerate(self.told):
            mine = self.log.events
            if len(mine) == number:
                self.now_ms = _ms(event["t_s"])
                try:
                    getattr(self, f"_told_{event['event']}")(event)
                except (LookupError, StopIteration) as error:
                    raise TableError(f"event {number}: {event} cannot follow: {error}") from error
            if mine[number : number + 1] != [event]:
                break
            following = self.told[number + 1 : number + 2]
            if event["event"] == "sample" and not any(_same_look(event, e) for e in following):
                self._ask()
        return self.log

    # The world.

    def wait(self, until_ms: float) -> float:
        """Nobody waits."""
        return until_ms

    def clock_ms(self) -> float:
        """The time of the line."""
        return self.now_ms

    def free(self) -> tuple:
        """Frames begin where the log says so."""
        return ()

    def dispatch(self, place: Any, job: Job) -> None:
        """See `free`."""

    def observe_units(self) -> Observed:
        """What was seen."""
        clocks, targets = dict(self.clocks), dict(self.targets)
        return Observed(clocks, targets, math.nan, others_pct=dict(self.others_pct))

    def switch(self, run: AppRun, placement: Placement | None) -> Placement | None:
        """The next line tells whether it failed."""
        told = self.told[len(self.log.events)]
        if told.get("reason") != "switch failed":
            return placement
        return self._place(run, told) if "subnet" in told else None

    def request(self, unit: str, mhz: float) -> None:
        """A clock that the policy wants."""
        if unit in self.clocked and mhz != self.targets[unit]:
            self.targets[unit] = mhz
            field = "cpu_mhz" if self.board.unit(unit).kind == "cpu" else "gpu_mhz"
            self.log.add(self.now_ms / 1000, "set", unit=unit, reason="policy", **{field: mhz})

    def _schedule_arrival(self, run: AppRun) -> None:
        """The log says when a frame came."""

    @staticmethod
    def _place(run: AppRun, event: dict) -> Placement:
        point = run.table.named(event)
        return Placement(point.subnet, point.unit, point.setting)

    def _ask(self) -> None:
        asked_ms = self.now_ms
        while self.heap and self.heap[0][0] <= asked_ms:
            self.now_ms, kind, _, change = heapq.heappop(self.heap)
            if kind == CHANGE:
                self.on_change(change)
        self.now_ms = asked_ms
        limits = {unit: min(mhz, self.caps.get(unit, mhz)) for unit, mhz in self.limits.items()}
        action = self.consult(self.state(), limits)
        self.finished = []
        alive = {name: where for name, where in action.placements.items()
                 if not self.apps[name].gone or where is None}  # fmt: skip
        self.apply(replace(action, placements=alive))
        self.others_pct = {}

    # What came from outside, line by line.

    def _told_arrive(self, event: dict) -> None:
        run = self.apps[event["app"]]
        if run.app.arrival != "pushed" and run.app.arrival not in CLOSED_LOOP:
            self.now_ms, _ = next(run.arrivals)  # to the last bit
        self._arrive(run, requirement_at(run.steps, self.now_ms))

    def _told_start(self, event: dict) -> None:
        ready = [job for jobs in self.ready().values() for job in jobs if self._may(job)]
        if not ready:
            raise LookupError("nothing could start")
        job = self.choose(ready)
        begin_ms = _whole_us(job.arrival_ms + event["latency_ms"])
        job.begin_ms = begin_ms
        self.start(job, 0.0, latency_ms=begin_ms - job.arrival_ms)

    def _may(self, job: Job) -> bool:
        where = job.point or job.run.placement
        return bool(self.limits[where.unit])

    def _told_finish(self, event: dict) -> None:
        job = self._job(event)
        job.ran[self.clocks[job.point.unit]] = self.now_ms - job.begin_ms
        if "reason" in event:  # nothing to learn from
            self.finish(job, reason=event["reason"])
            self.finished.pop()
        else:
            self.finish(job)

    def _told_drop(self, event: dict) -> None:
        reason, run = event["reason"], self.apps[event["app"]]
        if reason == "app left":
            self._leave(run.app.name)
        elif reason == "stopped":
            self._stop()
        elif reason.startswith("app died: "):
            job = self._job(event)
            run.jobs.remove(job)
            run.gone, run.placement = True, None
            self.record("drop", job, reason=reason)
        elif reason == "horizon":
            self.record("drop", self._job(event), reason=reason)
        else:
            self.drop(self._job(event), reason)

    def _told_set(self, event: dict) -> None:
        reason, name = event["reason"], event.get("app", "")
        if reason == "joins":
            self._join(self.whole.app(name), None, None)
        elif reason == "requires":
            changes = [c for c in self.whole.changes if (c.app, c.t_s) == (name, event["t_s"])]
            self._require(changes[-1])
        elif reason == "leaves":
            self._leave(name)
        else:
            mhz = event.get("gpu_mhz", event.get("cpu_mhz"))
            if reason == "acts":
                self.clocks[event["unit"]] = mhz
            elif reason == "limit":
                self.caps[event["unit"]] = mhz
            self._copy(event)

    def _told_sample(self, event: dict) -> None:
        if "others_pct" in event:
            self.others_pct[event["unit"]] = event["others_pct"]
        self._copy(event)

    def _told_decide(self, event: dict) -> None:
        """One that this policy does not make."""

    def _copy(self, event: dict) -> None:
        self.log.add(**event)

    def _job(self, event: dict) -> Job:
        run = self.apps[event["app"]]
        return next(job for job in (*run.jobs, *run.waiting) if job.frame == event["frame"])


def _same_look(event: dict, following: dict) -> bool:
    """Whether both lines are of one look at the machine, unit by unit."""
    return following["event"] == "sample" and following["t_s"] == event["t_s"]


def _ms(t_s: float) -> float:
    return round(t_s * 1e6) / 1e3


def _whole_us(ms: float) -> float:
    return round(ms * 1e3) / 1e3
