"""The points that a plan may choose from, as arrays over points and clocks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from dynlib.runtime.tables import Point


class Candidates(NamedTuple):
    """Points of one model on one unit, fastest first; arrays (points,) and (points, clocks).

    Args:
        beaten_pct: accuracy of the best point that beats this one in time and power at every clock
            and takes no more memory.
        margin: factor from the mean execution time to the one planned with.
        time_ms, energy_uj: of a frame at each clock.
        fastest_ms, cheapest_uj: the best of any point at each clock.
        least_margin: of any point.
    """

    points: tuple[Point, ...]
    accuracy_pct: np.ndarray
    beaten_pct: np.ndarray
    memory_mb: np.ndarray
    margin: np.ndarray
    time_ms: np.ndarray
    energy_uj: np.ndarray
    fastest_ms: np.ndarray | None = None
    cheapest_uj: np.ndarray | None = None
    least_margin: float = 1.0

    @classmethod
    def of(cls, points: Iterable[Point], margin: Callable[[Point], float]) -> "Candidates":
        """All `points`, with the margin that `margin` gives each."""
        points = sorted(points, key=lambda p: (p.latency_ms[-1], -p.accuracy_val_pct))
        columns = ("accuracy_val_pct", "memory_mb", "latency_ms", "active_mw")
        arrays = (np.array([getattr(p, name) for p in points]) for name in columns)
        accuracy_pct, memory_mb, time_ms, power_mw = arrays
        costs = np.column_stack([time_ms, power_mw, memory_mb])
        beats = (costs[:, None] <= costs).all(axis=2)  # rows beat columns
        beats = np.triu(beats, 1)  # a faster one comes first; so does the first of equals
        beaten_pct = np.where(beats, accuracy_pct[:, None], -np.inf).max(axis=0)
        margins = np.array([margin(p) for p in points])
        return cls(tuple(points), accuracy_pct, beaten_pct, memory_mb, margins, time_ms,
                   time_ms * power_mw)  # fmt: skip

    def useful(self, floor_pct: float, share_mb: float, *, unbeaten: bool) -> "Candidates":
        """Points that meet a floor and fit into memory; with `unbeaten`, where energy alone
        counts, without those that another such point beats."""
        floor_pct -= 1e-9
        kept = (self.accuracy_pct >= floor_pct) & (self.memory_mb <= share_mb)
        if unbeaten:
            kept &= self.beaten_pct < floor_pct
        return self.take(kept.nonzero()[0])

    def take(self, kept: np.ndarray) -> "Candidates":
        """Those at the ascending indices `kept`, with the best of each clock."""
        if not len(kept):
            return Candidates((), *(array[:0] for array in self[1:7]))
        part = slice(kept[0], kept[-1] + 1)
        if part.stop - part.start == len(kept):  # neighbours need no copy
            points, arrays = self.points[part], [array[part] for array in self[1:7]]
        else:
            points = tuple([self.points[i] for i in kept])
            arrays = [array.take(kept, 0) for array in self[1:7]]
        best = [np.minimum.reduce(array) for array in (*arrays[4:], arrays[3])]
        return Candidates(points, *arrays, *best)
