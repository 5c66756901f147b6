"""Who runs next, and the kernel that serves a million requests."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import runtime_cases as rc
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import SPACE, calibrated

from dynlib._vision import timm
from dynlib.errors import DataError, PolicyError, ProfileError, WorkloadError
from dynlib.manager.policy import Placement
from dynlib.nets.chain import chain
from dynlib.points import PointTable, make_table
from dynlib.runtime.case import Case
from dynlib.runtime.drain import Offered, Profile, Request, Trace, drain, ladder, rows
from dynlib.runtime.rivals import Static
from dynlib.runtime.schedulers import Fcfs, Index, Ordered, Scheduler, Strict, in_time
from dynlib.workload import App, Workload
from suite.papers import dysta as paper
from suite.papers.dysta import Dysta
from suite.studies import schedule
from suite.studies import schedule_energy as energy
from suite.studies import schedule_live as live

SCHEDULERS = [
    Fcfs(), Dysta(), Dysta(0.0), Dysta(0.5), Dysta(2.0), Index(), Index(0.0), Index(2.8, 1.7),
    Index(old=30.0), Index(switch_ms=1.0), Strict(), paper.Prema(), paper.Planaria(), paper.Sdrm3(),
]  # fmt: skip
NAMED = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=repr)


def traces(seed=0, segments=(4, 1, 9), inputs=6):
    """Networks whose inputs differ by up to three times, and whose density tells something."""
    rng = np.random.default_rng(seed)
    found = {}
    for i, count in enumerate(segments):
        density = rng.uniform(0.2, 0.6, (inputs, 1)) * rng.uniform(0.8, 1.2, (inputs, count))
        ms = 20 * (i + 1) * density * rng.uniform(0.9, 1.1, (inputs, count))
        found[f"net{i}"] = Trace(f"net{i}", ms, density)
    return found


def offered(found, count=200, gap_ms=60.0, seed=0, slo=5.0):
    rng = np.random.default_rng(seed)
    model = [list(found)[i] for i in rng.integers(len(found), size=count)]
    return Offered(
        rng.exponential(gap_ms, count).cumsum(), model,
        [int(rng.integers(len(found[name].ms))) for name in model],
        [slo * Profile(found[name]).mean_ms for name in model], rng.choice([1, 3, 9], count),
    )  # fmt: skip


def known(found, estimate="time"):
    return {name: rows(trace, Profile(trace), estimate) for name, trace in found.items()}


# The kernel.


@NAMED
@pytest.mark.parametrize("estimate", ["time", "density", "exact"])
@pytest.mark.parametrize("gap_ms", [35.0, 60.0])
def test_asking_less_often_changes_nothing(scheduler, estimate, gap_ms):
    found = traces()
    for seed in range(3):
        asked = offered(found, gap_ms=gap_ms, seed=seed)
        options = {"switch_ms": scheduler.switch_ms if isinstance(scheduler, Index) else 0.0}
        fast, slow = (
            drain(asked.requests(known(found, estimate)), scheduler, ask_always=always, **options)
            for always in (False, True)
        )
        assert (fast.finish_ms == slow.finish_ms).all()
        assert fast.switches == slow.switches


def plain_loop(asked, found, scheduler, estimate):
    """The rules of the kernel, as short as they can be said."""
    requests = list(asked.requests(known(found, estimate)))
    now_ms, finish_ms = 0.0, {}
    while len(finish_ms) < len(requests):
        ready = [r for r in requests if r.arrival_ms <= now_ms and r.frame not in finish_ms]
        if not ready:
            now_ms = min(r.arrival_ms for r in requests if r.frame not in finish_ms)
            continue
        job = scheduler.choose(ready, now_ms)
        now_ms += found[job.row.model].ms[asked.sample[job.frame]][job.segment]
        job.segment, job.idle_since_ms = job.segment + 1, now_ms
        job.left_ms, job.size_ms = job.row.left_ms[job.segment], job.row.size_ms[job.segment]
        if job.segment == len(job.row.step_ms):
            finish_ms[job.frame] = now_ms
    return [finish_ms[frame] for frame in range(len(requests))]


@NAMED
def test_the_kernel_does_what_a_plain_loop_does(scheduler):
    found = traces(1)
    asked = offered(found, 80, gap_ms=45.0)
    ours = drain(asked.requests(known(found, "density")), scheduler).finish_ms
    assert ours == pytest.approx(plain_loop(asked, found, scheduler, "density"), abs=1e-8)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_a_kernel_must_keep(data):
    found = traces(data.draw(st.integers(0, 9)))
    gap_ms = data.draw(st.floats(20, 90))
    scheduler = data.draw(st.sampled_from(SCHEDULERS))
    asked = offered(found, 30, gap_ms, data.draw(st.integers(0, 99)))
    trail = []
    done = drain(asked.requests(known(found)), scheduler, trail=trail)
    alone = [found[m].ms[s].sum() for m, s in zip(asked.model, asked.sample, strict=True)]
    # Nobody is served before it came or faster than alone, and one after the other.
    assert (done.finish_ms >= asked.arrival_ms + np.array(alone) - 1e-9).all()
    assert all(b[1] >= a[2] - 1e-9 for a, b in itertools.pairwise(trail))
    assert sum(end - begin for _, begin, end, *_ in trail) == pytest.approx(sum(alone))
    # Work is conserved: the device falls idle at the same times whoever chooses.
    fcfs = drain(asked.requests(known(found)), Fcfs())
    assert done.finish_ms.max() == pytest.approx(fcfs.finish_ms.max())
    for frame in range(30):
        parts = [(first, stop) for k, *_, first, stop in trail if k == frame]
        assert [p[0] for p in parts] == [0, *(p[1] for p in parts[:-1])]


def test_fcfs_is_lindleys_recursion():
    found = traces()
    asked = offered(found, 500)
    alone = np.array([found[m].ms[s].sum() for m, s in zip(asked.model, asked.sample, strict=True)])
    finish_ms = drain(asked.requests(known(found)), Fcfs()).finish_ms
    before = alone.cumsum() - alone
    expected = alone.cumsum() + np.maximum.accumulate(asked.arrival_ms - before)
    assert finish_ms == pytest.approx(expected)


def test_a_switch_costs_when_an_unfinished_request_gives_way():
    short, long = Trace("short", [[1.0]]), Trace("long", [[4.0, 4.0]])
    found = {"short": short, "long": long}
    asked = Offered([0.0, 1.0], ["long", "short"], [0, 0], [100.0, 100.0], [1, 1])
    done = drain(asked.requests(known(found)), Dysta(0.0), switch_ms=0.5)
    # The short one displaces the long one after 4 ms; going back to it costs nothing.
    assert done.finish_ms.tolist() == [9.5, 5.5]
    assert done.switches == 1


def test_the_clock_of_the_public_simulator_goes_back():
    found = {"net": Trace("net", [[4.0]])}
    asked = Offered([0.0, 1.0], ["net"] * 2, [0, 0], [100.0] * 2, [1, 1])
    assert drain(asked.requests(known(found)), Fcfs()).finish_ms.tolist() == [4.0, 8.0]
    assert drain(asked.requests(known(found)), Fcfs(), rewind=True).finish_ms.tolist() == [4.0, 5.0]


# What is estimated.


@pytest.mark.parametrize("estimate", ["profile", "density", "time"])
def test_an_estimate_knows_nothing_of_what_is_to_come(estimate):
    trace = traces()["net0"]
    profile = Profile(trace)
    ms, density = trace.ms.copy(), trace.density.copy()
    ms[:, 2:] *= 3
    density[:, 2:] /= 2
    before = rows(trace, profile, estimate)
    after = rows(Trace("net0", ms, density), profile, estimate)
    for one, other in zip(before, after, strict=True):
        assert one.left_ms[:3] == other.left_ms[:3]


def test_the_better_informed_estimate_is_closer():
    trace = paper.traces("attnn")["load_balance_gpt2_glue_128"]
    profile = Profile(trace)
    left = trace.ms.sum(1, keepdims=True) - trace.ms.cumsum(1)
    errors = {}
    for estimate in ("profile", "density", "time", "exact"):
        seen = np.array([row.left_ms[1:] for row in rows(trace, profile, estimate)])
        errors[estimate] = float(np.sqrt(np.mean((seen - left)[:, :-1] ** 2)))
    assert errors["exact"] < 1e-9
    assert errors["time"] < errors["density"] < errors["profile"]


# The schedulers.


def request(frame, left_ms, deadline_ms, size_ms=None, **more):
    row = rows(Trace("net", [[left_ms]]), Profile(Trace("net", [[left_ms]])), "exact")[0]
    made = Request(frame, 0.0, deadline_ms, 1, row)
    made.size_ms = size_ms or left_ms
    for key, value in more.items():
        setattr(made, key, value)
    return made


def test_dysta_without_beta_is_the_shortest_remaining_time():
    ready = [request(0, 5.0, 9.0), request(1, 3.0, 90.0), request(2, 4.0, 5.0)]
    assert Dysta(0.0).choose(ready, 0.0).frame == 1
    assert Dysta(0.0).choose(ready[::2], 0.0).frame == 2
    assert Dysta(1.0).choose(ready, 0.0).frame == 2  # 5 + 4, 3 + 87, 4 + 1


def test_the_index_weighs_size_and_remaining_time_and_what_a_miss_costs():
    half_done, short = request(0, 6.0, 1000.0, size_ms=12.0), request(1, 8.0, 1000.0)
    assert Index().choose([half_done, short], 0.0).frame == 1  # 6 * 12 > 8 * 8
    urgent = request(2, 10.0, 10.5)
    assert Index(dear=0.0).choose([short, urgent], 0.0).frame == 1
    assert Index(dear=1.0).choose([short, urgent], 0.0).frame == 2
    assert Index(dear=1.0).choose([short, urgent], 1.0).frame == 1  # too late for it


def test_what_is_about_to_run_on_is_not_charged_for_a_switch():
    running, other = request(0, 5.0, 1e9, size_ms=10.0), request(1, 7.0, 1e9)
    running.segment, running.idle_since_ms = 1, 3.0
    assert Index(0.0).choose([running, other], 3.0).frame == 1
    assert Index(0.0, switch_ms=1.0).choose([running, other], 3.0).frame == 0


def test_the_old_come_first_in_the_end():
    late, fresh = request(0, 30.0, 100.0, mean_ms=10.0), request(1, 10.0, 300.0)
    assert Index(old=30.0).choose([late, fresh], 200.0).frame == 1
    assert Index(old=30.0).choose([late, fresh], 600.0).frame == 0
    assert Index().choose([late, fresh], 600.0).frame == 1


def most_in_time(lefts, dues):
    """By trying all subsets in order of their deadlines."""
    order = sorted(range(len(lefts)), key=lambda i: dues[i])
    best = 0
    for chosen in itertools.product((0, 1), repeat=len(order)):
        picked = [i for i, take in zip(order, chosen, strict=True) if take]
        sums = itertools.accumulate(lefts[i] for i in picked)
        if all(t <= dues[i] for t, i in zip(sums, picked, strict=True)):
            best = max(best, len(picked))
    return best


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=8))
def test_as_many_as_possible_are_in_time(pairs):
    ready = [request(i, float(ms), float(due)) for i, (ms, due) in enumerate(pairs)]
    order = sorted(ready, key=lambda r: r.deadline_at_ms)
    assert len(in_time(order, 0.0)) == most_in_time(*zip(*pairs, strict=True))


def test_strict_makes_nobody_late():
    tight, short = request(0, 10.0, 14.0), request(1, 5.0, 100.0)
    assert Index(0.0).choose([tight, short], 0.0).frame == 1
    assert Strict(0.0).choose([tight, short], 0.0).frame == 0
    assert Strict(0.0).choose([tight, request(1, 4.0, 100.0)], 0.0).frame == 1
    assert Strict(0.5).choose([tight, request(1, 4.0, 100.0)], 0.0).frame == 0


def test_under_load_requests_start_at_a_cheaper_level():
    trace = Trace("net", [[10.0, 10.0]])
    full, half = (rows(trace, Profile(trace), scale=scale) for scale in (1.0, 0.5))
    asked = Offered([0.0] * 4, ["net"] * 4, [0] * 4, [1000.0] * 4, [1] * 4)
    done = drain(asked.requests({"net": ladder(full, half)}), Index(backlog=2.0))
    # Four wait, which is more than two: the first two take half the time.
    assert sorted(done.level) == [0, 0, 1, 1]
    assert sorted(done.finish_ms) == [10.0, 20.0, 40.0, 60.0]


# Compatible with the public simulator.


def test_finish_times_are_those_of_the_public_simulator():
    errors = paper.compat_error_s()
    assert len(errors) == 8
    assert errors.max() < 1e-6


@pytest.mark.parametrize(("run", "count"), [("att30", 9), ("cnn3", 9), ("attb10.0", 1)])
def test_rows_of_the_public_simulator(run, count):
    job = paper.reference_jobs([run])[0]
    found = paper.reproduce(*job)
    assert [row["equal"] for row in found].count(True) == count
    others = {row["scheduler"] for row in found if row["equal"] is None}
    assert others == ({"SDRM3_Scheduler+sparse", "PREMA_Scheduler+sparse"} if count > 1 else set())


# In the loop of the house.


def house(found, asked, scheduler, changed=None, **options):
    """The same requests on a simulated board: an app a network."""
    unit = replace(rc.unit(), stall_ms=0.0, settle_ms=0.0)
    board = rc.board(unit)
    placed = {name: Placement("large", "gpu") for name in found}
    apps, takes = [], {}
    for name in found:
        mine = [i for i, model in enumerate(asked.model) if model == name]
        inputs = [asked.sample[i] for i in mine]
        takes[name] = Trace(name, found[name].ms[inputs], found[name].density[inputs])
        arrivals = tuple(float(asked.arrival_ms[i]) for i in mine)
        apps.append(App(name, name, float(asked.deadline_ms[mine[0]]), "trace", trace_ms=arrivals))
    table = make_table([
        {"model": name, "subnet": "large", "board": board.name, "unit": "gpu", "batch": 1,
         "gpu_mhz": mhz, "accuracy_val_pct": 80.0, "latency_ms": 1e3 * takes[name].mean_ms / mhz,
         "source": "simulated"}
        for name in found for mhz in unit.freqs
    ])  # fmt: skip
    horizon_s = float(asked.arrival_ms[-1]) / 1000 + 30.0
    tables = PointTable.of_models(table, board)
    case = Case(Workload("queue", horizon_s, tuple(apps)), board, tables)
    base = Static("base", placed, {"gpu": 1000.0})
    profiles = {name: Profile(trace) for name, trace in found.items()}
    policy = Ordered(base, scheduler, profiles, **(changed or {}))
    return case.simulate(policy, traces=takes, switch_ms=0.0, **options)


def by_arrival(run):
    frames = run.frames().sort_values("arrival_s")
    return frames["finish_s"].to_numpy() * 1000


@pytest.mark.parametrize("scheduler", SCHEDULERS[:-3], ids=repr)
@pytest.mark.parametrize("estimate", ["time", "density"])
def test_the_kernel_finishes_when_the_engine_does(scheduler, estimate):
    found = traces(2, inputs=99)  # no two alike, whose order rounding would decide
    asked = offered(found, 60, gap_ms=50.0)
    ours = drain(asked.requests(known(found, estimate)), scheduler).finish_ms
    run = house(found, asked, scheduler, {"by_density": estimate == "density"})
    assert by_arrival(run) == pytest.approx(ours, abs=1e-6)


def test_the_engine_charges_a_switch_as_the_kernel_does():
    found, scheduler = traces(2, inputs=99), Index(switch_ms=1.0)
    asked = offered(found, 60, gap_ms=50.0)
    ours = drain(asked.requests(known(found, "density")), scheduler, switch_ms=1.0)
    # By density: the time that a frame has taken would have the switches in it.
    run = house(found, asked, scheduler, {"by_density": True}, displace_ms=1.0)
    assert ours.switches > 5
    assert by_arrival(run) == pytest.approx(ours.finish_ms, abs=1e-6)


def test_whole_milliseconds_come_out_the_same_bit_for_bit():
    rng = np.random.default_rng(0)
    found = {
        f"net{i}": Trace(f"net{i}", rng.integers(1, 40, (5, 4)).astype(float)) for i in range(3)
    }
    asked = offered(found, 80, gap_ms=70.0)
    asked = asked._replace(arrival_ms=np.round(asked.arrival_ms / 8) * 8)
    run = house(found, asked, Fcfs())
    ours = drain(asked.requests(known(found)), Fcfs()).finish_ms
    # At one time the engine takes apps in turn, the kernel requests: compare those that differ.
    apart = np.diff(asked.arrival_ms, prepend=-1.0) > 0
    apart[:-1] &= apart[1:]
    assert (np.round(by_arrival(run)[apart], 9) == ours[apart]).all()


def test_late_frames_go_wait_or_come_last():
    found = {"net": Trace("net", [[8.0]])}
    asked = Offered([0.0, 1.0, 2.0, 17.0], ["net"] * 4, [0] * 4, [10.0] * 4, [1] * 4)

    def finished(late):
        return by_arrival(house(found, asked, Fcfs(), {"late": late}))

    assert finished("keep").tolist() == pytest.approx([8, 16, 24, 32])
    assert finished("last")[[0, 1, 3]].tolist() == pytest.approx([8, 16, 32])
    kept = finished("drop")
    assert np.isnan(kept[2])
    assert kept[[0, 1, 3]].tolist() == pytest.approx([8, 16, 25])


LOADGEN = [
    {"arrival": "single-stream"}, {"arrival": "multi-stream", "frames": 3},
    {"arrival": "server", "period_ms": 120.0}, {"arrival": "offline", "frames": 12},
    {"arrival": "periodic", "period_ms": 120.0},
]  # fmt: skip


@pytest.mark.parametrize("arrival", LOADGEN, ids=lambda more: more["arrival"])
@pytest.mark.parametrize("scheduler", [Index(), Strict(), Dysta()], ids=repr)
def test_however_frames_arrive_each_runs_once_and_one_after_the_other(arrival, scheduler):
    found = traces(2)
    case = house(found, offered(found, 20), Fcfs()).case
    apps = tuple(replace(app, trace_ms=(), **arrival) for app in case.workload.apps)
    case = replace(case, workload=Workload("loadgen", 2.0, apps))
    base = Static("base", {n: Placement("large", "gpu") for n in found}, {"gpu": 1000.0})
    policy = Ordered(base, scheduler, {n: Profile(t) for n, t in found.items()})
    frames = case.simulate(policy, traces=found, switch_ms=0.0).frames().dropna(subset="finish_s")
    assert len(frames) > 5
    assert not frames.duplicated(["app", "frame"]).any()
    finish_s = frames["finish_s"].sort_values().to_numpy()
    # Half of it, since the table's times are the means of other inputs.
    alone_s = min(trace.ms.sum(1).min() for trace in found.values()) / 2000
    assert (frames["finish_s"] - frames["arrival_s"] >= alone_s - 1e-9).all()
    assert len(finish_s) * alone_s <= finish_s[-1]


# Bad input.


def test_bad_traces_are_named():
    for ms, density, text in (
        ([], None, "expected the same"),
        ([[1.0, -1.0]], None, "input 0, segment 1, ms: got -1.0"),
        ([[1.0], [math.inf]], None, "input 1, segment 0, ms"),
        ([[1.0]], [[math.nan]], "density: got nan"),
        ([[1.0]], [[1.0, 1.0]], "expected the same"),
    ):
        with pytest.raises(ProfileError, match=f"(?s)trace 'net'.*{text}"):
            Trace("net", ms, density)
    one, two = Trace("one", [[1.0]]), Trace("two", [[1.0, 2.0]])
    with pytest.raises(ProfileError, match="1 segments, its profile 2"):
        rows(one, Profile(two))
    with pytest.raises(ProfileError, match="unknown estimate 'densty'; did you mean density"):
        rows(one, Profile(one), "densty")


@pytest.mark.parametrize(("changed", "text"), [
    ({"arrival_ms": [0.0, -1.0]}, "request 1, arrival_ms: got -1.0, expected a time >= 0"),
    ({"arrival_ms": [0.0, math.nan]}, "request 1, arrival_ms: got nan"),
    ({"arrival_ms": [2.0, 1.0]}, "request 1, arrival_ms: got 1.0, expected times in ascending"),
    ({"deadline_ms": [5.0, -3.0]}, "request 1, deadline_ms: got -3.0, expected a deadline after"),
    ({"model": ["net", "nett"]}, "request 1: no model 'nett'; did you mean net"),
    ({"sample": [0, 7]}, "request 1, sample: got 7"),
    ({"arrival_ms": []}, "no requests"),
])  # fmt: skip
def test_bad_requests_are_named(changed, text):
    good = Offered([0.0, 1.0], ["net"] * 2, [0, 0], [5.0] * 2, [1, 1])
    with pytest.raises(WorkloadError, match=text):
        good._replace(**changed).requests({"net": rows(*[t := Trace("net", [[1.0]])], Profile(t))})


class Wrong(Scheduler):
    name = "wrong"

    def __init__(self, answer):
        self.answer = answer

    def choose(self, ready, now_ms):
        return ready[0] if now_ms < 500 else self.answer


@pytest.mark.parametrize("answer", [None, "net0", request(7, 1.0, 2.0)])
def test_a_scheduler_that_answers_nonsense_is_named_and_the_log_is_there(answer):
    found = traces()
    asked = offered(found, 40)
    with pytest.raises(PolicyError, match=r"wrong: chose .* expected one of the"):
        drain(asked.requests(known(found)), Wrong(answer))
    with pytest.raises(PolicyError, match="wrong: chose") as caught:
        house(found, asked, Wrong(answer))
    finished = [e for e in caught.value.log if e["event"] == "finish"]
    assert finished
    assert all(e["t_s"] < 1 for e in finished)


def test_an_app_without_a_profile_and_an_unknown_trace_are_named():
    found = traces()
    case = house(found, offered(found, 10), Fcfs()).case
    base = Static("base", {name: Placement("large", "gpu") for name in found})
    with pytest.raises(PolicyError, match="no profile for app 'net"):
        case.simulate(Ordered(base, Fcfs(), {}))
    with pytest.raises(WorkloadError, match="trace of app 'nett': no such app"):
        case.simulate(base, traces={"nett": found["net0"]})
    with pytest.raises(PolicyError, match="late 'never'"):
        case.simulate(Ordered(base, Fcfs(), {}, late="never"))


# The studies of the notebook.


def most_kept(arrivals, dues, works):
    """The most requests that preemptive EDF, which is optimal, brings home in time, by trying."""
    best = 0
    for chosen in itertools.product((0, 1), repeat=len(works)):
        left = {i: w for i, w in enumerate(works) if chosen[i]}
        for t in range(max(dues)):
            there = [i for i in left if arrivals[i] <= t and left[i] > 0]
            if there:
                left[min(there, key=lambda i: dues[i])] -= 1
            if any(left[i] > 0 and dues[i] <= t + 1 for i in left):
                break
        else:
            best = max(best, sum(chosen))
    return best


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(0, 6)), min_size=1,
                max_size=6))  # fmt: skip
def test_the_optimum_misses_as_few_as_possible(requests):
    requests = sorted(requests)
    arrivals = [a for a, _, _ in requests]
    works = [w for _, w, _ in requests]
    dues = [a + w + slack for a, w, slack in requests]
    fewest = schedule.fewest_late(arrivals, dues, works)
    assert fewest == len(works) - most_kept(arrivals, dues, works)


def test_no_scheduler_misses_less_than_the_optimum():
    row = schedule.late_against_optimum("attnn", 40.0, 300, 0)[0]
    assert 0 < row["optimum_pct"] <= row["strict_pct"]


def test_the_plain_loop_of_the_paper_is_as_slow_as_it_is_right():
    for workload in paper.WORKLOADS:
        micros = schedule.speed(workload, 300, repeats=1)  # raises where times differ
        assert set(micros) == {"plain", "always", "kernel"}


def test_cheaper_levels_cost_accuracy():
    assert schedule.DROP_PP[0] == 0
    assert list(schedule.DROP_PP) == sorted(schedule.DROP_PP)
    # 0.6 of 4.1 billion MACs cost the published 4.8 points.
    per_log = schedule.DROP_PP[1] / -np.log(schedule.LADDER[1])
    assert per_log * np.log(4.1 / 0.6) == pytest.approx(79.8 - 75.0)


def test_the_variants_are_compared_on_the_same_requests():
    found = schedule.compare_schedulers("cnn", 3.0, 60, 0, list(schedule.VARIANTS))
    assert [row["scheduler"] for row in found] == list(schedule.VARIANTS)
    by = {row["scheduler"]: row for row in found}
    assert by["static 0.8"]["drop_pp"] == pytest.approx(schedule.DROP_PP[1])
    assert by["balanced"]["drop_pp"] == 0
    assert by["clairvoyant"]["antt"] <= by["FCFS"]["antt"]


def test_no_policy_takes_less_energy_than_the_least():
    for row in energy.energy_rows("attnn", 30.0, 25, 0, "jetson-xavier-nx"):
        assert row["over_optimum"] >= 1 - 1e-6
        assert row["energy_mj"] > 0


def test_the_least_energy_of_one_request_by_hand():
    unit = rc.unit()  # 250, 500 MHz at 500 mV, 1000 MHz at 1000 mV
    offered = Offered([0.0], ["net"], [0], [20.0], [1])
    bench = paper.Benchmark("attnn", offered, np.array([10.0]))
    within = lambda ms: bench._replace(offered=offered._replace(deadline_ms=[ms]))  # noqa: E731
    least = lambda ms, drop: 1000 * energy.least_energy(within(ms), unit, np.zeros(1), drop)  # noqa: E731
    idle_mw = unit.power_mw(250.0, 0.0)
    quarter, half, full = (unit.power_mw(mhz) - idle_mw for mhz in unit.freqs)
    # All of it at half speed takes 20 ms; within 25 and 15 ms it is mixed from two clocks.
    assert least(20.0, 0.0) == pytest.approx(20 * half)
    assert least(25.0, 0.0) == pytest.approx(10 * quarter + 15 * half)
    assert least(15.0, 0.0) == pytest.approx(10 * half + 5 * full)
    # The cheapest level is less work, and may be slower.
    work_ms = 10 * schedule.LADDER[-1]
    assert least(2 * work_ms, schedule.DROP_PP[-1]) == pytest.approx(2 * work_ms * half)


def edge_serving(*due_ms, now_ms=0.0):
    """The level that EdgeServing's rule starts with; the full network takes 10 ms at most."""
    table = SimpleNamespace(point=lambda name, _: SimpleNamespace(
        latency_ms=[20.0, 10.0 * schedule.LADDER[int(name.removeprefix("level"))]]))  # fmt: skip
    policy = energy.EdgeServing(None, Index(), {}, unit=SimpleNamespace(name="gpu"),
                                tables={"net": table})  # fmt: skip
    frames = tuple(SimpleNamespace(deadline_at_ms=due) for due in due_ms)
    state = SimpleNamespace(t_ms=now_ms, apps=(SimpleNamespace(name="net", waiting=frames),))
    action = policy.decide(state, {"gpu": 1000.0})
    assert action.clocks == {"gpu": 1000.0}
    return action.placements["net"].subnet


def test_edge_serving_starts_at_the_most_accurate_exit_that_makes_nobody_late():
    assert edge_serving(10.0) == "level0"
    assert edge_serving(9.0) == "level1"
    assert edge_serving(100.0, 15.0) == "level0"  # 5 ms at the last level, then 10 of 100
    assert edge_serving(10.0, 14.9) == "level1"  # 10 + 5 > 14.9
    assert edge_serving(4.0) == "level3"  # late whatever it takes


def test_edge_serving_goes_on_then_takes_who_has_used_up_most():
    policy = energy.EdgeServing(None, Index(), {})
    jobs = [
        SimpleNamespace(segment=segment, arrival_ms=arrival_ms, deadline_at_ms=due_ms)
        for segment, arrival_ms, due_ms in ((0, 0.0, 100.0), (0, 20.0, 50.0), (1, 30.0, 900.0))
    ]
    assert policy.choose(jobs, 40.0) is jobs[2]
    assert policy.choose(jobs[:2], 40.0) is jobs[1]  # 0.4 and 0.67 of their time


def test_any_chain_of_blocks_becomes_a_trace():
    net = timm.create_model("resnet18", pretrained=False).eval()
    config = SPACE.smallest
    subnet = calibrated([config]).extract(config).eval()
    for one, pixels in ((net, 32), (subnet, config.resolution)):
        blocks = list(chain(one).blocks.values())
        trace = live.measure(blocks, torch.randn(1, 3, pixels, pixels), 2, "net")
        assert trace.ms.shape == (2, len(blocks))
        assert Profile(trace).rest_ms[-1] == 0


def test_a_live_run_follows_the_scheduler_block_by_block():
    ran = []

    def block(name):
        def run(x):
            ran.append(name)
            return x + 1

        return run

    nets = {name: ([block(name)] * 3, torch.zeros(1)) for name in ("short", "long")}
    profiles = {n: Profile(Trace(n, [[ms] * 3])) for n, ms in (("short", 1.0), ("long", 9.0))}
    together = Offered([0.0] * 2, ["long", "short"], [0, 0], [1e3] * 2, [1, 1])
    finish_ms = live.execute(together, nets, profiles, Dysta(0.0))
    assert ran == ["short"] * 3 + ["long"] * 3
    assert 0 < finish_ms[1] < finish_ms[0]
    ran.clear()
    live.execute(together, nets, profiles, Fcfs())
    assert ran == ["long"] * 3 + ["short"] * 3


def test_a_trace_file_that_is_empty_or_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no traces, expected one CSV file per network"):
        paper.traces("cnn", tmp_path)
    (tmp_path / "eyerissv2").mkdir()
    (tmp_path / "eyerissv2" / "net.csv").write_text("")
    with pytest.raises(DataError, match=r"net\.csv: not a layer trace"):
        paper.traces("cnn", tmp_path)
    (tmp_path / "eyerissv2" / "net.csv").write_text(
        "sim_lat,overall-sparsity,batch-indx,layer-indx\n-0.1,0.5,0,0\n"
    )
    with pytest.raises(ProfileError, match="input 0, segment 0, ms: got -100"):
        paper.traces("cnn", tmp_path)
