"""Samples of a board's power and latency, taken on the machine itself, at clocks and loads.

Clocks are set through the machine's lease, which puts everything back.
"""

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pandas as pd

from dynlib.boards.board import Board, Unit
from dynlib.errors import ProfileError
from dynlib.machine import virtual
from dynlib.machine.bind import Binding, bind
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine

_LOG = logging.getLogger(__name__)
_UNCOUNTED = 2  # answers, after a clock was set
Load = Callable[[Unit, float], AbstractContextManager]
_SPIN = """
import os, sys, time
cpu, share = int(sys.argv[1]), float(sys.argv[2])
os.sched_setaffinity(0, [cpu])
while True:
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.01 * share:
        pass
    time.sleep(0.01 * (1 - share))
"""


def measure_board(
    machine: Machine,
    board: Board,
    load: Load | None = None,
    *,
    units: Iterable[str] | None = None,
    clocks: int = 8,
    shares: Sequence[float] = (0.0, 0.5, 1.0),
    seconds: float = 2.0,
) -> pd.DataFrame:
    """Power of the whole board while one unit works and the others idle at their lowest clocks.

    One row per unit, clock and load that the machine gave: unit, freq_mhz, busy, power_mw and
    uncertainty_pct, as `dynlib.boards.calibrate` wants them.

    Args:
        load: makes ``load(unit, busy)``, in which that many cores of a CPU cluster, or that share
            of a GPU, are busy; default `spin`, which knows CPUs only, or the work of a twin.
        units: which ones; default all of the board whose clock can be set.
        clocks: at most so many of a unit, spread over its list, both ends included.
        shares: of all cores of a unit that are to be busy.
        seconds: each measurement takes.

    Raises `ProfileError` where the machine does not measure its power, or gave no clock.
    """
    if load is None:
        load = spin if machine.fs is not None else _twin_load(machine)
    bound = bind(board, machine)
    if not bound.sensors:
        raise ProfileError(f"{machine.name}: no sensor measures the power of the whole board")
    named = [unit.name for unit in board.units if bound.has(unit.name, "clock_mhz")]
    rows = []
    with machine:
        for name in named:
            bound.set(name, "clock_mhz", board.unit(name).min_mhz)
        for name in units or named:
            unit = board.unit(name)
            picked = np.linspace(0, len(unit.freqs) - 1, min(clocks, len(unit.freqs)))
            for mhz in (unit.freqs[i] for i in picked.astype(int)):
                applied = bound.set(name, "clock_mhz", mhz)
                if applied.problem:
                    _LOG.warning("%s: not measured at %g MHz: %s", name, mhz, applied.problem)
                    continue
                for share in shares:
                    busy = share * unit.cores
                    row = _measured(bound, load, unit, busy, seconds)
                    rows.append({"unit": name, "freq_mhz": mhz, "busy": busy, **row})
            bound.set(name, "clock_mhz", unit.min_mhz)
    if not rows:
        raise ProfileError(f"{machine.name}: no clock could be set: {'; '.join(bound.lacks)}")
    return pd.DataFrame(rows)


def measure_clocks(
    machine: Machine,
    board: Board,
    answer: Callable[[int], object],
    *,
    unit: str = "",
    repeats: int = 10,
    rounds: int = 3,
) -> pd.DataFrame:
    """Time of one network at every clock of a unit: unit, freq_mhz, latency_ms, a row an answer.

    `dynlib.boards.calibrate` finds in it the share of the time that no clock changes.

    Args:
        answer: serves frame k, its work done on return.
        unit: which one; default the first of the board.
        repeats: answers at a clock before the next one is set; the first after that do not count.
        rounds: times through all clocks, so that a machine that grows slower blames none of them.

    Raises `ProfileError` where no clock can be set.
    """
    bound = bind(board, machine)
    target = board.unit(unit) if unit else board.units[0]
    rows = []
    with machine:
        for mhz in target.freqs * rounds:
            applied = bound.set(target.name, "clock_mhz", mhz)
            if applied.problem:
                raise ProfileError(f"{target.name}: not set to {mhz:g} MHz: {applied.problem}")
            for k in range(-_UNCOUNTED, repeats):
                begin_s = time.perf_counter()
                answer(max(k, 0))
                latency_ms = 1000 * (time.perf_counter() - begin_s)
                if k >= 0:
                    rows.append((target.name, mhz, latency_ms))
    return pd.DataFrame(rows, columns=["unit", "freq_mhz", "latency_ms"])


def _measured(bound: Binding, load: Load, unit: Unit, busy: float, seconds: float) -> dict:
    machine = bound.machine
    with load(unit, busy):
        machine.clock.sleep(unit.settle_ms / 1e3)
        with machine.measure() as window:
            machine.clock.sleep(seconds)
    if isinstance(window.power_mw, Missing):
        raise ProfileError(f"{machine.name}: power: {window.power_mw.reason}")
    return {"power_mw": window.power_mw, "uncertainty_pct": window.uncertainty_pct}


def _twin_load(machine: Machine) -> Load:
    return lambda unit, busy: virtual.load(machine.knobs.values(), unit.name, busy)


@contextlib.contextmanager
def spin(unit: Unit, busy: float) -> Iterator[None]:
    """Keep `busy` cores of a CPU cluster busy, the last of them in parts of 10 ms.

    Raises `ProfileError` for a GPU, whose work only its user knows.
    """
    if unit.kind != "cpu":
        raise ProfileError(f"{unit.name}: give measure_board a load for a unit of kind {unit.kind}")
    workers = []
    try:
        for i, cpu in enumerate(unit.cpus):
            share = min(busy - i, 1.0)
            if share > 0:
                command = [sys.executable, "-c", _SPIN, str(cpu), str(share)]
                workers.append(subprocess.Popen(command))
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
