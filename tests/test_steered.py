"""Live runs that are steered while they go on: pushed frames, requirements, apps that join."""

import math
from threading import Thread

import pytest
from live_cases import Clock, Net, machine, managed, measured, steered, turned

from dynlib.errors import PolicyError, WorkloadError
from dynlib.log import DecisionLog
from dynlib.runtime.case import Case
from dynlib.runtime.live import Live, Served
from dynlib.workload import App, Workload


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


def pushes(live, answers, app="cam", period_s=0.04, count=50, start_s=0.01):
    """Frames every `period_s` seconds."""
    return [
        (start_s + k * period_s, lambda k=k: answers.append(live.submit(app, f"frame {k}")))
        for k in range(count)
    ]


class Echo(Net):
    """Answers with what it was given, and its own name."""

    def answer(self, k):
        return k, super().answer(k)


def test_frames_are_pushed_and_answered(clock):
    answers = []
    run, frames = steered(clock, lambda live: [*pushes(live, answers), (2.2, live.stop)], make=Echo)
    assert len(frames) == 50
    assert frames["on_time"].all()
    pushed_s = [0.01 + 0.04 * k for k in range(50)]
    assert frames["arrival_s"].tolist() == pytest.approx(pushed_s, abs=1e-3)
    assert [future.result()[0] for future in answers] == [f"frame {k}" for k in range(50)]
    assert set(frames["subnet"][10:]) == {"large"}  # how often they come is known by then
    assert run.answers == {}  # those who pushed have them
    assert run.log.header["horizon_s"] is None
    assert run.log.events[-1] == {"t_s": pytest.approx(2.2, abs=1e-3), "event": "set",
                                  "reason": "stopped"}  # fmt: skip
    assert run.case.workload.horizon_s == run.log.events[-1]["t_s"]


def test_a_run_without_an_end_keeps_its_last_events_and_the_journal_all(
    clock, tmp_path, monkeypatch
):
    monkeypatch.setattr("dynlib.runtime.live._KEPT", 20)
    script = lambda live: [(0.0, lambda: live.log.journal(tmp_path / "log")),  # noqa: E731
                           *pushes(live, []), (2.2, live.stop)]  # fmt: skip
    run, frames = steered(clock, script, make=Echo)
    all_of_them = DecisionLog.read(tmp_path / "log").events
    assert len([e for e in all_of_them if e["event"] == "arrive"]) == 50
    assert 20 <= len(run.log.events) <= 40
    assert run.log.events == all_of_them[-len(run.log.events) :]
    assert 0 < len(frames) < 20
    assert frames["on_time"].all()


def test_how_often_frames_come_is_learnt(clock):
    seen = []

    class Watching(type(managed(machine(), measured(Net(Clock()), machine())))):
        def decide(self, state, limits):
            seen.extend((app.need.period_ms, app.arrival) for app in state.apps)
            return super().decide(state, limits)

    steered(
        clock, lambda live: [*pushes(live, []), (2.2, live.stop)],
        policy=lambda on, tables: Watching(on, tables),
    )  # fmt: skip
    assert seen[0] == (30.0, "server")
    assert seen[-1] == (pytest.approx(40, abs=1), "periodic")


def test_requirements_change_at_once_and_are_logged(clock, tmp_path):
    def script(live):
        return [
            *pushes(live, []),
            (1.0, lambda: live.set_requirement("cam", deadline_ms=5.0)),
            (1.5, lambda: live.set_requirement("cam", deadline_ms=30.0, accuracy_floor_pct=75.0)),
            (2.2, live.stop),
        ]

    run, frames = steered(clock, script)
    strict = frames["arrival_s"].between(1.0, 1.5)
    assert frames["on_time"].all()
    assert set(frames[strict]["subnet"]) == {"small"}
    assert set(frames[strict]["deadline_ms"]) == {5.0}
    assert set(frames[~strict]["subnet"][10:]) == {"large"}
    said = [e for e in run.log if e.get("reason") == "requires"]
    assert [(e["deadline_ms"], e["accuracy_floor_pct"]) for e in said] == [(5.0, 0.0), (30.0, 75.0)]
    assert [c.deadline_ms for c in run.case.workload.changes] == [5.0, 30.0]
    again = DecisionLog.read(run.log.write(tmp_path / "log.jsonl"))
    assert again.events == run.log.events


def test_a_period_changes_for_frames_of_a_timetable(clock):
    app = App("cam", "net", 12.0, period_ms=40.0)
    _, frames = steered(
        clock, lambda live: [(1.0, lambda: live.set_requirement("cam", period_ms=80.0))],
        (app,), horizon_s=2.0,
    )  # fmt: skip
    assert len(frames[frames["arrival_s"] < 1.01]) == 26
    assert frames["arrival_s"].diff().iloc[-5:].tolist() == pytest.approx([0.08] * 5)


def test_apps_join_and_leave(clock, tmp_path):
    late = App("late", "net", 40.0, "pushed", period_ms=50.0, priority=1)

    def script(live):
        net = Net(clock)
        answers = script.answers = []
        return [
            (0.5, lambda: live.add_app(late, Served(net.switch, net.answer))),
            *pushes(live, answers, "late", 0.05, 10, 0.6),
            (1.2, lambda: live.remove_app("late")),
            (1.5, live.stop),
        ]

    run, frames = steered(clock, script, (App("cam", "net", 12.0, period_ms=24.0),),
                          journal=tmp_path / "log.jsonl")  # fmt: skip
    mine = frames[frames["app"] == "late"]
    assert len(mine) == 10
    assert frames["on_time"].sum() >= len(frames) - 1  # the stop cut one short at most
    assert {e["reason"] for e in run.log if e["event"] == "set"} == {"joins", "leaves", "stopped"}
    assert DecisionLog.read(tmp_path / "log.jsonl").header["models"] == {
        "cam": "net",
        "late": "net",
    }
    assert [app.name for app in run.case.workload.apps] == ["cam", "late"]


def test_an_app_may_come_back(clock):
    app = App("cam", "net", 30.0, "pushed", period_ms=40.0)

    def script(live):
        net = Net(clock)
        return [
            *pushes(live, [], count=5),
            (0.5, lambda: live.remove_app("cam")),
            (0.6, lambda: live.add_app(app, Served(net.switch, net.answer))),
            *pushes(live, [], count=5, start_s=0.7),
            (1.0, live.stop),
        ]

    _, frames = steered(clock, script)
    assert frames["frame"].tolist() == list(range(10))
    assert frames["on_time"].all()


def test_what_makes_no_sense_is_an_error_where_it_is_asked(clock):
    def script(live):
        def check():
            with pytest.raises(WorkloadError, match="no app 'cma'; did you mean cam"):
                live.submit("cma", 1)
            with pytest.raises(WorkloadError, match="deadline_ms: got -1"):
                live.set_requirement("cam", deadline_ms=-1)
            with pytest.raises(WorkloadError, match="no app"):
                live.remove_app("cma")
            with pytest.raises(WorkloadError, match="there already"):
                live.add_app(App("cam", "net", 30.0, "pushed"), None)
            with pytest.raises(PolicyError, match="no table for model 'other'"):
                live.add_app(App("new", "other", 30.0, "pushed"), None)
            script.checked = True

        return [(0.1, check), (0.2, live.stop)]

    run, _ = steered(clock, script)
    assert script.checked
    assert run.problems == {}


def test_a_burst_is_bounded_and_what_is_too_late_is_dropped(clock, monkeypatch):
    monkeypatch.setattr("dynlib.runtime.live._KEPT", 100_000)
    answers = []

    def script(live):
        return [
            (0.1, lambda: [answers.append(live.submit("cam", k)) for k in range(10_000)]),
            *pushes(live, answers, start_s=1.0, count=5),
            (2.0, live.stop),
        ]

    _, frames = steered(clock, script)
    assert len(frames) == len(answers) == 10_005
    assert all(answer.done() for answer in answers)
    assert frames["on_time"].iloc[-5:].all()
    counts = frames["reason"].value_counts()
    assert counts["queue full"] == 9900
    assert {"deadline passed", "given up"} & set(counts.index)
    assert sum(answer.cancelled() for answer in answers) == frames["finish_s"].isna().sum()


def test_frames_that_came_too_late_are_cancelled_when_it_ends(clock):
    answers = []

    def script(live):
        script.live = live
        return [
            (0.1, live.stop),
            (0.1, lambda: answers.append(live.submit("cam", 0))),
        ]

    steered(clock, script)
    answers.append(script.live.submit("cam", 1))
    assert [answer.cancelled() for answer in answers] == [True] * len(answers)


def test_a_real_thread_pushes_and_stops():
    on = machine()
    tables = measured(Net(Clock()), on)
    app = App("cam", "net", 10_000.0, "pushed")
    live = Live(Case(Workload("real", math.inf, (app,)), on, tables), managed(on, tables),
                {"cam": Served(lambda subnet: None, lambda frame: 2 * frame)})  # fmt: skip
    thread = Thread(target=live.serve)
    thread.start()
    assert [live.submit("cam", k).result(timeout=30) for k in range(20)] == [
        2 * k for k in range(20)
    ]
    live.stop()
    thread.join(timeout=30)
    assert not thread.is_alive()
