"""The ladder of clocks for a frame alone: in time at worst, nearly the least energy there is."""

import math

from hypothesis import given
from hypothesis import strategies as st
from runtime_cases import board, frames_of, run, tables, unit
from test_pace import MHZ, POINTS, UNIT

from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.manager.pace import Ladder
from dynlib.runtime.case import Case
from suite.papers.dynamic_ofa import published_tables
from suite.studies.foresight import _blind_uj, foresight
from suite.studies.scenarios import scenario

POINT = POINTS.point("large", "gpu")
Z = 2.3263478740408408  # 99 % of a normal distribution
WORST = POINT.noise(Z)
LADDER = Ladder(POINT, WORST, 0, len(MHZ) - 1)
windows = st.floats(WORST * POINT.latency_ms[-1], 1.2 * WORST * POINT.latency_ms[0])


def times(stages, done=0.0):
    """(ms, index, begin, end) of each stage."""
    begins = [done, *(until for _, until in stages[:-1])]
    return [((end - begin) * POINT.latency_ms[i], i, begin, end)
            for begin, (i, end) in zip(begins, stages, strict=True)]  # fmt: skip


def expected_uj(stages, steps=400):
    """Energy of the mean frame that follows the stages, by summing over shares of the work."""
    total = 0.0
    for _, i, begin, end in times(stages):
        width = (end - begin) / steps
        for k in range(steps):
            x = begin + (k + 0.5) * width
            sigma = POINT.sigma
            longer = math.erfc((math.log(x) + sigma**2 / 2) / sigma / math.sqrt(2)) / 2
            total += longer * width * POINT.latency_ms[i] * POINT.active_mw[i]
    return total


@given(windows, st.floats(0, 0.5))
def test_the_worst_case_is_in_time_on_clocks_that_only_rise(window_ms, stall_ms):
    stages = LADDER.stages(window_ms, 0.0, stall_ms)
    if not stages:
        assert WORST * POINT.latency_ms[-1] + stall_ms > window_ms - 1e-9
        return
    spent_ms = sum(ms for ms, *_ in times(stages)) + stall_ms * (len(stages) - 1)
    assert spent_ms <= window_ms + 1e-6
    indices = [i for i, _ in stages]
    assert indices == sorted(set(indices))
    untils = [until for _, until in stages]
    assert untils == sorted(untils)
    assert untils[-1] == WORST


@given(windows)
def test_its_energy_is_that_of_the_best_schedule_there_is(window_ms):
    stages = LADDER.stages(window_ms, 0.0, 0.0)
    bound = _blind_uj(POINT, window_ms, 0.99)
    assert bound * (1 - 1e-3) <= expected_uj(stages) <= 1.01 * bound
    steady = next(i for i in range(len(MHZ)) if WORST * POINT.latency_ms[i] <= window_ms + 1e-9)
    assert expected_uj(stages) <= expected_uj([(steady, WORST)]) * (1 + 1e-9)


@given(windows, st.floats(0, 0.99))
def test_half_way_it_says_what_it_said_at_the_start(window_ms, part):
    stages, done = LADDER.stages(window_ms, 0.0, 0.0), part * WORST
    spent_ms = sum(ms * min(max((done - begin) / max(end - begin, 1e-12), 0), 1)
                   for ms, _, begin, end in times(stages))  # fmt: skip
    for index, until in LADDER.stages(window_ms - spent_ms + 1e-9, done, 0.0):
        if until - done > 1e-6:
            assert index == next(i for i, end in stages if end > done + 1e-7)
            break


def test_without_noise_or_choice_there_is_one_stage():
    quiet = tables(board(unit(opps=UNIT.opps, noise_cv=0.0)))["net"].point("large", "gpu")
    assert [i for i, _ in Ladder(quiet, 1.0, 0, 5).stages(1e9, 0.0, 0.1)] == [0]
    assert Ladder(POINT, WORST, 3, 3).stages(1e9, 0.0, 0.1) == [(3, WORST)]
    assert Ladder(POINT, WORST, 3, 3).stages(1.0, 0.0, 0.1) == []


def test_on_a_board_it_comes_near_the_least_that_noise_allows():
    """HiKey960: slow CPUs that scatter, and clocks that change within a millisecond."""
    on = load_board("hikey960")
    points = published_tables(on)
    workload = scenario("S1", on, points, 0).workload
    log = run(workload, on, points, Manager(on, points), 0)
    assert frames_of(log, workload, points)["on_time"].all()
    clocks = [e["cpu_mhz"] for e in log if e["event"] == "set" and e["reason"] == "acts"]
    assert len(set(clocks)) >= 4
    assert 1 < foresight(Case(workload, on, points)) < 1.2
