"""What a policy sees and what it answers. Deciding is pure; only the loop around it acts.

A policy has `governors` (unit -> kernel governor; units not named obey `Action.clocks`), `static`
(asked only at the start and when something announced or capped changes, not for frames), and two
pure functions: ``decide(state, limits) -> Action``, which returns what it wants to remember in
`Action.memory` and finds it in `State.memory`; and ``choose(ready, now_ms) -> job``, one of the
jobs that a unit could run now, asked whenever it falls idle: at the start and after every segment.
It may have `late`, what becomes of frames late before they start: `drop` (default), `keep`, `last`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dynlib.setting import PLAIN, Setting

if TYPE_CHECKING:
    from dynlib.points import Point
    from dynlib.workload import Requirement


class Placement(NamedTuple):
    """The sub-network an app's next frames run, and where."""

    subnet: str
    unit: str
    setting: Setting = PLAIN


class Waiting(NamedTuple):
    """A frame that has arrived and not started."""

    arrival_ms: float
    deadline_at_ms: float
    floor_pct: float


class Running(NamedTuple):
    """A frame that has started; `ran` is how long it spent at each clock: ((MHz, ms), ...)."""

    subnet: str
    unit: str
    deadline_at_ms: float
    floor_pct: float
    ran: tuple[tuple[float, float], ...]
    setting: Setting = PLAIN


class Finished(NamedTuple):
    """A measurement: one frame's whole execution, as (MHz, ms) pairs."""

    app: str
    subnet: str
    unit: str
    ran: tuple[tuple[float, float], ...]
    setting: Setting = PLAIN


class AppState(NamedTuple):
    """One app that is there, or announced (`start_ms` in the future)."""

    name: str
    model: str
    need: "Requirement"
    arrival: str
    priority: int
    start_unit: str
    start_ms: float
    last_arrival_ms: float | None
    waiting: tuple[Waiting, ...]
    running: tuple[Running, ...]
    upcoming: tuple[tuple[float, "Requirement"], ...]
    frames: int = 1  # of an offline batch, or at a time in a closed loop

    def next_arrival_ms(self, now_ms: float, period_ms: float | None = None) -> float:
        """When its next periodic frame comes, at the announced periods, or at `period_ms` apart."""
        if self.last_arrival_ms is None:
            return max(self.start_ms, now_ms)
        next_ms = self.last_arrival_ms + (period_ms or self.need.period_ms)
        for t_ms, need in self.upcoming:
            if t_ms < next_ms:  # a new period counts from the last frame, but not back in time
                next_ms = min(next_ms, max(self.last_arrival_ms + need.period_ms, t_ms))
        return max(next_ms, now_ms)


class State(NamedTuple):
    """Everything observable at one time: no contention, no noise, no future but the announced."""

    t_ms: float
    apps: tuple[AppState, ...]
    clocks: Mapping[str, float]
    targets: Mapping[str, float]
    power_mw: float
    finished: tuple[Finished, ...]
    memory: Any
    emc: float = 1.0  # highest clock of the memory over its present one
    memory_mb: float = math.inf  # what the apps may hold together
    temp_c: float = math.nan  # of the board, where heat plays a part
    # By unit, of its CPU time just now, the share that other programs use, where that can be seen.
    others_pct: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Action:
    """What to do now; units and apps left out stay as they are.

    Args:
        placements: per app; None refuses it (its frames wait until it is too late for them).
        clocks: MHz per unit, OPPs of the unit.
        wake_ms: ask again at this time even when nothing happens; replaces an earlier such wish.
        reason: goes into the log.
        hold: apps none of whose frames shall start before the next decision.
        give_up: per app, drop its waiting frames that are due before this time (ms).
    """

    placements: Mapping[str, Placement | None] = field(default_factory=dict)
    clocks: Mapping[str, float] = field(default_factory=dict)
    wake_ms: float | None = None
    memory: Any = None
    reason: str = ""
    hold: frozenset[str] = frozenset()
    give_up: Mapping[str, float] = field(default_factory=dict)


class Ready(Protocol):
    """A job as `choose` sees it: one frame, started (`point` is its operating point) or waiting.

    `segment` is the number of the one it would run next; `ran` the time at each clock, MHz -> ms;
    `ended_ms` when it last ran, or came; `density` that of what its segments read, where known.
    """

    app: str
    frame: int
    priority: int
    arrival_ms: float
    deadline_at_ms: float
    point: "Point | None"
    segment: int
    ran: Mapping[float, float]
    ended_ms: float
    density: Sequence[float]


def share_done(point: "Point", ran: Iterable[tuple[float, float]], freqs: Sequence[float]) -> float:
    """The part of a frame that is done after it `ran`, at the speed of the table.

    Of a finished frame it is the measured over the expected time: 1.5 where it took half as long
    again. Example: 10 ms at 500 MHz, where all takes 40 ms, and 10 ms at 1000 MHz, where all takes
    20 ms: 0.25 + 0.5 = 0.75.
    """
    return sum([ms / point.latency_ms[freqs.index(mhz)] for mhz, ms in ran])


def fifo(ready: Sequence[Ready], now_ms: float) -> Ready:
    """First come, first served."""
    return min(ready, key=_ARRIVAL)


def edf(ready: Sequence[Ready], now_ms: float) -> Ready:
    """The earliest deadline first."""
    return min(ready, key=_DEADLINE)


_ARRIVAL = attrgetter("arrival_ms", "app", "frame")
_DEADLINE = attrgetter("deadline_at_ms", "arrival_ms", "app", "frame")


class Policy(Protocol):
    """See the module's docstring."""

    name: str
    static: bool
    governors: Mapping[str, str]

    def choose(self, ready: Sequence[Ready], now_ms: float) -> Ready:
        """One of `ready`, to run on an idle unit until its next segment ends."""

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """`limits`: the highest clock each unit may have now, in MHz; 0 where it is lost."""
