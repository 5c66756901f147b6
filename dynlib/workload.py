"""What is asked of a board: named apps, and a timeline of changes to what they and others want.

Arrival names follow MLPerf LoadGen (single-stream, multi-stream, server, offline), plus periodic
and trace. What is offered never depends on who manages the board, except in the closed loops
(single-stream, multi-stream), where the next query waits for the answer to the last.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynlib.errors import WorkloadError, near

ARRIVALS = ("periodic", "single-stream", "multi-stream", "server", "offline", "trace")
CLOSED_LOOP = ("single-stream", "multi-stream")
ANNOUNCE_MS = 1000.0  # so long before they apply does the manager hear of announced changes
_SAME_MS = 1e-6


class Requirement(NamedTuple):
    """What an app asks for at one time: times in ms, the floor in percent."""

    deadline_ms: float
    period_ms: float
    floor_pct: float


@dataclass(frozen=True, slots=True)
class App:
    """One app.

    Args:
        model: name of its operating-point table.
        arrival: `periodic` every `period_ms`; `server` Poisson with mean gap `period_ms`; `trace`
            at `trace_ms` after the start; `offline` `frames` at the start; `single-stream` and
            `multi-stream` 1 and `frames` at a time, as soon as those before are done.
        deadline_ms: from a frame's arrival to its result.
        accuracy_floor_pct: a frame served by a less accurate network counts as missed.
        priority: higher is more important.
        memory_mb: what it holds while it is there.
        start_s, end_s: when it comes and goes (default: the whole horizon).
        start_unit: where policies that do not place apps run it (default: the fastest unit).
        announced: its coming is known 1 s ahead.
    """

    name: str
    model: str
    deadline_ms: float
    arrival: str = "periodic"
    period_ms: float | None = None
    trace_ms: tuple[float, ...] = ()
    frames: int = 1
    accuracy_floor_pct: float = 0.0
    priority: int = 0
    memory_mb: float = 0.0
    start_s: float = 0.0
    end_s: float | None = None
    start_unit: str = ""
    announced: bool = True

    def __post_init__(self):
        _above(self, "deadline_ms")
        _range(self, "accuracy_floor_pct", 0, 100)
        _range(self, "memory_mb", 0)
        _range(self, "start_s", 0)
        if self.arrival not in ARRIVALS:
            _fail(self, "arrival", f"another one; {near(self.arrival, ARRIVALS)}")
        if self.arrival in ("periodic", "server"):
            if self.period_ms is None:
                _fail(self, "period_ms", f"a time above 0 for {self.arrival} arrival")
            _above(self, "period_ms")
        if self.frames < 1:
            _fail(self, "frames", "at least 1")
        if list(self.trace_ms) != sorted(self.trace_ms) or any(t < 0 for t in self.trace_ms):
            _fail(self, "trace_ms", "times >= 0 in ascending order")
        if self.end_s is not None and not self.end_s > self.start_s:
            _fail(self, "end_s", f"a time after start_s = {self.start_s:g}")


@dataclass(frozen=True, slots=True)
class Change:
    """Something that changes at `t_s`: an app's requirements, or what others do to the board.

    Args:
        app: whose `deadline_ms`, `period_ms` or `accuracy_floor_pct` change, or
        unit: whose highest clock is capped at `cap_mhz` (0: no cap), or that competitors slow down:
            they stretch execution by `stretch`, and keep 1 - 1/stretch of the unit busy when no app
            of ours runs there (1: nobody), or that is `lost` (a frame on it starts again), or
        neither: the memory runs at `emc_mhz`, the board may draw `power_mw` (0: no cap; see
            `conditions`), apps may hold `memory_mb` together (0: no cap), or the air around the
            board is at `ambient_c` (in a room before; see `heat`).
        announced: a requirement is known 1 s ahead. Unannounced, a new deadline or floor is known
            when it applies, a new period never is. A cap is known when it applies, a stretch never,
            the air only by the board's temperature.
    """

    t_s: float
    app: str = ""
    unit: str = ""
    deadline_ms: float | None = None
    period_ms: float | None = None
    accuracy_floor_pct: float | None = None
    cap_mhz: float | None = None
    stretch: float | None = None
    lost: bool | None = None
    emc_mhz: float | None = None
    power_mw: float | None = None
    memory_mb: float | None = None
    ambient_c: float | None = None
    announced: bool = True

    def __post_init__(self):
        _range(self, "t_s", 0)
        if self.app and self.unit:
            _fail(self, "app", "either app or unit")
        kinds = [self.requirements, [self.cap_mhz, self.stretch, self.lost],
                 [self.emc_mhz, self.power_mw, self.memory_mb, self.ambient_c]]  # fmt: skip
        what = kinds.pop(0 if self.app else 1 if self.unit else 2)
        if any(v is not None for wrong in kinds for v in wrong) or all(v is None for v in what):
            _fail(self, "app" if self.app else "unit", "deadline_ms, period_ms or "
                  "accuracy_floor_pct of an app; cap_mhz, stretch or lost of a unit; or emc_mhz, "
                  "power_mw, memory_mb or ambient_c of the board")  # fmt: skip
        for key in ("deadline_ms", "period_ms", "emc_mhz"):
            if getattr(self, key) is not None:
                _above(self, key)
        for key, low, high in (("accuracy_floor_pct", 0, 100), ("cap_mhz", 0, math.inf),
                               ("power_mw", 0, math.inf), ("memory_mb", 0, math.inf),
                               ("stretch", 1, math.inf), ("ambient_c", -60, 100)):  # fmt: skip
            if getattr(self, key) is not None:
                _range(self, key, low, high)

    @property
    def requirements(self) -> list[float | None]:
        """The new deadline, period and floor; None where nothing changes."""
        return [self.deadline_ms, self.period_ms, self.accuracy_floor_pct]


@dataclass(frozen=True, slots=True)
class Workload:
    """Apps and changes over `horizon_s`; names of apps are unique, changes sorted by time."""

    name: str
    horizon_s: float
    apps: tuple[App, ...]
    changes: tuple[Change, ...] = ()

    def __post_init__(self):
        _above(self, "horizon_s")
        names = [app.name for app in self.apps]
        for name in names:
            if names.count(name) > 1:
                _fail(self, "apps", f"different names; {name!r} is there twice", show=False)
        for change in self.changes:
            if change.app and change.app not in names:
                _fail(self, "changes", f"an app of {names}, got {change.app!r}", show=False)
        object.__setattr__(self, "changes", tuple(sorted(self.changes, key=lambda c: c.t_s)))

    @property
    def digest(self) -> str:
        """SHA-256 of the content, for the header of a log."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def app(self, name: str) -> App:
        """The app of that name."""
        return next(app for app in self.apps if app.name == name)

    def timeline(self, app: App) -> list[tuple[float, Requirement]]:
        """What `app` requires from each time (ms) on, in time order."""
        period_ms = app.period_ms or app.deadline_ms
        now = Requirement(app.deadline_ms, period_ms, app.accuracy_floor_pct)
        steps = [(-math.inf, now)]
        for change in self.changes:
            if change.app == app.name:
                pairs = zip(change.requirements, now, strict=True)
                now = Requirement(*(old if new is None else new for new, old in pairs))
                steps.append((change.t_s * 1000, now))
        return steps

    def arrivals(self, app: App, seed: int) -> Iterator[tuple[float, Requirement]]:
        """(time in ms, requirement) of every frame offered in open loop, in time order.

        A frame whose deadline lies behind the end of the horizon is not offered, so that the fate
        of every offered one is known. A new period counts from the last frame, and never reaches
        back before the change.
        """
        steps = self.timeline(app)
        start_ms, end_ms = app.start_s * 1000, self.end_ms(app)
        if app.arrival in CLOSED_LOOP:
            return
        if app.arrival in ("offline", "trace"):
            times = [0.0] * app.frames if app.arrival == "offline" else app.trace_ms
            for t_ms in times:
                need = requirement_at(steps, start_ms + t_ms)
                if start_ms + t_ms < end_ms and self.fits(start_ms + t_ms, need):
                    yield start_ms + t_ms, need
            return
        rng = app_rng(seed, app.name, "arrivals")
        first_ms = rng.exponential(app.period_ms) if app.arrival == "server" else 0.0
        t_ms = start_ms + first_ms
        while t_ms < end_ms - _SAME_MS:
            need = requirement_at(steps, t_ms)
            if self.fits(t_ms, need):
                yield t_ms, need
            gap = rng.exponential(1.0) if app.arrival == "server" else 1.0
            ahead_ms = t_ms + gap * need.period_ms
            for change_ms, new in steps[1:]:
                if t_ms + _SAME_MS < change_ms < ahead_ms:
                    ahead_ms = max(t_ms + gap * new.period_ms, change_ms)
            t_ms = ahead_ms

    def fits(self, t_ms: float, need: Requirement) -> bool:
        """Whether a frame that arrives at `t_ms` has its deadline within the horizon."""
        return t_ms + need.deadline_ms <= self.horizon_s * 1000 + _SAME_MS

    def end_ms(self, app: App) -> float:
        """When `app` stops asking."""
        return min(self.horizon_s, math.inf if app.end_s is None else app.end_s) * 1000


def requirement_at(steps: list[tuple[float, Requirement]], t_ms: float) -> Requirement:
    """The requirement in force at `t_ms`; a change applies from its own instant on."""
    return next(need for start_ms, need in reversed(steps) if start_ms <= t_ms + _SAME_MS)


def app_rng(seed: int, app: str, purpose: str) -> np.random.Generator:
    """A generator of one app's own, so that what happens to it does not depend on the others."""
    return np.random.default_rng([seed, zlib.crc32(f"{app}/{purpose}".encode())])


def load_workload(path: str | Path) -> Workload:
    """Read a workload from a TOML file; raises `WorkloadError` naming file, key and expectation.

    The file has `name`, `horizon_s`, an ``[[app]]`` table per `App` and a ``[[change]]`` table per
    `Change`, with their fields as keys.
    """
    # Whoever only states workloads, such as the author of a policy, need not pay for the reader.
    from dynlib.toml import Table, read_toml

    content, _ = read_toml(path, WorkloadError)
    table = Table(content, path, WorkloadError)
    apps = tuple(app.record(App) for app in table.tables("app"))
    changes = tuple(change.record(Change) for change in table.tables("change"))
    return table.record(Workload, {"apps": apps, "changes": changes})


def dump_workload(workload: Workload, path: str | Path) -> Path:
    """Write a workload as TOML; `load_workload` reads the same one back."""
    from dynlib.files import atomic_write
    from dynlib.toml import entries

    lines = entries(workload, ("name", "horizon_s"))
    for app in workload.apps:
        lines += ["", "[[app]]", *entries(app)]
    for change in workload.changes:
        lines += ["", "[[change]]", *entries(change)]
    return atomic_write(path, "\n".join(lines) + "\n")


def _above(item: Any, key: str) -> None:
    if not (math.isfinite(getattr(item, key)) and getattr(item, key) > 0):
        _fail(item, key, "a number above 0")


def _range(item: Any, key: str, low: float, high: float = math.inf) -> None:
    value = getattr(item, key)
    if not (math.isfinite(value) and low <= value <= high):
        _fail(item, key, f"a number from {low:g} to {high:g}")


def _fail(item: Any, key: str, expected: str, show: bool = True):
    got = f" got {getattr(item, key)!r}," if show else ""
    raise WorkloadError(f"{getattr(item, 'name', '') or type(item).__name__}, {key}:{got} "
                        f"expected {expected}")  # fmt: skip
