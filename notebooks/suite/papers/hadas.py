"""HADAS (arXiv 2212.03354): its space, and the exact optimum of its inner problem."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from math import factorial

import numpy as np
import pandas as pd

from dynlib.errors import InfeasibleError
from dynlib.searching.lookup import DESIGN_KNOBS, Lookup
from dynlib.searching.study import BETTER, best_within
from dynlib.searching.two_level import DIRECTIONS, worst_miss
from dynlib.space import SearchSpace

# HADAS's outer space: AttentiveNAS widths, depths, kernels and expansions (4.40e11 networks).
HADAS_SPACE = SearchSpace(
    resolution=(192, 224, 256, 288),
    width=((16, 24), (16, 24), (24, 32), (32, 40), (64, 72), (112, 120, 128),
           (192, 200, 208, 216), (216, 224), (1792, 1984)),
    depth=((1, 2), (3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6), (3, 4, 5, 6, 7, 8), (3, 4, 5, 6, 7, 8),
           (1, 2)),
    kernel=((3, 5),) * 7,
    expand=((1,), *((4, 5, 6),) * 4, (6,), (6,)),
)  # fmt: skip
# Of its repository, CIFAR-100: accuracy (%) of the exits behind blocks 5, 6, ... of AttentiveNAS
# backbones of 17, 21 and 21 blocks, the backbone frozen; the last one is the classifier itself.
PUBLISHED_EXITS = {
    "A0": (25.5, 26.7, 38.2, 41.1, 42.4, 50.1, 54.4, 59.0, 74.7, 76.7, 79.5, 84.6, 86.0),
    "A3": (20.5, 21.6, 24.0, 33.1, 36.4, 37.6, 38.0, 44.5, 50.6, 55.1, 73.2, 76.2, 79.5, 80.6, 81.5,
           85.9, 87.1),
    "A5": (22.2, 23.0, 32.3, 34.6, 36.2, 41.7, 47.5, 52.4, 54.1, 72.1, 75.6, 79.3, 80.1, 81.1, 81.6,
           86.2, 87.4),
}  # fmt: skip
_FIRST_EXIT = 5
_CHUNK = 200_000  # points that an exhaustive search holds at a time
_TIE = 1e-12  # no difference in a limit is so small


def published_exits() -> pd.DataFrame:
    """`PUBLISHED_EXITS` by row: group (the backbone), position (its block from 0), value (%)."""
    rows = [
        (name, _FIRST_EXIT - 1 + i, accuracy_pct)
        for name, accuracies in PUBLISHED_EXITS.items()
        for i, accuracy_pct in enumerate(accuracies)
    ]
    return pd.DataFrame(rows, columns=["group", "position", "value"])


def share_half_way(exits: pd.DataFrame) -> float:
    """Accuracy of exits (position from 0, value) half-way through the blocks, between them
    interpolated, over that of the last one, in percent."""
    rows = exits.sort_values("position")
    way = (rows["position"] + 1) / (rows["position"].max() + 1)
    return 100 * float(np.interp(0.5, way, rows["value"])) / rows["value"].iloc[-1]


def without_dissimilarity(lookup: Lookup, right: np.ndarray, setting: int) -> np.ndarray:
    """What D is of every choice of exits (K,) at a setting if each exit counts for itself.

    An exit in use counts with all images that it answers `right` (N, P), whether or not an earlier
    one has answered them; the score is the mean over the exits in use and the last position.
    """
    segment_mj = np.array([cost_mj[setting] for _, cost_mj in lookup.segments])
    head_mj = np.array([cost_mj[setting] for _, cost_mj in lookup.heads])
    spent_mj = np.cumsum(segment_mj + lookup.used * head_mj, axis=1)
    reference_mj, _ = lookup.reference
    scores = right.mean(axis=0) * reference_mj / spent_mj
    return (lookup.used * scores).sum(axis=1) / lookup.used.sum(axis=1)


def exhaustive(
    lookup: Lookup,
    objective: str = "score",
    limits: Mapping[str, float] | None = None,
    knobs: Sequence[str] = DESIGN_KNOBS,
) -> pd.Series:
    """The best of all exit choices at all efficient settings; a row of `Lookup.table`.

    Raises `InfeasibleError` naming the limit in the way, the best value reachable and the point
    that comes nearest.
    """
    limits = dict(limits or {})
    sign = BETTER[DIRECTIONS[objective]]
    k, f = lookup.free(knobs)
    f = lookup.efficient(f)

    def scan(k: np.ndarray, picks: Callable) -> list[tuple[int, int]]:
        """The best pair of every chunk under each criterion that `picks` makes of the measures."""
        found = []
        chunks = np.array_split(k, 1 + len(k) * len(f) // _CHUNK) if len(k) else ()
        for part in chunks:
            for gain in picks(lookup.measure(part[:, None], f[None])):
                i, j = divmod(int(gain.argmax()), len(f))
                found.append((part[i], f[j]))
        return found

    def kept(values, limits, gain):
        return np.where(worst_miss(values, limits) == 0, gain, -np.inf)

    enough = lookup.accuracy_pct[k] >= limits.get("accuracy_val_pct", 0)  # no clock changes it
    if found := scan(k[enough], lambda v: [kept(v, limits, sign * v[objective])]):
        with suppress(InfeasibleError):
            return best_within(lookup.table(*np.array(found).T), objective, DIRECTIONS, limits)
    but = {name: {n: v for n, v in limits.items() if n != name} for name in limits}
    found = scan(k, lambda v: [
        gain for n in limits
        for gain in (v[n], -v[n], kept(v, but[n], BETTER[DIRECTIONS[n]] * v[n]))
    ])  # fmt: skip
    ends = lookup.table(*np.array(found).T)[list(limits)]
    span = (ends.max() - ends.min()).replace(0, 1)  # as `best_within` weighs misses
    found += scan(k, lambda v: [_TIE * sign * v[objective] - worst_miss(v, limits, span)])
    table = lookup.table(*np.array(found).T).sort_values(objective, ascending=sign < 0)
    return best_within(table, objective, DIRECTIONS, limits)


def split_gain(lookup: Lookup, limits: Mapping[str, float]) -> pd.DataFrame:
    """How much energy each knob saves within `limits`, exactly, against no exits at full clocks.

    `alone_pct` is the saving of that knob by itself, `last_pct` what it adds to all others, and
    `gain_pct` its Shapley value, the mean over all orders in which knobs can be freed, which sum up
    to the saving of all. In percent of the energy of an image with no knob free.

    Raises `InfeasibleError` if the limits cannot be kept without any knob.
    """
    count = len(DESIGN_KNOBS)
    energy = {}
    for size in range(count + 1):
        for knobs in combinations(DESIGN_KNOBS, size):
            best = exhaustive(lookup, "energy_mj", limits, knobs)
            energy[frozenset(knobs)] = best["energy_mj"]
    nothing, everything = frozenset(), frozenset(DESIGN_KNOBS)
    saved = {knobs: 100 * (1 - value / energy[nothing]) for knobs, value in energy.items()}
    rows = []
    for knob in DESIGN_KNOBS:
        shares = []
        for before, gain in saved.items():
            if knob in before:
                continue
            # The share of all orders in which exactly these knobs are freed before this one.
            orders = factorial(len(before)) * factorial(count - 1 - len(before))
            weight = orders / factorial(count)
            shares.append(weight * (saved[before | {knob}] - gain))
        row = {
            "knob": knob,
            "gain_pct": sum(shares),
            "alone_pct": saved[frozenset({knob})],
            "last_pct": saved[everything] - saved[everything - {knob}],
        }
        rows.append(row)
    return pd.DataFrame(rows).assign(source=str(lookup.platform.source))
