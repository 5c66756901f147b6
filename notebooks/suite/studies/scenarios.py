"""The scenarios that managers are compared on, as data: relative to the table they are for."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches

import numpy as np

from dynlib.boards.board import Board
from dynlib.boards.thermal import AMBIENT_C
from dynlib.errors import WorkloadError
from dynlib.points import PointTable
from dynlib.runtime.case import Case
from dynlib.runtime.conditions import thermal_facts
from dynlib.workload import App, Change, Workload

HORIZON_S = 60.0


class Scale:
    """L, A_max, A_min and A_mid of one table: the largest and smallest network of its main unit."""

    def __init__(self, table: PointTable):
        self.table, self.model, self.unit = table, table.model, table.main_unit
        self.l_ms = table.largest.latency_ms[-1]
        # A slower network need not be the better one in a measured table.
        accuracies = [p.accuracy_val_pct for p in table.on(table.main_unit)]
        self.a_max, self.a_min = max(accuracies), min(accuracies)
        self.a_mid = (self.a_max + self.a_min) / 2

    def app(self, period_l: float, floor_pct: float, name: str = "app", **more) -> App:
        """A periodic app, deadline = period = `period_l` times L."""
        period_ms = period_l * self.l_ms
        more = {"start_unit": self.unit, "period_ms": period_ms, "deadline_ms": period_ms} | more
        return App(name, self.model, accuracy_floor_pct=max(floor_pct, 0.0), **more)

    def period(self, t_s: float, period_l: float, app: str = "app") -> Change:
        """Period and deadline become `period_l` times L."""
        return Change(t_s, app, period_ms=period_l * self.l_ms, deadline_ms=period_l * self.l_ms)


def _s4(s: Scale, rng: np.random.Generator):
    # Published Fig. 7: the second and third visit of the competitor come at random times.
    starts = np.sort(rng.uniform([12.0, 36.0], [26.0, 50.0]))
    visits = [(2.5, 10.0), *((t, t + 7.5) for t in starts.round(3).tolist())]
    steps = [(t, x) for start, end in visits for t, x in ((start, 1.33), (end, 1.0))]
    changes = [Change(t, unit=s.unit, stretch=x, announced=False) for t, x in steps]
    # 60 ms at 10 fps, where L is 61.735 ms; as shares of L it is the same scenario on any table.
    period_ms, deadline_ms = (s.l_ms * ms / 61.735 for ms in (100.0, 60.0))
    return [s.app(1, s.a_min, period_ms=period_ms, deadline_ms=deadline_ms)], changes


def _s8(s: Scale, rng: np.random.Generator):
    app = s.app(2.5, s.a_min, arrival="server", deadline_ms=4 * s.l_ms)
    bursts = [(t + dt, k) for t in range(10, 60, 10) for dt, k in ((0.0, 1.25), (2.0, 2.5))]
    return [app], [Change(t, "app", period_ms=k * s.l_ms, announced=False) for t, k in bursts]


_ONE: dict[str, Callable] = {
    "S1": lambda s, rng: ([s.app(2, s.a_max - 1.5)], []),
    "S2": lambda s, rng: ([s.app(2.5, s.a_min)], [s.period(20, 1.25), s.period(40, 4)]),
    "S3": lambda s, rng: (
        [s.app(2, s.a_max)],
        [Change(t, "app", accuracy_floor_pct=a) for t, a in ((20, s.a_min), (40, s.a_mid))],
    ),
    "S4": _s4,
    "S8": _s8,
    "S9": lambda s, rng: ([s.app(3.6, s.a_min)], [s.period(20, 1.2), s.period(40, 7.2)]),
}

_SEVERAL: dict[str, Callable] = {
    "T1": lambda s, cpu: ([s[0].app(4, s[0].a_max - 1.5, "a"), s[1].app(4, s[1].a_mid, "b")], []),
    "T2": lambda s, cpu: (
        [s[0].app(4, s[0].a_min, "a"), s[1].app(40, s[1].a_min, "b", start_unit=cpu)],
        [],
    ),
    "T3": lambda s, cpu: (
        [
            s[0].app(4, s[0].a_mid, "low"),
            s[1].app(2, s[1].a_mid, "high", priority=1, start_s=15.0, end_s=45.0, announced=False),
        ],
        [],
    ),
    "T4": lambda s, cpu: (
        [
            s[i].app(period, floor, "abcd"[i])
            for i, (period, floor) in enumerate(
                # A floor of A_max leaves one point: the static app.
                [(6, s[0].a_min), (8, s[1].a_mid), (12, s[2].a_max - 1.5), (20, s[3].a_max)]
            )
        ],
        [],
    ),
    "T5": lambda s, cpu: (
        [
            s[i].app(period, s[i].a_mid, f"app{i}", start_s=3.0 * i, end_s=40.0 + 2 * i)
            for i, period in enumerate((12, 16, 20, 24, 30, 40, 50, 60))
        ],
        [],
    ),
    "T6": lambda s, cpu: (
        [s[i].app(1.4, s[i].a_max, "ab"[i]) for i in range(2)],
        [
            c
            for i in range(2)
            for c in (
                s[i].period(20, 6, "ab"[i]),
                Change(20, "ab"[i], accuracy_floor_pct=s[i].a_min),
            )
        ],
    ),
}


def _s5(s: Scale, board: Board):
    unit = board.unit(s.unit)
    steps = ((15.0, unit.at_or_below(0.72 * unit.max_mhz)), (35.0, 0.0))
    return [s.app(2, s.a_mid)], [Change(t, unit=s.unit, cap_mhz=f, announced=False)
                                 for t, f in steps]  # fmt: skip


def _s6(s: Scale, board: Board):
    thermal_facts(board)  # raises where the board's heat is unknown
    return [s.app(1.5, s.a_min)], [Change(10, ambient_c=AMBIENT_C + 15, announced=False)]


def _s7(s: Scale, board: Board):
    # During the loss the deadline is twice what the fastest network takes on the next best unit.
    others = [s.table.on(u)[0].latency_ms[-1] for u in s.table.units if u != s.unit]
    slow_ms = max(2 * min(others, default=2 * s.l_ms), 4 * s.l_ms)
    lost = [Change(t, unit=s.unit, lost=x, announced=False) for t, x in ((20, True), (30, False))]
    needs = [Change(20, "app", period_ms=slow_ms, deadline_ms=slow_ms), s.period(30, 4)]
    return [s.app(4, s.a_min)], [*lost, *needs]


def _s10(s: Scale, board: Board):
    full_mw = board.power_mw({u.name: u.max_mhz for u in board.units},
                             {u.name: float(u.cores if u.kind == "cpu" else 1)
                              for u in board.units})  # fmt: skip
    cap_mw = (board.power_mw({}, {}) + full_mw) / 2
    return [s.app(2, s.a_min)], [Change(20, power_mw=cap_mw), Change(40, power_mw=0.0)]


def _s11(s: Scale, board: Board):
    if board.memory is None:
        raise WorkloadError(f"S11: board {board.name!r} has no memory clock")
    low, high = sorted(opp.freq_mhz for opp in board.memory.opps)[-2:]
    return [s.app(1.6, s.a_mid)], [Change(3.0 * i, emc_mhz=low if i % 2 else high, announced=False)
                                   for i in range(1, 20)]  # fmt: skip


_BOARD = {"S5": _s5, "S6": _s6, "S7": _s7, "S10": _s10, "S11": _s11}
SCENARIOS = tuple(sorted({*_ONE, *_BOARD}, key=lambda name: int(name[1:]))) + tuple(_SEVERAL)


def scenario(name: str, board: Board, tables: Mapping[str, PointTable], seed: int = 0) -> Case:
    """A scenario, S1 to S11 with one app, T1 to T6 with several, made for these tables.

    Scenarios with one app use the first table; with several, the tables in turn. Notebooks 05,
    06 and 19 describe them. `seed` draws what is random in a scenario (S4: when the competitor
    returns). Raises `WorkloadError` for an unknown name, and where the board lacks what it takes
    (S6: heat, S11: a memory clock).
    """
    if name not in SCENARIOS:
        close = get_close_matches(name, SCENARIOS, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise WorkloadError(f"unknown scenario {name!r}; {hint}known: {', '.join(SCENARIOS)}")
    scales = [Scale(table) for table in tables.values()]
    if name in _BOARD:
        apps, changes = _BOARD[name](scales[0], board)
    elif name in _ONE:
        apps, changes = _ONE[name](scales[0], np.random.default_rng([seed, 4]))
    else:
        cpu = next((u.name for u in board.cpus if tables[scales[-1].model].on(u.name)), "")
        apps, changes = _SEVERAL[name]([scales[i % len(scales)] for i in range(8)], cpu)
    return Case(Workload(name, HORIZON_S, tuple(apps), tuple(changes)), board, tables)
