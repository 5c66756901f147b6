import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import ProfileError
from dynlib.profile.timing import (
    Latency,
    paired_ratio,
    preparation,
    profile_latency,
    samples_needed,
)


class FakeClock:
    """Nanoseconds that pass only when work is done."""

    def __init__(self):
        self.now_ns = 0

    def __call__(self):
        return self.now_ns

    def work(self, *durations_ms):
        """A callable that takes these times, the last one for ever."""
        left = list(durations_ms)

        def run():
            self.now_ns += int(1e6 * (left.pop(0) if len(left) > 1 else left[0]))

        return run


def test_samples_needed():
    assert [samples_needed(p) for p in (0.9, 0.95, 0.99)] == [44, 90, 459]
    for wrong in (0, 1, 99):
        with pytest.raises(ProfileError, match="between 0 and 1"):
            samples_needed(wrong)


def test_too_few_samples_give_no_percentile():
    with pytest.raises(ProfileError, match="p95 of 89 samples; expected at least 90"):
        _ = Latency((1.0,) * 89).p95_ms
    assert Latency((1.0,) * 90).p95_ms == 1.0
    with pytest.raises(ProfileError, match="459"):
        Latency((1.0,) * 458).percentile_ms(0.99)


@given(st.lists(st.floats(0.01, 1e3), min_size=90, max_size=200))
def test_statistics_stay_within_the_samples(samples):
    latency = Latency(tuple(samples))
    low, high = min(samples), max(samples)
    assert latency.n == len(samples)
    assert low <= latency.median_ms <= latency.p95_ms <= high
    assert low - 1e-9 <= latency.mean_ms <= high + 1e-9
    assert sum(s <= latency.p95_ms for s in samples) >= 0.95 * len(samples)


def test_warm_up_lasts_until_stable_and_is_not_counted():
    clock = FakeClock()
    slow_start = clock.work(*[50.0] * 15, 2.0)
    latency = profile_latency(slow_start, repeats=90, min_seconds=0, clock=clock)
    assert set(latency.samples_ms) == {2.0}
    assert (latency.n, latency.std_ms) == (90, 0.0)


def test_warm_up_ends_even_if_never_stable():
    clock = FakeClock()
    growing = clock.work(*[1.5**i for i in range(30)], 1.0)
    latency = profile_latency(growing, warmup=2, repeats=5, min_seconds=0, clock=clock)
    assert latency.n == 5
    assert latency.samples_ms[0] == pytest.approx(1.5**20, rel=1e-6)


def test_both_minima_are_met():
    clock = FakeClock()
    assert profile_latency(clock.work(1.0), repeats=5, min_seconds=0.2, clock=clock).n == 200
    assert profile_latency(clock.work(100.0), repeats=5, min_seconds=0.2, clock=clock).n == 5


def test_cpu_time_is_measured():
    latency = profile_latency(
        lambda: sum(range(20_000)), warmup=1, repeats=20, min_seconds=0, cpu_time=True
    )
    assert latency.mean_ms > 0


@pytest.mark.faults
def test_errors_pass_through_and_bad_arguments_are_named():
    with pytest.raises(ZeroDivisionError):
        profile_latency(lambda: 1 / 0)
    with pytest.raises(ProfileError, match="repeats = 0"):
        profile_latency(int, repeats=0)
    with pytest.raises(ProfileError, match="clock did not advance"):
        profile_latency(int, clock=lambda: 0)
    with pytest.raises(ProfileError, match="rounds = 0"):
        paired_ratio(int, int, 0)
    with pytest.raises(ProfileError, match="no measurable time"):
        paired_ratio(int, int, 1, clock=lambda: 0)


def test_paired_ratio_compares_within_rounds():
    clock = FakeClock()
    same = paired_ratio(clock.work(2.0), clock.work(1.0), 7, clock=clock)
    assert (same.median, same.worst, len(same.ratios)) == (2.0, 2.0, 7)
    one_bad_round = paired_ratio(
        clock.work(*[1.0] * 6, *[3.0] * 3, 1.0), clock.work(1.0), 5, calls=3, clock=clock
    )
    assert (one_bad_round.median, one_bad_round.worst) == (1.0, 3.0)


def test_preparation_is_the_memory_that_is_left_behind_and_not_its_peak():
    def make():
        bytearray(b"x") * 90_000_000  # gone at once
        return b"x" * 60_000_000

    made, seconds, memory_mb = preparation(make)
    assert len(made) == 60_000_000
    assert seconds >= 0
    assert memory_mb == pytest.approx(60, abs=5)
