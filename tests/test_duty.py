"""A duty clock where no clock can be set."""

import pytest
from live_cases import quota

from dynlib.errors import MachineError
from dynlib.machine import duty as duty_module
from dynlib.machine.bind import bind, host_board
from dynlib.machine.control import MachineUnit, Parts
from dynlib.machine.duty import duty_mhz, duty_parts
from dynlib.machine.machine import Machine

CPU = MachineUnit("cpu", "cpu", (0, 1))


class Library:
    """Stands for torch."""

    threads = 2

    def get_num_threads(self):
        return self.threads


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setitem(duty_module.sys.modules, "torch", found)
    return found


def clocked(*more):
    share = quota()
    share.unlimited = 200.0
    parts = Parts([CPU, MachineUnit("process", "process")], [share, *more])
    return share, parts + duty_parts(parts, 1000.0)


def test_a_clock_is_a_share_of_the_time_of_each_thread(library):
    share, parts = clocked()
    with Machine("host", parts, None) as machine:
        assert machine.set("cpu", "clock_mhz", 400.0).problem == ""
        assert (share.value, share.period_us) == (80.0, 10_000)
        assert machine.get("cpu", "clock_mhz") == 400.0
        machine.set("cpu", "clock_mhz", 1000.0)
        assert share.value == 200.0
        library.threads = 1
        machine.set("cpu", "clock_mhz", 200.0)
        assert share.value == 20.0
        with pytest.raises(MachineError, match="clock_mhz"):
            machine.set("cpu", "clock_mhz", 300.0)
    assert share.value == 200.0  # as it was found


def test_there_is_none_beside_a_real_clock(library):
    share, parts = clocked()
    real = parts.knobs[-1]
    assert real.kind == "clock_mhz"
    again = Parts(parts.units, [share, real])
    assert duty_parts(again, 1000.0).knobs == []


def test_there_is_none_without_a_quota():
    assert duty_parts(Parts([CPU]), 1000.0).knobs == []


def test_the_board_of_this_machine_has_its_steps(tmp_path, library):
    board = host_board(tmp_path)
    (unit,) = board.units
    assert unit.freqs == duty_mhz(unit.max_mhz)
    parts = Parts([MachineUnit("cpu", "cpu", unit.cpus), MachineUnit("process", "process")])
    parts.knobs.append(quota())
    parts.knobs[0].unlimited = 200.0
    with Machine("host", parts + duty_parts(parts, unit.max_mhz), None) as machine:
        bound = bind(board, machine)
        assert not [lack for lack in bound.lacks if "clock" in lack]
        for mhz in unit.freqs:
            assert bound.set("cpu", "clock_mhz", mhz).in_force == mhz
