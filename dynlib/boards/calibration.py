"""Power and latency of a served network at any clock and concurrency, from a few dozen samples.

n clients each wait for their answer; what is waiting runs as one batch. A batch of b takes
``o + s*b``, so alone ``L(1) = o + s``; from two clients on two batches alternate and
``L(n) = 2*o + s*n``. o and s each have a part that the clock scales and one that it does not
(memory, launch). Power is the kernel's ``C f V^2`` with a busy share that grows with the queue,
plus the energy of each answer times the answers per second, plus what is always there:

``P(f, n) = static + f*v^2 * (idle + busy*(1 - 1/n)) + work * v^2 * n / L(f, n)``.

Where no voltages are public v = V / V_max is a floor up to a knee, then a line, found by the fit.

Samples may be a grid or any rows of one. What they cannot tell is taken to be nothing: without
queues all of L(1) is s, so that time grows with the queue, and waiting makes no unit busier.

`calibrate` makes a board of samples, whose power is that of `dynlib.boards.board`: static power,
and of each unit ``C f V^2`` for an idle share and for what is busy.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from dynlib.boards.board import Board, Opp, Unit
from dynlib.boards.file import LEAST_MW
from dynlib.errors import BoardError, ProfileError

SAMPLE_COLUMNS = ("freq_mhz", "concurrency", "power_mw", "latency_ms")
MIN_SAMPLES = 12
MIN_CLOCKS = 4
_FLOORS = np.arange(0.60, 1.001, 0.02)
_KNEES = np.arange(0.0, 0.91, 0.05)
_TOP_MV = 1000.0  # at the highest clock, where nobody knows it: only C V^2 has a meaning
_SINGULAR = 1e-9  # of squares
_SHARE = 1e-6  # that is more than rounding


@dataclass(frozen=True)
class ClockModel:
    """Power and latency of one served network on one unit; see the module for the symbols.

    `overhead_ms`, `image_ms`: o and s at the highest clock, each (fixed, scaled with the clock).
    `static_slope_per_c`: relative growth of the static power per degree above `reference_c`. Nobody
    publishes leakage of these boards, so it is an estimate, and 0 unless the caller sets it.
    """

    max_mhz: float
    overhead_ms: tuple[float, float]
    image_ms: tuple[float, float]
    static_mw: float
    idle_mw_mhz: float
    busy_mw_mhz: float
    work_mj: float
    volt_floor: float
    volt_knee: float
    static_slope_per_c: float = 0.0
    reference_c: float = 40.0

    def latency_ms(self, freq_mhz, concurrency=1):
        """Time of an answer (ms); both arguments broadcast."""
        slower = self.max_mhz / np.asarray(freq_mhz, float)
        terms = _latency_terms(slower, np.asarray(concurrency, float))
        parts = [*self.image_ms, *self.overhead_ms]
        return terms @ np.array(parts)

    def busy(self, freq_mhz, concurrency=1):
        """Share of the time in which the unit works on answers, n*s/L; both broadcast."""
        slower = self.max_mhz / np.asarray(freq_mhz, float)
        fixed_ms, scaled_ms = self.image_ms
        image_ms = fixed_ms + scaled_ms * slower
        return concurrency * image_ms / self.latency_ms(freq_mhz, concurrency)

    def power_mw(self, freq_mhz, concurrency=1, temp_c: float | None = None):
        """Power of the whole board (mW); both arguments broadcast."""
        freq_mhz = np.asarray(freq_mhz, float)
        f, n = np.broadcast_arrays(freq_mhz, np.asarray(concurrency, float))
        volts = _volts(f / self.max_mhz, self.volt_floor, self.volt_knee)
        terms = _power_terms(f, n, volts, self.latency_ms(f, n))
        static_mw = self.static_mw
        if temp_c is not None:
            warmer_c = temp_c - self.reference_c
            static_mw *= 1.0 + self.static_slope_per_c * warmer_c
        parts = [static_mw, self.idle_mw_mhz, self.busy_mw_mhz, self.work_mj]
        return terms @ np.array(parts)


@dataclass(frozen=True)
class Calibration:
    """A model with its errors on clocks and concurrencies that a fit had not seen (%).

    `undetermined`: the coefficients of which the `n` samples do not tell every part, so that
    another value would have fitted them as well.
    """

    model: ClockModel
    power_mape_pct: float
    latency_mape_pct: float
    n: int
    undetermined: tuple[str, ...] = ()


def fit_samples(samples: pd.DataFrame, budget: int = 50) -> Calibration:
    """Fit a model to at most `budget` samples, with error bars by cross-validation among them.

    Args:
        samples: columns freq_mhz, concurrency, power_mw, latency_ms, one row a measurement.

    Raises `ProfileError`. PowerTrain (arXiv 2407.13944) reaches 6 % and 15 % with 50 samples.
    """
    chosen = pick_samples(_checked(samples), budget)
    judged = cross_validate(chosen, budget)
    power_pct = mape(judged, "power_mw")
    latency_pct = mape(judged, "latency_ms")
    model = fit_model(chosen)
    unknown = undetermined(chosen, model)
    return Calibration(model, power_pct, latency_pct, len(chosen), unknown)


def calibrate(samples: pd.DataFrame, board: Board | None = None) -> Board:
    """A board whose static power, C, idle shares and voltages are fitted to samples.

    Args:
        samples: one row a measurement of the whole board while one unit worked and the others
            idled at their lowest clocks: freq_mhz, power_mw, and `busy` (cores of a CPU cluster,
            utilisation 0..1 of a GPU) or, of clients of one network, concurrency and latency_ms;
            `unit` is its name, "gpu" where there is no such column. See
            `dynlib.profile.measure_board`. Of a machine that does not measure its power: freq_mhz
            and latency_ms of one network, as of `measure_clocks`; they tell the share of the time
            that no clock changes, and no more.
        board: whose units, clocks and other coefficients are kept; without one, units with the
            clocks that occur. Published voltages are kept too.

    Raises `ProfileError` for samples that cannot carry it, `BoardError` for a unit without samples
    and without a power model.

    >>> samples = pd.DataFrame({"freq_mhz": [500, 500, 1000, 1000] * 3, "busy": [0, 1] * 6})
    >>> samples["power_mw"] = 3000 + samples["freq_mhz"] * (1 + 4 * samples["busy"])
    >>> board = calibrate(samples)
    >>> round(board.power_mw({"gpu": 1000}, {"gpu": 0.5}))
    6000
    """
    if "power_mw" not in samples and board is not None:
        return _with_times(samples, board)
    rows, memory_shares = _loads(samples)
    board = board or _bare_board(rows)
    units = {name: board.unit(name) for name in rows["unit"].unique()}
    rest_mw = sum(unit.idle_mw(unit.min_mhz) for unit in board.units if unit.name not in units)
    power_mw = rows["power_mw"].to_numpy() - rest_mw
    if (power_mw <= 0).any():
        raise ProfileError(f"power below the {rest_mw:.0f} mW of the units without samples")
    units = {name: _with_voltages(unit, rows[rows["unit"] == name]) for name, unit in units.items()}
    terms = _load_terms(rows, units)
    parts = _fit(terms, power_mw)
    static_mw, idles, busys = parts[0], parts[1::2], parts[2::2]
    for (name, unit), idle, busy in zip(units.items(), idles, busys, strict=True):
        c = float(idle + busy)
        memory = {}
        if name in memory_shares:
            memory = {"memory_share": memory_shares[name], "memory_share_status": "fitted"}
        units[name] = replace(
            unit,
            c_uw_mhz_v2=c,
            c_status="fitted",
            idle_fraction=float(idle) / c if c else 0.0,
            idle_status="fitted",
            **memory,
        )
    error_pct = 100 * np.abs(terms @ parts / power_mw - 1).mean()
    said = f"{', '.join(units)} calibrated on {len(rows)} samples, mean error {error_pct:.2g} %"
    fitted = replace(
        board,
        units=tuple(units.get(unit.name, unit) for unit in board.units),
        static_mw=float(static_mw) if static_mw >= LEAST_MW else 0.0,
        static_status="fitted",
        notes=(*board.notes, said),
    )
    return _signed(fitted)


def _with_times(samples: pd.DataFrame, board: Board) -> Board:
    """The board with the memory shares that fit latencies at several clocks, power left alone.

    ``t(f) = fixed + scaled * max / f`` is `Unit.clock_scale` with ``fixed / (fixed + scaled)``.
    """
    if missing := [name for name in ("unit", "freq_mhz", "latency_ms") if name not in samples]:
        raise ProfileError(f"samples without power_mw lack the columns {missing}")
    numbers = samples[["freq_mhz", "latency_ms"]].to_numpy(float)
    if not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ProfileError("freq_mhz and latency_ms of samples must be finite and above 0")
    units = {unit.name: unit for unit in board.units}
    said = []
    for name, part in samples.groupby("unit", sort=False):
        unit = board.unit(name)
        if part["freq_mhz"].nunique() < 2:
            raise ProfileError(f"{name}: samples at one clock; expected 2 clocks or more")
        # A median: a stall of the machine is no property of a clock.
        middle_ms = part.groupby("freq_mhz")["latency_ms"].median()
        slower = unit.max_mhz / middle_ms.index.to_numpy(float)
        terms = np.stack([np.ones_like(slower), slower], axis=-1)
        parts, error = relative_nnls(terms, middle_ms.to_numpy())
        share = float(parts[0] / parts.sum())
        units[name] = replace(unit, memory_share=share, memory_share_status="fitted")
        wrong_pct = 100 * error.mean()
        said.append(f"memory_share of {name} from {len(part)} latencies, off by {wrong_pct:.2g} %")
    fitted = replace(board, units=tuple(units.values()), notes=(*board.notes, *said))
    return _signed(fitted)


def _signed(board: Board) -> Board:
    return replace(board, digest=hashlib.sha256(repr(board).encode()).hexdigest())


def pick_samples(samples: pd.DataFrame, budget: int) -> pd.DataFrame:
    """At most `budget` rows: of a grid all clocks, at concurrencies spread evenly on a logarithmic
    scale; of rows at random, as many concurrencies as make up the budget."""
    left = sorted(samples["concurrency"].unique())
    # On average each has so many rows: on a grid, as many as there are clocks.
    affordable = budget * len(left) // len(samples)
    count = max(min(affordable, len(left)), 1)
    picked = []
    for want in np.geomspace(left[0], left[-1], count):
        closest = min(left, key=lambda n: abs(np.log(n / want)))
        picked.append(closest)
        left.remove(closest)
    rows = samples[samples["concurrency"].isin(picked)]
    kept = np.linspace(0, len(rows) - 1, min(budget, len(rows)))
    return rows.iloc[kept.astype(int)]


def cross_validate(samples: pd.DataFrame, budget: int = 50, folds: int = 3) -> pd.DataFrame:
    """The samples, with what a fit on other clocks **and** other concurrencies predicts for each.

    Every `folds`-th clock and `folds`-th concurrency are left out whole, in every combination, so
    each row is judged once; each fit sees at most `budget` rows. Adds the columns
    predicted_power_mw, predicted_latency_ms and fitted_on. A single clock or concurrency cannot be
    left out and is then shared by both sides; rows of which all others share one are left out.
    """
    samples = _checked(samples)
    clock = _fold(samples["freq_mhz"], folds)
    queue = _fold(samples["concurrency"], folds)
    parts = []
    for a, b in np.ndindex(clock.max() + 1, queue.max() + 1):
        others = samples[_apart(clock, a) & _apart(queue, b)]
        test = samples[(clock == a) & (queue == b)]
        if others.empty or test.empty:  # of a few samples at random
            continue
        train = pick_samples(others, budget)
        model = fit_model(train)
        f, n = test["freq_mhz"].to_numpy(), test["concurrency"].to_numpy()
        judged = test.assign(
            predicted_power_mw=model.power_mw(f, n),
            predicted_latency_ms=model.latency_ms(f, n),
            fitted_on=len(train),
        )
        parts.append(judged)
    return pd.concat(parts).sort_index()


def mape(judged: pd.DataFrame, column: str) -> float:
    """Mean absolute error of ``predicted_<column>``, in percent of `column`."""
    return float(100 * (judged[f"predicted_{column}"] / judged[column] - 1).abs().mean())


def fit_model(samples: pd.DataFrame) -> ClockModel:
    """The model of least relative error; all parts are at least 0. See `fit_samples`.

    Parts that follow from others in these samples are 0; see `undetermined`.
    """
    f, n, power_mw, latency_ms = _columns(samples)
    top = f.max()
    terms = _latency_terms(top / f, n)
    times = _fit(terms, latency_ms)
    modelled_ms = terms @ times
    # The voltage bends the power: floor and knee are tried, the rest follows by least squares.
    best, least = (1.0, 0.0), math.inf
    for floor, knee in itertools.product(_FLOORS, _KNEES):
        volts = _volts(f / top, floor, knee)
        terms = _power_terms(f, n, volts, modelled_ms)
        _, error = relative_nnls(terms, power_mw)
        squares = (error**2).sum()
        if squares < least:
            best, least = (floor, knee), squares
    volts = _volts(f / top, *best)
    parts = _fit(_power_terms(f, n, volts, modelled_ms), power_mw)
    image_ms, overhead_ms = times.reshape(2, 2).tolist()
    return ClockModel(float(top), tuple(overhead_ms), tuple(image_ms), *map(float, (*parts, *best)))


def undetermined(samples: pd.DataFrame, model: ClockModel) -> tuple[str, ...]:
    """The coefficients of a model that `samples` do not determine; floor and knee of the voltage
    are not looked at."""
    f, n, _, _ = _columns(samples)
    volts = _volts(f / model.max_mhz, model.volt_floor, model.volt_knee)
    times = _latency_terms(model.max_mhz / f, n)
    powers = _power_terms(f, n, volts, model.latency_ms(f, n))
    of_times = ("image_ms", "image_ms", "overhead_ms", "overhead_ms")
    of_powers = ("static_mw", "idle_mw_mhz", "busy_mw_mhz", "work_mj")
    found = []
    for names, terms in ((of_times, times), (of_powers, powers)):
        found += [names[part] for part in _dependent(terms)]
    return tuple(dict.fromkeys(found))


def _loads(samples: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """The samples as unit, freq_mhz, busy and power_mw; what a model of clients says: how busy, and
    by unit the share of L(1) at the highest clock that the clock does not change."""
    rows = samples if "unit" in samples else samples.assign(unit="gpu")
    memory_shares = {}
    if "busy" not in rows:
        parts = []
        for name, part in rows.groupby("unit", sort=False):
            model = fit_model(_checked(part))
            parts.append(part.assign(busy=model.busy(part["freq_mhz"], part["concurrency"])))
            fixed_ms, scaled_ms = np.add(model.image_ms, model.overhead_ms)
            memory_shares[name] = float(fixed_ms / (fixed_ms + scaled_ms))
        rows = pd.concat(parts)
    needed = ["freq_mhz", "busy", "power_mw"]
    if missing := [name for name in needed if name not in rows]:
        raise ProfileError(f"samples lack the columns {missing}; expected {needed}")
    numbers = rows[needed].to_numpy(float)
    if not (np.isfinite(numbers) & (numbers >= 0)).all() or (rows["power_mw"] == 0).any():
        raise ProfileError(f"{needed} of samples must be finite, at least 0 and power above 0")
    for name, part in rows.groupby("unit"):
        if len(part) < 3 or part["busy"].nunique() < 2:
            raise ProfileError(
                f"{name}: {len(part)} samples at {part['busy'].nunique()} loads; expected 3 or "
                "more at 2 or more"
            )
    return rows[["unit", *needed]], memory_shares


def _bare_board(rows: pd.DataFrame) -> Board:
    """Units of which no more is known than that samples were taken at these clocks."""
    units = []
    for name, part in rows.groupby("unit", sort=False):
        gpu = name == "gpu"
        cores = 1 if gpu else math.ceil(part["busy"].max())
        freqs = sorted(part["freq_mhz"].unique().tolist())
        units.append(Unit(
            name, "gpu" if gpu else "cpu", cores, tuple(Opp(float(mhz), 0.0) for mhz in freqs),
            c_uw_mhz_v2=None, idle_fraction=0.0, stall_ms=0.1, settle_ms=5.0 if gpu else 1.0,
            governor="performance", model="unknown",
        ))  # fmt: skip
    units.sort(key=lambda unit: unit.kind)
    return Board(
        "calibrated", "unknown", tuple(units), memory=None, static_mw=None,
        static_status="estimated", modes=(), thermal=None, sensors=(), measured=(), digest="",
    )  # fmt: skip


def _with_voltages(unit: Unit, rows: pd.DataFrame) -> Unit:
    """The unit with the floor and the line of voltages that fit its samples best."""
    if unit.voltage_status == "published" and unit.opps[-1].voltage_mv:
        return unit
    top_mv = unit.opps[-1].voltage_mv or _TOP_MV
    power_mw = rows["power_mw"].to_numpy()
    best, least = unit, math.inf
    for floor, knee in itertools.product(_FLOORS, _KNEES):
        volts = _volts(np.array(unit.freqs) / unit.max_mhz, floor, knee)
        opps = tuple(map(Opp, unit.freqs, np.round(top_mv * volts, 1).tolist()))
        tried = replace(unit, opps=opps, voltage_status="fitted")
        _, error = relative_nnls(_load_terms(rows, {unit.name: tried}), power_mw)
        squares = (error**2).sum()
        if squares < least:
            best, least = tried, squares
    return best


def _load_terms(rows: pd.DataFrame, units: dict[str, Unit]) -> np.ndarray:
    """1, then of each unit ``f V^2`` for C times its idle share, and for C times the rest; where
    another unit was sampled, at its lowest clock and idle."""
    terms = [np.ones(len(rows))]
    for name, unit in units.items():
        own = (rows["unit"] == name).to_numpy()
        most = rows["busy"][own].max()
        if most > unit.cores:
            raise ProfileError(f"{name}: busy = {most:g}; expected at most {unit.cores}")
        mhz = np.where(own, rows["freq_mhz"], unit.min_mhz)
        try:
            switched = np.array([f * unit.voltage_mv(f) ** 2 / 1e9 for f in mhz])
        except BoardError as error:
            raise ProfileError(str(error)) from error
        busy = np.where(own, rows["busy"], 0.0)
        terms += [unit.cores * switched, busy * switched]
    return np.stack(terms, axis=-1)


def _columns(samples: pd.DataFrame) -> np.ndarray:
    columns = samples[list(SAMPLE_COLUMNS)].to_numpy(float)
    return np.ascontiguousarray(columns.T)


def _fit(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients as of `relative_nnls`; of terms that depend on one another the last are 0."""
    kept = [*range(terms.shape[1])]
    for part in reversed(_dependent(terms)):
        if kept.index(part) in _dependent(terms[:, kept]):
            kept.remove(part)
    parts = np.zeros(terms.shape[1])
    parts[kept], _ = relative_nnls(terms[:, kept], values)
    return parts


def _dependent(terms: np.ndarray) -> list[int]:
    """The columns that are zero or a sum of multiples of others."""
    lengths = np.linalg.norm(terms, axis=0)
    scaled = terms / np.where(lengths > 0, lengths, 1.0)
    size, direction = np.linalg.eigh(scaled.T @ scaled)
    # Along these the coefficients may change without any effect on the rows.
    free = direction[:, size < _SINGULAR * size.max()]
    return np.flatnonzero(np.abs(free).max(axis=1, initial=0.0) > _SHARE).tolist()


def relative_nnls(terms: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative coefficients of least relative error, and the relative error of each row."""
    scale = np.where(terms.any(axis=0), np.abs(terms).max(axis=0), 1.0)
    relative = terms / scale / values[:, None]
    scaled, _ = nnls(relative, np.ones(len(values)))
    parts = scaled / scale
    error = np.abs(terms @ parts / values - 1)
    return parts, error


def _latency_terms(ratio: np.ndarray, n: np.ndarray) -> np.ndarray:
    ratio, n = np.broadcast_arrays(ratio, n)
    batches = np.minimum(n, 2)
    terms = [n, n * ratio, batches, batches * ratio]
    return np.stack(terms, axis=-1)


def _power_terms(f, n, volts, latency_ms) -> np.ndarray:
    switched = f * volts**2
    waiting = 1 - 1 / n
    per_s = 1000 * n / latency_ms
    terms = [np.ones_like(f), switched, switched * waiting, volts**2 * per_s]
    return np.stack(terms, axis=-1)


def _volts(share: np.ndarray, floor: float, knee: float) -> np.ndarray:
    above = (share - knee) / (1 - knee)
    return floor + (1 - floor) * np.clip(above, 0, None)


def _apart(folds: np.ndarray, left_out: int) -> np.ndarray:
    """Rows outside of a fold; all of them where there is only one."""
    return (folds != left_out) | (folds.max() == 0)


def _fold(values: pd.Series, folds: int) -> np.ndarray:
    """The fold of each row: every `folds`-th value goes into the same one."""
    _, rank = np.unique(values, return_inverse=True)
    return rank % folds if rank.max() >= folds else np.zeros(len(rank), int)


def _checked(samples: pd.DataFrame) -> pd.DataFrame:
    if missing := [name for name in SAMPLE_COLUMNS if name not in samples]:
        raise ProfileError(f"samples lack the columns {missing}; expected {SAMPLE_COLUMNS}")
    numbers = samples[list(SAMPLE_COLUMNS)].to_numpy(float)
    sound = np.isfinite(numbers) & (numbers > 0)
    if not sound.all():
        raise ProfileError(f"samples must be finite and above 0 in all of {SAMPLE_COLUMNS}")
    clocks = samples["freq_mhz"].nunique()
    if len(samples) < MIN_SAMPLES or clocks < MIN_CLOCKS:
        raise ProfileError(
            f"{len(samples)} samples at {clocks} clocks; expected at least {MIN_SAMPLES} at "
            f"{MIN_CLOCKS} or more"
        )
    return samples
