"""Fluid Batching (ICCAD'22, arXiv 2209.13443) on an analytic accelerator, against its rivals.

Neither code nor measurements are public. The accelerator is a tiled matrix engine: a layer of B
images takes ceil(B HW / TR) ceil(K K Cin / TP) ceil(Cout / TC) TR cycles, so that what is lost are
the ceilings. Stackable processing elements let columns without a filter take further rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from dynlib.runtime.batching import BATCHINGS, Batching, serve_batches
from suite.errors import SuiteError

PUBLISHED = {"mean_latency_gain": 1.97, "violation_gain": 6.7}
MOST = 8
BLOCKS = (3, 4, 6, 3)  # of ResNet-50
EXIT_BLOCKS = (3, 7, 10, 13)
# Chances of leaving at each exit and at the end.
EXITS = {
    "typical": (0.30, 0.20, 0.15, 0.10, 0.25),
    "early": (0.50, 0.20, 0.10, 0.05, 0.15),
    "late": (0.10, 0.10, 0.15, 0.15, 0.50),
    "none": (0.0, 0.0, 0.0, 0.0, 1.0),
}


class Npu(NamedTuple):
    """A tile of rows, depth and columns, and its clock."""

    rows: int = 256
    depth: int = 16
    columns: int = 128
    mhz: float = 200.0
    stackable: bool = False

    def layer_ms(self, batch: int, pixels: int, depth: int, filters: int) -> float:
        """Time of one convolution as a matrix product."""
        rows = self.rows
        if self.stackable and filters < self.columns:
            rows *= self.columns // filters
        tiles = -(-batch * pixels // rows) * -(-depth // self.depth) * -(-filters // self.columns)
        return tiles * self.rows / self.mhz / 1000


def resnet50() -> list[list[tuple[int, int, int]]]:
    """Its 18 nodes (stem, 16 blocks, classifier): per convolution output pixels, depth, filters."""
    nodes = [[(112 * 112, 7 * 7 * 3, 64)]]
    channels, side = 64, 56
    for stage, blocks in enumerate(BLOCKS):
        width = 64 * 2**stage
        for block in range(blocks):
            if stage and not block:
                side //= 2  # in the first convolution, as in the paper of ResNet
            pixels = side**2
            convs = [(pixels, channels, width), (pixels, 9 * width, width)]
            convs.append((pixels, width, 4 * width))
            if not block:
                convs.append((pixels, channels, 4 * width))
            nodes.append(convs)
            channels = 4 * width
    nodes.append([(1, channels, 1000)])
    return nodes


def node_ms(npu: Npu, most: int = MOST) -> np.ndarray:
    """(nodes, batch sizes) times of ResNet-50 on an accelerator."""
    return np.array([
        [sum(npu.layer_ms(batch, *conv) for conv in convs) for batch in range(1, most + 1)]
        for convs in resnet50()
    ])  # fmt: skip


def requests(
    rate: float, count: int, seed: int | Sequence[int], exits: str, bursts: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals in ms and nodes until the exit; `rate` per second.

    With bursts a quarter of the time the rate is three times as high, otherwise a third.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0, count)
    arrival_ms = gaps.cumsum() * 1000 / rate
    if bursts:
        arrival_ms = _bursty(gaps, rate)
    ends = [1 + block for block in EXIT_BLOCKS] + [len(resnet50())]
    return arrival_ms, rng.choice(ends, count, p=EXITS[exits])


def _bursty(gaps: np.ndarray, rate: float, period_s: float = 4.0) -> np.ndarray:
    """Unit-rate gaps as arrivals in ms, at three times the rate in a quarter of every period."""
    work = gaps.cumsum()
    high, low = 3 * rate, rate / 3
    per_period = period_s * (high + 3 * low) / 4
    whole, rest = np.divmod(work, per_period)
    burst = period_s / 4 * high
    inside = np.where(rest < burst, rest / high, period_s / 4 + (rest - burst) / low)
    return 1000 * (whole * period_s + inside)


def reached(exits: str) -> np.ndarray:
    """The part of all requests that comes to each node."""
    left = np.zeros(len(resnet50()))
    left[[1 + block for block in EXIT_BLOCKS]] = EXITS[exits][:-1]
    return 1 - left.cumsum()


STACKED = "fluid, stackable"


def judge(
    load: float, seed: int, count: int, exits: str = "typical", slo: float = 2.0,
    bursts: bool = False, rows: int = 256,
) -> list[dict]:  # fmt: skip
    """A row per way of batching at a load: part of what full depth at the largest batch can do.

    `slo`: deadline over the time of the full network alone. Raises `SuiteError` for a load at or
    above 1, where queues and thus all ratios grow with the length of the run.
    """
    if not 0 < load < 1:
        raise SuiteError(f"load {load:g}: expected one below saturation, between 0 and 1")
    plain, stacked = (node_ms(Npu(rows=rows, stackable=on)) for on in (False, True))
    full_ms = plain.sum(0)
    rate = load * 1000 * MOST / full_ms[-1]
    deadline_ms = slo * full_ms[0]
    arrival_ms, nodes = requests(rate, count, seed, exits, bursts)
    ways: list[tuple[str, Batching, np.ndarray]] = [(how.name, how, plain) for how in BATCHINGS]
    ways.append((STACKED, BATCHINGS[-1], stacked))
    found = []
    for name, how, times in ways:
        done = serve_batches(arrival_ms, nodes, deadline_ms, times, how, reached(exits))
        latency_ms = done.finish_ms - arrival_ms
        found.append({
            "batching": name, "load": load, "seed": seed, "exits": exits, "slo": slo,
            "arrivals": "bursts" if bursts else "Poisson", "rows": rows, "requests": count,
            "mean_ms": latency_ms.mean(), "p99_ms": np.percentile(latency_ms, 99),
            "violation_pct": 100 * (latency_ms > deadline_ms).mean(),
            "batch": np.mean([size for _, _, size, _ in done.sizes]),
        })  # fmt: skip
    return found


def gains(table: pd.DataFrame, ours: str, theirs: str) -> pd.DataFrame:
    """Per seed, theirs over ours: mean and 99th percentile of latency, the mean of that over the
    loads; and all misses over all loads, which at a low load alone are too few to divide."""
    by = table.set_index(["batching", "seed", "load"])
    mine, other = by.loc[ours], by.loc[theirs]
    ratios = (other[["mean_ms", "p99_ms"]] / mine[["mean_ms", "p99_ms"]]).groupby("seed").mean()
    misses = [rows["violation_pct"].groupby("seed").mean() for rows in (other, mine)]
    return ratios.assign(violation=misses[0] / misses[1])
