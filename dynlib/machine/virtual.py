"""A board's model behind the live contract, in its own time: what the manager drives in a test.

Power is constant between two changes, so the energy counter is exact.
"""

from dynlib.boards.board import Board, Unit
from dynlib.boards.governors import GOVERNORS, make_governor
from dynlib.machine.control import Clock, Knob, MachineUnit, Parts, Sensor


class VirtualClock:
    """Time that passes only when somebody sleeps; this machine is never suspended."""

    def __init__(self):
        self._now = 0

    def now_ns(self) -> int:
        """Nanoseconds slept through."""
        return self._now

    boot_ns = now_ns

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._now += round(1e9 * seconds)


class _State:
    """Clock, governor and online cores of each unit, and the energy they have cost so far."""

    def __init__(self, board: Board, clock: Clock):
        self.board, self.clock = board, clock
        self.values = {
            unit.name: {"clock_mhz": unit.max_mhz, "governor": unit.governor, "cores": unit.cores}
            for unit in board.units
        }
        self.busy: dict[str, float] = {}
        self.energy_mj, self._since_ns = 0.0, clock.now_ns()

    def power_mw(self) -> float:
        """Power at the clocks and loads in force."""
        clocks = {name: value["clock_mhz"] for name, value in self.values.items()}
        busy = {n: min(b, self.values[n]["cores"]) for n, b in self.busy.items()}
        return self.board.power_mw(clocks, busy)

    def settle(self) -> float:
        """Energy up to now."""
        now = self.clock.now_ns()
        self.energy_mj += self.power_mw() * (now - self._since_ns) / 1e9
        self._since_ns = now
        return self.energy_mj


class _VirtualKnob(Knob):
    local = True

    def __init__(self, state: _State, unit: Unit, kind: str, choices):
        self.state, self.unit, self.kind, self.choices = state, unit.name, kind, tuple(choices)
        self._unit = unit

    def get(self):
        """The value in force."""
        return self.state.values[self.unit][self.kind]

    def put(self, value) -> None:
        """Take effect at once."""
        if self.state.board.static_mw is not None:
            self.state.settle()
        values = self.state.values[self.unit]
        values[self.kind] = value
        if self.kind == "governor" and value in ("performance", "powersave"):
            governor = make_governor(value, self._unit)
            values["clock_mhz"] = governor.update(0.0, 0.0, 1.0, values["clock_mhz"])


def virtual_parts(board: Board, clock: Clock) -> Parts:
    """Knobs and sensors of a board's model; `load(parts, unit, busy)` puts work on it."""
    state = _State(board, clock)
    parts = Parts(units=[MachineUnit(u.name, u.kind, u.cpus) for u in board.units])
    for unit in board.units:
        governors = [name for name in GOVERNORS if name != unit.governor]
        choices = {"governor": (unit.governor, *governors), "clock_mhz": unit.freqs}
        if unit.kind == "cpu":
            choices["cores"] = range(unit.cores + 1)
        parts.knobs += [_VirtualKnob(state, unit, kind, c) for kind, c in choices.items()]
        get = parts.knobs[-1].state.values[unit.name].__getitem__
        parts.sensors.append(
            Sensor(f"{unit.name}.clock", "clock_mhz", lambda get=get: get("clock_mhz"), 0.001)
        )
    if board.static_mw is None:
        parts.lacks.append("power: nobody fitted a model of this board")
    else:
        parts.sensors.append(Sensor("board.power", "power_mw", state.power_mw, 0.001))
        parts.sensors.append(Sensor("board.energy", "energy_mj", state.settle, 1e-6, total=True))
    parts.lacks.append("temperature: the model has none")
    return parts


def load(parts: Parts, unit: str, busy: float) -> None:
    """Put work on a unit of `virtual_parts`: busy cores (CPU) or utilisation 0..1 (GPU)."""
    state = parts.knobs[0].state
    if state.board.static_mw is not None:
        state.settle()
    state.busy[state.board.unit(unit).name] = busy
