"""Comparing with published fronts: one table of points, one interpolation rule, one error bar.

A headline such as "2.4 x faster than AutoSlim" compares a point of a rival with one's own front at
equal accuracy, or at equal latency (Dynamic-OFA, arXiv 2105.03596, figure 4).
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.errors import TableError
from dynlib.pareto import pareto_front

PUBLISHED_COLUMNS = ("unit", "series", "latency_ms", "accuracy_pct", "claim", "subnet", "source")
OURS, RIVAL = "Dynamic-OFA", "AutoSlim MNASNet"
SLACK = 0.03  # how much slower a level may be and still count as "at similar latency"


def read_published(path: str | Path) -> pd.DataFrame:
    """Points read off published figures, one row each.

    ``claim`` is `speedup` or `accuracy` at the rival's point that this published headline compares
    with; ``subnet`` is the architecture where it is known. Raises `TableError`.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot read published points: {error}") from error
    if tuple(table.columns) != PUBLISHED_COLUMNS:
        raise TableError(f"{path}: has columns {list(table.columns)}, expected {PUBLISHED_COLUMNS}")
    bad = ~(table["latency_ms"].gt(0) & table["accuracy_pct"].between(0, 100))
    if bad.any():
        raise TableError(
            f"{path}, row {np.flatnonzero(bad)[0] + 1}: expected a latency above 0 ms and an "
            "accuracy from 0 to 100 %"
        )
    return table


def interpolate(
    points: pd.DataFrame, x: str, y: str, at: float, *, slack: float | None = None
) -> float:
    """Value of `y` on the front of `points` where `x` is `at`.

    Without `slack` linear between the two neighbours. With it `y` is the best of those points whose
    `x` is at most ``at * (1 + slack)``: only real levels count, a level cannot be interpolated.

    Raises `TableError` where the points do not reach, because nothing is extrapolated.
    """
    rows = points.sort_values(x)
    xs, ys = rows[x].to_numpy(float), rows[y].to_numpy(float)
    if slack is not None:
        within = ys[xs <= at * (1 + slack)]
        if not len(within):
            raise TableError(f"no point with {x} <= {at:g} (+ {slack:.0%}); first is {xs[0]:g}")
        return float(within.max())
    if not xs[0] <= at <= xs[-1]:
        raise TableError(f"{x} = {at:g} is outside of the points, {xs[0]:g} to {xs[-1]:g}")
    return float(np.interp(at, xs, ys))


def against_rival(ours: pd.DataFrame, rival: pd.DataFrame, *, slack: float) -> dict[str, float]:
    """`speedup` (ratio) and `accuracy_gain_pp` of a front over the rival's points of the claims.

    The speed-up is at equal accuracy; where all of the front is better, its fastest point counts.
    """
    claims = rival.dropna(subset="claim").set_index("claim")
    equal, similar = claims.loc["speedup"], claims.loc["accuracy"]
    front = pareto_front(ours, ["latency_ms"], ["accuracy_pct"])
    least_pct = max(equal["accuracy_pct"], front["accuracy_pct"].min())
    latency_ms = interpolate(front, "accuracy_pct", "latency_ms", least_pct)
    accuracy = interpolate(front, "latency_ms", "accuracy_pct", similar["latency_ms"], slack=slack)
    return {
        "speedup": equal["latency_ms"] / latency_ms,
        "accuracy_gain_pp": accuracy - similar["accuracy_pct"],
    }


class LinearFit:
    """A straight line through a few pairs, with its leave-one-out residuals.

    Attributes: `slope`, `offset`, `residuals` (N,): each pair's y minus what the other pairs say.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray):
        """Raises `TableError` for fewer than 4 pairs."""
        x = np.asarray(x, float)
        y = np.asarray(y, float)
        if len(x) < 4:
            raise TableError(f"a fit with an error bar needs at least 4 pairs, got {len(x)}")
        self.slope, self.offset = np.polyfit(x, y, 1)
        left_out = []
        for i in range(len(x)):
            line = np.polyfit(np.delete(x, i), np.delete(y, i), 1)
            left_out.append(y[i] - np.polyval(line, x[i]))
        self.residuals = np.array(left_out)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The line at `x`."""
        return self.slope * np.asarray(x) + self.offset


def predicted_against_rival(
    table_ms: np.ndarray, predicted_pct: np.ndarray, rival: pd.DataFrame, time: LinearFit,
    accuracy: LinearFit,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """`against_rival` for a predicted front: (value, low, high) of each number.

    `time` maps table sums to board time and `accuracy` predictions to measured accuracy. Low and
    high are the ends over all pairs of their leave-one-out residuals.
    """
    return _ends(_mapped(table_ms, predicted_pct, rival, time, accuracy))


def over_control(
    ours: pd.DataFrame, control: pd.DataFrame, rival: pd.DataFrame, time: LinearFit,
    accuracy: LinearFit,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """`predicted_against_rival` of one predicted front minus that of another, mapped by the same
    lines: what the search adds, without what the lines do to any front. Both have latency_ms (table
    sums) and accuracy_pct (predicted); both are off by the same pair of residuals at a time."""
    columns = ["latency_ms", "accuracy_pct"]
    sides = []
    for front in (ours, control):
        sides.append(_mapped(*front[columns].to_numpy().T, rival, time, accuracy))
    mine, base = sides
    pairs = zip(mine, base, strict=True)
    return _ends([{key: one[key] - other[key] for key in one} for one, other in pairs])


def _mapped(table_ms, predicted_pct, rival, time: LinearFit, accuracy: LinearFit) -> list[dict]:
    """`against_rival` as the lines say, and then for every pair of their residuals."""
    found = []
    for late_ms, more_pct in ((0.0, 0.0), *itertools.product(time.residuals, accuracy.residuals)):
        board_ms = time(table_ms) + late_ms
        measured_pct = accuracy(predicted_pct) + more_pct
        ours = pd.DataFrame({"latency_ms": board_ms, "accuracy_pct": measured_pct})
        found.append(against_rival(ours, rival, slack=0.0))
    return found


def _ends(numbers: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Of each number the first, and the lowest and highest of the others."""
    value, *others = numbers
    found = {}
    for key, middle in value.items():
        ends = [other[key] for other in others]
        found[key] = middle, min(ends), max(ends)
    return found
