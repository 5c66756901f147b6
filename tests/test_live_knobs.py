"""What the live loop does with a machine: clocks, governors, limits, and a quota that does harm."""

import pytest
from live_cases import (
    MS,
    Clock,
    FakeKnob,
    Net,
    camera,
    fixed,
    knobbed,
    machine,
    measured,
    turned,
)
from runtime_cases import board, unit

from dynlib.machine.control import Knob, MachineUnit, Parts
from dynlib.machine.machine import Machine
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Placement
from dynlib.points import PointTable, make_table
from dynlib.runtime.case import Case
from dynlib.runtime.live import Live, Served
from dynlib.runtime.replay import replay
from dynlib.runtime.rivals import Static
from dynlib.workload import App, Workload

MHZ = (250.0, 500.0, 1000.0)


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


class ClockKnob(Knob):
    """The clock of the CPU; `most` is the highest that is allowed."""

    unit, kind, choices, local = "cpu", "clock_mhz", MHZ, True

    def __init__(self, most=1000.0):
        self.value, self.most, self.history = 1000.0, most, []

    def get(self):
        return min(self.value, self.most)

    def put(self, value):
        self.value = value
        self.history.append(value)


class Slower(Net):
    """Takes longer the lower the clock."""

    knob = None

    def answer(self, k):
        stretch = 1000.0 / self.knob.get()
        self.clock.sleep(MS[self.subnet] * stretch / 1000)
        return self.subnet


def on_clocks():
    on = board(unit("cpu", "cpu", cores=2, cpus=()))
    rows = [
        {
            "model": "net", "subnet": name, "board": on.name, "unit": "cpu", "batch": 1,
            "cpu_mhz": mhz, "accuracy_val_pct": pct, "latency_ms": MS[name] * 1000 / mhz,
            "latency_std_ms": 0.01, "source": "measured",
        }
        for name, pct in (("small", 70.0), ("large", 80.0)) for mhz in MHZ
    ]  # fmt: skip
    return on, {"net": PointTable(make_table(rows), on)}


def serve(clock, policy, knobs, workload=None):
    on, tables = on_clocks()
    net = Slower(clock)
    net.knob = next(knob for knob in knobs if knob.kind == "clock_mhz")
    parts = Parts([MachineUnit("cpu", "cpu"), MachineUnit("process", "process")], [*knobs])
    case = Case(workload or camera(deadline_ms=60.0, period_ms=80.0, horizon_s=2.0), on, tables)
    with Machine("fake", parts, None) as machine:
        live = Live(case, policy(on, tables), {"cam": Served(net.switch, net.answer)},
                    machine=machine)  # fmt: skip
        live.bound.units["cpu"] = ("cpu",)  # it has no CPUs to be known by
        live.bound._freqs["cpu"] = MHZ
        live.clocked = {"cpu"} - set(live.policy.governors)
        live.log.header["knobs"].append("cpu clock_mhz")
        return live.serve()


def frugal(on, tables):
    return Manager(on, tables)


def test_clocks_are_carried_out_and_logged(clock):
    knob = ClockKnob()
    run = serve(clock, frugal, [knob])
    frames = run.frames()
    assert frames["on_time"].all()
    assert set(knob.history) > {250.0}  # the lowest between frames, and whatever they need
    said = [e for e in run.log if e["event"] == "set" and "cpu_mhz" in e]
    assert {"policy", "acts"} == {e["reason"] for e in said}
    asked = [e["cpu_mhz"] for e in said if e["reason"] == "policy"]
    assert asked == knob.history[: len(asked)]
    again = replay(run.case, frugal(run.case.board, run.case.tables), run.log)
    assert again.events == run.log.events


def test_times_are_held_against_the_clock_they_were_measured_at(clock):
    run = serve(clock, frugal, [ClockKnob()])
    took_ms = 1000 * (run.frames()["finish_s"] - run.frames()["start_s"])
    assert took_ms.max() > 1.9 * MS["small"]  # slower, and yet
    assert not [e for e in run.log if e["event"] == "decide" and e["t_s"] > 0.1]  # as expected


def test_a_clock_that_cannot_be_set_is_said_once(clock, caplog):
    class Refused(ClockKnob):
        def put(self, value):
            raise PermissionError(1, "not permitted")

    run = serve(clock, frugal, [Refused()])
    assert run.problems == {"cpu clock_mhz": "not permitted"}
    assert run.frames()["on_time"].all()
    assert len([r for r in caplog.records if "cpu clock_mhz: not permitted" in r.message]) == 1


def test_a_governor_is_set_and_clocks_are_left_to_it(clock):
    governor = FakeKnob("governor", ("schedutil", "performance"))
    governor.unit = "cpu"
    knob = ClockKnob()

    def static(on, tables):
        where = {"cam": Placement("small", "cpu")}
        return Static("fixed", where, {}, governors={"cpu": "schedutil"})

    run = serve(clock, static, [knob, governor])
    assert governor.history[0] == "schedutil"
    assert knob.history in ([], [1000.0])  # put back at most
    assert run.problems == {}


class Throttled(FakeKnob):
    """A quota that holds the process back in every frame."""

    count = 0

    def throttled(self):
        self.count += 1
        return self.count


def two_apps(clock, share):
    """An app with a quota in its setting, and one that knows none; what `share` slows down."""
    on = machine()
    rows = measured(Net(clock), on)["net"].frame
    tables = {"net": PointTable(rows.assign(quota=60.0), on),
              "free": PointTable(rows.assign(model="free"), on)}  # fmt: skip
    apps = (App("cam", "net", 12.0, period_ms=40.0), App("mic", "free", 50.0, period_ms=40.0))
    nets = {app.name: Net(clock, lambda t_s: 3.0 if share.value == 60.0 else 1.0) for app in apps}
    served = {name: Served(net.switch, net.answer) for name, net in nets.items()}
    return on, tables, apps, served


def test_a_quota_is_not_set_for_those_that_know_none(clock):
    share = Throttled("quota_pct", bounds=(1.0, 200.0))
    on, tables, apps, served = two_apps(clock, share)
    with knobbed(share) as knobs:
        policy = Manager(on, tables, objective="accuracy")
        case = Case(Workload("two", 2.0, apps), on, tables)
        assert case.serve(policy, served, machine=knobs).frames()["on_time"].all()
    assert set(share.history) <= {200.0}


def test_a_quota_that_makes_frames_late_is_let_go_and_said(clock):
    share = Throttled("quota_pct", bounds=(1.0, 200.0))
    on, tables, apps, served = two_apps(clock, share)
    with knobbed(share) as knobs:
        case = Case(Workload("one", 2.0, apps[:1]), on, tables)
        run = case.serve(fixed("large"), served, machine=knobs)
        assert share.history == [60.0, 200.0]
    assert run.problems == {"quota_pct": "let go: it made 5 of 10 frames late"}
    assert run.frames()["on_time"].tolist() == [False] * 5 + [True] * 45


def test_a_frame_that_our_quota_held_back_says_nothing_of_others(clock):
    share = Throttled("quota_pct", bounds=(1.0, 200.0))
    on, tables, apps, served = two_apps(clock, share)
    seen = []

    class Watching(Manager):
        def decide(self, state, limits):
            seen.extend(state.finished)
            return super().decide(state, limits)

    class Quoted(Live):
        """As if the quota of another setting held for this app too."""

        def _turn(self):
            self._turn_knob("quota_pct", 60.0)

    case = Case(Workload("one", 1.0, apps[1:]), on, tables)
    with knobbed(share) as knobs:
        policy = Watching(on, tables, objective="accuracy")
        run = Quoted(case, policy, served, machine=knobs).serve()
    assert {e["reason"] for e in run.log if e["event"] == "finish"} == {"throttled"}
    assert seen == []
    assert [e["reason"] for e in run.log if e["event"] == "decide"] == ["best"]
