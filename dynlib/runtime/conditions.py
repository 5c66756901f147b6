"""What others do to the board over time: who slows its units down, caps them or takes them away.

The engine lives under these conditions, the optimum knows them all in advance, and a manager sees
of them only what a board shows: limits of clocks, and the memory clock.
"""

import math
from typing import NamedTuple

from dynlib.boards.board import Board, Thermal, Unit
from dynlib.boards.thermal import AMBIENT_C
from dynlib.errors import WorkloadError
from dynlib.workload import Workload


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
    names = [unit.name for unit in board.units]
    stretch, cap = dict.fromkeys(names, 1.0), dict.fromkeys(names, math.inf)
    lost, emc, power_mw, memory_mb = dict.fromkeys(names, False), 1.0, 0.0, math.inf
    top = {unit.name: unit.max_mhz for unit in board.units}
    ambient_c = None
    if any(change.ambient_c is not None for change in workload.changes):
        thermal_facts(board)
        ambient_c = AMBIENT_C
    first = Conditions((1.0,) * len(names), tuple(top.values()), ambient_c=ambient_c)
    steps = [(0.0, first)]
    for change in workload.changes:
        if change.app:
            continue
        if change.unit:
            name = board.unit(change.unit).name
            stretch[name] = change.stretch or stretch[name]
            if change.cap_mhz is not None:
                cap[name] = change.cap_mhz or math.inf
            lost[name] = lost[name] if change.lost is None else change.lost
        if change.emc_mhz is not None:
            if board.memory is None:
                raise WorkloadError(f"emc_mhz: board {board.name!r} has no memory clock")
            emc = max(opp.freq_mhz for opp in board.memory.opps) / change.emc_mhz
        power_mw = power_mw if change.power_mw is None else change.power_mw
        ambient_c = ambient_c if change.ambient_c is None else change.ambient_c
        if change.memory_mb is not None:
            memory_mb = change.memory_mb or math.inf
        modes = _within(board, power_mw) if power_mw else top
        caps = (
            0.0 if lost[u.name] else u.at_or_below(min(cap[u.name], modes[u.name], u.max_mhz))
            for u in board.units
        )
        now = Conditions(tuple(stretch.values()), tuple(caps), emc, memory_mb, ambient_c)
        steps.append((change.t_s * 1000, now))
    return steps


def thermal_facts(board: Board) -> Thermal:
    """The trips, polling intervals and sustainable power of `board`; raises `WorkloadError` naming
    the ones that nobody publishes."""
    needed = ("sustainable_power_mw", "passive_c", "polling_ms", "passive_polling_ms")
    missing = [key for key in needed if not getattr(board.thermal, key, None)]
    if missing:
        raise WorkloadError(f"ambient_c: board {board.name!r} publishes no {', '.join(missing)}, "
                            "expected them for its thermal model")  # fmt: skip
    return board.thermal


def static_mw(board: Board, temp_c: float | None = None) -> float:
    """Static power of a board at a temperature; None: at the one its file refers to."""
    return board.static_mw + board.power_mw({}, {}, temp_c) - board.power_mw({}, {})


def rest_mw(unit: Unit, stretch: float) -> float:
    """What flows in a unit at its lowest clock whatever we do: waiting, or one busy core, which
    may be less than a competitor makes of it, so that no frame ever has a negative price."""
    waiting = unit.power_mw(unit.min_mhz, (1 - 1 / stretch) * unit.cores)
    return min(waiting, unit.power_mw(unit.min_mhz, 1.0))


def _within(board: Board, power_mw: float) -> dict[str, float]:
    for share in sorted({f / u.max_mhz for u in board.units for f in u.freqs}, reverse=True):
        clocks = {u.name: u.at_or_below(share * u.max_mhz) for u in board.units}
        busy = {u.name: float(u.cores if u.kind == "cpu" else 1) for u in board.units}
        if board.power_mw(clocks, busy) <= power_mw:
            return clocks
    return {u.name: u.min_mhz for u in board.units}
