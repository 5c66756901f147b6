"""What others do to the board over time: who slows its units down, caps them or takes them away.

A run lives under these conditions, the optimum knows them all in advance, and a manager sees
of them only what a board shows: limits of clocks, and the memory clock.
"""

import math
from typing import NamedTuple, Protocol

from dynlib.boards.board import Board, Thermal, Unit
from dynlib.boards.thermal import AMBIENT_C
from dynlib.errors import WorkloadError
from dynlib.points import Tables
from dynlib.workload import Change, Workload


class Setup(Protocol):
    """What a run depends on but its policy and its seed: a `Case` has it."""

    workload: Workload
    board: Board
    tables: Tables


class Conditions(NamedTuple):
    """What holds for a time; the tuples have one entry per unit of the board.

    Args:
        stretch: competitors stretch execution by this, and keep 1 - 1/stretch of the unit busy
            while nothing of ours runs there.
        cap_mhz: highest clock allowed; 0 where the unit has been taken away.
        emc: highest clock of the memory over its present one.
        memory_mb: what our apps may hold together.
        ambient_c: temperature of the air; None where heat plays no part.
    """

    stretch: tuple[float, ...]
    cap_mhz: tuple[float, ...]
    emc: float = 1.0
    memory_mb: float = math.inf
    ambient_c: float | None = None


def conditions(workload: Workload, board: Board) -> list[tuple[float, Conditions]]:
    """(time in ms, what holds from then on), in time order, the first at 0.

    A cap on the power of the board becomes caps on clocks, as in a vendor's power modes: the
    highest common share of every unit's highest clock at which all of them, busy, stay below it.
    Heat plays a part where the air changes: it is at `AMBIENT_C` before. Raises `WorkloadError` for
    a memory clock of a board that has none, and for air around a board without `thermal_facts`;
    `BoardError` for an unknown unit.
    """
    others = _Others(board)
    if any(change.ambient_c is not None for change in workload.changes):
        thermal_facts(board)
        others.ambient_c = AMBIENT_C
    steps = [(0.0, others.conditions())]
    for change in workload.changes:
        if not change.app:
            others.take(change)
            steps.append((change.t_s * 1000, others.conditions()))
    return steps


class _Others:
    """What others do to the board, change after change."""

    def __init__(self, board: Board):
        names = [unit.name for unit in board.units]
        self.board = board
        self.stretch = dict.fromkeys(names, 1.0)
        self.cap_mhz = dict.fromkeys(names, math.inf)
        self.lost = dict.fromkeys(names, False)
        self.emc = 1.0
        self.power_mw = 0.0  # no cap
        self.memory_mb = math.inf
        self.ambient_c: float | None = None

    def take(self, change: Change) -> None:
        """Take in one change that is of no app."""
        if change.unit:
            name = self.board.unit(change.unit).name
            self.stretch[name] = change.stretch or self.stretch[name]
            if change.cap_mhz is not None:
                self.cap_mhz[name] = change.cap_mhz or math.inf
            if change.lost is not None:
                self.lost[name] = change.lost
        if change.emc_mhz is not None:
            memory = self.board.memory
            if memory is None:
                raise WorkloadError(f"emc_mhz: board {self.board.name!r} has no memory clock")
            self.emc = max(opp.freq_mhz for opp in memory.opps) / change.emc_mhz
        if change.power_mw is not None:
            self.power_mw = change.power_mw
        if change.memory_mb is not None:
            self.memory_mb = change.memory_mb or math.inf
        if change.ambient_c is not None:
            self.ambient_c = change.ambient_c

    def conditions(self) -> Conditions:
        """What holds now."""
        within = _within(self.board, self.power_mw) if self.power_mw else self.cap_mhz
        caps = []
        for unit in self.board.units:
            highest_mhz = min(self.cap_mhz[unit.name], within[unit.name], unit.max_mhz)
            caps.append(0.0 if self.lost[unit.name] else unit.at_or_below(highest_mhz))
        stretch = tuple(self.stretch.values())
        return Conditions(stretch, tuple(caps), self.emc, self.memory_mb, self.ambient_c)


def thermal_facts(board: Board) -> Thermal:
    """The trips, polling intervals and sustainable power of `board`; raises `WorkloadError` naming
    the ones that nobody publishes."""
    needed = ("sustainable_power_mw", "passive_c", "polling_ms", "passive_polling_ms")
    missing = [key for key in needed if not getattr(board.thermal, key, None)]
    if missing:
        raise WorkloadError(
            f"ambient_c: board {board.name!r} publishes no {', '.join(missing)}, "
            "expected them for its thermal model"
        )
    return board.thermal


def static_mw(board: Board, temp_c: float | None = None) -> float:
    """Static power of a board at a temperature; None: at the one its file refers to."""
    return board.static_mw + board.power_mw({}, {}, temp_c) - board.power_mw({}, {})


def rest_mw(unit: Unit, stretch: float, cores: float) -> float:
    """What flows in a unit at its lowest clock whatever we do: waiting, or a frame that keeps
    `cores` busy, which may be less than a competitor makes of it, so that no frame ever has a
    negative price."""
    competing = (1 - 1 / stretch) * unit.cores
    return unit.power_mw(unit.min_mhz, min(competing, cores))


def _within(board: Board, power_mw: float) -> dict[str, float]:
    """Clocks at the highest common share of every unit's highest at which the board, all busy,
    draws no more; the lowest clocks where none does."""
    busy = {unit.name: float(unit.cores if unit.kind == "cpu" else 1) for unit in board.units}
    shares = {mhz / unit.max_mhz for unit in board.units for mhz in unit.freqs}
    for share in sorted(shares, reverse=True):
        clocks = {unit.name: unit.at_or_below(share * unit.max_mhz) for unit in board.units}
        if board.power_mw(clocks, busy) <= power_mw:
            return clocks
    return {unit.name: unit.min_mhz for unit in board.units}
