"""The units of a simulated board while a run goes on."""

from dynlib.boards.board import Unit
from dynlib.runtime.jobs import EPS_MS, Job


class UnitRun:
    """The state of one unit."""

    __slots__ = (
        "asked",
        "asleep",
        "busy_ms",
        "cap_mhz",
        "drawn",
        "freq_index",
        "frozen_ms",
        "governor",
        "job",
        "last",
        "lost",
        "mhz",
        "power",
        "rest_cores",
        "scale",
        "since_ms",
        "spec",
        "stretch",
        "target_mhz",
        "token",
        "window_ms",
    )

    def __init__(self, spec: Unit, governor):
        self.spec, self.governor = spec, governor
        self.mhz = self.target_mhz = spec.min_mhz
        self.freq_index = {f: i for i, f in enumerate(spec.freqs)}
        self.cap_mhz = spec.max_mhz
        self.stretch, self.rest_cores, self.lost = 1.0, 0.0, False
        self.scale = (1.0,) * len(spec.freqs)  # what a slower memory makes of run times
        self.job: Job | None = None
        self.last: Job | None = None  # that ran here and is not done
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
