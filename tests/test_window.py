"""Windows of measurement, in time that the test lets pass."""

import pytest

from dynlib.machine.control import Reading, Sensor
from dynlib.machine.virtual import VirtualClock
from dynlib.machine.window import Window


def test_window_energy_power_and_uncertainty():
    clock, calls = VirtualClock(), iter(range(100))
    meter = Sensor("in", "power_mw", lambda: 1000.0 + 10 * (next(calls) % 2), 0.1, total=True)
    with Window([meter], clock) as window:
        for _ in range(50):
            clock.sleep(0.1)
            window.sample()
    assert window.power_mw == pytest.approx(1005, rel=0.001)
    assert window.energy_mj == pytest.approx(5025, rel=0.001)
    assert 2 < window.uncertainty_pct < 2.1  # one period in fifty, and little spread
    with Window([meter], clock) as window:
        clock.sleep(0.3)
    assert "too short" in window.energy_mj.reason
    assert "at least 1000 ms" in window.energy_mj.reason


def test_suspended_and_incomplete_windows_give_no_number():
    clock = VirtualClock()
    flaky = Sensor("in", "power_mw", lambda: float("nan"), 0.01, total=True)
    with Window([flaky], clock) as window:
        clock.sleep(1)
    assert "0 samples" in window.power_mw.reason
    assert window.dropped > 0
    assert isinstance(Sensor("in", "power_mw", lambda: 5.0).read(clock), Reading)
