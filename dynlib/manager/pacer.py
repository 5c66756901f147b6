"""The manager's lower level: the clock of one unit, frame by frame.

It looks ahead over the busy period that begins now: frames at hand and, of periodic apps, those to
come, in the order of non-preemptive earliest deadline first. The steady clock is the lowest at
which all are typically in time, and at which the first may be as long as it gets if the others then
run at the highest. A frame alone may run slower and be raised if it turns out long, as most never
do (after PACE: Lorch and Smith, IEEE Transactions on Computers, 2004).
"""

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dynlib.boards.board import Unit
    from dynlib.points import Point

MAX_FRAMES = 24  # looked ahead in a busy period, or all that are there if those are more
SAFETY_MS = 0.1
_DRAWS = [NormalDist().inv_cdf((i + 0.5) / 6) for i in range(6)]  # equally likely lengths
_DUE = itemgetter(0)


class Work(NamedTuple):
    """A frame: when it has to be done; the shares of its expected work that are left typically and
    at worst; the share done; the standard deviation of its log noise."""

    deadline_ms: float
    typical: float
    worst: float
    point: "Point"
    done: float = 0.0
    sigma: float = 0.0

    def lengths(self) -> list[float]:
        """Equally likely shares of work left."""
        whole = [(self.typical + self.done) * math.exp(self.sigma * z) for z in _DRAWS]
        left = [share - self.done for share in whole if share > self.done]
        return left or [max(self.worst, 0.0) / 2]


class Stream(NamedTuple):
    """Frames to come every `period_ms`; `frame` is one of them with a deadline of its own."""

    next_ms: float
    period_ms: float
    frame: Work

    def at(self, t_ms: float) -> Work:
        """The frame that comes then."""
        return self.frame._replace(deadline_ms=self.due_ms(t_ms))

    def due_ms(self, t_ms: float) -> float:
        """When the frame that comes then has to be done."""
        return t_ms + self.frame.deadline_ms


class Pace(NamedTuple):
    """A clock, and when to look again if the frame still runs then."""

    mhz: float
    again_ms: float = math.inf


def in_order(work: Iterable[Work]) -> list[Work]:
    """What runs, then by deadline."""
    return sorted(work, key=lambda frame: (frame.done <= 0, frame.deadline_ms))


class Pacer:
    """Chooses clocks of `unit`."""

    def __init__(self, unit: "Unit"):
        self.unit = unit
        self.index = {mhz: i for i, mhz in enumerate(unit.freqs)}
        self.switch_ms = unit.settle_ms + unit.stall_ms

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
            left_ms = first.typical * first.point.latency_ms[before]
            if low < before <= top and left_ms < 3 * self.switch_ms:
                low = before  # nearly done: not worth a change to a lower clock
        alone = len(work) == 1 and all(s.next_ms >= first.deadline_ms for s in streams)
        if alone and low > least:
            return self._alone(now_ms, now_mhz, first, least, low, top)
        # Should it still run when it ought to be done, it is overdue: the highest clock.
        longest_ms = first.worst * first.point.latency_ms[low] + self.unit.settle_ms
        return Pace(self.unit.freqs[low], now_ms + longest_ms if low < top else math.inf)

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
        clock and the others at another: at worst, or typically. Margins of frames add as squares.
        """
        t, variance = now_ms, 0.0
        ready = [(frame.deadline_ms, frame) for frame in work]
        coming = [stream.next_ms for stream in streams]
        for n in range(max(MAX_FRAMES, len(work))):
            if n and len(ready) > 1:
                ready.sort(key=_DUE)
            due_ms, frame = ready.pop(0)
            ms, typical = frame.point.latency_ms[then if n else index], max(frame.typical, 0.0)
            if n == 0 and now_mhz not in (self.unit.freqs[index], None):
                # Until the clock acts the frame runs as it does now.
                before_ms = frame.point.latency_ms[self.index[now_mhz]]
                t += self.switch_ms - min(self.unit.settle_ms / before_ms, frame.worst) * ms
            t += typical * ms
            if sure:
                variance += ((frame.worst - typical) * ms) ** 2
            late_ms = due_ms - t
            if late_ms < 0 or variance > late_ms * late_ms:
                return False
            while coming and (next_ms := min(coming)) <= t:
                i = coming.index(next_ms)
                ready.append((streams[i].due_ms(next_ms), streams[i].frame))
                coming[i] += streams[i].period_ms
            if not ready:
                break
        return True

    def _alone(self, now_ms: float, now_mhz, work: Work, least: int, low: int, top: int) -> Pace:
        """The clock that takes least energy on average: the steady one `low`, or a lower one if a
        frame that is long is raised to `low` or the highest at the last moment that saves it.

        At clock i all takes s ms, at the higher one f ms. If it is raised after x ms, the worst
        case w is done in time if x + settle + (w - (x + settle) / s) f <= window, so

            x = (window - settle - (w - settle / s) f) / (1 - f / s)
        """
        ms, mw, settle_ms = work.point.latency_ms, work.point.active_mw, self.unit.settle_ms
        lengths = work.lengths()
        mean = sum(lengths) / len(lengths)
        best_uj, best = mean * ms[low] * mw[low], low
        again_ms = work.worst * ms[low] + settle_ms
        window_ms = work.deadline_ms - now_ms - self.switch_ms - self.unit.stall_ms - SAFETY_MS
        for i in range(least, low):
            late_ms = 0.0  # until it acts
            if now_mhz not in (None, self.unit.freqs[i]):
                if work.done:
                    continue  # it is too late for a change to a slower one
                late_ms = self.switch_ms
            for then in {low, top}:
                need_ms = (work.worst - settle_ms / ms[i]) * ms[then]
                wait_ms = (window_ms - late_ms - need_ms) / (1 - ms[then] / ms[i])
                if wait_ms <= settle_ms:
                    continue
                uj = 0.0
                for left in lengths:
                    first_ms = min(left * ms[i], wait_ms + settle_ms)
                    rest_ms = (left - first_ms / ms[i]) * ms[then]
                    uj += first_ms * mw[i] + rest_ms * mw[then]
                if uj / len(lengths) < best_uj:
                    best_uj, best, again_ms = uj / len(lengths), i, late_ms + wait_ms
        # Look again whenever it has become clear that it is none of the shorter ones.
        later = lengths if work.done else lengths[len(lengths) // 2 :]
        checks = [left * ms[best] for left in later if left * ms[best] > 2 * settle_ms]
        return Pace(self.unit.freqs[best], now_ms + max(min([again_ms, *checks]), SAFETY_MS))
