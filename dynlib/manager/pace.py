"""The manager's lower level: the clock of one unit, frame by frame.

It looks ahead over the busy period that begins now: frames at hand and, of periodic apps, those to
come, in the order of non-preemptive earliest deadline first. The lowest clock that meets every
deadline with a margin for noise is the steady one; margins of independent frames add as squares. A
frame alone may start slower and speed up only if it turns out long, as most never do (after PACE:
Lorch and Smith, IEEE Transactions on Computers, 2004): by a `Ladder` of clocks where there is time
for one, else once.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from dynlib.pareto import lower_hull
from dynlib.points import Point

if TYPE_CHECKING:
    from dynlib.boards.board import Unit

MAX_FRAMES = 24  # of a busy period; what comes later is left to later decisions
_SAFETY_MS = 0.1
_MANY = 10  # so many settling times must the noise span for a ladder of clocks
_SLOWER = 2  # clocks below the steady one that are worth a try
# Gauss-Hermite nodes and weights of a normal noise whose margin is 2.6 standard deviations.
_QUANTILES = ((-1.099, 0.0113), (-0.521, 0.2221), (0.0, 0.5333), (0.521, 0.2221), (1.099, 0.0113))
_DEADLINE = itemgetter(0)


_PARTS = 20  # of the work that only some frames have, each with a clock of its own
NEARLY_ALL = -2.3  # standard deviations: what a frame takes at least, nearly always


class Ladder:
    """The clock for every share of a frame's work that takes least energy on average while the
    worst case is in time (PACE: Lorch and Smith, IEEE Transactions on Computers, 2004).

    With S(x) the probability that the frame takes more than the share x of its mean work,

        min over f(x) of  int S(x) uJ(f(x)) dx  s.t.  int ms(f(x)) dx <= window.

    The work is cut into parts, which all start at the slowest clock. Rungs, each a faster clock for
    one part, are taken in the order of what they cost per ms gained, S duJ / dms, until the rest
    fits the window, the last one for the end of its part alone. That order is the same for every
    window, and whatever is done already.

    Args:
        worst: share that the longest frame in question takes.
        least, top: lowest and highest clock, as indices.
    """

    def __init__(self, point: Point, worst: float, least: int, top: int):
        ms, mw = point.latency_ms, point.active_mw
        corners = lower_hull((ms[i], ms[i] * mw[i]) for i in range(least, top + 1))[::-1]
        self.ms = [corner[0] for corner in corners]
        self.clocks = [ms.index(one) for one in self.ms]
        dear = [(u - v) / (s - t) for (s, v), (t, u) in pairwise(corners)]
        sigma, self.edges, longer = point.sigma, [0.0, worst], [1.0]
        if sigma and math.log(worst) > sigma * (NEARLY_ALL - sigma / 2):
            last = math.log(worst) / sigma + sigma / 2
            z = [NEARLY_ALL + (last - NEARLY_ALL) * i / _PARTS for i in range(_PARTS + 1)]
            self.edges = [0.0, *map(point.noise, z[:-1]), worst]
            longer += [math.erfc((a + b) / math.sqrt(8)) / 2 for a, b in pairwise(z)]
        rungs = sorted((s * d, -i, j) for i, s in enumerate(longer) for j, d in enumerate(dear))
        self.parts = [-i for _, i, _ in rungs]
        self.known: dict[int, tuple] = {}

    def stages(self, window_ms: float, done: float, stall_ms: float) -> list[tuple[int, float]]:
        """[(index of a clock, share up to which it is the best one)] once `done`; empty: too late.

        Args:
            window_ms: time left, at the speed of the table.
            stall_ms: what each change of the clock takes.
        """
        now = min(bisect_right(self.edges, done + 1e-9), len(self.edges) - 1) - 1

        def left(rungs: int) -> tuple[float, int]:
            level, later_ms, changes = self.known.get(rungs) or self._taken(rungs)
            part_ms = (self.edges[now + 1] - done) * self.ms[level[now]]
            return part_ms + later_ms[now], changes[now]

        def fits(rungs: int) -> bool:
            ms, changes = left(rungs)
            return ms + changes * stall_ms <= window_ms

        low, high = -1, len(self.parts)
        if not fits(high):
            return []
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        level, split, part = self._taken(high)[0], math.inf, -1
        if low >= 0:  # the last rung for no more of its part than is needed, one change more
            part, slow_ms, (fast_ms, changes) = self.parts[low], left(low)[0], left(high)
            share = (slow_ms + (changes + 1) * stall_ms - window_ms) / (slow_ms - fast_ms)
            begin, end = max(self.edges[part], done), self.edges[part + 1]
            split = end - min(share, 1.0) * (end - begin)
        stages: list[tuple[int, float]] = []
        for i in range(now, len(level)):
            ends = [(level[i], self.edges[i + 1])]
            if i == part and split > max(self.edges[i], done):
                ends.insert(0, (level[i] - 1, split))
            for one, until in ends:
                if stages and stages[-1][0] == self.clocks[one]:
                    stages.pop()
                stages.append((self.clocks[one], until))
        return stages

    def _taken(self, rungs: int) -> tuple[list[int], list[float], list[int]]:
        """The level of every part, and ms and changes of the clock after it, with `rungs` taken."""
        if rungs not in self.known:
            level, size = [0] * (len(self.edges) - 1), len(self.edges) - 1
            for part in self.parts[:rungs]:
                level[part] += 1
            later_ms, changes = [0.0] * size, [0] * size
            for i in range(size - 2, -1, -1):
                width = self.edges[i + 2] - self.edges[i + 1]
                later_ms[i] = later_ms[i + 1] + width * self.ms[level[i + 1]]
                changes[i] = changes[i + 1] + (level[i] != level[i + 1])
            self.known[rungs] = level, later_ms, changes
        return self.known[rungs]


class Work(NamedTuple):
    """A frame: when it has to be done, the shares of its mean work left on average and at worst,
    and the share done."""

    deadline_ms: float
    mean: float
    worst: float
    point: Point
    done: float = 0.0


class Stream(NamedTuple):
    """Frames to come every `period_ms`."""

    next_ms: float
    period_ms: float
    deadline_ms: float
    margin: float
    point: Point


class Pace(NamedTuple):
    """A clock, and when to look again if the frame still runs then."""

    mhz: float
    again_ms: float


class Pacer:
    """Chooses clocks of `unit`."""

    def __init__(self, unit: "Unit"):
        self.unit = unit
        self.ladder = lru_cache(maxsize=1024)(Ladder)
        self.accelerating = lru_cache(maxsize=4096)(self._accelerating)
        self.index = {mhz: i for i, mhz in enumerate(unit.freqs)}
        # After the last frame the clock stays until a lower one acts.
        rest_mw = unit.idle_mw(unit.min_mhz)
        self.tail_uj = [(unit.idle_mw(f) - rest_mw) * unit.settle_ms for f in unit.freqs]

    def choose(
        self,
        now_ms: float,
        now_mhz: float | None,
        work: Sequence[Work],
        streams: Sequence[Stream],
        running: bool,
        least_mhz: float,
        limit_mhz: float,
        slow: float,
    ) -> Pace:
        """The clock for a busy period that starts at `now_ms` with `work[0]`.

        Args:
            now_mhz: the clock until a new one acts; None where it acts before `now_ms`.
            work: frames at hand, the first of them running or next.
            running: whether it does run.
            least_mhz: no clock below this one (for frames that cannot be foreseen).
            slow: measured over expected execution time.
        """
        top = self.index[limit_mhz]
        if work[0].worst <= 0:
            return Pace(limit_mhz, math.inf)  # overdue: something is slower than anybody knew
        low = least = self.index[min(least_mhz, limit_mhz)]
        while low < top:
            # A quick look at the frames at hand: whether they would do without any margin.
            t = now_ms
            for deadline_ms, mean, _, point, _ in work:
                t += mean * point.latency_ms[low] * slow
                if t > deadline_ms:
                    break
            else:
                if self._in_time(now_ms, now_mhz, work, streams, low, slow):
                    break
            low += 1
        steady, first = self.unit.freqs[low], work[0]
        end_ms = now_ms + first.worst * first.point.latency_ms[low] * slow
        alone = len(work) == 1 and all(s.next_ms >= min(end_ms, first.deadline_ms) for s in streams)
        if alone and low > least:
            spread_ms = (first.worst + first.done - first.point.noise(NEARLY_ALL)) * slow
            if spread_ms * first.point.latency_ms[top] > _MANY * self.unit.settle_ms:
                mhz = now_mhz if running else None
                pace = self._rung(now_ms, mhz, first, least, top, slow)
                if pace is not None:
                    return pace
            # In steps of 0.1 ms, so that frames alike share one calculation.
            window_ms = math.floor(10 * (first.deadline_ms - now_ms)) / 10
            slower = self.accelerating(
                window_ms,
                now_mhz if running else None,
                first.mean,
                first.worst,
                first.point,
                least,
                low,
                top,
                slow,
            )
            if slower is not None:
                return Pace(slower[0], now_ms + slower[1])
        # Should it still run when it ought to be done, it is overdue: the highest clock.
        overdue_ms = end_ms + self.unit.settle_ms + _SAFETY_MS if running else math.inf
        return Pace(steady, overdue_ms if low < top else math.inf)

    def _in_time(self, now_ms, now_mhz, work, streams, index, slow) -> bool:
        t, variance = now_ms, 0.0
        ready, coming = list(work), [s.next_ms for s in streams]
        for n in range(MAX_FRAMES):
            if n and len(ready) > 1:
                ready.sort(key=_DEADLINE)
            deadline_ms, mean, worst, point, _ = ready.pop(0)
            ms = point.latency_ms[index] * slow
            if n == 0 and now_mhz not in (self.unit.freqs[index], None):
                # Until the clock acts the frame runs as it does now.
                before_ms = point.latency_ms[self.index[now_mhz]] * slow
                gain = min(self.unit.settle_ms / before_ms, worst)
                t += self.unit.settle_ms + self.unit.stall_ms - gain * ms
            t += mean * ms
            spread_ms = (worst - mean) * ms
            variance += spread_ms * spread_ms
            late_ms = deadline_ms - t
            if late_ms < 0 or variance > late_ms * late_ms:
                return False
            for i, s in enumerate(streams):
                while coming[i] <= t:
                    ready.append(Work(coming[i] + s.deadline_ms, 1.0, s.margin, s.point))
                    coming[i] += s.period_ms
            if not ready:
                return True
        return True

    def _rung(self, now_ms, now_mhz, work: Work, least: int, top: int, slow: float) -> Pace | None:
        """As the ladder has it, for a frame alone (`now_mhz`: it runs); None: too late for it."""
        unit, ms, done = self.unit, work.point.latency_ms, work.done
        left_ms, asked_ms = work.deadline_ms - now_ms - _SAFETY_MS, unit.settle_ms
        if now_mhz is not None:  # what is asked for now acts later
            done += unit.settle_ms / (ms[self.index[now_mhz]] * slow)
            left_ms, asked_ms = left_ms - unit.settle_ms, 0.0
        ladder = self.ladder(work.point, round(work.worst + work.done, 9), least, top)
        stages = ladder.stages(left_ms / slow, done, unit.stall_ms / slow)
        for index, until in stages:
            stage_ms = (until - done) * ms[index] * slow
            if stage_ms > unit.settle_ms or until == stages[-1][1]:
                # The others are over before the next clock could act.
                return Pace(unit.freqs[index], now_ms + max(stage_ms - asked_ms, _SAFETY_MS))
        return None

    def _accelerating(
        self, window_ms, now_mhz, mean, worst, point, least: int, low: int, top: int, slow: float
    ):
        """(clock from `least` up to below the steady one `low`, when to ask for a higher one); None
        where none is expected to take less energy. `now_mhz`: of a frame that runs, its clock."""
        unit, work = self.unit, Work(0.0, mean, worst, point)
        best, best_uj = None, self._cost_uj(work, low, low, math.inf, slow)
        for index in range(max(low - _SLOWER, least), low):
            if now_mhz not in (None, unit.freqs[index]):
                continue
            ms = point.latency_ms[index] * slow
            for then in {low, top}:
                # The latest time at which the worst case still ends in time at the higher clock.
                fast_ms = point.latency_ms[then] * slow
                left_ms = window_ms - unit.settle_ms - unit.stall_ms - _SAFETY_MS
                gain = left_ms / fast_ms + unit.settle_ms / ms - work.worst
                wait_ms = gain / (1 / fast_ms - 1 / ms)
                if wait_ms > _SAFETY_MS:
                    uj = self._cost_uj(work, index, then, wait_ms + unit.settle_ms, slow)
                    if uj < best_uj:
                        best, best_uj = (unit.freqs[index], wait_ms), uj
        return best

    def _cost_uj(self, work: Work, index: int, then: int, until_ms: float, slow: float) -> float:
        """Expected energy above idle with the clock `index` for `until_ms`, then with `then`."""
        point, total = work.point, 0.0
        for quantile, weight in _QUANTILES:
            left = max(work.mean + quantile * (work.worst - work.mean), 0.0)
            ms = left * point.latency_ms[index] * slow
            first_ms = min(ms, until_ms)
            rest_ms = (1 - first_ms / ms) * left * point.latency_ms[then] * slow if ms else 0.0
            tail_uj = self.tail_uj[then if rest_ms else index]
            total += weight * (
                tail_uj + point.active_mw[index] * first_ms + point.active_mw[then] * rest_ms
            )
        return total
