"""Operating points computed from a board file."""

import pytest

from dynlib.boards.latency import network_ms
from dynlib.boards.simulated import fitting_batch, simulate_points
from dynlib.errors import BoardError
from dynlib.machine.bind import load_board
from dynlib.space import LayerSpec

SMALL = [LayerSpec("conv", 3, 16, 3, in_size=32, out_size=32)]
NETWORKS = {"small": SMALL, "large": SMALL + [LayerSpec("conv", 16, 64, 3, 1, 1, 32, 32)] * 4}


@pytest.fixture(scope="module")
def board():
    return load_board("jetson-xavier-nx")


def test_one_row_per_network_unit_and_clock(board):
    table = simulate_points(board, NETWORKS, model="net", known={"small": {"accuracy_val_pct": 9}})
    assert len(table) == 2 * sum(len(unit.freqs) for unit in board.units)
    assert set(table.loc[table["subnet"] == "small", "accuracy_val_pct"]) == {9}
    assert table.loc[table["subnet"] == "large", "accuracy_val_pct"].isna().all()


def test_slower_clocks_take_longer_and_energy_is_power_times_time(board):
    table = simulate_points(board, NETWORKS, model="net", units=["gpu"], batch=8)
    assert set(table["unit"]) == {"gpu"}
    for _, rows in table.groupby("subnet"):
        rows = rows.sort_values("gpu_mhz")
        assert rows["latency_ms"].is_monotonic_decreasing
        assert rows["power_mw"].is_monotonic_increasing
        assert (rows["energy_mj"] - rows["power_mw"] * rows["latency_ms"] / 1e3).abs().max() < 1e-9


def test_a_batch_fits_a_time(board):
    gpu = board.gpu
    batch = fitting_batch(board, "gpu", NETWORKS["large"], 20.0)
    assert network_ms(NETWORKS["large"], gpu, gpu.max_mhz, batch) >= 20
    assert network_ms(NETWORKS["large"], gpu, gpu.max_mhz, batch - 1) < 20


def test_an_unknown_unit_is_named(board):
    with pytest.raises(BoardError, match="npu"):
        simulate_points(board, NETWORKS, model="net", units=["npu"])
