"""What is asked of a board: named apps, and a timeline of changes to what they and others want.

Arrival names follow MLPerf LoadGen (single-stream, multi-stream, server, offline), plus periodic,
trace, and pushed. What is offered never depends on who manages the board, except in the closed
loops (single-stream, multi-stream), where the next query waits for the answer to the last. Frames
that are pushed come from a program outside (`Loop.submit`), at times that no workload knows.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynlib.errors import WorkloadError, near

ARRIVALS = ("periodic", "single-stream", "multi-stream", "server", "offline", "trace", "pushed")
CLOSED_LOOP = ("single-stream", "multi-stream")
ANNOUNCE_MS = 1000.0  # so long before they apply does the manager hear of announced changes
LEAST_PERIOD_MS = 1e-3
MOST_FRAMES = 10**9  # that an app may offer, so that no run goes on for ever
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
            `multi-stream` 1 and `frames` at a time, as soon as those before are done; `pushed` when
            somebody submits them, every `period_ms` or, without one, at a rate to be learnt.
        deadline_ms: from a frame's arrival to its result.
        accuracy_floor_pct: a frame served by a less accurate network counts as missed.
        priority: higher is more important.
        memory_mb: what it holds while it is there.
        start_s, end_s: when it comes and goes (default: the whole horizon).
        start_unit: where policies that do not place apps run it (default: the fastest unit).
        announced: its coming is known 1 s ahead.

    >>> camera = App("camera", model="example", deadline_ms=40.0, period_ms=33.3)
    >>> camera.arrival, camera.accuracy_floor_pct
    ('periodic', 0.0)
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
        checks = _Checks(self)
        checks.above("deadline_ms")
        checks.range("accuracy_floor_pct", 0, 100)
        checks.range("memory_mb", 0)
        checks.range("start_s", 0)
        if self.arrival not in ARRIVALS:
            checks.wrong("arrival", f"another one; {near(self.arrival, ARRIVALS)}")
        if self.arrival in ("periodic", "server"):
            if self.period_ms is None:
                checks.wrong("period_ms", f"a time above 0 for {self.arrival} arrival")
            else:
                checks.range("period_ms", LEAST_PERIOD_MS)
        if not 1 <= self.frames <= MOST_FRAMES:
            checks.wrong("frames", f"a number from 1 to {MOST_FRAMES}")
        if [*self.trace_ms] != sorted(self.trace_ms) or any(t < 0 for t in self.trace_ms):
            checks.wrong("trace_ms", "times >= 0 in ascending order")
        if self.end_s is not None and not self.end_s > self.start_s:
            checks.wrong("end_s", f"a time after start_s = {self.start_s:g}")
        checks.done()


# What may change, and whose it is.
_CHANGES = {
    "deadline_ms": "app",
    "period_ms": "app",
    "accuracy_floor_pct": "app",
    "cap_mhz": "unit",
    "stretch": "unit",
    "lost": "unit",
    "emc_mhz": "board",
    "power_mw": "board",
    "memory_mb": "board",
    "ambient_c": "board",
}
# Lowest and highest value; the others, `lost` apart, are above 0.
_RANGES = {
    "period_ms": (LEAST_PERIOD_MS, math.inf),
    "accuracy_floor_pct": (0, 100),
    "cap_mhz": (0, math.inf),
    "power_mw": (0, math.inf),
    "memory_mb": (0, math.inf),
    "stretch": (1, math.inf),
    "ambient_c": (-60, 100),
}


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

    >>> Change(5.0, "camera", deadline_ms=20.0).announced  # known one second ahead
    True
    >>> Change(5.0, unit="gpu", stretch=1.5, announced=False).stretch  # somebody else's program
    1.5
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
        checks = _Checks(self)
        checks.range("t_s", 0)
        whose = "app" if self.app else "unit" if self.unit else "board"
        changed = [key for key in _CHANGES if getattr(self, key) is not None]
        if self.app and self.unit:
            checks.wrong("app", "either app or unit")
        elif not changed or any(_CHANGES[key] != whose for key in changed):
            key = "app" if self.app else "unit"
            checks.wrong(
                key,
                "deadline_ms, period_ms or accuracy_floor_pct of an app; cap_mhz, stretch or lost "
                "of a unit; or emc_mhz, power_mw, memory_mb or ambient_c of the board",
            )
        for key in changed:
            if key in _RANGES:
                checks.range(key, *_RANGES[key])
            elif key != "lost":
                checks.above(key)
        checks.done()

    @property
    def requirements(self) -> list[float | None]:
        """The new deadline, period and floor; None where nothing changes."""
        return [self.deadline_ms, self.period_ms, self.accuracy_floor_pct]


@dataclass(frozen=True, slots=True)
class Workload:
    """Apps and changes over `horizon_s`; names of apps are unique, changes sorted by time.

    An infinite horizon is that of a live run that goes on until it is stopped.

    >>> camera = App("camera", model="example", deadline_ms=40.0, period_ms=100.0)
    >>> stricter = Change(0.5, "camera", deadline_ms=20.0)
    >>> workload = Workload("street", 1.0, (camera,), (stricter,))
    >>> [(t_ms, need.deadline_ms) for t_ms, need in workload.arrivals(camera, seed=0)][4:7]
    [(400.0, 40.0), (500.0, 20.0), (600.0, 20.0)]
    """

    name: str
    horizon_s: float
    apps: tuple[App, ...] = ()
    changes: tuple[Change, ...] = ()

    def __post_init__(self):
        checks = _Checks(self)
        if self.horizon_s != math.inf:
            checks.above("horizon_s")
        names = [app.name for app in self.apps]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                twice = f"{name!r} is there twice; expected different names"
                checks.lines.append(f"{self.name}, apps: {twice}")
        for change in self.changes:
            if change.app and change.app not in names:
                unknown = f"got app {change.app!r}; expected one of {names}"
                checks.lines.append(f"{self.name}, changes: {unknown}")
        for app in self.apps:
            if math.isfinite(self.horizon_s) and app.arrival in ("periodic", "server"):
                least_ms = min(need.period_ms for _, need in self.timeline(app))
                if self.horizon_s * 1000 / least_ms > MOST_FRAMES:
                    many = f"{app.name!r} offers more than {MOST_FRAMES} frames"
                    checks.lines.append(f"{self.name}, apps: {many}; expected a longer period_ms")
        checks.done()
        in_time = sorted(self.changes, key=lambda change: change.t_s)
        object.__setattr__(self, "changes", tuple(in_time))

    @property
    def digest(self) -> str:
        """SHA-256 of the content, for the header of a log."""
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def app(self, name: str) -> App:
        """The app of that name."""
        return next(app for app in self.apps if app.name == name)

    def timeline(self, app: App) -> list[tuple[float, Requirement]]:
        """What `app` requires from each time (ms) on, in time order."""
        period_ms = app.period_ms or app.deadline_ms
        need = Requirement(app.deadline_ms, period_ms, app.accuracy_floor_pct)
        steps = [(-math.inf, need)]
        for change in self.changes:
            if change.app == app.name:
                pairs = zip(change.requirements, need, strict=True)
                need = Requirement(*(old if new is None else new for new, old in pairs))
                steps.append((change.t_s * 1000, need))
        return steps

    def arrivals(
        self, app: App, seed: int, steps: list[tuple[float, Requirement]] | None = None
    ) -> Iterator[tuple[float, Requirement]]:
        """(time in ms, requirement) of every frame offered in open loop, in time order.

        A frame whose deadline lies behind the end of the horizon is not offered, so that the fate
        of every offered one is known. A new period counts from the last frame, and never reaches
        back before the change. `steps`: another timeline, which may grow meanwhile.
        """
        steps = self.timeline(app) if steps is None else steps
        for t_ms in self._times(app, steps, seed):
            need = requirement_at(steps, t_ms)
            if self.fits(t_ms, need):
                yield t_ms, need

    def _times(self, app: App, steps: list, seed: int) -> Iterator[float]:
        start_ms, end_ms = app.start_s * 1000, self.end_ms(app)
        if app.arrival in CLOSED_LOOP or app.arrival == "pushed":
            return
        if app.arrival in ("offline", "trace"):
            given = repeat(0.0, app.frames) if app.arrival == "offline" else app.trace_ms
            times = (start_ms + t_ms for t_ms in given)
            yield from (t_ms for t_ms in times if t_ms < end_ms)
            return
        random = app.arrival == "server"
        rng = app_rng(seed, app.name, "arrivals")
        t_ms = start_ms
        if random:
            t_ms += rng.exponential(app.period_ms)
        while t_ms < end_ms - _SAME_MS:
            yield t_ms
            gap = rng.exponential(1.0) if random else 1.0
            next_ms = t_ms + gap * requirement_at(steps, t_ms).period_ms
            for change_ms, need in steps[1:]:
                if t_ms + _SAME_MS < change_ms < next_ms:
                    next_ms = max(t_ms + gap * need.period_ms, change_ms)
            t_ms = next_ms

    def fits(self, t_ms: float, need: Requirement) -> bool:
        """Whether a frame that arrives at `t_ms` has its deadline within the horizon."""
        return t_ms + need.deadline_ms <= self.horizon_s * 1000 + _SAME_MS

    def end_ms(self, app: App) -> float:
        """When `app` stops asking."""
        end_s = self.horizon_s if app.end_s is None else min(app.end_s, self.horizon_s)
        return end_s * 1000


def requirement_at(steps: list[tuple[float, Requirement]], t_ms: float) -> Requirement:
    """The requirement in force at `t_ms`; a change applies from its own instant on."""
    return next(need for start_ms, need in reversed(steps) if start_ms <= t_ms + _SAME_MS)


def app_rng(seed: int, app: str, purpose: str) -> np.random.Generator:
    """A generator of one app's own, so that what happens to it does not depend on the others."""
    return np.random.default_rng([seed, zlib.crc32(f"{app}/{purpose}".encode())])


def load_workload(path: str | Path) -> Workload:
    """Read a workload from a TOML file; raises `WorkloadError` naming file, key and expectation
    of everything that is wrong, a line each.

    The file has `name`, `horizon_s`, an ``[[app]]`` table per `App` and a ``[[change]]`` table per
    `Change`, with their fields as keys.

    >>> from pathlib import Path
    >>> text = '''
    ... name = "street"
    ... horizon_s = 10.0
    ...
    ... [[app]]
    ... name = "camera"
    ... model = "example"
    ... deadline_ms = 40.0
    ... period_ms = 33.3
    ... '''
    >>> _ = Path("street.toml").write_text(text)
    >>> [app.name for app in load_workload("street.toml").apps]
    ['camera']
    """
    # Whoever only states workloads, such as the author of a policy, need not pay for the reader.
    from dynlib.toml import Table, read_toml

    content, _ = read_toml(path, WorkloadError)
    table = Table(content, path, WorkloadError)
    apps = table.records("app", lambda app: app.record(App))
    changes = table.records("change", lambda change: change.record(Change))
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


class _Checks:
    """Collects what is wrong with an item, a line each, for one error."""

    def __init__(self, item: Any):
        self.item, self.lines = item, []

    def above(self, key: str) -> None:
        """The value has to be finite and above 0."""
        value = getattr(self.item, key)
        if not (math.isfinite(value) and value > 0):
            self.wrong(key, "a number above 0")

    def range(self, key: str, low: float, high: float = math.inf) -> None:
        """The value has to be finite and within these."""
        value = getattr(self.item, key)
        if not (math.isfinite(value) and low <= value <= high):
            self.wrong(key, f"a number from {low:g} to {high:g}")

    def wrong(self, key: str, expected: str) -> None:
        """Another line."""
        who = getattr(self.item, "name", "") or type(self.item).__name__
        self.lines.append(f"{who}, {key}: got {getattr(self.item, key)!r}, expected {expected}")

    def done(self) -> None:
        """Raise the error, if there is one."""
        if self.lines:
            raise WorkloadError("\n".join(self.lines))
