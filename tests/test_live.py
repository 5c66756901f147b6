"""The live loop on a clock that the test turns, and what a live experiment needs around it."""

import pytest
from live_cases import (
    MS,
    Clock,
    FakeKnob,
    Net,
    camera,
    fixed,
    go,
    knobbed,
    machine,
    managed,
    measured,
    quota,
    turned,
)

from dynlib.errors import WorkloadError
from dynlib.log import DecisionLog
from dynlib.manager.manager import Manager
from dynlib.runtime.live import Served, run_live
from dynlib.runtime.summary import frames_of
from dynlib.workload import App, Change, Workload


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


def test_what_was_logged_is_what_ran(clock):
    run, frames = go(clock, managed)
    assert len(frames) == len(list(camera().arrivals(camera().apps[0], 0)))
    assert frames["on_time"].all()
    for frame in frames.to_dict("records"):
        assert run.answers["cam", frame["frame"]] == frame["subnet"]
        late_ms = 1000 * (frame["finish_s"] - frame["arrival_s"])
        assert frame["latency_ms"] == pytest.approx(late_ms)
        assert frame["latency_ms"] == pytest.approx(MS[frame["subnet"]], abs=0.7)
    assert run.log.header["source"] == "measured"
    assert 0 < run.overhead_pct < 100
    assert run.wall_s == pytest.approx(6.0, abs=0.1)


def test_the_log_can_be_read_back(clock, tmp_path):
    run, _ = go(clock, managed)
    again = DecisionLog.read(run.log.write(tmp_path / "log.jsonl"))
    assert list(again) == list(run.log)
    times = [event["t_s"] for event in run.log]
    assert times == sorted(times)


def test_the_manager_gives_way_to_a_load_and_comes_back(clock):
    def stretch(t_s):
        return 2.0 if 2 <= t_s < 4 else 1.0

    run, frames = go(clock, managed, stretch=stretch)
    _, always = go(clock, fixed("large"), stretch=stretch)
    assert (~frames["on_time"]).sum() == 1  # the frame that met the load first
    assert (~always["on_time"]).sum() > 0.3 * len(always)
    during = frames[frames["arrival_s"].between(2.1, 3.9)]
    assert set(during["subnet"]) == {"small"}
    assert set(frames[frames["arrival_s"] > 5]["subnet"]) == {"large"}
    reasons = [e["reason"] for e in run.log if e["event"] == "decide"]
    assert reasons == ["apps", "requirement", "saves"]


def test_frames_that_wait_too_long_are_dropped_and_none_is_lost(clock):
    workload = camera(deadline_ms=30.0, period_ms=15.0)
    run, frames = go(clock, fixed("large"), workload, lambda t_s: 5.0)
    assert set(frames["reason"]) <= {"late", "deadline passed", ""}
    dropped = frames["reason"] == "deadline passed"
    assert dropped.any()
    assert set(run.answers) == {("cam", k) for k in frames["frame"][~dropped]}
    arrivals = [e["t_s"] for e in run.log if e["event"] == "arrive"]
    assert arrivals == pytest.approx([0.015 * i for i in range(len(arrivals))])


def test_the_more_urgent_of_two_apps_goes_first(clock):
    on = machine()
    apps = (App("slow", "net", 90.0, period_ms=100.0), App("fast", "net", 30.0, period_ms=100.0))
    workload, tables = Workload("two", 1.0, apps), measured(Net(clock), on)
    nets = {name: Net(clock) for name in ("slow", "fast")}
    served = {name: Served(net.switch, net.answer) for name, net in nets.items()}
    run = run_live(workload, on, tables, Manager(on, tables, objective="accuracy"), served)
    assert frames_of(run.log, workload, tables)["on_time"].all()
    starts = [e["app"] for e in run.log if e["event"] == "start"]
    assert starts[::2] == ["fast"] * len(starts[::2])


@pytest.mark.parametrize("workload", [
    camera(arrival="single-stream"),
    Workload("w", 1.0, camera().apps, (Change(0.5, "cam", deadline_ms=3.0),)),
])  # fmt: skip
def test_what_it_cannot_do_it_says(clock, workload):
    with pytest.raises(WorkloadError, match="neither changes nor closed loops"):
        go(clock, fixed("large"), workload)


def test_threads_and_quota_follow_the_plan_and_are_put_back(clock):
    threads, share = FakeKnob("threads", (1, 2)), quota()
    with knobbed(threads, share) as knobs:
        run, _ = go(clock, managed, stretch=lambda t_s: 3.0 if t_s > 3 else 1.0, knobs=knobs)
    # 10 of 24 ms, and 2 of 24 ms: twice that, and never less than the program itself needs.
    assert share.history == [83, 20, 200.0]
    assert threads.history == [1, 2]
    found = [(e.get("cores"), e.get("quota")) for e in run.log if e["event"] == "set"]
    assert found == [(1, None), (None, 83), (None, 20)]
    assert run.log.header["knobs"] == ["subnet", "threads", "quota_pct"]
    assert not run.problems


def test_a_knob_that_is_refused_is_named_and_the_run_goes_on(clock):
    with knobbed(quota(error=PermissionError(1, "not permitted"))) as knobs:
        run, frames = go(clock, managed, knobs=knobs)
    assert run.problems == {"quota_pct": "not permitted"}
    assert frames["on_time"].all()
