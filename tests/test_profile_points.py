"""Measured operating points, on a clock that the test turns."""

import math

import pytest
from live_cases import ROWS, Clock, FakeKnob, Net, knobbed, machine, turned

from dynlib.errors import ProfileError
from dynlib.machine.bind import load_board
from dynlib.profile.points import board_by_threads, profile_points


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


def test_points_are_measured_on_every_number_of_threads(clock):
    on, threads = machine(1, 2), FakeKnob("threads", (1, 2))
    net = Net(clock)
    with knobbed(threads) as knobs:
        table = profile_points(
            on, ROWS, net.switch, net.answer, model="net", machine=knobs, batch=4
        )
    assert threads.history[:2] == [1, 2]
    assert list(zip(table["unit"], table["subnet"], strict=True)) == [
        ("cpu-1", "small"), ("cpu-1", "large"), ("cpu-2", "small"), ("cpu-2", "large")
    ]  # fmt: skip
    assert table["latency_ms"].tolist() == pytest.approx([2, 10, 2, 10], abs=0.01)
    assert set(table["source"]) == {"measured"}
    with pytest.raises(ProfileError, match="at least 90"):
        profile_points(on, ROWS, net.switch, net.answer, model="net", repeats=20)


def test_the_board_of_a_live_run_has_threads_for_units_and_no_price():
    on = board_by_threads(load_board("auto"), (1, 2))
    assert [(u.name, u.cores, len(u.freqs)) for u in on.units] == [("cpu-1", 1, 1), ("cpu-2", 2, 1)]
    assert all(u.power_mw(u.max_mhz, u.cores) == 0 for u in on.units)
    assert math.isfinite(on.units[0].max_mhz)
