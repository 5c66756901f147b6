"""Operating points as the manager looks them up: one model on one board, at every clock."""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dynlib.hardware.board import Board
from dynlib.hardware.latency import clock_scale
from dynlib.points import TableError, check_table, make_table, require
from dynlib.report.metrics import weakest

# DynamicOFA (its repository): (name, measured top-1 %, measured ms on the GPU, MMAC, M parameters).
GPU_LEVELS = (
    ("level0", 74.202, 41.159, 235.5, 5.339), ("level1", 74.968, 45.421, 254.0, 5.900),
    ("level2", 76.134, 49.436, 288.8, 6.340), ("level3", 77.540, 51.079, 375.5, 7.121),
    ("level4", 78.346, 56.747, 522.1, 7.766), ("level5", 79.030, 61.735, 731.1, 9.718),
)  # fmt: skip
# Dynamic-OFA (arXiv 2105.03596), figure 4b: (name, top-1 %, ms on the CPU).
CPU_LEVELS = (
    ("cpu0", 72.5, 501.0), ("cpu1", 76.3, 683.0), ("cpu2", 77.1, 875.0), ("cpu3", 77.5, 1173.0),
    ("cpu4", 78.1, 1555.0), ("cpu5", 78.4, 1639.0), ("cpu6", 78.5, 1858.0),
)  # fmt: skip
PUBLISHED_MODEL = "ofa-mbv3-w1.2"
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

    def __init__(self, table: pd.DataFrame, board: Board):
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


def published_frame(board: Board) -> pd.DataFrame:
    """The points that Dynamic-OFA publishes, over the clocks of `board`.

    GPU: six measured levels (`GPU_LEVELS`). CPU: the seven of `CPU_LEVELS`. How
    many cores ran is not published: they are taken as the fastest cluster, all cores busy; a slower
    one takes longer in proportion to capacity, clock and cores. Only the latency at the highest
    clock is published; the other clocks follow a + b/f, and power and energy are the board's, so
    the whole table is labelled with the board's own source.
    """
    rows = []
    speed = {u.name: u.capacity * u.max_mhz * u.cores for u in board.cpus}
    for unit in board.units:
        gpu = unit.kind == "gpu"
        slower = 1.0 if gpu else max(speed.values()) / speed[unit.name]
        busy = 1.0 if gpu else float(unit.cores)
        idle_mw = board.power_mw({}, {})
        for name, accuracy_pct, latency_ms, *size in GPU_LEVELS if gpu else CPU_LEVELS:
            for mhz in unit.freqs:
                scale = slower * clock_scale(mhz, unit.max_mhz, unit.memory_share)
                scaled_ms = latency_ms * scale
                power_mw = board.power_mw({unit.name: mhz}, {unit.name: busy})
                rows.append(
                    {
                        "model": PUBLISHED_MODEL, "subnet": name, "board": board.name,
                        "unit": unit.name, "cores": busy, "batch": 1,
                        "gpu_mhz" if gpu else "cpu_mhz": mhz,
                        "accuracy_val_pct": accuracy_pct, "accuracy_test_pct": accuracy_pct,
                        "latency_ms": scaled_ms, "power_mw": power_mw,
                        "idle_power_mw": idle_mw, "energy_mj": power_mw * scaled_ms / 1000,
                        "source": board.source([unit.name]),
                        **dict(zip(("macs_m", "params_m"), size, strict=False)),
                    }
                )  # fmt: skip
    return make_table(rows)


def published_tables(board: Board) -> dict[str, PointTable]:
    """`published_frame` as the tables a run takes: one model, `ofa-mbv3-w1.2`."""
    return {PUBLISHED_MODEL: PointTable(published_frame(board), board)}


def _point(subnet: str, unit_name: str, rows: pd.DataFrame, board: Board, noisy: list[str]):
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
    share = unit.memory_share
    return measured[near] * (
        clock_scale(mhz, unit.max_mhz, share) / clock_scale(near, unit.max_mhz, share)
    )
