"""A board calibrated from a few samples, and the board's model against a device that others drove.

The runs are two Jetson Xavier NX under somebody else's DVFS manager (LoudVA, Experiment 5): about
four times a second GPU clock and load, memory clock, power of the board. A sample stands for the
time since the one before it.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from dynlib.boards.board import Board
from dynlib.boards.calibration import calibrate, fit_model
from dynlib.boards.file import read_board, save_board
from dynlib.machine.bind import load_board
from suite.studies.fit_boards import SUSPECT_MHZ, read_samples

FAST_MEMORY_MHZ = 1000  # the runs know two memory clocks, 204 and 1600 MHz
_BASE = ["always", "second_device", "fast_memory"]
_TERMS = {
    "idle base": _BASE,
    "idle base and work": [*_BASE, "work_mw"],
    "plain regression": [*_BASE, "switched", "switched_busy"],
}
METHODS = tuple(_TERMS)
_CALIBRATED = ["board", "draw", "error_pct", "rows"]
_REPLAYED = ["run", "device", "third", "method", "measured_j", "predicted_j", "error_pct", "mae_mw",
             "source"]  # fmt: skip


def calibrations(
    measured: Path | None, draws: int, rng: np.random.Generator, n: int = 50
) -> pd.DataFrame:
    """Boards calibrated from `n` random samples, saved, loaded, judged at clocks they had not seen.

    Every third clock is left out, in turn. How busy the GPU is with each number of clients follows
    from the latencies of the same samples. Columns board, draw, error_pct (mean over the rows at
    the clocks left out), rows; none where the measurements are not here.
    """
    rows = []
    for name in SUSPECT_MHZ if measured else ():
        samples, board = read_samples(measured, name), load_board(name)
        clocks = np.unique(samples["freq_mhz"])
        for draw in range(draws):
            unseen = samples["freq_mhz"].isin(clocks[draw % 3 :: 3])
            seen = samples[~unseen].sample(n, random_state=rng)
            with TemporaryDirectory() as folder:
                loaded = read_board(save_board(calibrate(seen, board), Path(folder) / "board.toml"))
            judged = samples[unseen]
            busy = fit_model(seen).busy(judged["freq_mhz"], judged["concurrency"])
            predicted_mw = _powers_mw(loaded, judged["freq_mhz"], busy)
            error = np.abs(predicted_mw / judged["power_mw"] - 1)
            rows.append({"board": name, "draw": draw, "rows": len(judged),
                         "error_pct": 100 * error.mean()})  # fmt: skip
    return pd.DataFrame(rows, columns=_CALIBRATED)


def replay(folder: Path | None, board: Board) -> pd.DataFrame:
    """Energy of every run and device, predicted by a model of which a part was fitted on a third of
    the runs; each third is fitted on in turn.

    `idle base`: what the board draws with nothing to do is fitted (both devices, both memory
    clocks); what work adds is ``power(f, busy) - power(f, 0)`` of the board's model, as it is.
    `idle base and work`: that is scaled too. `plain regression`: per sample, on clock and load.
    Columns run, device, third, method, measured_j, predicted_j, error_pct, mae_mw (per sample);
    where the runs are not here one row per method, without values.
    """
    if folder is None:
        return pd.DataFrame({"method": METHODS, "source": "simulated"}, columns=_REPLAYED)
    samples = _features(pd.read_csv(folder / "samples.csv"), board)
    runs = np.unique(samples["run"])
    parts = []
    for third in range(3):
        fitted = samples["run"].isin(runs[third::3])
        train, test = samples[fitted], samples[~fitted]
        for method in METHODS:
            predicted_mw = _predict(method, train, test)
            parts.append(_by_run(test, predicted_mw).assign(third=third, method=method))
    return pd.concat(parts, ignore_index=True).assign(source="simulated")[_REPLAYED]


def _features(samples: pd.DataFrame, board: Board) -> pd.DataFrame:
    gpu = board.gpu
    seconds = samples.groupby(["run", "device"])["t_s"].diff()
    # Clocks are logged in whole MHz, cut off: 114 is 114.75.
    mhz = samples["gpu_mhz"].map({f: gpu.at_or_above(f) for f in samples["gpu_mhz"].unique()})
    busy = samples["gpu_load_pct"] / 100
    switched = mhz.map({f: gpu.dynamic_mw(f) for f in mhz.unique()})
    return samples.assign(
        seconds=seconds.fillna(seconds.median()),
        always=1.0,
        second_device=(samples["device"] == "nx1").astype(float),
        fast_memory=(samples["emc_mhz"] > FAST_MEMORY_MHZ).astype(float),
        work_mw=_powers_mw(board, mhz, busy) - _powers_mw(board, mhz, 0 * busy),
        switched=switched,
        switched_busy=switched * busy,
    )


def _predict(method: str, train: pd.DataFrame, test: pd.DataFrame) -> np.ndarray:
    """Power of each sample of `test` (mW)."""
    terms = _TERMS[method]
    if method == "plain regression":
        parts, *_ = np.linalg.lstsq(train[terms], train["power_mw"])
        return test[terms] @ parts
    # The load of a sample is that of an instant, so noisy that a fit per sample would make too
    # little of it; over a run it averages out. Each run counts by its relative error.
    runs = pd.DataFrame(dict(_means([*_TERMS["idle base and work"], "power_mw"], train)))
    given = 0.0 if "work_mw" in terms else 1.0
    target = runs["power_mw"] - given * runs["work_mw"]
    weighted = runs[terms].div(runs["power_mw"], axis=0)
    parts, *_ = np.linalg.lstsq(weighted, target / runs["power_mw"])
    return test[terms] @ parts + given * test["work_mw"]


def _means(columns: list[str], samples: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Mean over time of columns, by run and device."""
    keys = [samples["run"], samples["device"]]
    total_s = samples["seconds"].groupby(keys).sum()
    for name in columns:
        yield name, (samples[name] * samples["seconds"]).groupby(keys).sum() / total_s


def _by_run(samples: pd.DataFrame, predicted_mw: np.ndarray) -> pd.DataFrame:
    off_mw = np.abs(predicted_mw - samples["power_mw"])
    rows = samples.assign(
        measured_j=samples["power_mw"] * samples["seconds"] / 1e3,
        predicted_j=predicted_mw * samples["seconds"] / 1e3,
        mae_mw=off_mw,
    )
    by_run = rows.groupby(["run", "device"])
    table = by_run[["measured_j", "predicted_j"]].sum().join(by_run["mae_mw"].mean())
    error_pct = 100 * (table["predicted_j"] / table["measured_j"] - 1)
    return table.assign(error_pct=error_pct).reset_index()


def _powers_mw(board: Board, freq_mhz: pd.Series, busy: pd.Series) -> np.ndarray:
    """Power of a board whose GPU alone works, for each pair of clock and load."""
    known = {}
    for mhz, share in set(zip(freq_mhz, busy, strict=True)):
        known[mhz, share] = board.power_mw({"gpu": mhz}, {"gpu": share})
    return np.array([known[pair] for pair in zip(freq_mhz, busy, strict=True)])
