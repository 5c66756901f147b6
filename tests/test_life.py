"""Workloads from public facts: the committed files are what the command makes, and they run."""

import subprocess
import sys
from pathlib import Path

import pytest
from runtime_cases import board, tables, unit

from dynlib.errors import WorkloadError
from dynlib.machine.bind import load_board
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Placement
from dynlib.runtime.rivals import Static
from dynlib.workload import load_workload
from suite.papers.dynamic_ofa import published_tables
from suite.studies.life import (
    LIFE,
    LOAD,
    TRACE_LOAD,
    TWITTER_EVERY,
    XRBENCH,
    largest_loads,
    life_case,
    life_workload,
    workloads_folder,
)

ROOT = Path(__file__).parents[1]
TINY = board()


@pytest.fixture(scope="module")
def xavier():
    on = load_board("jetson-xavier-nx")
    return on, published_tables(on)


def largest(case):
    """Everybody's largest network at the highest clocks."""
    placements = {
        app.name: Placement(case.tables[app.model].largest.subnet, app.start_unit)
        for app in case.workload.apps
    }
    return Static("largest", placements, {unit.name: unit.max_mhz for unit in case.board.units})


def test_the_command_makes_the_committed_files(tmp_path):
    command = [sys.executable, "-m", "suite.studies.life", str(tmp_path)]
    subprocess.run(command, cwd=ROOT / "notebooks", check=True, env={"PYTHONPATH": str(ROOT)})
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in workloads_folder().glob("*.toml")}
    assert sorted(made) == sorted(f"{name}.toml" for name in LIFE)
    assert made == committed


@pytest.mark.parametrize("name", LIFE)
def test_a_file_is_its_facts(name):
    path = workloads_folder() / f"{name}.toml"
    assert load_workload(path) == life_workload(name)


def test_the_facts_of_xrbench():
    gaming = life_workload("xrbench_vr_gaming")
    assert [app.model for app in gaming.apps] == ["ES", "GE", "HT"]
    assert [round(1000 / app.period_ms) for app in gaming.apps] == [60, 60, 45]
    assert all(app.deadline_ms == app.period_ms for app in gaming.apps)


def test_a_network_that_follows_another_now_and_then_has_some_of_its_frames():
    workload = life_workload("xrbench_ar_assistant")
    keyword, speech = (workload.app(name) for name in ("KD_res8_narrow", "ASR_EM_24L"))
    heard = {round(t_ms, 3) for t_ms, _ in workload.arrivals(keyword, 0)}
    assert set(speech.trace_ms) <= heard
    assert 0.3 * len(heard) < len(speech.trace_ms) < 0.7 * len(heard)  # stated: a half
    assert speech.deadline_ms == keyword.deadline_ms


def test_the_traces_are_as_long_and_as_bursty_as_they_were():
    code = life_workload("azure_llm_code").apps[0]
    assert len(code.trace_ms) == 881
    assert code.trace_ms[0] == 1250.537
    tweets = life_workload("twitter").apps[0].trace_ms
    assert len(tweets) == -(-13394 // TWITTER_EVERY)
    early = sum(t_ms < 60_000 for t_ms in tweets)
    assert 3 * early < len(tweets) - early


@pytest.mark.parametrize("name", LIFE)
def test_a_case_has_the_load_it_was_asked_for_and_runs(name, xavier):
    on, points = xavier
    case = life_case(name, on, points)
    expected = LOAD if name in XRBENCH else TRACE_LOAD
    assert largest_loads(case.workload, points) == {"gpu": pytest.approx(expected)}
    summary = case.simulate(largest(case)).summary()
    assert summary["offered"] > 500
    assert summary["deadline_miss_pct"] < 20
    for app in case.workload.apps:
        assert points[app.model].on(app.start_unit)
        accuracies = [point.accuracy_val_pct for point in points[app.model].on(app.start_unit)]
        assert min(accuracies) < app.accuracy_floor_pct < max(accuracies)


def test_it_is_the_same_work_at_another_pace(xavier):
    slow, fast = (life_case("xrbench_outdoor_a", *xavier, load=load) for load in (0.35, 0.7))
    assert slow.workload.horizon_s == pytest.approx(2 * fast.workload.horizon_s)
    for one, other in zip(slow.workload.apps, fast.workload.apps, strict=True):
        assert one.deadline_ms == pytest.approx(2 * other.deadline_ms)
        assert one.trace_ms == pytest.approx([2 * t_ms for t_ms in other.trace_ms])
        slow_frames, fast_frames = (
            len(list(case.workload.arrivals(app, 0))) for case, app in ((slow, one), (fast, other))
        )
        assert slow_frames == fast_frames


def test_models_take_the_tables_in_turn_and_the_busiest_unit_counts():
    on = board(unit(), unit("cpu", "cpu", cores=2))
    nets = tables(on) | tables(on, units=("cpu",), model="other")
    case = life_case("xrbench_vr_gaming", on, nets)
    assert [app.model for app in case.workload.apps] == ["net", "other", "net"]
    assert [app.start_unit for app in case.workload.apps] == ["gpu", "cpu", "gpu"]
    # The CPU is ten times slower: 60 frames there are more than 105 on the GPU.
    loads = largest_loads(case.workload, nets)
    assert loads["cpu"] == pytest.approx(LOAD)
    assert loads["gpu"] < LOAD


def test_a_manager_runs_them(xavier):
    case = life_case("xrbench_outdoor_b", *xavier)
    summary = case.simulate(Manager(*xavier)).summary()
    assert summary["deadline_miss_pct"] < 10


def test_what_is_unknown_or_no_load_is_refused():
    with pytest.raises(WorkloadError, match=r"xrbench_vr_game.*xrbench_vr_gaming"):
        life_case("xrbench_vr_game", TINY, tables(TINY))
    with pytest.raises(WorkloadError, match=r"load 0"):
        life_case("twitter", TINY, tables(TINY), load=0)
    with pytest.raises(WorkloadError, match=r"unknown workload"):
        life_workload("twiter")
