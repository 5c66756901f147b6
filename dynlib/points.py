"""Operating points: what search and profiling hand to the runtime manager, a CSV table.

`PointTable` is such a table as the manager looks it up: one model on one board, at every clock.
"""

import hashlib
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from dynlib.errors import TableError, near
from dynlib.setting import PLAIN, Setting
from dynlib.source import Source, weakest

# What stands a floor above, in `dynlib.boards`.
_Board = Any
_Unit = Any

TEXT_COLUMNS = ("model", "subnet", "backend", "precision", "board", "unit", "source")
KEY_COLUMNS = (
    "model",
    "subnet",
    "exit_threshold",
    "backend",
    "precision",
    "board",
    "unit",
    "cores",
    "threads",
    "quota",
    "cpu_mhz",
    "gpu_mhz",
    "emc_mhz",
    "batch",
)
VALUE_COLUMNS = (
    "accuracy_val_pct",
    "accuracy_test_pct",
    "latency_ms",
    "latency_std_ms",
    "latency_p95_ms",
    "energy_mj",
    "power_mw",
    "idle_power_mw",
    "memory_mb",
    "macs_m",
    "params_m",
)
POINT_COLUMNS = (*KEY_COLUMNS, *VALUE_COLUMNS, "source")
REQUIRED = ("model", "subnet", "board", "unit", "batch", "latency_ms", "source")
LARGEST = 1e12  # of any number, so that no square of one overflows
LEAST_MS = 1e-6
_LOG = logging.getLogger(__name__)


def make_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Build a valid operating-point table from dictionaries; missing values stay unknown (NaN).

    Raises `TableError` for unknown columns and whatever `check_table` finds.
    """
    rows = list(rows)
    unknown = sorted({key for row in rows for key in row} - set(POINT_COLUMNS))
    if unknown:
        raise TableError(
            f"unknown operating-point columns {unknown}; the schema is {POINT_COLUMNS}"
        )
    return check_table(pd.DataFrame(rows, columns=list(POINT_COLUMNS)), "table")


def check_table(table: pd.DataFrame, name: str | Path = "table") -> pd.DataFrame:
    """Return `table` with its types set; raises `TableError` naming `name`, row and column."""
    missing = [column for column in POINT_COLUMNS if column not in table.columns]
    extra = [column for column in table.columns if column not in POINT_COLUMNS]
    if missing or extra:
        # Those first that make_table cannot add.
        first = [column for column in missing if column in REQUIRED] or missing
        wrong = f"missing columns {first}, unknown columns {extra}"
        raise TableError(f"{name}: {wrong}; make_table adds the columns that may be empty")
    if table.empty:
        raise TableError(f"{name}: the table has no rows")
    table = table[list(POINT_COLUMNS)].reset_index(drop=True).copy()
    for column in POINT_COLUMNS:
        values = table[column]
        known = values.notna()
        if column in TEXT_COLUMNS:
            table[column] = values.astype(object).where(known, None)
            continue
        numbers = as_numbers(values)
        good = (numbers >= 0) & (numbers <= LARGEST)
        require(good | ~known, table, column, f"a number >= 0, up to {LARGEST:g}", name)
        table[column] = numbers
    for column in REQUIRED:
        require(table[column].notna(), table, column, "a value", name)
    highest = {"accuracy_val_pct": 100, "accuracy_test_pct": 100, "exit_threshold": 1}
    for column, most in highest.items():
        require(~(table[column] > most), table, column, f"at most {most}", name)
    measurable = table["latency_ms"] >= LEAST_MS
    require(measurable, table, "latency_ms", "a time above zero", name)
    labelled = table["source"].isin(list(Source))
    require(labelled, table, "source", f"one of {', '.join(Source)}", name)
    once = ~table.duplicated(list(KEY_COLUMNS))
    require(once, table, "subnet", "one row per sub-network, setting and clock", name)
    return table


def as_numbers(values: pd.Series) -> pd.Series:
    """`values` as floats; NaN what is no number, infinite what is too large for a float."""
    if values.dtype == object:  # where integers of any length may be
        values = values.map(lambda v: math.inf if isinstance(v, int) and abs(v) > LARGEST else v)
    return pd.to_numeric(values, errors="coerce").astype(float)


def require(
    good: pd.Series, table: pd.DataFrame, column: str, expected: str, name: str | Path = "table"
) -> None:
    """Raise a `TableError` naming the first row (counted from 1) that is not `good`, if any."""
    if not good.all():
        row = good.idxmin()
        got = table.loc[[row], column].tolist()[0]
        _refuse(row + 1, column, got, expected, name)


def _refuse(row: int, column: str, got: Any, expected: str, name: str | Path) -> NoReturn:
    where = f"{name}, row {row}, column {column!r}"
    raise TableError(f"{where}: got {got!r}, expected {expected}")


def write_table(table: pd.DataFrame, path: str | Path) -> Path:
    """Check and write a table as CSV through a temporary file; an earlier file survives errors."""
    from dynlib.files import atomic_write  # who only decides, writes nothing

    path = Path(path)
    table = check_table(table, path)
    return atomic_write(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV table; raises `TableError` naming the file and what is wrong with it."""
    from dynlib.files import MALFORMED, read_plain

    try:
        # Names stay text, "1" and "NA" too.
        table = pd.read_csv(
            io.BytesIO(read_plain(path)),
            dtype=dict.fromkeys(TEXT_COLUMNS, str),
            keep_default_na=False,
            na_values=[""],
        )
    except (OSError, *MALFORMED) as error:
        raise TableError(f"{path}: cannot read an operating-point table: {error}") from error
    return check_table(table, path)


_LOGGED = ("subnet", "unit", "cores", *(name for name in Setting._fields if name != "threads"))


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: it is part of cache keys
class Point:
    """A sub-network on a unit in a setting; tuples have one entry per clock of the unit, ascending.

    Args:
        cores: kept busy while it runs; 1 on a GPU.
        noise_cv: coefficient of variation of its time.
        active_mw: what running draws above the same unit waiting at its lowest clock.
        segments: shares of the time between which it can be preempted, summing to 1.
        sigma: standard deviation of the logarithm of the noise.
        logged: what a decision log says of it: where, and what of its setting is known.
    """

    subnet: str
    unit: str
    cores: float
    accuracy_val_pct: float
    accuracy_test_pct: float
    noise_cv: float
    latency_ms: tuple[float, ...]
    active_mw: tuple[float, ...]
    memory_mb: float = 0.0
    setting: Setting = PLAIN
    segments: tuple[float, ...] = (1.0,)
    sigma: float = field(init=False)
    logged: Mapping[str, Any] = field(init=False, repr=False)

    def __post_init__(self):
        logged: dict[str, Any] = {"subnet": self.subnet, "unit": self.unit, "cores": self.cores}
        for name, value, plain in zip(Setting._fields, self.setting, PLAIN, strict=True):
            if value != plain and name != "threads":  # the cores say it
                logged[name] = value
        object.__setattr__(self, "sigma", math.sqrt(math.log1p(self.noise_cv**2)))
        object.__setattr__(self, "logged", logged)

    def noise(self, draw: float) -> float:
        """Log-normal factor of mean 1 on the latency, of a standard normal number."""
        return math.exp(self.sigma * draw - self.sigma**2 / 2)


class PointTable:
    """The operating points of one model on `board`: sub-network x unit x setting.

    Args:
        table: an operating-point table with one row per sub-network, unit, setting and clock
            (`gpu_mhz` for a GPU, `cpu_mhz` for a CPU cluster; neither: at the highest clock).
        board: gives the clocks, and the power the manager expects (where it has no power model, the
            table's own power counts); latency at a clock the table lacks is taken from the next
            measured clock by a + b/f with the unit's memory share.
        segments: sub-network -> times (ms) of its blocks, between which it can be preempted; one
            that is left out runs in one piece.

    Decisions use the validation accuracy; the test accuracy is for reporting (it falls back on the
    other where it is unknown). A clock at which a network was slower than at a lower one (noise) is
    taken to be as fast as that one, so that nobody chooses it. Raises `TableError`, naming row and
    column, for what `check_table` finds, another board, and two rows for one point and clock; and
    for segments that are no times.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        board: _Board,
        segments: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ):
        table = check_table(table)
        self.model: str = table["model"].iloc[0]
        one = f"{self.model!r}, the table of one model"
        require(table["model"] == self.model, table, "model", one)
        require(table["board"] == board.name, table, "board", f"{board.name!r}")
        self.frame = table
        self.source = str(weakest(*set(table["source"])))
        text = table.to_csv(index=False)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.points: dict[tuple[str, str, Setting], Point] = {}
        self._first: dict[tuple[str, str], Point] = {}
        self._logged: dict[frozenset, Point] = {}
        noisy: list[str] = []
        for rows in _rows_of_points(table):
            point = _point(rows, board, segments, noisy)
            self.points[point.subnet, point.unit, point.setting] = point
            where = point.subnet, point.unit
            if point.setting is PLAIN or where not in self._first:
                self._first[where] = point
            # A log names cores, not threads; and a GPU is one core, whatever the table says.
            named = frozenset(point.logged.items())
            if named in self._logged:
                rows[0].refuse("threads", "as many as cores, or one point of them", self.model)
            self._logged[named] = point
        if noisy:
            _LOG.warning("%s: slower at a higher clock: %s", self.model, ", ".join(noisy))
        self._on = self._by_unit(table["batch"].min())

    def _by_unit(self, batch: float) -> dict[str, tuple[Point, ...]]:
        """Unit -> its points of a batch, fastest first."""
        found: dict[str, list[Point]] = {}
        for point in self.points.values():
            if point.setting.batch == batch:
                found.setdefault(point.unit, []).append(point)
        for points in found.values():
            points.sort(key=lambda point: point.latency_ms[-1])
        return {unit: tuple(points) for unit, points in found.items()}

    @classmethod
    def of_models(
        cls,
        table: pd.DataFrame,
        board: _Board,
        segments: Mapping[str, Mapping[str, Sequence[float]]] = MappingProxyType({}),
    ) -> dict[str, "PointTable"]:
        """Model -> its points on `board`, of a table of several models and boards.

        `segments`: model -> sub-network -> times (ms) of its blocks; raises `TableError` for a
        model that is not on `board`.
        """
        here = table[table["board"] == board.name]
        if here.empty:
            known = near(board.name, set(table["board"]))
            raise TableError(f"the table has no points on board {board.name!r}; {known}")
        rows_of = dict([*here.groupby("model", sort=False)])
        for model in segments:
            if model not in rows_of:
                known = near(model, rows_of)
                raise TableError(
                    f"segments of model {model!r}: no points on {board.name!r}; {known}"
                )
        return {model: cls(rows, board, segments.get(model, {})) for model, rows in rows_of.items()}

    def on(self, unit: str) -> tuple[Point, ...]:
        """The points on `unit`, fastest first; none where the model does not run there.

        A frame is what the smallest batch of the table takes; larger ones, which have to gather
        frames first, are in `points` alone.
        """
        return self._on.get(unit, ())

    def point(self, subnet: str, unit: str, setting: Setting = PLAIN) -> Point:
        """One point; where nothing is set, the first of the table. Raises `TableError` without."""
        if setting is PLAIN:  # a short key: this is asked for at every decision
            found = self._first.get((subnet, unit))
        else:
            found = self.points.get((subnet, unit, setting))
            if found is None and setting == PLAIN:  # one that somebody made, or that was pickled
                found = self._first.get((subnet, unit))
        if found is None:
            how = "" if setting == PLAIN else f" with {setting}"
            where = f"sub-network {subnet!r} on {unit!r}{how}"
            raise TableError(f"model {self.model!r} has no {where}")
        return found

    def named(self, event: Mapping[str, Any]) -> Point:
        """The point that an event of a decision log names; raises `TableError` without one."""
        known = [(name, event[name]) for name in _LOGGED if name in event]
        if (found := self._logged.get(frozenset(known))) is None:
            raise TableError(f"model {self.model!r} has no point with {dict(known)}")
        return found

    @property
    def units(self) -> tuple[str, ...]:
        """The units the model runs on."""
        return tuple(self._on)

    @property
    def main_unit(self) -> str:
        """The unit whose fastest point is the fastest of all."""
        return min(self._on, key=lambda unit: self._on[unit][0].latency_ms[-1])

    @property
    def largest(self) -> Point:
        """The slowest point of the main unit at its highest clock: the largest network."""
        return self._on[self.main_unit][-1]

    @property
    def smallest(self) -> Point:
        """The fastest point of the main unit: the smallest network."""
        return self._on[self.main_unit][0]


Tables = Mapping[str, PointTable]


def read_points(
    path: str | Path,
    board: _Board,
    segments: Mapping[str, Mapping[str, Sequence[float]]] = MappingProxyType({}),
) -> dict[str, PointTable]:
    """The operating points of a CSV table (`read_table`): model -> its points on `board`.

    `segments`: see `PointTable.of_models`.

    >>> board = load_board("jetson-nano")
    >>> row = {"model": "example", "board": board.name, "unit": "gpu", "batch": 1}
    >>> row["source"] = "measured"
    >>> rows = [
    ...     row | {"subnet": "small", "latency_ms": 10.0, "accuracy_val_pct": 70.0},
    ...     row | {"subnet": "large", "latency_ms": 25.0, "accuracy_val_pct": 80.0},
    ... ]
    >>> from dynlib.points import make_table, write_table
    >>> path = write_table(make_table(rows), "points.csv")
    >>> points = read_points(path, board)
    >>> points["example"].largest.subnet, points["example"].largest.latency_ms[-1]
    ('large', 25.0)
    """
    return PointTable.of_models(read_table(path), board, segments)


class _Row(dict):
    """The values of a row of a table, None where unknown. Building a table of many points, plain
    values are many times as fast as small data frames."""

    def __init__(self, values: Mapping[str, Any], number: int):
        super().__init__(values)
        self.number = number  # in the table, from 1

    def refuse(self, column: str, expected: str, name: str) -> NoReturn:
        """Raise a `TableError` that names this row."""
        _refuse(self.number, column, self[column], expected, name)


def _rows_of_points(table: pd.DataFrame) -> Iterable[list[_Row]]:
    """The rows of each point: they differ in the clocks."""
    known = table.astype(object).where(table.notna(), None)
    points: dict[tuple, list[_Row]] = {}
    for number, values in enumerate(known.to_dict("records"), start=1):
        row = _Row(values, number)
        which = tuple([row[column] for column in ("subnet", "unit", *Setting._fields)])
        points.setdefault(which, []).append(row)
    return points.values()


def _point(rows: list[_Row], board: _Board, segments: Mapping, noisy: list[str]) -> Point:
    """The point whose clocks are `rows`; its name goes to `noisy` if a higher one was slower."""
    first = rows[0]
    subnet, unit_name = first["subnet"], first["unit"]
    who = f"{subnet!r} on {unit_name!r}"
    units = [unit.name for unit in board.units]
    if unit_name not in units:
        first.refuse("unit", f"one of {units}", who)
    unit = board.unit(unit_name)
    measured_ms = _measured_ms(rows, unit, who)
    at_clock_ms = [_latency_ms(measured_ms, mhz, unit) for mhz in unit.freqs]
    latency_ms = list(accumulate(at_clock_ms, min))
    pairs = zip(at_clock_ms, latency_ms, strict=True)
    if any(ms > fastest_ms * (1 + 1e-9) for ms, fastest_ms in pairs):
        noisy.append(who)
    val_pct, test_pct = first["accuracy_val_pct"], first["accuracy_test_pct"]
    if val_pct is None:
        val_pct = test_pct
    if val_pct is None:
        first.refuse("accuracy_val_pct", "a number: it has no accuracy", who)
    known = [row for row in rows if row["latency_std_ms"] is not None]
    noise = [row["latency_std_ms"] / row["latency_ms"] for row in known]
    cores = _cores(first, unit)
    return Point(
        subnet=subnet,
        unit=unit_name,
        cores=cores,
        accuracy_val_pct=val_pct,
        accuracy_test_pct=val_pct if test_pct is None else test_pct,
        noise_cv=median(noise) if noise else unit.noise_cv,
        latency_ms=tuple(latency_ms),
        active_mw=_active_mw(rows, unit, cores),
        memory_mb=max([row["memory_mb"] or 0.0 for row in rows]),
        setting=_setting(first),
        segments=_shares(segments.get(subnet, (1.0,)), who),
    )


def _shares(blocks_ms: Sequence[float], who: str) -> tuple[float, ...]:
    """Times of blocks as shares of their sum."""
    times = np.array(blocks_ms, float)
    if not (np.isfinite(times).all() and (times >= 0).all() and times.sum() > 0):
        raise TableError(f"{who}, segments: got {blocks_ms}, expected times >= 0, some above 0")
    return tuple((times / times.sum()).tolist())


def _measured_ms(rows: list[_Row], unit: _Unit, who: str) -> dict[float, float]:
    """Clock of the unit -> measured time; a row without a clock was measured at the highest."""
    column = "cpu_mhz" if unit.kind == "cpu" else "gpu_mhz"
    measured_ms: dict[float, float] = {}
    for row in rows:
        asked_mhz = unit.max_mhz if row[column] is None else row[column]
        mhz = unit.at_or_above(asked_mhz)
        if abs(mhz - asked_mhz) > 0.5:
            known = f"a clock of the unit: {column} {asked_mhz:g} is none of {unit.freqs}"
            row.refuse(column, known, who)
        if mhz in measured_ms:
            row.refuse(column, "one setting: two rows for one clock", who)
        measured_ms[mhz] = row["latency_ms"]
    return measured_ms


def _cores(row: _Row, unit: _Unit) -> float:
    """Cores kept busy: those of the table, else its threads, else all."""
    if unit.kind != "cpu":
        return 1.0
    for cores in (row["cores"], row["threads"], unit.cores):
        if cores is not None:
            break
    return float(cores)


def _setting(row: _Row) -> Setting:
    setting = Setting(*[row[name] for name in Setting._fields])
    return PLAIN if setting == PLAIN else setting


def _active_mw(rows: list[_Row], unit: _Unit, busy: float) -> tuple[float, ...]:
    """Power of running above waiting, at every clock: the model's, else the table's, else 0."""
    if unit.c_uw_mhz_v2:
        waiting_mw = unit.idle_mw(unit.min_mhz)
        return tuple([unit.power_mw(mhz, busy) - waiting_mw for mhz in unit.freqs])
    pairs = [(row["power_mw"], row["idle_power_mw"]) for row in rows]
    above_mw = [power - idle for power, idle in pairs if None not in (power, idle)]
    mean_mw = fmean(above_mw) if above_mw else 0.0
    return (max(mean_mw, 0.0),) * len(unit.freqs)


def _latency_ms(measured_ms: dict[float, float], mhz: float, unit: _Unit) -> float:
    if mhz in measured_ms:
        return measured_ms[mhz]
    next_mhz = min((f for f in measured_ms if f >= mhz), default=max(measured_ms))
    return measured_ms[next_mhz] * (unit.clock_scale(mhz) / unit.clock_scale(next_mhz))
