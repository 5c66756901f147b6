"""What the routes of the transformer save: a gate chooses, or the smallest by its confidence.

Stage II of DS-Net++ (arXiv 2109.10060): weights are frozen, and what each route says to each image
is computed once. What is chosen is chosen on validation images, and judged on test images.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch

from dynlib.decide import Sure, Walk, fit_temperature, train_gate, with_exits
from dynlib.decide.gate import Gate
from dynlib.images import Dataset, Images
from dynlib.nets.chain import chain, cut
from dynlib.nets.supernet import Supernet, macs_m
from suite.studies.adapt import Pair, Routes, cheapest, halves, paired_drop, routes_of
from suite.studies.adapt_vit import BEHIND, ROUTES

KNOBS = np.append(np.linspace(-8, 16, 481), 1e6)  # of the gate; the last sends all to the largest
LOST_PP = 0.3  # points that may be lost on validation images (arXiv 2109.10060, abstract)


def vit_routes(supernet: Supernet, images: Dataset, part: Images) -> Routes:
    """What all routes say to all images."""
    return routes_of(supernet, ROUTES, BEHIND, images, part)


def gate_rows(
    routes: Mapping[str, Routes], seeds: Iterable[int] = range(3), lost_pp: float = LOST_PP
) -> tuple[pd.DataFrame, list[Gate]]:
    """Gates, and how many times less than the largest route each works on test images.

    Args:
        routes: of the parts val and test. Gates learn from one half of val; their knobs are chosen
            on the other one.
        lost_pp: points that a gate may lose there.

    Returns:
        A row of each seed: seed, knob, reduction_ratio, macs_m, accuracy_pct, the paired drop of
        accuracy with its interval (drop_pp, low, high), and the share of images on each route.
    """
    test = routes["test"]
    whole = test.right[:, -1].numpy()
    everyone = np.arange(len(whole))
    rows, gates = [], []
    for seed in seeds:
        learn, held = map(routes["val"].take, halves(len(routes["val"].labels), seed))
        gate = train_gate(learn.features, learn.losses, learn.right[:, 0], learn.macs_m, seed=seed)
        largest_pct = 100 * held.right[:, -1].float().mean().item()
        chosen = cheapest(held.table(gate, KNOBS), largest_pct - lost_pp)
        tested = test.table(gate, [chosen["threshold"]]).iloc[0]
        taken = tested["taken"]
        right = test.right.numpy()[everyone, taken]
        shares = np.bincount(taken, minlength=len(ROUTES)) / len(taken)
        row = {"seed": seed, "knob": chosen["threshold"]}
        row |= _spent(whole, right, tested["macs_m"], max(test.macs_m))
        row |= {f"route{number}": share for number, share in enumerate(shares)}
        rows.append(row)
        gates.append(gate)
    return pd.DataFrame(rows), gates


def static_rows(supernet: Supernet, routes: Mapping[str, Routes]) -> pd.DataFrame:
    """A row of each route for all images: subnet, lost_val_pp, and as in `gate_rows`."""
    work = [macs_m(supernet, config) for config in ROUTES]
    right = {part: some.right.numpy() for part, some in routes.items()}
    rows = []
    for number, config in enumerate(ROUTES):
        lost = 100 * (right["val"][:, -1].mean() - right["val"][:, number].mean())
        row = {"subnet": str(config), "lost_val_pp": lost}
        row |= _spent(right["test"][:, -1], right["test"][:, number], work[number], work[-1])
        rows.append(row)
    return pd.DataFrame(rows)


def confidence_rows(
    supernet: Supernet, routes: Mapping[str, Routes], lost_pp: float = LOST_PP
) -> pd.DataFrame:
    """The smallest route answers where it is sure of its answer, else the largest.

    Two rows, as in `gate_rows` with threshold, temperature and recall: a ``cascade``, which starts
    again from the image, and an ``exit``, which goes on behind the first block, where the smallest
    route ends.
    """
    small, large = (macs_m(supernet, config) for config in (ROUTES[0], ROUTES[-1]))
    trunk, _ = cut(supernet.blocks(ROUTES[-1]), [BEHIND])
    shared = sum(layer.macs for layers in trunk.values() for layer in layers) / 1e6
    temperature = fit_temperature(routes["val"].logits[:, 0], routes["val"].labels)
    whole = {part: some.right[:, -1].numpy() for part, some in routes.items()}
    rows = []
    for method, later in (("cascade", large), ("exit", large - shared)):
        pairs = {
            part: Pair(
                some.logits[:, 0], some.logits[:, -1], some.labels, (small, later), temperature
            )
            for part, some in routes.items()
        }
        floor_pct = 100 * whole["val"].mean() - lost_pp
        chosen = cheapest(pairs["val"].table(), floor_pct)
        threshold, recall = chosen[["threshold", "recall"]]
        pair = pairs["test"]
        spent = small + pair.goes_on(threshold).mean() * later
        row = {"method": method, "threshold": threshold, "recall": recall}
        row |= {"temperature": temperature}
        row |= _spent(whole["test"], pair.right(threshold, recall), spent, large)
        rows.append(row)
    return pd.DataFrame(rows)


def _spent(whole: np.ndarray, right: np.ndarray, macs: float, most: float) -> dict[str, float]:
    drop = paired_drop(whole, right)
    return {
        "reduction_ratio": most / macs,
        "macs_m": macs,
        "accuracy_pct": 100 * right.mean(),
        "drop_pp": drop["value"],
        "low": drop["low"],
        "high": drop["high"],
    }


def exit_of(supernet: Supernet, row: Mapping, example: torch.Tensor) -> Walk:
    """The walk of the row ``exit`` of `confidence_rows`: no block runs twice."""
    net = supernet.prepare(ROUTES[-1])
    head = chain(net).blocks["head"]
    rule = Sure(row["threshold"], row["temperature"])
    return with_exits(net, [BEHIND], [head], [rule], example, row["recall"])
