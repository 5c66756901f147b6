"""Frames as jobs, and the apps that they belong to, as a run keeps them."""

from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np

from dynlib.manager.policy import AppState, Placement, Running, Waiting
from dynlib.points import Point, PointTable
from dynlib.runtime.drain import Trace
from dynlib.workload import ANNOUNCE_MS, App, Requirement, Workload, app_rng, requirement_at

EPS_MS = 1e-9
_GAPS = 8  # between pushed frames, that tell how often they come
_LEAST_GAP_MS = 0.1  # so that a burst of frames is no infinite rate
_BLOCK = 1024  # numbers that are drawn at once
_REGULAR = 0.2  # gaps that differ by less, as a share of their mean, are those of a timetable


class Job:
    """One frame on its way through the segments of its operating point; see `policy.Ready`.

    A frame that was pushed has its `content`, and an `answer` that somebody waits for.
    """

    __slots__ = (
        "answer",
        "app",
        "arrival_ms",
        "begin_ms",
        "content",
        "deadline_at_ms",
        "density",
        "ended_ms",
        "fixed_ms",
        "frame",
        "need",
        "noise",
        "point",
        "priority",
        "ran",
        "run",
        "segment",
        "share",
        "shares",
    )

    def __init__(self, run: "AppRun", frame: int, arrival_ms: float, need: Requirement):
        self.run, self.frame, self.arrival_ms, self.need = run, frame, arrival_ms, need
        self.app, self.priority = run.app.name, run.app.priority
        self.deadline_at_ms = arrival_ms + need.deadline_ms
        self.point: Point | None = None
        self.segment, self.begin_ms = 0, 0.0
        self.share = 0.0  # of the whole latency, left in the current segment
        self.fixed_ms = 0.0  # left of the switch to another sub-network
        self.ran: dict[float, float] = {}
        self.content: Any = None
        self.answer: Future | None = None
        self.shares: tuple[float, ...] = ()
        self.density: tuple[float, ...] = ()  # of what each segment reads, where it is known
        self.ended_ms = arrival_ms  # when it last ran, or came

    def end_segment(self) -> bool:
        """Go on to the next segment; whether there is none."""
        self.share = 0.0
        self.segment += 1
        return self.segment == len(self.shares)


class AppRun:
    """The state of one app.

    Attributes:
        waiting: frames that have arrived and not started, in the order of their arrival.
        jobs: those that have started and not finished.
        wanted: where the policy wants it; `placement` is where it is.
        known: the requirement as its policy knows it.
        regular: whether frames that are pushed come as if by a timetable.
        trace: what its frames take, if that is known one by one.
        gone: it asks for nothing any more.
        left: it was removed.
    """

    __slots__ = (
        "announced",
        "app",
        "arrivals",
        "drawn",
        "frames",
        "gaps_ms",
        "gone",
        "jobs",
        "known",
        "last_arrival_ms",
        "left",
        "noise",
        "placement",
        "regular",
        "rng",
        "served",
        "steps",
        "table",
        "trace",
        "waiting",
        "wanted",
    )

    def __init__(self, app: App, workload: Workload, table: PointTable, seed: int):
        self.app, self.table = app, table
        self.steps = workload.timeline(app)
        self.known = requirement_at(self.steps, app.start_s * 1000)
        self.announced = {
            c.t_s * 1000 for c in workload.changes if c.app == app.name and c.announced
        }
        self.arrivals = workload.arrivals(app, seed, self.steps)
        self.rng, self.drawn = app_rng(seed, app.name, "noise"), 0
        self.noise: dict[int, np.ndarray] = {}  # by block
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []
        self.wanted: Placement | None = None
        self.placement: Placement | None = None
        self.served: Point | None = None
        self.last_arrival_ms: float | None = None
        self.frames, self.gone, self.left = 0, False, False
        self.gaps_ms: deque[float] = deque(maxlen=_GAPS)
        self.regular = app.period_ms is not None
        self.trace: Trace | None = None

    def draw(self, frame: int) -> float:
        """Standard normal number of one frame; those of frames long done are forgotten."""
        while frame >= self.drawn:
            oldest = min([frame, *(job.frame for job in (*self.jobs, *self.waiting))])
            kept = {
                block: drawn for block, drawn in self.noise.items() if block >= oldest // _BLOCK
            }
            kept[self.drawn // _BLOCK] = self.rng.standard_normal(_BLOCK)
            self.noise, self.drawn = kept, self.drawn + _BLOCK
        return float(self.noise[frame // _BLOCK][frame % _BLOCK])

    def arrive(self, now_ms: float, need: Requirement) -> Job:
        """The next frame, which waits."""
        job = Job(self, self.frames, now_ms, need)
        self.frames += 1
        if self.app.arrival == "pushed" and self.last_arrival_ms is not None:
            self._pushed(now_ms - self.last_arrival_ms)
        self.last_arrival_ms = now_ms
        self.waiting.append(job)
        return job

    def _pushed(self, gap_ms: float) -> None:
        """Learn how often, and how regularly, frames are pushed."""
        self.gaps_ms.append(gap_ms)
        if len(self.gaps_ms) < _GAPS:
            return
        mean_ms = max(sum(self.gaps_ms) / _GAPS, _LEAST_GAP_MS)
        self.regular = max(self.gaps_ms) - min(self.gaps_ms) < _REGULAR * mean_ms
        other = abs(mean_ms - self.known.period_ms) > _REGULAR * self.known.period_ms
        if self.app.period_ms is None and other:
            self.known = self.known._replace(period_ms=mean_ms)

    @property
    def arrival(self) -> str:
        """How frames come, as a policy sees it."""
        if self.app.arrival != "pushed":
            return self.app.arrival
        return "periodic" if self.regular else "server"

    def start(self, job: Job, switch_ms: float) -> Point:
        """Begin with a frame that waits; `switch_ms`: cost of another sub-network or setting."""
        self.waiting.remove(job)
        self.jobs.append(job)
        job.point = point = self.table.point(*self.placement)
        if self.trace is None:
            job.shares, job.noise = point.segments, point.noise(self.draw(job.frame))
        else:
            ms, density = self.trace.of(job.frame)
            whole_ms = sum(ms)
            job.shares = tuple([segment_ms / whole_ms for segment_ms in ms])
            job.density, job.noise = tuple(density), whole_ms / self.trace.mean_ms
        before = self.served
        if before and (before.subnet, before.setting) != (point.subnet, point.setting):
            job.fixed_ms = switch_ms
        self.served = point
        return point

    def restart(self, job: Job) -> None:
        """A frame that lost its unit or its memory has to start again, wherever the app goes."""
        self.jobs.remove(job)
        again = Job(self, job.frame, job.arrival_ms, job.need)
        again.content, again.answer = job.content, job.answer
        self.waiting.appendleft(again)

    @property
    def held_mb(self) -> float:
        """Memory of the network that the policy wants, or of a larger one that still runs."""
        points = [job.point for job in self.jobs]
        if self.wanted is not None and not (self.gone and not self.waiting):
            points.append(self.table.point(*self.wanted))
        return max((point.memory_mb for point in points), default=0.0)

    def observe(self, now_ms: float) -> AppState | None:
        """What a policy may know of the app now; None before it is known and after it has gone."""
        app, start_ms = self.app, self.app.start_s * 1000
        known_ms = start_ms - (ANNOUNCE_MS if app.announced else 0.0)
        if now_ms < known_ms or (self.gone and not self.waiting and not self.jobs):
            return None
        waiting = [
            Waiting(j.arrival_ms, j.deadline_at_ms, j.need.floor_pct)
            for j in self.waiting
            if now_ms < j.deadline_at_ms - EPS_MS
        ]
        running = [
            Running(
                j.point.subnet,
                j.point.unit,
                j.deadline_at_ms,
                j.need.floor_pct,
                tuple(j.ran.items()),
                j.point.setting,
            )
            for j in self.jobs
        ]
        upcoming = ()
        if self.announced:
            upcoming = tuple(
                (t_ms, need)
                for t_ms, need in self.steps[1:]
                if now_ms < t_ms <= now_ms + ANNOUNCE_MS + EPS_MS and t_ms in self.announced
            )
        return AppState(
            app.name,
            app.model,
            self.known,
            self.arrival,
            app.priority,
            app.start_unit,
            start_ms,
            self.last_arrival_ms,
            tuple(waiting),
            tuple(running),
            upcoming,
            app.frames,
        )
