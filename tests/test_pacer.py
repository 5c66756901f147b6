"""The lower level: the clock of one unit, frame by frame."""

import math
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st
from runtime_cases import board, frames_of, run, tables, unit

from dynlib.boards.board import Opp
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.manager.pacer import Pacer, Stream, Work
from dynlib.runtime.case import Case
from suite.papers.dynamic_ofa import published_tables
from suite.studies.foresight import foresight
from suite.studies.scenarios import scenario

MHZ = (250.0, 400.0, 500.0, 625.0, 800.0, 1000.0)
UNIT = unit(opps=tuple(Opp(f, 400 + f / 2) for f in MHZ), noise_cv=0.05, stall_ms=0.2)
POINTS = tables(board(UNIT))["net"]
SMALL, LARGE = POINTS.point("small", "gpu"), POINTS.point("large", "gpu")
PACER = Pacer(UNIT)

deadlines = st.floats(5, 200)
margins = st.floats(1, 1.5)
slows = st.floats(1, 3)
clocks = st.sampled_from(MHZ)


def frame(due_ms, worst=1.1, point=LARGE, slow=1.0, **values):
    return Work(due_ms, slow, slow * worst, point, sigma=point.sigma, **values)


def choose(work, streams=(), least=MHZ[0], limit=MHZ[-1], now_mhz=None, now_ms=0.0):
    return PACER.choose(now_ms, now_mhz, work, streams, least, limit)


def serve(frames, lengths, start_mhz=None, limit=MHZ[-1], pacer=PACER):
    """When each of `frames` is done that in truth take such shares of what the table says, the
    pacer asked at every start, and whenever it wants to be; and the clocks it chose."""
    spec, t, chosen, ends = pacer.unit, 0.0, [], []
    mhz = target = start_mhz
    acts_ms = math.inf
    for i, length in enumerate(lengths):
        done, point = 0.0, frames[i].point
        while done < length - 1e-9:
            first = frames[i]
            first = first._replace(
                typical=first.typical - done, worst=first.worst - done, done=done
            )
            pace = pacer.choose(t, target, [first, *frames[i + 1 :]], (), spec.min_mhz, limit)
            chosen.append(pace.mhz)
            if target is None:
                mhz = pace.mhz
            elif pace.mhz != target:
                acts_ms = t + spec.settle_ms if pace.mhz != mhz else math.inf
            target = pace.mhz
            until_ms = max(pace.again_ms, t + 1e-3)
            while t < until_ms and done < length - 1e-9:
                ms = point.latency_ms[MHZ.index(mhz)]
                step_ms = min(until_ms, acts_ms, t + (length - done) * ms) - t
                t, done = t + step_ms, done + step_ms / ms
                if t >= acts_ms:
                    mhz, acts_ms, t = target, math.inf, t + spec.stall_ms
        ends.append(t)
    return ends, chosen


def lowest(fits) -> float:
    """The lowest clock for which `fits(index)`, else the highest."""
    return next((mhz for i, mhz in enumerate(MHZ) if fits(i)), MHZ[-1])


@given(deadlines, margins, slows, st.floats(0.3, 1.0))
def test_a_lone_frame_is_in_time_at_worst_if_it_can_be(due_ms, margin, slow, share):
    """However long it turns out, up to the worst."""
    work = frame(due_ms, margin, slow=slow)
    assume(work.worst * LARGE.latency_ms[-1] <= due_ms)
    (end_ms,), chosen = serve([work], [share * work.worst])
    assert end_ms <= due_ms + 1e-6
    # A clock lower than the lowest steady one in time is raised later.
    assert chosen[0] <= lowest(lambda i: work.worst * LARGE.latency_ms[i] <= due_ms)


@given(st.floats(40, 200), margins, st.floats(0.3, 1.0), clocks)
def test_a_lone_frame_is_in_time_from_any_clock(due_ms, margin, share, start_mhz):
    work = frame(due_ms, margin)
    first_ms = min(UNIT.settle_ms, work.worst * LARGE.latency_ms[0])
    left = work.worst - first_ms / LARGE.latency_ms[MHZ.index(start_mhz)]
    assume(first_ms + UNIT.stall_ms + left * LARGE.latency_ms[-1] <= due_ms - 0.2)
    (end_ms,), _ = serve([work], [share * work.worst], start_mhz)
    assert end_ms <= due_ms + 1e-6


@given(deadlines, deadlines, slows)
def test_frames_that_are_as_usual_get_the_lowest_clock_in_time_for_all(one_ms, two_ms, slow):
    one_ms, two_ms = sorted((one_ms, two_ms))
    work = [frame(one_ms, 1.0, SMALL, slow), frame(two_ms, 1.0, LARGE, slow)]

    def fits(i):
        small, large = SMALL.latency_ms[i] * slow, LARGE.latency_ms[i] * slow
        return small <= one_ms and small + large <= two_ms

    assert choose(work).mhz == lowest(fits)


@given(deadlines, deadlines, margins, slows)
def test_the_first_of_two_may_be_as_long_as_it_gets(one_ms, two_ms, margin, slow):
    one_ms, two_ms = sorted((one_ms, two_ms))
    work = [frame(one_ms, margin, SMALL, slow), frame(two_ms, margin, LARGE, slow)]
    top_ms = [w.worst * w.point.latency_ms[-1] for w in work]
    settle_ms = UNIT.settle_ms + UNIT.stall_ms  # at the old clock before the highest one acts
    assume(top_ms[0] <= one_ms and sum(top_ms) + settle_ms <= two_ms)
    ends, _ = serve(work, [work[0].worst, work[1].typical])
    assert ends[0] <= one_ms + 1e-6
    assert ends[1] <= two_ms + 1e-6


@given(deadlines, st.floats(0, 100), margins, slows)
def test_a_later_deadline_never_asks_for_a_higher_clock(due_ms, more_ms, margin, slow):
    def clock(ms):  # two frames, so that none starts slow to speed up later
        return choose([frame(ms, margin, SMALL, slow)] * 2).mhz

    assert clock(due_ms + more_ms) <= clock(due_ms)


@given(deadlines, slows, st.floats(0, 2))
def test_a_slower_unit_never_asks_for_a_lower_clock(due_ms, slow, more):
    def clock(slow):
        return choose([frame(due_ms, 1.2, SMALL, slow)] * 2).mhz

    assert clock(slow + more) >= clock(slow)


@given(deadlines, clocks, clocks, st.booleans(), clocks)
def test_never_below_the_least_clock_nor_above_the_limit(due_ms, least, limit, started, now_mhz):
    pace = choose([frame(due_ms, done=0.1 * started)], (), least, limit, min(now_mhz, limit))
    assert min(least, limit) <= pace.mhz <= limit
    assert pace.again_ms > 0


@given(st.floats(20, 120), st.floats(20, 120), st.floats(0, 30))
def test_frames_to_come_are_in_time_too(period_ms, deadline_ms, next_ms):
    """Below the highest clock, the busy period that begins now ends without a late frame."""
    deadline_ms = min(deadline_ms, period_ms)
    stream = Stream(next_ms, period_ms, frame(deadline_ms, 1.0, SMALL))
    pace = choose([frame(60.0, 1.0), frame(80.0, 1.0, SMALL)], [stream])
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


@given(st.lists(st.tuples(deadlines, margins, st.sampled_from([SMALL, LARGE])), min_size=1,
                max_size=6), clocks)  # fmt: skip
def test_in_time_at_a_clock_is_in_time_at_any_higher_one(items, now_mhz):
    work = [
        frame(due_ms, margin, point)
        for due_ms, margin, point in sorted(items, key=lambda item: item[:2])[:6]
    ]
    fits = [PACER.in_time(0.0, None, work, (), i, i) for i in range(len(MHZ))]
    assert fits == sorted(fits)
    # What has to be sure is harder than what is typical, and a change takes its time.
    for i in range(len(MHZ)):
        if fits[i]:
            assert PACER.in_time(0.0, None, work, (), i, i, sure=False)
        if PACER.in_time(0.0, now_mhz, work, (), i, i) and MHZ[i] >= now_mhz:
            assert fits[i]


def test_an_overdue_frame_gets_all_there_is_and_a_running_one_is_looked_at_again():
    overdue = Work(50.0, -0.2, -0.1, LARGE, done=1.2)
    assert choose([overdue], limit=800.0).mhz == 800.0
    work = [frame(150.0, done=0.01), frame(300.0)]
    pace = choose(work, now_mhz=MHZ[0])
    assert pace.mhz < MHZ[-1]
    assert math.isfinite(pace.again_ms)


def test_a_frame_that_is_nearly_done_does_not_lower_its_clock():
    work = frame(200.0, 1.0, done=0.95)._replace(typical=0.05, worst=0.1)
    assert choose([work], now_mhz=1000.0).mhz == 1000.0
    fresh = frame(200.0, 1.0)
    assert choose([fresh], now_mhz=1000.0).mhz < 1000.0


@given(st.floats(30, 110))
def test_a_frame_alone_takes_no_more_energy_than_at_the_steady_clock(due_ms):
    """On the mean of equally likely lengths."""
    quiet = Pacer(replace(UNIT, stall_ms=0.0))
    work = frame(due_ms, 1.15)
    steady = lowest(lambda i: work.worst * LARGE.latency_ms[i] <= due_ms)
    first = quiet.choose(0.0, None, [work], (), MHZ[0], MHZ[-1])
    uj = [ms * mw for ms, mw in zip(LARGE.latency_ms, LARGE.active_mw, strict=True)]
    # The clock it starts at is no dearer than the steady one.
    assert uj[MHZ.index(first.mhz)] <= uj[MHZ.index(steady)] + 1e-9


def test_on_a_board_it_comes_near_the_least_that_noise_allows():
    """HiKey960: slow CPUs that scatter, and clocks that change within a millisecond."""
    on = load_board("hikey960")
    points = published_tables(on)
    workload = scenario("S1", on, points, 0).workload
    log = run(workload, on, points, Manager(on, points), 0)
    assert frames_of(log, workload, points)["on_time"].all()
    assert 1 < foresight(Case(workload, on, points)) < 1.2
