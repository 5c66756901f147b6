import subprocess
import sys
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import board, energy_mj, events, fixed, periodic, run, summarise, tables, unit

from dynlib.errors import DynlibError, PolicyError
from dynlib.log import DecisionLog
from dynlib.machine.bind import load_board
from dynlib.manager.policy import Action, Placement, edf, fifo
from dynlib.points import PointTable
from dynlib.runtime.case import Case
from dynlib.runtime.rivals import Static
from dynlib.runtime.simulation import Simulation
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import published_tables
from suite.studies.scenarios import scenario

BOARD = board()
TABLES = tables(BOARD, units=("gpu", "cpu"))


class Script:
    """Asks for the given clock at the given times."""

    name, static, governors = "script", False, {}
    choose = staticmethod(fifo)

    def __init__(self, steps, subnet="large"):
        self.steps, self.subnet = sorted(steps), subnet

    def decide(self, state, limits):
        mhz = [f for t, f in self.steps if t <= state.t_ms]
        later = [t for t, _ in self.steps if t > state.t_ms]
        return Action(
            {app.name: Placement(self.subnet, "gpu") for app in state.apps},
            {"gpu": mhz[-1]} if mhz else {},
            wake_ms=later[0] if later else None,
        )


def test_one_task_at_a_fixed_clock_matches_the_closed_form():
    workload = periodic(100.0, horizon_s=10.0)
    log = run(workload, BOARD, TABLES, fixed("large", 500.0))
    latencies = [e["latency_ms"] for e in events(log, "finish")]
    assert len(latencies) == 100
    # The first frame starts at the lowest clock, which acts for another 5 ms: 5/80 of it is done.
    assert latencies[0] == pytest.approx(5 + (1 - 5 / 80) * 40)
    assert latencies[1:] == pytest.approx([40.0] * 99)
    gpu, cpu = BOARD.unit("gpu"), BOARD.unit("cpu")
    busy, idle = gpu.power_mw(500.0, 1.0), gpu.idle_mw(500.0)
    rest = 1000 + cpu.idle_mw(250.0)
    first = 0.005 * (gpu.power_mw(250.0) + rest) + (latencies[0] - 5) / 1000 * (busy + rest)
    expected = first + (0.1 - latencies[0] / 1000) * (idle + rest)
    expected += 99 * (0.04 * (busy + rest) + 0.06 * (idle + rest))
    assert energy_mj(log) == pytest.approx(expected)


@given(
    at=st.floats(0.1, 14.9) | st.floats(15.1, 19.9),
    to=st.sampled_from([250.0, 500.0]),
    stall=st.floats(0, 2),
)
def test_a_clock_change_mid_job_reschedules_as_the_closed_form(at, to, stall):
    on = board(unit(stall_ms=stall, settle_ms=5.0))
    # The frame comes when the first change of clock is long over.
    workload = periodic(1000.0, horizon_s=2.0, start_s=0.5)
    policy = Script([(0.0, 1000.0), (500.0 + at, to)])
    log = run(workload, on, tables(on), policy)
    latency_ms = events(log, "finish")[0]["latency_ms"]
    if at + 5 >= 20:
        assert latency_ms == pytest.approx(20)
    else:
        expected = at + 5 + stall + (1 - (at + 5) / 20) * 20 * 1000 / to
        assert latency_ms == pytest.approx(expected)


def test_a_newer_request_replaces_the_one_under_way_and_settles_anew():
    policy = Script([(10.0, 1000.0), (12.0, 500.0), (14.0, 1000.0)])
    log = run(periodic(1000.0, horizon_s=1.0), BOARD, TABLES, policy)
    acts = [(round(e["t_s"] * 1000, 6), e["gpu_mhz"]) for e in events(log, "set")
            if e["reason"] == "acts"]  # fmt: skip
    assert acts == [(19.0, 1000.0)]


def test_a_competitor_stretches_what_runs_and_leaves_some_of_the_unit_busy():
    changes = [Change(0.51, unit="gpu", stretch=2.0, announced=False)]
    workload = periodic(1000.0, horizon_s=3.0, start_s=0.5, changes=changes)
    log = run(workload, BOARD, TABLES, fixed("large", 1000.0))
    # 10 ms done at full speed, the other half takes twice as long; afterwards everything does.
    assert [e["latency_ms"] for e in events(log, "finish")] == pytest.approx([30.0, 40.0])
    idle = [e["power_mw"] for e in events(log, "sample")][-1]
    gpu, cpu = BOARD.unit("gpu"), BOARD.unit("cpu")
    assert idle == pytest.approx(1000 + gpu.power_mw(1000.0, 0.5) + cpu.idle_mw(250.0))


@pytest.mark.parametrize(("period_ms", "stable"), [(19.0, False), (21.0, True)])
def test_utilisation_decides_between_misses_and_stability(period_ms, stable):
    workload = periodic(period_ms, deadline_ms=5 * period_ms, horizon_s=20.0)
    log = run(workload, BOARD, TABLES, fixed("large", 1000.0))
    summary = summarise(log, workload, TABLES, BOARD)
    assert (summary["missed"] == 0) == stable
    if not stable:
        # Nothing is wasted but late frames: the unit serves 50 a second, at most.
        assert summary["on_time"] + summary["late"] <= 20 * 50 + 1
        assert summary["on_time"] + summary["late"] > 0.95 * 20 * 50


def test_poisson_queue_waits_as_pollaczek_khinchine_says():
    app = App("app", "net", 10_000.0, "server", 40.0)
    workload = Workload("md1", 400.0, (app,))
    log = run(workload, BOARD, TABLES, fixed("large", 1000.0), 3)
    waits = [e["latency_ms"] - 20 for e in events(log, "finish")]
    # M/D/1: rho / (2 (1 - rho)) service times, rho = 0.5.
    assert sum(waits) / len(waits) == pytest.approx(10.0, rel=0.15)


@settings(deadline=None)
@given(
    period=st.floats(15, 200),
    deadline=st.floats(10, 400),
    steps=st.lists(st.tuples(st.floats(0, 1500), st.sampled_from(BOARD.unit("gpu").freqs))),
    stretch=st.lists(st.tuples(st.floats(0, 2), st.floats(1, 3)), max_size=4),
    seed=st.integers(0, 99),
)
def test_invariants_under_any_script(period, deadline, steps, stretch, seed):
    on = board(unit(noise_cv=0.1, stall_ms=0.2))
    points = tables(on)
    changes = [Change(t, unit="gpu", stretch=x, announced=False) for t, x in stretch]
    changes.append(Change(1.0, "app", deadline_ms=deadline / 2))
    workload = periodic(period, deadline_ms=deadline, horizon_s=2.0, changes=changes)
    log = run(workload, on, points, Script(steps), seed)
    times = [e["t_s"] for e in log]
    assert times == sorted(times)
    assert times[-1] == 2.0
    # Every frame comes once, starts at most once, and ends exactly once.
    arrived = [e["frame"] for e in events(log, "arrive")]
    ended = [e["frame"] for e in (*events(log, "finish"), *events(log, "drop"))]
    assert arrived == list(range(len(arrived)))
    assert sorted(ended) == arrived
    started = [e["frame"] for e in events(log, "start")]
    assert len(set(started)) == len(started)
    assert {e["frame"] for e in events(log, "finish")} <= set(started)
    # Every clock is an OPP, and acts the settling time after it was asked for, at the earliest.
    asked_s = None
    for event in events(log, "set"):
        assert event["gpu_mhz"] in on.unit("gpu").freqs
        if event["reason"] == "acts":
            assert event["t_s"] - asked_s == pytest.approx(0.005)
        else:
            asked_s = event["t_s"]
    assert energy_mj(log) == pytest.approx(_energy_again(log, on, changes))


def _energy_again(log, on, changes):
    """Board energy from starts, finishes, clocks and competitors, without the samples."""
    steps = [(e["t_s"], e["event"], e) for e in log if e["event"] in ("start", "finish")]
    steps += [(e["t_s"], "set", e) for e in events(log, "set") if e["reason"] == "acts"]
    steps += [(c.t_s, "stretch", c.stretch) for c in changes if c.stretch]
    mhz, busy, stretch, last_s, total = on.unit("gpu").min_mhz, False, 1.0, 0.0, 0.0
    for t_s, what, value in [*sorted(steps, key=lambda s: s[0]), (2.0, "end", None)]:
        load = 1.0 if busy else 1 - 1 / stretch
        total += (t_s - last_s) * on.power_mw({"gpu": mhz}, {"gpu": load})
        last_s = t_s
        if what == "set":
            mhz = value["gpu_mhz"]
        elif what == "stretch":
            stretch = value
        elif what != "end":
            busy = what == "start"
    return total


def test_same_seed_same_log_and_policies_meet_the_same_frames(tmp_path):
    workload = Workload("w", 5.0, (
        App("a", "net", 100.0, "server", 50.0), App("b", "net", 90.0, period_ms=90.0),
    ))  # fmt: skip
    on = board(unit(noise_cv=0.05))
    points = tables(on)
    both = {name: Placement("large", "gpu") for name in "ab"}
    fast, slow = (Static("s", both, {"gpu": f}, choose=o)
                  for f, o in ((1000.0, edf), (500.0, fifo)))  # fmt: skip
    first, again, other, seeded = (
        run(workload, on, points, policy, seed).write(tmp_path / name)
        for name, policy, seed in (("1", fast, 1), ("2", fast, 1), ("3", slow, 1), ("4", fast, 2))
    )
    assert first.read_bytes() == again.read_bytes() != seeded.read_bytes()
    arrivals = [[(e["t_s"], e["app"]) for e in events(DecisionLog.read(path), "arrive")]
                for path in (first, other)]  # fmt: skip
    assert sorted(arrivals[0]) == sorted(arrivals[1])


def test_a_policy_cannot_ask_for_what_is_not_there():
    workload = periodic()
    with pytest.raises(PolicyError, match=r"333.0 MHz.*1000"):
        run(workload, BOARD, TABLES, fixed("large", 333.0))
    with pytest.raises(Exception, match="huge"):
        run(workload, BOARD, TABLES, fixed("huge"))
    with pytest.raises(PolicyError, match=r"other.*net"):
        run(Workload("w", 1.0, (App("a", "other", 5.0, period_ms=5.0),)), BOARD, TABLES, fixed())


def test_a_cap_lowers_the_clock_and_leaving_it_is_the_policys_business():
    changes = [Change(1.0, unit="gpu", cap_mhz=600.0), Change(2.0, unit="gpu", cap_mhz=0.0)]
    workload = periodic(100.0, horizon_s=3.0, changes=changes)
    policy = fixed("large", None, governors={"gpu": "performance"})
    log = run(workload, BOARD, TABLES, policy)
    acts = [(e["t_s"], e["gpu_mhz"]) for e in events(log, "set") if e["reason"] == "acts"]
    assert [f for _, f in acts] == [1000.0, 500.0, 1000.0]
    assert acts[1][0] == 1.0  # a cap is a limit, not a request


def test_a_board_without_a_power_model_is_refused():
    with pytest.raises(DynlibError, match=r"tiny.*power"):
        run(periodic(), board(static_mw=None), TABLES, fixed())


def test_nothing_to_do_is_no_problem():
    empty = Workload("empty", 5.0, ())
    log = run(empty, BOARD, TABLES, Static("s", {}))
    assert summarise(log, empty, TABLES, BOARD)["offered"] == 0
    assert energy_mj(log) == pytest.approx(5 * BOARD.power_mw({}, {}))


def test_closed_loop_and_offline_arrivals():
    apps = (App("single", "net", 50.0, "single-stream"),
            App("batch", "net", 900.0, "offline", frames=7))  # fmt: skip
    log = run(Workload("w", 1.0, apps[:1]), BOARD, TABLES, fixed(app="single"))
    finished, arrived = events(log, "finish"), events(log, "arrive")
    assert [e["t_s"] for e in finished][: len(arrived) - 1] == [e["t_s"] for e in arrived][1:]
    log = run(Workload("w", 1.0, apps[1:]), BOARD, TABLES, fixed(app="batch"))
    assert [e["t_s"] for e in events(log, "arrive")] == [0.0] * 7
    assert len(events(log, "finish")) == 7


def test_an_urgent_frame_overtakes_at_a_segment_boundary_only():
    urgent = App("urgent", "net", 30.0, period_ms=1000.0, start_s=0.105)
    long = App("long", "net", 900.0, period_ms=1000.0, start_s=0.1)
    workload = Workload("w", 1.0, (long, urgent))
    policy = Static("s", {n: Placement("large", "gpu") for n in ("long", "urgent")},
                    {"gpu": 1000.0}, choose=edf)  # fmt: skip
    whole = events(run(workload, BOARD, TABLES, policy), "finish")
    in_two = {"net": PointTable(TABLES["net"].frame, BOARD, {"large": (1.0, 1.0)})}
    halves = events(run(workload, BOARD, in_two, policy), "finish")
    assert [(e["app"], round(e["latency_ms"], 6)) for e in whole] == [("long", 20), ("urgent", 35)]
    assert [(e["app"], round(e["latency_ms"], 6)) for e in halves] == [("urgent", 25), ("long", 40)]


def test_a_sleeping_governor_makes_no_difference(monkeypatch):
    on = load_board("jetson-xavier-nx")
    points = published_tables(on)
    workload = scenario("T2", on, points, 1).workload
    placements = {"a": Placement("level5", "gpu"), "b": Placement("cpu3", "carmel0")}
    policy = Static("linux", placements, governors={u.name: u.governor for u in on.units})
    asleep = run(workload, on, points, policy, 5)

    tick = Simulation.on_tick

    def always(self, run):
        tick(self, run)
        if run.asleep:
            run.asleep = False
            self.push(self.now_ms + run.governor.period_ms, 4, run)

    monkeypatch.setattr(Simulation, "on_tick", always)
    awake = run(workload, on, points, policy, 5)
    assert asleep.events == awake.events


def test_the_room_imports_without_torch():
    code = "import sys, dynlib.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_speed_is_a_minute_of_one_app_in_a_fraction_of_a_second():
    begin = process_time()
    for seed in range(3):
        run(periodic(100.0, horizon_s=60.0), BOARD, TABLES,
            fixed(governors={"gpu": "nvhost_podgov"}, mhz=None), seed)  # fmt: skip
    assert (process_time() - begin) / 3 < 1.0  # typically 0.05 s; loose, the machine is shared


@pytest.mark.parametrize(("action", "message"), [
    (None, r"script: decided None, expected an Action"),
    (Action({"ap": Placement("large", "gpu")}), r"script: no app 'ap'; did you mean app\?"),
    (Action({"app": ("large", "gpu")}), r"placed 'app' at \('large', 'gpu'\), expected a Pl"),
])  # fmt: skip
def test_what_is_no_decision_is_refused_by_name(action, message):
    policy = Script([])
    policy.decide = lambda state, limits: action
    with pytest.raises(PolicyError, match=message):
        run(periodic(), BOARD, TABLES, policy)


class Alternating:
    """Asks for the two highest clocks in turn, sooner than either can act."""

    name, static, governors = "alternating", False, {}
    choose = staticmethod(fifo)

    def decide(self, state, limits):
        wanted = (1000.0, 500.0)[round(state.t_ms / 3) % 2]
        return Action({"app": Placement("large", "gpu")}, {"gpu": wanted}, state.t_ms + 3)


def test_no_request_dodges_a_cap():
    changes = [Change(1.0, unit="gpu", cap_mhz=500.0)]
    log = run(periodic(100.0, horizon_s=3.0, changes=changes), BOARD, TABLES, Alternating())
    acted = [(e["t_s"], e["gpu_mhz"]) for e in events(log, "set") if e["reason"] == "acts"]
    assert all(mhz <= 500 for t_s, mhz in acted if t_s >= 1)
    assert acted[-1][1] == 500


def test_an_app_on_hold_starts_nothing_and_keeps_its_frames():
    class Holding(Alternating):
        def decide(self, state, limits):
            held = frozenset({"app"}) if state.t_ms < 50 else frozenset()
            return Action({"app": Placement("large", "gpu")}, {"gpu": 1000.0}, 50.0, hold=held)

    log = run(periodic(100.0, horizon_s=0.2), BOARD, TABLES, Holding())
    assert [e["t_s"] for e in events(log, "start")] == pytest.approx([0.05, 0.1])

    class Unknown(Alternating):
        def decide(self, state, limits):
            return Action(hold=frozenset({"ap"}))

    with pytest.raises(PolicyError, match=r"no app 'ap' to hold.*did you mean"):
        run(periodic(100.0, horizon_s=0.2), BOARD, TABLES, Unknown())


def heavy(*memory_mb):
    """A table whose networks, small and large, take so much memory."""
    frame = TABLES["net"].frame.copy()
    frame["memory_mb"] = frame["subnet"].map(dict(zip(("small", "large"), memory_mb, strict=True)))
    return {"net": PointTable(frame, BOARD)}


def test_the_networks_of_all_apps_fit_the_memory_and_the_least_important_waits():
    apps = tuple(
        App(name, "net", deadline_ms=100.0, period_ms=100.0, priority=priority)
        for name, priority in (("a", 0), ("b", 1))
    )
    changes = (Change(1.0, memory_mb=90.0), Change(2.0, memory_mb=0.0))
    workload = Workload("memory", 3.0, apps, changes)
    both = dict.fromkeys("ab", Placement("large", "gpu"))
    policy = Static("fixed", both, {"gpu": 1000.0})
    frames = Case(workload, BOARD, heavy(20.0, 50.0)).simulate(policy).frames()
    missed = frames[~frames["on_time"]]
    assert set(missed["app"]) == {"a"}
    assert missed["arrival_s"].between(1.0, 1.95).all()
    assert len(missed) == 10
    all_fit = Case(workload, BOARD, heavy(20.0, 45.0)).simulate(policy).frames()
    assert all_fit["on_time"].all()
