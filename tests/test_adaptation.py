"""The published trace again: who is in time after a competitor has come, and at what price."""

from dynlib import load_board
from suite.papers.dynamic_ofa import PUBLISHED_TRACE, published_tables
from suite.studies.adaptation import BEFORE_S, COMES_S, SHOWN_S, replay_trace, trace_case

BOARD = load_board("jetson-xavier-nx")
TABLES = published_tables(BOARD)


def test_one_competitor_comes_and_stays():
    workload = trace_case(BOARD, TABLES, 0).workload
    (change,) = workload.changes
    (app,) = workload.apps
    assert (change.t_s, change.stretch, change.announced) == (BEFORE_S + COMES_S, 1.33, False)
    assert workload.horizon_s == BEFORE_S + SHOWN_S
    assert round(app.deadline_ms, 6) == 60


def test_the_manager_is_in_time_again_before_the_loop_that_waits_for_twenty_frames():
    shown, took = replay_trace(BOARD, TABLES, [400])
    took = took.set_index("policy")["recovery_s"]
    assert took["manager, for accuracy"] < 1 < took["the public loop, here"] <= SHOWN_S
    assert shown["t_s"].between(0, SHOWN_S).all()
    published = shown[shown["policy"] == "published"]
    assert len(published) == len(PUBLISHED_TRACE)
    assert (published["source"] == "published").all()
    assert not (shown[shown["policy"] != "published"]["source"] == "published").any()
