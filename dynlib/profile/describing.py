"""What a machine has and lacks, as a table, and as the board file that its owner begins with."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pandas as pd

from dynlib.boards.board import Board, MemoryController, Meter, Opp, Unit
from dynlib.boards.file import save_board
from dynlib.boards.governors import GOVERNORS
from dynlib.errors import BoardError
from dynlib.machine.bind import host_board
from dynlib.machine.control import Missing
from dynlib.machine.knobs import CPU
from dynlib.machine.machine import Machine

_TO_DO = (
    "power is unknown: measure_board and calibrate find it where a sensor measures it; else add "
    "[power] with static_mw, and to each unit c_uw_mhz_v2 and voltages in mV",
    "memory_share is a guess: measure_clocks and calibrate find it",
)


def describe(machine: Machine) -> pd.DataFrame:
    """Everything a machine has, and what it lacks.

    Columns: part (such as ``cpu.clock_mhz``), is (`knob`, `sensor` or `lacks`), now, and
    possible: the values of a knob, or why there is none.

    >>> table = describe(open_machine("jetson-nano"))  # a virtual twin
    >>> table[table["part"] == "gpu.clock_mhz"]["possible"].item()
    '12 from 76.8 to 921.6'
    >>> table[table["is"] == "lacks"]["part"].tolist()
    ['temperature']
    """
    rows = []
    for key, knob in machine.knobs.items():
        possible = machine.refused.get(key) or _possible(knob.choices, knob.bounds)
        if hasattr(knob, "quota"):  # no clock of the hardware's: see `dynlib.machine.duty`
            possible += ", a duty clock by CPU quota"
        rows.append((".".join(key), "knob", _said(machine.get(*key)), possible))
    for name, reading in machine.snapshot().items():
        kind = machine.sensors[name].kind
        rows.append((name, "sensor", _said(reading), kind))
    for lack in machine.lacks:
        part, _, why = lack.partition(": ")
        rows.append((part, "lacks", "", why))
    return pd.DataFrame(rows, columns=["part", "is", "now", "possible"])


def _possible(choices: tuple, bounds: tuple[float, float] | None) -> str:
    if bounds:
        return f"{bounds[0]:g} to {bounds[1]:g}"
    if len(choices) > 2 and all(isinstance(choice, int | float) for choice in choices):
        return f"{len(choices)} from {choices[0]:g} to {choices[-1]:g}"
    return ", ".join(map(str, choices))


def _said(value: object) -> str:
    if isinstance(value, Missing):
        return value.reason
    value = getattr(value, "value", value)  # of a reading
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_template(machine: Machine, path: str | Path) -> Path:
    """Write the board file of the machine this runs on: what it shows of itself, and in `notes`
    what it lacks and what is left to fill in. It loads as it is; its power is unknown.

    Raises `BoardError` for a virtual twin, whose board has a file, and for a file that exists.
    """
    if machine.fs is None:
        raise BoardError(f"{machine.name}: a virtual twin; expected the machine this runs on")
    return save_board(_template(machine), path)


def _template(machine: Machine) -> Board:
    board = host_board(machine.fs.path(f"{CPU}/cpufreq"))
    units = [_as_shown(unit, machine) for unit in board.units]
    memory = None
    for unit in machine.units.values():
        knob = machine.knobs.get((unit.name, "clock_mhz"))
        if not knob or unit.kind == "cpu":
            continue
        opps = tuple([Opp(float(mhz), 0.0) for mhz in sorted(knob.choices)])
        if unit.kind == "memory":
            memory = MemoryController("unknown", opps, settle_ms=8.0, status="estimated")
        elif unit.kind == "gpu" and units[-1].kind == "cpu":  # a file has one GPU
            units.append(_gpu(unit.name, opps))
    rails = [
        sensor.name.removesuffix(".power")
        for sensor in machine.sensors.values()
        if sensor.total and sensor.name.endswith(".power")
    ]
    # What this process lacks is not the board's.
    lacks = [lack for lack in machine.lacks if not lack.startswith("process.")]
    return replace(
        board,
        units=tuple(units),
        memory=memory,
        sensors=(Meter("power rails", ", ".join(rails), total=tuple(rails)),) if rails else (),
        notes=(*_TO_DO, *lacks),
    )


def _as_shown(unit: Unit, machine: Machine) -> Unit:
    """A CPU cluster with the capacity that the kernel shows, and a governor a file may name."""
    capacity = unit.capacity
    with contextlib.suppress(OSError, ValueError):
        capacity = machine.fs.number(f"{CPU}/cpu{unit.cpus[0]}/cpu_capacity")
    governor = unit.governor if unit.governor in GOVERNORS else "performance"
    return replace(unit, capacity=capacity, governor=governor)


def _gpu(name: str, opps: tuple[Opp, ...]) -> Unit:
    return Unit(
        name, "gpu", 1, opps, c_uw_mhz_v2=None, idle_fraction=0.0, stall_ms=0.1, settle_ms=5.0,
        governor="simple_ondemand", model="unknown", noise_cv=0.036,
    )  # fmt: skip
