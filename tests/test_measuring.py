"""Samples of a board's power, taken on its virtual twin, on a fake tree and here."""

import contextlib
import errno
import time

import psutil
import pytest
from fake_tree import FaultyKernel, jetson, make_machine, tree_state
from test_bind import small_board
from test_calibration import MODELLED, blank, grid, relative_error

from dynlib.boards.calibration import calibrate
from dynlib.errors import ProfileError
from dynlib.machine.bind import host_board, load_board, open_machine
from dynlib.profile.measuring import measure_board, measure_clocks, spin
from suite.studies.judge_machine import write_tree


def nothing(unit, busy):
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", MODELLED)
def test_the_twin_is_found_again(name):
    truth, machine = load_board(name), open_machine(name)
    before = {key: knob.get() for key, knob in machine.knobs.items()}
    rows = measure_board(machine, truth)
    assert {key: knob.get() for key, knob in machine.knobs.items()} == before
    for unit in truth.units:
        mhz = rows.loc[rows["unit"] == unit.name, "freq_mhz"]
        assert (mhz.min(), mhz.max()) == (unit.min_mhz, unit.max_mhz)
        assert mhz.nunique() == min(8, len(unit.freqs))
    found = calibrate(rows, blank(truth, volts=True))
    assert relative_error(found, grid(truth)).max() < 1e-6


def test_everything_is_put_back_and_clocks_that_are_not_given_are_no_samples(tmp_path):
    write_tree(tmp_path / "root", jetson())
    kernel = FaultyKernel(tmp_path / "root")
    before = tree_state(kernel.root)
    kernel.fail("write", "policy2/scaling_max_freq", errno.EACCES)
    machine = make_machine(kernel, tmp_path / "lease")
    rows = measure_board(machine, small_board(), nothing, shares=(0.0, 1.0), seconds=1.0, clocks=2,
                         units=["carmel1", "gpu"])  # fmt: skip
    assert list(rows["unit"]) == ["gpu"] * 4
    assert rows["power_mw"].tolist() == pytest.approx([6000.0] * 4)
    assert tree_state(kernel.root) == before


@pytest.mark.faults
def test_without_power_or_clocks_it_says_so(tmp_path):
    bare = {path: text for path, text in jetson().items() if "hwmon" not in path}
    write_tree(tmp_path, bare)
    machine = make_machine(FaultyKernel(tmp_path), tmp_path / "lease")
    with pytest.raises(ProfileError, match="no sensor measures the power of the whole board"):
        measure_board(machine, small_board(), nothing)
    with pytest.raises(ProfileError, match="no clock could be set"):
        measure_board(open_machine("jetson-nano"), host_board(), nothing)
    with (
        pytest.raises(ProfileError, match="give measure_board a load for a unit of kind gpu"),
        spin(small_board().gpu, 1.0),
    ):
        pass


def test_spinning_keeps_as_many_cores_busy_and_ends():
    unit, *_ = host_board().units
    me = psutil.Process()
    known = {child.pid for child in me.children()}
    with spin(unit, 0.5):
        (child,) = [child for child in me.children() if child.pid not in known]
        time.sleep(0.3)
        used_s = child.cpu_times().user
        assert child.cpu_affinity() == [unit.cpus[0]]
        assert used_s > 0
    assert not child.is_running()
    with spin(unit, 0.0):
        assert {child.pid for child in me.children()} <= known


def test_latencies_are_taken_at_every_clock_in_turn_and_everything_is_put_back():
    machine = open_machine("jetson-nano")
    board, asked = load_board("jetson-nano"), []
    gpu = machine.knobs["gpu", "clock_mhz"]
    before = gpu.get()

    def answer(k):
        asked.append((gpu.get(), k))

    rows = measure_clocks(machine, board, answer, unit="gpu", repeats=3, rounds=2)
    assert gpu.get() == before
    assert rows["freq_mhz"].tolist() == [f for f in board.gpu.freqs * 2 for _ in range(3)]
    assert (rows["unit"] == "gpu").all()
    assert (rows["latency_ms"] >= 0).all()
    assert asked[:5] == [(board.gpu.min_mhz, k) for k in (0, 0, 0, 1, 2)]  # two do not count


@pytest.mark.faults
def test_a_clock_that_is_not_given_ends_it(tmp_path):
    kernel = FaultyKernel(write_tree(tmp_path / "root", jetson()))
    before = tree_state(kernel.root)
    kernel.fail("write", "policy0/scaling_max_freq", errno.EACCES)
    with pytest.raises(ProfileError, match="carmel0: not set to"):
        measure_clocks(make_machine(kernel, tmp_path / "lease"), small_board(), lambda k: None)
    assert tree_state(kernel.root) == before
