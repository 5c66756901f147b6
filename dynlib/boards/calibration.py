"""Power and latency of a workload at any clock and concurrency, from a few dozen samples.

n clients each wait for their answer; what is waiting runs as one batch. A batch of b takes
``o + s*b``, so alone ``L(1) = o + s``; from two clients on two batches alternate and
``L(n) = 2*o + s*n``. o and s each have a part that the clock scales and one that it does not
(memory, launch). Power is the kernel's ``C f V^2`` with a busy share that grows with the queue,
plus the energy of each answer times the answers per second, plus what is always there:

``P(f, n) = static + f*v^2 * (idle + busy*(1 - 1/n)) + work * v^2 * n / L(f, n)``.

Where no voltages are public v = V / V_max is a floor up to a knee, then a line, found by the fit.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from dynlib.errors import ProfileError

SAMPLE_COLUMNS = ("freq_mhz", "concurrency", "power_mw", "latency_ms")
MIN_SAMPLES = 12
_FLOORS = np.arange(0.60, 1.001, 0.02)
_KNEES = np.arange(0.0, 0.91, 0.05)


@dataclass(frozen=True)
class WorkloadModel:
    """A calibrated workload on one unit; see the module for the symbols.

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
        ratio = self.max_mhz / np.asarray(freq_mhz, float)
        terms = _latency_terms(ratio, np.asarray(concurrency, float))
        return terms @ np.array([*self.overhead_ms, *self.image_ms])

    def power_mw(self, freq_mhz, concurrency=1, temp_c: float | None = None):
        """Power of the whole board (mW); both arguments broadcast."""
        f, n = np.broadcast_arrays(np.asarray(freq_mhz, float), np.asarray(concurrency, float))
        volts = _volts(f / self.max_mhz, self.volt_floor, self.volt_knee)
        leak = 1.0
        if temp_c is not None:
            leak += self.static_slope_per_c * (temp_c - self.reference_c)
        parts = [self.static_mw * leak, self.idle_mw_mhz, self.busy_mw_mhz, self.work_mj]
        return _power_terms(f, n, volts, self.latency_ms(f, n)) @ np.array(parts)


@dataclass(frozen=True)
class Calibration:
    """A workload with its errors on clocks and concurrencies that a fit had not seen (%)."""

    workload: WorkloadModel
    power_mape_pct: float
    latency_mape_pct: float
    n: int


def fit_samples(samples: pd.DataFrame, budget: int = 50) -> Calibration:
    """Fit a workload to at most `budget` samples, with error bars by cross-validation among them.

    Args:
        samples: columns freq_mhz, concurrency, power_mw, latency_ms, one row a measurement.

    Raises `ProfileError`. PowerTrain (arXiv 2407.13944) reaches 6 % and 15 % with 50 samples.
    """
    chosen = choose(_checked(samples), budget)
    judged = cross_validate(chosen, budget)
    return Calibration(fit(chosen), mape(judged, "power_mw"), mape(judged, "latency_ms"),
                       len(chosen))  # fmt: skip


def choose(samples: pd.DataFrame, budget: int) -> pd.DataFrame:
    """At most `budget` rows: all clocks, at concurrencies spread evenly on a logarithmic scale."""
    clocks = samples["freq_mhz"].nunique()
    left = sorted(samples["concurrency"].unique())
    picked = []
    for want in np.geomspace(left[0], left[-1], max(min(budget // clocks, len(left)), 1)):
        picked.append(min(left, key=lambda n: abs(np.log(n / want))))
        left.remove(picked[-1])
    rows = samples[samples["concurrency"].isin(picked)]
    return rows.iloc[np.linspace(0, len(rows) - 1, min(budget, len(rows))).astype(int)]


def cross_validate(samples: pd.DataFrame, budget: int = 50, folds: int = 3) -> pd.DataFrame:
    """The samples, with what a fit on other clocks **and** other concurrencies predicts for each.

    Every `folds`-th clock and `folds`-th concurrency are left out whole, in every combination, so
    each row is judged once; each fit sees at most `budget` rows. Adds the columns
    predicted_power_mw, predicted_latency_ms and fitted_on. A single clock or concurrency cannot be
    left out and is then shared by both sides.
    """
    samples = _checked(samples)
    clock, queue = (_fold(samples[name], folds) for name in ("freq_mhz", "concurrency"))
    parts = []
    for a, b in np.ndindex(clock.max() + 1, queue.max() + 1):
        test = samples[(clock == a) & (queue == b)]
        apart_clock = clock != a if clock.max() else np.ones(len(samples), bool)
        apart_queue = queue != b if queue.max() else np.ones(len(samples), bool)
        train = choose(samples[apart_clock & apart_queue], budget)
        workload = fit(train)
        where = test["freq_mhz"].to_numpy(), test["concurrency"].to_numpy()
        parts.append(test.assign(predicted_power_mw=workload.power_mw(*where),
                                 predicted_latency_ms=workload.latency_ms(*where),
                                 fitted_on=len(train)))  # fmt: skip
    return pd.concat(parts).sort_index()


def mape(judged: pd.DataFrame, column: str) -> float:
    """Mean absolute error of ``predicted_<column>``, in percent of `column`."""
    return float(100 * (judged[f"predicted_{column}"] / judged[column] - 1).abs().mean())


def fit(samples: pd.DataFrame) -> WorkloadModel:
    """The workload of least relative error; all parts are at least 0. See `fit_samples`."""
    f, n = (samples[name].to_numpy(float) for name in SAMPLE_COLUMNS[:2])
    power, latency = (samples[name].to_numpy(float) for name in SAMPLE_COLUMNS[2:])
    top = f.max()
    parts, _ = relative_nnls(_latency_terms(top / f, n), latency)
    modelled = _latency_terms(top / f, n) @ parts
    best = None
    for floor in _FLOORS:
        for knee in _KNEES:
            terms = _power_terms(f, n, _volts(f / top, floor, knee), modelled)
            watts, error = relative_nnls(terms, power)
            if best is None or (error**2).sum() < best[0]:
                best = (error**2).sum(), watts, floor, knee
    _, watts, floor, knee = best
    return WorkloadModel(float(top), tuple(parts[:2].tolist()), tuple(parts[2:].tolist()),
                    *watts.tolist(), float(floor), float(knee))  # fmt: skip


def relative_nnls(terms: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative coefficients of least relative error, and the relative error of each row."""
    scale = np.where(terms.any(axis=0), np.abs(terms).max(axis=0), 1.0)
    parts, _ = nnls(terms / scale / values[:, None], np.ones(len(values)))
    parts = parts / scale
    return parts, np.abs(terms @ parts / values - 1)


def _latency_terms(ratio: np.ndarray, n: np.ndarray) -> np.ndarray:
    ratio, n = np.broadcast_arrays(ratio, n)
    batches = np.minimum(n, 2)
    return np.stack([batches, batches * ratio, n, n * ratio], axis=-1)


def _power_terms(f, n, volts, latency_ms) -> np.ndarray:
    switched = f * volts**2
    per_s = 1000 * n / latency_ms
    return np.stack([np.ones_like(f), switched, switched * (1 - 1 / n), volts**2 * per_s], axis=-1)


def _volts(share: np.ndarray, floor: float, knee: float) -> np.ndarray:
    return floor + (1 - floor) * np.clip((share - knee) / (1 - knee), 0, None)


def _fold(values: pd.Series, folds: int) -> np.ndarray:
    rank = np.unique(values, return_inverse=True)[1]
    return rank % folds if rank.max() >= folds else np.zeros(len(rank), int)


def _checked(samples: pd.DataFrame) -> pd.DataFrame:
    if missing := [name for name in SAMPLE_COLUMNS if name not in samples]:
        raise ProfileError(f"samples lack the columns {missing}; expected {SAMPLE_COLUMNS}")
    numbers = samples[list(SAMPLE_COLUMNS)].to_numpy(float)
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise ProfileError(f"samples must be finite and above 0 in all of {SAMPLE_COLUMNS}")
    if len(samples) < MIN_SAMPLES or samples["freq_mhz"].nunique() < 4:
        raise ProfileError(
            f"{len(samples)} samples at {samples['freq_mhz'].nunique()} clocks; expected at least "
            f"{MIN_SAMPLES} at 4 or more"
        )
    return samples
