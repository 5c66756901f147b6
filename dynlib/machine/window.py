"""Latency and energy of a measured window, with the uncertainty that the sensor's rate implies.

A counter (RAPL, NVML) is read at both ends; each reading is up to one update old, so the energy is
off by at most one update's worth. A power sensor is sampled at its rate and integrated by
trapezoids; to the two ragged ends comes the spread of what lay between the samples.
"""

import math
import statistics
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from dynlib.machine.control import Clock, Missing, Reading, Sensor

MAX_MW = 2e6  # no board draws more: a counter that says so went back or wrapped twice
_SUSPEND_NS = 50_000_000
_Z95 = 1.96


@dataclass(slots=True)
class Counter:
    """Sums an energy counter across its wraps; what cannot be resolved is dropped and counted.

    Args:
        span_mj: the counter starts again from 0 here; None where nobody knows.
        max_mw: the most the unit can draw; a gap in which the counter could have wrapped twice at
            that power is ambiguous.
    """

    span_mj: float | None
    max_mw: float = MAX_MW
    energy_mj: float = 0.0
    dropped: int = 0
    _last: Reading | None = None

    def add(self, reading: Reading | Missing) -> None:
        """Take the next reading; the first one is only the baseline."""
        last, self._last = self._last, reading if isinstance(reading, Reading) else self._last
        if isinstance(reading, Missing) or last is None:
            return
        most_mj = self.max_mw * (reading.t_ns - last.t_ns) / 1e9
        delta = reading.value - last.value
        if delta < 0:
            delta = delta + self.span_mj if self.span_mj else -1.0
        twice = self.span_mj and most_mj > self.span_mj
        if delta < 0 or delta > most_mj or twice:
            self.dropped += 1
        else:
            self.energy_mj += delta


class Window:
    """What happened between entering and leaving; read the results afterwards.

    Attributes:
        latency_ms: length of the window.
        energy_mj, power_mw: of the whole board, or `Missing` with the reason, a window too short
            for its sensors among them.
        uncertainty_pct: half width of the interval around both, or `Missing`.
        dropped: samples that could not be used.
    """

    def __init__(self, sensors: Iterable[Sensor], clock: Clock, *, max_error: float = 0.1):
        self._clock, self._max_error = clock, max_error
        whole = [sensor for sensor in sensors if sensor.total]
        self._counters = [sensor for sensor in whole if sensor.kind == "energy_mj"]
        # A counter misses nothing between two reads: it beats samples of the same thing.
        self._meters = [] if self._counters else [s for s in whole if s.kind == "power_mw"]
        self.latency_ms, self.dropped = math.nan, 0
        nothing = Missing("the window is still open")
        self.energy_mj: float | Missing = nothing
        self.power_mw: float | Missing = nothing
        self.uncertainty_pct: float | Missing = nothing

    def __enter__(self) -> "Window":
        self._stop, self._thread = threading.Event(), None
        self._sums = {s.name: Counter(s.span_mj) for s in self._counters}
        self._samples: dict[str, list[Reading | Missing]] = {s.name: [] for s in self._meters}
        self._began = self._clock.now_ns(), self._clock.boot_ns()
        self.sample()
        if self._meters or self._counters:
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        ended = self._clock.now_ns(), self._clock.boot_ns()
        self._stop.set()
        if self._thread:
            self._thread.join(1)
        self.sample()
        awake_ns, all_ns = (b - a for a, b in zip(self._began, ended, strict=True))
        self.latency_ms = awake_ns / 1e6
        self._conclude(awake_ns / 1e9, suspended=all_ns - awake_ns > _SUSPEND_NS)

    def sample(self) -> None:
        """Read every sensor once; a thread does it while the window is open."""
        for sensor in self._counters:
            self._sums[sensor.name].add(sensor.read(self._clock))
        for sensor in self._meters:
            self._samples[sensor.name].append(sensor.read(self._clock))

    def _poll(self) -> None:
        # Counters need it only so that no wrap is missed.
        period_s = min((s.period_s for s in self._meters), default=10.0)
        while not self._stop.wait(period_s):
            self.sample()

    def _conclude(self, seconds: float, suspended: bool) -> None:
        problem, used = "", self._counters or self._meters
        energy_mj = error_mj = 0.0
        if not used:
            problem = "no sensor measures the whole board"
        elif suspended:
            problem = "the machine was suspended in the window"
        elif seconds < max(s.period_s for s in used) / self._max_error:
            slowest = max(used, key=lambda s: s.period_s)
            problem = (
                f"a window of {1000 * seconds:.0f} ms is too short: {slowest.name} is renewed "
                f"every {1000 * slowest.period_s:g} ms, so expected at least "
                f"{1000 * slowest.period_s / self._max_error:.0f} ms"
            )
        for sensor in used if not problem else ():
            if self._counters:
                part = self._counted(sensor, seconds)
            else:
                part = self._integrated(sensor, seconds)
            if isinstance(part, str):
                problem = f"{sensor.name}: {part}"
                break
            energy_mj, error_mj = energy_mj + part[0], error_mj + part[1]
        if not problem and energy_mj <= 0:
            problem = "the counter did not move"
        if problem:
            self.energy_mj = self.power_mw = self.uncertainty_pct = Missing(problem)
        else:
            self.energy_mj, self.power_mw = energy_mj, energy_mj / seconds
            self.uncertainty_pct = 100 * error_mj / energy_mj

    def _counted(self, sensor: Sensor, seconds: float) -> tuple[float, float] | str:
        counter = self._sums[sensor.name]
        self.dropped += counter.dropped
        if counter.dropped:
            return f"{counter.dropped} samples could not be resolved (wrap or reset)"
        if counter._last is None:
            return "no reading"
        return counter.energy_mj, counter.energy_mj * sensor.period_s / seconds

    def _integrated(self, sensor: Sensor, seconds: float) -> tuple[float, float] | str:
        samples = [s for s in self._samples[sensor.name] if isinstance(s, Reading) and not s.stale]
        self.dropped += len(self._samples[sensor.name]) - len(samples)
        if len(samples) < 3:
            return f"{len(samples)} samples; expected at least 3"
        spanned_s = (samples[-1].t_ns - samples[0].t_ns) / 1e9
        gap_s = max((b.t_ns - a.t_ns) / 1e9 for a, b in pairwise(samples))
        if gap_s > max(3 * sensor.period_s, 0.2 * seconds):
            return f"no reading for {gap_s:.2f} s"
        energy_mj = sum(
            (a.value + b.value) / 2 * (b.t_ns - a.t_ns) / 1e9 for a, b in pairwise(samples)
        )
        if not energy_mj or not spanned_s:
            return "no power"
        values = [sample.value for sample in samples]
        spread = _Z95 * statistics.stdev(values) / math.sqrt(len(values)) * seconds
        mean_mw = energy_mj / spanned_s
        return mean_mw * seconds, math.hypot(mean_mw * sensor.period_s, spread)
