"""Where a board's model meets this machine: boards by name or `auto`, machines real or virtual.

`bind` says which unit of a machine is which of a board, and turns its knobs by the board's names.
"""

import contextlib
import hashlib
import logging
import platform
from collections.abc import Iterable
from pathlib import Path

import psutil

from dynlib.boards.board import Board, Mode, Opp, Unit
from dynlib.boards.file import BOARD_DIR, list_boards, read_board
from dynlib.errors import BoardError, MachineError, near
from dynlib.machine.control import Clock, MachineUnit, Missing
from dynlib.machine.duty import duty_mhz, duty_parts
from dynlib.machine.knobs import CPU, CPUFREQ, ClockKnob, EmcKnob, find_knobs
from dynlib.machine.machine import Applied, Machine
from dynlib.machine.nvml import nvml_parts
from dynlib.machine.process import process_parts
from dynlib.machine.sensors import find_sensors
from dynlib.machine.virtual import VirtualClock, virtual_parts
from dynlib.sysfs import SysFs

_LOG = logging.getLogger(__name__)
_NO_LATENCY_NS = 2**32 - 1  # what a driver says that knows none
_CAP_S = 1.0  # a cap that is seen no more is taken to last so long
MEMORY = "memory"  # a board's memory controller, as a unit


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
    """All CPUs at the steps of a duty clock, which is all there is to set."""
    cpus = tuple(range(psutil.cpu_count() or 1))
    return _unit("cpu", cpus, duty_mhz(_max_mhz()), "performance", 0.0)


def _max_mhz() -> float:
    """Of the CPUs; where even that is hidden (some virtual machines), 1000 MHz."""
    freq = psutil.cpu_freq()
    return (freq and (freq.max or freq.current)) or 1000.0


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
    source: str = "auto",
    *,
    root: str | Path = "/",
    clock: Clock | None = None,
    own: bool = True,
    **options,
) -> Machine:
    """Open a machine: `auto` is the one this runs on, with all that is found.

    A board's name or file gives its virtual twin, in time of its own. `lacks` of the result says
    what was not found, and why. Without `own` there is no knob that this process alone would feel.
    `options` go to `Machine`.

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
    parts = knobs + find_sensors(fs, knobs.knobs) + nvml_parts()
    if own:
        parts += process_parts(fs)
        parts += duty_parts(parts, _max_mhz())
    name, *_ = fs.words("proc/sys/kernel/hostname") or ["this machine"]
    return Machine(name, parts, fs, clock=clock, **options)


class Binding:
    """A board's units on a machine: knobs and caps by the names of the board.

    Attributes:
        units: of the board, `memory` included -> the machine's unit or units it is; () where there
            is none.
        sensors: of the machine, whose sum is the power or energy of the whole board.
        modes: the power modes of the board's file that the machine has too, by name.
        lacks: what does not fit, in words; grows when a knob is asked for that is not there.
    """

    def __init__(self, board: Board, machine: Machine):
        self.board, self.machine = board, machine
        self.lacks: list[str] = []
        self.units = {unit.name: self._find(unit) for unit in board.units}
        self._freqs = {unit.name: unit.freqs for unit in board.units}
        if board.memory:
            self.units[MEMORY] = self._of_kind(MEMORY, MEMORY)
            self._freqs[MEMORY] = tuple(opp.freq_mhz for opp in board.memory.opps)
            self._list_memory_clocks()
        for unit in self.units:
            self._check_clocks(unit)
        self.modes = self._find_modes()
        self.sensors = self._find_sensors()
        self._asked: dict[str, float] = {}
        self._seen: dict[str, tuple[float, int]] = {}

    def has(self, unit: str, kind: str) -> bool:
        """Whether the machine has this knob and still lets us turn it."""
        keys = self._keys(unit, kind)
        return bool(keys) and not any(key in self.machine.refused for key in keys)

    def get(self, unit: str, kind: str):
        """The value in force, or `Missing`: all cores; of clocks that differ the lowest."""
        values = [self.machine.get(*key) for key in self._keys(unit, kind)]
        values = [value for value in values if not isinstance(value, Missing)]
        if not values:
            return Missing(f"{unit}.{kind}: the machine does not say")
        if kind == "cores":
            return self._fixed_cores(unit) + sum(values)
        return min(values)

    def set(self, unit: str, kind: str, value) -> Applied:
        """Turn a knob: `clock_mhz`, `governor`, `cores` or whatever else the machine's unit has.

        One that the machine lacks, or that does not take this value, is left alone: the reason is
        in `problem`, and once in `lacks` and the log. Raises `BoardError` for an unknown unit, and
        `MachineError` outside of the machine's `with` block.
        """
        keys = self._keys(unit, kind)
        if not keys:
            return self._left_alone(unit, kind, value, f"{unit}.{kind}: no such knob here")
        values = self._shares(unit, value) if kind == "cores" else [value] * len(keys)
        try:
            for key, share in zip(keys, values, strict=True):
                self.machine.knobs[key].allowed(share)
        except MachineError as error:
            return self._left_alone(unit, kind, value, str(error))
        done = [self.machine.set(*key, share) for key, share in zip(keys, values, strict=True)]
        if kind == "clock_mhz":
            self._asked[unit] = done[0].asked  # as the machine lists it: limits compare with that
        problem = next((applied.problem for applied in done if applied.problem), "")
        return Applied(unit, kind, value, self.get(unit, kind), problem)

    def caps(self, kind: str = "clock_mhz") -> dict[str, float]:
        """The most that units are allowed at present: clocks in MHz, or `cores`.

        By the power mode in force, and for clocks also by a limit that the kernel shows below what
        was asked: heat, firmware, somebody else. Such a limit no longer shows once we keep to it,
        so it lasts for a second after it was last seen; then it is worth another try.
        """
        caps = self._mode_caps(kind)
        if kind == "clock_mhz":
            for unit in self.units:
                limit_mhz = self._limit_mhz(unit)
                caps[unit] = min(limit_mhz, caps.get(unit, limit_mhz))
        return {unit: cap for unit, cap in caps.items() if cap < self._most(unit, kind)}

    def _find(self, unit: Unit) -> tuple[str, ...]:
        """The machine's units with just the CPUs of a cluster; the machine's only GPU."""
        if unit.kind != "cpu":
            return self._of_kind(unit.name, unit.kind)
        cpus = set(unit.cpus)
        touched = [u for u in self._machine_units("cpu") if cpus & set(u.cpus)]
        for other in touched:
            if beyond := sorted(set(other.cpus) - cpus):
                self.lacks.append(f"{unit.name}: {other.name} also has the CPUs {beyond}")
                return ()
        found = {cpu for other in touched for cpu in other.cpus}
        if found < cpus:
            self.lacks.append(f"{unit.name}: the machine has no CPUs {sorted(cpus - found)}")
        return tuple(other.name for other in touched)

    def _of_kind(self, name: str, kind: str) -> tuple[str, ...]:
        names = [unit.name for unit in self._machine_units(kind)]
        if name in names:
            return (name,)
        if len(names) == 1:
            return tuple(names)
        there = f"{names}, none called {name!r}" if names else "none"
        self.lacks.append(f"{name}: of kind {kind} the machine has {there}")
        return ()

    def _machine_units(self, kind: str) -> list[MachineUnit]:
        return [unit for unit in self.machine.units.values() if unit.kind == kind]

    def _list_memory_clocks(self) -> None:
        """Of a Jetson's memory clock the kernel lists both ends only; the board knows the rest."""
        key = (MEMORY, "clock_mhz")
        knob = self.machine.knobs.get(key)
        if isinstance(knob, EmcKnob):
            self.machine.knobs[key] = EmcKnob(knob.fs, self._freqs[MEMORY])

    def _check_clocks(self, unit: str) -> None:
        for key in self._keys(unit, "clock_mhz"):
            knob, wrong = self.machine.knobs[key], []
            for mhz in self._freqs[unit]:
                try:
                    knob.allowed(mhz)
                except MachineError:
                    wrong.append(f"{mhz:g}")
            if wrong:
                self.lacks.append(f"{unit}: {key[0]} has no clocks of {', '.join(wrong)} MHz")
        if not self._keys(unit, "clock_mhz") and self.units[unit]:
            self.lacks.append(f"{unit}: its clock cannot be set here")

    def _find_modes(self) -> dict[str, Mode]:
        modes = {mode.name: mode for mode in self.board.modes}
        if not modes:
            return {}
        knob = self.machine.knobs.get(("board", "mode"))
        known = knob.choices if knob else ()
        if unknown := [name for name in modes if name not in known]:
            self.lacks.append(f"power modes: the machine has no {', '.join(unknown)}")
        return {name: mode for name, mode in modes.items() if name in known}

    def _find_sensors(self) -> tuple[str, ...]:
        """The rails that the board's file names as its total; without them the machine's guess."""
        sensors = self.machine.sensors
        rails = [rail for meter in self.board.sensors for rail in meter.total]
        if rails and self.machine.fs is not None:  # a virtual twin measures itself
            named = [f"{rail}.power" for rail in rails]
            missing = [name for name in named if name not in sensors]
            if not missing:
                for name, sensor in sensors.items():
                    sensor.total = name in named
            else:
                self.lacks.append(f"power of the whole board: no sensors {', '.join(missing)}")
        total = tuple(name for name, sensor in sensors.items() if sensor.total)
        if not total:
            self.lacks.append("power of the whole board: no sensor")
        return total

    def _keys(self, unit: str, kind: str) -> list[tuple[str, str]]:
        """The machine's knobs of this kind on a unit; raises `BoardError` for an unknown unit."""
        if unit not in self.units:
            self.board.unit(unit)
        keys = [(name, kind) for name in self.units[unit]]
        return [key for key in keys if key in self.machine.knobs]

    def _shares(self, unit: str, count: int) -> list[int]:
        """How many of `count` cores each of the machine's units has online; the first ones fill.

        Three cores of a cluster that the machine has as two units of two CPUs: 2 and 1.
        """
        left, shares = count - self._fixed_cores(unit), []
        for name, _ in self._keys(unit, "cores"):
            share = min(left, len(self.machine.units[name].cpus))
            shares.append(share)
            left -= share
        if shares:
            shares[-1] += left  # more than there are is for the knob to refuse
        return shares

    def _fixed_cores(self, unit: str) -> int:
        """CPUs of units that cannot go offline, such as cpu0 in a unit of its own."""
        held = [name for name in self.units[unit] if (name, "cores") not in self.machine.knobs]
        return sum(len(self.machine.units[name].cpus) for name in held)

    def _left_alone(self, unit: str, kind: str, value, reason: str) -> Applied:
        if reason not in self.lacks:
            self.lacks.append(reason)
            _LOG.warning("%s: left alone: %s", self.machine.name, reason)
        in_force = self.get(unit, kind)
        return Applied(unit, kind, value, in_force, reason)

    def _mode_caps(self, kind: str) -> dict[str, float]:
        mode = self.modes.get(self.machine.get("board", "mode")) if self.modes else None
        if mode is None:
            return {}
        if kind == "cores":
            return dict(mode.cores)
        of_kind = {"cpu": mode.cpu_mhz, "gpu": mode.gpu_mhz}
        caps = {unit.name: of_kind[unit.kind] for unit in self.board.units}
        caps[MEMORY] = mode.emc_mhz
        return {unit: cap for unit, cap in caps.items() if cap is not None and unit in self.units}

    def _limit_mhz(self, unit: str) -> float:
        """The lowest upper limit that the kernel shows below what was asked, or has just shown."""
        most_mhz, now_ns = self._most(unit, "clock_mhz"), self.machine.clock.now_ns()
        asked_mhz = self._asked.get(unit, most_mhz)
        for key in self._keys(unit, "clock_mhz"):
            knob = self.machine.knobs[key]
            if not isinstance(knob, ClockKnob):
                continue
            with contextlib.suppress(OSError, ValueError):
                limit_mhz = knob.fs.number(knob.high) / knob.per_mhz
                if limit_mhz < asked_mhz:
                    self._seen[unit] = limit_mhz, now_ns
        cap_mhz, seen_ns = self._seen.get(unit, (most_mhz, now_ns))
        return cap_mhz if now_ns - seen_ns <= 1e9 * _CAP_S else most_mhz

    def _most(self, unit: str, kind: str) -> float:
        return self._freqs[unit][-1] if kind == "clock_mhz" else self.board.unit(unit).cores


def bind(board: Board, machine: Machine) -> Binding:
    """Tie a board's model to a machine: CPU units by their CPUs, GPU and memory by their kind.

    >>> board = load_board("jetson-xavier-nx")
    >>> with open_machine("jetson-xavier-nx") as machine:  # its virtual twin
    ...     bound = bind(board, machine)
    ...     applied = bound.set("gpu", "clock_mhz", 510)
    >>> applied.in_force, bound.units["carmel0"], bound.lacks
    (510.0, ('carmel0',), [])
    """
    return Binding(board, machine)
