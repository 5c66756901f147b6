"""How much slower a unit is than its table says, learnt frame by frame from measured times."""

import math
from typing import NamedTuple

_GAIN = 0.05  # of the filter when it has seen many frames
_STOPPED = 20.0  # so many times slower than the last frames: rather stopped than slowed down
_KEPT = 4  # frames elsewhere that an estimate from one measurement outlives on a unit left alone


class Slowdown(NamedTuple):
    """Measured over expected time on one unit: the estimate, its variance over that of one
    measurement, the one planned with, and the last measurement if it was too odd to count; frames
    that ended elsewhere since the last one here, and how often it was forgotten in vain."""

    mean: float = 1.0
    variance: float = 0.0
    used: float = 1.0
    odd: float | None = None
    away: int = 0
    forgotten: int = 0

    def measured(self, ratio: float, sigma: float, margin_sigma: float) -> "Slowdown":
        """After a frame that took `ratio` of its expected time, with `sigma` of log noise.

        Within 3.5 sigma of the estimate it corrects it; above, the estimate jumps at once; below,
        or `_STOPPED` times above (a suspended machine), when a second frame agrees. What is not
        known well is planned with more room, as `margin_sigma` standard deviations take it.
        """
        band = math.exp(3.5 * sigma * math.sqrt(1 + self.variance))
        mean, odd, forgotten = self.mean, None, 0
        if mean / band <= ratio <= mean * band:
            # A Kalman filter of a constant; its gain never falls below `_GAIN`.
            variance = max(self.variance / (self.variance + 1), _GAIN)
            mean += variance * (ratio - mean)
        else:
            forgotten, variance = self.forgotten, 1.0
            if mean < ratio <= mean * _STOPPED:
                mean = ratio
            elif self.odd is not None and (self.odd < mean) == (ratio < mean):
                mean = sorted((ratio, self.odd, mean))[1]  # of two that agree, the nearer one
            else:
                variance, odd = self.variance, ratio
        # In steps of half a percent, and not back by less than three of them.
        room = margin_sigma * sigma * (math.sqrt(1 + variance) - 1)
        step = math.ceil(round(mean * math.exp(room) / 0.005, 6)) * 0.005
        used = step if step > self.used or step < self.used - 0.015 else self.used
        return Slowdown(mean, variance, round(used, 6), odd, forgotten=forgotten)

    def unseen(self, frames: int) -> "Slowdown":
        """After so many frames that ended on other units.

        A unit that was left for its slowdown gets no frames that could tell whether it lasts. So
        the estimate is forgotten, the sooner the fewer frames it came from, and each time that
        proves wrong four times later.
        """
        if self.used == 1:
            return self
        away = self.away + frames
        if away * self.variance < _KEPT * 4**self.forgotten:
            return self._replace(away=away)
        return Slowdown(variance=1.0, forgotten=self.forgotten + 1)
