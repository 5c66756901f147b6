import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import recompute
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dynlib.boards.board import (
    Board,
    LayerCost,
    Measured,
    MemoryController,
    Meter,
    Mode,
    Opp,
    Thermal,
    Unit,
)
from dynlib.boards.file import BOARD_DIR, list_boards, read_board, save_board
from dynlib.boards.governors import GOVERNORS
from dynlib.errors import BoardError
from dynlib.machine.bind import host_board, load_board
from dynlib.manager import Manager
from dynlib.points import PointTable, make_table
from dynlib.runtime.case import Case
from dynlib.workload import App, Workload

NX = "jetson-xavier-nx"
NX_TEXT = (BOARD_DIR / f"{NX}.toml").read_text()
ALL_UNITS = [(name, unit) for name in list_boards() for unit in load_board(name).units]


def write(tmp_path, text):
    path = tmp_path / "board.toml"
    path.write_text(text)
    return path


def test_the_boards_load():
    assert len(list_boards()) == 13
    for name in list_boards():
        board = load_board(name)
        assert board.digest == load_board(BOARD_DIR / f"{name}.toml").digest
        assert board.cpus
        assert hash(board) == hash(load_board(name))


def test_hikey960_reproduces_the_kernel_energy_model():
    board = load_board("hikey960")
    powers = {u.name: [round(u.dynamic_mw(f)) for f in u.freqs] for u in board.units}
    assert powers == {"big": [243, 500, 804, 1162, 1572], "little": [29, 70, 125, 188, 245]}
    assert board.unit("big").dynamic_mw(903, 4) == pytest.approx(4 * 550 * 903 * 0.7**2 / 1e3)


def test_rk3588_gpu_at_its_top_clock_has_the_published_power():
    gpu = load_board("rock-5b").gpu
    assert gpu.dynamic_mw(gpu.max_mhz) == pytest.approx(2155, abs=1)


def test_an_idle_rock_5b_draws_what_was_measured_at_the_wall():
    board = load_board("rock-5b")
    assert board.power_mw({}, {}) == pytest.approx(3600, rel=0.01)
    assert board.static_status == "estimated"


def test_xavier_nx_units_and_clocks():
    board = load_board(NX)
    assert [u.name for u in board.units] == ["carmel0", "carmel1", "carmel2", "gpu"]
    assert board.gpu is board.unit("gpu")
    assert (board.gpu.max_mhz, board.unit("carmel0").max_mhz) == (1109.25, 1907.2)
    assert [u.settle_ms for u in board.units] == [1.0, 1.0, 1.0, 5.0]
    assert board.memory.settle_ms == 8.0
    assert all(u.stall_ms <= 0.1 for u in board.units)
    assert dict(board.modes[-1].cores) == {"carmel0": 2, "carmel1": 2, "carmel2": 2}


def test_the_published_clocks_and_modes_of_thor():
    board = load_board("jetson-agx-thor")
    assert [u.cpus for u in board.cpus] == [(cpu, cpu + 1) for cpu in range(0, 14, 2)]
    for cluster in board.cpus:  # as many levels as the cooling device has, and what was read
        assert (len(cluster.opps), cluster.max_mhz, cluster.governor) == (49, 2601, "schedutil")
        assert {972, 1998} < set(cluster.freqs)
    assert (board.gpu.max_mhz, board.gpu.governor) == (1575, "nvhost_podgov")
    assert {315, 1386, 1530} < set(board.gpu.freqs)
    assert all(mhz % 9 == 0 for unit in board.units for mhz in unit.freqs)
    assert [board.memory.opps[i].freq_mhz for i in (0, -1)] == [665.6, 4266]
    modes = {m.name: (m.gpu_mhz, m.cpu_mhz, sum(dict(m.cores).values())) for m in board.modes}
    assert modes == {
        "MAXN": (1575, 2601, 14), "120W": (1386, 2601, 14), "90W": (1530, 2601, 12),
        "70W": (1530, 1998, 12)}  # fmt: skip
    assert (board.thermal.passive_c, board.thermal.critical_c) == ((109,), 114.5)


def test_power_and_times_of_thor_are_near_the_two_measured_runs():
    """The GPU worked for 67 and 68 % of them, one core fed it, and clocks were locked."""
    board = load_board("jetson-agx-thor")
    (rows,) = board.measured
    clocks = {unit.name: unit.max_mhz for unit in board.cpus}
    for (mhz, *rails, _, _), busy in zip(rows.rows, (0.68, 0.67), strict=True):
        power_mw = board.power_mw(clocks | {"gpu": mhz}, {"gpu": busy, "v3ae-0": 1})
        assert power_mw == pytest.approx(sum(rails), rel=0.05)
    slow_ms, fast_ms = rows.column("conv_ms")
    assert board.gpu.clock_scale(1386) == pytest.approx(slow_ms / fast_ms, rel=1e-3)
    assert board.power_source == "estimated"


@pytest.mark.parametrize(("name", "bound"), [(NX, 0.03), ("jetson-nano", 0.04)])
def test_power_of_a_busy_gpu_matches_the_measured_rows(name, bound):
    board, rows = load_board(name), load_board(name).measured[0]
    for mhz, mw in list(zip(rows.column("gpu_mhz"), rows.column("power_mw_c4"), strict=True))[1:]:
        assert board.power_mw({"gpu": mhz}, {"gpu": 1.0}) == pytest.approx(mw, rel=bound)


@pytest.mark.parametrize(("name", "bound"), [(NX, 0.055), ("jetson-nano", 0.06)])
def test_power_of_a_partly_idle_gpu_matches_the_measured_rows(name, bound):
    board, rows = load_board(name), load_board(name).measured[0]
    for mhz, mw, ips1, _, ips4 in rows.rows[1:]:
        assert board.power_mw({"gpu": mhz}, {"gpu": ips1 / ips4}) == pytest.approx(mw, rel=bound)


def test_published_form_of_the_xavier_nx_fit():
    """Fitted: 4.30 + 0.00858*f*(V/Vmax)^2, at most 2.9 % off."""
    gpu, rows = load_board(NX).gpu, load_board(NX).measured[0]
    errors = [
        (4.30 + 0.00858 * mhz * (gpu.voltage_mv(mhz) / 950) ** 2) / (mw / 1000) - 1
        for mhz, mw in zip(rows.column("gpu_mhz"), rows.column("power_mw_c4"), strict=True)
        if mhz > 114.75
    ]
    assert max(map(abs, errors)) == pytest.approx(0.029, abs=0.001)


def test_sources():
    board = load_board(NX)
    assert board.source([]) == board.source(["gpu"]) == "simulated"
    assert board.source(["gpu", "carmel0"]) == "estimated"
    assert board.power_source == "estimated"
    assert load_board("hikey960").source([]) == "estimated"
    assert load_board("hikey960").unit("big").power_source == "estimated"


@pytest.mark.parametrize("name", list_boards())
def test_perturbed_moves_every_coefficient_that_nobody_published_within_its_interval(name):
    board, count = load_board(name), 32
    within = {
        "published": 0.0,
        "fitted": board.fitted_within_pct / 100,
        "estimated": board.estimated_within_pct / 100,
    }
    draws = board.perturbed(count)
    assert draws == board.perturbed(count) != board.perturbed(count, seed=1)

    def check(value, drawn, status):
        if not value:
            assert drawn == [value] * count
            return
        # One draw in each of `count` equal parts of the interval: none is left out.
        shares = sorted((d / value - 1 + within[status]) / (2 * within[status] or 1) for d in drawn)
        if within[status]:
            assert [int(count * share) for share in shares] == list(range(count))
        assert within[status] or drawn == [value] * count

    if board.static_mw is not None:
        check(board.static_mw, [d.static_mw for d in draws], board.static_status)
    for i, unit in enumerate(board.units):
        others = [d.units[i] for d in draws]
        check(unit.c_uw_mhz_v2, [u.c_uw_mhz_v2 for u in others], unit.c_status)
        top_mv, low_mv = unit.opps[-1].voltage_mv, unit.opps[0].voltage_mv
        assert all(u.freqs == unit.freqs and u.opps[-1].voltage_mv == top_mv for u in others)
        check(top_mv - low_mv, [top_mv - u.opps[0].voltage_mv for u in others], unit.voltage_status)
        assert all(0 <= u.idle_fraction <= 1 and 0 <= u.memory_share <= 1 for u in others)
        if unit.cost:
            times = [u.cost.us_per_mmac for u in others]
            check(unit.cost.us_per_mmac, times, unit.cost.status)
            assert {u.cost.cores for u in others} == {unit.cost.cores}


def test_perturbed_draws_coefficients_apart_but_silicon_of_one_model_together():
    draws = load_board(NX).perturbed(64)
    drawn = pd.DataFrame({
        "static": [d.static_mw for d in draws],
        "gpu": [d.gpu.c_uw_mhz_v2 for d in draws],
        "idle": [d.gpu.idle_fraction for d in draws],
        "cpu": [d.unit("carmel0").c_uw_mhz_v2 for d in draws],
    })  # fmt: skip
    apart = drawn.corr().to_numpy()[~np.eye(4, dtype=bool)]
    assert abs(apart).max() < 0.4
    for board in draws:
        first, second = (replace(board.unit(f"carmel{i}"), name="", cpus=()) for i in (0, 1))
        assert first == second


def test_a_board_file_states_its_own_intervals(tmp_path):
    exact = replace(load_board(NX), fitted_within_pct=0.0, estimated_within_pct=5.0)
    again = load_board(save_board(exact, tmp_path / "exact.toml"))
    assert again == exact
    (drawn,) = again.perturbed(1)
    assert (drawn.static_mw, drawn.gpu.c_uw_mhz_v2) == (exact.static_mw, exact.gpu.c_uw_mhz_v2)
    ratio = drawn.unit("carmel0").c_uw_mhz_v2 / exact.unit("carmel0").c_uw_mhz_v2
    assert ratio == pytest.approx(1, abs=0.05)
    assert ratio != 1
    published = replace(exact, estimated_within_pct=0.0)
    assert published.perturbed(3) == [published] * 3


@settings(deadline=None)
@given(st.sampled_from(ALL_UNITS), st.floats(0, 5000))
def test_rounding_to_clocks(named, mhz):
    _, unit = named
    above, below = unit.at_or_above(mhz), unit.at_or_below(mhz)
    assert {above, below} <= set(unit.freqs)
    assert above >= mhz - 1e-6 or above == unit.max_mhz
    assert below <= mhz + 1e-6 or below == unit.min_mhz
    assert not [f for f in unit.freqs if mhz <= f < above]
    assert not [f for f in unit.freqs if below < f <= mhz]
    assert all(unit.at_or_above(f) == unit.at_or_below(f) == f for f in unit.freqs)


@settings(deadline=None)
@given(st.sampled_from(ALL_UNITS), st.floats(0, 1), st.floats(0, 1), st.data())
def test_power_rises_with_clock_and_load(named, share_a, share_b, data):
    board, unit = load_board(named[0]), named[1]
    low, high = sorted(data.draw(st.tuples(*[st.sampled_from(unit.freqs)] * 2)))
    less, more = sorted((share_a * unit.cores, share_b * unit.cores))
    assert unit.power_mw(low, less) <= unit.power_mw(high, less) + 1e-9
    assert unit.power_mw(low, less) <= unit.power_mw(low, more) + 1e-9
    assert unit.power_mw(high, unit.cores) == pytest.approx(unit.dynamic_mw(high, unit.cores))
    whole = board.power_mw({unit.name: high}, {unit.name: more})
    assert board.static_mw <= whole <= board.power_mw({unit.name: high}, {unit.name: unit.cores})


FAULTS = {
    "kHz": ("[114.75, 846]", "[114750, 846]", ["gpu.opps[0]", "kHz", "MHz"]),
    "Hz": ("[114.75, 846]", "[114750000, 846]", ["gpu.opps[0]", "Hz", "MHz"]),
    "GHz": ("[114.75, 846]", "[0.11475, 846]", ["gpu.opps[0]", "GHz", "MHz"]),
    "volts": ("[114.75, 846]", "[114.75, 0.846]", ["gpu.opps[0]", "looks like V", "mV"]),
    "microvolts": ("[114.75, 846]", "[114.75, 846000]", ["gpu.opps[0]", "uV", "mV"]),
    "no pair": ("[114.75, 846]", "[114.75]", ["gpu.opps[0]", "pair"]),
    "unsorted": ("[204, 846]", "[104, 846]", ["gpu.opps[1]", "ascending"]),
    "falling volts": ("[204, 846]", "[204, 820]", ["gpu.opps[1]", "820 mV after 846", "not fall"]),
    "no capacity": ("capacity = 1024", "capacity = 0", ["cluster[0].capacity", "from 1 to"]),
    "microwatts": ("static_mw = 4285", "static_mw = 4285000", ["power.static_mw", "to 1e+06"]),
    "kilowatts": ("budget_w = 15", "budget_w = 4280", ["budget_w", "to 1000"]),
    "twice": ("[204, 846]", "[114.75, 846]", ["gpu.opps[1]", "ascending"]),
    "typo": ("idle_fraction = 0.386", "idle_fractoin = 0.386", ["gpu.idle_fraction", "missing"]),
    "negative": ("c_uw_mhz_v2 = 9523", "c_uw_mhz_v2 = -1", ["gpu.c_uw_mhz_v2", "-1"]),
    "not a number": ("c_uw_mhz_v2 = 9523", "c_uw_mhz_v2 = nan", ["gpu.c_uw_mhz_v2"]),
    "forty digits": ("c_uw_mhz_v2 = 9523", f"c_uw_mhz_v2 = {'9' * 40}",
                     ["gpu.c_uw_mhz_v2", "uW/MHz/V^2 from 0 to 1e+06"]),
    "huge": ("overhead_us = 4097", "overhead_us = 1e30", ["cost.overhead_us", "to 1e+07"]),
    "heavy": ("shunt_uohm = 5000", "shunt_uohm = 1e20", ["sensor[0].shunt_uohm", "to 1e+08"]),
    "text": ("c_uw_mhz_v2 = 9523", 'c_uw_mhz_v2 = "9523"', ["gpu.c_uw_mhz_v2", "a number"]),
    "true": ("c_uw_mhz_v2 = 9523", "c_uw_mhz_v2 = true", ["gpu.c_uw_mhz_v2", "a number"]),
    "watts": ("static_mw = 4285", "static_mw = 4.285", ["power.static_mw", "W", "mW"]),
    "status": ('c_status = "fitted"', 'c_status = "guess"', ["gpu.c_status", "published, fitted"]),
    "governor": ('"nvhost_podgov"', '"nvhost_podgouv"', ["gpu.governor", "nvhost_podgov"]),
    "share": ("idle_fraction = 0.386", "idle_fraction = 38.6", ["gpu.idle_fraction", "to 1"]),
    "mode clock": ("gpu_mhz = 803.25", "gpu_mhz = 803250", ["power_mode[4].gpu_mhz", "kHz"]),
    "no memory clocks": ("[204, 0], [408, 0]", "[204, 0], [408000, 0]", ["memory.opps[1]"]),
    "ragged": ("  [204, 5490, 5.43, 5620, 7.36],", "  [204, 5490],", ["measured[0].rows"]),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_board_files_are_refused(tmp_path, fault):
    old, new, expected = FAULTS[fault]
    assert old in NX_TEXT
    path = write(tmp_path, NX_TEXT.replace(old, new, 1))
    with pytest.raises(BoardError) as caught:
        load_board(path)
    for part in (str(path), "expected", *expected):
        assert part in str(caught.value)


@pytest.mark.faults
def test_all_faults_of_a_file_are_one_error_of_a_line_each(tmp_path):
    text, expected = NX_TEXT, []
    for fault, (old, new, parts) in FAULTS.items():
        # Where no other fault is in the way.
        if old in text and fault not in ("unsorted", "twice", "falling volts", "microwatts"):
            text = text.replace(old, new, 1)
            expected.append(parts)
    path = write(tmp_path, text)
    with pytest.raises(BoardError) as caught:
        load_board(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected) >= 10, lines
    for parts in expected:
        needed = [f"{path}: ", "expected", *parts]
        assert [line for line in lines if all(part in line for part in needed)], parts


@pytest.mark.faults
def test_a_file_says_its_faults_once(tmp_path):
    # A typo is what is missing, not an unknown key too; wrong columns say nothing of the rows, nor
    # a wrong cluster of the cores of a mode; wrong clocks are all named.
    changes = {
        "idle_fraction = 0.386": "idle_fractoin = 0.386",
        "columns = [": "columns = [3, ",
        "cpus = [0, 1]": "cpus = []",
        "[114.75, 846], [204, 846]": "[114.75, 8], [204]",
    }
    text = NX_TEXT
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(BoardError) as caught:
        load_board(write(tmp_path, text))
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert keys == ["cluster[0].cpus", "gpu.opps[0]", "gpu.opps[1]", "gpu.idle_fraction",
                    "measured[0].columns"]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize(("old", "new", "words"), [
    ("cpus = [2, 3]", "cpus = [1, 2]", r"cluster: cpus \[1\] are named twice; expected each CPU"),
    ("cpus = [2, 3]", "cpus = [2, 2]", r"cluster: cpus \[2\] are named twice; expected each CPU"),
    ("c_uw_mhz_v2 = 9523", "c_uw_mhz_v2 = 999000",
     r"power: 1,0\d\d W with all units busy .* expected at most 1,000 W"),
    ("cores = 2\n", "cores = 0\n", r"cluster\[0\].cost.cores: 0; expected .* from 1"),
])  # fmt: skip
def test_what_is_sound_alone_and_absurd_together_is_refused(tmp_path, old, new, words):
    assert old in NX_TEXT
    with pytest.raises(BoardError, match=words):
        load_board(write(tmp_path, NX_TEXT.replace(old, new, 1)))


NPU = """
[[npu]]
name = "npu"
model = "rknpu"
governor = "userspace"
settle_ms = 5
noise_cv = 0.05
c_uw_mhz_v2 = 1000
c_status = "estimated"
voltage_status = "estimated"
idle_fraction = 0.05
idle_status = "estimated"
memory_share = 0.2
memory_share_status = "estimated"
opps = [[300, 675], [1000, 850]]
"""


def test_an_npu_is_a_unit_that_is_saved_and_managed(tmp_path):
    text = (BOARD_DIR / "rock-5b.toml").read_text()
    board = load_board(write(tmp_path, text + NPU))
    npu = board.unit("npu")
    assert (npu.kind, npu.cores, npu.settle_ms) == ("npu", 1, 5.0)
    assert board.gpu.name == "gpu"
    assert read_board(save_board(board, tmp_path / "again.toml")) == board
    row = {"model": "net", "board": board.name, "batch": 1, "source": "estimated"}
    table = make_table([
        row | {"subnet": "a", "unit": "npu", "gpu_mhz": 1000, "latency_ms": 5.0},
        row | {"subnet": "a", "unit": "big0", "cpu_mhz": 2400, "latency_ms": 50.0},
    ]).assign(accuracy_val_pct=70.0)  # fmt: skip
    camera = App("camera", "net", deadline_ms=20.0, period_ms=40.0)
    case = Case(Workload("npu", 1.0, (camera,)), board, PointTable.of_models(table, board))
    run = case.simulate(Manager(board, case.tables), seed=1)
    assert set(run.frames()["unit"]) == {"npu"}
    assert run.summary()["deadline_miss_pct"] == 0
    assert all("cpu_mhz" not in e for e in run.log if e["event"] == "set" and e["unit"] == "npu")
    table.to_csv(tmp_path / "points.csv", index=False)
    run.log.write(tmp_path / "run.jsonl")
    found = recompute.recompute(
        tmp_path / "run.jsonl", tmp_path / "board.toml", tmp_path / "points.csv"
    )
    summary = run.summary()
    for name in ("offered", "on_time", "energy_mj", "above_idle_mj"):
        assert found[name] == pytest.approx(summary[name])


@pytest.mark.faults
def test_of_an_npu_nothing_is_taken_for_granted(tmp_path):
    text = (BOARD_DIR / "rock-5b.toml").read_text()
    for line in ("settle_ms = 5\n", "noise_cv = 0.05\n"):
        with pytest.raises(BoardError, match=rf"npu\[0\].{line[:9].strip()}.*: missing"):
            load_board(write(tmp_path, text + NPU.replace(line, "")))
    with pytest.raises(BoardError, match=r"power_mode: .*npu"):
        load_board(write(tmp_path, NX_TEXT + NPU))


@pytest.mark.faults
def test_a_file_without_power_says_nothing_of_it_anywhere(tmp_path):
    start, end = NX_TEXT.index("[power]"), NX_TEXT.index("\n[", NX_TEXT.index("[power]") + 1)
    with pytest.raises(BoardError) as caught:
        load_board(write(tmp_path, NX_TEXT[:start] + NX_TEXT[end:]))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4  # three clusters and the GPU
    assert all("c_uw_mhz_v2: given, and there is no table [power]" in line for line in lines)


@pytest.mark.faults
@pytest.mark.parametrize("table", ["[power]", "[gpu]", "[gpu.cost]", "[[cluster]]", "[thermal]"])
def test_unknown_keys_are_refused(tmp_path, table):
    path = write(tmp_path, NX_TEXT.replace(table, f"{table}\nnotes_ = 1", 1))
    with pytest.raises(BoardError, match=r"notes_.*unknown key \(did you mean 'note'"):
        load_board(path)


@pytest.mark.faults
def test_empty_tables_are_refused(tmp_path):
    start = NX_TEXT.index("opps = [", NX_TEXT.index("[gpu]"))
    end = NX_TEXT.index("\n]", start)
    with pytest.raises(BoardError, match=r"gpu\.opps"):
        load_board(write(tmp_path, NX_TEXT[:start] + "opps = [" + NX_TEXT[end:]))
    with pytest.raises(BoardError, match="name"):
        load_board(write(tmp_path, ""))
    no_clusters = NX_TEXT.replace("[[cluster]]", "[[klusters]]").replace("[cluster.", "[klusters.")
    with pytest.raises(BoardError, match="cluster"):
        load_board(write(tmp_path, no_clusters))


@pytest.mark.faults
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(NX_TEXT) - 1))
def test_a_truncated_file_is_refused_or_is_all_that_units_need(tmp_path, cut):
    try:
        board = load_board(write(tmp_path, NX_TEXT[:cut]))
    except BoardError:
        return
    whole = load_board(NX)  # the cut fell after [power], among the tables that may be absent
    assert (board.units, board.static_mw) == (whole.units, whole.static_mw)


@pytest.mark.faults
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_noise_never_becomes_a_board(tmp_path, noise):
    path = tmp_path / "board.toml"
    path.write_bytes(noise)
    with pytest.raises(BoardError, match=r"board\.toml"):
        load_board(path)


@pytest.mark.faults
def test_unknown_boards_and_units_are_named_with_what_there_is(tmp_path):
    with pytest.raises(BoardError, match=r"jetson-xavier-n'; did you mean jetson-xavier-nx.*auto"):
        load_board("jetson-xavier-n")
    with pytest.raises(BoardError, match=r"missing\.toml"):
        load_board(tmp_path / "missing.toml")
    board = load_board(NX)
    with pytest.raises(BoardError, match="carmel0"):
        board.unit("carmel")
    with pytest.raises(BoardError, match="gpu"):
        board.power_mw({"gpuu": 204}, {})
    with pytest.raises(BoardError, match=r"expected 0\.\.1"):
        board.power_mw({}, {"gpu": 1.5})
    with pytest.raises(BoardError, match="highest clock"):
        board.gpu.dynamic_mw(1200)


def test_auto_is_this_machine_without_a_power_model():
    board = load_board("auto")
    assert isinstance(board, Board)
    assert board.cpus
    assert board == load_board("auto")
    with pytest.raises(BoardError, match="no power model"):
        board.power_mw({}, {})
    with pytest.raises(BoardError, match="no power model"):
        board.units[0].dynamic_mw(board.units[0].max_mhz)


def test_auto_reads_cpufreq(tmp_path):
    files = {
        "policy0": {"scaling_available_frequencies": "1421000 903000\n", "related_cpus": "0 1\n"},
        "policy10": {"cpuinfo_min_freq": "800000", "cpuinfo_max_freq": "3000000",
                     "related_cpus": "10", "scaling_governor": "schedutil",
                     "cpuinfo_transition_latency": "4294967295"},
        "policy2": {"scaling_available_frequencies": "<unknown>", "related_cpus": "2"},
    }  # fmt: skip
    for policy, contents in files.items():
        (tmp_path / policy).mkdir()
        for name, text in contents.items():
            (tmp_path / policy / name).write_text(text)
    board = host_board(tmp_path)
    assert [(u.name, u.freqs, u.cpus) for u in board.units] == [
        ("policy0", (903.0, 1421.0), (0, 1)),
        ("policy10", (800.0, 3000.0), (10,)),
    ]
    assert board.units[1].governor == "schedutil"
    assert board.units[1].transition_latency_us == 0
    assert len(host_board(tmp_path / "nothing").units) == 1


def test_imports_without_torch():
    code = (
        "import sys; import dynlib.boards.board, dynlib.boards.latency, "
        "dynlib.profile.timing, dynlib.boards.governors as g; "
        "from dynlib.machine.bind import load_board; load_board('auto'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_replace_keeps_boards_frozen():
    board = load_board(NX)
    with pytest.raises(AttributeError):
        board.name = "other"
    assert replace(board, name="other").units == board.units


# Random boards that a file can hold: every field has a value of its own now and then.
def numbers(low, high):
    return st.floats(low, high, allow_subnormal=False)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
STATUS = st.sampled_from(["published", "fitted", "estimated"])
POWER_MW = st.just(0.0) | numbers(20, 1e6)
SHARE = numbers(0, 1)
VOLTAGE_MV = numbers(300, 3000)


def opps(voltage_mv):
    clocks = st.lists(numbers(10, 10_000), min_size=1, max_size=5, unique=True).map(sorted)
    return clocks.flatmap(
        lambda mhz: st.lists(voltage_mv, min_size=len(mhz), max_size=len(mhz)).map(
            lambda mv: tuple(map(Opp, mhz, sorted(mv)))
        )
    )


COST = st.builds(
    LayerCost, *[numbers(0, 1e6)] * 5, st.booleans(), st.integers(1, 16), STATUS
)  # fmt: skip


def units(kind, name, cpus=()):
    return st.builds(
        Unit, st.just(name), st.just(kind), st.just(len(cpus) or 1), opps(VOLTAGE_MV),
        c_uw_mhz_v2=numbers(0, 5.0), idle_fraction=SHARE, stall_ms=numbers(0, 10),
        settle_ms=numbers(0, 10), governor=st.sampled_from(sorted(GOVERNORS)), model=TEXT,
        cpus=st.just(tuple(cpus)), capacity=st.integers(1, 1024),
        transition_latency_us=numbers(0, 1e6), memory_share=SHARE, noise_cv=SHARE,
        cost=st.none() | COST, c_status=STATUS, voltage_status=STATUS, idle_status=STATUS,
        memory_share_status=STATUS,
    )  # fmt: skip


@st.composite
def boards(draw):
    names = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    clusters = [draw(units("cpu", name, (2 * i, 2 * i + 1))) for i, name in enumerate(names[:-1])]
    gpu = not clusters or draw(st.booleans())
    all_units = (*clusters, *([draw(units("gpu", names[-1]))] if gpu else []))
    cores = [st.tuples(st.just(unit.name), st.integers(0, unit.cores)) for unit in clusters]
    maybe = st.none() | numbers(10, 10_000)
    mode = st.builds(Mode, TEXT, st.tuples(*cores), numbers(10, 10_000), maybe, maybe, st.none())
    columns = draw(st.lists(TEXT, max_size=3, unique=True).map(tuple))
    row = st.tuples(*[numbers(-1e9, 1e9)] * len(columns))
    celsius = st.lists(numbers(0, 200), max_size=3).map(tuple)
    return draw(st.builds(
        Board, TEXT, TEXT, st.just(all_units),
        memory=st.none() | st.builds(
            MemoryController, TEXT, opps(VOLTAGE_MV | st.just(0.0)), numbers(0, 10), STATUS),
        static_mw=POWER_MW, static_status=STATUS, modes=st.lists(mode, max_size=2).map(tuple),
        thermal=st.none() | st.builds(
            Thermal, TEXT, STATUS, celsius, celsius, st.none() | numbers(0, 200),
            polling_ms=st.none() | numbers(0, 1e6), sustainable_power_mw=st.none() | POWER_MW,
            note=TEXT),
        sensors=st.lists(
            st.builds(Meter, TEXT, TEXT, st.lists(TEXT, max_size=3).map(tuple), TEXT, TEXT,
                      st.none() | numbers(0, 1e8)), max_size=2).map(tuple),
        measured=st.lists(
            st.builds(Measured, TEXT, st.just(columns), st.lists(row, max_size=3).map(tuple)),
            max_size=2).map(tuple),
        digest=st.just(""), sources=st.lists(TEXT, max_size=2).map(tuple),
        notes=st.lists(TEXT, max_size=2).map(tuple), static_slope_per_c=numbers(0, 0.1),
        static_slope_status=STATUS, reference_c=numbers(0, 200),
    ))  # fmt: skip


@pytest.mark.parametrize("name", list_boards())
def test_a_saved_board_is_the_same_board(tmp_path, name):
    board = load_board(name)
    again = read_board(save_board(board, tmp_path / "deep" / "board.toml"))
    assert again == board
    assert hash(again) == hash(board)
    assert again.digest != board.digest  # of another file
    busy = {unit.name: unit.cores for unit in board.units}
    if board.static_mw is not None:
        assert again.power_mw({}, busy) == board.power_mw({}, busy)


def test_a_board_whose_power_nobody_knows_is_saved_too(tmp_path):
    board = host_board()
    again = read_board(save_board(board, tmp_path / "mine.toml"))
    assert again == board
    with pytest.raises(BoardError, match="no power model"):
        again.power_mw({}, {})


def test_a_file_that_exists_is_overwritten_only_on_demand(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    board = load_board(NX)
    with pytest.raises(BoardError, match=r"mine\.toml: exists; give another name, or overwrite="):
        save_board(board, path)
    assert path.read_text() == "mine"
    assert read_board(save_board(board, path, overwrite=True)) == board


@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking boards takes minutes
)
@given(boards())
def test_saving_and_loading_is_the_identity(tmp_path, board):
    path = tmp_path / "board.toml"
    again = read_board(save_board(board, path, overwrite=True))
    assert again == board
    save_board(again, path, overwrite=True)
    assert read_board(path).digest == again.digest


def test_what_no_file_can_hold_is_refused_and_nothing_written(tmp_path):
    board = load_board(NX)
    path = tmp_path / "board.toml"
    save_board(board, path)
    before = path.read_bytes()
    gpu = board.gpu
    for wrong, words in (
        (replace(host_board(), static_mw=0.0), "c_uw_mhz_v2: missing"),
        (replace(board, static_mw=None), "c_uw_mhz_v2: given"),
        (replace(board, static_mw=3.2), "looks like W"),
        (replace(board, units=board.units[::-1]), "units of .* cannot be kept"),
        (replace(board, units=(*board.units, replace(gpu, name="second"))), "not valid TOML"),
        (replace(board, units=(replace(gpu, opps=gpu.opps[::-1]),), modes=()), "clocks ascending"),
        (replace(board, name=" "), "name"),
    ):
        with pytest.raises(BoardError, match=words):
            save_board(wrong, path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["board.toml"]
