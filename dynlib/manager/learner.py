"""What the manager learns: how long frames really take, and how often they really come.

Of every app on every unit it keeps the last measured over expected times. Nobody announces a
competitor, and a table may be wrong about the noise, so tables are only what it starts from.
"""

import math
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

WINDOW = 200  # frames after which a slow one is forgotten
_FEW = 5  # frames whose median is the present speed
_SPREAD_FRAMES = 40  # that the spread is taken from
_PRIOR_FRAMES = 10  # that the spread of the table counts for
_LEAST_SIGMA = 0.005  # a table that knows of no noise at all is not believed
_FORGET_MS = 10_000.0


class Times(NamedTuple):
    """Execution times of one app on one unit, as shares of what the table expects.

    Args:
        ratios: measured over expected, the newest last.
        steps: between neighbours, as absolute logarithms over the standard deviation of the table.
        last_ms: when the newest was measured.
        patience: how many times longer than usual a slow speed is remembered of a unit left alone.
    """

    ratios: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    last_ms: float = -math.inf
    patience: int = 1

    def measured(self, ratio: float, sigma: float, now_ms: float) -> "Times":
        """After a frame that took `ratio` of what the table says, with `sigma` of log noise."""
        steps = self.steps
        if self.ratios:
            step = abs(math.log(ratio / self.ratios[-1])) / max(sigma, _LEAST_SIGMA)
            steps = (*steps, step)[-_SPREAD_FRAMES:]
        patience = 1 if self.typical < 1.05 else self.patience
        return Times((*self.ratios, ratio)[-WINDOW:], steps, now_ms, patience)

    def aged(self, now_ms: float) -> "Times":
        """Forget a slow speed that nothing has confirmed for long, later each time.

        A unit that was left for being slow has no frames that could tell whether it still is.
        """
        if self.typical < 1.05 or now_ms - self.last_ms < _FORGET_MS * self.patience:
            return self
        return Times(last_ms=now_ms, patience=2 * self.patience)

    @property
    def typical(self) -> float:
        """The present speed: the median of the last few, the table counting until there are."""
        few = self.ratios[-_FEW:]
        return median(few + (1.0,) * (_FEW - len(few)))

    @property
    def spread(self) -> float:
        """Standard deviation of the log noise over that of the table.

        The median of the steps between neighbours, so that neither a change of speed nor a single
        odd frame counts: for normal noise it is 0.954 standard deviations.
        """
        if not self.steps:
            return 1.0
        seen = len(self.steps)
        return (_PRIOR_FRAMES + seen * median(self.steps) / 0.954) / (_PRIOR_FRAMES + seen)

    @property
    def peak(self) -> float:
        """The slowest of the last frames but one: a single odd frame is nothing to plan for."""
        return sorted(self.ratios)[-2] if len(self.ratios) > 1 else 1.0

    @property
    def recent(self) -> float:
        """The slowest of the very last frames."""
        return max(self.ratios[-_FEW:], default=1.0)


class Gaps(NamedTuple):
    """When the last frames of an app came, in ms."""

    times: tuple[float, ...] = ()

    def seen(self, times: Iterable[float]) -> "Gaps":
        """With what has come since."""
        last_ms = self.times[-1] if self.times else -math.inf
        new = sorted({t_ms for t_ms in times if t_ms > last_ms})
        return Gaps((*self.times, *new)[-64:]) if new else self

    def period_ms(self, said_ms: float) -> float:
        """Of an app that says it comes every `said_ms`: what three gaps in a row agree on, if that
        is something else."""
        if len(self.times) < 4:
            return said_ms
        a, b, c, d = self.times[-4:]
        gaps = b - a, c - b, d - c
        mean_ms = (d - a) / 3
        steady = max(gaps) - min(gaps) < 0.02 * mean_ms
        return mean_ms if steady and abs(mean_ms - said_ms) > 0.02 * said_ms else said_ms

    def least_ms(self, said_ms: float) -> float:
        """Of an app whose frames come at random: the mean gap where they came closest, eight in a
        row, or `said_ms` if that is less."""
        starts, ends = self.times[:-8], self.times[8:]
        gaps = [(end - start) / 8 for start, end in zip(starts, ends, strict=True)]
        return min(gaps, default=said_ms) if gaps and min(gaps) < said_ms else said_ms
