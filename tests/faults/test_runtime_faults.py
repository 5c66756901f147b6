"""Faults of manager, simulator and live loop: one test id per row of the fault list.

A row that is tested where its subject is tested is not written again: it stands in `ELSEWHERE`.
Tables, checkpoints and logs are in `test_file_faults.py`.
"""

import ast
import errno
import logging
import math
import os
from itertools import pairwise
from pathlib import Path

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
    turned,
)
from runtime_cases import NOISY, NOISY_TABLES, events, periodic

from dynlib.hardware.board import load_board
from dynlib.hardware.control import Sensor
from dynlib.points import DecisionLog
from dynlib.runtime import (
    App,
    Change,
    Manager,
    Workload,
    frames_of,
    published_tables,
    run,
    summarise,
)

pytestmark = pytest.mark.faults
TESTS = Path(__file__).parents[1]
ROWS = {*range(5, 10), *range(15, 29), *range(31, 35)}
ELSEWHERE = {
    8: ["test_engine.py::test_a_policy_cannot_ask_for_what_is_not_there"],
    16: ["test_conditions.py::test_frames_on_a_lost_unit_start_again_elsewhere"],
    19: ["faults/test_board_faults.py::test_fault_19_impossible_latency",
         "test_manager.py::test_bad_measurements_leave_the_estimate_alone"],
    20: ["faults/test_board_faults.py::test_fault_20_counter_wraps",
         "faults/test_board_faults.py::test_fault_20_wrap_of_unknown_range_or_reset"],
    21: ["faults/test_board_faults.py::test_fault_21_two_wraps"],
    23: ["test_manager.py::test_a_deadline_storm_does_not_make_it_oscillate"],
    24: ["test_manager.py::test_infeasible_demands_fall_back_to_the_fastest_point_at_the_highest_"
         "clock", "test_conditions.py::test_what_cannot_be_met_is_given_up_in_the_declared_order",
         "test_manager.py::test_any_demand_gets_an_answer"],
    28: ["test_supernet.py::test_a_bad_checkpoint_is_refused_before_a_weight_is_touched",
         "test_training.py::test_a_foreign_or_broken_state_is_refused"],
    31: ["faults/test_board_faults.py::test_fault_31_journal_cut"],
    32: ["test_serve.py::test_a_refused_switch_leaves_the_old_network_serving"],
    33: ["test_serve.py::test_a_switch_in_flight_never_mixes_two_configurations"],
    34: ["test_serve.py::test_a_refused_switch_leaves_the_old_network_serving",
         "test_supernet.py::test_missing_statistics_and_foreign_configurations_are_refused"],
}  # fmt: skip


def names(file):
    body = ast.parse((TESTS / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_test_that_exists():
    files = (f"faults/{file.name}" for file in Path(__file__).parent.glob("test_*.py"))
    here = {int(n.split("_")[2]) for n in set.union(*map(names, files)) if "_fault_" in n}
    assert here | ELSEWHERE.keys() >= ROWS
    for place in (place for places in ELSEWHERE.values() for place in places):
        file, _, name = place.partition("::")
        assert name in names(file), place


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
    assert frames["on_time"].sum() >= len(frames) - 2
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
    assert frames["on_time"].sum() >= len(frames) - 2


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize("times", [2, 10**6])
def test_fault_06_a_knob_fails_while_frames_are_served(clock, caplog, number, times):
    share = quota(error=OSError(number, os.strerror(number)), after=1, times=times)
    with knobbed(share) as knobs:
        done, frames = go(clock, managed, stretch=loaded, knobs=knobs)
    assert frames["on_time"].sum() >= len(frames) - 2
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
    assert (event["quota"], event["reason"]) == (50, "asked for 83, in force is 50")
    assert frames["on_time"].all()


def test_fault_07_a_clock_is_clamped():
    workload = periodic(45.0, horizon_s=3.0, changes=[Change(1.0, unit="gpu", cap_mhz=500.0)])
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES, objective="accuracy"))
    late = [e for e in log if e["t_s"] >= 1.0]
    assert {e["gpu_mhz"] for e in late if e["event"] == "set"} <= {250.0, 500.0}
    # Frames under the cap take as long as the table's rows of that clock say, not the faster ones.
    slow = [e for e in late if e["event"] == "finish" and e["t_s"] > 1.1]
    for event in slow:
        expected = NOISY_TABLES["net"].point(event["subnet"], "gpu").latency_ms[1]
        assert event["latency_ms"] > 0.85 * expected


def test_fault_08_a_number_of_threads_that_the_knob_has_not(clock, caplog):
    with knobbed(FakeKnob("threads", (2, 4)), quota()) as knobs:
        done, frames = go(clock, managed, stretch=loaded, knobs=knobs)
    (event, *_) = events(done.log, "set")
    assert event["cores"] == 4  # in force all the while
    assert "process.threads: 1; expected one of (2, 4)" in done.problems["threads"]
    assert len([m for m in reported(caplog) if m.startswith("threads")]) == 1
    assert frames["on_time"].sum() >= len(frames) - 2


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
    assert said(done, "decide") == ["apps", "policy failed: ZeroDivisionError('a bug')"]
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
    assert frames["on_time"].sum() >= len(frames) - 2


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
    assert frames["on_time"].sum() >= len(frames) - 2
    again = DecisionLog.read(done.log.write(memory / "log.jsonl"))  # nobody knows the value
    assert again.events == done.log.events


def test_fault_16_every_unit_is_lost_for_a_while():
    changes = [Change(t, unit=name, lost=t == 1.0) for t in (1.0, 2.0) for name in ("gpu", "cpu")]
    workload = periodic(100.0, horizon_s=4.0, changes=changes)
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES))
    frames = frames_of(log, workload, NOISY_TABLES)
    missed = frames[~frames["on_time"]]
    assert missed["arrival_s"].between(0.9, 2.0).all()
    assert 9 <= len(missed) <= 11
    reasons = [e["reason"] for e in events(log, "decide")]
    assert reasons == ["apps", "infeasible: app late", "saves"]


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
    assert len(seeing.policy.seen) == len(frames) - 1  # all but that one
    assert said(done, "decide") == ["apps"]


def test_fault_18_the_program_is_stopped(clock):
    """By a signal or a hypervisor, which no clock tells: a frame takes half a minute."""

    class Stopped(Net):
        def answer(self, k):
            self.clock.sleep(30.0 * (k == 50))
            return super().answer(k)

    done, frames = go(clock, seeing, camera(horizon_s=40.0), make=Stopped)
    late = frames[~frames["on_time"]]
    assert late["arrival_s"].between(50 * 0.024, 50 * 0.024 + 30.05).all()
    assert said(done, "decide") == ["apps"]
    assert seeing.policy.last.memory.slowdowns["cpu-1"].used < 1.1


def test_fault_18_slower_by_any_amount_is_believed_when_two_frames_agree(clock):
    done, _ = go(clock, seeing, camera(horizon_s=30.0), lambda t_s: 40.0 if t_s > 3 else 1.0)
    assert seeing.policy.last.memory.slowdowns["cpu-1"].mean == pytest.approx(40, rel=0.1)
    assert said(done, "decide") == ["apps", "infeasible: cam late"]


def test_fault_22_thermal_ramp():
    on = load_board("jetson-xavier-nx")
    points, freqs = published_tables(on), on.gpu.freqs
    ramp = [*freqs[-2:3:-1], *freqs[4:]]
    changes = [Change(2 + i, unit="gpu", cap_mhz=mhz) for i, mhz in enumerate(ramp)]
    app = App("app", "ofa-mbv3-w1.2", 110.0, period_ms=110.0)
    workload = Workload("ramp", 30.0, (app,), tuple(changes))
    log = run(workload, on, points, Manager(on, points, objective="accuracy"), 300)
    assert summarise(log, workload, points, on)["deadline_miss_pct"] <= 1.0
    caps = [(0.0, freqs[-1]), *((c.t_s, c.cap_mhz) for c in changes)]
    for event in (e for e in events(log, "set") if e["unit"] == "gpu"):
        assert event["gpu_mhz"] <= [mhz for t_s, mhz in caps if t_s <= event["t_s"]][-1]
    steps = [(e["t_s"], int(e["subnet"][-1])) for e in events(log, "decide")]
    hottest = 2 + len(freqs[-2:3:-1])
    down = [level for t_s, level in steps if t_s < hottest]
    up = [level for t_s, level in steps if t_s >= hottest]
    assert len(down) > 1
    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert all(b - a >= 0.5 for (a, _), (b, _) in pairwise(steps))


def queue_lengths(log):
    """Frames that wait after each event."""
    step, waiting, lengths, started = {"arrive": 1, "start": -1, "drop": -1}, 0, [], set()
    for event in log:
        frame = event.get("app"), event.get("frame")
        if event["event"] == "drop" and frame in started:
            continue
        started |= {frame} if event["event"] == "start" else set()
        waiting += step.get(event["event"], 0)
        lengths.append(waiting)
    return lengths


def test_fault_23_every_frame_is_late_for_a_minute():
    storm = [Change(5.0, unit=u, stretch=8.0) for u in ("gpu", "cpu")]
    calm = [Change(65.0, unit=u, stretch=1.0) for u in ("gpu", "cpu")]
    workload = periodic(25.0, deadline_ms=60.0, horizon_s=75.0, changes=[*storm, *calm])
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES, objective="accuracy"), 3)
    decided = [(e["t_s"], e["subnet"], e["unit"]) for e in events(log, "decide")]
    assert len([d for d in decided if d[0] >= 5]) <= 4  # into the storm, and out of it
    assert not [d for d in decided if 6 < d[0] < 65]  # it has settled
    served = [e for e in events(log, "start") if 6 < e["t_s"] < 65]
    assert {(e["subnet"], e["unit"]) for e in served} == {("small", "gpu")}
    asked = [e["gpu_mhz"] for e in events(log, "set") if 6 < e["t_s"] < 65 and e["unit"] == "gpu"]
    assert set(asked) <= {1000.0}
    assert max(queue_lengths(log)) <= (60 + 8 * 20) / 25 + 1  # what comes while one runs
    frames = frames_of(log, workload, NOISY_TABLES)
    assert frames[frames["arrival_s"] > 66]["on_time"].all()


def test_fault_23_every_frame_is_late_for_a_minute_live(clock):
    def stretch(t_s):
        return 15.0 if 5 < t_s < 65 else 1.0

    done, frames = go(clock, managed, camera(horizon_s=75.0), stretch)
    assert frames[frames["arrival_s"].between(5.1, 64.9)]["on_time"].sum() == 0
    decided = [(round(e["t_s"]), e["subnet"]) for e in events(done.log, "decide")]
    assert decided == [(0, "large"), (5, "small"), (65, "large")]
    assert max(queue_lengths(done.log)) <= (12 + 15 * MS["large"]) / 24 + 1
    assert frames[frames["arrival_s"] > 66]["on_time"].all()


def test_fault_24_no_network_is_fast_enough_live(clock):
    done, frames = go(clock, managed, camera(deadline_ms=1.0))
    assert said(done, "decide") == ["infeasible: cam late"]
    assert set(frames["subnet"]) == {"small"}
    assert set(frames["reason"]) == {"late"}


def test_fault_25_a_burst_of_a_hundred_frames():
    app = App("app", "net", 200.0, "trace", trace_ms=(1000.0,) * 100)
    workload = Workload("burst", 3.0, (app,))
    log = run(workload, NOISY, NOISY_TABLES, Manager(NOISY, NOISY_TABLES))
    summary = summarise(log, workload, NOISY_TABLES, NOISY)
    assert summary["offered"] == 100 == summary["on_time"] + summary["dropped"] + summary["late"]
    assert summary["on_time"] >= 16  # of at most 20 that fit
    assert events(log, "sample")[-1]["power_mw"] == NOISY.power_mw({}, {})


def test_fault_25_a_burst_of_a_hundred_frames_live(clock):
    app = App("cam", "net", 100.0, "trace", trace_ms=(1000.0,) * 100)
    done, frames = go(clock, managed, Workload("burst", 2.0, (app,)))
    assert len(frames) == 100
    assert set(frames["reason"]) <= {"", "late", "deadline passed"}
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
