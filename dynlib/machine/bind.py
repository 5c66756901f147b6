"""Where a board's model meets this machine: boards by name or `auto`, machines real or virtual."""

import contextlib
import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path

import psutil

from dynlib.boards.board import Board, Opp, Unit
from dynlib.boards.file import BOARD_DIR, list_boards, read_board
from dynlib.errors import BoardError, near
from dynlib.machine.control import Clock
from dynlib.machine.knobs import CPU, CPUFREQ, ClockKnob, find_knobs
from dynlib.machine.machine import Machine
from dynlib.machine.nvml import nvml_parts
from dynlib.machine.process import process_parts
from dynlib.machine.sensors import find_sensors
from dynlib.machine.virtual import VirtualClock, virtual_parts
from dynlib.sysfs import SysFs

_NO_LATENCY_NS = 2**32 - 1  # what a driver says that knows none


def load_board(name_or_path: str | Path) -> Board:
    """Load a board: a built-in name, the path of a TOML file, or `auto` (this machine).

    Raises `BoardError` naming file, key and what was expected; never returns half a board.

    >>> board = load_board("jetson-xavier-nx")
    >>> [unit.name for unit in board.units], board.gpu.max_mhz
    (['carmel0', 'carmel1', 'carmel2', 'gpu'], 1109.25)
    """
    name = str(name_or_path)
    if name == "auto":
        return host_board()
    if name in list_boards():
        return read_board(BOARD_DIR / f"{name}.toml")
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.is_file():
        known = near(name, list_boards())
        raise BoardError(f"unknown board {name!r}; {known}, or 'auto', or a .toml file")
    return read_board(path)


def host_board(cpufreq: str | Path = f"/{CPU}/cpufreq") -> Board:
    """The machine this runs on; its `power_mw` raises, because nobody fitted a power model.

    One unit per cpufreq policy with its table of clocks (lowest and highest where the driver has no
    table); without cpufreq a single CPU unit with one clock.
    """
    fs = SysFs(cpufreq)
    found = [_policy_unit(fs, folder) for folder in fs.glob("policy*")]
    units = tuple(unit for unit in found if unit) or (_plain_unit(),)
    name = platform.node() or "this machine"
    digest = hashlib.sha256(repr((name, units)).encode()).hexdigest()
    return Board(
        name,
        soc=platform.machine(),
        units=units,
        memory=None,
        static_mw=None,
        static_status="estimated",
        modes=(),
        thermal=None,
        sensors=(),
        measured=(),
        digest=digest,
    )


def _policy_unit(fs: SysFs, folder: str) -> Unit | None:
    mhz = ClockKnob(fs, folder, CPUFREQ, folder).choices
    cpus = fs.integers(f"{folder}/related_cpus")
    if not mhz or not cpus:
        return None
    latency_us = 0.0
    with contextlib.suppress(OSError, ValueError):
        latency_ns = fs.number(f"{folder}/cpuinfo_transition_latency")
        if latency_ns < _NO_LATENCY_NS:
            latency_us = latency_ns / 1000
    governor, *_ = fs.words(f"{folder}/scaling_governor") or ["performance"]
    return _unit(folder, cpus, mhz, governor, latency_us)


def _plain_unit() -> Unit:
    """All CPUs at one clock; where even that is hidden (some virtual machines), at 1000 MHz."""
    freq = psutil.cpu_freq()
    mhz = (freq and (freq.max or freq.current)) or 1000.0
    cpus = tuple(range(psutil.cpu_count() or 1))
    return _unit("cpu", cpus, (mhz,), "performance", 0.0)


def _unit(
    name: str, cpus: tuple[int, ...], mhz: Iterable[float], governor: str, latency_us: float
) -> Unit:
    return Unit(
        name,
        "cpu",
        cores=len(cpus),
        cpus=cpus,
        opps=tuple(Opp(float(f), 0.0) for f in mhz),
        model=platform.processor() or platform.machine(),
        governor=governor,
        c_uw_mhz_v2=None,
        idle_fraction=0.0,
        stall_ms=0.1,
        settle_ms=1.0,
        transition_latency_us=latency_us,
        noise_cv=0.10,
    )


def open_machine(
    source: str = "auto", *, root: str | Path = "/", clock: Clock | None = None, **options
) -> Machine:
    """Open a machine: `auto` is the one this runs on, with all that is found.

    A board's name or file gives its virtual twin, in time of its own. `lacks` of the result says
    what was not found, and why. `options` go to `Machine`.

    >>> with open_machine("jetson-nano") as machine:  # the machine this runs on: "auto"
    ...     applied = machine.set("gpu", "clock_mhz", 614.4)
    >>> applied.in_force, applied.problem, machine.problems
    (614.4, '', {})
    """
    if source != "auto":
        board = load_board(source)
        clock = clock or VirtualClock()
        return Machine(board.name, virtual_parts(board, clock), None, clock=clock, **options)
    fs = SysFs(root)
    knobs = find_knobs(fs)
    parts = knobs + find_sensors(fs, knobs.knobs) + process_parts(fs) + nvml_parts()
    name, *_ = fs.words("proc/sys/kernel/hostname") or ["this machine"]
    return Machine(name, parts, fs, clock=clock, **options)
