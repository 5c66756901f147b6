"""One face for any back end: units, knobs, sensors; changed under a lease as the kernel lists."""

import contextlib
import errno
import logging
import os
import queue
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dynlib.errors import MachineError, near
from dynlib.machine.control import (
    Clock,
    Knob,
    Missing,
    Parts,
    Reading,
    RealClock,
    Undo,
)
from dynlib.machine.lease import Lease
from dynlib.machine.window import Window
from dynlib.sysfs import SysFs, is_gone

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 4
_GIVE_UP = 3
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETIMEDOUT)  # trying again is no use
_DEADLINE_S = 0.1  # a snapshot waits so long for its slowest sensor


@dataclass(frozen=True, slots=True)
class Applied:
    """What a write led to: the value asked for, the one in force, and what went wrong ("")."""

    unit: str
    kind: str
    asked: object
    in_force: object
    problem: str = ""


class Machine:
    """Units, knobs and sensors of one machine. Turn knobs only inside `with machine:`.

    Whatever was turned is put back at the end of the block, also after an error, a signal or kill
    -9 (see `dynlib.machine.lease`). A knob that fails for good is refused from then on and the
    reason kept in `refused`; `level` says what is left: `control`, `watch` (sensors only), `blind`.

    Args:
        fs: where the machine's files are; None for one that only this process knows.
        folder: where the lease of a tree is kept; that of this machine has its own place.
        settle_s: how long a clock may take to reach what was asked (GPU 5 ms, memory 8 ms).
    """

    def __init__(
        self,
        name: str,
        parts: Parts,
        fs: SysFs | None,
        *,
        clock: Clock | None = None,
        folder: Path | None = None,
        settle_s: float = 0.02,
    ):
        self.name, self.fs, self.clock = name, fs, clock or RealClock()
        self.units = {unit.name: unit for unit in parts.units}
        self.knobs = {(knob.unit, knob.kind): knob for knob in parts.knobs}
        self.sensors = {sensor.name: sensor for sensor in parts.sensors}
        self.lacks = tuple(parts.lacks)
        self.refused: dict[tuple[str, str], str] = {}
        self.problems: dict[str, str] = {}
        self._folder, self._settle_s = folder, settle_s
        self._lease: Lease | None = None
        self._found: dict[tuple[str, str], object] = {}
        self._failures: Counter[tuple[str, str]] = Counter()
        self._reader: _Reader | None = None
        self._level = ""

    def __enter__(self) -> "Machine":
        self.problems = {}
        kinds = self._leased() if self.fs else ()
        if kinds:
            self._lease = Lease(
                self.fs,
                self._capture,
                own=kinds == {"process"},
                folder=self._folder,
                on_signal=self.restore,
            )
        else:
            self._lease = _NoLease(self._capture())
        return self

    def __exit__(self, *_) -> None:
        self.restore()
        self._lease = None

    def restore(self) -> dict[str, str]:
        """Put everything back now; returns, and logs, what could not be and why."""
        if self._lease is None or self._lease.closed:
            return self.problems
        stayed = {}
        try:
            for unit in self.units:
                self._yield_if_taken(unit)
            for key, knob in self.knobs.items():
                if knob.local and key in self._found:
                    why = self._put(knob, key, self._found[key])
                    if why:
                        stayed[".".join(key)] = why
        finally:
            self.problems = self._lease.release() | stayed
        for target, reason in self.problems.items():
            _LOG.warning("%s: %s is not as it was found: %s", self.name, target, reason)
        return self.problems

    def get(self, unit: str, kind: str):
        """The value in force, or `Missing`; raises `MachineError` for an unknown knob."""
        return _value(self._knob(unit, kind))

    def set(self, unit: str, kind: str, value) -> Applied:
        """Turn a knob and read it back.

        A failing write is repeated a few times; one that cannot succeed (no permission, the unit
        is gone, three failures running, another program took over) is never tried again. Raises
        `MachineError` for an unknown knob, a value that is not listed, or outside a `with` block.
        """
        knob, key = self._knob(unit, kind), (unit, kind)
        asked = knob.allowed(value)
        if self._lease is None or self._lease.closed:
            raise MachineError(f"{self.name}: {unit}.{kind} set outside of 'with machine:'")
        self._yield_if_taken(unit)
        if key in self.refused:
            return Applied(unit, kind, asked, _value(knob), self.refused[key])
        problem = self._put(knob, key, asked)
        if self._lease.closed:  # a signal restored everything in the middle of this write
            self._lease.restore()
        in_force = self._settled(knob, asked) if not problem else _value(knob)
        if knob.exclusive and not problem:
            self._found[key] = in_force
        if not problem and in_force != asked:
            problem = f"asked for {asked}, in force is {in_force}"
        self._note_level()
        return Applied(unit, kind, asked, in_force, problem)

    def read(self, name: str) -> Reading | Missing:
        """One sensor, at once; raises `MachineError` for an unknown one."""
        if name not in self.sensors:
            raise MachineError(f"{self.name}: no sensor {name!r}; {near(name, self.sensors)}")
        return self.sensors[name].read(self.clock)

    def snapshot(self) -> dict[str, Reading | Missing]:
        """All sensors; one that hangs is `Missing` and keeps neither us nor the others waiting."""
        reader = self._reader
        if reader is None or reader.stuck:
            hung = reader.hung if reader else set()
            self._reader = reader = _Reader(self.sensors.values(), self.clock, hung)
        return reader.snapshot(_DEADLINE_S)

    def measure(self) -> Window:
        """A window to measure in: ``with machine.measure() as m: work()``; see `Window`."""
        return Window(self.sensors.values(), self.clock)

    @property
    def level(self) -> str:
        """How much of the machine is left to us: `control`, `watch` or `blind`."""
        if any(key not in self.refused for key in self.knobs):
            return "control"
        readings = self.snapshot().values()  # does not wait for a sensor that hangs
        return "watch" if any(isinstance(r, Reading) for r in readings) else "blind"

    def _knob(self, unit: str, kind: str) -> Knob:
        if (unit, kind) not in self.knobs:
            asked, known = f"{unit}.{kind}", [".".join(key) for key in self.knobs]
            raise MachineError(f"{self.name}: no knob {asked}; {near(asked, known)}")
        return self.knobs[unit, kind]

    def _leased(self) -> frozenset[str]:
        """Kinds of the units whose changes outlive this process; what we may not write is refused.

        So an ordinary user, who can set nothing but the own process, keeps nobody away.
        """
        kinds = set()
        for key, knob in self.knobs.items():
            if knob.local:
                continue
            with contextlib.suppress(OSError, ValueError):
                if not all(_permitted(self.fs, step) for step in knob.undo()):
                    self.refused[key] = os.strerror(errno.EACCES)
                    continue
            kinds.add(self.units[knob.unit].kind)
        return frozenset(kinds)

    def _capture(self):
        undo = []
        for key, knob in self.knobs.items():
            if key in self.refused:
                continue
            try:
                steps = knob.undo()
                if knob.exclusive or knob.local:
                    self._found[key] = knob.get()
                undo += steps
            except (OSError, ValueError) as error:  # what cannot be put back is not touched
                self.refused[key] = f"its state cannot be read: {error}"
        return undo

    def _put(self, knob: Knob, key: tuple[str, str], value) -> str:
        for attempt in range(_ATTEMPTS):
            if attempt:
                self.clock.sleep(0.001 * 2 ** (attempt - 1))
            try:
                knob.put(value)
            except OSError as error:
                problem = error.strerror or str(error)
                final = error.errno in _DENIED or is_gone(error)
                if final:
                    break
            else:
                self._failures[key] = 0
                return ""
        self._failures[key] += 1
        if final or self._failures[key] >= _GIVE_UP:
            self.refused[key] = problem
            _LOG.warning("%s: %s.%s is given up: %s", self.name, *key, problem)
        return problem

    def _settled(self, knob: Knob, asked):
        waited_s, step_s = 0.0, 0.0005
        value = _value(knob)
        while value != asked and waited_s < self._settle_s:
            self.clock.sleep(step_s)
            waited_s += step_s
            step_s *= 2
            value = _value(knob)
        return value

    def _yield_if_taken(self, unit: str) -> None:
        for key, knob in self.knobs.items():
            if key[0] != unit or not knob.exclusive or key not in self._found:
                continue
            now = _value(knob)
            if key in self.refused or isinstance(now, Missing) or now == self._found[key]:
                continue
            reason = f"another program set {unit}.{knob.kind} to {now}: left to it"
            _LOG.warning("%s: %s", self.name, reason)
            self.refused |= {k: reason for k in self.knobs if k[0] == unit}
            self._lease.forget(set(knob.targets))

    def _note_level(self) -> None:
        before, self._level = self._level, self.level
        if before and before != self._level:
            _LOG.warning("%s: from %s to %s", self.name, before, self._level)


class _NoLease:
    """For a machine none of whose knobs outlives this process."""

    closed = False

    def __init__(self, undo):
        self.undo = undo

    def forget(self, targets: set[str]) -> None:
        pass

    def release(self) -> dict[str, str]:
        self.closed = True
        return {}


class _Reader:
    """Reads sensors in a thread of its own, so that a read that never returns hangs only that."""

    def __init__(self, sensors, clock: Clock, hung: set[str]):
        self.hung, self.stuck, self.clock = hung, False, clock
        self.sensors = [sensor for sensor in sensors if sensor.name not in hung]
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def snapshot(self, deadline_s: float) -> dict[str, Reading | Missing]:
        result: dict[str, Reading | Missing] = {}
        done = threading.Event()
        self.asked.put((result, done))
        answer: dict[str, Reading | Missing] = dict.fromkeys(self.hung, Missing("hangs"))
        if done.wait(deadline_s):
            return answer | result
        # The first that has not answered hangs; those behind it were only waiting for it.
        late = [sensor.name for sensor in self.sensors if sensor.name not in result]
        self.stuck = True
        self.hung = self.hung | {*late[:1]}
        return answer | dict.fromkeys(late, Missing("not read in time")) | result

    def _work(self) -> None:
        while not self.stuck:
            result, done = self.asked.get()
            for sensor in self.sensors:
                result[sensor.name] = sensor.read(self.clock)
            done.set()


def _permitted(fs: SysFs, step: Undo) -> bool:
    """Whether this user may take a step, as far as can be told without trying."""
    if step.kind in ("write", "command"):
        return fs.writable(step.target)
    return step.kind != "nvml" or os.geteuid() == 0


def _value(knob: Knob):
    try:
        return knob.get()
    except OSError as error:
        return Missing(error.strerror or str(error))
    except ValueError as error:
        return Missing(str(error))
