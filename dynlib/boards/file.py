"""Board files, read and written: strict, so that a wrong file never becomes half a board.

Each table is taken apart key by key; what is left over, missing or in the wrong unit is a
`BoardError` with a line for each problem, which names file, key path and what was expected. Keys
are the fields of the classes in `dynlib.boards.board`; how the name of a number ends gives its unit
and its range. A file without a [power] table is of a board whose power nobody knows.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from dynlib.boards.board import (
    Board,
    LayerCost,
    Measured,
    MemoryController,
    Meter,
    Mode,
    Opp,
    Thermal,
    Unit,
)
from dynlib.boards.governors import GOVERNORS
from dynlib.errors import BoardError
from dynlib.files import atomic_write, shown
from dynlib.toml import (
    NEEDED,
    Check,
    Table,
    as_toml,
    is_a,
    is_number,
    is_whole,
    list_of,
    read_toml,
    tomllib,
)

BOARD_DIR = Path(__file__).parent
LEAST_MW = 20  # a power in a file below it, but for 0, is taken for W


def list_boards() -> list[str]:
    """Names of the built-in boards."""
    return sorted(path.stem for path in BOARD_DIR.glob("*.toml"))


_SETTLE_MS = {"cpu": 1.0, "gpu": 5.0, "memory": 8.0}  # arXiv 2606.16106
_NOISE_CV = {"cpu": 0.10, "gpu": 0.036}  # where no measured table says otherwise
_STALL_MS = 0.1  # upper bound of the same measurement
_OF_BOARD = ("name", "soc", "sources", "notes", "fitted_within_pct", "estimated_within_pct")
_OF_POWER = ("static_", "reference_")  # how fields of a board begin that are in [power]
_OF_KIND = ("kind", "cores", "cpus", "cost")  # of a unit, and no keys of its table
_WIDE = 100  # characters; longer lists have a line for each item
_MOST_MW = 1e6  # of a whole board
_DIP = 0.02  # of a voltage, from a clock to the next: Samsung's table of the Exynos 5422 has one
# Unit and highest value that any board could have, by name; the lowest is 0.
_RANGES = {
    r"_uw_mhz_v2$": ("uW/MHz/V^2", 1e6),
    r"_mw$": ("mW", _MOST_MW),
    r"_w$": ("W", 1e3),
    r"_us$|^us_per_": ("us", 1e7),
    r"_ms$": ("ms", 1e6),
    r"_uohm$": ("uOhm", 1e8),
    r"_per_c$": ("1/C", 0.1),
    r"_c$": ("C", 200.0),
    r"_pct$": ("%", 100.0),
    r"_cv$|_fraction$|_share$": ("", 1.0),
    r"^capacity$|^cores$|^cpus$": ("", 1024.0),
}
_FROM_1 = ("capacity", "cores")  # of nothing there is no unit


def read_board(path: str | Path) -> Board:
    """The board in a TOML file; raises `BoardError` for anything but a complete, sound one."""
    content, digest = read_toml(path, BoardError)
    return _board(_Table(content, path, BoardError), digest)


def save_board(board: Board, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a board as a file that `read_board` makes the same board of, whole or not at all.

    Notes of single tables are no part of a board; they are not written. Raises `BoardError` for
    what no file can say: a unit without a power model beside others, a GPU before a CPU cluster;
    and for a file that exists, unless it is to be overwritten.
    """
    if not overwrite and Path(path).exists():
        raise BoardError(f"{path}: exists; give another name, or overwrite=True")
    text = "\n".join(_lines(board)) + "\n"
    # What a reader would refuse, or understand differently, is not written.
    try:
        content = tomllib.loads(text)
    except ValueError as problem:  # two GPUs: one table twice
        raise BoardError(f"{path}: {board.name!r} is not valid TOML: {problem}") from problem
    again = _board(_Table(content, path, BoardError), board.digest)
    for item in fields(Board):
        if item.compare and getattr(again, item.name) != getattr(board, item.name):
            raise BoardError(f"{path}: {item.name} of {board.name!r} cannot be kept in a file")
    return atomic_write(path, text)


def _lines(board: Board) -> list[str]:
    """The lines of a board's file."""
    power = [f.name for f in fields(Board) if f.name.startswith(_OF_POWER)]
    lines = _entries(board, _OF_BOARD)
    for unit in board.units:
        names = ["name", "opps", *(["cpus"] if unit.kind == "cpu" else [])]
        names += [f.name for f in fields(Unit) if f.init and f.name not in (*names, *_OF_KIND)]
        table = {"cpu": "[[cluster]]", "gpu": "[gpu]", "npu": "[[npu]]"}[unit.kind]
        lines += ["", table, *_entries(unit, names)]
        if unit.cost:
            lines += ["", f"[{table.strip('[]')}.cost]", *_entries(unit.cost)]
    powered = board if board.static_mw is not None else None
    for table, item in (("memory", board.memory), ("power", powered), ("thermal", board.thermal)):
        if item:
            lines += ["", f"[{table}]", *_entries(item, power if item is board else None)]
    for meter in board.sensors:
        lines += ["", "[[sensor]]", *_entries(meter)]
    for mode in board.modes:
        cores = ", ".join(f"{as_toml(name)} = {count}" for name, count in mode.cores)
        names = [f.name for f in fields(Mode) if f.name != "cores"]
        lines += ["", "[[power_mode]]", *_entries(mode, names), f"cores = {{ {cores} }}"]
    for measured in board.measured:
        lines += ["", "[[measured]]", *_entries(measured)]
    return lines


def _entries(item: Any, names: Iterable[str] | None = None) -> list[str]:
    """Lines for the fields of a dataclass that say something."""
    lines = []
    for name in names or [f.name for f in fields(item)]:
        value = getattr(item, name)
        if name == "opps":
            value = [(opp.freq_mhz, opp.voltage_mv) for opp in value]
        if value in (None, ""):
            continue
        text = as_toml(value)
        if isinstance(value, list | tuple) and len(text) > _WIDE:
            text = "[\n" + "".join(f"  {as_toml(item)},\n" for item in value) + "]"
        lines.append(f"{name} = {text}")
    return lines


class _Table(Table):
    """A table of a board file; every one may have a `note`."""

    def kind(self, key: str, hint: Any) -> tuple[str, Check]:
        words, fits = super().kind(key, hint)
        if hint is str:
            return words, lambda value: fits(value) and bool(value.strip())
        if hint not in (int, float):
            return words, fits
        unit, most = _range(key)
        least = int(key in _FROM_1)
        words = words.replace("finite ", "")
        if unit:
            words += f" in {unit}"
        if most < math.inf:
            words += f" from {least} to {most:g}"
        return words, lambda value: fits(value) and least <= value <= most

    def read(self, key: str, hint: Any, default: Any = NEEDED) -> Any:
        value = super().read(key, hint, default)
        if hint is float and value is not None:
            if key.endswith("_mhz"):
                self.check_mhz(key, value)
            if key.endswith("_mw") and 0 < value < LEAST_MW:
                self.fail(key, f"{value:g} looks like W; expected a power in mW")
        return value

    def check_mhz(self, key: str, value: float) -> None:
        if 10 <= value <= 10_000:
            return
        guess = "Hz"
        if value < 10:
            guess = "GHz"
        elif value < 10_000_000:
            guess = "kHz"
        self.fail(key, f"{value:g} looks like {guess}; expected a clock in MHz (10 to 10000)")

    def check_mv(self, key: str, value: float) -> None:
        if 300 <= value <= 3000:
            return
        hint = ""
        if 0 < value < 10:
            hint = " looks like V"
        elif value > 100_000:
            hint = " looks like uV"
        self.fail(key, f"{value:g}{hint}; expected a voltage in mV (300 to 3000)")

    def opps(self, volts_needed: bool) -> tuple[Opp, ...]:
        expected = "a list of [MHz, mV] pairs, clocks ascending"
        pairs = self.take("opps", expected, lambda value: isinstance(value, list) and value)
        opps: list[Opp] = []
        for i, pair in enumerate(pairs):
            key = f"opps[{i}]"
            opp = self.attempt(self._opp, key, pair, volts_needed)
            if opp is None:
                continue
            if opps and opp.freq_mhz <= opps[-1].freq_mhz:
                steps = f"{opp.freq_mhz:g} MHz after {opps[-1].freq_mhz:g} MHz"
                self.attempt(self.fail, key, f"{steps}; expected {expected}")
            elif opps and opp.voltage_mv < (1 - _DIP) * opps[-1].voltage_mv:
                steps = f"{opp.voltage_mv:g} mV after {opps[-1].voltage_mv:g} mV"
                rising = "voltages that do not fall while the clock rises"
                self.attempt(self.fail, key, f"{steps}; expected {rising}")
            opps.append(opp)
        return tuple(opps)

    def _opp(self, key: str, pair: Any, volts_needed: bool) -> Opp:
        if not (list_of(is_number)(pair) and len(pair) == 2):
            self.fail(key, f"{shown(pair)}; expected a pair [MHz, mV]")
        opp = Opp(*map(float, pair))
        self.check_mhz(key, opp.freq_mhz)
        if volts_needed or opp.voltage_mv:  # 0 is a voltage that nobody knows
            self.check_mv(key, opp.voltage_mv)
        return opp

    def done(self) -> None:
        if "note" not in self.seen:
            self.attempt(self.read, "note", str, None)
        super().done()


def _range(key: str) -> tuple[str, float]:
    """Unit and highest value of a number, from the end of its name."""
    for ending, unit_and_most in _RANGES.items():
        if re.search(ending, key):
            return unit_and_most
    return "", math.inf


def _board(top: _Table, digest: str) -> Board:
    given = top.values(Board, _OF_BOARD)
    if top.left.get("cluster", []) == [] and not {"gpu", "npu"} & set(top.left):
        missing = "missing or empty; expected at least one [[cluster]], a [gpu] or an [[npu]]"
        top.attempt(top.fail, "cluster", missing)
    top.attempt(_check_cpus, top)
    powered = "power" in top.left
    units = [*top.records("cluster", _unit, "cpu", powered)]
    if gpu := top.attempt(top.table, "gpu", None):
        units.append(top.attempt(_unit, gpu, "gpu", powered))
    npus = top.records("npu", _unit, "npu", powered)
    units += npus
    sound = None not in units
    top.attempt(_check_names, top, [unit.name for unit in units if unit])
    static = {f.name: f.default for f in fields(Board) if f.name.startswith(_OF_POWER)}
    given |= static | {"static_mw": None, "static_status": "estimated"}
    if power := top.attempt(top.table, "power", None):
        given |= power.values(Board, static, needed=["static_mw"])
        top.attempt(power.done)
        if sound and given["static_mw"] is not None:
            top.attempt(_check_power, top, units, given["static_mw"])
    memory = top.attempt(top.table, "memory", None)
    thermal = top.attempt(top.table, "thermal", None)
    given |= {
        "units": tuple(units),
        "memory": memory and top.attempt(_memory, memory),
        "modes": top.records("power_mode", _mode, units if sound else None),
        "thermal": thermal and top.attempt(thermal.record, Thermal),
        "sensors": top.records("sensor", lambda table: table.record(Meter)),
        "measured": top.records("measured", _measured),
        "digest": digest,
    }
    if npus and given["modes"]:
        top.attempt(top.fail, "power_mode", "of a board with an [[npu]], whose clock no mode names")
    return top.record(Board, given)


def _check_names(top: _Table, names: list[str]) -> None:
    if len(set(names)) < len(names):
        top.fail("cluster", f"two units of the same name in {names}; expected different names")


def _check_cpus(top: _Table) -> None:
    """Refuse a CPU that is named twice; of clusters with other faults too."""
    clusters = top.left.get("cluster")
    if not list_of(is_a(dict))(clusters):
        return
    named = [cluster.get("cpus") for cluster in clusters]
    counts = Counter(cpu for cpus in named if list_of(is_whole)(cpus) for cpu in cpus)
    shared = sorted(cpu for cpu, count in counts.items() if count > 1)
    if shared:
        top.fail("cluster", f"cpus {shared} are named twice; expected each CPU in one cluster")


def _check_power(top: _Table, units: list[Unit], static_mw: float) -> None:
    """Refuse coefficients that are sound alone and absurd together."""
    most_mw = static_mw + sum(unit.power_mw(unit.max_mhz, unit.cores) for unit in units)
    if most_mw > _MOST_MW:
        problem = f"{most_mw / 1e3:,.0f} W with all units busy at their highest clocks"
        top.fail("power", f"{problem}; expected at most {_MOST_MW / 1e3:,.0f} W")


def _unit(table: _Table, kind: str, powered: bool) -> Unit:
    cpus = table.attempt(_cpus, table) if kind == "cpu" else ()
    given = {
        "kind": kind,
        "name": table.attempt(table.read, "name", str, "gpu" if kind == "gpu" else NEEDED),
        "cores": max(len(cpus or ()), 1),
        "cpus": cpus,
        "governor": table.attempt(table.read, "governor", Literal[tuple(GOVERNORS)]),
        "opps": table.attempt(table.opps, volts_needed=powered),
        "cost": table.attempt(_cost, table),
    }
    # What the class has a default for is not to be forgotten in a file.
    needed = ["model", "memory_share"]
    needed += [f.name for f in fields(Unit) if f.name.endswith("_status")]
    usual = {"stall_ms": _STALL_MS}
    if kind == "npu":  # of which nobody has published what is usual
        needed += ["settle_ms", "noise_cv"]
    else:
        usual |= {"settle_ms": _SETTLE_MS[kind], "noise_cv": _NOISE_CV[kind]}
    if powered:
        needed.append("c_uw_mhz_v2")
    elif "c_uw_mhz_v2" in table.left:
        needs = "given, and there is no table [power]; expected both or neither"
        table.attempt(table.fail, "c_uw_mhz_v2", needs)
    return table.record(Unit, given, needed, **usual)


def _cpus(table: _Table) -> tuple[int, ...]:
    cpus = table.read("cpus", tuple[int, ...])
    if not cpus:
        table.fail("cpus", "[]; expected the numbers of the cluster's CPUs")
    return cpus


def _cost(table: _Table) -> LayerCost | None:
    """None where nobody timed single layers."""
    cost = table.table("cost", None)
    return cost and cost.record(LayerCost, cores=1, us_per_kweight_depthwise=0.0)


def _memory(table: _Table) -> MemoryController:
    given = {"opps": table.attempt(table.opps, volts_needed=False)}
    return table.record(MemoryController, given, settle_ms=_SETTLE_MS["memory"])


def _mode(table: _Table, units: list[Unit] | None) -> Mode:
    """A power mode; its cores are not looked at where not all units are known."""
    if units is None:
        table.attempt(table.table, "cores")
        return table.record(Mode, {"cores": ()})
    return table.record(Mode, {"cores": table.attempt(_cores, table, units)})


def _cores(table: _Table, units: list[Unit]) -> tuple[tuple[str, int], ...]:
    cores = table.table("cores")
    clusters = [unit for unit in units if unit.kind == "cpu"]
    counts = [(unit.name, cores.attempt(_online, cores, unit)) for unit in clusters]
    cores.done()
    return tuple(counts)


def _online(cores: _Table, unit: Unit) -> int:
    expected = f"a number of cores from 0 to {unit.cores}"
    allowed = range(unit.cores + 1)
    return cores.take(unit.name, expected, lambda v: is_whole(v) and v in allowed, 0)


def _measured(table: _Table) -> Measured:
    what = table.attempt(table.read, "what", str)
    columns = table.attempt(table.read, "columns", tuple[str, ...])
    if columns is None:  # and nobody knows how long a row has to be
        table.left.pop("rows", None)
        table.done()

    def is_row(value: object) -> bool:
        return list_of(is_number)(value) and len(value) == len(columns)

    expected = f"a list of rows of {len(columns)} numbers"
    rows = table.attempt(table.take, "rows", expected, list_of(is_row))
    table.done()
    return Measured(what, columns, tuple(tuple(map(float, row)) for row in rows))
