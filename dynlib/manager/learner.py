"""What the manager learns: how long frames really take, and how often they really come.

Of every app on every unit it keeps the last measured over expected times. Nobody announces a
competitor, and a table may be wrong about the noise, so tables are only what it starts from.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import NamedTuple

_WINDOW = 200  # frames after which a shock is forgotten
_FEW = 5  # frames whose median is the speed after a change
_MANY = 40  # frames whose median it is while nothing changes
_OWN, _OWN_MS = 100, 30_000.0  # frames of one sub-network, and how long they count
_AGREE = 1.5  # standard deviations between the two: three standard errors of the first
_PRIOR = 10  # frames that the spread of the table counts for
_LEAST_SIGMA = 0.005  # a table that knows of no noise at all is not believed
SLOW = 1.05  # times the table: slow enough to leave a unit
_FORGET_MS, _CALM_MS = 10_000.0, 2000.0
_ARRIVALS = 17  # that are remembered
_SAME = 0.02  # periods that differ by no larger share are the same


class Own(NamedTuple):
    """Execution times of one sub-network, as shares of what the table expects."""

    subnet: str
    last_ms: float
    ratios: tuple[float, ...] = ()

    def longest(self, target: float) -> float:
        """A ratio that so many frames exceed only if more than `target` of all do; 0: too few.

        Example: at 2 % the largest of 5 may be chance, and so may the two largest of 40.
        """
        late = len(self.ratios) * target
        late = math.ceil(late + math.sqrt(late))
        return sorted(self.ratios)[-1 - late] if len(self.ratios) >= max(_FEW, late) else 0.0


class Times(NamedTuple):
    """Execution times of one app on one unit, as shares of what the table expects.

    Args:
        ratios: measured over expected, the newest last.
        steps: between neighbours, as absolute logarithms over the standard deviation of the table.
        frames: how many there were.
        last_ms: when the newest was measured.
        shocks: (frame, ratio) of frames that came out longer than the margin, without warning.
        shocked: whether the newest did.
        patience: how many times longer than usual a slow speed is remembered of a unit left alone.
        typical: the present speed.
        spread: standard deviation of the log noise over that of the table.
        peak: what a shock may bring, if they keep coming; 1 if not.
        worst: the longest to be ready for just now.
        prior: the speed that is expected before anything is measured.
        own: the same of each sub-network, where it was asked for.
    """

    ratios: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    frames: int = 0
    last_ms: float = -math.inf
    shocks: tuple[tuple[int, float], ...] = ()
    shocked: bool = False
    patience: int = 1
    typical: float = 1.0
    spread: float = 1.0
    peak: float = 1.0
    worst: float = 1.0
    prior: float = 1.0
    own: tuple[Own, ...] = ()

    @classmethod
    def expected(cls, prior: float) -> "Times":
        """Before anything is measured."""
        return cls(typical=prior, worst=prior, prior=prior)

    def measured(
        self, ratio: float, sigma: float, now_ms: float, z: float, subnet: str = ""
    ) -> "Times":
        """After a frame of a sub-network that took `ratio` of what the table says, with `sigma` of
        log noise; `z`: the margin, in standard deviations."""
        sigma, steps = max(sigma, _LEAST_SIGMA), self.steps
        if self.ratios:
            steps = (*steps, abs(math.log(ratio / self.ratios[-1])) / sigma)[-_MANY:]
        # The median of the steps, so that neither a change of speed nor a single odd frame counts:
        # for normal noise it is 0.954 standard deviations.
        known = len(steps)
        spread = (_PRIOR + known * median(steps or (1.0,)) / 0.954) / (_PRIOR + known)
        # A few frames say little, and never that there is less noise than the table says.
        spread = max(spread, 1.0) if known >= _FEW else 1.0
        ratios = (*self.ratios, ratio)[-_MANY:]
        few = ratios[-_FEW:]
        # The table counts until there are a few; what was slow before is so after one frame again.
        expected = self.prior if self.patience == 1 else ratio
        typical = median(few + (expected,) * (_FEW - len(few)))
        if len(ratios) > 1 and max(ratios[-2:]) < typical:  # two that agree that it is over
            typical = max(ratios[-2:])
        steady = median(ratios)
        agree = abs(math.log(typical / steady)) < _AGREE * spread * sigma
        if agree and len(ratios) >= _FEW:
            typical = steady
        shocked = ratio > self.typical * math.exp((z + 1) * self.spread * sigma)
        shocks = tuple([shock for shock in self.shocks if shock[0] > self.frames - _WINDOW])
        if shocked and self.shocked and shocks:  # the same one goes on
            *shocks, (frame, before) = shocks
            shocks = (*shocks, (frame, max(before, ratio)))
        elif shocked:
            shocks = (*shocks, (self.frames, ratio))
        # One may be chance; of several, the largest but one is to be reckoned with.
        peak = sorted([size for _, size in shocks])[-2] if len(shocks) > 1 else 1.0
        # One that somebody came upon in its middle shows half of what there is to come.
        worst = 2 * ratio - self.typical if shocked else max(few)
        return Times(
            ratios,
            steps,
            self.frames + 1,
            now_ms,
            shocks,
            shocked,
            1 if typical < SLOW and len(ratios) > _FEW else self.patience,
            typical,
            spread,
            peak,
            worst,
            self.prior,
            self._own(subnet, ratio, now_ms) if subnet else (),
        )

    def _own(self, subnet: str, ratio: float, now_ms: float) -> tuple[Own, ...]:
        # One that is not served any more is given another chance some time.
        own = {each.subnet: each for each in self.own if now_ms < each.last_ms + _OWN_MS}
        before = own[subnet].ratios if subnet in own else ()
        own[subnet] = Own(subnet, now_ms, (*before, ratio)[-_OWN:])
        return tuple(own.values())

    def aged(self, now_ms: float, calm: bool = False) -> "Times":
        """Forget a slow speed that nothing has confirmed for long, sooner where others run at
        theirs (`calm`), and later each time.

        A unit that was left for being slow has no frames that could tell whether it still is.
        """
        kept_ms = (_CALM_MS if calm else _FORGET_MS) * self.patience
        if self.typical < SLOW or now_ms - self.last_ms < kept_ms:
            return self
        return Times.expected(self.prior)._replace(last_ms=now_ms, patience=2 * self.patience)


class Gaps(NamedTuple):
    """When the last frames of an app came, in ms, since it has said that it comes every `said_ms`.

    What it says is not believed if it does otherwise: `period_ms` is what the last three gaps agree
    on, else the mean of the last sixteen if that is less.
    """

    said_ms: float
    times: tuple[float, ...] = ()
    period_ms: float = math.nan

    def seen(self, said_ms: float, times: Iterable[float]) -> "Gaps":
        """With what has come since."""
        before = self.times if said_ms == self.said_ms else self.times[-1:]
        last_ms = before[-1] if before else -math.inf
        new = sorted({t_ms for t_ms in times if t_ms > last_ms})
        if before is self.times and not new and not math.isnan(self.period_ms):
            return self
        times = (*before, *new)[-_ARRIVALS:]
        period_ms = said_ms
        if len(times) == _ARRIVALS:
            period_ms = min((times[-1] - times[0]) / (_ARRIVALS - 1), said_ms)
        gaps = [b - a for a, b in pairwise(times[-4:])]
        if len(gaps) == 3 and max(gaps) - min(gaps) < _SAME * min(gaps):
            mean_ms = sum(gaps) / 3
            period_ms = said_ms if abs(mean_ms - said_ms) < _SAME * said_ms else mean_ms
        return Gaps(said_ms, times, period_ms)
