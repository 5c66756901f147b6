"""Fits the shipped coefficients of Jetson Nano and Xavier NX again, from the public measurements.

In the folder of notebooks ``python -m suite.studies.fit_boards DATA_DIR`` prints every coefficient
with its error. DATA_DIR holds ``boards/measured_power_jetson.csv`` (LoudVA) and
``jetson_xavier_nx/latency_{cpu,gpu}.csv`` (DynamicOFA), which the suite does not ship. All fits
minimise relative errors.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.boards.board import LayerCost, Unit
from dynlib.boards.calibration import SAMPLE_COLUMNS, relative_nnls
from dynlib.boards.latency import layer_us
from dynlib.machine.bind import load_board
from dynlib.space import LayerSpec

# The lowest clock of each board: its power at concurrency 1 cannot be right.
SUSPECT_MHZ = {"jetson-xavier-nx": 114.75, "jetson-nano": 153.6}
INCEPTION_V3_MMAC = 5711.0  # of its 94 convolutions at 299 px


def read_samples(path: Path, board: str) -> pd.DataFrame:
    """All rows of a board as `dynlib.boards.calibration` wants them, without the suspect one."""
    table = (
        pd.read_csv(path, comment="#")
        .query("board == @board")
        .rename(columns={"gpu_mhz": "freq_mhz"})
    )
    suspect = (table["freq_mhz"] == SUSPECT_MHZ[board]) & (table["concurrency"] == 1)
    table = table.assign(power_mw=1e3 * table["mean_power_w"],
                         latency_ms=1e3 * table["avg_latency_s"])  # fmt: skip
    return table.loc[~suspect, list(SAMPLE_COLUMNS)].reset_index(drop=True)


def fit_power(rows: pd.DataFrame, unit: Unit) -> dict[str, float]:
    """Static power, C and idle fraction of a board from its power at concurrency 4 and 1.

    Busy: ``P4 = static + C*f*V^2``. With gaps, the busy share u taken as the ratio of throughputs:
    ``P1 = static + C*f*V^2 * (i + (1 - i) * u)``. So i also holds what the CPU does in the gaps.
    """
    f = rows["gpu_mhz"]
    p1, p4 = rows["power_mw_c1"], rows["power_mw_c4"]
    volts_mv = np.array([unit.voltage_mv(mhz) for mhz in f])
    x = f * volts_mv**2 / 1e9
    busy = np.column_stack([np.ones(len(f)), x])
    (static_mw, c), error4 = relative_nnls(busy, p4.to_numpy())
    u = rows["ips_c1"] / rows["ips_c4"]
    known = static_mw + c * x * u
    gap = c * x * (1 - u)
    # Least relative squares in one unknown: i = sum(r * g) / sum(g * g), each over P1.
    rest = (p1 - known) * gap / p1**2
    idle = float(rest.sum() / (gap**2 / p1**2).sum())
    modelled = known + idle * gap
    error1 = (modelled / p1 - 1).abs().max()
    return {
        "static_mw": static_mw,
        "c_uw_mhz_v2": c,
        "max_error_busy_pct": 100 * error4.max(),
        "idle_fraction": idle,
        "max_error_idle_pct": 100 * error1,
    }


def fit_memory_share(rows: pd.DataFrame) -> dict[str, float]:
    """Share a of ``latency(f) = latency(max) * (a + (1 - a) * max / f)`` at concurrency 1."""
    f = rows["gpu_mhz"].to_numpy()
    terms = np.column_stack([np.ones(len(f)), f.max() / f])
    parts, error = relative_nnls(terms, rows["latency_s_c1"].to_numpy())
    share = parts[0] / parts.sum()
    return {"memory_share": share, "max_error_pct": 100 * error.max()}


def read_power(path: Path, board: str) -> pd.DataFrame:
    """One row per GPU clock, power in mW, without the suspect clock."""
    table = pd.read_csv(path, comment="#").query("board == @board")
    wide = table.pivot(index="gpu_mhz", columns="concurrency")
    wide = wide.drop(index=SUSPECT_MHZ[board])
    columns = {"gpu_mhz": wide.index.to_numpy(), "latency_s_c1": wide["avg_latency_s"][1]}
    for n in (1, 4):
        columns[f"power_mw_c{n}"] = 1000 * wide["mean_power_w"][n]
        columns[f"ips_c{n}"] = wide["throughput_ips"][n]
    return pd.DataFrame(columns).reset_index(drop=True)


def read_operators(path: Path) -> pd.DataFrame:
    """The per-operator table without its known faults.

    Left out: the first block, whose time is copied between the two files, and R = 160 of the GPU.
    """
    table = pd.read_csv(path)
    block = table["op"] == "expanded_conv"
    copied = block & (table["idskip"] == 1) & (table["expand"] == 24)
    kept = table[~copied]
    if "gpu" in path.stem:
        kept = kept[kept["resolution"] != 160]
    return kept.reset_index(drop=True)


def operator_layers(row) -> list[LayerSpec]:
    """The layers inside one row; a block is expansion, depth-wise, squeeze-excite, projection."""
    size, _, channels = map(int, row.input.split("x"))
    *out_sizes, out = map(int, row.output.split("x"))
    out_size = out_sizes[0] if out_sizes else 1

    def conv(a, b, kernel=1, groups=1, sizes=(size, size)):
        return LayerSpec("conv", a, b, kernel, 1, groups, *sizes)

    if row.op == "AvgPool2D":
        return [LayerSpec("pool", channels, out, size, 1, channels, size, 1)]
    if row.op != "expanded_conv":
        kernel = 3 if row.op == "Conv" else 1
        return [conv(channels, out, kernel, sizes=(size, out_size))]
    mid = int(row.expand)
    layers = []
    if mid != channels:
        layers.append(conv(channels, mid))
    layers.append(conv(mid, mid, int(row.kernel), groups=mid, sizes=(size, out_size)))
    if row.se:
        squeezed = max(8, int(mid / 4 + 4) // 8 * 8)
        layers.append(LayerSpec("pool", mid, mid, out_size, 1, mid, out_size, 1))
        layers.append(conv(mid, squeezed, sizes=(1, 1)))
        layers.append(conv(squeezed, mid, sizes=(1, 1)))
    layers.append(conv(mid, out, sizes=(out_size, out_size)))
    return layers


def fit_layers(
    table: pd.DataFrame,
    asynchronous: bool,
    us_per_mmac: float = 0.0,
    us_per_mbyte: float = 0.0,
) -> tuple[LayerCost, dict[str, float]]:
    """Layer costs from the operator table, and their errors on it.

    On an asynchronous unit the table is launch-bound and cannot tell the rates of work, so these
    are given; on the other all are fitted, without the traffic, to which it gives no weight.
    """
    rows = [operator_layers(row) for row in table.itertuples()]
    terms = np.array([_terms(layers) for layers in rows])
    measured_us = 1000 * table["mean_ms"].to_numpy()
    used = [0, 3] if asynchronous else [0, 1, 2, 3]
    parts = np.zeros(4)
    parts[used], _ = relative_nnls(terms[:, used], measured_us)
    if asynchronous:
        parts[1:3] = us_per_mmac
    cost = LayerCost(*map(float, parts), us_per_mbyte, asynchronous, 1, "fitted")
    modelled = [sum(layer_us(layer, cost) for layer in layers) for layers in rows]
    modelled_us = np.array(modelled)
    error = np.abs(modelled_us / measured_us - 1)
    return cost, {
        "rows": len(table),
        "median_error_pct": 100 * np.median(error),
        "p95_error_pct": 100 * np.quantile(error, 0.95),
        "sum_error_pct": 100 * (modelled_us.sum() / measured_us.sum() - 1),
    }


def _terms(layers: list[LayerSpec]) -> np.ndarray:
    """Launches, dense MMAC, depth-wise MMAC and depth-wise kweights of some layers."""
    terms = np.zeros(4)
    for layer in layers:
        mmac = layer.macs / 1e6
        if layer.op == "pool":
            continue
        if layer.groups == layer.in_channels > 1:
            terms += (1.0, 0.0, mmac, layer.params / 1e3)
        else:
            terms += (1.0, mmac, 0.0, 0.0)
    return terms


def print_coefficients(data_dir: Path, write=sys.stdout.write) -> None:
    """Print all coefficients."""

    def say(name: str, values: dict[str, float]) -> None:
        for key, value in values.items():
            write(f"{name} {key} = {value:.4g}\n")

    rates = {}
    for name in ("jetson-xavier-nx", "jetson-nano"):
        rows = read_power(data_dir / "boards" / "measured_power_jetson.csv", name)
        fastest_ips = rows["ips_c4"].iloc[-1]
        rates[name] = 1e6 / (fastest_ips * INCEPTION_V3_MMAC)
        say(name, fit_power(rows, load_board(name).gpu))
        say(name, fit_memory_share(rows) | {"us_per_mmac": rates[name]})
    for unit in ("gpu", "cpu"):
        table = read_operators(data_dir / "jetson_xavier_nx" / f"latency_{unit}.csv")
        given = ()
        if unit == "gpu":
            given = rates["jetson-xavier-nx"], 1e6 / 51.2e3
        cost, errors = fit_layers(table, unit == "gpu", *given)
        name = f"jetson-xavier-nx {unit}"
        write(f"{name} {cost}\n")
        say(name, errors)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m suite.studies.fit_boards DATA_DIR")
    print_coefficients(Path(sys.argv[1]))
