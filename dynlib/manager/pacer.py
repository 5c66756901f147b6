"""The manager's lower level: the clock of one unit, frame by frame.

It looks ahead over the busy period that begins now: frames at hand and, of periodic apps, those to
come, in the order of non-preemptive earliest deadline first. The lowest clock that meets every
deadline with a margin for noise is the steady one; margins of independent frames add as squares. A
frame alone may run slower and be raised only if it turns out long, as most never do (after PACE:
Lorch and Smith, IEEE Transactions on Computers, 2004).
"""

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from dynlib.boards.board import Unit
    from dynlib.points import Point

MAX_FRAMES = 24  # of a busy period; what comes later is left to later decisions
SAFETY_MS = 0.1
CHECK = True
_SHORT = 3
_PARTS = 8  # equally likely lengths of a frame
_DRAWS = np.array([NormalDist().inv_cdf((i + 0.5) / _PARTS) for i in range(_PARTS)])
_DEADLINE = itemgetter(0)


class Work(NamedTuple):
    """A frame: when it has to be done; the shares of its expected work that are left typically and
    at worst; the share done; the standard deviation of its log noise."""

    deadline_ms: float
    typical: float
    worst: float
    point: "Point"
    done: float = 0.0
    sigma: float = 0.0


def in_order(work: Iterable[Work]) -> list[Work]:
    """What runs, then by deadline."""
    return sorted(work, key=lambda frame: (frame.done <= 0, frame.deadline_ms))


class Stream(NamedTuple):
    """Frames to come every `period_ms`; `frame` is one of them with a deadline of its own."""

    next_ms: float
    period_ms: float
    frame: Work

    def at(self, t_ms: float) -> Work:
        """The frame that comes then."""
        return self.frame._replace(deadline_ms=t_ms + self.frame.deadline_ms)


class Pace(NamedTuple):
    """A clock, and when to look again if the frame still runs then."""

    mhz: float
    again_ms: float = math.inf


class Pacer:
    """Chooses clocks of `unit`."""

    def __init__(self, unit: "Unit"):
        self.unit = unit
        self.index = {mhz: i for i, mhz in enumerate(unit.freqs)}
        self.switch_ms = unit.settle_ms + unit.stall_ms
        # After the last frame the clock stays until a lower one acts.
        rest_mw = unit.idle_mw(unit.min_mhz)
        self.tail_uj = np.array([(unit.idle_mw(f) - rest_mw) * unit.settle_ms for f in unit.freqs])

    def choose(
        self,
        now_ms: float,
        now_mhz: float | None,
        work: Sequence[Work],
        streams: Sequence[Stream],
        least_mhz: float,
        limit_mhz: float,
    ) -> Pace:
        """The clock for a busy period that starts at `now_ms` with `work[0]`.

        Args:
            now_mhz: the clock until a new one acts; None where it acts before `now_ms`.
            work: frames at hand, the first of them running or next, the others by deadline.
            least_mhz: no clock below this one.
        """
        top, low = self.index[limit_mhz], self.index[min(least_mhz, limit_mhz)]
        first, least = work[0], low
        if first.worst <= 0:
            return Pace(limit_mhz)  # overdue: something is slower than anybody knew
        while low < top and not (
            self.in_time(now_ms, now_mhz, work, streams, low, low, sure=False)
            and self.in_time(now_ms, now_mhz, work, streams, low, top)
        ):
            low += 1
        if first.done and now_mhz is not None:
            before = self.index[now_mhz]
            if low < before <= top and first.typical * first.point.latency_ms[before] < _SHORT * self.switch_ms:
                low = before  # nearly done: not worth a change to a lower clock
        end_ms = now_ms + first.worst * first.point.latency_ms[low]
        alone = len(work) == 1
        if alone and low > least and all(s.next_ms >= first.deadline_ms for s in streams):
            return self._alone(now_ms, now_mhz, first, least, low, top)
        # Should it still run when it ought to be done, it is overdue: the highest clock.
        overdue_ms = end_ms + self.unit.settle_ms + SAFETY_MS
        return Pace(self.unit.freqs[low], overdue_ms if low < top else math.inf)

    def in_time(
        self,
        now_ms: float,
        now_mhz: float | None,
        work: Sequence[Work],
        streams: Sequence[Stream],
        index: int,
        then: int,
        sure: bool = True,
    ) -> bool:
        """Whether all frames at hand, and those that come meanwhile, are in time, the first at one
        clock and the others at another: at worst, or typically."""
        t, variance = now_ms, 0.0
        ready, coming = list(work), [stream.next_ms for stream in streams]
        for n in range(MAX_FRAMES):
            if n and len(ready) > 1:
                ready.sort(key=_DEADLINE)
            frame = ready.pop(0)
            ms = frame.point.latency_ms[then if n else index]
            if n == 0 and now_mhz not in (self.unit.freqs[index], None):
                # Until the clock acts the frame runs as it does now.
                before_ms = frame.point.latency_ms[self.index[now_mhz]]
                gain = min(self.unit.settle_ms / before_ms, frame.worst)
                t += self.switch_ms - gain * ms
            t += max(frame.typical, 0.0) * ms
            if sure:
                spread_ms = (frame.worst - max(frame.typical, 0.0)) * ms
                variance += spread_ms * spread_ms
            late_ms = frame.deadline_ms - t
            if late_ms < 0 or variance > late_ms * late_ms:
                return False
            for i, stream in enumerate(streams):
                while coming[i] <= t:
                    ready.append(stream.at(coming[i]))
                    coming[i] += stream.period_ms
            if not ready:
                return True
        return True

    def _alone(self, now_ms: float, now_mhz, work: Work, least: int, low: int, top: int) -> Pace:
        """The clock that takes least energy on average, if a frame that is long is raised to a
        higher one, from the steady one on, at the last moment that saves it.

        At clock i all takes s ms, at the higher one f ms. If it is raised after x ms, the worst
        case w is done in time if x + settle + (w - (x + settle) / s) f <= window, so

            x = (window - settle - (w - settle / s) f) / (1 - f / s)
        """
        unit, settle_ms = self.unit, self.unit.settle_ms
        ms, mw = np.array(work.point.latency_ms), np.array(work.point.active_mw)
        clocks = np.arange(least, low + 1)
        possible = clocks < low
        late_ms = ahead = np.zeros(len(clocks))
        ahead_uj = 0.0
        if now_mhz is not None:  # what is asked for now acts later: until then it runs as it does
            before = self.index[now_mhz]
            other = clocks != before
            late_ms, ahead = other * self.switch_ms, other * (settle_ms / ms[before])
            ahead_uj = other * (settle_ms * mw[before])
            if work.done:
                possible &= ~other  # it is too late for a change to a slower one
        slow_ms, slow_mw = ms[clocks], mw[clocks]
        fast_ms, fast_mw = ms[low : top + 1, None], mw[low : top + 1, None]
        window_ms = work.deadline_ms - now_ms - late_ms - self.switch_ms - unit.stall_ms - SAFETY_MS
        with np.errstate(divide="ignore", invalid="ignore"):
            wait_ms = window_ms - (work.worst - ahead - settle_ms / slow_ms) * fast_ms
            wait_ms = np.where(fast_ms < slow_ms, wait_ms / (1 - fast_ms / slow_ms), -np.inf)
        wait_ms = np.where(possible & (wait_ms > settle_ms), wait_ms, -settle_ms)
        lengths = self._left(work)
        left = np.maximum(lengths[:, None, None] - ahead, 0.0)
        first_ms = np.minimum(left * slow_ms, wait_ms + settle_ms)
        rest_ms = (left - first_ms / slow_ms) * fast_ms
        tails_uj = self.tail_uj[low : top + 1, None], self.tail_uj[clocks]
        tail_uj = np.where(rest_ms > 1e-9, *tails_uj)
        uj = (first_ms * slow_mw + rest_ms * fast_mw + tail_uj).mean(axis=0) + ahead_uj
        uj = np.where(wait_ms > 0, uj, np.inf)
        uj[0, -1] = (left[:, 0, -1] * ms[low] * mw[low]).mean() + self.tail_uj[low]
        uj[0, -1] += 0.0 if now_mhz is None else ahead_uj[-1]
        then, i = divmod(int(uj.argmin()), len(clocks))
        again_ms = late_ms[i] + wait_ms[then, i]
        if i == len(clocks) - 1:  # the steady clock, which needs no raise
            again_ms = work.worst * ms[low] + settle_ms
        for length in lengths[_PARTS // 2 :] if not work.done else lengths:
            check_ms = length * slow_ms[i]
            if check_ms > 2 * settle_ms:
                again_ms = min(again_ms, check_ms)
                break
        return Pace(unit.freqs[least + i], now_ms + max(float(again_ms), SAFETY_MS))

    def _left(self, work: Work) -> np.ndarray:
        """Equally likely shares of work left of a frame that has got so far."""
        whole = (work.typical + work.done) * np.exp(work.sigma * _DRAWS)
        left = whole[whole > work.done] - work.done
        return left if len(left) else np.array([max(work.worst, 0.0) / 2])
