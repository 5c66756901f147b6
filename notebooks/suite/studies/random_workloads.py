"""Workloads that nobody thought of: drawn from a seed, so that no manager is tuned to a scenario.

Most can be served, some cannot: what is asked for at first fits the board, what changes later need
not. And tables whose times scatter otherwise than the manager believes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from dynlib.boards.board import Board
from dynlib.errors import TableError
from dynlib.points import PointTable
from dynlib.runtime.case import Case
from dynlib.workload import CLOSED_LOOP, App, Change, Workload

HORIZON_S = (20.0, 30.0)
LOAD = (0.05, 0.9)  # of all apps: smallest networks that meet the floors, at the highest clock
LOAD_SHAPE = (1.2, 2.4)  # of the beta distribution: a third of the way up, on average
FRAMES = 8  # at least so many does every app ask for that is there all the time
HOW_MANY = {1: 0.4, 2: 0.35, 3: 0.15, 4: 0.1}  # apps -> how likely
ARRIVALS = {"periodic": 0.5, "server": 0.2, "trace": 0.2, "offline": 0.1}
CLOSED_SHARE = 0.25  # of the apps, where closed loops are asked for
DEADLINE_PERIODS = (0.8, 3.0)
BURSTY_PERIODS = (1.5, 3.0)  # where frames come irregularly, several of them at once
ROOM = 1.2  # a deadline is at least so many times what its frame and one of another app take
STEP = (0.6, 1.6)  # by what a deadline or a period changes
STRETCH = (1.0, 2.5)

# How likely each thing is.
COMES_LATER = LEAVES_EARLY = 0.3
REQUIREMENTS_CHANGE = 0.6  # an app's
IS_ANNOUNCED = 0.5
COMPETITOR = 0.4  # on a unit
CAPPED = 0.25  # a unit
LOST = 0.15  # a unit, where everybody can go elsewhere
POWER_CAP = 0.2
MEMORY_CAP = 0.3


@dataclass(frozen=True)
class _Drawn:
    """An app and its table.

    Args:
        least_ms: what the smallest network that meets the floor takes.
        wait_ms: the longest such time of the other apps: nothing that runs is interrupted.
    """

    app: App
    table: PointTable
    least_ms: float
    wait_ms: float

    @property
    def tightest_ms(self) -> float:
        """The lowest deadline that is drawn."""
        return ROOM * (self.least_ms + self.wait_ms)


def random_case(
    board: Board, tables: Mapping[str, PointTable], seed: int, closed: bool = False
) -> Case:
    """A case drawn from `seed` alone: the same arguments, the same case.

    One to four apps over `tables`, each on the main unit of its table. Periods are such that the
    smallest networks that meet the floors, at the highest clock, take from 0.05 to 0.9 of the time
    together. Deadlines are 0.8 to 3 periods, floors anywhere from the lowest accuracy to the
    highest, priorities 0 to 2. Apps come and go and change what they ask for, announced or not.
    Competitors come unannounced; clocks, power and, where the tables know it, memory are capped
    for a while; a unit is lost for a while where every app can go elsewhere, and then apps ask for
    no more than the next best unit can do.

    Args:
        closed: some apps ask for the next frames when they have the last; their load has no limit.

    Where networks take long (a second and more) there are fewer apps, so that each can ask for
    `FRAMES` frames in the horizon.
    """
    rng = np.random.default_rng([seed, 0x11FE])
    horizon_s = round(rng.uniform(*HORIZON_S), 1)
    drawn = _apps(rng, list(tables.values()), horizon_s, closed)
    lost = _lost(rng, drawn, board, horizon_s)
    changes = list(lost)
    moved = {change.app for change in lost}
    for each in drawn:
        if each.app.name not in moved:
            changes += _requirements(rng, each, horizon_s)
    gone = {change.unit for change in lost}
    for unit in sorted({each.table.main_unit for each in drawn}):
        changes += _competitors(rng, unit, horizon_s)
        if unit not in gone:
            changes += _clock_caps(rng, board, unit, horizon_s)
    changes += _power_caps(rng, board, horizon_s)
    changes += _memory_caps(rng, drawn, horizon_s)
    apps = tuple(each.app for each in drawn)
    return Case(Workload(f"random-{seed}", horizon_s, apps, tuple(changes)), board, tables)


def smallest_load(case: Case) -> float:
    """The share of the time that the apps take at first, as `random_case` bounds it.

    With the smallest networks that meet their floors, on the main units at the highest clock, all
    apps together and as if all were there at once; closed loops are left out.
    """
    total = 0.0
    for app in case.workload.apps:
        table = case.tables[app.model]
        least_ms = _least_ms(table, app.accuracy_floor_pct)
        span_ms = case.workload.end_ms(app) - app.start_s * 1000
        if app.arrival == "trace":
            total += len(app.trace_ms) * least_ms / span_ms
        elif app.arrival == "offline":
            total += app.frames * least_ms / span_ms
        elif app.arrival not in CLOSED_LOOP:
            total += least_ms / app.period_ms
    return total


def noise_wrong(case: Case, cv: float) -> Case:
    """The same case where times scatter with a coefficient of variation of `cv`.

    A manager that is made with the tables of the first case goes on believing those: on the boards
    here that is 0.036 for a GPU and 0.10 for a CPU. Raises `TableError` for a negative `cv`.
    """
    if not cv >= 0:
        raise TableError(f"cv: got {cv!r}, expected a number from 0")
    tables = {}
    for model, table in case.tables.items():
        frame = table.frame.copy()
        frame["latency_std_ms"] = cv * frame["latency_ms"]
        segments = {point.subnet: point.segments for point in table.points.values()}
        tables[model] = PointTable(frame, case.board, segments)
    return replace(case, tables=tables)


def _pick(rng: np.random.Generator, weights: Mapping):
    """One key, as likely as its weight."""
    keys = list(weights)
    return keys[rng.choice(len(keys), p=list(weights.values()))]


def _accuracies(table: PointTable) -> tuple[float, float]:
    """The lowest and the highest accuracy of the main unit, in percent."""
    found = [point.accuracy_val_pct for point in table.on(table.main_unit)]
    return min(found), max(found)


def _least_ms(table: PointTable, floor_pct: float) -> float:
    """What the smallest network that meets a floor takes on the main unit at the highest clock."""
    points = table.on(table.main_unit)  # fastest first
    return next(p.latency_ms[-1] for p in points if p.accuracy_val_pct >= floor_pct)


def _floor_pct(rng: np.random.Generator, table: PointTable, within_ms: float = np.inf) -> float:
    """A floor from the lowest accuracy to the highest that networks reach within a time."""
    lowest, highest = _accuracies(table)
    reached = [
        point.accuracy_val_pct
        for point in table.on(table.main_unit)
        if point.latency_ms[-1] <= within_ms
    ]
    return min(rng.uniform(lowest, highest), max(reached, default=lowest))


def _apps(
    rng: np.random.Generator, tables: list[PointTable], horizon_s: float, closed: bool
) -> list[_Drawn]:
    """The apps as they are at first."""
    slowest_ms = max(table.largest.latency_ms[-1] for table in tables)
    most = int(LOAD[1] * horizon_s * 1000 / (FRAMES * slowest_ms))
    count = max(1, min(_pick(rng, HOW_MANY), most))
    chosen = [tables[rng.integers(len(tables))] for _ in range(count)]
    floors = [_floor_pct(rng, table) for table in chosen]
    times = [_least_ms(table, floor) for table, floor in zip(chosen, floors, strict=True)]
    shares = _shares(rng, times, horizon_s)
    drawn = []
    for i in range(count):
        base = App(
            f"app{i}",
            chosen[i].model,
            deadline_ms=1.0,
            period_ms=times[i] / shares[i],
            accuracy_floor_pct=floors[i],
            priority=int(rng.integers(3)),
            start_unit=chosen[i].main_unit,
            announced=bool(rng.random() < IS_ANNOUNCED),
            **_stay(rng, horizon_s),
        )
        wait_ms = max((ms for k, ms in enumerate(times) if k != i), default=0.0)
        quiet = _Drawn(base, chosen[i], times[i], wait_ms)
        app = _arriving(rng, quiet, horizon_s, closed)
        drawn.append(replace(quiet, app=app))
    return drawn


def _shares(rng: np.random.Generator, times_ms: list[float], horizon_s: float) -> list[float]:
    """The shares of the time of apps whose frames take `times_ms`, `LOAD` together.

    Each has at least what `FRAMES` frames take; the rest is divided by chance.
    """
    least = [FRAMES * ms / (horizon_s * 1000) for ms in times_ms]
    lowest = max(LOAD[0], min(sum(least), LOAD[1]))
    total = lowest + (LOAD[1] - lowest) * rng.beta(*LOAD_SHAPE)
    rest = max(total - sum(least), 0.0)
    parts = rng.dirichlet([2.0] * len(times_ms)).tolist()
    return [share + rest * part for share, part in zip(least, parts, strict=True)]


def _stay(rng: np.random.Generator, horizon_s: float) -> dict[str, float]:
    """When an app comes and goes."""
    stay = {}
    if rng.random() < COMES_LATER:
        stay["start_s"] = round(horizon_s * rng.uniform(0.05, 0.35), 3)
    if rng.random() < LEAVES_EARLY:
        stay["end_s"] = round(horizon_s * rng.uniform(0.65, 0.95), 3)
    return stay


def _arriving(rng: np.random.Generator, quiet: _Drawn, horizon_s: float, closed: bool) -> App:
    """The app with the way its frames arrive, and with its deadline."""
    app = quiet.app
    arrival = _pick(rng, ARRIVALS)
    if closed and rng.random() < CLOSED_SHARE:
        arrival = CLOSED_LOOP[rng.integers(len(CLOSED_LOOP))]
    period_ms = app.period_ms
    span_ms = 1000 * ((app.end_s or horizon_s) - app.start_s)
    periods = BURSTY_PERIODS if arrival in ("server", "trace") else DEADLINE_PERIODS
    deadline_ms = max(period_ms * rng.uniform(*periods), quiet.tightest_ms)
    app = replace(app, arrival=arrival, deadline_ms=deadline_ms)
    frames = max(1, int(span_ms / period_ms))
    if arrival == "trace":
        times = _irregular(rng, frames, span_ms)
        return replace(app, period_ms=None, trace_ms=times)
    if arrival == "offline":
        busy = frames * quiet.least_ms / span_ms
        share = rng.uniform(min(max(0.3, ROOM * busy), 0.95), 0.95)
        return replace(app, period_ms=None, frames=frames, deadline_ms=share * span_ms)
    if arrival == "multi-stream":
        many = int(rng.integers(2, 5))
        return replace(app, period_ms=None, frames=many, deadline_ms=many * deadline_ms)
    if arrival == "single-stream":
        return replace(app, period_ms=None)
    return app


def _irregular(rng: np.random.Generator, frames: int, span_ms: float) -> tuple[float, ...]:
    """Times of arrival in a span, whose gaps scatter by 0.3 to 1.5 of their mean."""
    cv = rng.uniform(0.3, 1.5)
    gaps = rng.gamma(1 / cv**2, size=frames + 1) + 1e-9
    times_ms = span_ms * np.cumsum(gaps)[:-1] / gaps.sum()
    return tuple(times_ms.round(3).tolist())


def _requirements(rng: np.random.Generator, each: _Drawn, horizon_s: float) -> list[Change]:
    """One or two steps of what an app asks for, if any."""
    app, table = each.app, each.table
    # All frames of a batch are there from the start.
    if app.arrival == "offline" or rng.random() >= REQUIREMENTS_CHANGE:
        return []
    deadline_ms, least_ms = app.deadline_ms, each.least_ms
    kinds = ["deadline", "floor"]
    if app.arrival in ("periodic", "server"):
        kinds.append("period")
    end_s = app.end_s or horizon_s
    shares = np.sort(rng.uniform(0.1, 0.9, size=rng.integers(1, 3))).tolist()
    changes = []
    for share in shares:
        t_s = round(app.start_s + share * (end_s - app.start_s), 3)
        kind = kinds[rng.integers(len(kinds))]
        if kind == "deadline":
            tightest_ms = ROOM * (least_ms + each.wait_ms)
            deadline_ms = max(app.deadline_ms * rng.uniform(*STEP), tightest_ms)
            what = {"deadline_ms": deadline_ms}
        elif kind == "floor":
            floor_pct = _floor_pct(rng, table, within_ms=deadline_ms / ROOM - each.wait_ms)
            least_ms = _least_ms(table, floor_pct)
            what = {"accuracy_floor_pct": floor_pct}
        else:
            what = {"period_ms": app.period_ms * rng.uniform(*STEP)}
        announced = bool(rng.random() < IS_ANNOUNCED)
        changes.append(Change(t_s, app.name, announced=announced, **what))
    return changes


def _visits(rng: np.random.Generator, horizon_s: float, count: int) -> list[tuple[float, float]]:
    """So many spans (start, end in s) of the horizon, one after the other."""
    slot_s = horizon_s / count
    spans = []
    for i in range(count):
        start_s = slot_s * (i + rng.uniform(0.05, 0.5))
        end_s = start_s + slot_s * rng.uniform(0.15, 0.45)
        spans.append((round(start_s, 3), round(end_s, 3)))
    return spans


def _competitors(rng: np.random.Generator, unit: str, horizon_s: float) -> list[Change]:
    """One to three visits of somebody else's program on a unit, if any."""
    if rng.random() >= COMPETITOR:
        return []
    changes = []
    for start_s, end_s in _visits(rng, horizon_s, int(rng.integers(1, 4))):
        stretch = round(rng.uniform(*STRETCH), 3)
        changes.append(Change(start_s, unit=unit, stretch=stretch, announced=False))
        changes.append(Change(end_s, unit=unit, stretch=1.0, announced=False))
    return changes


def _clock_caps(
    rng: np.random.Generator, board: Board, name: str, horizon_s: float
) -> list[Change]:
    """A while in which a unit may not reach its highest clock, if any."""
    if rng.random() >= CAPPED:
        return []
    unit = board.unit(name)
    ((start_s, end_s),) = _visits(rng, horizon_s, 1)
    cap_mhz = unit.at_or_below(unit.max_mhz * rng.uniform(0.5, 0.95))
    return [
        Change(start_s, unit=name, cap_mhz=cap_mhz, announced=False),
        Change(end_s, unit=name, cap_mhz=0.0, announced=False),
    ]


def _lost(
    rng: np.random.Generator, drawn: list[_Drawn], board: Board, horizon_s: float
) -> list[Change]:
    """A while without one unit, if any, and what the apps there ask for meanwhile.

    Deadlines are then at least twice what the fastest network takes on the next best unit, periods
    leave everybody room there, and floors are no higher than what it can reach.
    """
    units = sorted({each.table.main_unit for each in drawn})
    unit = units[rng.integers(len(units))]
    stranded = any(set(each.table.units) == {unit} for each in drawn)
    if rng.random() >= LOST or stranded:
        return []
    ((start_s, end_s),) = _visits(rng, horizon_s, 1)
    changes = [
        Change(start_s, unit=unit, lost=True, announced=False),
        Change(end_s, unit=unit, lost=False, announced=False),
    ]
    for each in drawn:
        app = each.app
        if each.table.main_unit != unit or app.arrival == "offline":
            continue
        elsewhere = [p for name in each.table.units if name != unit for p in each.table.on(name)]
        fastest = min(elsewhere, key=lambda point: point.latency_ms[-1])
        slow_ms = 2 * fastest.latency_ms[-1]
        reached_pct = max(p.accuracy_val_pct for p in each.table.on(fastest.unit))
        meanwhile = {
            "deadline_ms": max(app.deadline_ms, slow_ms),
            "accuracy_floor_pct": min(app.accuracy_floor_pct, reached_pct),
        }
        before = {
            "deadline_ms": app.deadline_ms,
            "accuracy_floor_pct": app.accuracy_floor_pct,
        }
        if app.arrival in ("periodic", "server"):
            meanwhile["period_ms"] = max(app.period_ms, len(drawn) * slow_ms)
            before["period_ms"] = app.period_ms
        changes.append(Change(start_s, app.name, **meanwhile))
        changes.append(Change(end_s, app.name, **before))
    return changes


def _power_caps(rng: np.random.Generator, board: Board, horizon_s: float) -> list[Change]:
    """A while in which the board may draw less, if any: between waiting and all units busy."""
    known = board.static_mw is not None and all(unit.c_uw_mhz_v2 for unit in board.units)
    if rng.random() >= POWER_CAP or not known:
        return []
    highest = {unit.name: unit.max_mhz for unit in board.units}
    busy = {unit.name: float(unit.cores if unit.kind == "cpu" else 1) for unit in board.units}
    waiting_mw, full_mw = board.power_mw({}, {}), board.power_mw(highest, busy)
    power_mw = waiting_mw + rng.uniform(0.4, 0.9) * (full_mw - waiting_mw)
    ((start_s, end_s),) = _visits(rng, horizon_s, 1)
    return [Change(start_s, power_mw=power_mw), Change(end_s, power_mw=0.0)]


def _memory_caps(rng: np.random.Generator, drawn: list[_Drawn], horizon_s: float) -> list[Change]:
    """A while in which apps may hold less memory, if any, where the tables know what they hold.

    Between equal shares that let everybody meet its floor and such that let everybody run all.
    """
    needed_mb, whole_mb = 0.0, 0.0
    for each in drawn:
        points = each.table.on(each.table.main_unit)
        floor_pct = each.app.accuracy_floor_pct
        meets = [point.memory_mb for point in points if point.accuracy_val_pct >= floor_pct]
        needed_mb = max(needed_mb, min(meets))
        whole_mb = max(whole_mb, *(point.memory_mb for point in points))
    if rng.random() >= MEMORY_CAP or not needed_mb:
        return []
    memory_mb = len(drawn) * rng.uniform(needed_mb, whole_mb)
    ((start_s, end_s),) = _visits(rng, horizon_s, 1)
    return [Change(start_s, memory_mb=memory_mb), Change(end_s, memory_mb=0.0)]
