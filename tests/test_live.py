"""The live loop on a clock that the test turns, and what a live experiment needs around it."""

import math

import pandas as pd
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
from runtime_cases import board, unit

from dynlib.errors import WorkloadError
from dynlib.log import DecisionLog
from dynlib.manager.manager import Manager
from dynlib.points import PointTable
from dynlib.profile.points import at_full_clock
from dynlib.runtime.case import Case
from dynlib.runtime.live import Served
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
    assert (~frames["on_time"]).sum() <= 3  # one may be chance; three are another speed
    assert (~always["on_time"]).sum() > 0.3 * len(always)
    during = frames[frames["arrival_s"].between(2.1, 3.9)]
    assert set(during["subnet"]) == {"small"}
    assert set(frames[frames["arrival_s"] > 5]["subnet"]) == {"large"}
    reasons = [e["reason"] for e in run.log if e["event"] == "decide"]
    assert reasons == ["best", "best", "best"]


def test_frames_that_wait_too_long_are_dropped_and_none_is_lost(clock):
    workload = camera(deadline_ms=30.0, period_ms=15.0)
    run, frames = go(clock, fixed("large"), workload, lambda t_s: 5.0)
    assert set(frames["reason"]) <= {"late", "deadline passed", "horizon", ""}
    assert (frames["reason"] == "deadline passed").any()
    assert set(run.answers) == {("cam", k) for k in frames["frame"][frames["start_s"].notna()]}
    arrivals = [e["t_s"] for e in run.log if e["event"] == "arrive"]
    assert arrivals == pytest.approx([0.015 * i for i in range(len(arrivals))])


def test_the_more_urgent_of_two_apps_goes_first(clock):
    on = machine()
    apps = (App("slow", "net", 90.0, period_ms=100.0), App("fast", "net", 30.0, period_ms=100.0))
    workload, tables = Workload("two", 1.0, apps), measured(Net(clock), on)
    nets = {name: Net(clock) for name in ("slow", "fast")}
    served = {name: Served(net.switch, net.answer) for name, net in nets.items()}
    run = Case(workload, on, tables).serve(Manager(on, tables, objective="accuracy"), served)
    assert run.frames()["on_time"].all()
    starts = [e["app"] for e in run.log if e["event"] == "start"]
    assert starts[::2] == ["fast"] * len(starts[::2])


@pytest.mark.parametrize("change", [
    Change(0.5, unit="cpu", stretch=2.0), Change(0.5, emc_mhz=100.0), Change(0.5, ambient_c=40.0)
])  # fmt: skip
def test_what_it_cannot_do_it_says(clock, change):
    with pytest.raises(WorkloadError, match=r"at 0\.5 s: a live run cannot set"):
        go(clock, fixed("large"), Workload("w", 1.0, camera().apps, (change,)))


def test_requirements_change_as_in_a_simulation(clock):
    changes = (
        Change(1.0, "cam", deadline_ms=4.0),
        Change(2.0, "cam", deadline_ms=12.0, accuracy_floor_pct=75.0),
        Change(3.0, "cam", period_ms=48.0),
    )
    _, frames = go(clock, managed, Workload("w", 4.0, camera().apps, changes))
    second = frames["arrival_s"].astype(int)
    assert frames["on_time"].all()
    assert frames.groupby(second)["subnet"].unique().map(list).to_dict() == {
        0: ["large"], 1: ["small"], 2: ["large"], 3: ["large"]
    }  # fmt: skip
    assert frames.groupby(second)["floor_pct"].max().to_dict() == {0: 0, 1: 0, 2: 75, 3: 75}
    assert [frames[second == s]["arrival_s"].diff().median() for s in (2, 3)] == pytest.approx(
        [0.024, 0.048]
    )


def test_an_announced_change_is_known_before_it_comes(clock):
    seen = []

    class Watching(Manager):
        def decide(self, state, limits):
            seen.append((state.t_ms, bool(state.apps and state.apps[0].upcoming)))
            return super().decide(state, limits)

    change = Change(3.0, "cam", deadline_ms=4.0)
    go(
        clock, lambda on, tables: Watching(on, tables, objective="accuracy"),
        Workload("w", 4.0, camera().apps, (change,)),
    )  # fmt: skip
    known = [t_ms for t_ms, upcoming in seen if upcoming]
    assert 2000 <= min(known) < 2030
    assert max(known) < 3000


def test_the_next_query_of_a_closed_loop_waits_for_the_answer(clock):
    _, frames = go(clock, fixed("large"), camera(arrival="single-stream", horizon_s=1.0))
    assert len(frames) == pytest.approx(100, abs=2)  # one after the other, of 10 ms
    gaps = frames["arrival_s"].to_numpy()[1:] - frames["finish_s"].to_numpy()[:-1]
    assert abs(gaps).max() < 1e-9


def test_apps_come_and_go(clock):
    apps = (*camera().apps, App("late", "net", 40.0, period_ms=100.0, start_s=1.0, end_s=2.0))
    _, frames = go(clock, managed, Workload("w", 3.0, apps))
    late = frames[frames["app"] == "late"]
    assert (late["arrival_s"].min(), len(late)) == (pytest.approx(1.0), 10)
    assert late["on_time"].all()


def test_a_unit_that_may_not_be_used_gets_no_frames(clock):
    on = at_full_clock(board(unit("cpu", "cpu"), unit("gpu")))
    rows = measured(Net(clock), on)["net"].frame
    tables = {"net": PointTable(pd.concat([rows, rows.assign(unit="gpu")]), on)}
    changes = (Change(1.0, unit="cpu", lost=True), Change(2.0, unit="cpu", lost=False))
    net = Net(clock)
    case = Case(Workload("w", 3.0, camera().apps, changes), on, tables)
    run = case.serve(managed(on, tables), {"cam": Served(net.switch, net.answer)})
    frames = run.frames()
    inside = frames["arrival_s"].between(1.0, 1.99)
    assert frames["on_time"].mean() > 0.97
    assert set(frames["unit"]) == {"cpu", "gpu"}
    assert "cpu" not in set(frames[inside]["unit"])


def cut(subnet="large", end_s=3.0):
    """10 ms frames every 60 ms; the CPU is lost in the middle of the first one after 1 s."""
    change = Change(1.025, unit="cpu", lost=True)
    workload = camera(deadline_ms=50.0, period_ms=60.0, horizon_s=3.0)
    back = Change(end_s, unit="cpu", lost=False)
    return Workload("w", 3.0, workload.apps, (change, back))


def test_a_frame_whose_unit_is_lost_meanwhile_starts_again(clock):
    run, frames = go(clock, fixed("large"), cut(end_s=1.04))
    twice = [e["frame"] for e in run.log if e["event"] == "start"]
    (again,) = {frame for frame in twice if twice.count(frame) == 2}
    assert frames["arrival_s"][again] == pytest.approx(1.02)
    assert frames["latency_ms"][again] == pytest.approx(30, abs=1)
    assert frames["on_time"].all()


def test_nothing_is_served_on_a_lost_unit(clock):
    _, frames = go(clock, fixed("large"), cut())
    gone = frames["arrival_s"] > 1.01
    assert set(frames[gone]["reason"]) == {"deadline passed", "horizon"}
    assert frames[~gone]["on_time"].all()


def test_an_app_that_died_before_it_came_does_not_come(clock):
    on, seen = machine(), {}
    tables = measured(Net(clock), on)

    class Watching(Manager):
        def decide(self, state, limits):
            seen[state.t_ms] = [app.name for app in state.apps]
            return super().decide(state, limits)

    def broken(subnet):
        raise RuntimeError("no such network")

    apps = (*camera().apps, App("late", "net", 40.0, period_ms=100.0, start_s=2.0))
    net = Net(clock)
    nets = {"cam": Served(net.switch, net.answer), "late": Served(broken, net.answer)}
    case = Case(Workload("w", 3.0, apps), on, tables)
    run = case.serve(Watching(on, tables), nets)
    assert "app late" in run.problems
    assert sum("late" in names for names in seen.values()) == 1  # announced, and dead
    late = run.frames().query("app == 'late'")
    assert set(late["reason"]) == {"app died"}


def test_an_app_without_a_network_is_an_error_at_the_start(clock):
    on = machine()
    tables = measured(Net(clock), on)
    with pytest.raises(WorkloadError, match=r"app 'cam' has no network; there are \['cma'\]"):
        Case(camera(), on, tables).serve(fixed("large"), {"cma": Served(print, print)})
    with pytest.raises(WorkloadError, match=r"app 'cam' has no network; there are \[\]"):
        Case(camera(), on, tables).serve(fixed("large"), {"cam": None})


def test_a_live_run_measures_no_energy(clock):
    on = board(unit("cpu", "cpu", cores=2))  # its power is known, and yet it was not measured
    run, _ = go(clock, fixed("large"), camera(horizon_s=1.0), on=on)
    summary = run.summary()
    assert math.isnan(run.energy_mj)
    assert all(math.isnan(value) for key, value in summary.items() if "_mj" in key)


class Failing(Manager):
    """Answers nonsense after one second, where `what` says."""

    what = ""

    def decide(self, state, limits):
        late = self.what == "decide" and state.t_ms > 1000
        return None if late else super().decide(state, limits)

    def choose(self, ready, now_ms):
        late = self.what == "choose" and now_ms > 1000
        return None if late else super().choose(ready, now_ms)


@pytest.mark.parametrize("what", ["decide", "choose"])
def test_a_policy_that_answers_nonsense_is_not_asked_again(clock, what):
    def failing(on, tables):
        policy = Failing(on, tables, objective="accuracy")
        policy.what = what
        return policy

    run, frames = go(clock, failing, camera(horizon_s=2.0))
    assert set(run.problems) == {"policy"}
    assert "None, expected" in run.problems["policy"]
    assert frames["on_time"].all()
    assert set(frames["subnet"]) == {"large"}


def test_the_quota_of_a_setting_is_what_the_process_gets(clock):
    on, share = machine(), quota()
    rows = measured(Net(clock), on)["net"].frame
    tables = {"net": PointTable(rows.assign(quota=60.0), on)}
    net = Net(clock)
    case = Case(camera(horizon_s=1.0), on, tables)
    with knobbed(share) as held:
        run = case.serve(managed(on, tables), {"cam": Served(net.switch, net.answer)}, machine=held)
    assert share.history[0] == 60
    assert {e["quota"] for e in run.log if e["event"] == "finish"} == {60.0}


def test_settings_are_switched_like_networks(clock):
    on, asked = machine(), []
    rows = measured(Net(clock), on)["net"].frame
    slow = rows.assign(backend="slow", latency_ms=3 * rows["latency_ms"])
    tables = {"net": PointTable(pd.concat([slow, rows.assign(backend="fast")]), on)}
    net = Net(clock)

    def switch(subnet, setting):
        asked.append((subnet, setting.backend))
        net.switch(subnet)

    served = {"cam": Served(switch, net.answer, takes_setting=True)}
    case = Case(camera(horizon_s=1.0), on, tables)
    run = case.serve(Manager(on, tables, objective="accuracy"), served)
    assert asked == [("large", "fast")]
    assert {e["backend"] for e in run.log if e["event"] in ("start", "finish")} == {"fast"}
    assert run.frames()["on_time"].all()


def test_threads_and_quota_follow_the_plan_and_are_put_back(clock):
    threads, share = FakeKnob("threads", (1, 2)), quota()
    with knobbed(threads, share) as knobs:
        run, _ = go(clock, managed, stretch=lambda t_s: 3.0 if t_s > 3 else 1.0, knobs=knobs)
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
