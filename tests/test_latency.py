import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.boards.board import Opp
from dynlib.boards.file import list_boards
from dynlib.boards.latency import layer_us, network_ms, network_source
from dynlib.errors import BoardError
from dynlib.machine.bind import load_board
from dynlib.space import LayerSpec

NX = load_board("jetson-xavier-nx")
CPU = NX.unit("carmel0")
CONV = LayerSpec("conv", 64, 64, 3, 1, 1, 16, 16)
DEPTHWISE = LayerSpec("conv", 64, 64, 3, 1, 64, 16, 16)
POOL = LayerSpec("pool", 64, 64, 8, 1, 64, 8, 1)
HEAD = LayerSpec("linear", 64, 10)
NET = [CONV, DEPTHWISE, POOL, HEAD]
UNITS = [unit for name in list_boards() for unit in load_board(name).units]


@pytest.fixture(scope="module")
def data_dir():
    root = os.environ.get("DYNLIB_DATA")
    if not root or not Path(root, "boards", "measured_power_jetson.csv").is_file():
        pytest.skip("DYNLIB_DATA does not name a folder with the public measurements")
    return Path(root)


def test_clock_scale_is_one_at_the_top_and_all_memory_never_slows():
    unit = replace(CPU, opps=(Opp(250.0, 800.0), Opp(1000.0, 900.0)), memory_share=0.2)
    assert unit.clock_scale(1000) == 1
    assert unit.clock_scale(250) == pytest.approx(0.2 + 0.8 * 4)
    assert replace(unit, memory_share=1.0).clock_scale(250) == 1
    for wrong in (0, -1, 1001, float("nan")):
        with pytest.raises(BoardError, match="expected above 0"):
            unit.clock_scale(wrong)


def test_a_small_network_on_the_gpu_is_launch_bound():
    cost = NX.gpu.cost
    assert layer_us(CONV, cost) == cost.overhead_us
    assert layer_us(CONV, cost, batch=256) == pytest.approx(256 * CONV.macs / 1e6 * 5.08, rel=0.01)
    assert layer_us(POOL, cost) < 10
    assert network_ms([CONV] * 20, NX.gpu, NX.gpu.max_mhz) == pytest.approx(20 * 0.279)


def test_a_cpu_adds_overhead_and_work():
    cost = CPU.cost
    expected = cost.overhead_us + cost.us_per_mmac * CONV.macs / 1e6
    assert layer_us(CONV, cost) == pytest.approx(expected)
    assert layer_us(CONV, cost, cores=1) == pytest.approx(2 * expected - cost.overhead_us)
    assert layer_us(replace(CONV, density=0.5), cost) < expected


@given(st.sampled_from(UNITS), st.integers(1, 64), st.data())
def test_latency_rises_with_batch_and_falls_with_clock_and_cores(unit, batch, data):
    low, high = sorted(data.draw(st.tuples(*[st.sampled_from(unit.freqs)] * 2)))
    few, many = sorted(data.draw(st.tuples(*[st.integers(1, unit.cores)] * 2)))
    base = network_ms(NET, unit, high, batch, many)
    assert base > 0
    assert network_ms(NET, unit, low, batch, many) >= base
    assert network_ms(NET, unit, high, batch, few) >= base
    assert network_ms(NET, unit, high, batch + 1, many) >= base
    assert network_ms(NET, unit, high, 2 * batch, many) <= 2 * base + 1e-9
    assert network_ms([*NET, CONV], unit, high, batch, many) > base


def test_sources():
    assert network_source(NX.gpu) == "simulated"
    assert network_source(CPU) == "estimated"  # its memory share is a guess
    fitted = replace(CPU, memory_share_status="fitted")
    assert network_source(fitted) == "simulated"
    assert network_source(fitted, cores=1) == "estimated"
    assert network_source(load_board("auto").units[0]) == "estimated"


def test_impossible_requests_are_errors():
    host = load_board("auto").units[0]
    with pytest.raises(BoardError, match="no latency model"):
        network_ms(NET, host, host.max_mhz)
    with pytest.raises(BoardError, match="expected 1 to 2"):
        network_ms(NET, CPU, 1907.2, cores=3)
    with pytest.raises(BoardError, match="at least 1"):
        network_ms(NET, CPU, 1907.2, batch=0)


@pytest.mark.parametrize("name", ["jetson-xavier-nx", "jetson-nano"])
def test_shipped_power_and_clock_coefficients_are_what_the_fit_gives(data_dir, name):
    from suite.studies import fit_boards as fit

    board = load_board(name)
    rows = fit.read_power(data_dir / "boards" / "measured_power_jetson.csv", name)
    power, clock = fit.fit_power(rows, board.gpu), fit.fit_memory_share(rows)
    assert board.static_mw == pytest.approx(power["static_mw"], rel=1e-3)
    assert board.gpu.c_uw_mhz_v2 == pytest.approx(power["c_uw_mhz_v2"], rel=1e-3)
    assert board.gpu.idle_fraction == pytest.approx(power["idle_fraction"], abs=0.005)
    assert board.gpu.memory_share == pytest.approx(clock["memory_share"], abs=0.001)
    assert power["max_error_busy_pct"] < 4
    assert power["max_error_idle_pct"] < 6
    assert clock["max_error_pct"] < 4


@pytest.mark.parametrize("unit", [NX.gpu, CPU], ids=["gpu", "cpu"])
def test_shipped_layer_costs_are_what_the_fit_gives(data_dir, unit):
    from suite.studies import fit_boards as fit

    table = fit.read_operators(data_dir / "jetson_xavier_nx" / f"latency_{unit.kind}.csv")
    given_ = (unit.cost.us_per_mmac, unit.cost.us_per_mbyte) if unit is NX.gpu else ()
    cost, errors = fit.fit_layers(table, unit.cost.asynchronous, *given_)
    for key in ("overhead_us", "us_per_mmac", "us_per_mmac_depthwise", "us_per_kweight_depthwise"):
        assert getattr(unit.cost, key) == pytest.approx(getattr(cost, key), rel=0.005)
    assert errors["median_error_pct"] < 15
    assert abs(errors["sum_error_pct"]) < 10


def test_known_faults_are_left_out_of_the_tables(data_dir):
    from suite.studies import fit_boards as fit

    rows = {u: fit.read_operators(data_dir / "jetson_xavier_nx" / f"latency_{u}.csv")
            for u in ("cpu", "gpu")}  # fmt: skip
    assert (len(rows["cpu"]), len(rows["gpu"])) == (13 * 95, 12 * 95)
    assert 160 not in set(rows["gpu"]["resolution"])
    assert not ((rows["cpu"]["expand"] == 24) & (rows["cpu"]["idskip"] == 1)).any()
