"""Fronts: which points no other point beats, and how much a front covers."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd


def pareto_mask(values: np.ndarray) -> np.ndarray:
    """Which rows of `values` (points, objectives), all minimised, no other row dominates.

    Of several equal rows the first is kept. Rows with NaN never belong.
    """
    values = np.asarray(values, dtype=float)
    keep = np.zeros(len(values), dtype=bool)
    front = np.empty((0, values.shape[1]))
    # In lexicographic order nobody is dominated by a later row, so one growing front is enough.
    order = np.lexsort(values.T[::-1])
    for i in order:
        row = values[i]
        is_beaten = (front <= row).all(axis=1).any()
        if is_beaten or np.isnan(row).any():
            continue
        keep[i] = True
        front = np.vstack([front, row])
    return keep


def pareto_front(table: pd.DataFrame, minimise: Sequence[str], maximise: Sequence[str] = ()):
    """The rows of `table` that no other row dominates, sorted by the first column.

    >>> import pandas as pd
    >>> points = pd.DataFrame({"latency_ms": [10, 20, 30, 40], "accuracy_pct": [70, 68, 80, 80]})
    >>> pareto_front(points, ["latency_ms"], ["accuracy_pct"]).values.tolist()
    [[10, 70], [30, 80]]
    """
    columns = [*minimise, *maximise]
    signs = np.array([1.0] * len(minimise) + [-1.0] * len(maximise))
    values = table[columns].to_numpy(float) * signs
    front = table[pareto_mask(values)]
    return front.sort_values(columns[0]).reset_index(drop=True)


def lower_hull(corners: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lower left hull: nothing takes less energy in no more time."""
    hull: list[tuple[float, float]] = []
    for corner in sorted(corners):
        if hull and corner[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and not _is_below(hull[-1], hull[-2], corner):
            hull.pop()
        hull.append(corner)
    return hull


def _is_below(middle: tuple, left: tuple, right: tuple) -> bool:
    """Whether `middle` lies below the line from `left` to `right`."""
    run = middle[0] - left[0]
    rise = middle[1] - left[1]
    whole_run = right[0] - left[0]
    whole_rise = right[1] - left[1]
    return rise * whole_run < whole_rise * run


def hypervolume(values: np.ndarray, reference: Sequence[float]) -> float:
    """Area that the points (n, 2), both objectives minimised, dominate below `reference`."""
    values = np.asarray(values, dtype=float)
    reference = np.asarray(reference, dtype=float)
    inside = values[(values < reference).all(axis=1)]
    front = inside[pareto_mask(inside)]
    ascending = np.argsort(front[:, 0])
    front = front[ascending]
    # One strip a point, from it to its right neighbour, up to the reference.
    right = np.append(front[1:, 0], reference[0])
    width = right - front[:, 0]
    height = reference[1] - front[:, 1]
    return float((width * height).sum())
