"""Per-entity load tracking in the kernel's integers (Linux 6.12, `kernel/sched/pelt.c`).

Time comes in segments of 1024 us; a segment n ago counts y**n with y**32 = 0.5. A unit of time here
is the kernel's microsecond of 1024 ns. The kernel makes utilisation independent of the clock by
letting the signal's time pass slower at a lower clock, and catching up once the core idles.
"""

from dataclasses import dataclass

SEGMENT_US = 1024
CAPACITY_SCALE = 1024
LOAD_AVG_MAX = 47742
HALF_LIFE = 32
UTIL_EST_MARGIN = CAPACITY_SCALE // 100
_Y = 0.5 ** (1 / HALF_LIFE)
_INVERSE = tuple(int(((1 << 32) - 1) * _Y**n) for n in range(HALF_LIFE))
# Beyond this sum the kernel takes a core for overloaded and forgets the idle time it lost.
_SATURATED_SUM = ((LOAD_AVG_MAX - SEGMENT_US) << 10) - LOAD_AVG_MAX


def decay(value: int, segments: int) -> int:
    """``value * y**segments`` as `decay_load` truncates it."""
    if segments > HALF_LIFE * 63:  # the kernel shifts 64 bits
        return 0
    halvings, rest = divmod(segments, HALF_LIFE)
    return ((value >> halvings) * _INVERSE[rest]) >> 32


@dataclass
class Pelt:
    """The utilisation signal of one core that runs one task, or idles."""

    util_sum: int = 0
    period_contrib: int = 0
    behind_us: float = 0.0
    _rest_us: float = 0.0

    @property
    def util_avg(self) -> int:
        """Utilisation, 0..1024."""
        return self.util_sum // (LOAD_AVG_MAX - SEGMENT_US + self.period_contrib)

    def update(self, delta_us: int, running: bool) -> int:
        """Let `delta_us` of the signal's own time pass (`accumulate_sum`); returns `util_avg`."""
        contribution = delta_us
        total = delta_us + self.period_contrib
        segments, part = divmod(total, SEGMENT_US)
        if segments:
            self.util_sum = decay(self.util_sum, segments)
            full = LOAD_AVG_MAX - decay(LOAD_AVG_MAX, segments) - SEGMENT_US
            contribution = decay(SEGMENT_US - self.period_contrib, segments) + full + part
        self.period_contrib = part
        if running:
            self.util_sum += contribution << 10
        return self.util_avg

    def run(self, wall_us: float, scale: float) -> int:
        """Run for `wall_us` of wall time at `scale` = (clock / highest) * (capacity / 1024)."""
        self.behind_us += wall_us * (1 - scale)
        return self.update(self._whole(wall_us * scale), running=True)

    def idle(self, wall_us: float) -> int:
        """Idle for `wall_us`, after catching up with the time that `run` was slow."""
        behind = 0.0 if self.util_sum >= _SATURATED_SUM else self.behind_us
        self.behind_us = 0.0
        return self.update(self._whole(wall_us + behind), running=False)

    def _whole(self, us: float) -> int:
        whole, self._rest_us = divmod(us + self._rest_us, 1.0)
        return int(whole)


def util_est(ewma: int, util: int, runnable: int | None = None) -> int:
    """The estimate after a task with `util` went to sleep (`util_est_update`).

    It rises at once and falls by a quarter of the difference; a difference under about 1 %, or a
    task that did not get the CPU it wanted (`runnable` above `util`), leaves it alone.
    """
    if util >= ewma:
        return util
    starved = runnable is not None and util + UTIL_EST_MARGIN < runnable
    if ewma - util < UTIL_EST_MARGIN or starved:
        return ewma
    return (4 * ewma - (ewma - util)) >> 2
