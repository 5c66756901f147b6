"""The points that a plan may choose from, as arrays over points and clocks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from dynlib.runtime.tables import Point


class Candidates(NamedTuple):
    """Points of one model on one unit, fastest first; arrays (points,) and (clocks, points).

    Args:
        beaten_pct: accuracy of the best point that beats this one in time and power at every clock
            and takes no more memory.
        margin: factor from the mean execution time to the one planned with.
        time_ms, energy_uj: of a frame at each clock.
        fastest_ms, cheapest_uj: for each point, the best that it and those after it do at each
            clock; lists, which are quicker to go through than arrays so short.
        least_margin: for each point, of it and those after it.
        largest_mb: the most memory that any point takes.
    """

    points: tuple[Point, ...]
    accuracy_pct: np.ndarray
    beaten_pct: np.ndarray
    memory_mb: np.ndarray
    margin: np.ndarray
    time_ms: np.ndarray
    energy_uj: np.ndarray
    fastest_ms: list[list[float]]
    cheapest_uj: list[list[float]]
    least_margin: list[float]
    largest_mb: float

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
        margins, energy_uj = np.array([margin(p) for p in points]), time_ms * power_mw
        best = (np.minimum.accumulate(a[::-1])[::-1].tolist()
                for a in (time_ms, energy_uj, margins))  # fmt: skip
        by_clock = (np.ascontiguousarray(array.T) for array in (time_ms, energy_uj))
        return cls(tuple(points), accuracy_pct, beaten_pct, memory_mb, margins, *by_clock, *best,
                   float(memory_mb.max()))  # fmt: skip

    def useful(self, floor_pct: float, share_mb: float, *, unbeaten: bool) -> np.ndarray:
        """Ascending indices of the points that meet a floor and fit into memory; with `unbeaten`,
        where energy alone counts, without those that another such point beats."""
        floor_pct -= 1e-9
        kept = self.accuracy_pct >= floor_pct
        if unbeaten:
            kept &= self.beaten_pct < floor_pct
        if share_mb < self.largest_mb:
            kept &= self.memory_mb <= share_mb
        return kept.nonzero()[0]
