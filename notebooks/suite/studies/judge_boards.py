"""The board models against published measurements, as tidy tables.

Where a measurement is not on this machine its stand-in says so: the few rows that a board's file
quotes for `clock_models`, latency tables computed from the board model for `resolutions`.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.boards.board import Unit
from dynlib.boards.calibration import SAMPLE_COLUMNS, cross_validate
from dynlib.boards.latency import layer_us
from dynlib.files import data_places
from dynlib.machine.bind import load_board
from suite.papers.jetson_tables import (
    EXPANSIONS,
    KERNELS,
    PLACES,
    OperatorTables,
    TableGrid,
    block_key,
    fixed_keys,
    grid,
    judge_unseen,
    parse_key,
    read_tables,
)
from suite.studies.contention import Queue
from suite.studies.fit_boards import SUSPECT_MHZ, operator_layers, read_samples

RESOLUTIONS = (160, 176, 192, 208, 224)
COLD = {"gpu": (160,), "cpu": ()}  # measured while the board was still warming up


def find_data(name: str, data_dir: str | Path = "") -> Path | None:
    """Path of a file or folder of public measurements, or None: `data_dir`, $DYNLIB_DATA, data/."""
    paths = (place / name for place in data_places(data_dir))
    return next((path for path in paths if path.exists()), None)


def clock_models(measured: Path | None, budget: int = 50) -> pd.DataFrame:
    """Nano and Xavier NX, each row predicted by a fit that saw neither its clock nor its queue.

    Columns of `cross_validate`, and board and source.
    """
    parts = []
    for board in SUSPECT_MHZ:
        rows = read_samples(measured, board) if measured else _quoted(board)
        parts.append(cross_validate(rows, budget).assign(board=board, source="simulated"))
    return pd.concat(parts, ignore_index=True)


def queues(samples: pd.DataFrame, at: int = 8, judged: Iterable[int] = range(2, 9)) -> pd.DataFrame:
    """Latency at each concurrency of `judged` except `at`, from the latency alone and at `at`.

    Columns board, freq_mhz, concurrency, latency_ms, predicted_latency_ms, source.
    """
    rows = []
    for (board, mhz), clock in samples.groupby(["board", "freq_mhz"]):
        known = clock.set_index("concurrency")["latency_ms"]
        if not {1, at} <= set(known.index):
            continue
        queue = Queue.fit(known[1], at, known[at])
        rows += [
            {"board": board, "freq_mhz": mhz, "concurrency": n, "latency_ms": known[n],
             "predicted_latency_ms": queue.latency_ms(n), "source": "simulated"}
            for n in judged
            if n != at and n in known.index
        ]  # fmt: skip
    return pd.DataFrame(rows)


def published_grid(folder: Path | None, unit: str) -> TableGrid:
    """The published tables of a unit without those measured cold, else modelled ones."""
    if folder is None:
        board = load_board("jetson-xavier-nx")
        modelled = board.gpu if unit == "gpu" else board.cpus[0]
        return grid(modelled_tables(modelled, RESOLUTIONS))
    return grid(read_tables(folder, unit)).without(*COLD[unit])


def resolutions(folder: Path | None, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Error of `n` random networks at each resolution predicted from the others, per unit."""
    parts = []
    for unit in ("gpu", "cpu"):
        judged = judge_unseen(published_grid(folder, unit), n, rng)
        parts.append(judged.assign(unit=unit, source="replayed" if folder else "estimated"))
    return pd.concat(parts, ignore_index=True)


def modelled_tables(unit: Unit, resolutions: Iterable[int]) -> OperatorTables:
    """Tables that the board model gives: every row of the published format, in ms."""
    tables = {}
    for r in resolutions:
        blocks = (block_key(r, p, k, e) for p in range(PLACES) for k in KERNELS for e in EXPANSIONS)
        tables[r] = {
            key: sum(layer_us(layer, unit.cost) for layer in operator_layers(parse_key(key))) / 1e3
            for key in (*fixed_keys(r), *blocks)
        }
    return tables


def _quoted(board: str) -> pd.DataFrame:
    """The rows that a board's file quotes; latency is clients over throughput."""
    quoted = load_board(board).measured[0]
    f = quoted.column("gpu_mhz")
    parts = [
        pd.DataFrame({"freq_mhz": f, "concurrency": n, "power_mw": quoted.column(f"power_mw_c{n}"),
                      "latency_ms": 1e3 * n / np.array(quoted.column(f"ips_c{n}"))})
        for n in (1, 4)
    ]  # fmt: skip
    rows = pd.concat(parts, ignore_index=True)
    suspect = (rows["freq_mhz"] == SUSPECT_MHZ[board]) & (rows["concurrency"] == 1)
    return rows.loc[~suspect, list(SAMPLE_COLUMNS)]
