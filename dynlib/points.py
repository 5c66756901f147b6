"""Operating points and decision logs: what search and profiling hand to the runtime manager.

Both are plain files, a CSV table and JSON lines, so that any other program can read a run and
compute its numbers again.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd

from dynlib import DynlibError
from dynlib.report.files import atomic_write

TEXT_COLUMNS = ("model", "subnet", "backend", "precision", "board", "unit", "source")
KEY_COLUMNS = (
    "model", "subnet", "exit_threshold", "backend", "precision", "board", "unit", "cores",
    "threads", "quota", "cpu_mhz", "gpu_mhz", "emc_mhz", "batch",
)  # fmt: skip
VALUE_COLUMNS = (
    "accuracy_val_pct", "accuracy_test_pct", "latency_ms", "latency_std_ms", "latency_p95_ms",
    "energy_mj", "power_mw", "idle_power_mw", "memory_mb", "macs_m", "params_m",
)  # fmt: skip
COLUMNS = (*KEY_COLUMNS, *VALUE_COLUMNS, "source")
REQUIRED = ("model", "subnet", "board", "unit", "batch", "latency_ms", "source")
SOURCES = ("measured", "replayed", "simulated", "estimated", "predicted", "published")

LOG_SCHEMA = 1
LOG_EVENTS = ("arrive", "start", "finish", "drop", "decide", "set", "sample")
LOG_FIELDS = (
    "t_s", "event", "app", "frame", "subnet", "exit_threshold", "unit", "cores", "quota", "batch",
    "cpu_mhz", "gpu_mhz", "emc_mhz", "deadline_ms", "latency_ms", "power_mw", "energy_mj",
    "temp_c", "reason",
)  # fmt: skip
_LOG_FIELDS = frozenset(LOG_FIELDS)
_LOG = logging.getLogger(__name__)


class TableError(DynlibError):
    """An operating-point table or decision log is malformed; names file, row and column."""


def make_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Build a valid operating-point table from dictionaries; missing values stay unknown (NaN).

    Raises `TableError` for unknown columns and whatever `check_table` finds.
    """
    rows = list(rows)
    unknown = sorted({key for row in rows for key in row} - set(COLUMNS))
    if unknown:
        raise TableError(f"unknown operating-point columns {unknown}; the schema is {COLUMNS}")
    return check_table(pd.DataFrame(rows, columns=list(COLUMNS)), "table")


def check_table(table: pd.DataFrame, name: str | Path = "table") -> pd.DataFrame:
    """Return `table` with its types set; raises `TableError` naming `name`, row and column."""
    missing = [c for c in COLUMNS if c not in table.columns]
    extra = [c for c in table.columns if c not in COLUMNS]
    if missing or extra:
        raise TableError(f"{name}: missing columns {missing}, unknown columns {extra}")
    if table.empty:
        raise TableError(f"{name}: the table has no rows")
    table = table[list(COLUMNS)].reset_index(drop=True).copy()
    for column in COLUMNS:
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


def pareto_mask(values: np.ndarray) -> np.ndarray:
    """Which rows of `values` (points, objectives), all minimised, no other row dominates.

    Of several equal rows the first is kept. Rows with NaN never belong.
    """
    values = np.asarray(values, dtype=float)
    keep = np.zeros(len(values), dtype=bool)
    front = np.empty((0, values.shape[1]))
    # In lexicographic order nobody is dominated by a later row, so one growing front is enough.
    for i in np.lexsort(values.T[::-1]):
        row = values[i]
        if np.isnan(row).any() or (front <= row).all(axis=1).any():
            continue
        keep[i] = True
        front = np.vstack([front, row])
    return keep


def pareto_front(table: pd.DataFrame, minimise: Sequence[str], maximise: Sequence[str] = ()):
    """The rows of `table` that no other row dominates, sorted by the first column."""
    columns = [*minimise, *maximise]
    signs = np.array([1.0] * len(minimise) + [-1.0] * len(maximise))
    mask = pareto_mask(table[columns].to_numpy(float) * signs)
    return table[mask].sort_values(columns[0]).reset_index(drop=True)


def lower_hull(corners: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lower left hull: nothing takes less energy in no more time."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(corners):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (
            y - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return hull


def hypervolume(values: np.ndarray, reference: Sequence[float]) -> float:
    """Area that the points (n, 2), both objectives minimised, dominate below `reference`."""
    values = np.asarray(values, dtype=float)
    reference = np.asarray(reference, dtype=float)
    inside = values[(values < reference).all(axis=1)]
    front = inside[pareto_mask(inside)] if len(inside) else inside
    front = front[np.argsort(front[:, 0])]
    right = np.append(front[1:, 0], reference[0])
    return float(((right - front[:, 0]) * (reference[1] - front[:, 1])).sum())


class DecisionLog:
    """Collects the events of one run in time order; `write` stores them as JSON lines."""

    def __init__(self, **header: Any):
        self.header = {"schema": LOG_SCHEMA, **header}
        self.events: list[dict[str, Any]] = []
        self._journal: TextIO | None = None

    def add(self, t_s: float, event: str, **values: Any) -> None:
        """Append an event; raises `TableError` for unknown names and for time going back."""
        if event not in LOG_EVENTS:
            raise TableError(f"unknown log event {event!r}; expected one of {LOG_EVENTS}")
        if not _LOG_FIELDS.issuperset(values):
            raise TableError(f"unknown log fields {sorted(set(values) - _LOG_FIELDS)}")
        if self.events and t_s < self.events[-1]["t_s"]:
            raise TableError(f"log time goes back: {t_s} s after {self.events[-1]['t_s']} s")
        self.events.append({"t_s": t_s, "event": event, **values})
        if self._journal:
            try:
                self._journal.write(_line(self.events[-1]))
            except OSError as error:  # a full disk ends the journal, not the run
                _LOG.warning("%s ends here: %s", self._journal.name, error)
                self._journal = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.events)

    def write(self, path: str | Path) -> Path:
        """Write header and events in one step."""
        return atomic_write(path, "".join(map(_line, (self.header, *self.events))))

    def journal(self, path: str | Path) -> Path:
        """Write what there is, and from now on append every event as it comes: of a run that is
        killed only the line under way is lost. What `read` saved of one can be continued so."""
        self._journal = self.write(path).open("a", buffering=1, encoding="utf-8")
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> "DecisionLog":
        """Read a log back; raises `TableError` naming file and line. A cut last line is dropped."""
        path = Path(path)
        lines = path.read_text().splitlines()
        parsed = []
        for number, line in enumerate(lines, 1):
            try:
                parsed.append(json.loads(line))
            except ValueError as error:
                if number == len(lines):
                    break
                raise TableError(f"{path}, line {number}: not JSON: {error}") from error
        if not parsed or not isinstance(parsed[0], dict) or parsed[0].get("schema") != LOG_SCHEMA:
            raise TableError(f"{path}: no header of a decision log with schema {LOG_SCHEMA}")
        log = cls(**parsed[0])
        for number, event in enumerate(parsed[1:], 2):
            try:
                log.add(**event)
            except (TypeError, TableError) as error:
                raise TableError(f"{path}, line {number}: no event: {error}") from error
        return log


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True) + "\n"
