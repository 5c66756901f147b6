"""The upper level against trying everything."""

import math
from itertools import permutations, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from runtime_cases import NETS, board, net_table, run, summarise, tables, unit

from dynlib.manager.planner import Demand, Planner, Speed, queue_ms, schedulable
from dynlib.manager.policy import Placement, edf
from dynlib.points import PointTable
from dynlib.runtime.rivals import Static
from dynlib.workload import App, Workload

BOARD = board(unit(noise_cv=0.0))
MHZ = BOARD.units[0].freqs
LIMITS = (("gpu", MHZ[-1]),)
TARGET = 0.005


def table_of(nets, memory=True, on=BOARD):
    """Without noise, if the board says no other, so that the margin is 1."""
    nets = [(a, ms, mb if memory else 1) for a, ms, mb in nets]
    return PointTable(net_table(nets).frame, on)


def demand(deadline_ms, floor_pct=0.0, app="app", period_ms=100.0, **values):
    return Demand(app, "net", deadline_ms, period_ms, float(floor_pct), **values)


def planner(nets, objective="energy", on=BOARD):
    return Planner(on, {"net": nets if isinstance(nets, PointTable) else table_of(nets)},
                   objective, TARGET)  # fmt: skip


def mw(table, plan, demands, clock=None):
    """What the frames of a plan draw on the mean."""
    total = 0.0
    for each in demands:
        point = table.point(*plan.placements[each.app])
        i = MHZ.index(plan.clocks[point.unit]) if clock is None else clock
        slow = dict(each.speeds).get("gpu", Speed()).typical
        total += point.active_mw[i] * point.latency_ms[i] * slow / each.period_ms
    return total


# Schedulability.

tasks = st.lists(
    st.tuples(st.sampled_from(["small", "large"]), st.floats(15, 120), st.floats(0.3, 1.5),
              st.floats(0, 0.05)), min_size=1, max_size=3,
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(tasks)
def test_what_is_schedulable_is_never_late(tasks):
    points = tables(BOARD)
    apps = tuple(
        App(f"t{i}", "net", period * ratio, period_ms=period, start_s=0.01 + start)
        for i, (_, period, ratio, start) in enumerate(tasks)
    )
    sets = [({"small": 10.0, "large": 20.0}[net], p, p * r) for net, p, r, _ in tasks]
    if not schedulable(sets):
        return
    placed = {app.name: Placement(net, "gpu") for app, (net, *_) in zip(apps, tasks, strict=True)}
    workload = Workload("w", 1.5, apps)
    log = run(workload, BOARD, points, Static("s", placed, {"gpu": 1000.0}, choose=edf))
    assert summarise(log, workload, points, BOARD)["missed"] == 0


numbers = st.lists(st.tuples(st.floats(1, 50), st.floats(20, 200), st.floats(0.2, 2)), min_size=1,
                   max_size=4)  # fmt: skip


@given(numbers, st.floats(0.5, 1.0))
def test_less_work_is_schedulable_where_more_is(numbers, part):
    more = [(c, p, p * ratio) for c, p, ratio in numbers]
    if schedulable(more):
        assert schedulable([(c * part, p, d) for c, p, d in more])
        assert schedulable(more[::-1])
        assert not more[1:] or schedulable(more[1:])


def test_schedulable_at_its_edges():
    assert schedulable([(10.0, 20.0, 10.0)])
    assert not schedulable([(10.0, 20.0, 9.9)])
    assert not schedulable([(10.0, 10.0, 10.0)] * 2)
    assert not schedulable([(2.0, 20.0, 8.0), (8.0, 100.0, 100.0)])  # the long one blocks
    assert schedulable([(2.0, 20.0, 10.0), (8.0, 100.0, 100.0)])


@given(st.floats(1, 100), st.floats(1, 200), st.floats(0.001, 0.1))
def test_the_queue_grows_with_the_load(ms, period_ms, target):
    wait_ms = queue_ms(ms, period_ms, target)
    assert wait_ms >= 0
    assert math.isinf(wait_ms) == (ms >= period_ms)
    assert wait_ms <= queue_ms(ms * 1.1, period_ms, target)
    assert wait_ms <= queue_ms(ms, period_ms, target / 2)


# One app.


@given(NETS, st.floats(5, 150), st.integers(50, 90), st.floats(1, 2), st.sampled_from(MHZ))
@settings(max_examples=40)
def test_one_app_gets_the_best_of_all_points_and_clocks(nets, deadline_ms, floor_pct, slow, cap):
    table = table_of(nets)
    points = table.on("gpu")
    for objective in ("energy", "accuracy"):
        one = planner(table, objective)
        floor = floor_pct if objective == "energy" else 0
        wanted = demand(deadline_ms, floor, speeds=(("gpu", Speed(slow, 1.0, slow)),))
        plan = one.plan((wanted,), (("gpu", cap),))
        found = [
            (p.active_mw[i] * p.latency_ms[i] * slow / 100, p.accuracy_val_pct)
            for p in points for i in range(MHZ.index(cap) + 1)
            if p.accuracy_val_pct >= floor
            and schedulable([(p.latency_ms[i] * slow, 100.0, deadline_ms)])
        ]  # fmt: skip
        if not found:
            assert plan.degraded
            continue
        assert not plan.degraded
        assert plan.clocks["gpu"] <= cap
        chosen = mw(table, plan, [wanted])
        if objective == "energy":
            assert chosen == pytest.approx(min(found)[0])
        else:
            best = max(accuracy for _, accuracy in found)
            assert table.point(*plan.placements["app"]).accuracy_val_pct == best
            assert chosen == pytest.approx(min(mw for mw, a in found if a == best))


def test_noise_takes_a_margin_and_more_where_more_was_learnt():
    on = board(unit(noise_cv=0.05))
    one = planner(table_of([(70, 10, 1), (80, 20, 1)], on=on), "accuracy", on)

    def chosen(deadline_ms, spread=1.0, peak=1.0):
        speeds = (("gpu", Speed(1.0, spread, peak)),)
        return one.plan((demand(deadline_ms, speeds=speeds),), LIMITS).placements["app"].subnet

    assert chosen(20.5) == "n0"
    assert chosen(25.0) == "n1"
    assert chosen(25.0, spread=3.0) == "n0"
    assert chosen(25.0, peak=1.4) == "n0"


def test_a_batch_needs_no_margin_for_each_frame():
    on = board(unit(noise_cv=0.1))
    one = planner(table_of([(70, 10, 1), (80, 20, 1)], on=on), "accuracy", on)
    batch = Demand("b", "net", 1000.0, 21.0, 0.0, batch=True)
    assert one.plan((batch,), LIMITS).placements["b"].subnet == "n1"
    each = batch._replace(batch=False, deadline_ms=21.0)
    assert one.plan((each,), LIMITS).placements["b"].subnet == "n0"


def test_a_network_that_is_in_time_but_for_its_tail_is_served():
    on = board(unit(noise_cv=0.3))
    one = planner(table_of([(80, 20, 1)], on=on), on=on)
    plan = one.plan((demand(35.0),), LIMITS)
    assert plan.placements["app"].subnet == "n0"
    assert not plan.hopeless
    assert plan.clocks["gpu"] == MHZ[-1]


def test_where_nothing_is_in_time_the_plan_says_so():
    plan = planner([(70, 10, 1), (80, 20, 1)]).plan((demand(8.0),), LIMITS)
    assert plan.hopeless == {"app"}
    assert plan.degraded == ("app late",)


# Several.


@given(NETS, st.floats(10, 150), st.floats(10, 150), st.integers(50, 80), st.floats(40, 200))
@settings(max_examples=40, deadline=None)
def test_two_apps_of_one_unit_against_all_pairs_of_points(nets, one_ms, two_ms, floor, period_ms):
    table = table_of(nets, memory=False)
    wanted = (demand(one_ms, floor, "a"), demand(two_ms, 0, "b", period_ms))
    plan = planner(table).plan(wanted, LIMITS)

    def fits(pair, i, room=1.0):
        return schedulable([(p.latency_ms[i] * room, d.period_ms, d.deadline_ms)
                            for p, d in zip(pair, wanted, strict=True)])  # fmt: skip

    pairs = [
        (pair, i) for pair in product(table.on("gpu"), repeat=2) for i in range(len(MHZ))
        if pair[0].accuracy_val_pct >= floor
    ]  # fmt: skip
    found = [
        sum(p.active_mw[i] * p.latency_ms[i] / d.period_ms
            for p, d in zip(pair, wanted, strict=True))
        for pair, i in pairs if fits(pair, i)
    ]  # fmt: skip
    if plan.degraded:
        # With a little room nothing that can be done is given up.
        assert not any(fits(pair, i, 1.06) for pair, i in pairs)
        return
    i = MHZ.index(plan.clocks["gpu"])
    placed = [table.point(*plan.placements[d.app]) for d in wanted]
    assert placed[0].accuracy_val_pct >= floor
    assert fits(placed, i)
    assert mw(table, plan, wanted) <= 1.1 * min(found)


@given(st.lists(st.floats(30, 300), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_apps_go_to_the_units_where_they_take_least(periods):
    """As good as the best of all assignments, each planned by itself."""
    on = board(unit(), unit("cpu", "cpu", cores=2))
    points = tables(on, units=("gpu", "cpu"))
    both = (("gpu", 1000.0), ("cpu", 1000.0))
    one = Planner(on, points, "energy", TARGET)
    wanted = tuple(demand(p, 0, f"a{i}", p) for i, p in enumerate(periods))
    plan = one.plan(wanted, both)
    assume(not plan.degraded)  # the GPU full to the last millisecond

    def spent(plan):
        total = 0.0
        for d in wanted:
            point = points["net"].point(*plan.placements[d.app])
            i = on.unit(point.unit).freqs.index(plan.clocks[point.unit])
            total += point.active_mw[i] * point.latency_ms[i] / d.period_ms
        return total

    only = [one.plan(wanted, (("gpu", 1000.0), ("cpu", 0.0)))]
    only += [one.plan(wanted, (("gpu", 0.0), ("cpu", 1000.0)))]
    for other in only:
        if not other.degraded:
            assert spent(plan) <= spent(other) * (1 + 1e-9)


def test_a_lost_unit_is_left_and_without_any_nobody_is_placed():
    on = board(unit(), unit("cpu", "cpu", cores=2))
    one = Planner(on, tables(on, units=("gpu", "cpu")), "energy", TARGET)
    wanted = (demand(500.0, period_ms=500.0),)
    assert one.plan(wanted, (("gpu", 0.0), ("cpu", 1000.0))).placements["app"].unit == "cpu"
    assert one.plan(wanted, (("gpu", 0.0), ("cpu", 0.0))).placements["app"] is None


@pytest.mark.parametrize("priorities", [(0, 0, 0), (0, 1, 2)])
def test_the_order_of_the_apps_does_not_matter(priorities):
    nets = [(70, 10, 1), (75, 14, 1), (80, 20, 2)]
    for period_ms in (25.0, 40.0, 90.0):
        wanted = [
            demand(period_ms * (1 + i / 4), 60 + 10 * i, name, period_ms, priority=rank)
            for i, (name, rank) in enumerate(zip("abc", priorities, strict=True))
        ]
        plans = [planner(nets).plan(tuple(order), LIMITS, 5.0) for order in permutations(wanted)]
        for plan in plans[1:]:
            assert plan == plans[0]


def test_of_what_does_not_fit_the_most_important_is_in_time_and_the_others_get_what_is_left():
    nets = [(80, 20, 1)]
    apps = tuple(demand(30.0, 75, n, 30.0, priority=p) for n, p in (("low", 0), ("high", 1)))
    plan = planner(nets).plan(apps, LIMITS)
    assert plan.spare == {"low"}
    assert plan.degraded == ("low now and then",)
    assert all(plan.placements.values())
    equal = planner(nets).plan(tuple(a._replace(priority=0) for a in apps), LIMITS)
    assert equal.spare == {"low", "high"}
    assert equal.clocks["gpu"] == MHZ[-1]


# Memory.


def test_a_point_is_not_given_up_for_one_that_does_not_fit():
    """The small point is worse in time and power, but there is memory only for it."""
    one = planner([(80, 10, 4), (80, 12, 1)])
    assert one.plan((demand(50.0),), LIMITS).placements["app"].subnet == "n0"
    tight = one.plan((demand(50.0),), LIMITS, 2.0)
    assert not tight.degraded
    assert tight.placements["app"].subnet == "n1"


def test_networks_that_fill_a_cap_to_the_last_byte_are_served():
    frame = table_of([(70, 10, 1), (80, 20, 1)]).frame
    frame = frame.assign(memory_mb=frame["subnet"].map({"n0": 40.7, "n1": 45.0}))
    one = planner(PointTable(frame, BOARD))
    apps = (demand(100.0, 75, "a"), demand(100.0, 60, "b"))
    for cap_mb in (90.0, 85.7):
        plan = one.plan(apps, LIMITS, cap_mb)
        assert not plan.degraded
        assert [plan.placements[n].subnet for n in "ab"] == ["n1", "n0"]


@given(NETS, st.floats(0.5, 12), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_networks_fit_together_and_whoever_is_refused_matters_least(nets, cap_mb, count):
    table = table_of(nets)
    apps = tuple(demand(100.0, 0, f"a{i}", priority=i) for i in range(count))
    plan = planner(table).plan(apps, LIMITS, cap_mb)
    placed = [table.point(*where).memory_mb for where in plan.placements.values() if where]
    assert sum(placed) <= cap_mb
    refused = [app.priority for app in apps if plan.placements[app.app] is None]
    assert refused == list(range(len(refused)))
    least = min(mb for _, _, mb in nets)
    assert len(placed) == min(count, int(cap_mb // least))


# Odd tables.


@pytest.mark.parametrize("objective", ["energy", "accuracy", "latency", "balanced"])
def test_a_table_with_one_point(objective):
    one = planner([(80, 20, 2)], objective)
    for deadline_ms, cap_mb in product((10.0, 25.0, 300.0), (1.0, 2.0, math.inf)):
        plan = one.plan((demand(deadline_ms),), LIMITS, cap_mb)
        assert (plan.placements["app"] is None) == (cap_mb < 2)


def test_a_table_with_ten_thousand_points():
    nets = [(f"n{i}", 50 + 40 * i / 10_000, 5 + 40 * i / 10_000) for i in range(10_000)]
    on = board(unit(opps=BOARD.units[0].opps[-1:]))
    one = Planner(on, tables(on, nets), "accuracy", TARGET)
    plan = one.plan((demand(25.0),), LIMITS)
    assert plan.placements["app"].subnet == "n5000"
