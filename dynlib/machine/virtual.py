"""A board's model as a machine, in its own time: what the manager drives in a test.

Power is constant between two changes, so the energy counter is exact.
"""

import contextlib
from collections.abc import Iterable, Iterator

from dynlib.boards.board import Board, Mode
from dynlib.boards.governors import GOVERNORS
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
        self.mhz = {unit.name: unit.max_mhz for unit in board.units}
        self.governor = {unit.name: unit.governor for unit in board.units}
        self.cores = {unit.name: unit.cores for unit in board.units}
        self.memory_mhz = {}
        if board.memory:
            self.memory_mhz["memory"] = board.memory.opps[-1].freq_mhz
        self.mode = {}
        if board.modes:
            fastest = max(board.modes, key=_speed)
            self.mode["board"] = fastest.name
        self.busy: dict[str, float] = {}
        self.energy_mj = 0.0
        self._since_ns = clock.now_ns()

    def power_mw(self) -> float:
        """Power at the clocks and loads in force."""
        busy = {name: min(busy, self.cores[name]) for name, busy in self.busy.items()}
        return self.board.power_mw(self.mhz, busy)

    def settle(self) -> float:
        """Energy up to now; called before anything changes."""
        now_ns = self.clock.now_ns()
        if self.board.static_mw is not None:
            self.energy_mj += self.power_mw() * (now_ns - self._since_ns) / 1e9
        self._since_ns = now_ns
        return self.energy_mj


def _speed(mode: Mode) -> tuple[int, float]:
    """Cores and clock: the twin starts in the mode that has most of them."""
    return sum(count for _, count in mode.cores), mode.cpu_mhz


class _VirtualKnob(Knob):
    """Takes effect at once, in `held`: what of the state is of this kind, by unit."""

    local = True

    def __init__(self, state: _State, held: dict, unit: str, kind: str, choices: Iterable):
        self.state, self.held = state, held
        self.unit, self.kind, self.choices = unit, kind, tuple(choices)

    def get(self):
        """The value in force."""
        return self.held[self.unit]

    def put(self, value) -> None:
        """Take effect at once."""
        self.state.settle()
        self.held[self.unit] = value


class _VirtualGovernor(_VirtualKnob):
    def put(self, value) -> None:
        """Two of the governors need no load to choose a clock."""
        super().put(value)
        unit = self.state.board.unit(self.unit)
        fixed = {"performance": unit.max_mhz, "powersave": unit.min_mhz}
        self.state.mhz[self.unit] = fixed.get(value, self.state.mhz[self.unit])


class _VirtualMode(_VirtualKnob):
    def put(self, value) -> None:
        """As nvpmodel does: limits once what is above, and keeps nobody from raising it again."""
        super().put(value)
        state, board = self.state, self.state.board
        mode = next(mode for mode in board.modes if mode.name == value)
        state.cores |= dict(mode.cores)
        for unit in board.units:
            cap_mhz = mode.cpu_mhz if unit.kind == "cpu" else mode.gpu_mhz
            if cap_mhz:
                state.mhz[unit.name] = min(state.mhz[unit.name], unit.at_or_below(cap_mhz))


def virtual_parts(board: Board, clock: Clock) -> Parts:
    """Knobs and sensors of a board's model; in `load(knobs, unit, busy)` it works."""
    state = _State(board, clock)
    parts = Parts()
    if board.modes:  # first, because it changes the others when everything is put back
        parts.units.append(MachineUnit("board", "board"))
        names = [mode.name for mode in board.modes]
        parts.knobs.append(_VirtualMode(state, state.mode, "board", "mode", names))
    for unit in board.units:
        parts.units.append(MachineUnit(unit.name, unit.kind, unit.cpus))
        governors = dict.fromkeys((unit.governor, *GOVERNORS))
        mhz = _VirtualKnob(state, state.mhz, unit.name, "clock_mhz", unit.freqs)
        governor = _VirtualGovernor(state, state.governor, unit.name, "governor", governors)
        parts.knobs.append(governor)
        parts.knobs.append(mhz)
        if unit.kind == "cpu":
            counts = range(unit.cores + 1)
            parts.knobs.append(_VirtualKnob(state, state.cores, unit.name, "cores", counts))
        parts.sensors.append(Sensor(f"{unit.name}.clock", "clock_mhz", mhz.get, 0.001))
    if board.memory:  # its clock costs nothing here: no board publishes what it draws
        parts.units.append(MachineUnit("memory", "memory"))
        clocks = [opp.freq_mhz for opp in board.memory.opps]
        held = state.memory_mhz
        parts.knobs.append(_VirtualKnob(state, held, "memory", "clock_mhz", clocks))
    if board.static_mw is None:
        parts.lacks.append("power: nobody fitted a model of this board")
    else:
        parts.sensors.append(Sensor("board.power", "power_mw", state.power_mw, 0.001))
        parts.sensors.append(Sensor("board.energy", "energy_mj", state.settle, 1e-6, total=True))
    parts.lacks.append("temperature: the model has none")
    return parts


@contextlib.contextmanager
def load(knobs: Iterable[Knob], unit: str, busy: float) -> Iterator[None]:
    """Work on a unit of `virtual_parts`: busy cores (CPU) or utilisation 0..1 (GPU)."""
    state = next(iter(knobs)).state
    name = state.board.unit(unit).name
    before = state.busy.get(name, 0.0)
    state.settle()
    state.busy[name] = busy
    try:
        yield
    finally:
        state.settle()
        state.busy[name] = before
