"""What the engine keeps about frames, apps and units while it runs."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from dynlib.boards.board import Unit
from dynlib.manager.policy import AppState, Placement, Running, Waiting
from dynlib.points import Point, PointTable
from dynlib.workload import ANNOUNCE_MS, App, Requirement, Workload, app_rng, requirement_at

EPS_MS = 1e-9


class Job:
    """One frame on its way."""

    __slots__ = ("app", "arrival_ms", "deadline_at_ms", "fixed_ms", "frame", "need", "noise",
                 "point", "ran", "segment", "share")  # fmt: skip

    def __init__(self, app: "AppRun", frame: int, arrival_ms: float, need: Requirement):
        self.app, self.frame, self.arrival_ms, self.need = app, frame, arrival_ms, need
        self.deadline_at_ms = arrival_ms + need.deadline_ms
        self.point: Point | None = None
        self.segment = 0
        self.share = 0.0  # of the whole latency, left in the current segment
        self.fixed_ms = 0.0  # left of the switch to another sub-network
        self.ran: dict[float, float] = {}


class AppRun:
    """The state of one app."""

    __slots__ = ("announced", "app", "arrivals", "frames", "gone", "jobs", "known",
                 "last_arrival_ms", "noise",
                 "placement", "rng", "segments", "served", "steps", "table", "waiting")  # fmt: skip

    def __init__(self, app: App, workload: Workload, table: PointTable, seed: int,
                 segments: Sequence[float]):  # fmt: skip
        self.app, self.table, self.segments = app, table, segments
        self.steps = workload.timeline(app)
        self.known = requirement_at(self.steps, app.start_s * 1000)
        self.announced = {
            c.t_s * 1000 for c in workload.changes if c.app == app.name and c.announced
        }
        self.arrivals = workload.arrivals(app, seed)
        self.rng, self.noise = app_rng(seed, app.name, "noise"), np.empty(0)
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []  # started, not finished
        self.placement: Placement | None = None
        self.served: str | None = None
        self.last_arrival_ms: float | None = None
        self.frames, self.gone = 0, False

    def draw(self, frame: int) -> float:
        """Standard normal number of one frame."""
        while frame >= len(self.noise):
            self.noise = np.append(self.noise, self.rng.standard_normal(1024))
        return float(self.noise[frame])

    def arrive(self, now_ms: float, need: Requirement) -> Job:
        """The next frame, which waits."""
        job = Job(self, self.frames, now_ms, need)
        self.frames += 1
        self.last_arrival_ms = now_ms
        self.waiting.append(job)
        return job

    def start(self, job: Job, switch_ms: float) -> Point:
        """Begin with the frame that waits longest; `switch_ms`: cost of another sub-network."""
        self.waiting.popleft()
        self.jobs.append(job)
        job.point = point = self.table.point(*self.placement)
        job.noise = point.noise(self.draw(job.frame))
        if self.served not in (None, point.subnet):
            job.fixed_ms = switch_ms
        self.served = point.subnet
        return point

    def evict(self, unit: str) -> None:
        """Frames on a unit that was taken away have to start again, wherever the app goes."""
        for job in [j for j in self.jobs if j.point.unit == unit]:
            self.jobs.remove(job)
            self.waiting.appendleft(Job(self, job.frame, job.arrival_ms, job.need))

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
            Running(j.point.subnet, j.point.unit, j.deadline_at_ms, j.need.floor_pct,
                    tuple(j.ran.items()))
            for j in self.jobs
        ]  # fmt: skip
        upcoming = () if not self.announced else tuple(
            (t_ms, need)
            for t_ms, need in self.steps[1:]
            if now_ms < t_ms <= now_ms + ANNOUNCE_MS + EPS_MS and t_ms in self.announced
        )  # fmt: skip
        return AppState(app.name, app.model, self.known, app.arrival, app.priority, app.start_unit,
                        start_ms, self.last_arrival_ms, tuple(waiting), tuple(running),
                        upcoming)  # fmt: skip


class UnitRun:
    """The state of one unit."""

    __slots__ = ("asked", "asleep", "busy_ms", "cap_mhz", "drawn", "freq_index", "frozen_ms",
                 "governor", "job", "lost", "mhz", "power", "rest_cores", "scale", "since_ms",
                 "spec", "stretch", "target_mhz", "token", "window_ms")  # fmt: skip

    def __init__(self, spec: Unit, governor):
        self.spec, self.governor = spec, governor
        self.mhz = self.target_mhz = spec.min_mhz
        self.freq_index = {f: i for i, f in enumerate(spec.freqs)}
        self.cap_mhz = spec.max_mhz
        self.stretch, self.rest_cores, self.lost = 1.0, 0.0, False
        self.scale = (1.0,) * len(spec.freqs)  # what a slower memory makes of run times
        self.job: Job | None = None
        self.since_ms = self.frozen_ms = self.window_ms = self.busy_ms = 0.0
        # Numbers of the newest completion and clock request; events of older ones are void.
        self.token = self.asked = 0
        self.asleep = False
        self.power: dict[tuple[float, float], float] = {}
        self.drawn = (-1.0, 0.0, 0.0)  # clock, load and power at the last call of `power_mw`

    def job_ms(self, job: Job) -> float:
        """Duration of the whole job at the present clock and contention."""
        index = self.freq_index[self.mhz]
        return job.point.latency_ms[index] * job.noise * self.stretch * self.scale[index]

    def advance(self, now_ms: float) -> None:
        """Account for the time since the last call."""
        dt = now_ms - self.since_ms
        if dt <= 0:
            return
        job = self.job
        if job is None:
            self.busy_ms += dt * (1 - 1 / self.stretch)
        else:
            self.busy_ms += dt
            job.ran[self.mhz] = job.ran.get(self.mhz, 0.0) + dt
            work = now_ms - max(self.since_ms, self.frozen_ms)
            if work > 0:
                fixed = min(work, job.fixed_ms)
                job.fixed_ms -= fixed
                job.share -= (work - fixed) / self.job_ms(job)
        self.since_ms = now_ms

    def impose(self, stretch: float, cap_mhz: float, emc: float) -> None:
        """Take over what others do to the unit from now on (see `Conditions`)."""
        self.stretch, self.lost = stretch, cap_mhz == 0
        self.rest_cores = (1 - 1 / stretch) * self.spec.cores  # that competitors keep busy
        self.cap_mhz = cap_mhz or self.spec.min_mhz
        self.scale = tuple(self.spec.memory_scale(mhz, emc) for mhz in self.spec.freqs)
        if self.governor:
            self.governor.set_limits(None, self.cap_mhz)

    def tick(self, now_ms: float) -> float:
        """The clock that the unit's governor asks for at its sampling time."""
        idle, window_ms = self.busy_ms == 0, now_ms - self.window_ms
        target = self.governor.update(now_ms, self.busy_ms, window_ms, self.mhz)
        self.window_ms, self.busy_ms = now_ms, 0.0
        # A CPU at rest at its lowest clock stays there: its governor sleeps until work comes. The
        # GPU's keeps running means that every poll moves.
        at_rest = idle and self.job is None and self.stretch == 1 and self.mhz == self.spec.min_mhz
        self.asleep = self.spec.kind == "cpu" and at_rest and target == self.mhz
        return target

    def catch_up(self, now_ms: float) -> float:
        """Wake the governor; the time of its next tick."""
        self.asleep = False
        period_ms = self.governor.period_ms
        missed = int((now_ms - self.window_ms) / period_ms + EPS_MS)
        if missed:
            # The ticks slept through, as one idle window, so that the load signal decays.
            last_ms = self.window_ms + missed * period_ms
            self.governor.update(last_ms, 0.0, last_ms - self.window_ms, self.mhz)
            self.window_ms = last_ms
        return self.window_ms + period_ms

    @property
    def load(self) -> float:
        """Busy cores (CPU) or busy share (GPU) at this instant."""
        return self.job.point.cores if self.job else self.rest_cores

    def power_mw(self) -> float:
        """Power of the unit at this instant."""
        # This is asked for after every event, so an unchanged answer has to be quick.
        job = self.job
        load = job.point.cores if job else self.rest_cores
        if self.mhz != self.drawn[0] or load != self.drawn[1]:
            key = (self.mhz, load)
            found = self.power.get(key)
            if found is None:
                found = self.power[key] = self.spec.power_mw(*key)
            self.drawn = (*key, found)
        return self.drawn[2]


ORDERS = {
    "fifo": lambda job: (job.arrival_ms, job.app.app.name, job.frame),
    "edf": lambda job: (job.deadline_at_ms, job.arrival_ms, job.app.app.name, job.frame),
    "priority": lambda job: (-job.app.app.priority, job.deadline_at_ms, job.app.app.name,
                             job.frame),
}  # fmt: skip
