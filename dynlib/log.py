"""The decision log: one event a line, from which every number of a run can be computed again."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dynlib.errors import TableError
from dynlib.files import atomic_write, read_plain, shown

LOG_SCHEMA = 2
LOG_EVENTS = ("arrive", "start", "finish", "drop", "decide", "set", "sample")
LOG_FIELDS = {
    "t_s",
    "event",
    "app",
    "model",
    "frame",
    "subnet",
    "exit_threshold",
    "backend",
    "precision",
    "unit",
    "cores",
    "quota",
    "batch",
    "cpu_mhz",
    "gpu_mhz",
    "emc_mhz",
    "deadline_ms",
    "accuracy_floor_pct",
    "period_ms",
    "latency_ms",
    "power_mw",
    "energy_mj",
    "temp_c",
    "others_pct",
    "reason",
}
_TEXTS = {"event", "app", "model", "subnet", "backend", "precision", "unit", "reason"}
_MOST = {True: 1e12, False: math.inf}  # of a time and of any other number; NaN is neither
_LOG = logging.getLogger(__name__)


class DecisionLog:
    """Collects the events of one run in time order; `write` stores them as JSON lines.

    Attributes:
        most: at least so many of the last events stay in memory, at most twice as many; None: all.
            A journal has all of them.
    """

    def __init__(self, **header: Any):
        self.header = {"schema": LOG_SCHEMA, **header}
        self.events: list[dict[str, Any]] = []
        self.most: int | None = None
        self._journal: TextIO | None = None
        self._part = self._part_bytes = 0
        self._most_bytes = self._parts = math.inf

    def add(self, t_s: float, event: str, **values: Any) -> None:
        """Append an event; raises `TableError` for unknown names and for time going back."""
        if event not in LOG_EVENTS:
            raise TableError(f"unknown log event {event!r}; expected one of {LOG_EVENTS}")
        if not LOG_FIELDS.issuperset(values):
            raise TableError(f"unknown log fields {sorted(set(values) - LOG_FIELDS)}")
        if self.events:
            last_s = self.events[-1]["t_s"]
            if t_s < last_s:
                raise TableError(f"log time goes back: {t_s} s after {last_s} s")
        entry = {"t_s": t_s, "event": event, **values}
        self.events.append(entry)
        if self.most and len(self.events) > 2 * self.most:
            del self.events[: -self.most]
        if self._journal:
            try:
                self._part_bytes += self._journal.write(_line(entry))
                if self._part_bytes > self._most_bytes:
                    self._rotate()
            except OSError as error:  # a full disk ends the journal, not the run
                _LOG.warning("%s ends here: %s", self._journal.name, error)
                self._journal = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.events)

    def write(self, path: str | Path) -> Path:
        """Write header and events in one step."""
        lines = map(_line, (self.header, *self.events))
        return atomic_write(path, "".join(lines))

    def journal(
        self, path: str | Path, *, part_mb: float = math.inf, parts: float = math.inf
    ) -> Path:
        """Write what there is, and from now on append every event as it comes: of a run that is
        killed only the line under way is lost. What `read` saved of one can be continued so.

        What is longer than `part_mb` is kept as ``log.1.jsonl``, ``log.2.jsonl`` and so on beside
        ``log.jsonl``, the last `parts` of it.
        """
        file = self.write(path)
        self._part, self._part_bytes = 0, file.stat().st_size
        self._most_bytes, self._parts = 1e6 * part_mb, parts
        self._journal = file.open("a", buffering=1, encoding="utf-8")
        return file

    def _rotate(self) -> None:
        """Begin another part; whenever it is killed, what was written is found once."""
        file = Path(self._journal.name)
        self._part += 1
        kept = _part(file, self._part)
        kept.unlink(missing_ok=True)  # of an earlier log of this name
        os.link(file, kept)
        header = _line(self.header | {"part": self._part})
        atomic_write(file, header)  # a part counts from here on
        self._journal.close()
        self._journal, self._part_bytes = file.open("a", buffering=1, encoding="utf-8"), len(header)
        if self._part > self._parts:
            _part(file, self._part - int(self._parts)).unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> "DecisionLog":
        """Read a log back, with the parts that a journal was rotated into.

        A cut last line is dropped. Where the first parts are gone, the header's `first_part` says
        which one the log begins with. Raises `TableError` naming file and line.
        """
        path = Path(path)
        log = cls._read_part(path)
        number = log.header.pop("part", 0)
        if type(number) is not int or number < 0:
            raise TableError(f"{path}: part is {shown(number)}; expected a number of parts")
        earlier = []
        while number and (part := _part(path, number)).exists():
            earlier.append(cls._read_part(part).events)
            number -= 1
        if number:
            log.header["first_part"] = number + 1
        log.events = [event for events in (*reversed(earlier), log.events) for event in events]
        return log

    @classmethod
    def _read_part(cls, path: Path) -> "DecisionLog":
        try:
            lines = read_plain(path).decode().splitlines()
        except (OSError, ValueError) as error:  # not there, or no text
            raise TableError(f"{path}: cannot read a decision log: {error}") from error
        parsed = []
        for number, line in enumerate(lines, 1):
            try:
                parsed.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                if number == len(lines):
                    break
                raise TableError(f"{path}, line {number}: not JSON: {error}") from error
        header, *events = parsed or [None]
        if not isinstance(header, dict) or header.get("schema") != LOG_SCHEMA:
            raise TableError(f"{path}: no header of a decision log with schema {LOG_SCHEMA}")
        log = cls()
        log.header |= header
        for number, event in enumerate(events, 2):
            try:
                _check_event(event)
                log.add(**event)
                if "model" in event:  # of an app that joined when the header had been written
                    log.header["models"][event["app"]] = event["model"]
            except (TypeError, KeyError, TableError) as error:
                raise TableError(f"{path}, line {number}: no event: {error!r:.300}") from error
        return log


def _part(path: Path, number: int) -> Path:
    """``log.2.jsonl``, which stands before ``log.jsonl``."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _check_event(event: Any) -> None:
    """Raise `TypeError` for what no run writes: no object, a time or value that is no number."""
    if not isinstance(event, dict):
        raise TypeError(f"{type(event).__name__}; expected an object")
    for name, value in event.items():
        if name in _TEXTS:
            good = isinstance(value, str)
        else:
            good = isinstance(value, int | float) and abs(value) <= _MOST[name == "t_s"]
        if not good and value is not None:
            raise TypeError(f"{name} is {shown(value)}; expected a text or number as it applies")
    if not isinstance(event.get("t_s"), int | float):
        raise TypeError("no time t_s")


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True) + "\n"
