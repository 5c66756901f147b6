"""The decision log: one event a line, from which every number of a run can be computed again."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dynlib.errors import TableError
from dynlib.files import atomic_write, read_plain, shown

LOG_SCHEMA = 2
LOG_EVENTS = ("arrive", "start", "finish", "drop", "decide", "set", "sample")
LOG_FIELDS = (
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
)
_TEXTS = {"event", "app", "model", "subnet", "backend", "precision", "unit", "reason"}
_MOST = {True: 1e12, False: math.inf}  # of a time and of any other number; NaN is neither
_LOG_FIELDS = frozenset(LOG_FIELDS)
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

    def add(self, t_s: float, event: str, **values: Any) -> None:
        """Append an event; raises `TableError` for unknown names and for time going back."""
        if event not in LOG_EVENTS:
            raise TableError(f"unknown log event {event!r}; expected one of {LOG_EVENTS}")
        if not _LOG_FIELDS.issuperset(values):
            raise TableError(f"unknown log fields {sorted(set(values) - _LOG_FIELDS)}")
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
                self._journal.write(_line(entry))
            except OSError as error:  # a full disk ends the journal, not the run
                _LOG.warning("%s ends here: %s", self._journal.name, error)
                self._journal = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.events)

    def write(self, path: str | Path) -> Path:
        """Write header and events in one step."""
        lines = map(_line, (self.header, *self.events))
        return atomic_write(path, "".join(lines))

    def journal(self, path: str | Path) -> Path:
        """Write what there is, and from now on append every event as it comes: of a run that is
        killed only the line under way is lost. What `read` saved of one can be continued so."""
        file = self.write(path)
        self._journal = file.open("a", buffering=1, encoding="utf-8")
        return file

    @classmethod
    def read(cls, path: str | Path) -> "DecisionLog":
        """Read a log back; raises `TableError` naming file and line. A cut last line is dropped."""
        path = Path(path)
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
