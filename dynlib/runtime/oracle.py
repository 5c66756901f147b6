"""The optimum: what a clairvoyant controller needs at least for the same work.

A linear programme over the whole run, solved by HiGHS. Time is cut at every arrival, deadline and
change. Variable x[k, u, i, v] is the share of frame k that unit u computes in interval i at vertex
v of the lower convex hull of (ms, mJ) over the sub-networks and clocks that are allowed there:

    min  sum mJ x   s.t.  sum over (u, i, v) of x[k] + z[k] = 1,
                          sum over (k, v) of ms x[u, i] <= length[i]   (a unit runs one at a time),
                          sum over (u, v) of ms x[k, i] <= length[i]   (a frame is in one place)

with z[k] the part of a frame that nobody can serve, minimised first. Noise, competitors, caps and
arrivals are known. It may pre-empt and mix clocks and networks for nothing, a change of clock costs
no time, and heat caps nothing, with static power as in the coldest air: every schedule of the
loop is a solution, so none takes less energy.

A frame stays on the unit where it starts, which takes a binary variable per frame and kind of unit.
Where that gives more than `MOST_BINARIES`, or too much to search, it may migrate instead: a lower
bound all the more.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import block_array, csr_array, eye_array

from dynlib.boards.board import Board, Unit
from dynlib.errors import PolicyError, SearchError
from dynlib.pareto import lower_hull
from dynlib.points import Tables
from dynlib.runtime.conditions import Conditions, Setup, conditions, rest_mw, static_mw
from dynlib.runtime.jobs import AppRun
from dynlib.workload import CLOSED_LOOP

MOST_BINARIES, MOST_NODES = 400, 1000
_SHARE = 1e-6  # of a frame: less than the solver's tolerance is nothing
_UNSERVED_MJ = 1e6  # dearer than any frame, so that serving comes before saving


class Frame(NamedTuple):
    """One offered frame: its window in ms, its floor, the standard normal number of its noise."""

    app: str
    frame: int
    model: str
    start_ms: float
    end_ms: float
    floor_pct: float
    draw: float


@dataclass(frozen=True)
class Optimum:
    """A lower bound for every policy on this workload, board and seed.

    Args:
        energy_mj: of the board over the horizon, with all frames served that can be.
        idle_mj: what idle power takes of it: lowest clocks, competitors included.
        served: how many frames those are (a share of one counts as such).
        infeasible: frames that not even the relaxed problem serves whole, as (app, number).
        spans_s: where the windows of those lie.
        gap: relative distance to the least that the solver has proved; 0 for a linear programme.
    """

    energy_mj: float
    idle_mj: float
    served: float
    infeasible: frozenset[tuple[str, int]] = frozenset()
    spans_s: tuple[tuple[float, float], ...] = ()
    gap: float = 0.0


def offered(case: Setup, seed: int) -> list[Frame]:
    """All frames of a run, as the loop will offer them; raises `PolicyError` for closed loops,
    where what is offered depends on the policy."""
    frames = []
    for app in case.workload.apps:
        if app.arrival in CLOSED_LOOP:
            raise PolicyError(f"{app.name}: a closed loop has no optimum for the same work")
        run = AppRun(app, case.workload, case.tables[app.model], seed)
        for i, (t_ms, need) in enumerate(run.arrivals):
            end_ms = t_ms + need.deadline_ms
            draw = run.draw(i)
            frames.append(Frame(app.name, i, app.model, t_ms, end_ms, need.floor_pct, draw))
    return frames


def optimum(case: Setup, seed: int = 0, only: Iterable[tuple[str, int]] | None = None) -> Optimum:
    """The least energy for a case; with `only`, for these frames, (app, number), alone."""
    frames = offered(case, seed)
    if only is not None:
        wanted = set(only)
        frames = [frame for frame in frames if (frame.app, frame.frame) in wanted]
    board = case.board
    under = conditions(case.workload, board)
    edges = _edges(frames, under, case.workload.horizon_s * 1000)
    states = _states(under, edges)
    idle_mj = _idle_mj(board, under, edges, states)
    if not frames:
        return Optimum(idle_mj, idle_mj, 0.0)
    hulls = _Hulls(board, case.tables)
    share, cost_mj, gap = _solve(frames, edges, states, hulls)
    bad = [frame for frame, served in zip(frames, share, strict=True) if served < 1 - _SHARE]
    return Optimum(
        energy_mj=idle_mj + cost_mj,
        idle_mj=idle_mj,
        served=float(share.sum()),
        infeasible=frozenset((frame.app, frame.frame) for frame in bad),
        spans_s=_spans_s(bad),
        gap=gap,
    )


def _states(under, edges: np.ndarray) -> list[Conditions]:
    """What holds in each interval between two edges."""
    starts = [t_ms for t_ms, _ in under]
    behind = np.searchsorted(starts, edges[:-1], side="right")
    return [under[i - 1][1] for i in behind]


def _edges(frames: list[Frame], under, horizon_ms: float) -> np.ndarray:
    """Where time is cut: at every arrival, deadline and change, and at the horizon."""
    times = {horizon_ms}
    for frame in frames:
        times |= {frame.start_ms, frame.end_ms}
    times |= {t_ms for t_ms, _ in under}
    return np.array(sorted(t_ms for t_ms in times if t_ms <= horizon_ms + _SHARE))


def _idle_mj(board: Board, under, edges, states) -> float:
    """What flows whatever we do; no board is colder than the coldest air it was in."""
    airs_c = [now.ambient_c for _, now in under if now.ambient_c is not None]
    always_mw = static_mw(board, min(airs_c, default=None))
    idle_mj = 0.0
    for (begin_ms, end_ms), now in zip(pairwise(edges), states, strict=True):
        units_mw = sum(map(rest_mw, board.units, now.stretch))
        idle_mj += (always_mw + units_mw) * (end_ms - begin_ms) / 1000
    return idle_mj


def _spans_s(frames: list[Frame]) -> tuple[tuple[float, float], ...]:
    """The windows of frames, those that overlap as one."""
    windows_s = sorted((frame.start_ms / 1000, frame.end_ms / 1000) for frame in frames)
    spans: list[tuple[float, float]] = []
    for start, end in windows_s:
        if spans and start <= spans[-1][1]:
            before, last = spans.pop()
            spans.append((before, max(end, last)))
        else:
            spans.append((start, end))
    return tuple(spans)


class _Hulls:
    """Lower hulls of (ms, mJ above idle) per whole frame, under given conditions."""

    def __init__(self, board: Board, tables: Tables):
        self.board, self.tables = board, tables
        self.of = lru_cache(maxsize=None)(self._of)
        self.kinds = lru_cache(maxsize=None)(self._kinds)

    def _kinds(self, now: Conditions) -> list[tuple[Unit, float, float, int]]:
        """(unit, stretch, cap, how many are alike): twins are one resource, several times."""
        alike: dict[tuple, list[Unit]] = {}
        for unit, stretch, cap in zip(self.board.units, now.stretch, now.cap_mhz, strict=True):
            if cap > 0:
                nameless = replace(unit, name="", cpus=())
                twins = alike.setdefault((nameless, stretch, cap), [])
                twins.append(unit)
        kinds = []
        for (_, stretch, cap), twins in alike.items():
            kinds.append((twins[0], stretch, cap, len(twins)))
        return kinds

    def _of(self, model, unit: Unit, floor_pct, stretch, cap_mhz, emc, memory_mb):
        """[(standard deviation of log noise, ms, mJ)]: a hull per kind of noise."""
        rest = rest_mw(unit, stretch)
        corners: dict[float, list] = {}
        for point in self.tables[model].on(unit.name):
            if point.accuracy_val_pct < floor_pct - 1e-9 or point.memory_mb > memory_mb:
                continue
            for mhz, ms in zip(unit.freqs, point.latency_ms, strict=True):
                if mhz <= cap_mhz:
                    time_ms = ms * stretch * unit.memory_scale(mhz, emc)
                    mj = time_ms * (unit.power_mw(mhz, point.cores) - rest) / 1000
                    corners.setdefault(point.noise_cv, []).append((time_ms, mj))
        return [
            (math.sqrt(math.log1p(cv**2)), *corner)
            for cv, some in corners.items()
            for corner in lower_hull(some)
        ]


def _solve(frames: list[Frame], edges, states, hulls: _Hulls):
    """(share of every frame that is served, mJ above idle, the solver's relative gap).

    Example: one frame with a window of 0 to 40 ms, which a change at 30 ms cuts in two, on one
    unit whose hull has the corners (20 ms, 8 mJ) and (40 ms, 4 mJ): four variables x, two for
    each interval, and z. Constraints: x1 + x2 + x3 + x4 + z = 1; in the first interval
    20 x1 + 40 x2 <= 30, once for the unit and once for the frame; in the second 20 x3 + 40 x4 <=
    10. Costs 8, 4, 8, 4 mJ, and 1e6 for z. Solution: x2 = 3/4, x4 = 1/4, 4 mJ.
    """
    programme = _Programme(frames, edges, states, hulls)
    room = programme.room
    shares = len(programme.cost)
    wholes = len(frames)
    columns = shares + wholes  # x, then z
    unserved_mj = np.full(wholes, _UNSERVED_MJ)
    cost = np.append(programme.cost, unserved_mj)
    owner = np.array(programme.owner, int)
    # Shares of a frame, and what nobody serves of it, sum up to 1.
    frame_of_column = np.append(owner, np.arange(wholes))
    places = frame_of_column, np.arange(columns)
    of_frame = csr_array((np.ones(columns), places))
    # Every x takes time of its unit and of its frame.
    column_of_time = np.repeat(np.arange(shares), 2)
    places = programme.rows, column_of_time
    in_time = csr_array((programme.times, places), (len(room), columns))
    solved = _staying(cost, in_time, room, of_frame, owner, programme.where)
    if solved is None:
        solved = linprog(cost, in_time, room, of_frame, np.ones(wholes), method="highs")
    if solved.status != 0:
        raise SearchError(f"the optimum was not found: {solved.message}")
    gap = float(solved.get("mip_gap") or 0.0)
    x = solved.x[:shares]
    served = np.bincount(owner, x, wholes)
    return served, float(x @ cost[:shares]), gap


class _Programme:
    """The variables x of the linear programme, in order, and the room (ms) of its constraints.

    `cost` (mJ of a whole frame), `owner` (number of the frame) and `where` (unit) have one entry a
    variable; `rows` and `times` two: its unit in that interval, and its frame.
    """

    def __init__(self, frames: list[Frame], edges, states, hulls: _Hulls):
        self.cost: list[float] = []
        self.owner: list[int] = []
        self.where: list[str] = []
        self.rows: list[int] = []
        self.times: list[float] = []
        self.room: list[float] = []
        self._capacity: dict[tuple[str, int], int] = {}
        starts_ms = [frame.start_ms for frame in frames]
        ends_ms = [frame.end_ms for frame in frames]
        first = np.searchsorted(edges, starts_ms)
        last = np.searchsorted(edges, ends_ms)
        lengths_ms = np.diff(edges)
        for k, frame in enumerate(frames):
            stop = min(last[k], len(states))
            for i in range(first[k], stop):
                self._add(k, frame, i, lengths_ms[i], states[i], hulls)

    def _add(self, k: int, frame: Frame, i: int, length_ms: float, now: Conditions, hulls):
        """What frame number `k` can do in interval `i`."""
        one_place = len(self.room)
        self.room.append(length_ms)
        for unit, stretch, cap, many in hulls.kinds(now):
            corners = hulls.of(
                frame.model, unit, frame.floor_pct, stretch, cap, now.emc, now.memory_mb
            )
            if not corners:
                continue
            row = self._capacity.setdefault((unit.name, i), len(self.room))
            if row == len(self.room):
                self.room.append(length_ms * many)
            for sigma, ms, mj in corners:
                noise = math.exp(sigma * frame.draw - sigma**2 / 2)
                self.rows += (row, one_place)
                self.times += (ms * noise, ms * noise)
                self.cost.append(mj * noise)
                self.owner.append(k)
                self.where.append(unit.name)


def _staying(cost, in_time, room, of_frame, owner, where: list[str]):
    """The optimum in which no frame migrates; None if there is but one kind of unit, or too much
    to decide.

    Binary variable y[k, u] says that frame k runs on unit u: sum over u of y[k, u] <= 1, and the
    shares of k on u sum up to at most y[k, u]. `where`: the unit of every variable x, `owner` its
    frame.
    """
    frames = of_frame.shape[0]
    who = list(zip(owner.tolist(), where, strict=True))
    pairs = sorted(set(who))
    if len(set(where)) < 2 or len(pairs) > MOST_BINARIES:
        return None
    number = {pair: i for i, pair in enumerate(pairs)}
    shares = len(owner)
    binaries = len(pairs)
    columns = shares + frames
    of_pair = [number[pair] for pair in who]
    places = of_pair, np.arange(shares)
    used = csr_array((np.ones(shares), places), (binaries, columns))
    frame_of_pair = [frame for frame, _ in pairs]
    places = frame_of_pair, np.arange(binaries)
    chosen = csr_array((np.ones(binaries), places), (frames, binaries))
    limits = block_array([[in_time, None], [used, -eye_array(binaries)], [None, chosen]])
    at_most = np.concatenate([room, np.zeros(binaries), np.ones(frames)])
    whole = block_array([[of_frame, csr_array((frames, binaries))]])
    free = np.zeros(columns)
    solved = milp(
        np.append(cost, np.zeros(binaries)),
        integrality=np.append(free, np.ones(binaries)),
        constraints=[
            LinearConstraint(whole, 1, 1),
            LinearConstraint(limits, -np.inf, at_most),
        ],
        options={"node_limit": MOST_NODES},
    )
    return solved if solved.status == 0 else None
