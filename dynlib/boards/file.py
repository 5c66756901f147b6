"""Reading a board file: strict, so that a wrong file never becomes half a board.

Each table is taken apart key by key; what is left over, missing or in the wrong unit is a
`BoardError` that names file, key path and what was expected. Keys are the fields of the classes in
`dynlib.boards.board`; how the name of a number ends gives its unit and its range.
"""

import hashlib
import math
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import get_type_hints

from dynlib.boards.board import (
    STATUSES,
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

BOARD_DIR = Path(__file__).parent


def list_boards() -> list[str]:
    """Names of the built-in boards."""
    return sorted(path.stem for path in BOARD_DIR.glob("*.toml"))


_REQUIRED = object()
_SETTLE_MS = {"cpu": 1.0, "gpu": 5.0, "memory": 8.0}  # arXiv 2606.16106
_NOISE_CV = {"cpu": 0.10, "gpu": 0.036}  # where no measured table says otherwise
_STALL_MS = 0.1  # upper bound of the same measurement
# Unit and highest value that any board could have, by name; the lowest is 0.
_RANGES = {
    r"_uw_mhz_v2$": ("uW/MHz/V^2", 1e6),
    r"_mw$": ("mW", 1e6),
    r"_w$": ("W", 1e3),
    r"_us$|^us_per_": ("us", 1e7),
    r"_ms$": ("ms", 1e6),
    r"_uohm$": ("uOhm", 1e8),
    r"_per_c$": ("1/C", 0.1),
    r"_c$": ("C", 200.0),
    r"_cv$|_fraction$|_share$": ("", 1.0),
    r"^capacity$|^cores$|^cpus$": ("", 1024.0),
}


def read_board(path: Path) -> Board:
    """The board in a TOML file; raises `BoardError` for anything but a complete, sound one."""
    try:
        raw = Path(path).read_bytes()
        table = tomllib.loads(raw.decode())
    except OSError as error:
        raise BoardError(f"{path}: cannot read the board file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BoardError(f"{path}: not UTF-8 text; expected a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise BoardError(f"{path}: not valid TOML: {error}") from error
    return _board(_Table(table, path), hashlib.sha256(raw).hexdigest())


class _Table:
    """One TOML table that is emptied key by key."""

    def __init__(self, table: dict, file: Path, where: str = ""):
        self.left, self.file, self.where, self.seen = dict(table), file, where, []

    def fail(self, key: str, problem: str, expected: str):
        raise BoardError(f"{self.file}: {self.where}{key}: {problem}; expected {expected}")

    def take(self, key: str, expected: str, ok: Callable[[object], bool], default=_REQUIRED):
        self.seen.append(key)
        if key not in self.left:
            if default is not _REQUIRED:
                return default
            close = get_close_matches(key, self.left, n=1)
            self.fail(key, "missing" + (f" (is {close[0]!r} meant?)" if close else ""), expected)
        value = self.left.pop(key)
        if not ok(value):
            self.fail(key, f"{value!r:.60}", expected)
        return value

    def text(self, key: str, default=_REQUIRED) -> str:
        return self.take(key, "a text", lambda v: isinstance(v, str) and v.strip(), default)

    def texts(self, key: str, default=()) -> tuple[str, ...]:
        return tuple(self.take(key, "a list of texts", lambda v: _all(v, str), default))

    def choice(self, key: str, choices: Iterable[str], default=_REQUIRED) -> str:
        expected = f"one of {', '.join(choices)}"
        return self.take(key, expected, lambda v: isinstance(v, str) and v in choices, default)

    def status(self, key: str, default=_REQUIRED) -> str:
        return self.choice(key, STATUSES, default)

    def flag(self, key: str, default=_REQUIRED) -> bool:
        return self.take(key, "true or false", lambda v: isinstance(v, bool), default)

    def number(self, key: str, default=_REQUIRED, high: float = math.inf) -> float | None:
        expected, ok = _range(key, high)
        value = self.take(key, f"a number{expected}", ok, default)
        if value is None:
            return None
        if key.endswith("_mhz"):
            self.check_mhz(key, value)
        if key.endswith("_mw") and 0 < value < 20:
            self.fail(key, f"{value:g} looks like W", "a power in mW")
        return float(value)

    def numbers(self, key: str, default=_REQUIRED) -> tuple[float, ...]:
        expected, ok = _range(key)
        values = self.take(key, f"a list of numbers{expected}",
                           lambda v: isinstance(v, list) and all(map(ok, v)), default)  # fmt: skip
        return tuple(map(float, values))

    def check_mhz(self, key: str, value: float):
        if not 10 <= value <= 10_000:
            guess = "GHz" if value < 10 else "kHz" if value < 10_000_000 else "Hz"
            self.fail(key, f"{value:g} looks like {guess}", "a clock in MHz (10 to 10000)")

    def tables(self, key: str) -> list["_Table"]:
        value = self.take(key, f"tables [[{key}]]", lambda v: _all(v, dict), [])
        return [_Table(t, self.file, f"{self.where}{key}[{i}].") for i, t in enumerate(value)]

    def table(self, key: str, default=_REQUIRED) -> "_Table | None":
        value = self.take(key, f"a table [{key}]", lambda v: isinstance(v, dict), default)
        return value if value is None else _Table(value, self.file, f"{self.where}{key}.")

    def opps(self, volts_needed: bool) -> tuple[Opp, ...]:
        expected = "a list of [MHz, mV] pairs, clocks ascending"
        pairs = self.take("opps", expected, lambda v: isinstance(v, list) and len(v) > 0)
        for i, pair in enumerate(pairs):
            key = f"opps[{i}]"
            if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))):
                self.fail(key, f"{pair!r:.60}", "a pair [MHz, mV]")
            mhz, mv = pair
            self.check_mhz(key, mhz)
            if (volts_needed or mv) and not 300 <= mv <= 3000:
                hint = " looks like V" if 0 < mv < 10 else " looks like uV" if mv > 1e5 else ""
                self.fail(key, f"{mv:g}{hint}", "a voltage in mV (300 to 3000)")
            if i and mhz <= pairs[i - 1][0]:
                self.fail(key, f"{mhz:g} MHz after {pairs[i - 1][0]:g} MHz", expected)
        return tuple(Opp(float(mhz), float(mv)) for mhz, mv in pairs)

    def values(self, cls: type, names: Iterable[str], needed=(), **defaults) -> dict:
        """The fields `names` of a class, each as its annotation and name say.

        A field without a default is needed, unless it may be None; so are those in `needed`.
        """
        hints, known = get_type_hints(cls), {field.name: field.default for field in fields(cls)}
        readers = {
            str: self.text, float: self.number, float | None: self.number, bool: self.flag,
            int: lambda *args: int(self.number(*args)),
            tuple[str, ...]: self.texts, tuple[float, ...]: self.numbers,
        }  # fmt: skip
        found = {}
        for name in names:
            hint, default = hints[name], defaults.get(name, known[name])
            if name in needed or default is MISSING:
                default = None if hint == float | None and name not in needed else _REQUIRED
            read = self.status if name.endswith("status") else readers[hint]
            found[name] = read(name, default)
        return found

    def record(self, cls: type, needed=(), given: dict | None = None, **defaults):
        """An object of a class from the rest of this table; `given` fields were read before."""
        given = given or {}
        names = [f.name for f in fields(cls) if f.init and f.name not in given]
        made = cls(**given, **self.values(cls, names, needed, **defaults))
        if "note" not in names:
            self.text("note", None)
        self.done()
        return made

    def done(self):
        for key in self.left:
            close = get_close_matches(key, self.seen, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            self.fail(key, f"unknown key{hint}", f"only {', '.join(sorted(self.seen))}")


def _is_number(value) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _all(value, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _range(key: str, high: float = math.inf) -> tuple[str, Callable[[object], bool]]:
    """What the name of a number promises: in words, and as a check."""
    unit, most = next((r for end, r in _RANGES.items() if re.search(end, key)), ("", math.inf))
    most = min(most, high)
    words = (f" in {unit}" if unit else "") + (f" from 0 to {most:g}" if most < math.inf else "")
    return words, lambda v: _is_number(v) and 0 <= v <= most


def _board(top: _Table, digest: str) -> Board:
    names = top.values(Board, ("name", "soc", "sources", "notes"))
    units = [_unit(table, "cpu") for table in top.tables("cluster")]
    if not units:
        top.fail("cluster", "missing or empty", "at least one [[cluster]]")
    if gpu := top.table("gpu", None):
        units.append(_unit(gpu, "gpu"))
    known = [unit.name for unit in units]
    if len(set(known)) < len(known):
        top.fail("cluster", f"two units of the same name in {known}", "different names")
    table = top.table("power")
    static = [f.name for f in fields(Board) if f.name.startswith(("static_", "reference_"))]
    power = table.values(Board, static, needed=["static_mw"])
    table.text("note", None)
    table.done()
    memory, thermal = top.table("memory", None), top.table("thermal", None)
    board = Board(
        units=tuple(units),
        memory=memory and memory.record(
            MemoryController, settle_ms=_SETTLE_MS["memory"], given={"opps": memory.opps(False)}),
        modes=tuple(_mode(table, units) for table in top.tables("power_mode")),
        thermal=thermal and thermal.record(Thermal),
        sensors=tuple(table.record(Meter) for table in top.tables("sensor")),
        measured=tuple(_measured(table) for table in top.tables("measured")),
        digest=digest,
        **names,
        **power,
    )  # fmt: skip
    top.done()
    return board


def _unit(table: _Table, kind: str) -> Unit:
    cpus = table.numbers("cpus") if kind == "cpu" else ()
    if kind == "cpu" and (not cpus or any(c != int(c) for c in cpus)):
        table.fail("cpus", f"{list(cpus)}", "the numbers of the cluster's CPUs")
    cost = table.table("cost").record(LayerCost, cores=1, us_per_kweight_depthwise=0.0)
    given = {
        "kind": kind, "cores": max(len(cpus), 1), "cpus": tuple(int(c) for c in cpus),
        "name": table.text("name", "gpu" if kind == "gpu" else _REQUIRED), "cost": cost,
        "governor": table.choice("governor", GOVERNORS), "opps": table.opps(volts_needed=True),
    }  # fmt: skip
    needed = ["c_uw_mhz_v2", "model", "memory_share"]
    needed += [f.name for f in fields(Unit) if f.name.endswith("_status")]
    return table.record(Unit, needed, given, stall_ms=_STALL_MS, settle_ms=_SETTLE_MS[kind],
                        noise_cv=_NOISE_CV[kind])  # fmt: skip


def _mode(table: _Table, units: list[Unit]) -> Mode:
    cores = table.table("cores")
    clusters = [unit for unit in units if unit.kind == "cpu"]
    counts = tuple((u.name, int(cores.number(u.name, 0, high=u.cores))) for u in clusters)
    cores.done()
    return table.record(Mode, given={"cores": counts})


def _measured(table: _Table) -> Measured:
    what, columns = table.text("what"), table.texts("columns")
    rows = table.take(
        "rows",
        f"a list of rows of {len(columns)} numbers",
        lambda v: _all(v, list) and all(len(r) == len(columns) and all(map(_is_number, r))
                                        for r in v),
    )  # fmt: skip
    table.done()
    return Measured(what, columns, tuple(tuple(map(float, row)) for row in rows))
