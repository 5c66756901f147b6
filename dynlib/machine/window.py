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
_MAX_ERROR = 0.1  # by what one update of a sensor may change the result
_SUSPEND_NS = 50_000_000
_Z95 = 1.96


@dataclass(slots=True)
class EnergyCounter:
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
        if isinstance(reading, Missing):
            return
        last, self._last = self._last, reading
        if last is None:
            return
        most_mj = self.max_mw * (reading.t_ns - last.t_ns) / 1e9
        used_mj = reading.value - last.value
        twice = False
        if self.span_mj:
            twice = most_mj > self.span_mj
            if used_mj < 0:
                used_mj += self.span_mj
        if twice or not 0 <= used_mj <= most_mj:
            self.dropped += 1
        else:
            self.energy_mj += used_mj


class Window:
    """What happened between entering and leaving; read the results afterwards.

    Attributes:
        latency_ms: length of the window.
        energy_mj, power_mw: of the whole board, or `Missing` with the reason, a window too short
            for its sensors among them.
        uncertainty_pct: half width of the interval around both, or `Missing`.
        dropped: samples that could not be used.
    """

    def __init__(self, sensors: Iterable[Sensor], clock: Clock):
        self._clock = clock
        whole = [sensor for sensor in sensors if sensor.total]
        self._counters = [sensor for sensor in whole if sensor.kind == "energy_mj"]
        self._meters = [sensor for sensor in whole if sensor.kind == "power_mw"]
        if self._counters:  # miss nothing between two reads: they beat samples of the same thing
            self._meters = []
        self.latency_ms, self.dropped = math.nan, 0
        nothing = Missing("the window is still open")
        self.energy_mj: float | Missing = nothing
        self.power_mw: float | Missing = nothing
        self.uncertainty_pct: float | Missing = nothing

    def __enter__(self) -> "Window":
        self._stop = threading.Event()
        self._thread = None
        self._sums = {s.name: EnergyCounter(s.span_mj) for s in self._counters}
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
        awake_ns = ended[0] - self._began[0]
        all_ns = ended[1] - self._began[1]
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
        problem = self._unusable(seconds, suspended)
        energy_mj = error_mj = 0.0
        if not problem:
            measure = self._counted if self._counters else self._integrated
            for sensor in self._counters or self._meters:
                part = measure(sensor, seconds)
                if isinstance(part, str):
                    problem = f"{sensor.name}: {part}"
                    break
                energy_mj += part[0]
                error_mj += part[1]
        if not problem and energy_mj <= 0:
            problem = "the counter did not move"
        if problem:
            self.energy_mj = self.power_mw = self.uncertainty_pct = Missing(problem)
        else:
            self.energy_mj = energy_mj
            self.power_mw = energy_mj / seconds
            self.uncertainty_pct = 100 * error_mj / energy_mj

    def _unusable(self, seconds: float, suspended: bool) -> str:
        """Why this window cannot have an energy, whatever its sensors say; "" if it can."""
        used = self._counters or self._meters
        if not used:
            return "no sensor measures the whole board"
        if suspended:
            return "the machine was suspended in the window"
        slowest = max(used, key=lambda sensor: sensor.period_s)
        needed_s = slowest.period_s / _MAX_ERROR
        if seconds >= needed_s:
            return ""
        return (
            f"a window of {1000 * seconds:.0f} ms is too short: {slowest.name} is renewed every "
            f"{1000 * slowest.period_s:g} ms, so expected at least {1000 * needed_s:.0f} ms"
        )

    def _counted(self, sensor: Sensor, seconds: float) -> tuple[float, float] | str:
        counter = self._sums[sensor.name]
        self.dropped += counter.dropped
        if counter.dropped:
            return f"{counter.dropped} samples could not be resolved (wrap or reset)"
        if counter._last is None:
            return "no reading"
        return counter.energy_mj, counter.energy_mj * sensor.period_s / seconds

    def _integrated(self, sensor: Sensor, seconds: float) -> tuple[float, float] | str:
        taken = self._samples[sensor.name]
        samples = [s for s in taken if isinstance(s, Reading) and not s.stale]
        self.dropped += len(taken) - len(samples)
        if len(samples) < 3:
            return f"{len(samples)} samples; expected at least 3"
        gap_s = energy_mj = 0.0
        for a, b in pairwise(samples):
            between_ns = b.t_ns - a.t_ns
            gap_s = max(gap_s, between_ns / 1e9)
            energy_mj += (a.value + b.value) / 2 * between_ns / 1e9
        if gap_s > max(3 * sensor.period_s, 0.2 * seconds):
            return f"no reading for {gap_s:.2f} s"
        spanned_s = (samples[-1].t_ns - samples[0].t_ns) / 1e9
        if not energy_mj or not spanned_s:
            return "no power"
        mean_mw = energy_mj / spanned_s
        values = [sample.value for sample in samples]
        spread_mw = _Z95 * statistics.stdev(values) / math.sqrt(len(values))
        ends_mj = mean_mw * sensor.period_s
        return mean_mw * seconds, math.hypot(ends_mj, spread_mw * seconds)
