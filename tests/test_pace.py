"""The lower level: the lowest clock in time, frame by frame, and what it learns from frames."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_cases import board, tables, unit

from dynlib.boards.board import Opp
from dynlib.manager.manager import Manager
from dynlib.manager.pace import Pacer, Stream, Work
from dynlib.manager.policy import AppState, Finished, State
from dynlib.manager.slowdown import Slowdown
from dynlib.workload import Requirement

MHZ = (250.0, 400.0, 500.0, 625.0, 800.0, 1000.0)
UNIT = unit(opps=tuple(Opp(f, 400 + f / 2) for f in MHZ), noise_cv=0.05, stall_ms=0.2)
BOARD = board(UNIT)
POINTS = tables(BOARD)["net"]
SMALL, LARGE = POINTS.point("small", "gpu"), POINTS.point("large", "gpu")
PACER = Pacer(UNIT)

deadlines = st.floats(5, 200)
margins = st.floats(1, 1.5)
slows = st.floats(1, 3)


def lowest(fits) -> float:
    """The lowest clock for which `fits(index)`, else the highest."""
    return next((mhz for i, mhz in enumerate(MHZ) if fits(i)), MHZ[-1])


def choose(work, streams=(), running=False, least=MHZ[0], limit=MHZ[-1], slow=1.0, now_mhz=None):
    return PACER.choose(0.0, now_mhz, work, streams, running, least, limit, slow)


@given(deadlines, margins, slows)
def test_a_lone_frame_gets_the_lowest_clock_in_time_or_speeds_up_in_time(due_ms, margin, slow):
    pace = choose([Work(due_ms, 1.0, margin, LARGE)], slow=slow)
    steady = lowest(lambda i: margin * LARGE.latency_ms[i] * slow <= due_ms)
    if math.isinf(pace.again_ms):
        assert pace.mhz == steady
        return
    # Slower than that: still in time if the worst comes and the highest clock is asked for then.
    assert pace.mhz < steady
    slow_ms = pace.again_ms + UNIT.settle_ms
    done = slow_ms / (LARGE.latency_ms[MHZ.index(pace.mhz)] * slow)
    rest_ms = (margin - done) * LARGE.latency_ms[-1] * slow
    assert slow_ms + UNIT.stall_ms + rest_ms <= due_ms + 1e-6


@given(deadlines, deadlines, margins, slows)
def test_two_frames_get_the_lowest_clock_that_is_in_time_for_both(one_ms, two_ms, margin, slow):
    one_ms, two_ms = sorted((one_ms, two_ms))

    def fits(i):
        small, large = SMALL.latency_ms[i] * slow, LARGE.latency_ms[i] * slow
        both = small + large + (margin - 1) * math.hypot(small, large)  # margins add as squares
        return small * margin <= one_ms + 1e-9 and both <= two_ms + 1e-9

    work = [Work(one_ms, 1.0, margin, SMALL), Work(two_ms, 1.0, margin, LARGE)]
    assert choose(work, slow=slow).mhz == lowest(fits)


@given(deadlines, st.floats(0, 100), margins, slows)
def test_a_later_deadline_never_asks_for_a_higher_clock(due_ms, more_ms, margin, slow):
    def clock(ms):  # two frames, so that none starts slow to speed up later
        return choose([Work(ms, 1.0, margin, SMALL)] * 2, slow=slow).mhz

    assert clock(due_ms + more_ms) <= clock(due_ms)


@given(deadlines, slows, st.floats(0, 2))
def test_a_slower_unit_never_asks_for_a_lower_clock(due_ms, slow, more):
    work = [Work(due_ms, 1.0, 1.2, SMALL)] * 2
    assert choose(work, slow=slow + more).mhz >= choose(work, slow=slow).mhz


@given(deadlines, st.sampled_from(MHZ), st.sampled_from(MHZ), st.booleans())
def test_never_below_the_least_clock_nor_above_the_limit(due_ms, least, limit, running):
    work = [Work(due_ms, 1.0, 1.1, LARGE)]
    pace = choose(work, running=running, least=least, limit=limit, now_mhz=MHZ[0])
    assert min(least, limit) <= pace.mhz <= limit


@given(st.floats(20, 120), st.floats(20, 120), st.floats(0, 30))
def test_frames_to_come_are_in_time_too(period_ms, deadline_ms, next_ms):
    """Below the highest clock, the busy period that begins now ends without a late frame."""
    deadline_ms = min(deadline_ms, period_ms)
    stream = Stream(next_ms, period_ms, deadline_ms, 1.0, SMALL)
    pace = choose([Work(60.0, 1.0, 1.0, LARGE), Work(80.0, 1.0, 1.0, SMALL)], [stream])
    if pace.mhz == MHZ[-1]:
        return
    i, t = MHZ.index(pace.mhz), 0.0
    ready, coming = [(60.0, LARGE), (80.0, SMALL)], next_ms
    for _ in range(20):
        if not ready:
            break
        due_ms, point = ready.pop(0)
        t += point.latency_ms[i]
        assert t <= due_ms + 1e-6
        while coming <= t:
            ready.append((coming + deadline_ms, SMALL))
            coming += period_ms
        ready.sort(key=lambda frame: frame[0])


def test_an_overdue_frame_gets_all_there_is_and_a_running_one_is_looked_at_again():
    assert choose([Work(50.0, 0.0, -0.1, LARGE)], running=True, limit=800.0).mhz == 800.0
    work = [Work(150.0, 1.0, 1.1, LARGE), Work(300.0, 1.0, 1.1, LARGE)]
    running, waiting = (choose(work, running=r, now_mhz=MHZ[0]) for r in (True, False))
    assert running.mhz < MHZ[-1]
    assert math.isfinite(running.again_ms)
    assert math.isinf(waiting.again_ms)


def learn(ratios, cv=0.05):
    """Slowdowns after each of some frames whose times are so many times those of the table."""
    noisy = replace(UNIT, noise_cv=cv)
    manager = Manager(board(noisy), tables(board(noisy)))
    app = AppState("app", "net", Requirement(100, 100, 0), "periodic", 0, "", 0.0, 0.0, (), (), ())
    known, seen = {"gpu": Slowdown()}, []
    for ratio in ratios:
        ran = ((1000.0, ratio * LARGE.latency_ms[-1]),)
        frame = Finished("app", "large", "gpu", ran)
        state = State(0.0, (app,), {}, {}, math.nan, (frame,), None)
        known = manager._learn(known, state)
        seen.append(known["gpu"])
    return seen


def test_a_unit_left_for_one_odd_frame_is_tried_again_and_less_often_if_that_fails():
    slowdown, waits = Slowdown(), []
    for _ in range(3):
        slowdown, frames = slowdown.measured(2.0, 0.05, 2.6), 0
        assert slowdown.used >= 2.0
        while slowdown.used > 1:
            slowdown, frames = slowdown.unseen(1), frames + 1
        waits.append(frames)
    assert waits == [4, 16, 64]
    assert slowdown.measured(1.0, 0.05, 2.6).forgotten == 0  # the competitor has gone
    often = Slowdown()
    for _ in range(50):  # what many frames agree on is believed for longer
        often = often.measured(2.0, 0.05, 2.6)
    assert often.unseen(79).used > 1
    assert often.unseen(80).used == 1


@given(st.floats(0.7, 4.0))
def test_the_slowdown_converges(true):
    seen = learn([true] * 60)
    assert seen[-1].mean == pytest.approx(true, rel=0.01)
    assert seen[-1].used >= 0.98 * true


@given(st.floats(1.5, 4.0), st.integers(0, 100))
def test_the_slowdown_converges_under_noise(true, seed):
    noise = np.random.default_rng(seed).normal(1, 0.05, 200)
    mean = np.mean([s.mean for s in learn(true * noise)[100:]])
    assert mean == pytest.approx(true, rel=0.03)


@given(st.floats(1.5, 5.0))
def test_up_at_once_down_when_a_second_frame_agrees(much):
    up = learn([1.0] * 20 + [much])[-1]
    assert up.used >= much
    down = learn([much] * 20 + [1.0, 1.0])
    assert down[-2].used >= 0.98 * much
    assert down[-1].used < 1 + (much - 1) / 2
