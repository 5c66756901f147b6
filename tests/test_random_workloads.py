"""Random workloads: every seed gives a valid case that anybody can run, and always the same one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import NOISY, NOISY_TABLES, board, net_table, tables, unit

from dynlib.errors import TableError
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Placement
from dynlib.points import PointTable
from dynlib.runtime.loop import Loop
from dynlib.runtime.rivals import Static
from dynlib.runtime.simulation import Simulation
from dynlib.workload import CLOSED_LOOP, dump_workload, load_workload
from suite.papers.dynamic_ofa import published_tables
from suite.studies.random_workloads import LOAD, noise_wrong, random_case, smallest_load

TWO = NOISY_TABLES | tables(NOISY, units=("gpu", "cpu"), model="other")
SEEDS = st.integers(0, 2**32)
XAVIER = load_board("jetson-xavier-nx")
XAVIER_TABLES = published_tables(XAVIER)


def smallest(case, governor=""):
    """Everybody's smallest network, at the board's own governors or all at one."""
    placements = {
        app.name: Placement(case.tables[app.model].smallest.subnet, app.start_unit)
        for app in case.workload.apps
    }
    governors = {unit.name: governor or unit.governor for unit in case.board.units}
    return Static("smallest", placements, governors=governors)


class Thorough(Simulation):
    """Settles after every look of a governor, too."""

    settle = Loop.settle


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, closed=st.booleans(), governor=st.sampled_from(("", "powersave", "schedutil")))
def test_nothing_is_lost_where_only_governors_looked(seed, closed, governor):
    case = random_case(XAVIER, XAVIER_TABLES, seed, closed)
    policy = smallest(case, governor)
    quick = Simulation(case, policy, seed).run()
    assert list(quick) == list(Thorough(case, policy, seed).run())


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, closed=st.booleans())
def test_every_seed_gives_a_case_that_anybody_can_run(seed, closed):
    case = random_case(NOISY, TWO, seed, closed)
    workload = case.workload
    assert 1 <= len(workload.apps) <= 4
    assert 20 <= workload.horizon_s <= 30
    for app in workload.apps:
        table = case.tables[app.model]
        accuracies = [point.accuracy_val_pct for point in table.on(table.main_unit)]
        assert min(accuracies) <= app.accuracy_floor_pct <= max(accuracies)
        assert closed or app.arrival not in CLOSED_LOOP
    assert all(change.t_s < workload.horizon_s for change in workload.changes)
    summary = case.simulate(smallest(case), seed).summary()
    assert summary["offered"] > 0
    assert summary["offered"] == summary["on_time"] + summary["missed"]


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_what_is_asked_for_at_first_fits_the_board(seed):
    case = random_case(XAVIER, XAVIER_TABLES, seed)
    # Whole frames: a trace may have one less than its share allows.
    assert 0.8 * LOAD[0] <= smallest_load(case) <= LOAD[1] + 1e-9


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_a_case_is_its_seed_and_survives_a_file(seed, tmp_path_factory):
    workload = random_case(NOISY, TWO, seed).workload
    assert random_case(NOISY, TWO, seed).workload.digest == workload.digest
    assert random_case(NOISY, TWO, seed + 1).workload.apps != workload.apps
    path = tmp_path_factory.mktemp("w") / "w.toml"
    assert load_workload(dump_workload(workload, path)) == workload


def test_everything_that_may_happen_happens():
    workloads = [random_case(NOISY, TWO, seed, closed=True).workload for seed in range(120)]
    arrivals = {app.arrival for workload in workloads for app in workload.apps}
    assert arrivals == {"periodic", "server", "trace", "offline", *CLOSED_LOOP}
    changes = [change for workload in workloads for change in workload.changes]
    for key in ("deadline_ms", "period_ms", "accuracy_floor_pct"):
        announced = {change.announced for change in changes if getattr(change, key) is not None}
        assert announced == {True, False}
    for key in ("cap_mhz", "stretch", "lost", "power_mw"):
        assert any(getattr(change, key) is not None for change in changes)
    assert {len(workload.apps) for workload in workloads} == {1, 2, 3, 4}
    assert {app.priority for workload in workloads for app in workload.apps} == {0, 1, 2}


def test_what_is_capped_or_taken_away_comes_back():
    for seed in range(120):
        workload = random_case(NOISY, TWO, seed).workload
        last = {}
        for change in workload.changes:
            for key in ("cap_mhz", "stretch", "lost", "power_mw"):
                if (value := getattr(change, key)) is not None:
                    last[change.unit, key] = value
        restored = {"cap_mhz": 0.0, "stretch": 1.0, "lost": False, "power_mw": 0.0}
        assert all(value == restored[key] for (_, key), value in last.items())


def test_a_unit_is_lost_only_where_everybody_can_go_elsewhere():
    on = board(unit(), unit("cpu", "cpu", cores=2))
    for seed in range(80):
        changes = random_case(on, tables(on), seed).workload.changes
        assert not any(change.lost for change in changes)


def test_memory_is_capped_where_tables_know_it():
    table = net_table([(60, 5, 1), (80, 20, 4)])
    on = board(unit(noise_cv=0.05))
    workloads = [random_case(on, {"net": table}, seed).workload for seed in range(60)]
    caps = [
        (change.memory_mb, len(workload.apps))
        for workload in workloads
        for change in workload.changes
        if change.memory_mb
    ]
    assert caps
    assert all(count <= memory_mb <= 4 * count for memory_mb, count in caps)
    assert not any(
        change.memory_mb is not None
        for seed in range(60)
        for change in random_case(NOISY, TWO, seed).workload.changes
    )


def test_most_can_be_served_and_some_cannot():
    missed = []
    for seed in range(40):
        case = random_case(XAVIER, XAVIER_TABLES, seed)
        run = case.simulate(Manager(XAVIER, XAVIER_TABLES), seed)
        missed.append(run.summary()["deadline_miss_pct"])
    assert np.median(missed) < 5
    assert max(missed) > 20


def test_the_run_scatters_and_the_manager_believes_its_table():
    case = random_case(XAVIER, XAVIER_TABLES, 0)
    wrong = noise_wrong(case, 0.15)
    model = next(iter(case.tables))
    assert {round(p.noise_cv, 9) for p in wrong.tables[model].points.values()} == {0.15}
    before = {p.noise_cv for p in case.tables[model].points.values()}
    assert before == {unit.noise_cv for unit in XAVIER.units}
    for key, point in case.tables[model].points.items():
        assert wrong.tables[model].points[key].latency_ms == point.latency_ms
    manager = Manager(XAVIER, case.tables)
    assert (
        wrong.simulate(manager).summary()["offered"] == case.simulate(manager).summary()["offered"]
    )


def test_noise_wrong_keeps_where_a_network_can_be_interrupted():
    table = NOISY_TABLES["net"]
    cut = PointTable(table.frame, NOISY, {"large": [1.0, 3.0]})
    case = random_case(NOISY, {"net": cut}, 0)
    assert noise_wrong(case, 0.08).tables["net"].point("large", "gpu").segments == (0.25, 0.75)


def test_a_negative_scatter_is_refused():
    with pytest.raises(TableError, match=r"cv: got -1"):
        noise_wrong(random_case(NOISY, TWO, 0), -1)
