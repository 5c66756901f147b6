"""Heat in a run: energy balance, caps of the thermal governor, and that it changes nothing else."""

from bisect import bisect_right
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import (
    board,
    cases,
    events,
    fixed,
    periodic,
    run,
    summarise,
    tables,
    timeline,
    unit,
)

from dynlib.boards.board import Thermal
from dynlib.boards.thermal import AMBIENT_C
from dynlib.errors import WorkloadError
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.runtime.conditions import conditions
from dynlib.runtime.heat import TAU_S, Heat
from dynlib.runtime.rivals import linux_default
from dynlib.runtime.units import UnitRun
from dynlib.workload import Change
from suite.papers.dynamic_ofa import published_tables
from suite.studies.manage import tables_by_work
from suite.studies.scenarios import scenario

FACTS = Thermal("zone", "published", passive_c=(45.0, 55.0), polling_ms=1000.0,
                passive_polling_ms=100.0, sustainable_power_mw=3000.0)  # fmt: skip
K_PER_W = (55 - AMBIENT_C) / 3.0
KNOWN = {"c_status": "fitted", "voltage_status": "published", "idle_status": "fitted"}
BOARD = replace(board(unit(**KNOWN), unit("cpu", "cpu", cores=2, **KNOWN), static_mw=500.0),
                thermal=FACTS, static_slope_per_c=0.01)  # fmt: skip
TABLES = tables(BOARD, units=("gpu", "cpu"))
BUSY = fixed("large", None, governors={"gpu": "performance"})


def air(*steps):
    return [Change(t_s, ambient_c=temp_c, announced=False) for t_s, temp_c in steps]


def steps_of(log, key, start, **match):
    """A step function from the log: (times, values)."""
    found = [(e["t_s"], e[key]) for e in log if key in e and match.items() <= e.items()]
    times, values = zip((0.0, start), *found, strict=True)
    return times, values


def at(steps, t_s):
    return steps[1][bisect_right(steps[0], t_s) - 1]


def test_hot_air_throttles_and_cold_air_does_not():
    workload = periodic(25.0, horizon_s=60.0, changes=air((2, 40)))
    log = run(workload, BOARD, TABLES, BUSY)
    hot = summarise(log, workload, TABLES, BOARD)
    assert hot["throttled_pct"] > 50
    assert hot["late"] + hot["dropped"] > 50
    assert 50 < hot["temp_max_c"] < 56
    assert hot["source"] == log.header["source"] == "estimated"
    workload = periodic(25.0, horizon_s=60.0, changes=air((2, -20)))
    cold = summarise(run(workload, BOARD, TABLES, BUSY), workload, TABLES, BOARD)
    assert cold["throttled_pct"] == 0
    assert cold["missed"] <= 1  # the first frame comes before the clock is up
    assert cold["temp_max_c"] < hot["temp_max_c"] - 20


def test_without_a_change_of_the_air_there_is_no_heat():
    workload = periodic(25.0, horizon_s=20.0)
    log = run(workload, BOARD, TABLES, BUSY)
    assert log.events == run(workload, replace(BOARD, thermal=None), TABLES, BUSY).events
    assert all("temp_c" not in e for e in log)
    assert "temp_max_c" not in summarise(log, workload, TABLES, BOARD)
    assert log.header["source"] == "simulated"
    # And where the board stays cool, heat moves nothing but the static power.
    cool = run(replace(workload, changes=tuple(air((0, -50)))), BOARD, TABLES, BUSY)
    plain, cold = ([e for e in some if e["event"] != "sample"] for some in (log, cool))
    assert plain == cold


@settings(deadline=None, max_examples=15)
@given(
    changes=st.lists(st.tuples(st.floats(0, 11.9), st.floats(-20, 70)), min_size=1, max_size=3),
    period_ms=st.floats(22, 200),
    mhz=st.sampled_from((500.0, 1000.0)),
)
def test_the_temperature_is_the_integral_of_the_logged_power(changes, period_ms, mhz):
    workload = periodic(period_ms, horizon_s=12.0, changes=air(*changes))
    log = run(workload, BOARD, TABLES, fixed("large", mhz))
    power, logged = (steps_of(log, key, 0.0) for key in ("power_mw", "temp_c"))
    ambient = [AMBIENT_C, *(c.ambient_c for c in workload.changes)]
    times = [0.0, *(c.t_s for c in workload.changes)]
    step_s, temp_c, again = 0.004, AMBIENT_C, []
    for t_s in np.arange(0.0, 12.0, step_s):
        again.append(temp_c)
        outside_c = ambient[bisect_right(times, t_s) - 1]
        final_c = outside_c + K_PER_W * at(power, t_s) / 1000
        temp_c += (final_c - temp_c) * step_s / TAU_S
    assert np.interp(logged[0][1:], np.arange(0.0, 12.0, step_s), again) == pytest.approx(
        logged[1][1:], abs=0.1
    )


@pytest.mark.parametrize("policy", [BUSY, fixed("large", 1000.0), Manager(BOARD, TABLES)])
def test_no_clock_stands_above_a_cap_once_it_has_settled(policy):
    others = ((20.0, {"cap_mhz": 500.0}), (30.0, {"cap_mhz": 0.0}), (35.0, {"lost": True}))
    changes = [*air((2, 45), (20, -20)), *(Change(t_s, unit="gpu", **what) for t_s, what in others)]
    workload = periodic(25.0, horizon_s=40.0, changes=changes, accuracy_floor_pct=75.0)
    log = run(workload, BOARD, TABLES, policy)
    caps = steps_of(log, "gpu_mhz", 1000.0, reason="heat")
    clock = steps_of(log, "gpu_mhz", 250.0, reason="acts")
    assert min(caps[1]) < 1000
    settle_s = BOARD.unit("gpu").settle_ms / 1000 + 1e-9
    for t_s, cap_mhz in zip(*caps, strict=True):
        if at(caps, t_s + settle_s) == cap_mhz:
            assert at(clock, t_s + settle_s) <= cap_mhz
    # Heat allows more in the cold air of the end, but somebody else does not.
    assert at(caps, 29.9) == 1000
    assert all(e["unit"] == "cpu" for e in events(log, "start") if e["t_s"] > 35)
    for t_s, mhz in zip(*clock, strict=True):
        if 20 + settle_s < t_s < 30:
            assert mhz <= 500
        assert mhz <= max(at(caps, t_s), at(caps, t_s - settle_s))


def test_the_board_settles_at_what_the_air_lets_it_sustain():
    workload = periodic(21.0, horizon_s=100.0, changes=air((0, 35)))
    log = run(workload, BOARD, TABLES, BUSY)
    table = timeline(log, workload, TABLES, bin_s=1.0)
    late = table[table["t_s"] >= 60]
    power_mw, temp_c = (late.loc[late["what"] == w, "value"] for w in ("power_mw", "temp_c"))
    # Below its control temperature the governor only follows it, so it stays a little below.
    sustained_mw = 1000 * (55 - 35) / K_PER_W
    assert 0.85 * sustained_mw < power_mw.mean() <= 1.01 * sustained_mw
    assert temp_c.between(51, 56).all()
    assert set(late.loc[late["what"] == "cap_mhz", "name"]) == {"gpu"}


@given(loads=st.tuples(st.floats(0, 1), st.floats(0, 2)), temp_c=st.floats(40, 70),
       mhz=st.tuples(*[st.sampled_from(u.freqs) for u in BOARD.units]))  # fmt: skip
def test_caps_keep_within_the_budget(loads, temp_c, mhz):
    heat = Heat(BOARD, conditions(periodic(changes=air((1, 40))), BOARD)[0][1])
    units = [UnitRun(spec, None) for spec in BOARD.units]
    heat.poll(0.0, units)
    for one, load, clock in zip(units, loads, mhz, strict=True):
        one.mhz, one.rest_cores = clock, load
    heat.draws(0.0, 0.0, units)
    heat.advance(100.0)
    heat.body.temp_c = temp_c
    heat.poll(100.0, units)
    most_mw = sum(round(u.dynamic_mw(u.max_mhz, u.cores)) for u in BOARD.units)
    twin = Heat(BOARD, heat.outside).governor
    budget_mw = twin.budget_mw(temp_c, most_mw)
    caps = zip(BOARD.units, heat.cap_mhz, loads, strict=True)
    drawn = [u.dynamic_mw(f, load) for u, f, load in caps if f > u.min_mhz]
    assert sum(drawn) <= budget_mw + 2
    assert heat.wait_ms == (1000 if temp_c < 45 else 100)
    assert temp_c >= 45 or heat.cap_mhz == tuple(u.max_mhz for u in BOARD.units)


def test_static_power_follows_the_temperature():
    workload = periodic(25.0, horizon_s=10.0, changes=air((0, 60)), start_s=9.0)
    log = run(workload, BOARD, TABLES, fixed())
    polled = [e for e in events(log, "sample") if e["t_s"] in (1.0, 2.0, 3.0)]
    idle_mw = BOARD.power_mw({"gpu": 1000.0}, {}) - BOARD.static_mw
    for sample in polled:
        static_mw = 500 * (1 + 0.01 * (sample["temp_c"] - BOARD.reference_c))
        assert sample["power_mw"] == pytest.approx(static_mw + idle_mw)
    assert len(polled) == 3


def test_a_policy_is_told_caps_and_temperature():
    class Recorder(Manager):
        def decide(self, state, limits):
            seen.append((state.temp_c, limits["gpu"]))
            return super().decide(state, limits)

    seen = []
    run(periodic(21.0, horizon_s=40.0, changes=air((2, 50)), accuracy_floor_pct=75.0), BOARD,
        TABLES, Recorder(BOARD, TABLES))  # fmt: skip
    assert max(t for t, _ in seen) > 54
    assert {mhz for _, mhz in seen} >= {500.0, 1000.0}
    seen = []
    run(periodic(25.0, horizon_s=1.0), BOARD, TABLES, Recorder(BOARD, TABLES))
    assert all(np.isnan(t) for t, _ in seen)


def test_a_board_without_facts_is_refused():
    nx = load_board("jetson-xavier-nx")
    for attempt in (
        lambda: scenario("S6", nx, published_tables(nx)),
        lambda: conditions(periodic(changes=air((1, 40))), nx),
    ):
        with pytest.raises(WorkloadError, match=r"ambient_c.*Xavier NX.*sustainable_power_mw"):
            attempt()
    part = replace(BOARD, thermal=replace(FACTS, polling_ms=None))
    with pytest.raises(WorkloadError, match="publishes no polling_ms"):
        run(periodic(changes=air((1, 40))), part, TABLES, fixed())


def test_s6_throttles_linux_on_hikey960_and_hardly_the_manager():
    on = load_board("hikey960")
    points = tables_by_work(on)
    assert points["ofa-mbv3-w1.2"].largest.latency_ms[-1] == pytest.approx(731.1 * 0.0529)
    make = lambda seed: scenario("S6", on, points, seed).workload  # noqa: E731
    both = {"linux": linux_default(cases(make, on, points), seeds=(9001,)),
            "accuracy": Manager(on, points, objective="accuracy")}  # fmt: skip
    found = {}
    for name, policy in both.items():
        log = run(make(400), on, points, policy, 400)
        found[name] = summarise(log, make(400), points, on)
    assert found["linux"]["throttled_pct"] > 10
    assert found["linux"]["temp_max_c"] == pytest.approx(75.5, abs=1)
    assert found["accuracy"]["throttled_pct"] < 10
    assert found["accuracy"]["deadline_miss_pct"] <= 1
