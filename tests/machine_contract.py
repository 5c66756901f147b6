"""What every back end of a machine promises; a back end's tests subclass this."""

import math

import pytest

from dynlib.errors import MachineError
from dynlib.machine.control import Missing, Reading


class MachineContract:
    """Subclasses supply a `machine` fixture, outside of its `with` block."""

    def state(self, machine):
        return {key: knob.get() for key, knob in machine.knobs.items()}

    def values(self, knob):
        if knob.kind == "affinity":
            return [knob.choices[:1], knob.choices]
        if knob.kind == "threads":
            return [1, 2]
        if knob.bounds:
            low, high = knob.bounds
            return [high, (low + high) / 2]
        return knob.choices

    def test_has_units_knobs_and_sensors(self, machine):
        assert machine.units
        assert machine.knobs
        assert {unit for unit, _ in machine.knobs} <= set(machine.units)
        assert all(isinstance(lack, str) and lack for lack in machine.lacks)
        assert machine.level == "control"

    def test_every_choice_is_in_force_and_undone(self, machine):
        before = self.state(machine)
        with machine:
            for (unit, kind), knob in machine.knobs.items():
                for value in self.values(knob):
                    applied = machine.set(unit, kind, value)
                    assert applied.in_force == applied.asked == value, applied
                    assert machine.get(unit, kind) == value
                    assert applied.problem == ""
        assert machine.problems == {}
        assert self.state(machine) == before

    def test_error_in_the_block_is_passed_on_and_undone(self, machine):
        before = self.state(machine)
        (unit, kind), knob = next(iter(machine.knobs.items()))

        def work():
            with machine:
                machine.set(unit, kind, self.values(knob)[0])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            work()
        assert self.state(machine) == before

    def test_unknown_names_and_values_are_refused(self, machine):
        before = self.state(machine)
        (unit, kind), knob = next(iter(machine.knobs.items()))
        with pytest.raises(MachineError, match="outside of 'with"):
            machine.set(unit, kind, self.values(knob)[0])
        with pytest.raises(MachineError, match="no sensor 'nosuch'"):
            machine.read("nosuch")
        with machine:
            with pytest.raises(MachineError, match=r"no knob .*\.nosuch"):
                machine.set(unit, "nosuch", 1)
            for (name, what), each in machine.knobs.items():
                bad = (10**9,) if each.kind == "affinity" else -7
                with pytest.raises(MachineError, match=what):
                    machine.set(name, what, bad)
            assert self.state(machine) == before

    def test_sensors_read_or_say_why_not(self, machine):
        snapshot = machine.snapshot()
        assert snapshot.keys() == machine.sensors.keys()
        for name, value in snapshot.items():
            assert isinstance(value, Reading | Missing), name
            if isinstance(value, Reading):
                assert math.isfinite(value.value)
            else:
                assert value.reason

    def test_a_window_has_a_latency_and_an_energy_or_a_reason(self, machine):
        with machine.measure() as window:
            machine.clock.sleep(0.05)
        assert window.latency_ms >= 49
        results = (window.energy_mj, window.power_mw, window.uncertainty_pct)
        assert all(r.reason if isinstance(r, Missing) else r > 0 for r in results)
        assert len({isinstance(r, Missing) for r in results}) == 1

    def test_can_be_entered_again(self, machine):
        before = self.state(machine)
        for _ in range(2):
            with machine:
                pass
        assert self.state(machine) == before
