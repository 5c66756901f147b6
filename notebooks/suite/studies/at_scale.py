"""What the formula of a step says about more machines than there are here."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dynlib.training.compress import TopK, adaptive_ratios
from dynlib.training.pipeline import Link, fence, iteration_s

# GPT-2 XL: 48 blocks, one a machine; a micro-batch is one sequence.
MACHINES, WIDTH, TOKENS = 48, 1600, 1024
FLOPS_PER_S = 3e12  # a guess: 10 TFLOP/s of float32, a third of it reached
FASTEST_MBIT, SLOWEST_MBIT = 10_000.0, 8.0
WITHIN_S, BETWEEN_S = 1e-4, 0.02  # latency inside a site and between two, guesses


def draw_rates(seed: int, sites: int = 6) -> np.ndarray:
    """Rates (machines, machines) in Mbit/s, the fastest inside a site; 8 to 1,000 between two."""
    rng = np.random.default_rng(seed)
    between = np.exp(rng.uniform(np.log(SLOWEST_MBIT), np.log(1000), (sites, sites)))
    between = np.minimum(between, between.T)
    np.fill_diagonal(between, FASTEST_MBIT)
    home = np.repeat(np.arange(sites), MACHINES // sites)
    rates = between[np.ix_(home, home)]
    np.fill_diagonal(rates, 0)
    return rates


def predict_steps(rates_mbit: np.ndarray, ratio: float, micro_batches: int = 8) -> list[dict]:
    """A row for each way to train: seconds of a step.

    Machines are alike. The baseline takes them as they are listed, site by site, and sends all.

    Args:
        ratio: r of AdaTopK; uniform Top-K beside it compresses every link as AdaTopK the slowest.
    """
    size = TOKENS * WIDTH
    forward_s = TOKENS * (24 * WIDTH**2 + 4 * TOKENS * WIDTH) / FLOPS_PER_S
    listed, fenced = range(len(rates_mbit)), fence(rates_mbit)

    def row(case: str, order: Sequence[int], ratios_of) -> dict:
        links = [_link(rates_mbit, one, other) for one, other in pairwise(order)]
        ratios = ratios_of([link.time_s(4 * size) for link in links])
        over_s = [
            link.time_s(4 * TopK((size,), own).floats)
            for link, own in zip(links, ratios, strict=True)
        ]
        own_s = [forward_s] * len(order)
        twice_s = [2 * forward_s] * len(order)  # backward computes two products for one
        return {"case": case, "step_s": iteration_s(own_s, twice_s, over_s, micro_batches)}

    return [
        row("as listed", listed, lambda times_s: [1.0] * len(times_s)),
        row("placed", fenced, lambda times_s: [1.0] * len(times_s)),
        row("placed, uniform", fenced, lambda times_s: [3 * ratio] * len(times_s)),
        row("placed, adaptive", fenced, lambda times_s: adaptive_ratios(times_s, ratio)),
    ]


def _link(rates_mbit: np.ndarray, one: int, other: int) -> Link:
    rate = rates_mbit[one, other]
    latency_s = WITHIN_S if rate == FASTEST_MBIT else BETWEEN_S
    return Link(f"{one}-{other}", rate * 125e3, latency_s)
