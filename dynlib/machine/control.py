"""The contract of a machine: knobs that turn, sensors that read, and the files under both.

What a back end supplies is `Parts`; `dynlib.machine.machine.Machine` makes a machine of them.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol

from dynlib.errors import MachineError

# kind of sensor: the plausible range of its value, whose unit is in the name
PLAUSIBLE = {
    "power_mw": (0.0, 2e6),
    "energy_mj": (0.0, math.inf),
    "temp_c": (-35.0, 125.0),
    "clock_mhz": (0.0, 20_000.0),
    "util_pct": (0.0, 100.0),
}


class Clock(Protocol):
    """Time as the back ends see it; a test hands in its own."""

    def now_ns(self) -> int:
        """Monotonic; stands still while the machine is suspended."""

    def boot_ns(self) -> int:
        """Monotonic; goes on while the machine is suspended."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class RealClock:
    """This machine's clocks; wall time is never asked, so its jumps have no effect."""

    now_ns = staticmethod(time.monotonic_ns)
    sleep = staticmethod(time.sleep)

    @staticmethod
    def boot_ns() -> int:
        """CLOCK_BOOTTIME, or the monotonic clock where there is none."""
        boottime = getattr(time, "CLOCK_BOOTTIME", None)
        return time.monotonic_ns() if boottime is None else time.clock_gettime_ns(boottime)


@dataclass(frozen=True, slots=True)
class Reading:
    """A value in the unit of its sensor's kind; `stale` if it has not changed for too long."""

    value: float
    t_ns: int
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """No value, and why: never a zero, never NaN."""

    reason: str


@dataclass(slots=True)
class Sensor:
    """One quantity of the machine.

    Args:
        kind: a key of `PLAUSIBLE`; says quantity and unit.
        fetch: the value; raises `OSError` or `ValueError` when there is none.
        period_s: how often the hardware renews it.
        total: whether it belongs to the sum that is the whole board's power or energy.
        span_mj: an energy counter starts again from 0 here; None where nobody knows.
        stale_after: so many equal values running are `stale`; 0 = never.
    """

    name: str
    kind: str
    fetch: Callable[[], float]
    period_s: float = 0.1
    total: bool = False
    span_mj: float | None = None
    stale_after: int = 0
    _last: float = field(default=math.nan, repr=False)
    _equal: int = field(default=0, repr=False)

    def read(self, clock: Clock) -> Reading | Missing:
        """The value now; whatever is wrong with it becomes `Missing` with the reason."""
        try:
            value = self.fetch()
        except OSError as error:
            return Missing(error.strerror or str(error))
        except ValueError as error:
            return Missing(str(error))
        low, high = PLAUSIBLE[self.kind]
        if not low <= value <= high:  # NaN fails too
            return Missing(f"implausible: {value:g}; expected {low:g}..{high:g} ({self.kind})")
        self._equal = self._equal + 1 if value == self._last else 0
        self._last = value
        return Reading(value, clock.now_ns(), 0 < self.stale_after <= self._equal)


@dataclass(frozen=True, slots=True)
class Undo:
    """One step back to the state a machine was found in; see `dynlib.machine.lease`.

    `persistent`: a reboot does not undo it either.
    """

    kind: str
    target: str
    value: str
    persistent: bool = False


class Knob(ABC):
    """Something of a unit that can be set.

    `choices` are the values the kernel lists; a knob without any takes what lies in `bounds`.
    `exclusive`: a value we did not set means that another program manages this unit now.
    `local`: it ends with this process, so that no lease is needed.
    """

    unit: str
    kind: str
    choices: tuple = ()
    bounds: tuple[float, float] | None = None
    exclusive = False
    local = False

    @abstractmethod
    def get(self):
        """The value in force; raises `OSError` or `ValueError`."""

    @abstractmethod
    def put(self, value) -> None:
        """Write a value that `allowed` returned; raises `OSError`."""

    def undo(self) -> list[Undo]:
        """How to put back what is in force now; raises `OSError` or `ValueError`."""
        return []

    def allowed(self, value):
        """The listed value that `value` names; raises `MachineError` if there is none."""
        number = isinstance(value, Real)
        if self.bounds and number and self.bounds[0] <= value <= self.bounds[1]:
            return value
        for choice in self.choices:
            near = (
                number and isinstance(choice, float) and math.isclose(value, choice, rel_tol=1e-7)
            )
            if value == choice or near:
                return choice
        low, high = self.bounds or (0, 0)
        expected = f"{low}..{high}" if self.bounds else f"one of {self.choices}"
        raise MachineError(f"{self.unit}.{self.kind}: {value!r}; expected {expected}")


@dataclass(frozen=True, slots=True)
class MachineUnit:
    """Something with knobs of its own: `kind` is cpu, gpu, memory, board or process."""

    name: str
    kind: str
    cpus: tuple[int, ...] = ()


@dataclass(slots=True)
class Parts:
    """What a back end found, and in `lacks` what it looked for in vain and why that matters."""

    units: list[MachineUnit] = field(default_factory=list)
    knobs: list[Knob] = field(default_factory=list)
    sensors: list[Sensor] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, n) + getattr(other, n) for n in Parts.__slots__))
