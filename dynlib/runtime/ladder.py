"""The clocks of one frame alone on a unit whose clock changes quickly beside what its noise spans.

Most frames take about their mean time, few take much more: so a frame starts slower than the worst
case would need, and speeds up only as it turns out long.
"""

import math
from bisect import bisect_right
from itertools import pairwise

from dynlib.points import lower_hull
from dynlib.runtime.tables import Point

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
