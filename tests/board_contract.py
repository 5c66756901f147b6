"""What every back end of a live board promises; a back end's tests subclass this."""

import math

import pytest

from dynlib.errors import MachineError
from dynlib.machine.control import Missing, Reading


class BoardContract:
    """Subclasses supply a `board` fixture, outside of its `with` block."""

    def state(self, board):
        return {key: knob.get() for key, knob in board.knobs.items()}

    def values(self, knob):
        if knob.kind == "affinity":
            return [knob.choices[:1], knob.choices]
        if knob.kind == "threads":
            return [1, 2]
        if knob.bounds:
            low, high = knob.bounds
            return [high, (low + high) / 2]
        return knob.choices

    def test_has_units_knobs_and_sensors(self, board):
        assert board.units
        assert board.knobs
        assert {unit for unit, _ in board.knobs} <= set(board.units)
        assert all(isinstance(lack, str) and lack for lack in board.lacks)
        assert board.level == "control"

    def test_every_choice_is_in_force_and_undone(self, board):
        before = self.state(board)
        with board:
            for (unit, kind), knob in board.knobs.items():
                for value in self.values(knob):
                    applied = board.set(unit, kind, value)
                    assert applied.in_force == applied.asked == value, applied
                    assert board.get(unit, kind) == value
                    assert applied.problem == ""
        assert board.problems == {}
        assert self.state(board) == before

    def test_error_in_the_block_is_passed_on_and_undone(self, board):
        before = self.state(board)
        (unit, kind), knob = next(iter(board.knobs.items()))

        def work():
            with board:
                board.set(unit, kind, self.values(knob)[0])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            work()
        assert self.state(board) == before

    def test_unknown_names_and_values_are_refused(self, board):
        before = self.state(board)
        (unit, kind), knob = next(iter(board.knobs.items()))
        with pytest.raises(MachineError, match="outside of 'with"):
            board.set(unit, kind, self.values(knob)[0])
        with pytest.raises(MachineError, match="no sensor 'nosuch'"):
            board.read("nosuch")
        with board:
            with pytest.raises(MachineError, match=r"no knob .*\.nosuch"):
                board.set(unit, "nosuch", 1)
            for (name, what), each in board.knobs.items():
                bad = (10**9,) if each.kind == "affinity" else -7
                with pytest.raises(MachineError, match=what):
                    board.set(name, what, bad)
            assert self.state(board) == before

    def test_sensors_read_or_say_why_not(self, board):
        snapshot = board.snapshot()
        assert snapshot.keys() == board.sensors.keys()
        for name, value in snapshot.items():
            assert isinstance(value, Reading | Missing), name
            if isinstance(value, Reading):
                assert math.isfinite(value.value)
            else:
                assert value.reason

    def test_a_window_has_a_latency_and_an_energy_or_a_reason(self, board):
        with board.measure() as window:
            board.clock.sleep(0.05)
        assert window.latency_ms >= 49
        results = (window.energy_mj, window.power_mw, window.uncertainty_pct)
        assert all(r.reason if isinstance(r, Missing) else r > 0 for r in results)
        assert len({isinstance(r, Missing) for r in results}) == 1

    def test_can_be_entered_again(self, board):
        before = self.state(board)
        for _ in range(2):
            with board:
                pass
        assert self.state(board) == before
