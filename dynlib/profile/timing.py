"""Measuring on the machine this runs on: latency, paired ratios, the cost of preparing.

Knows no torch: the caller hands in a callable that returns when its work is done, and one that uses
a GPU waits for it. Fix the threads of the numeric libraries first.
"""

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil

from dynlib.errors import ProfileError

_CONFIDENCE = 0.99
_STABLE = 0.05
_WARMUP_LIMIT = 10
_T = TypeVar("_T")


def samples_needed(p: float) -> int:
    """Samples before percentile `p` (0..1) may be named: ``ceil(ln(1 - 0.99) / ln(p))``.

    LoadGen's early-stopping rule with no violation: 44 for p90, 90 for p95, 459 for p99. Raises
    `ProfileError` for a `p` that is no share.
    """
    if not 0 < p < 1:
        raise ProfileError(f"percentile {p}; expected a share between 0 and 1, such as 0.99")
    return math.ceil(math.log(1 - _CONFIDENCE) / math.log(p))


@dataclass(frozen=True, slots=True)
class Latency:
    """What `profile_latency` saw: every sample, in order, and the figures drawn from them."""

    samples_ms: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Median."""
        return statistics.median(self.samples_ms)

    @property
    def mean_ms(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.samples_ms)

    @property
    def std_ms(self) -> float:
        """Sample standard deviation; 0 for a single sample."""
        return statistics.stdev(self.samples_ms) if self.n > 1 else 0.0

    @property
    def p95_ms(self) -> float:
        """95th percentile; raises `ProfileError` below 90 samples."""
        return self.percentile_ms(0.95)

    def percentile_ms(self, p: float) -> float:
        """Smallest sample that a share `p` of all does not exceed.

        Raises `ProfileError` for fewer than `samples_needed`.
        """
        if self.n < samples_needed(p):
            raise ProfileError(
                f"p{100 * p:g} of {self.n} samples; expected at least {samples_needed(p)}"
            )
        return sorted(self.samples_ms)[math.ceil(p * self.n) - 1]


def profile_latency(
    run: Callable[[], object],
    *,
    warmup: int = 10,
    repeats: int = 100,
    min_seconds: float = 0.2,
    clock: Callable[[], int] = time.perf_counter_ns,
    cpu_time: bool = False,
) -> Latency:
    """Time `run` again and again, after warming up until it is stable.

    Args:
        run: the work, one sample per call.
        warmup: calls before the first sample, at least; more (up to ten times as many) until two
            successive groups of that size have medians within 5 %.
        repeats: samples, at least.
        min_seconds: time spent sampling, at least; both minima must be met.
        clock: nanoseconds, monotonic.
        cpu_time: time the CPU this process used (all threads) instead, which a busy machine
            disturbs less.

    Raises `ProfileError` for no repeats, and for a clock that stands still.
    """
    if warmup < 0 or repeats < 1:
        raise ProfileError(f"warmup = {warmup}, repeats = {repeats}; expected >= 0 and >= 1")
    clock = time.process_time_ns if cpu_time else clock
    with undisturbed():
        _warm_up(run, warmup, clock)
        samples: list[float] = []
        while len(samples) < repeats or sum(samples) < 1000 * min_seconds:
            samples.append(_once_ms(run, clock))
            if len(samples) >= repeats and sum(samples) <= 0:
                raise ProfileError("the clock did not advance; expected a running one, in ns")
    return Latency(tuple(samples))


@contextlib.contextmanager
def undisturbed():
    """No garbage collection: one in the middle of a sample is not the network's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """Ratios of two run times, one per round."""

    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median ratio."""
        return statistics.median(self.ratios)

    @property
    def worst(self) -> float:
        """Largest ratio."""
        return max(self.ratios)


def paired_ratio(
    a: Callable[[], object],
    b: Callable[[], object],
    rounds: int,
    *,
    calls: int = 5,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> PairedRatio:
    """Time of `a` over time of `b`, in interleaved rounds that share the machine's moods.

    Each round times the two alternately, `calls` times each, and compares the medians; every other
    round starts with `b`, so that going first favours neither. Raises `ProfileError` for no rounds
    or calls, and where `b` takes no time that the clock shows.
    """
    if rounds < 1 or calls < 1:
        raise ProfileError(f"rounds = {rounds}, calls = {calls}; expected at least 1 each")
    ratios = []
    for i in range(-1, rounds):  # round -1 warms up
        times: dict[str, list[float]] = {"a": [], "b": []}
        order = [("a", a), ("b", b)][:: 1 if i % 2 == 0 else -1]
        for _ in range(calls):
            for name, run in order:
                times[name].append(_once_ms(run, clock))
        base = statistics.median(times["b"])
        if base <= 0:
            raise ProfileError("the second callable took no measurable time; expected > 0 ns")
        ratios.append(statistics.median(times["a"]) / base)
    return PairedRatio(tuple(ratios[1:]))


def settled_mb() -> float:
    """Resident memory of this process in MB (1e6 bytes), once garbage is collected and freed pages
    are back with the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not the GNU C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 1e6


def preparation(make: Callable[[], _T]) -> tuple[_T, float, float]:
    """What `make` returns, the CPU seconds it took, and the resident MB it left behind."""
    before, start = settled_mb(), time.process_time()
    made = make()
    seconds = time.process_time() - start
    return made, seconds, settled_mb() - before


def _once_ms(run: Callable[[], object], clock: Callable[[], int]) -> float:
    start = clock()
    run()
    return (clock() - start) / 1e6


def _warm_up(run: Callable[[], object], warmup: int, clock: Callable[[], int]) -> None:
    before = None
    for _ in range(_WARMUP_LIMIT if warmup else 0):
        now = statistics.median(_once_ms(run, clock) for _ in range(warmup))
        if before is not None and abs(now - before) <= _STABLE * before:
            return
        before = now
