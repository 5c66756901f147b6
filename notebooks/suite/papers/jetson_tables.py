"""Per-operator latency tables in the published Jetson format (DynamicOFA; once-for-all).

A table holds the mean time of every operator that a sub-network of OFA-MobileNetV3 (width 1.2) can
use, per input resolution; a network's time is the plain sum of its rows. Files are either one JSON
per resolution, ``R_lookup_table.json`` with ``{key: {count, mean, std}}``, or all in one CSV,
``latency_cpu.csv`` or ``latency_gpu.csv``, whose columns spell out the key.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import theilslopes

from dynlib.errors import TableError

OperatorTables = Mapping[int, Mapping[str, float]]

KERNELS = (3, 5, 7)
EXPANSIONS = (3, 4, 6)
DEPTHS = (2, 3, 4)
# Output channels, stride, squeeze-excite and hard-swish of the five stages.
STAGES = ((32, 2, 0, 0), (48, 2, 1, 0), (96, 2, 0, 1), (136, 1, 1, 1), (192, 2, 1, 1))
PLACES = 4 * len(STAGES)  # block i is number i % 4 of stage i // 4
_STEM, _HEAD = 24, (1152, 1536)
_COLUMNS = ("resolution", "op", "input", "output", "expand", "kernel", "stride", "idskip", "se",
            "hswish", "mean_ms", "std_ms", "count")  # fmt: skip
_BLOCK_FIELDS = ("expand", "kernel", "stride", "idskip", "se", "hs")
_KEY = re.compile(
    r"(?P<op>\w+)-input:(?P<input>[\dx]+)-output:(?P<output>[\dx]+)"
    + "(?:" + "".join(rf"-{f}:(?P<{f}>\d+)" for f in _BLOCK_FIELDS) + ")?"
)  # fmt: skip

# The six levels measured on a Jetson Xavier NX GPU (DynamicOFA): resolution, depths, kernels,
# expansions, top-1 (%), latency (ms).
JETSON_LEVELS = (
    (176, "32322", "57773557775353373377", "64464364644646464334", 74.202, 41.159),
    (176, "32332", "73577357575353353337", "64444666334646634333", 74.968, 45.421),
    (192, "33333", "55737773777577737777", "34344443443344444444", 76.134, 49.436),
    (208, "23334", "73535733555777553337", "66334433644464464633", 77.540, 51.079),
    (224, "24443", "53377333753575737757", "66434663463466664446", 78.346, 56.747),
    (224, "44444", "55555773577777557555", "66666646646666666663", 79.030, 61.735),
)


def operator_key(op: str, size: int, channels: int, out_size: int, out: int, *block: int) -> str:
    """Key of one row: name, ``input:HxWxC``, ``output:HxWxC``, and for a block its six fields."""
    output = f"{out}" if op == "Logits" else f"{out_size}x{out_size}x{out}"
    fields = (f"{name}:{v}" for name, v in zip(_BLOCK_FIELDS, block, strict=False))
    return "-".join([op, f"input:{size}x{size}x{channels}", f"output:{output}", *fields])


def parse_key(key: str) -> SimpleNamespace:
    """The fields of a key as the CSV names its columns; raises `TableError`."""
    if not (match := _KEY.fullmatch(key)):
        raise TableError(f"malformed key {key!r:.80}; expected op-input:HxWxC-output:HxWxC")
    fields = match.groupdict()
    numbers = {name: int(fields[name] or 0) for name in _BLOCK_FIELDS}
    return SimpleNamespace(**{**fields, **numbers})


def read_rows(path: str | Path, unit: str = "gpu") -> pd.DataFrame:
    """All rows with mean_ms, std_ms and count, one a `resolution` and `key`.

    Args:
        path: a CSV, a folder that holds ``latency_<unit>.csv``, or one of ``R_lookup_table.json``.

    Raises `TableError` for a missing file, a malformed key, and times that are none.
    """
    path = Path(path)
    if (path / f"latency_{unit}.csv").is_file():
        path = path / f"latency_{unit}.csv"
    if path.suffix == ".csv":
        rows = _read_csv(path)
    else:
        rows = pd.DataFrame([row for file in _json_files(path) for row in _read_json(file)])
    times = rows[["mean_ms", "std_ms"]].to_numpy(float)
    mean_ms, std_ms = times.T
    good = np.isfinite(times).all(axis=1) & (mean_ms > 0) & (std_ms >= 0)
    if not good.all():
        row = rows[~good].iloc[0]
        raise TableError(
            f"{path}: {row['key']} at {row['resolution']}: {row['mean_ms']} ms +- "
            f"{row['std_ms']}; expected a time above 0"
        )
    if (twice := rows.duplicated(["resolution", "key"])).any():
        row = rows[twice].iloc[0]
        raise TableError(f"{path}: {row['key']} is twice in resolution {row['resolution']}")
    return rows.sort_values(["resolution", "key"], ignore_index=True)


def read_tables(folder: str | Path, unit: str = "gpu") -> dict[int, dict[str, float]]:
    """Mean time in ms of every operator: ``{resolution: {key: mean_ms}}``; see `read_rows`."""
    rows = read_rows(folder, unit)
    return {
        int(resolution): dict(zip(part["key"], part["mean_ms"], strict=True))
        for resolution, part in rows.groupby("resolution")
    }


def block_key(resolution: int, place: int, kernel: int, expand: int) -> str:
    """Key of block `place` (0..19) with that kernel and expansion ratio, at an input resolution."""
    stage, number = divmod(place, 4)
    out, stride, *kinds = STAGES[stage]
    before, after = _sizes(resolution)[stage : stage + 2]
    if number:
        size, channels, stride, skip = after, out, 1, 1
    else:
        size, skip = before, 0
        channels = STAGES[stage - 1][0] if stage else _STEM
    mid = round(channels * expand)
    out_size = (size - 1) // stride + 1
    block = (mid, kernel, stride, skip, *kinds)
    return operator_key("expanded_conv", size, channels, out_size, out, *block)


def fixed_keys(resolution: int) -> list[str]:
    """Keys of the six rows every network has: stem, first block, Conv_1, pool, Conv_2, Logits."""
    first, *_, last = _sizes(resolution)
    wide, feature = _HEAD
    return [
        operator_key("Conv", resolution, 3, first, _STEM),
        operator_key("expanded_conv", first, _STEM, first, _STEM, _STEM, 3, 1, 1, 0, 0),
        operator_key("Conv_1", last, STAGES[-1][0], last, wide),
        operator_key("AvgPool2D", last, wide, 1, wide),
        operator_key("Conv_2", 1, wide, 1, feature),
        operator_key("Logits", 1, feature, 1, 1000),
    ]


def network_keys(
    resolution: int, depth: Sequence[int], kernel: Sequence[int], expand: Sequence[int]
) -> list[str]:
    """Keys of all rows of a sub-network, in order; `kernel` and `expand` have 20 entries each."""
    stem, first, *head = fixed_keys(resolution)
    active = [place for place in range(PLACES) if place % 4 < depth[place // 4]]
    blocks = [block_key(resolution, place, kernel[place], expand[place]) for place in active]
    return [stem, first, *blocks, *head]


@dataclass(frozen=True)
class TableGrid:
    """A set of tables as arrays, for sums over many networks at once.

    A network's time is ``fixed_ms[r]`` plus ``block_ms[r, place, kernel, expand]`` of its active
    places; `resolutions` (R,), `fixed_ms` (R,), `block_ms` (R, 20, 3, 3), the last two axes in the
    order of `KERNELS` and `EXPANSIONS`.
    """

    resolutions: np.ndarray
    fixed_ms: np.ndarray
    block_ms: np.ndarray

    def network_ms(self, resolution, depth, kernel, expand) -> np.ndarray:
        """Times (N,) of N networks: resolutions (N,), depths (N, 5), kernels and expansions (N, 20)
        by value. Raises `TableError` for a resolution that is not in the grid.
        """
        resolution = np.atleast_1d(resolution)
        depth = np.atleast_2d(depth)
        last = len(self.resolutions) - 1
        r = np.searchsorted(self.resolutions, resolution).clip(max=last)
        if (self.resolutions[r] != resolution).any():
            missing = sorted(set(resolution.tolist()) - set(self.resolutions.tolist()))
            raise TableError(
                f"no table for resolutions {missing}; there are {self.resolutions.tolist()}"
            )
        k = np.searchsorted(KERNELS, np.atleast_2d(kernel))
        e = np.searchsorted(EXPANSIONS, np.atleast_2d(expand))
        places = np.arange(PLACES)
        active = places % 4 < depth[:, places // 4]
        blocks = self.block_ms[r[:, None], places, k, e] * active
        return self.fixed_ms[r] + blocks.sum(axis=1)

    def without(self, *resolutions: int) -> "TableGrid":
        """The grid without some resolutions."""
        keep = ~np.isin(self.resolutions, resolutions)
        return TableGrid(self.resolutions[keep], self.fixed_ms[keep], self.block_ms[keep])

    def at(self, resolution: int) -> "TableGrid":
        """A grid of one resolution that need not be in this one.

        Between two tables each row is interpolated; beyond them it follows the Theil-Sen line of
        its times over the number of pixels, which single disturbed rows do not bend.
        """
        known = self.resolutions
        if len(known) < 2:
            raise TableError(f"{len(known)} table; predicting others needs at least 2")
        times = np.column_stack([self.fixed_ms, self.block_ms.reshape(len(known), -1)])
        if known[0] <= resolution <= known[-1]:
            row = np.array([np.interp(resolution, known, column) for column in times.T])
        else:
            lines = [theilslopes(column, known**2)[:2] for column in times.T]
            row = np.array([max(b + a * resolution**2, 0.0) for a, b in lines])
        block = row[1:].reshape(1, *self.block_ms.shape[1:])
        return TableGrid(np.array([resolution]), row[:1], block)


def grid(tables: OperatorTables) -> TableGrid:
    """Tables as arrays; raises `TableError` naming a row that is missing."""
    resolutions = sorted(tables)
    fixed = np.zeros(len(resolutions))
    blocks = np.zeros((len(resolutions), PLACES, len(KERNELS), len(EXPANSIONS)))
    for i, r in enumerate(resolutions):
        try:
            fixed[i] = sum(tables[r][key] for key in fixed_keys(r))
            for place, k, e in np.ndindex(blocks.shape[1:]):
                blocks[i, place, k, e] = tables[r][block_key(r, place, KERNELS[k], EXPANSIONS[e])]
        except KeyError as error:
            raise TableError(f"table of {r}: no row {error}") from None
    return TableGrid(np.array(resolutions), fixed, blocks)


def levels_ms(tables: TableGrid) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the six published levels in the tables, and what the board took (6,)."""
    digits = [[[int(c) for c in level[i]] for level in JETSON_LEVELS] for i in (1, 2, 3)]
    sums = tables.network_ms([level[0] for level in JETSON_LEVELS], *digits)
    return sums, np.array([level[5] for level in JETSON_LEVELS])


def random_networks(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depths (n, 5), kernels (n, 20) and expansions (n, 20) of `n` random sub-networks."""
    depth = rng.choice(DEPTHS, (n, len(STAGES)))
    return depth, rng.choice(KERNELS, (n, PLACES)), rng.choice(EXPANSIONS, (n, PLACES))


def judge_unseen(tables: TableGrid, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Each resolution predicted from the others: error (%) of the sums of `n` random networks."""
    networks = random_networks(n, rng)
    rows = []
    for resolution in tables.resolutions.tolist():
        truth = tables.network_ms(np.full(n, resolution), *networks)
        others = tables.without(resolution).at(resolution)
        error = others.network_ms(np.full(n, resolution), *networks) / truth - 1
        rows.append({"resolution": resolution, "mape_pct": 100 * np.abs(error).mean(),
                     "bias_pct": 100 * error.mean(), "n": n})  # fmt: skip
    return pd.DataFrame(rows)


def _sizes(resolution: int) -> list[int]:
    """Sizes of the feature maps: after the stem, then after each stage."""
    sizes = [(resolution - 1) // 2 + 1]
    for _, stride, *_ in STAGES:
        sizes.append((sizes[-1] - 1) // stride + 1)
    return sizes


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot read the table: {error}") from error
    if missing := [name for name in _COLUMNS if name not in rows]:
        raise TableError(f"{path}: lacks the columns {missing}; expected {_COLUMNS}")
    block = rows["op"] == "expanded_conv"
    key = rows["op"] + "-input:" + rows["input"] + "-output:" + rows["output"].astype(str)
    for field, column in zip(_BLOCK_FIELDS, _COLUMNS[4:10], strict=True):
        values = rows.loc[block, column]
        if values.isna().any():
            raise TableError(f"{path}: a block without {column}; expected a number")
        key[block] += f"-{field}:" + values.astype(int).astype(str)
    return rows.assign(key=key)[["resolution", "key", "mean_ms", "std_ms", "count"]]


def _json_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*_lookup_table.json"))
    if not files:
        raise TableError(
            f"{folder}: no latency table; expected latency_<unit>.csv or R_lookup_table.json"
        )
    return files


def _read_json(path: Path) -> list[dict]:
    try:
        resolution = int(path.name.partition("_")[0])
        rows = []
        for key, value in json.loads(path.read_text()).items():
            parse_key(key)
            rows.append({"resolution": resolution, "key": key, "mean_ms": float(value["mean"]),
                         "std_ms": float(value["std"]), "count": int(value["count"])})  # fmt: skip
    except TableError as error:
        raise TableError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(
            f"{path}: expected {{key: {{count, mean, std}}}}, got {type(error).__name__}: {error}"
        ) from error
    return rows
