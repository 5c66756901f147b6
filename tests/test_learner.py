"""What is learnt from measured times and arrivals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.manager.learner import Gaps, Own, Times

SIGMA, Z = 0.036, 2.8
speeds = st.floats(0.5, 20.0)
seeds = st.integers(0, 1000)


def learn(ratios, times=None, start_ms=0.0):
    """What is known after frames, 50 ms apart, that took so many times what the table says."""
    times = times or Times()
    for i, ratio in enumerate(ratios):
        times = times.measured(float(ratio), SIGMA, start_ms + 50.0 * i, Z)
    return times


def noise(cv, frames, seed):
    sigma = math.sqrt(math.log1p(cv**2))
    return np.exp(np.random.default_rng(seed).normal(0, sigma, frames))


@given(st.integers(5, 100), st.sampled_from([0.005, 0.02, 0.1]))
def test_late_frames_are_chance_until_there_are_too_many(frames, target):
    many = frames * target
    allowed = math.ceil(many + math.sqrt(many))
    for late in range(frames + 1):
        times = Own("net", 0.0, (2.0,) * late + (1.0,) * (frames - late))
        expected = 0.0 if frames < allowed else 2.0 if late > allowed else 1.0
        assert times.longest(target) == expected


def test_four_frames_say_nothing_of_the_longest():
    assert Own("net", 0.0, (1.0,) * 4).longest(0.02) == 0


@given(speeds)
def test_the_speed_converges(true):
    times = learn([true] * 60)
    assert times.typical == pytest.approx(true)
    assert times.worst >= true * (1 - 1e-9)
    assert times.frames == 60


@given(speeds, st.sampled_from([0.036, 0.1]), seeds)
@settings(max_examples=30, deadline=None)
def test_the_speed_converges_under_noise(true, cv, seed):
    assert learn(true * noise(cv, 200, seed)).typical == pytest.approx(true, rel=2 * cv)


@given(st.floats(1.3, 20.0), st.integers(1, 60))
def test_another_speed_is_believed_after_three_frames_and_left_after_two(much, before):
    up = learn([1.0] * before + [much] * 3)
    assert up.typical == pytest.approx(much)
    assert learn([1.0] * 2, up).typical == pytest.approx(1.0)


@given(st.floats(0.2, 1.0))
def test_a_first_frame_that_is_short_is_no_speed(odd):
    assert learn([odd]).typical == pytest.approx(1.0)


@given(st.floats(0.2, 30.0), st.integers(1, 50), st.integers(0, 50))
def test_one_odd_frame_is_neither_a_speed_nor_noise(odd, before, after):
    times = learn([1.0] * before + [odd] + [1.0] * after)
    assert times.typical == pytest.approx(1.0)
    assert times.spread <= 1.5
    assert times.peak == 1.0
    if after >= 5:
        assert times.worst == pytest.approx(1.0)


def test_long_frames_that_keep_coming_are_planned_with_until_they_are_forgotten():
    often = learn(([1.0] * 20 + [2.0]) * 4)
    assert often.typical == 1.0
    assert often.peak == 2.0
    assert learn([1.0] * 250, often).peak == 1.0


@given(st.sampled_from([0.08, 0.15, 0.3]), seeds)
@settings(max_examples=30, deadline=None)
def test_more_noise_than_the_table_says_is_learnt(cv, seed):
    assert learn(noise(cv, 200, seed)).spread == pytest.approx(cv / SIGMA, rel=0.6)
    assert learn(noise(cv, 200, seed)).spread > 1.2


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_less_noise_than_the_table_says_is_not_counted_on(seed):
    assert learn(noise(0.001, 100, seed)).spread == 1.0


@given(st.floats(1.1, 20.0))
def test_a_slow_speed_is_forgotten_on_a_unit_left_alone_later_each_time(much):
    times, now_ms, waits = Times(), 0.0, []
    for _ in range(3):
        times = learn([much] * 5, times, now_ms)
        assert times.typical == pytest.approx(much)
        start_ms = now_ms = times.last_ms
        while times.typical > 1.05:
            now_ms += 1000.0
            times = times.aged(now_ms)
        waits.append(now_ms - start_ms)
    assert waits == sorted({*waits})


@given(st.floats(1.1, 20.0))
def test_a_slow_speed_is_remembered_as_long_as_frames_confirm_it(much):
    slow = learn([much] * 5)
    assert slow.aged(slow.last_ms + 5000.0) == slow
    assert slow.aged(slow.last_ms + 15_000.0).typical == 1.0
    # Once it is fast again, nothing is held against it.
    calm = learn([1.0] * 10, slow, slow.last_ms)
    assert calm.aged(calm.last_ms + 1e6) == calm
    slow = learn([much] * 5, calm, calm.last_ms)
    assert slow.aged(slow.last_ms + 15_000.0).typical == 1.0


def test_a_usual_speed_is_never_forgotten():
    times = learn(noise(0.02, 60, 1))
    assert times.aged(1e9) == times


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60))
def test_whatever_is_measured_what_is_known_is_finite(ratios):
    times = learn(ratios)
    for value in (times.typical, times.spread, times.peak, times.worst):
        assert math.isfinite(value)
        assert value > 0
    assert min(*ratios, 1.0) <= times.typical <= max(*ratios, 1.0)


def test_a_table_without_noise_does_not_make_every_frame_a_surprise():
    times = Times()
    for i in range(60):
        times = times.measured(1.0 + 0.004 * (i % 2), 0.0, 50.0 * i, Z)
    assert times.peak == 1.0
    assert times.spread < 2


# Arrivals.


@given(st.floats(5, 500), st.floats(5, 500))
def test_a_period_is_believed_when_three_gaps_agree(said_ms, true_ms):
    gaps = Gaps(said_ms)
    for i in range(5):
        gaps = gaps.seen(said_ms, [i * true_ms])
        if i < 3:
            assert gaps.period_ms == said_ms
    assert gaps.period_ms == pytest.approx(true_ms, rel=0.03)


def test_frames_seen_twice_or_late_are_counted_once():
    one = Gaps(100.0)
    for times in ([0.0], [0.0, 40.0], [40.0], [80.0, 40.0, 80.0], [120.0], [120.0]):
        one = one.seen(100.0, times)
    assert one.times == (0.0, 40.0, 80.0, 120.0)
    assert one.period_ms == pytest.approx(40.0)


def test_gaps_that_do_not_agree_are_no_period():
    gaps = Gaps(100.0)
    for t_ms in (0.0, 40.0, 130.0, 150.0, 300.0):
        gaps = gaps.seen(100.0, [t_ms])
    assert gaps.period_ms == 100.0


def test_what_is_said_anew_is_believed_first():
    gaps = Gaps(100.0)
    for i in range(6):
        gaps = gaps.seen(100.0, [40.0 * i])
    assert gaps.period_ms == pytest.approx(40.0)
    gaps = gaps.seen(70.0, [])
    assert gaps.period_ms == 70.0


@given(st.floats(20, 200), st.floats(0.2, 5), seeds)
@settings(deadline=None)
def test_random_frames_that_come_more_often_than_said_are_noticed(said_ms, factor, seed):
    times = np.cumsum(np.random.default_rng(seed).exponential(said_ms * factor, 60))
    gaps = Gaps(said_ms)
    for t_ms in times:
        gaps = gaps.seen(said_ms, [float(t_ms)])
    assert 0 < gaps.period_ms <= said_ms
    mean_ms = (times[-1] - times[-17]) / 16
    assert gaps.period_ms == pytest.approx(min(mean_ms, said_ms))
