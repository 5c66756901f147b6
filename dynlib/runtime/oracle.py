"""The optimum: what a clairvoyant controller needs at least for the same work.

It knows noise, competitors, caps and arrivals. It may pre-empt and mix clocks and networks for
nothing, a change of clock costs no time, and heat caps nothing, with static power as in the coldest
air: every schedule of the loop is a solution of its programme (`dynlib.runtime.programme`), so none
takes less energy and none serves more.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dynlib.boards.board import Board
from dynlib.errors import PolicyError
from dynlib.runtime.conditions import Setup, conditions, static_mw
from dynlib.runtime.jobs import AppRun
from dynlib.runtime.programme import Frame, Hulls, Programme, bundled, solve
from dynlib.workload import CLOSED_LOOP


@dataclass(frozen=True)
class Optimum:
    """A lower bound for every policy on this workload, board and seed.

    Args:
        energy_mj: of the board over the horizon, at least, with `served` frames served.
        idle_mj: what idle power takes of it: lowest clocks, competitors included.
        served: how many frames are on time at most.
        infeasible: frames that the best solution found leaves out, as (app, number).
        spans_s: where the windows of those lie.
        gap: how far that solution is from what is proved, as a share of its energy above idle or
            of the frames; 0 where it is the optimum, inf where the search found none.
    """

    energy_mj: float
    idle_mj: float
    served: int
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


def optimum(
    case: Setup,
    seed: int = 0,
    only: Iterable[tuple[str, int]] | None = None,
    search_s: float = 10.0,
) -> Optimum:
    """The least energy for a case; with `only`, for these frames, (app, number), alone.

    Each of at most three searches may take `search_s`: more time gives a tighter bound.
    """
    frames = offered(case, seed)
    if only is not None:
        wanted = set(only)
        frames = [frame for frame in frames if (frame.app, frame.frame) in wanted]
    horizon_ms = case.workload.horizon_s * 1000
    under = conditions(case.workload, case.board)
    hulls = Hulls(case.board, case.tables)
    idle_mj = _idle_mj(case.board, under, horizon_ms, hulls)
    if not frames:
        return Optimum(idle_mj, idle_mj, 0)
    bundles = bundled(frames, horizon_ms)
    fewest, unserved, cost_mj, gap = solve(Programme(bundles, under, hulls), search_s)
    bad = []
    for bundle, count in zip(bundles, unserved, strict=True):
        bad += bundle.frames[len(bundle.frames) - count :]
    return Optimum(
        energy_mj=idle_mj + cost_mj,
        idle_mj=idle_mj,
        served=len(frames) - fewest,
        infeasible=frozenset((frame.app, frame.frame) for frame in bad),
        spans_s=_spans_s(bad),
        gap=gap,
    )


def _idle_mj(board: Board, under, horizon_ms: float, hulls: Hulls) -> float:
    """What flows whatever we do; no board is colder than the coldest air it was in."""
    airs_c = [now.ambient_c for _, now in under if now.ambient_c is not None]
    always_mw = static_mw(board, min(airs_c, default=None))
    ends_ms = [t_ms for t_ms, _ in under[1:]]
    idle_mj = 0.0
    for (begin_ms, now), end_ms in zip(under, [*ends_ms, horizon_ms], strict=True):
        lasts_ms = max(min(end_ms, horizon_ms) - begin_ms, 0.0)
        units_mw = sum(map(hulls.rest_mw, board.units, now.stretch))
        idle_mj += (always_mw + units_mw) * lasts_ms / 1000
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
