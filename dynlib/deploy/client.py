"""A program's end of the manager service: told before each frame, reporting after it.

Needs the standard library alone. Where nobody manages, or nobody does any more, the network that
was told last serves on, and the service is looked for again at every frame.
"""

import contextlib
import json
import logging
import math
import os
import select
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynlib.errors import ServiceError
from dynlib.setting import Setting

MESSAGE_BYTES = 1 << 17  # of one line
_START_S = 2.0  # for the first answer
_RETRY_S = 0.1  # until the next look for a service
_REFUSED_S = 1.0  # and after it has refused us
_SLACK_S = 0.25  # beyond the deadline, within which a service that lives has answered
_LOST = (OSError, ServiceError, ValueError, LookupError, TypeError)
_LOG = logging.getLogger(__name__)


class Order(NamedTuple):
    """What to serve a frame with.

    Args:
        cpus: those of the unit; none on a GPU.
        managed: whether the service said so; else it is what it said last.
    """

    subnet: str
    unit: str
    setting: Setting
    cpus: tuple[int, ...]
    deadline_ms: float
    managed: bool


class Client:
    """One program, as the manager service knows it; of one thread.

    Args:
        name: no other program's.
        table: its operating points, rows as of `dynlib.points.make_table`; `board`, `model` and
            `batch` may be left out. The first serves until a service has said anything.
        period_ms: between two frames; None: to be learnt.
        path: the service's socket; default `socket_path()`.
        pin: whether to stay on the CPUs of the unit while managed.

    What the service refused, and why, is in `problem`, and a warning. It is asked again.

    >>> rows = [{"subnet": "small", "unit": "cpu", "latency_ms": 2.0, "accuracy_val_pct": 70.0,
    ...          "source": "measured"}]
    >>> client = Client("camera", rows, deadline_ms=40.0, path="nobody.sock")
    >>> for frame in range(3):
    ...     order = client.ask()
    ...     if order:  # None: it would be too late
    ...         answer = f"{order.subnet} answers frame {frame}"
    ...         client.done()
    >>> order.subnet, order.managed
    ('small', False)
    """

    def __init__(
        self,
        name: str,
        table: Iterable[Mapping[str, Any]],
        *,
        deadline_ms: float,
        period_ms: float | None = None,
        accuracy_floor_pct: float = 0.0,
        priority: int = 0,
        path: str | Path | None = None,
        pin: bool = True,
    ):
        self.path, self.pin, self.problem = socket_path(path), pin, ""
        rows = [dict(row) for row in table]
        self._register = {
            "do": "register",
            "name": name,
            "table": rows,
            "deadline_ms": deadline_ms,
            "period_ms": period_ms,
            "accuracy_floor_pct": accuracy_floor_pct,
            "priority": priority,
        }
        first = rows[0]
        settings = {key: first[key] for key in Setting._fields if first.get(key) is not None}
        self.last = Order(
            first["subnet"], first["unit"], Setting(**settings), (), deadline_ms, False
        )
        self._line: _Line | None = None
        self._registered = self._owes = False
        self._retry_s = self._asked_s = 0.0
        self._found: set[int] | None = None  # the CPUs before we were pinned
        self._look(wait_s=_START_S)

    @property
    def managed(self) -> bool:
        """Whether a service knows this program."""
        return self._registered

    def ask(self) -> Order | None:
        """What the next frame is to be served with; None: not at all, it would be too late."""
        if not self._registered:
            self._look()
        order = self.last._replace(managed=False)
        if self._registered:
            try:
                self._line.send({"do": "ask"})
                reply = self._line.receive(self.last.deadline_ms / 1000 + _SLACK_S)
                if reply is None:
                    raise OSError("it does not answer")
                order = None if "drop" in reply else self._order(reply)
            except _LOST as error:
                self._lose(error)
        self._owes = order is not None and order.managed
        if order:
            self._pin(order.cpus if order.managed else ())
            self.last = order
        self._asked_s = time.perf_counter()
        return order

    def done(self, latency_ms: float | None = None) -> None:
        """The frame has its answer, after this time; default: since `ask` returned."""
        if latency_ms is None:
            latency_ms = 1000 * (time.perf_counter() - self._asked_s)
        if self._owes:
            self._owes = False
            try:
                self._line.send({"do": "done", "ms": latency_ms})
            except _LOST as error:
                self._lose(error)

    def close(self) -> None:
        """Leave."""
        if self._line:
            self._line.close()
        self._line, self._registered, self._owes = None, False, False
        self._pin(())

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _order(self, reply: Mapping[str, Any]) -> Order:
        need = {key: reply[key] for key in ("deadline_ms", "accuracy_floor_pct")}
        self._register |= need  # as others may have set it
        setting = Setting(**reply["setting"])
        return Order(
            reply["subnet"],
            reply["unit"],
            setting,
            tuple(reply["cpus"]),
            need["deadline_ms"],
            managed=True,
        )

    def _look(self, wait_s: float = 0.0) -> None:
        """Find the service and register; it may answer later, a frame does not wait for it."""
        try:
            if self._line is None:
                if time.monotonic() < self._retry_s:
                    return
                self._line = _Line(self.path)
                self._line.send(self._register)
            if self._line.receive(wait_s) is not None:
                self._registered, self.problem = True, ""
        except _LOST as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if str(error) != self.problem:
            self.problem = str(error)
            _LOG.warning("%s: not managed: %s", self.path, error)
        self.close()
        pause_s = _REFUSED_S if isinstance(error, ServiceError) else _RETRY_S
        self._retry_s = time.monotonic() + pause_s

    def _pin(self, cpus: Iterable[int]) -> None:
        if not self.pin or not (cpus or self._found):
            return
        before = os.sched_getaffinity(0)
        self._found = self._found or before
        wanted = set(cpus) & self._found or self._found
        if wanted != before:
            for task in Path("/proc/self/task").iterdir():  # the mask is each thread's own
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(task.name), wanted)


def control(do: str, *, path: str | Path | None = None, **values: Any) -> dict[str, Any]:
    """Have the service do something: `status`, `set` (app, deadline_ms, period_ms,
    accuracy_floor_pct), or `stop`. Raises `ServiceError` where it refuses, `OSError` without one.
    """
    with contextlib.closing(_Line(socket_path(path))) as line:
        line.send({"do": do, **values})
        reply = line.receive(10.0)
    if reply is None:
        raise ServiceError(f"{socket_path(path)}: no answer within 10 s")
    return reply


def socket_path(path: str | Path | None = None) -> Path:
    """Where the service listens: `path`, else `$DYNLIB_SOCKET`, else in the user's run-time folder.

    Raises `ServiceError` where there is none.
    """
    given = path or os.environ.get("DYNLIB_SOCKET")
    if given:
        return Path(given)
    folder = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR")
    if not folder:
        raise ServiceError("XDG_RUNTIME_DIR is not set; expected a path, or DYNLIB_SOCKET")
    return Path(folder) / "dynlib" / "manager.sock"


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as it goes over the socket."""
    return json.dumps(message).encode() + b"\n"


class _Line:
    """A connection on which every message is one line of JSON."""

    def __init__(self, path: Path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.rest = b""
        self.poll = select.poll()
        self.poll.register(self.socket, select.POLLIN)
        try:
            self.socket.setblocking(False)  # a service that hangs must not keep a frame waiting
            self.socket.connect(str(path))
        except BaseException:
            self.socket.close()
            raise

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises `OSError` where the other end is gone, or takes no more."""
        line = encode(message)
        try:
            if self.socket.send(line) < len(line):
                raise ConnectionError("the service takes no more")
        except OSError:
            self.receive(0.0)  # why it has let go of us
            raise

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        """The next message, or None if none came in time; raises `ServiceError` with its words
        where it says no, `OSError` once the other end is gone."""
        until_s = time.monotonic() + wait_s
        while b"\n" not in self.rest:
            left_s = until_s - time.monotonic()
            if not self.poll.poll(max(math.ceil(1000 * left_s), 0)):
                return None
            part = self.socket.recv(1 << 16)
            if not part or len(self.rest) > MESSAGE_BYTES:
                raise ConnectionError("the service is gone")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        message = json.loads(line)
        if "error" in message:
            raise ServiceError(message["error"])
        return message

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
