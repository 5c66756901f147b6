import pandas as pd
import pytest
from runtime_cases import board, cases, fixed, frames_of, periodic, run, summarise, tables, unit

from dynlib.errors import PolicyError, TableError
from dynlib.machine.bind import load_board
from dynlib.manager.policy import Placement
from dynlib.points import PointTable, make_table
from dynlib.runtime import rivals
from dynlib.runtime.rivals import JustInTime, Static, best_static, linux_default
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import published_frame, published_tables
from suite.studies.compare import compare_policies
from suite.studies.manage import contenders, sensitivity, simulate_each, simulate_many
from suite.studies.scenarios import scenario

BOARD = board(unit(noise_cv=0.03))
TABLES = tables(BOARD)


def test_linux_default_takes_the_largest_network_that_misses_at_most_one_percent():
    for period_ms in (12.0, 17.0, 25.0, 60.0):
        make = lambda seed, p=period_ms: periodic(p, horizon_s=20.0)  # noqa: E731
        policy = linux_default(cases(make, BOARD, TABLES))
        chosen = policy.placements["app"].subnet
        misses = {}
        for net in ("large", "small"):
            trial = fixed(net, None, governors={"gpu": "nvhost_podgov"})
            rows = []
            for seed in (9001, 9002, 9003):
                log = run(make(seed), BOARD, TABLES, trial, seed)
                rows.append(summarise(log, make(seed), TABLES, BOARD))
            misses[net] = 100 * sum(r["missed"] for r in rows) / sum(r["offered"] for r in rows)
        expected = "large" if misses["large"] <= 1 else "small"
        assert chosen == expected, (period_ms, misses)
        assert policy.governors["gpu"] == "nvhost_podgov"


def test_linux_default_names_a_start_unit_that_serves_nothing():
    def make(seed):
        return periodic(start_unit="npu")

    with pytest.raises(PolicyError, match=r"'net' has no points on 'npu', expected one of"):
        linux_default(cases(make, BOARD, TABLES))


LADDER = (("xs", 70.0, 6.0), ("s", 75.0, 9.0), ("l", 79.5, 18.0), ("xl", 80.0, 20.0))
LADDER_TABLES = tables(BOARD, LADDER)


def missed_with(subnets, make):
    """Frames missed in percent with these networks (app -> name) under the board's governor."""
    placements = {app: Placement(subnet, "gpu") for app, subnet in subnets.items()}
    policy = Static("fixed", placements, governors={"gpu": "nvhost_podgov"})
    offered = missed = 0
    for seed in (9001, 9002, 9003):
        found = summarise(run(make(seed), BOARD, LADDER_TABLES, policy, seed),
                          make(seed), LADDER_TABLES, BOARD)  # fmt: skip
        offered, missed = offered + found["offered"], missed + found["missed"]
    return 100 * missed / offered


@pytest.mark.parametrize("period_ms", [15.0, 22.0, 26.0, 40.0])
@pytest.mark.parametrize("floors", [(79.5,), (80.0, 70.0, 75.0), (0.0, 79.5)])
def test_linux_default_of_one_app_is_the_best_of_all_its_networks(period_ms, floors):
    later = [Change(2.0 * i, "app", accuracy_floor_pct=f) for i, f in enumerate(floors) if i]

    def make(seed):
        first_pct = floors[0]
        return periodic(period_ms, horizon_s=6.0, changes=later, accuracy_floor_pct=first_pct)

    policy = linux_default(cases(make, BOARD, LADDER_TABLES))
    missed = {net: missed_with({"app": net}, make) for net, *_ in reversed(LADDER)}
    good = [net for net, missed_pct in missed.items() if missed_pct <= 1]
    expected = good[0] if good else min(missed, key=missed.get)
    assert policy.placements["app"].subnet == expected, missed


def test_linux_default_does_not_walk_below_a_floor():
    # The governor is too slow for either of the two networks that the floor allows.
    def make(seed):
        return periodic(21.0, horizon_s=6.0, accuracy_floor_pct=79.5)

    policy = linux_default(cases(make, BOARD, LADDER_TABLES))
    chosen = policy.placements["app"].subnet
    assert chosen in ("l", "xl")
    assert 1 < missed_with({"app": chosen}, make) < 100 == missed_with({"app": "s"}, make)


def test_linux_default_of_two_apps_shrinks_the_one_that_may():
    # "b" misses most, but has a floor; with a smaller network of "a" both are on time.
    def make(seed):
        apps = (App("a", "net", 80.0, period_ms=40.0, accuracy_floor_pct=70.0),
                App("b", "net", 32.0, period_ms=40.0, accuracy_floor_pct=80.0))  # fmt: skip
        return Workload("two", 15.0, apps)

    largest = {"a": "xl", "b": "xl"}
    assert missed_with(largest, make) > 1
    policy = linux_default(cases(make, BOARD, LADDER_TABLES))
    chosen = {app: placement.subnet for app, placement in policy.placements.items()}
    assert chosen["b"] == "xl"
    assert missed_with(chosen, make) <= 1


def with_memory(on):
    """The tiny networks; the large one takes 90 MB, the small one 40."""
    frame = TABLES["net"].frame
    memory_mb = frame["subnet"].map({"small": 40.0, "large": 90.0})
    return {"net": PointTable(frame.assign(memory_mb=memory_mb), on)}


@pytest.mark.parametrize("rival", [linux_default, best_static])
def test_rivals_keep_what_the_apps_may_hold_together(rival):
    # The floor of "b" asks for the large network.
    apps = (App("a", "net", 200.0, period_ms=200.0),
            App("b", "net", 200.0, period_ms=200.0, accuracy_floor_pct=80.0))  # fmt: skip

    def subnets(cap_mb):
        changes = Change(1.0, memory_mb=cap_mb), Change(2.0, memory_mb=0.0)
        make = cases(lambda seed: Workload("w", 3.0, apps, changes), BOARD, with_memory(BOARD))
        policy = rival(make, seeds=(9001,))
        return policy and sorted(placement.subnet for placement in policy.placements.values())

    assert subnets(130.0) == ["large", "small"]
    if rival is best_static:
        assert subnets(100.0) is None
        return
    assert subnets(180.0) == ["large", "large"]
    assert subnets(100.0) == ["small", "small"]  # what does not fit is no candidate
    with pytest.raises(PolicyError, match=r"no networks of \['a', 'b'\] fit 70 MB together"):
        subnets(70.0)
    with pytest.raises(PolicyError, match=r"no networks of .* fit 30 MB"):
        subnets(30.0)


def test_linux_default_makes_room_below_a_floor_where_nothing_else_fits():
    # "b" takes most and cannot become smaller, so it is "a" that has to.
    frame = TABLES["net"].frame
    names = frame["subnet"]
    light = frame.assign(model="light", memory_mb=names.map({"small": 10.0, "large": 40.0}))
    heavy = frame[names == "large"].assign(model="heavy", memory_mb=90.0)
    points = {"light": PointTable(light, BOARD), "heavy": PointTable(heavy, BOARD)}
    apps = (App("a", "light", 200.0, period_ms=200.0, accuracy_floor_pct=80.0),
            App("b", "heavy", 200.0, period_ms=200.0))  # fmt: skip
    workload = Workload("w", 3.0, apps, (Change(1.0, memory_mb=100.0),))
    policy = linux_default(cases(lambda seed: workload, BOARD, points), seeds=(9001,))
    assert [policy.placements[app].subnet for app in "ab"] == ["small", "large"]


def test_linux_default_tries_a_bounded_number_of_networks(monkeypatch):
    tried = []
    attempt = rivals._Search.attempt
    count = lambda search, points: tried.append(points) or attempt(search, points)  # noqa: E731
    monkeypatch.setattr(rivals._Search, "attempt", count)
    nets = [(f"n{i}", 50.0 + i / 20, 10.0 + i) for i in range(1000)]
    make = cases(lambda seed: periodic(9.0, horizon_s=0.1), BOARD, tables(BOARD, nets))
    policy = linux_default(make, seeds=(9001,))
    assert len(tried) == rivals.MAX_SETUPS
    assert [tried[0][0].subnet, tried[-1][0].subnet] == ["n999", "n0"]
    assert policy.placements["app"].subnet == "n999"


def test_a_static_policy_names_the_app_that_it_does_not_place():
    workload = Workload("w", 1.0, (App("camera", "net", 60.0, period_ms=60.0),))
    with pytest.raises(PolicyError, match=r"fixed: no placement for app 'camera'.*known: camara"):
        run(workload, BOARD, TABLES, fixed("small", app="camara"))


def test_linux_default_keeps_every_app_where_it_starts():
    on = load_board("jetson-xavier-nx")
    points = published_tables(on)
    policy = linux_default(lambda seed: scenario("T2", on, points, seed), seeds=(9001,))
    assert [policy.placements[app].unit for app in "ab"] == ["gpu", "carmel0"]
    assert policy.governors == {"gpu": "nvhost_podgov", "carmel0": "schedutil",
                                "carmel1": "schedutil", "carmel2": "schedutil"}  # fmt: skip


def test_best_static_is_the_cheapest_of_all_settings_without_misses():
    make = lambda seed: periodic(45.0, horizon_s=10.0, accuracy_floor_pct=75.0)  # noqa: E731
    policy = best_static(cases(make, BOARD, TABLES), seeds=(9001,))
    assert policy.clocks == {"gpu": 500.0}
    assert policy.placements["app"].subnet == "large"
    hopeless = lambda seed: periodic(5.0, horizon_s=1.0)  # noqa: E731
    assert best_static(cases(hopeless, BOARD, TABLES), seeds=(9001,)) is None


def test_best_static_of_what_cannot_be_done_misses_about_as_few_as_can_be():
    # The large network is too slow for the first half, the small one below the floor in the second.
    steps = (Change(5.0, "app", accuracy_floor_pct=75.0), Change(5.0, "app", period_ms=60.0))
    workload = periodic(15.0, changes=steps, horizon_s=10.0, deadline_ms=50.0)
    chosen = best_static(cases(lambda seed: workload, BOARD, TABLES), seeds=(9001,))
    missed = {}
    for net in ("small", "large"):
        for mhz in BOARD.units[0].freqs:
            log = run(workload, BOARD, TABLES, fixed(net, mhz), 9001)
            missed[net, mhz] = summarise(log, workload, TABLES, BOARD)["deadline_miss_pct"]
    least = min(missed.values())
    assert 1 < missed[chosen.placements["app"].subnet, chosen.clocks["gpu"]] <= least + 1


def test_best_static_of_two_apps_shares_the_clock():
    apps = tuple(App(n, "net", 60.0, period_ms=60.0) for n in "ab")
    make = lambda seed: Workload("w", 5.0, apps)  # noqa: E731
    policy = best_static(cases(make, BOARD, TABLES), seeds=(9001,))
    assert {p.subnet for p in policy.placements.values()} == {"small"}
    assert policy.clocks == {"gpu": 500.0}


def test_the_manager_saves_energy_on_the_published_points():
    on = load_board("jetson-xavier-nx")
    points = published_tables(on)
    runs = simulate_many(["S2", "S4", "T2"], on, points, seeds=(300, 301))
    table = compare_policies(runs).set_index("scenario")
    assert (table["energy_reduction_pct"] > 5).all()
    assert (table["counted_pct"] == 100).all()


def test_runs_on_all_cores_are_the_same_and_only_those_asked_for():
    on = load_board("jetson-xavier-nx")
    points = published_tables(on)
    build = {name: contenders(on, points)[name] for name in ("linux", "manager")}
    one = simulate_many(["S2"], on, points, build, (300,))
    many = simulate_each(["S2"], on, points, (300,), contenders, ["linux", "manager"])
    pd.testing.assert_frame_equal(one, many[one.columns])


def test_the_sign_of_the_saving_does_not_hang_on_coefficients_that_nobody_published():
    on = load_board("jetson-xavier-nx")
    table = sensitivity(["T2"], on, published_tables, (300, 301), 3, ("asked", "equal"))
    assert table["draw"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table["seed"].tolist() == [300, 300, 301, 301, 300, 300]
    asked, equal = (table[table["floor"] == floor] for floor in ("asked", "equal"))
    for saved in (asked["energy_reduction_pct"], equal["energy_reduction_pct"]):
        assert (saved > 0).all()
        assert saved.std() > 0.3  # the coefficients do not cancel
    gained = equal["accuracy_mean_pct_manager"] - equal["accuracy_mean_pct_baseline"]
    assert (gained > -0.01).all()


def test_published_points_are_the_published_numbers_at_the_highest_clock():
    on = load_board("jetson-xavier-nx")
    frame = published_frame(on)
    top = frame[frame["gpu_mhz"] == on.gpu.max_mhz].set_index("subnet")
    assert top["latency_ms"].round(3).tolist() == [41.159, 45.421, 49.436, 51.079, 56.747, 61.735]
    table = published_tables(on)["ofa-mbv3-w1.2"]
    assert (table.main_unit, table.largest.subnet, table.smallest.subnet) == (
        "gpu", "level5", "level0")  # fmt: skip
    assert table.source in ("simulated", "estimated")
    half = frame[(frame["gpu_mhz"] == 510) & (frame["subnet"] == "level5")]["latency_ms"].item()
    share = on.gpu.memory_share
    assert half == pytest.approx(61.735 * (share + (1 - share) * on.gpu.max_mhz / 510))


def test_a_slower_cluster_takes_longer_in_proportion():
    table = published_tables(load_board("hikey960"))["ofa-mbv3-w1.2"]
    little, big = (table.point("cpu6", unit).latency_ms[-1] for unit in ("little", "big"))
    assert big == 1858.0
    assert little == pytest.approx(1858.0 * (1024 * 2362) / (592 * 1844))
    assert table.main_unit == "big"


def _row(**values):
    return {"model": "net", "subnet": "a", "board": "tiny", "unit": "gpu", "batch": 1,
            "gpu_mhz": 1000.0, "accuracy_val_pct": 70.0, "latency_ms": 10.0,
            "source": "measured"} | values  # fmt: skip


def test_a_table_is_filled_in_at_the_clocks_it_lacks():
    on = board(unit(memory_share=0.2))
    point = PointTable(make_table([_row()]), on).point("a", "gpu")
    assert point.latency_ms == pytest.approx((10 * (0.2 + 0.8 * 4), 10 * (0.2 + 0.8 * 2), 10))
    assert point.accuracy_test_pct == 70.0
    measured = PointTable(make_table([_row(), _row(gpu_mhz=250.0, latency_ms=33.0)]), on)
    assert measured.point("a", "gpu").latency_ms[0] == 33.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([_row(unit="dsp")], r"'a'.*dsp"),
        ([_row(gpu_mhz=600.0)], r"gpu_mhz 600"),
        ([_row(), _row(cores=2)], r"two rows for one clock"),
        ([_row(), _row(model="other")], r"one model"),
        ([_row(accuracy_val_pct=None)], r"no accuracy"),
    ],
)
def test_a_table_of_another_board_or_setting_is_refused(rows, message):
    with pytest.raises(TableError, match=message):
        PointTable(make_table(rows), BOARD)


def test_missing_points_are_named():
    with pytest.raises(TableError, match=r"'huge'.*'gpu'"):
        TABLES["net"].point("huge", "gpu")


# Just in time.


def just_in_time(workload, seed=0, on=BOARD, points=TABLES):
    log = run(workload, on, points, JustInTime(on, points), seed)
    return log, summarise(log, workload, points, on)


def test_just_in_time_serves_s1_without_misses():
    on = load_board("jetson-xavier-nx")
    points = published_tables(on)
    for seed in range(2):
        workload = scenario("S1", on, points, seed).workload
        _, summary = just_in_time(workload, seed, on, points)
        assert summary["missed"] == 0


@pytest.mark.parametrize(("floor_pct", "chosen"), [(0.0, "xs"), (72.0, "s"), (79.8, "xl"),
                                                   (90.0, "xs")])  # fmt: skip
def test_just_in_time_uses_the_smallest_network_over_the_floor(floor_pct, chosen):
    workload = periodic(100.0, horizon_s=3.0, accuracy_floor_pct=floor_pct)
    log, summary = just_in_time(workload, points=LADDER_TABLES)
    assert {e["subnet"] for e in log if e["event"] == "start"} == {chosen}
    assert summary["late"] == 0


def test_just_in_time_recovers_after_a_competitor():
    changes = [Change(t, unit="gpu", stretch=x, announced=False) for t, x in ((2, 2.0), (5, 1.0))]
    workload = periodic(60.0, horizon_s=10.0, changes=changes, accuracy_floor_pct=75.0)
    log, _ = just_in_time(workload)
    frames = frames_of(log, workload, TABLES)
    missed = frames[~frames["on_time"]]
    assert len(missed) <= 3
    assert missed["arrival_s"].between(1.9, 2.3).all()
    # And then it saves again.
    clocks = [(e["t_s"], e["gpu_mhz"]) for e in log
              if e["event"] == "set" and e["reason"] == "acts"]  # fmt: skip
    assert max(mhz for t_s, mhz in clocks if 2.5 < t_s < 5) == 1000.0
    assert max(mhz for t_s, mhz in clocks if t_s > 6) < 1000.0


def test_just_in_time_takes_less_energy_than_the_highest_clock():
    workload = periodic(60.0, horizon_s=5.0)
    _, summary = just_in_time(workload)
    fast = summarise(run(workload, BOARD, TABLES, fixed("small")), workload, TABLES, BOARD)
    assert summary["missed"] == 0
    assert summary["energy_mj"] < fast["energy_mj"]


def test_just_in_time_goes_elsewhere_while_a_unit_is_lost():
    on = board(unit(), unit("cpu", "cpu", cores=2))
    points = tables(on, units=("gpu", "cpu"))
    changes = [Change(t, unit="gpu", lost=t == 2.0, announced=False) for t in (2.0, 4.0)]
    workload = periodic(500.0, horizon_s=8.0, changes=changes)
    log, summary = just_in_time(workload, 0, on, points)
    units = {e["frame"]: e["unit"] for e in log if e["event"] == "start"}
    assert [units[i] for i in (0, 3, 5, 7, 9, 12)] == ["gpu"] * 2 + ["cpu"] * 2 + ["gpu"] * 2
    assert summary["missed"] == 0


def test_just_in_time_of_two_apps():
    apps = tuple(App(n, "net", 80.0, period_ms=80.0, accuracy_floor_pct=75.0) for n in "ab")
    _, summary = just_in_time(Workload("w", 8.0, apps), 1)
    assert summary["deadline_miss_pct"] <= 1
