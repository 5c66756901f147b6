"""Reading a board file: strict, so that a wrong file never becomes half a board.

Each table is taken apart key by key; what is left over, missing or in the wrong unit is a
`BoardError` that names file, key path and what was expected.
"""

import hashlib
import math
import tomllib
from difflib import get_close_matches
from pathlib import Path

from dynlib.hardware.board import (
    STATUSES,
    Board,
    BoardError,
    LayerCost,
    Measured,
    Memory,
    Mode,
    Opp,
    Sensor,
    Thermal,
    Unit,
)
from dynlib.hardware.governors import GOVERNORS

_REQUIRED = object()
_SETTLE_MS = {"cpu": 1.0, "gpu": 5.0}  # arXiv 2606.16106
_NOISE_CV = {"cpu": 0.10, "gpu": 0.036}  # specs/scenarios.md
_STALL_MS = 0.1  # upper bound of the same measurement


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

    def take(self, key: str, expected: str, ok, default=_REQUIRED):
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

    def texts(self, key: str) -> tuple[str, ...]:
        texts = self.take(
            key,
            "a list of texts",
            lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v),
            [],
        )
        return tuple(texts)

    def choice(self, key: str, choices, default=_REQUIRED) -> str:
        return self.take(
            key, f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices,
            default,
        )  # fmt: skip

    def status(self, key: str, default=_REQUIRED) -> str:
        return self.choice(key, STATUSES, default)

    def number(self, key: str, default=_REQUIRED, low=0.0, high=math.inf, unit="") -> float | None:
        expected = f"a number{' in ' + unit if unit else ''} from {low:g} to {high:g}"
        value = self.take(key, expected, lambda v: _is_number(v) and low <= v <= high, default)
        return value if value is None else float(value)

    def numbers(self, key: str, default=_REQUIRED, unit="") -> tuple[float, ...]:
        def ok(value):
            return isinstance(value, list) and all(_is_number(v) for v in value)

        values = self.take(key, f"a list of numbers{' in ' + unit if unit else ''}", ok, default)
        return tuple(float(v) for v in values)

    def mhz(self, key: str, default=_REQUIRED) -> float | None:
        value = self.number(key, default)
        if value is not None:
            self.check_mhz(key, value)
        return value

    def check_mhz(self, key: str, value: float):
        if value < 10:
            self.fail(key, f"{value:g} looks like GHz", "a clock in MHz (10 to 10000)")
        if value > 10_000:
            guess = "kHz" if value < 10_000_000 else "Hz"
            self.fail(key, f"{value:g} looks like {guess}", "a clock in MHz (10 to 10000)")

    def tables(self, key: str) -> list["_Table"]:
        value = self.take(
            key,
            f"tables [[{key}]]",
            lambda v: isinstance(v, list) and all(isinstance(t, dict) for t in v),
            [],
        )
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

    def done(self):
        for key in self.left:
            close = get_close_matches(key, self.seen, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            self.fail(key, f"unknown key{hint}", f"only {', '.join(sorted(self.seen))}")


def _is_number(value) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _board(top: _Table, digest: str) -> Board:
    name, soc = top.text("name"), top.text("soc")
    sources, notes = top.texts("sources"), top.texts("notes")
    units = [_unit(table, "cpu") for table in top.tables("cluster")]
    if not units:
        top.fail("cluster", "missing or empty", "at least one [[cluster]]")
    gpu = top.table("gpu", None)
    if gpu:
        units.append(_unit(gpu, "gpu"))
    names = [unit.name for unit in units]
    if len(set(names)) < len(names):
        top.fail("cluster", f"two units of the same name in {names}", "different names")
    power = top.table("power")
    static_mw = power.number("static_mw", unit="mW")
    if 0 < static_mw < 20:
        power.fail("static_mw", f"{static_mw:g} looks like W", "a power in mW")
    static_status = power.status("static_status")
    slope = power.number("static_slope_per_c", 0.0, high=0.1, unit="1/C")
    slope_status = power.status("static_slope_status", "estimated")
    reference_c = power.number("reference_c", 40.0, unit="C")
    power.text("note", None)
    power.done()
    board = Board(
        name=name,
        soc=soc,
        units=tuple(units),
        memory=_memory(top.table("memory", None)),
        static_mw=static_mw,
        static_status=static_status,
        modes=tuple(_mode(table, units) for table in top.tables("power_mode")),
        thermal=_thermal(top.table("thermal", None)),
        sensors=tuple(_sensor(table) for table in top.tables("sensor")),
        measured=tuple(_measured(table) for table in top.tables("measured")),
        digest=digest,
        sources=sources,
        notes=notes,
        static_slope_per_c=slope,
        static_slope_status=slope_status,
        reference_c=reference_c,
    )
    top.done()
    return board


def _unit(table: _Table, kind: str) -> Unit:
    cpus = table.numbers("cpus") if kind == "cpu" else ()
    if kind == "cpu" and (not cpus or any(c < 0 or c != int(c) for c in cpus)):
        table.fail("cpus", f"{list(cpus)}", "the numbers of the cluster's CPUs")
    unit = Unit(
        name=table.text("name", "gpu" if kind == "gpu" else _REQUIRED),
        kind=kind,
        cores=max(len(cpus), 1),
        opps=table.opps(volts_needed=True),
        c_uw_mhz_v2=table.number("c_uw_mhz_v2", unit="uW/MHz/V^2"),
        idle_fraction=table.number("idle_fraction", high=1.0),
        stall_ms=table.number("stall_ms", _STALL_MS),
        settle_ms=table.number("settle_ms", _SETTLE_MS[kind]),
        governor=table.choice("governor", GOVERNORS),
        model=table.text("model"),
        cpus=tuple(int(c) for c in cpus),
        capacity=int(table.number("capacity", 1024, low=1, high=1024)),
        transition_latency_us=table.number("transition_latency_us", 0.0, unit="us"),
        memory_share=table.number("memory_share", high=1.0),
        noise_cv=table.number("noise_cv", _NOISE_CV[kind]),
        cost=_cost(table.table("cost")),
        c_status=table.status("c_status"),
        voltage_status=table.status("voltage_status"),
        idle_status=table.status("idle_status"),
        memory_share_status=table.status("memory_share_status"),
    )
    table.text("note", None)
    table.done()
    return unit


def _cost(table: _Table) -> LayerCost:
    cost = LayerCost(
        overhead_us=table.number("overhead_us"),
        us_per_mmac=table.number("us_per_mmac"),
        us_per_mmac_depthwise=table.number("us_per_mmac_depthwise"),
        us_per_kweight_depthwise=table.number("us_per_kweight_depthwise", 0.0),
        us_per_mbyte=table.number("us_per_mbyte"),
        asynchronous=table.take("asynchronous", "true or false", lambda v: isinstance(v, bool)),
        cores=int(table.number("cores", 1, low=1)),
        status=table.status("status"),
    )
    table.text("note", None)
    table.done()
    return cost


def _memory(table: _Table | None) -> Memory | None:
    if table is None:
        return None
    memory = Memory(
        model=table.text("model"),
        opps=table.opps(volts_needed=False),
        settle_ms=table.number("settle_ms", 8.0),
        status=table.status("status"),
    )
    table.text("note", None)
    table.done()
    return memory


def _mode(table: _Table, units: list[Unit]) -> Mode:
    cores = table.table("cores")
    clusters = [unit for unit in units if unit.kind == "cpu"]
    counts = tuple((u.name, int(cores.number(u.name, 0, high=u.cores))) for u in clusters)
    cores.done()
    mode = Mode(
        name=table.text("name"),
        cores=counts,
        cpu_mhz=table.mhz("cpu_mhz"),
        gpu_mhz=table.mhz("gpu_mhz", None),
        emc_mhz=table.mhz("emc_mhz", None),
        budget_w=table.number("budget_w", None, unit="W"),
    )
    table.done()
    return mode


def _thermal(table: _Table | None) -> Thermal | None:
    if table is None:
        return None
    optional = ("hysteresis_c", "critical_c", "polling_ms", "passive_polling_ms",
                "sustainable_power_mw")  # fmt: skip
    thermal = Thermal(
        zones=table.text("zones"),
        status=table.status("status"),
        passive_c=table.numbers("passive_c", []),
        fan_active_c=table.numbers("fan_active_c", []),
        note=table.text("note", ""),
        **{key: table.number(key, None) for key in optional},
    )
    table.done()
    return thermal


def _sensor(table: _Table) -> Sensor:
    texts = {key: table.text(key, "") for key in ("path", "unit", "note")}
    sensor = Sensor(
        kind=table.text("kind"),
        label=table.text("label"),
        shunt_uohm=table.number("shunt_uohm", None),
        **texts,
    )
    table.done()
    return sensor


def _measured(table: _Table) -> Measured:
    what, columns = table.text("what"), table.texts("columns")
    rows = table.take(
        "rows",
        f"a list of rows of {len(columns)} numbers",
        lambda v: (
            isinstance(v, list)
            and all(isinstance(r, list) and len(r) == len(columns) for r in v)
            and all(_is_number(x) for r in v for x in r)
        ),
    )
    table.done()
    return Measured(what, columns, tuple(tuple(float(x) for x in row) for row in rows))
