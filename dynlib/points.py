"""Operating points: what search and profiling hand to the runtime manager, a CSV table.

`PointTable` is such a table as the manager looks it up: one model on one board, at every clock.
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynlib.errors import TableError
from dynlib.files import atomic_write
from dynlib.source import weakest

if TYPE_CHECKING:
    from dynlib.boards.board import Board

TEXT_COLUMNS = ("model", "subnet", "backend", "precision", "board", "unit", "source")
KEY_COLUMNS = (
    "model", "subnet", "exit_threshold", "backend", "precision", "board", "unit", "cores",
    "threads", "quota", "cpu_mhz", "gpu_mhz", "emc_mhz", "batch",
)  # fmt: skip
VALUE_COLUMNS = (
    "accuracy_val_pct", "accuracy_test_pct", "latency_ms", "latency_std_ms", "latency_p95_ms",
    "energy_mj", "power_mw", "idle_power_mw", "memory_mb", "macs_m", "params_m",
)  # fmt: skip
POINT_COLUMNS = (*KEY_COLUMNS, *VALUE_COLUMNS, "source")
REQUIRED = ("model", "subnet", "board", "unit", "batch", "latency_ms", "source")
SOURCES = ("measured", "replayed", "simulated", "estimated", "predicted", "published")


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
    missing = [c for c in POINT_COLUMNS if c not in table.columns]
    extra = [c for c in table.columns if c not in POINT_COLUMNS]
    if missing or extra:
        raise TableError(f"{name}: missing columns {missing}, unknown columns {extra}")
    if table.empty:
        raise TableError(f"{name}: the table has no rows")
    table = table[list(POINT_COLUMNS)].reset_index(drop=True).copy()
    for column in POINT_COLUMNS:
        if column in TEXT_COLUMNS:
            table[column] = table[column].astype(object).where(table[column].notna(), None)
            continue
        numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
        good = (numbers >= 0) & np.isfinite(numbers) | table[column].isna()
        require(good, table, column, "a number >= 0", name)
        table[column] = numbers
    for column in REQUIRED:
        require(table[column].notna(), table, column, "a value", name)
    for column in ("accuracy_val_pct", "accuracy_test_pct"):
        require(~(table[column] > 100), table, column, "at most 100", name)
    require(table["latency_ms"] > 0, table, "latency_ms", "a time above zero", name)
    require(table["source"].isin(SOURCES), table, "source", f"one of {SOURCES}", name)
    once = ~table.duplicated(list(KEY_COLUMNS))
    require(once, table, "subnet", "one row per sub-network, setting and clock", name)
    return table


def require(
    good: pd.Series, table: pd.DataFrame, column: str, expected: str, name: str | Path = "table"
) -> None:
    """Raise a `TableError` naming the first row (counted from 1) that is not `good`, if any."""
    if not good.all():
        row = good.idxmin()
        got = table.loc[[row], column].tolist()[0]
        where = f"{name}, row {row + 1}, column {column!r}"
        raise TableError(f"{where}: got {got!r}, expected {expected}")


def write_table(table: pd.DataFrame, path: str | Path) -> Path:
    """Check and write a table as CSV through a temporary file; an earlier file survives errors."""
    path = Path(path)
    table = check_table(table, path)
    return atomic_write(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV table; raises `TableError` naming the file and what is wrong with it."""
    try:
        # Names stay text, "1" and "NA" too.
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False,
                            na_values=[""])  # fmt: skip
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot read an operating-point table: {error}") from error
    return check_table(table, path)


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: it is part of cache keys
class Point:
    """A sub-network on a unit; the tuples have one entry per clock of the unit, ascending.

    `active_mw` is what running draws above the same unit waiting at its lowest clock; `sigma` is
    the standard deviation of the logarithm of the noise.
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
    sigma: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "sigma", math.sqrt(math.log1p(self.noise_cv**2)))

    def noise(self, draw: float) -> float:
        """Log-normal factor of mean 1 on the latency, of a standard normal number."""
        return math.exp(self.sigma * draw - self.sigma**2 / 2)


class PointTable:
    """The operating points of one model on `board`.

    Args:
        table: an operating-point table with one row per sub-network, unit and clock (`gpu_mhz` for
            a GPU, `cpu_mhz` for a CPU cluster; neither: measured at the highest clock).
        board: gives the clocks, and the power the manager expects; latency at a clock the table
            lacks is taken from the next measured clock by a + b/f with the unit's memory share.

    Decisions use the validation accuracy; the test accuracy is for reporting (it falls back on the
    other where it is unknown). A clock at which a network was slower than at a lower one (noise) is
    taken to be as fast as that one, so that nobody chooses it. Raises `TableError`, naming row and
    column, for what `check_table` finds, another board, and two rows for one sub-network, unit and
    clock.
    """

    def __init__(self, table: pd.DataFrame, board: "Board"):
        table = check_table(table)
        self.model: str = table["model"].iloc[0]
        one = f"{self.model!r}, the table of one model"
        require(table["model"] == self.model, table, "model", one)
        require(table["board"] == board.name, table, "board", f"{board.name!r}")
        self.frame = table
        self.source = str(weakest(*set(table["source"])))
        self.digest = hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
        self.points: dict[tuple[str, str], Point] = {}
        noisy: list[str] = []
        for (subnet, unit), rows in table.groupby(["subnet", "unit"], sort=False):
            self.points[subnet, unit] = _point(subnet, unit, rows, board, noisy)
        if noisy:
            _LOG.warning("%s: slower at a higher clock: %s", self.model, ", ".join(noisy))
        by_unit: dict[str, list[Point]] = {}
        for point in self.points.values():
            by_unit.setdefault(point.unit, []).append(point)
        self._on = {unit: tuple(sorted(points, key=lambda p: p.latency_ms[-1]))
                    for unit, points in by_unit.items()}  # fmt: skip

    def on(self, unit: str) -> tuple[Point, ...]:
        """The points on `unit`, fastest first; none where the model does not run there."""
        return self._on.get(unit, ())

    def point(self, subnet: str, unit: str) -> Point:
        """One point; raises `TableError` when the model has none there."""
        try:
            return self.points[subnet, unit]
        except KeyError:
            where = f"sub-network {subnet!r} on {unit!r}"
            raise TableError(f"model {self.model!r} has no {where}") from None

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


def _point(subnet: str, unit_name: str, rows: pd.DataFrame, board: "Board", noisy: list[str]):
    who, units = f"{subnet!r} on {unit_name!r}", [unit.name for unit in board.units]
    require(rows["unit"].isin(units), rows, "unit", f"one of {units}", who)
    unit = board.unit(unit_name)
    column = "gpu_mhz" if unit.kind == "gpu" else "cpu_mhz"
    mhz = rows[column].fillna(unit.max_mhz).map(unit.at_or_above)
    off = (mhz - rows[column]).abs() > 0.5
    what = f"a clock of the unit: {column} {rows[column][off.idxmax()]:g} is none of {unit.freqs}"
    require(~off, rows, column, what, who)
    require(~mhz.duplicated(), rows, column, "one setting: two rows for one clock", who)
    measured = dict(zip(mhz, rows["latency_ms"], strict=True))
    latency_ms = np.array([_latency_ms(measured, f, unit) for f in unit.freqs])
    fastest_ms = np.minimum.accumulate(latency_ms)
    if (slower := latency_ms > fastest_ms * (1 + 1e-9)).any():
        noisy.append(who)
        latency_ms[slower] = fastest_ms[slower]
    cores = rows["cores"].iloc[0]
    busy = 1.0 if unit.kind == "gpu" else float(unit.cores if np.isnan(cores) else cores)
    std = (rows["latency_std_ms"] / rows["latency_ms"]).median()
    val, test = (float(rows[c].iloc[0]) for c in ("accuracy_val_pct", "accuracy_test_pct"))
    val = test if np.isnan(val) else val
    known = rows["accuracy_val_pct"].notna() | (not np.isnan(val))
    require(known, rows, "accuracy_val_pct", "a number: it has no accuracy", who)
    return Point(
        subnet=subnet,
        unit=unit_name,
        cores=busy,
        accuracy_val_pct=val,
        accuracy_test_pct=val if np.isnan(test) else test,
        noise_cv=unit.noise_cv if np.isnan(std) else float(std),
        latency_ms=tuple(latency_ms.tolist()),
        active_mw=tuple(unit.power_mw(f, busy) - unit.idle_mw(unit.min_mhz) for f in unit.freqs),
        memory_mb=float(rows["memory_mb"].fillna(0.0).max()),
    )


def _latency_ms(measured: dict[float, float], mhz: float, unit) -> float:
    if mhz in measured:
        return measured[mhz]
    near = min((f for f in measured if f >= mhz), default=max(measured))
    return measured[near] * (unit.clock_scale(mhz) / unit.clock_scale(near))
