"""Measured operating points, on a clock that the test turns."""

import pytest
import torch
from live_cases import ROWS, Clock, FakeKnob, Net, knobbed, machine, turned

from dynlib.errors import ProfileError
from dynlib.machine.bind import load_board
from dynlib.points import PointTable
from dynlib.profile.points import at_full_clock, profile_points


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


def test_points_are_measured_on_every_number_of_threads(clock):
    on, threads = machine(), FakeKnob("threads", (1, 2))
    net = Net(clock)
    with knobbed(threads) as knobs:
        table = profile_points(
            on, ROWS, net.switch, net.answer, model="net", threads=(1, 2), machine=knobs, batch=4
        )
    assert threads.history[:2] == [1, 2]
    assert set(table["unit"]) == {"cpu"}
    assert list(zip(table["threads"], table["cores"], table["subnet"], strict=True)) == [
        (1, 1, "small"), (1, 1, "large"), (2, 2, "small"), (2, 2, "large")
    ]  # fmt: skip
    assert table["latency_ms"].tolist() == pytest.approx([2, 10, 2, 10], abs=0.01)
    assert set(table["source"]) == {"measured"}
    with pytest.raises(ProfileError, match="at least 90"):
        profile_points(on, ROWS, net.switch, net.answer, model="net", repeats=20)
    with pytest.raises(ProfileError, match=r"threads: got \[1, 2\], expected one number"):
        profile_points(on, ROWS, net.switch, net.answer, model="net", threads=(1, 2))


def test_without_a_machine_the_threads_in_use_are_recorded(clock):
    net = Net(clock)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            table = profile_points(machine(), ROWS, net.switch, net.answer, model="net")
            cores = min(count, machine().units[0].cores)
            assert set(table["threads"]) == set(table["cores"]) == {cores}
    finally:
        torch.set_num_threads(before)


def test_who_cannot_set_clocks_sees_the_highest_alone(clock):
    here = load_board("auto")
    on = at_full_clock(here)
    assert [unit.freqs for unit in on.units] == [(unit.max_mhz,) for unit in here.units]
    net = Net(clock)
    table = profile_points(on, ROWS, net.switch, net.answer, model="net")
    (points,) = PointTable.of_models(table, on).values()
    assert [(p.latency_ms, p.active_mw) for p in points.on(on.units[0].name)] == [
        ((pytest.approx(2, abs=0.01),), (0.0,)), ((pytest.approx(10, abs=0.01),), (0.0,))
    ]  # fmt: skip
