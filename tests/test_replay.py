"""A live run decided anew from its log."""

import pytest
from live_cases import (
    Clock,
    FakeKnob,
    Net,
    camera,
    fixed,
    go,
    knobbed,
    machine,
    managed,
    quota,
    steered,
    turned,
)

from dynlib.errors import TableError
from dynlib.log import DecisionLog
from dynlib.manager.manager import Manager
from dynlib.runtime.live import Served
from dynlib.runtime.replay import replay
from dynlib.workload import App, Change, Workload


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


def loaded(t_s):
    return 2.0 if 1 <= t_s < 2 or 4 <= t_s < 5 else 1.0


def again(run, policy=managed):
    log = DecisionLog(**run.log.header)
    log.events = [dict(event) for event in run.log.events]
    return replay(run.case, policy(run.case.board, run.case.tables), log).events


TWO = (App("cam", "net", 24.0, period_ms=33.3), App("mic", "net", 24.0, "server", period_ms=70.0))
CHANGES = (
    Change(1.0, "cam", deadline_ms=4.0),
    Change(2.0, "cam", deadline_ms=12.0, accuracy_floor_pct=75.0),
    Change(3.0, "cam", period_ms=48.0, announced=False),
    Change(4.025, unit="cpu", lost=True),
    Change(4.3, unit="cpu", lost=False),
)
WORKLOADS = {
    "plain": camera(),
    "changes": Workload("w", 6.0, camera().apps, CHANGES),
    "two": Workload("two", 6.0, TWO),
    "closed": camera(arrival="single-stream", horizon_s=2.0),
    "offline": camera(arrival="offline", frames=60, deadline_ms=400.0, horizon_s=2.0),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_policy_decides_the_same(clock, name):
    with knobbed(FakeKnob("threads", (1, 2)), quota()) as knobs:
        run, _ = go(clock, managed, WORKLOADS[name], stretch=loaded, knobs=knobs)
    assert again(run) == run.log.events
    assert sum(e["event"] == "decide" for e in run.log) >= 1


def test_another_policy_does_not(clock):
    run, _ = go(clock, managed, stretch=loaded)

    def other(on, tables):
        return Manager(on, tables, objective="energy")

    events = again(run, other)
    assert events != run.log.events
    assert len(events) < len(run.log.events) / 10  # from the first decision on


def test_a_switch_that_failed_fails_again(clock):
    class HalfSwitched(Net):
        def switch(self, subnet):
            if subnet == "small":
                raise MemoryError("no room")
            super().switch(subnet)

    run, _ = go(clock, managed, stretch=loaded, make=HalfSwitched)
    assert "switch failed" in {e.get("reason") for e in run.log}
    assert again(run) == run.log.events


def test_an_app_that_died_dies_again(clock):
    class Dying(Net):
        def answer(self, k):
            if k == 20:
                raise OSError(5, "camera unplugged")
            return super().answer(k)

    run, _ = go(clock, managed, Workload("two", 3.0, TWO), make=Dying)
    assert len(run.problems) == 2
    assert again(run) == run.log.events


def test_a_steered_run(clock):
    late = App("late", "net", 40.0, "pushed", period_ms=50.0)
    pushed = App("cam", "net", 30.0, "pushed")

    def script(live):
        net = Net(clock)
        return [
            *((0.01 + 0.04 * k, lambda: live.submit("cam", 0)) for k in range(40)),
            (0.5, lambda: live.add_app(late, Served(net.switch, net.answer))),
            *((0.6 + 0.05 * k, lambda: live.submit("late", 0)) for k in range(10)),
            (0.7, lambda: live.set_requirement("cam", deadline_ms=5.0)),
            (0.9, lambda: live.set_requirement("cam", deadline_ms=30.0)),
            (1.0, lambda: [live.submit("cam", k) for k in range(150)]),
            (1.3, lambda: live.remove_app("late")),
            (1.7, live.stop),
        ]

    run, _ = steered(clock, script, (pushed,))
    reasons = {e.get("reason") for e in run.log}
    assert {"joins", "requires", "leaves", "stopped", "queue full"} <= reasons
    assert again(run) == run.log.events


def test_a_log_of_another_case_is_refused(clock):
    run, _ = go(clock, fixed("large"), camera(horizon_s=1.0))
    log = DecisionLog(**run.log.header)
    log.events = [e for e in run.log.events if e["event"] != "arrive"]
    with pytest.raises(TableError, match="cannot follow"):
        replay(run.case, fixed("large"), log)


def test_real_time_is_repeated_to_the_last_bit():
    on_time = camera(deadline_ms=40.0, period_ms=21.7, horizon_s=0.6)
    run, _ = go(Clock(), managed, on_time, on=machine())
    assert again(run) == run.log.events
