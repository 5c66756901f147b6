"""Faults of the live loop: what breaks while frames are served, and what must hold all the same."""

import errno
import logging
import math
import os

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
    managed,
    quota,
    steered,
    turned,
)
from runtime_cases import NOISY, NOISY_TABLES, events, queue_lengths, run, summarise

from dynlib.errors import WorkloadError
from dynlib.log import DecisionLog
from dynlib.machine.control import Sensor
from dynlib.manager.manager import Manager
from dynlib.runtime.live import Served
from dynlib.workload import App, Workload

pytestmark = pytest.mark.faults


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


def loaded(t_s):
    """Twice a load that the large network cannot stand."""
    return 2.0 if 1 <= t_s < 2 or 4 <= t_s < 5 else 1.0


def said(run, event):
    return [e.get("reason") for e in run.log if e["event"] == event]


def reported(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_fault_01_sensors_are_lost_while_frames_are_served(clock, caplog):
    def gone():
        raise OSError(errno.ENODEV, "No such device")

    sensors = [Sensor("power", "power_mw", gone), Sensor("temp", "temp_c", lambda: math.nan)]
    share = quota(error=PermissionError(errno.EPERM, "not permitted"), after=1)
    with knobbed(share, sensors=sensors) as knobs:
        _, frames = go(clock, managed, stretch=loaded, knobs=knobs)
        assert knobs.level == "blind"
    assert frames["on_time"].sum() >= len(frames) - 6  # three in each load
    assert [m for m in reported(caplog) if "blind" in m] == ["fake: from control to blind"]


def test_fault_05_permission_is_lost_while_frames_are_served(clock, caplog):
    share = quota(error=PermissionError(errno.EPERM, "not permitted"), after=1)
    with knobbed(share) as knobs:
        done, frames = go(clock, managed, stretch=loaded, knobs=knobs)
    assert len(events(done.log, "decide")) == 5  # there, and to the small network and back twice
    assert said(done, "set") == ["quota_pct", "not permitted"]
    assert events(done.log, "set")[1]["quota"] == 83  # what is in force
    assert share.writes == 2  # and never again
    assert done.problems == {"quota_pct": "not permitted"}
    assert reported(caplog).count("quota_pct: not permitted") == 1
    assert frames["on_time"].sum() >= len(frames) - 6  # three in each load


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize("times", [2, 10**6])
def test_fault_06_a_knob_fails_while_frames_are_served(clock, caplog, number, times):
    share = quota(error=OSError(number, os.strerror(number)), after=1, times=times)
    with knobbed(share) as knobs:
        done, frames = go(clock, managed, stretch=loaded, knobs=knobs)
    assert frames["on_time"].sum() >= len(frames) - 6  # three in each load
    if times == 2:  # it was tried again
        assert (done.problems, said(done, "set")) == ({}, ["quota_pct"] * 5)
        assert share.history == [83, 20, 83, 20, 83]
    else:
        assert done.problems == {"quota_pct": os.strerror(number)}
        assert said(done, "set") == ["quota_pct", *[os.strerror(number)] * 3]  # then given up
        assert len([m for m in reported(caplog) if m.startswith("quota_pct")]) == 1


def test_fault_07_a_quota_is_clamped(clock):
    class Clamped(FakeKnob):
        def put(self, value):
            super().put(min(value, 50))

    with knobbed(Clamped("quota_pct", bounds=(1.0, 200.0))) as knobs:
        done, frames = go(clock, managed, knobs=knobs)
    (event,) = events(done.log, "set")
    assert (event["quota"], event["reason"]) == (50, "asked for 83.0, in force is 50")
    assert frames["on_time"].all()


def test_fault_08_a_number_of_threads_that_the_knob_has_not(clock, caplog):
    with knobbed(FakeKnob("threads", (2, 4)), quota()) as knobs:
        done, frames = go(clock, managed, stretch=loaded, knobs=knobs)
    (event, *_) = events(done.log, "set")
    assert event["cores"] == 4  # in force all the while
    assert "process.threads: 1; expected one of (2, 4)" in done.problems["threads"]
    assert len([m for m in reported(caplog) if m.startswith("threads")]) == 1
    assert frames["on_time"].sum() >= len(frames) - 6  # three in each load


class Failing(Manager):
    """A manager with a fault in it, from the nth decision on."""

    after = 20

    def decide(self, state, limits):
        self.after -= 1
        if self.after < 0:
            raise ZeroDivisionError("a bug")
        return super().decide(state, limits)


def test_fault_09_the_policy_fails(clock, caplog):
    share = quota()
    with knobbed(share) as knobs:
        done, frames = go(clock, lambda *given: Failing(*given, objective="accuracy"), knobs=knobs)
    assert share.value == 200.0  # as it was found
    assert frames["on_time"].all()  # what it decided last goes on
    assert len(frames) == 250
    assert done.problems == {"policy": "ZeroDivisionError('a bug')"}
    assert said(done, "decide") == ["best", "policy failed: ZeroDivisionError('a bug')"]
    assert reported(caplog) == ["policy: ZeroDivisionError('a bug')"]


def test_fault_09_the_policy_never_decided(clock):
    class Broken(Failing):
        after = 0

    share = quota()
    with pytest.raises(ZeroDivisionError), knobbed(share) as knobs:
        go(clock, Broken, knobs=knobs)
    assert share.value == 200.0


def test_fault_09_the_run_is_interrupted(clock, memory):
    class Interrupted(Net):
        def answer(self, k):
            if k == 100:
                raise KeyboardInterrupt
            return super().answer(k)

    share = quota()
    with pytest.raises(KeyboardInterrupt), knobbed(share) as knobs:
        go(clock, managed, knobs=knobs, make=Interrupted, journal=memory / "log.jsonl")
    assert share.value == 200.0
    served = events(DecisionLog.read(memory / "log.jsonl"), "finish")
    assert [e["frame"] for e in served] == list(range(100))


def test_fault_15_another_tool_sets_the_quota(clock, caplog):
    share = quota()
    share.exclusive, share.local = True, False

    class Meddled(Net):
        def answer(self, k):
            if k == 10:
                share.value = 60.0
            return super().answer(k)

    with knobbed(share) as knobs:
        done, frames = go(clock, managed, stretch=loaded, knobs=knobs, make=Meddled)
    assert share.value == 60.0  # left to it, also at the end
    assert share.history == [83]
    taken = "another program set process.quota_pct to 60.0: left to it"
    assert done.problems == {"quota_pct": taken}
    assert said(done, "set") == ["quota_pct", taken]
    assert frames["on_time"].sum() >= len(frames) - 6  # three in each load


def test_fault_16_the_files_of_a_knob_vanish(clock, memory):
    class Unplugged(FakeKnob):
        def get(self):
            if self.writes > 1:
                raise FileNotFoundError(errno.ENOENT, "No such file")
            return super().get()

    gone = OSError(errno.ENODEV, "No such device")
    knob = Unplugged("quota_pct", bounds=(1.0, 200.0), error=gone, after=1)
    with knobbed(knob) as knobs:
        done, frames = go(clock, managed, stretch=loaded, knobs=knobs)
    assert said(done, "set") == ["quota_pct", "No such device"]
    assert frames["on_time"].sum() >= len(frames) - 6  # three in each load
    again = DecisionLog.read(done.log.write(memory / "log.jsonl"))  # nobody knows the value
    assert again.events == done.log.events


def test_fault_17_the_wall_clock_jumps(monkeypatch):
    class Jumping(Clock):
        def time(self):
            return 3600.0 * (-1) ** round(self.t_s * 1e6)

    logs = [go(turned(monkeypatch, kind()), managed)[0].log for kind in (Clock, Jumping)]
    assert logs[0].events == logs[1].events


class Suspending(Clock):
    """Also has the clock that goes on while the machine is suspended."""

    CLOCK_BOOTTIME, asleep_s = 7, 0.0

    def clock_gettime(self, which):
        return self.perf_counter() + self.asleep_s


class Seeing(Manager):
    """Remembers what it was told."""

    def decide(self, state, limits):
        self.seen = [*getattr(self, "seen", []), *state.finished]
        self.last = super().decide(state, limits)
        return self.last


def seeing(on, tables):
    seeing.policy = Seeing(on, tables, objective="accuracy")
    return seeing.policy


def test_fault_18_the_machine_is_suspended(monkeypatch):
    class Slept(Net):
        def answer(self, k):
            self.clock.asleep_s += 3600.0 * (k == 50)
            return super().answer(k)

    done, frames = go(turned(monkeypatch, Suspending()), seeing, make=Slept)
    assert frames["on_time"].all()
    assert [e["frame"] for e in events(done.log, "finish") if "reason" in e] == [50]
    assert len(seeing.policy.seen) == len(frames) - 2  # all but that one, and the last
    assert said(done, "decide") == ["best"]


def test_fault_18_the_program_is_stopped(clock):
    """By a signal or a hypervisor, which no clock tells: a frame takes half a minute."""

    class Stopped(Net):
        def answer(self, k):
            self.clock.sleep(30.0 * (k == 50))
            return super().answer(k)

    done, frames = go(clock, seeing, camera(horizon_s=40.0), make=Stopped)
    late = frames[~frames["on_time"]]
    assert late["arrival_s"].between(50 * 0.024, 50 * 0.024 + 30.05).all()
    assert said(done, "decide") == ["best"]
    assert set(frames["subnet"].dropna()) == {"large"}  # nothing is held against the unit


@pytest.mark.parametrize("factor", [4.0, 40.0])
def test_fault_18_slower_by_any_amount_is_believed_when_three_frames_agree(clock, factor):
    workload = camera(horizon_s=30.0)
    done, frames = go(clock, managed, workload, lambda t_s: factor if t_s > 3 else 1.0)
    switched = [(e["subnet"], e["t_s"]) for e in events(done.log, "decide")]
    assert [subnet for subnet, _ in switched] == ["large", "small"]
    assert switched[1][1] < 3.5 + 3 * MS["large"] * factor / 1000
    settled = frames[frames["arrival_s"] > 6]
    assert settled["on_time"].all() == (factor < 6)


def test_fault_23_every_frame_is_late_for_a_minute_live(clock):
    def stretch(t_s):
        return 15.0 if 5 < t_s < 65 else 1.0

    done, frames = go(clock, managed, camera(horizon_s=75.0), stretch)
    assert frames[frames["arrival_s"].between(5.1, 64.9)]["on_time"].sum() == 0
    decided = [(round(e["t_s"]), e["subnet"]) for e in events(done.log, "decide")]
    assert decided == [(0, "large"), (6, "small"), (65, "large")]
    assert max(queue_lengths(done.log)) <= (12 + 15 * MS["large"]) / 24 + 1
    assert frames[frames["arrival_s"] > 66]["on_time"].all()


def test_fault_24_no_network_is_fast_enough_live(clock):
    done, frames = go(clock, managed, camera(deadline_ms=1.0))
    assert said(done, "decide") == ["cam late"]
    assert set(frames["subnet"].dropna()) <= {"small"}
    assert set(frames["reason"]) <= {"late", "given up"}


def test_fault_25_a_burst_of_a_hundred_frames_live(clock):
    app = App("cam", "net", 100.0, "trace", trace_ms=(1000.0,) * 100)
    done, frames = go(clock, managed, Workload("burst", 2.0, (app,)))
    assert len(frames) == 100
    assert set(frames["reason"]) <= {"", "late", "deadline passed", "given up"}
    assert 9 <= frames["on_time"].sum() <= len(done.answers) <= frames["on_time"].sum() + 1


def test_fault_25_nothing_ever_arrives(clock):
    app = App("cam", "net", 100.0, "trace")
    workload = Workload("silence", 2.0, (app,))
    done, frames = go(clock, managed, workload)
    assert (len(frames), done.answers, done.problems) == (0, {}, {})
    assert done.overhead_pct >= 0
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES))
    assert summarise(log, workload, NOISY_TABLES, NOISY)["offered"] == 0
    assert {e["power_mw"] for e in events(log, "sample")} == {NOISY.power_mw({}, {})}


class HalfSwitched(Net):
    """Runs out of memory half way to the small network, between `begin` and `end` seconds."""

    begin, end = 0.0, math.inf

    def switch(self, subnet):
        self.subnet = None
        if subnet == "small" and self.begin <= self.clock.t_s - self.begin_s < self.end:
            raise MemoryError("no room")
        super().switch(subnet)


def test_fault_32_a_switch_fails_half_way(clock, caplog):
    done, frames = go(clock, managed, stretch=loaded, make=HalfSwitched)
    assert {e["subnet"] for e in events(done.log, "start")} == {"large"}
    assert set(done.answers.values()) == {"large"}  # configuration and weights agree
    assert len(frames) == len(done.answers) == 250
    assert done.problems == {"app cam, switch to small": "MemoryError('no room')"}
    assert reported(caplog) == ["app cam, switch to small: MemoryError('no room')"]
    failed = [e["subnet"] for e in events(done.log, "decide") if e["reason"] == "switch failed"]
    assert failed == ["large", "large"]  # once in each of the two loads, not at every frame


def test_fault_32_a_switch_fails_once(clock):
    class Once(HalfSwitched):
        end = 3.0

    done, _ = go(clock, managed, stretch=loaded, make=Once)
    assert {done.answers["cam", e["frame"]] == e["subnet"] for e in events(done.log, "start")} == {
        True
    }
    small = [e["t_s"] for e in events(done.log, "start") if e["subnet"] == "small"]
    assert min(small) > 4.0  # not in the first load, but in the second


TWO = (App("cam", "net", 24.0, period_ms=48.0), App("mic", "net", 24.0, period_ms=48.0))


class Dying(Net):
    """The first of two apps to answer dies at its frame 20; the other never does."""

    died = False

    def answer(self, k):
        if k == 20 and not Dying.died:
            Dying.died = True
            raise OSError(errno.EIO, "camera unplugged")
        return super().answer(k)


def test_an_app_that_dies_leaves_the_others_alone(clock, caplog, monkeypatch):
    monkeypatch.setattr(Dying, "died", False)
    done, frames = go(clock, managed, Workload("two", 6.0, TWO), make=Dying)
    (what,) = done.problems
    dead = frames[frames["app"] == what.removeprefix("app ")]
    other = frames[frames["app"] != what.removeprefix("app ")]
    assert other["on_time"].all()
    assert len(dead) == len(other) == 125  # what was asked of it is counted
    assert dead["on_time"].tolist() == [True] * 20 + [False] * 105
    assert dead["reason"].iloc[20] == "app died: OSError(5, 'camera unplugged')"
    assert set(dead["reason"].iloc[21:]) == {"app died"}
    assert reported(caplog) == [f"{what}: OSError(5, 'camera unplugged')"]


def test_an_app_that_never_had_a_network_is_dead(clock):
    class Broken(Net):
        def switch(self, subnet):
            raise MemoryError("no room")

    done, frames = go(clock, fixed("large"), make=Broken)
    assert set(frames["reason"]) == {"app died"}
    assert done.problems["app cam"] == "no network could be switched to"
    assert done.answers == {}


PUSHED = (App("cam", "net", 30.0, "pushed", period_ms=40.0),)


def pushing(live, answers, count=25, start_s=0.01):
    return [
        (start_s + 0.04 * k, lambda k=k: answers.append(live.submit("cam", k)))
        for k in range(count)
    ]


def test_a_pushed_app_that_dies_tells_who_waits(clock):
    answers = []

    class Unplugged(Net):
        def answer(self, k):
            if k == 10:
                raise OSError(errno.EIO, "camera unplugged")
            return super().answer(k)

    done, frames = steered(
        clock, lambda live: [*pushing(live, answers), (1.2, live.stop)], PUSHED, make=Unplugged
    )
    assert [answer.result() for answer in answers[:10]] == ["large"] * 10
    assert isinstance(answers[10].exception(), OSError)
    assert all(answer.cancelled() for answer in answers[11:])
    assert set(frames["reason"].iloc[11:]) == {"app died"}
    assert set(done.problems) == {"app cam"}


def test_a_dead_app_may_join_again(clock):
    answers = []

    class Unplugged(Net):
        def answer(self, k):
            if k == 10:
                raise OSError(errno.EIO, "camera unplugged")
            return super().answer(k)

    def script(live):
        net = Net(clock)

        def plug_in():
            live.remove_app("cam")
            live.add_app(PUSHED[0], Served(net.switch, net.answer))

        return [
            *pushing(live, answers, 15), (0.8, plug_in),
            *pushing(live, answers, 10, 0.9), (1.6, live.stop),
        ]  # fmt: skip

    _, frames = steered(clock, script, PUSHED, make=Unplugged)
    assert [answer.result() for answer in answers[-10:]] == ["large"] * 10
    assert frames["on_time"].tolist() == [True] * 10 + [False] * 5 + [True] * 10


def test_it_is_stopped_in_the_middle_of_a_frame(clock):
    answers, lives = [], []

    class Stopping(Net):
        def answer(self, k):
            if k == 5:
                lives[0].stop()
                answers.append(lives[0].submit("cam", 99))
            return super().answer(k)

    def script(live):
        lives.append(live)
        return pushing(live, answers)

    share = quota()
    with knobbed(share) as knobs:
        done, frames = steered(clock, script, PUSHED, make=Stopping, machine=knobs)
    assert share.value == 200.0
    assert frames["on_time"].tolist() == [True] * 6  # the one that ran was finished
    assert [answer.cancelled() for answer in answers] == [False] * 6 + [True]
    assert done.log.events[-1]["reason"] == "stopped"


def test_an_unknown_app_is_a_declared_error_and_nothing_else_happens(clock):
    answers, errors = [], []

    def script(live):
        def wrong():
            for ask in (lambda: live.submit("cma", 0), lambda: live.remove_app("cma"),
                        lambda: live.set_requirement("cma", deadline_ms=5.0)):  # fmt: skip
                try:
                    ask()
                except WorkloadError as error:
                    errors.append(str(error))

        return [*pushing(live, answers), (0.5, wrong), (1.2, live.stop)]

    done, frames = steered(clock, script, PUSHED)
    assert [error.startswith("no app 'cma'") for error in errors] == [True] * 3
    assert (len(frames), done.problems) == (25, {})
    assert frames["on_time"].all()


def test_ten_thousand_frames_at_once_are_dropped_and_the_next_is_served(clock, monkeypatch):
    """A hundred wait, so that memory and decisions stay small; the others are dropped at once."""
    monkeypatch.setattr("dynlib.runtime.live._KEPT", 100_000)
    answers, waited = [], []

    class Watching(Manager):
        def decide(self, state, limits):
            waited.extend(len(app.waiting) for app in state.apps)
            return super().decide(state, limits)

    def script(live):
        return [
            (0.5, lambda: answers.extend(live.submit("cam", k) for k in range(10_000))),
            *pushing(live, answers, 5, 2.0), (2.5, live.stop),
        ]  # fmt: skip

    _, frames = steered(clock, script, PUSHED, policy=lambda *given: Watching(*given))
    assert len(frames) == len(answers) == 10_005
    assert max(waited) <= 100
    assert all(answer.done() for answer in answers)
    assert set(frames["reason"]) <= {"", "late", "queue full", "deadline passed", "given up"}
    assert frames["on_time"].iloc[-5:].all()


def test_nobody_waits_for_a_run_that_broke(clock):
    answers = []

    class Interrupted(Net):
        def answer(self, k):
            if k == 5:
                answers.append(lives[0].submit("cam", 99))
                raise KeyboardInterrupt
            return super().answer(k)

    lives = []

    def script(live):
        lives.append(live)
        return pushing(live, answers)

    with pytest.raises(KeyboardInterrupt):
        steered(clock, script, PUSHED, make=Interrupted)
    answers.append(lives[0].submit("cam", 100))
    assert [answer.cancelled() for answer in answers] == [False] * 5 + [True] * 3


def test_what_was_asked_for_before_the_start_comes_at_the_start(clock):
    answers = []

    def script(live):
        answers.append(live.submit("cam", 0))
        clock.sleep(3.0)
        return [(0.5, live.stop)]

    _, frames = steered(clock, script, PUSHED)
    assert answers[0].result() == "large"
    assert frames["arrival_s"].tolist() == pytest.approx([0.0], abs=1e-4)
