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
engine is a solution, so none takes less energy.

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
from dynlib.errors import DynlibError
from dynlib.pareto import lower_hull
from dynlib.points import Tables
from dynlib.runtime.conditions import Conditions, conditions, rest_mw, static_mw
from dynlib.runtime.jobs import AppRun
from dynlib.workload import CLOSED_LOOP, Workload

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


def offered(workload: Workload, tables: Tables, seed: int) -> list[Frame]:
    """All frames of a run, as the engine will offer them; raises `DynlibError` for closed loops,
    where what is offered depends on the policy."""
    frames = []
    for app in workload.apps:
        if app.arrival in CLOSED_LOOP:
            raise DynlibError(f"{app.name}: a closed loop has no optimum for the same work")
        run = AppRun(app, workload, tables[app.model], seed, (1.0,))
        for i, (t_ms, need) in enumerate(run.arrivals):
            frames.append(Frame(app.name, i, app.model, t_ms, t_ms + need.deadline_ms,
                                need.floor_pct, run.draw(i)))  # fmt: skip
    return frames


def oracle(
    workload: Workload,
    board: Board,
    tables: Tables,
    seed: int = 0,
    only: Iterable[tuple[str, int]] | None = None,
) -> Optimum:
    """The least energy for `workload`; with `only`, for these frames, (app, number), alone."""
    frames = offered(workload, tables, seed)
    if only is not None:
        wanted = set(only)
        frames = [f for f in frames if (f.app, f.frame) in wanted]
    under = conditions(workload, board)
    times = {t for f in frames for t in (f.start_ms, f.end_ms)} | {t for t, _ in under}
    horizon_ms = workload.horizon_s * 1000
    edges = np.array(sorted(t for t in times | {horizon_ms} if t <= horizon_ms + _SHARE))
    starts = [t for t, _ in under]
    states = [under[i][1] for i in np.searchsorted(starts, edges[:-1], side="right") - 1]
    # No board is colder than the coldest air it was in.
    coldest_c = min((now.ambient_c for _, now in under if now.ambient_c is not None), default=None)
    idle_mj, always_mw = 0.0, static_mw(board, coldest_c)
    for (a, b), now in zip(pairwise(edges), states, strict=True):
        idle_mw = always_mw + sum(map(rest_mw, board.units, now.stretch))
        idle_mj += idle_mw * (b - a) / 1000
    if not frames:
        return Optimum(idle_mj, idle_mj, 0.0)
    share, cost_mj, gap = _solve(frames, edges, states, _Hulls(board, tables))
    bad = [f for f, s in zip(frames, share, strict=True) if s < 1 - _SHARE]
    spans: list[tuple[float, float]] = []
    for start, end in sorted((f.start_ms / 1000, f.end_ms / 1000) for f in bad):
        if spans and start <= spans[-1][1]:
            start, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((start, end))
    return Optimum(idle_mj + cost_mj, idle_mj, float(share.sum()),
                   frozenset((f.app, f.frame) for f in bad), tuple(spans), gap)  # fmt: skip


class _Hulls:
    """Lower hulls of (ms, mJ above idle) per whole frame, under given conditions."""

    def __init__(self, board: Board, tables: Tables):
        self.board, self.tables = board, tables
        self.of = lru_cache(maxsize=None)(self._of)
        self.kinds = lru_cache(maxsize=None)(self._kinds)

    def _kinds(self, now: Conditions) -> list[tuple[Unit, float, float, int]]:
        """(unit, stretch, cap, how many are alike): twins are one resource, several times."""
        found: dict[tuple, list[Unit]] = {}
        for unit, stretch, cap in zip(self.board.units, now.stretch, now.cap_mhz, strict=True):
            if cap > 0:
                key = (replace(unit, name="", cpus=()), stretch, cap)
                found.setdefault(key, []).append(unit)
        return [(twins[0], *key[1:], len(twins)) for key, twins in found.items()]

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
        return [(math.sqrt(math.log1p(cv**2)), *corner)
                for cv, some in corners.items() for corner in lower_hull(some)]  # fmt: skip


def _solve(frames: list[Frame], edges, states, hulls: _Hulls):
    """(share of every frame that is served, mJ above idle, the solver's relative gap)."""
    rows, values, cost, owner, where, room = [], [], [], [], [], []
    capacity: dict[tuple, int] = {}
    first = np.searchsorted(edges, [f.start_ms for f in frames])
    last = np.searchsorted(edges, [f.end_ms for f in frames])
    for k, f in enumerate(frames):
        for i in range(first[k], min(last[k], len(states))):
            now = states[i]
            place = len(room)
            room.append(edges[i + 1] - edges[i])
            for unit, stretch, cap, many in hulls.kinds(now):
                corners = hulls.of(f.model, unit, f.floor_pct, stretch, cap, now.emc, now.memory_mb)
                if not corners:
                    continue
                row = capacity.setdefault((unit.name, i), len(room))
                if row == len(room):
                    room.append((edges[i + 1] - edges[i]) * many)
                for sigma, ms, mj in corners:
                    noise = math.exp(sigma * f.draw - sigma**2 / 2)
                    rows += (row, place)
                    values += (ms * noise, ms * noise)
                    cost.append(mj * noise)
                    owner.append(k)
                    where.append(unit.name)
    n, m = len(cost), len(frames)
    owner = np.array(owner, int)
    of_frame = csr_array((np.ones(n + m), (np.append(owner, np.arange(m)), np.arange(n + m))))
    in_time = csr_array((values, (rows, np.repeat(np.arange(n), 2))), (len(room), n + m))
    cost = np.append(cost, np.full(m, _UNSERVED_MJ))
    solved = _staying(cost, in_time, room, of_frame, owner, where)
    if solved is None:
        solved = linprog(cost, in_time, room, of_frame, np.ones(m), method="highs")
    if solved.status != 0:
        raise DynlibError(f"the optimum was not found: {solved.message}")
    gap = float(solved.get("mip_gap") or 0.0)
    return np.bincount(owner, solved.x[:n], m), float(solved.x[:n] @ cost[:n]), gap


def _staying(cost, in_time, room, of_frame, owner, where: list[str]):
    """The optimum in which no frame migrates; None if there is but one kind of unit, or too much
    to decide. `where`: the unit of every variable x, `owner` its frame."""
    m = of_frame.shape[0]
    pairs = sorted(set(zip(owner.tolist(), where, strict=True)))
    if len(set(where)) < 2 or len(pairs) > MOST_BINARIES:
        return None
    number, q, n = {pair: i for i, pair in enumerate(pairs)}, len(pairs), len(owner)
    of_pair = [number[pair] for pair in zip(owner.tolist(), where, strict=True)]
    used = csr_array((np.ones(n), (of_pair, np.arange(n))), (q, n + m))
    chosen = csr_array((np.ones(q), ([k for k, _ in pairs], np.arange(q))), (m, q))
    limits = block_array([[in_time, None], [used, -eye_array(q)], [None, chosen]])
    whole = block_array([[of_frame, csr_array((m, q))]])
    solved = milp(
        np.append(cost, np.zeros(q)), integrality=np.append(np.zeros(n + m), np.ones(q)),
        constraints=[LinearConstraint(whole, 1, 1), LinearConstraint(
            limits, -np.inf, np.concatenate([room, np.zeros(q), np.ones(m)]))],
        options={"node_limit": MOST_NODES},
    )  # fmt: skip
    return solved if solved.status == 0 else None
