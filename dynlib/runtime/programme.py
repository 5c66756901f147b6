"""The programme of the optimum: the least energy for frames with windows and floors, by HiGHS.

Time is cut into cells at every arrival, deadline and change. Variable x[k, u, i, v] is the share of
frame k that unit u computes in cell i at vertex v of the lower convex hull of (ms, mJ) over the
sub-networks and clocks that are allowed there, and z[k] is 1 where frame k is not served:

    min  sum mJ x   s.t.  sum over (u, i, v) of x[k] + z[k] >= 1,
                          sum over (k, v) of ms x[u, i] <= length[i]   (a unit runs one at a time),
                          sum over (u, v) of ms x[k, i] <= length[i]   (a frame is in one place),
                          sum of z as small as can be

and, where memory is capped, m[a, i] >= sum of ms MB x[a, i] on every unit, and of every frame, of
app a, with sum over a of m[a, i] <= MB allowed * length[i]: on average over a cell the networks
that run fit together, and an app counts once, as in the loop.

A frame is served whole or not at all, and on one kind of unit: a kind that does nothing else and
still is too late has no variables. The linear programme is solved first and is the answer where it
is whole anyway. Where it is not, binary variables z[k] and y[k, u] say so for the frames that it
splits, and for others as far as `MOST_BINARIES` go. What exceeds this or `MOST_COLUMNS`, or the
nodes and seconds of a search, is left in parts: what has been proved is still a bound.

Large cases are relaxed, which only lowers the bound. Many frames of one app with the same window
and floor are bundles of nearly equal noise, each frame as short as the shortest of its bundle; z
counts in frames, so that those left out are the longest. Windows over very many cells are cut into
coarser blocks, whose room is that of their cells together, and a window begins and ends with a
block.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dynlib.boards.board import Board, Unit
from dynlib.errors import SearchError
from dynlib.pareto import lower_hull
from dynlib.points import Tables
from dynlib.runtime.conditions import Conditions, rest_mw

MOST_COLUMNS, MOST_BINARIES, MOST_NODES = 50000, 1000, 200
GOOD_GAP = 1e-3  # at which a search stops
MOST_CELLS, FEW_CELLS = 20000, 16  # of all windows together, and of any window
FEW_FRAMES, NEAR = 10, 0.05  # more frames at once are bundles of draws that differ by less
_SHARE = 1e-6  # of a frame: less than the solver's tolerance is nothing
_TIMES = 6  # decimals of a time in ms: what is closer is one
_SLACK_MS = 3e-6  # that a cell is longer, for times that were rounded, and for a late microsecond


class Frame(NamedTuple):
    """One offered frame: its window in ms, its floor, the standard normal number of its noise."""

    app: str
    frame: int
    model: str
    start_ms: float
    end_ms: float
    floor_pct: float
    draw: float


class Bundle(NamedTuple):
    """Frames of one app with the same window (ms) and floor, the shortest first."""

    frames: list[Frame]
    start_ms: float
    end_ms: float

    def work(self, sigma: float) -> float:
        """Noise of all frames together, at least; `sigma`: standard deviation of its logarithm."""
        shortest = math.exp(sigma * self.frames[0].draw - sigma**2 / 2)
        return len(self.frames) * shortest


def bundled(frames: list[Frame], horizon_ms: float) -> list[Bundle]:
    """Each frame for itself, or several of nearly equal noise where many come at once."""
    alike: dict[tuple, list[Frame]] = {}
    for frame in frames:
        start_ms = round(frame.start_ms, _TIMES)
        end_ms = round(min(frame.end_ms, horizon_ms), _TIMES)
        alike.setdefault((frame.app, frame.floor_pct, start_ms, end_ms), []).append(frame)
    bundles: list[Bundle] = []
    for (_, _, *window), same in alike.items():
        near = NEAR if len(same) > FEW_FRAMES else 0.0
        least = -math.inf
        for frame in sorted(same, key=lambda frame: frame.draw):
            if frame.draw < least + near:
                bundles[-1].frames.append(frame)
            else:
                least = frame.draw
                bundles.append(Bundle([frame], *window))
    return bundles


class _Kind(NamedTuple):
    """Units that are alike at a time: `many` of them. The `family` is what they are at all times:
    a frame that stays on its unit stays in it."""

    family: str
    unit: Unit
    stretch: float
    cap_mhz: float
    many: int


class Hulls:
    """Lower hulls of (ms, mJ above idle) per whole frame, under given conditions."""

    def __init__(self, board: Board, tables: Tables):
        self.board, self.tables = board, tables
        self.families = self._families()
        self.of = lru_cache(maxsize=None)(self._of)
        self.kinds = lru_cache(maxsize=None)(self._kinds)

    def points(self, model: str, unit: Unit) -> list:
        """All that a policy may run there, larger batches too."""
        return [p for p in self.tables[model].points.values() if p.unit == unit.name]

    def rest_mw(self, unit: Unit, stretch: float) -> float:
        """What flows in a unit whatever we do."""
        cores = [p.cores for model in self.tables for p in self.points(model, unit)]
        return rest_mw(unit, stretch, min(cores, default=unit.cores))

    def _families(self) -> dict[str, str]:
        """Unit -> the first one that is like it, with the same operating points."""
        firsts: dict[tuple, str] = {}
        families = {}
        for unit in self.board.units:
            runs = [
                (model, p.accuracy_val_pct, p.memory_mb, p.cores, p.noise_cv, p.latency_ms)
                for model in self.tables
                for p in self.points(model, unit)
            ]
            nameless = replace(unit, name="", cpus=())
            families[unit.name] = firsts.setdefault((nameless, *runs), unit.name)
        return families

    def _kinds(self, now: Conditions) -> list[_Kind]:
        """What there is under these conditions: twins are one resource, several times."""
        alike: dict[tuple, list[Unit]] = {}
        for unit, stretch, cap in zip(self.board.units, now.stretch, now.cap_mhz, strict=True):
            if cap > 0:
                alike.setdefault((self.families[unit.name], stretch, cap), []).append(unit)
        return [
            _Kind(family, twins[0], stretch, cap, len(twins))
            for (family, stretch, cap), twins in alike.items()
        ]

    def corners(self, bundle: Bundle, kind: _Kind, now: Conditions) -> list[tuple]:
        """[(ms, mJ, MB)] of all of a bundle."""
        model, floor_pct = bundle.frames[0].model, bundle.frames[0].floor_pct
        found = []
        for sigma, mb, ms, mj in self.of(model, floor_pct, kind, now.emc, now.memory_mb):
            work = bundle.work(sigma)
            found.append((ms * work, mj * work, mb))
        return found

    def _of(self, model: str, floor_pct: float, kind: _Kind, emc: float, memory_mb: float):
        """[(standard deviation of log noise, MB, ms, mJ)] of a frame: a hull per kind of noise and,
        where memory is capped, per size."""
        unit, stretch = kind.unit, kind.stretch
        rest = self.rest_mw(unit, stretch)
        corners: dict[tuple[float, float], list] = {}
        for point in self.points(model, unit):
            if point.accuracy_val_pct < floor_pct - 1e-9 or point.memory_mb > memory_mb:
                continue
            held_mb = point.memory_mb if math.isfinite(memory_mb) else 0.0
            for mhz, ms in zip(unit.freqs, point.latency_ms, strict=True):
                if mhz <= kind.cap_mhz:
                    time_ms = ms * stretch * unit.memory_scale(mhz, emc)
                    mj = time_ms * (unit.power_mw(mhz, point.cores) - rest) / 1000
                    corners.setdefault((point.sigma, held_mb), []).append((time_ms, mj))
        return [(*size, *corner) for size, some in corners.items() for corner in lower_hull(some)]


def solve(programme: "Programme", search_s: float):
    """(fewest frames that nobody serves, how many of each bundle the best solution found leaves
    out, least mJ above idle, gap).

    Example: one frame with a window of 0 to 40 ms, which a change at 30 ms cuts in two, on one
    unit whose hull has the corners (20 ms, 8 mJ) and (40 ms, 4 mJ): z and four variables x, two
    for each cell. Constraints: x1 + x2 + x3 + x4 + z >= 1; in the first cell 20 x1 + 40 x2 <= 30;
    in the second 20 x3 + 40 x4 <= 10. With z = 0 and costs of 8, 4, 8, 4 mJ the solution is x2 =
    3/4, x4 = 1/4, 4 mJ: whole, so there is nothing to search. With a window of 15 ms, x1 = 3/4 is
    all that fits. No solution has z = 0, the least z of the linear programme is 1/4, and of a
    whole frame 1: it is left out, for 0 mJ.
    """
    bundles = programme.bundles
    energy_mj = np.array(programme.mj)
    frames = sum(len(bundle.frames) for bundle in bundles)
    fewest, gap = 0, 0.0
    best = programme.least(energy_mj, 0, search_s)
    if best is None:  # not all can be served
        is_unserved = np.arange(len(energy_mj)) < len(bundles)
        count = programme.least(is_unserved.astype(float), frames, search_s)
        if count is not None:
            fewest = max(1, math.ceil(count.bound - 1e-4))
            most = max(fewest, count.bound)
            left_out = np.ceil(count.x[: len(bundles)] - _SHARE).sum()
            gap = (left_out - fewest) / frames
            best = programme.least(energy_mj, most, search_s)
            # Where the search for the fewest had no end, whole frames may not be possible.
            best = best or programme.least(energy_mj, most, 0.0)
        if best is None:
            raise SearchError("the optimum was not found: the solver contradicts itself")
        if count.is_whole and not best.is_whole:
            best = best._replace(x=count.x, is_whole=True)
    more = float(energy_mj @ best.x) / max(best.bound, _SHARE) - 1
    gap = max(gap, more if best.is_whole else math.inf)
    unserved = np.ceil(best.x[: len(bundles)] - _SHARE).astype(int)
    return fewest, unserved, best.bound, gap


class _Found(NamedTuple):
    """The solution that a search came to, or, if it is not `is_whole`, one that serves frames in
    parts; and the cost that none is below."""

    x: np.ndarray
    bound: float
    is_whole: bool = True


class Programme:
    """The programme of the module's docstring: columns, and rows `entries <= room`.

    The columns are z, one a bundle, then x and m as they come; `mj` has the cost of each, `shares`
    per bundle the columns x of each unit.
    """

    def __init__(self, bundles: list[Bundle], under, hulls: Hulls):
        self.bundles = bundles
        self.mj = [0.0] * len(bundles)
        self.shares: list[dict[str, list[int]]] = [{} for _ in bundles]
        self.room: list[float] = []
        self.entries: list[tuple[int, int, float]] = []  # row, column, value
        self._rows: dict[tuple, int] = {}
        self._held: dict[tuple, int] = {}
        grid = _Grid(bundles, under)
        for k, bundle in enumerate(bundles):
            self._enter(("all of", k), -1.0, k, -1 / len(bundle.frames))
            alone: Counter[str] = Counter()  # share of one frame that a family can serve at most
            found = []
            for cells, now in grid.cells(bundle):
                for kind in hulls.kinds(now):
                    corners = hulls.corners(bundle, kind, now)
                    if corners:
                        fastest_ms = min(ms for ms, _, _ in corners) / len(bundle.frames)
                        alone[kind.family] += _length_ms(cells[0]) / fastest_ms
                        found.append((cells, now, kind, corners))
            for cells, now, kind, corners in found:
                if alone[kind.family] >= 1:
                    places = sum(other.many for other in hulls.kinds(now))
                    for corner in corners:
                        self._add(k, cells, kind, places, now.memory_mb, *corner)

    def _enter(self, row: tuple, room: float, column: int, value: float) -> None:
        """One entry of the row of that name."""
        if row not in self._rows:
            self._rows[row] = len(self.room)
            self.room.append(room)
        self.entries.append((self._rows[row], column, value))

    def _column(self, mj: float = 0.0) -> int:
        self.mj.append(mj)
        return len(self.mj) - 1

    def _add(self, k: int, cells, kind: _Kind, places: int, cap_mb: float, ms, mj, mb) -> None:
        """A column x: all of bundle `k` on `kind` in the first of `cells`, which is part of the
        others, with its entries in the rows of all that it takes."""
        frames = self.bundles[k].frames
        column = self._column(mj)
        self.shares[k].setdefault(kind.family, []).append(column)
        self._enter(("all of", k), -1.0, column, -1.0)
        if len(frames) < places:
            room_ms = _length_ms(cells[0]) * len(frames)
            self._enter(("in one place", k, cells[0]), room_ms, column, ms)
        for cell in cells:
            length_ms = _length_ms(cell)
            self._enter((kind.unit.name, cell), length_ms * kind.many, column, ms)
            if not mb:
                continue
            app = frames[0].app
            if (app, cell) not in self._held:
                self._held[app, cell] = self._column()
                self._enter(("memory", cell), length_ms * cap_mb, self._held[app, cell], 1.0)
            # As much as on each unit, and as for each frame; twins and bundles are several.
            for where, many in ((kind.unit.name, kind.many), (k, len(frames))):
                row = app, where, cell
                if row not in self._rows:
                    self._enter(row, 0.0, self._held[app, cell], -float(many))
                self._enter(row, 0.0, column, ms * mb)

    def least(self, cost: np.ndarray, unserved: float, search_s: float) -> _Found | None:
        """The least cost with at most so many frames unserved; None where that is impossible. A
        search that takes 0 s leaves frames in parts."""
        count, width = len(self.bundles), len(cost)
        room = [*self.room, unserved + _SHARE / 2]
        entries = self.entries + [(len(self.room), k, 1.0) for k in range(count)]
        most = np.full(width, np.inf)
        most[:count] = [len(bundle.frames) for bundle in self.bundles]
        relaxed = _search(cost, entries, room, most)
        if relaxed.x is None:
            return None
        undecided = self._undecided(relaxed.x)
        if not undecided or not search_s or width > MOST_COLUMNS:
            return _Found(relaxed.x, relaxed.fun, not undecided)
        is_whole = np.isin(np.arange(width), undecided).tolist()
        for k in undecided:
            kinds = self._kinds(k)
            if not kinds:
                continue
            once = len(room)
            room.append(1.0)
            entries.append((once, k, 1.0))
            for columns in kinds:
                there, y = len(room), len(is_whole)
                room.append(0.0)
                is_whole.append(True)
                entries += [(there, column, 1.0) for column in columns]
                entries += [(there, y, -1.0), (once, y, 1.0)]
        more = len(is_whole) - width
        cost, most = np.append(cost, np.zeros(more)), np.append(most, np.ones(more))
        limits = {"node_limit": MOST_NODES, "time_limit": search_s, "mip_rel_gap": GOOD_GAP}
        solved = _search(cost, entries, room, most, is_whole, limits)
        if solved.status in (2, 3):  # infeasible or unbounded; all else is solved, or at a limit
            return None
        bound = max(relaxed.fun, solved.mip_dual_bound or 0.0)
        if solved.x is None:
            return _Found(relaxed.x, bound, False)
        return _Found(solved.x[:width], bound)

    def _undecided(self, x: np.ndarray) -> list[int]:
        """The bundles that a search has to make whole, if any: `MOST_BINARIES` of them at most,
        those first that `x` splits."""
        count = len(self.bundles)
        is_split = np.abs(x[:count] - np.round(x[:count])) > _SHARE
        binaries = np.ones(count, int)
        for k in range(count):
            kinds = self._kinds(k)
            binaries[k] += len(kinds)
            used = [x[columns].sum() > _SHARE for columns in kinds]
            is_split[k] |= sum(used) > 1
        if not is_split.any():
            return []
        order = np.argsort(~is_split, kind="stable")
        return order[np.cumsum(binaries[order]) <= MOST_BINARIES].tolist()

    def _kinds(self, k: int) -> list[list[int]]:
        """The columns x of every kind of unit between which a frame has to be decided; of bundles,
        whose frames may run in different places, none."""
        units = self.shares[k].values()
        return list(units) if len(units) > 1 == len(self.bundles[k].frames) else []


class _Grid:
    """Time in cells: small ones, from each edge of a window or change to the next, and, where there
    are windows over too many of those, blocks of them."""

    def __init__(self, bundles: list[Bundle], under):
        self.states = [now for _, now in under]
        self.changes_ms = np.round([t_ms for t_ms, _ in under], _TIMES)
        starts_ms = np.array([bundle.start_ms for bundle in bundles])
        ends_ms = np.array([bundle.end_ms for bundle in bundles])
        edges = np.unique(np.concatenate([starts_ms, ends_ms, self.changes_ms]))
        self.edges = self.cuts = edges
        self.most = max(FEW_CELLS, MOST_CELLS // len(bundles))
        is_long = np.searchsorted(edges, ends_ms) - np.searchsorted(edges, starts_ms) > self.most
        if not is_long.any():
            return
        # Every change, and the edges of long windows that are not too close to another.
        apart_ms = (ends_ms - starts_ms)[is_long].min() / FEW_CELLS
        cuts = np.unique([edges[0], *self.changes_ms, edges[-1]])
        for t_ms in np.unique([starts_ms[is_long], ends_ms[is_long]]):
            if np.abs(cuts - t_ms).min() >= apart_ms:
                cuts = np.append(cuts, t_ms)
        self.cuts = np.sort(cuts)

    def cells(self, bundle: Bundle) -> Iterator[tuple[list[tuple[float, float]], Conditions]]:
        """The cells of a window, each with the block that it is part of, and what holds there."""
        times = self.edges
        first, last = np.searchsorted(times, bundle[1:])
        if last - first > self.most:
            times = self.cuts
            first = np.searchsorted(times, bundle.start_ms, side="right") - 1
            last = np.searchsorted(times, bundle.end_ms)
        for cell in pairwise(times[first : last + 1].tolist()):
            end = np.searchsorted(self.cuts, cell[0], side="right")
            block = tuple(self.cuts[end - 1 : end + 1].tolist())
            change = np.searchsorted(self.changes_ms, cell[0], side="right") - 1
            yield [cell] if cell == block else [cell, block], self.states[change]


def _length_ms(cell: tuple[float, float]) -> float:
    return cell[1] - cell[0] + _SLACK_MS


def _search(cost, entries, room, most, is_whole=None, limits=None):
    """HiGHS: the least cost with rows of `entries` (row, column, value) <= `room`, columns from 0
    to `most`, those of `is_whole` whole numbers."""
    # Here, because half of a service's start would be spent on what only a judge needs.
    from scipy.optimize import Bounds, LinearConstraint, linprog, milp
    from scipy.sparse import csr_array

    rows, columns, values = zip(*entries, strict=True)
    matrix = csr_array((values, (rows, columns)), (len(room), len(cost)))
    if is_whole is None:  # the interior-point method is the faster one for large cases
        bounds = np.column_stack([np.zeros(len(cost)), most])
        return linprog(cost, matrix, room, bounds=bounds, method="highs-ipm")
    at_most = LinearConstraint(matrix, -np.inf, room)
    return milp(
        cost, integrality=is_whole, bounds=Bounds(0, most), constraints=at_most, options=limits
    )
