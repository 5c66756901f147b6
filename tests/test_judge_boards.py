"""The models against published measurements, and their stand-ins where those are not here."""

import numpy as np
import pytest

from dynlib.boards.calibration import mape
from dynlib.boards.latency import layer_us
from dynlib.machine.bind import load_board
from dynlib.space import LayerSpec
from suite.papers.jetson_tables import fixed_keys, grid
from suite.studies.judge_boards import (
    RESOLUTIONS,
    clock_models,
    find_data,
    modelled_tables,
    published_grid,
    queues,
    resolutions,
)

GPU = load_board("jetson-xavier-nx").gpu


def test_data_is_looked_for_where_the_caller_says_first(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNLIB_DATA", str(tmp_path / "env"))
    for place in ("env", "given"):
        (tmp_path / place).mkdir()
    assert find_data("boards/x.csv", tmp_path / "given") is None
    (tmp_path / "env" / "x.csv").touch()
    assert find_data("x.csv", tmp_path / "given") == tmp_path / "env" / "x.csv"
    (tmp_path / "given" / "x.csv").touch()
    assert find_data("x.csv", tmp_path / "given") == tmp_path / "given" / "x.csv"


def test_without_measurements_the_board_files_stand_in():
    judged = clock_models(None)
    assert set(judged["board"]) == {"jetson-nano", "jetson-xavier-nx"}
    assert set(judged["concurrency"]) == {1, 4}
    assert mape(judged, "power_mw") < 6
    table = resolutions(None, 20, np.random.default_rng(0))
    assert set(table["source"]) == {"estimated"}
    assert set(table["unit"]) == {"gpu", "cpu"}


def test_modelled_tables_are_the_layer_model():
    tables = modelled_tables(GPU, [176])
    stem = LayerSpec("conv", 3, 24, 3, 2, 1, 176, 88)
    assert tables[176][fixed_keys(176)[0]] == pytest.approx(layer_us(stem, GPU.cost) / 1e3, rel=0.1)
    assert grid(modelled_tables(GPU, RESOLUTIONS)).block_ms.shape == (5, 20, 3, 3)


def test_with_measurements(data_root):
    measured = find_data("boards/measured_power_jetson.csv", data_root)
    folder = find_data("jetson_xavier_nx", data_root)
    if measured is None or folder is None:
        pytest.skip("the data folder has no Jetson measurements")
    table = queues(clock_models(measured))
    assert set(table["concurrency"]) == set(range(2, 8))
    assert table.groupby("board").apply(mape, "latency_ms", include_groups=False).max() <= 10
    assert 160 not in published_grid(folder, "gpu").resolutions
    assert 160 in published_grid(folder, "cpu").resolutions
