"""The manager as a service: it owns the machine, programs ask it before each frame.

::

    python -m dynlib.deploy.service --board auto              # serve, until it is stopped
    python -m dynlib.deploy.service status
    python -m dynlib.deploy.service set camera deadline_ms=50
    python -m dynlib.deploy.service stop

A program (see `dynlib.deploy.client`) registers with its operating points and requirements over a
Unix socket, is told sub-network, setting and CPUs before each frame, and reports the time after it:
knobs and monitors, as in PRiME (Bragg et al. 2018). The service is one more world behind the one
loop: a frame arrives when a program asks, starts with the reply, and is done with the report; a
unit of the board serves one frame at a time.

Who may do what: the socket and its folder are the service's user's, and a group's with `--group`.
Who a program is, the kernel says (SO_PEERCRED), not the program. Requirements of a program may be
set by its own user, by the service's, and by root, the service stopped by the latter two.

What a program gets wrong ends its own connection, by name, and nobody else's: no message, one too
long, too many, one out of turn, a table that is none, a frame that it never reports. One that dies
is dropped at once. When the service dies, its lease puts the machine back (`dynlib.machine.lease`),
and programs serve on by themselves until there is a service again. `manager.service` beside this
file is a unit for systemd.

A message is one line of JSON, an object whose `do` is a key of `MESSAGES`; its keys are there too.
"""

import argparse
import contextlib
import grp
import json
import logging
import math
import os
import selectors
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynlib.boards.board import Board
from dynlib.deploy.client import MESSAGE_BYTES, control, socket_path
from dynlib.errors import DynlibError, ServiceError, near
from dynlib.machine.bind import host_board, load_board, open_machine
from dynlib.machine.machine import Machine
from dynlib.manager.manager import Manager
from dynlib.manager.planner import OBJECTIVES
from dynlib.manager.policy import Policy
from dynlib.points import PointTable, make_table
from dynlib.runtime.case import Case
from dynlib.runtime.jobs import AppRun, Job
from dynlib.runtime.loop import Loop, Observed
from dynlib.workload import App, Workload

CLIENTS = 128  # connections
APPS = 16  # programs that are managed at a time: planning takes the longer the more there are
ROWS = 256  # of a program's table
PER_S, BURST = 2000, 1000  # messages of a process; every 256 bytes are one
JOIN_COST = 50  # messages that a connection counts for
_TEXT = 64  # characters of a name
_SILENT_MS = 5_000.0  # after which a connection has said what it wants
_OVERDUE_MS, _OVERDUE = 1_000.0, 20  # a frame that takes so long, or so many times its network's
_KEPT = 10_000  # events of the log in memory; the journal has all

_NEED = {
    "deadline_ms": (1.0, 10_000.0),
    "period_ms": (1.0, 60_000.0),
    "accuracy_floor_pct": (0.0, 100.0),
}
# do -> key -> its type, or the lowest and the highest number
MESSAGES: dict[str, dict[str, Any]] = {
    "register": {"name": str, "table": list, **_NEED, "priority": (0, 9)},
    "ask": {},
    "done": {"ms": (0.0, 1e6)},
    "status": {},
    "set": {"app": str, **_NEED},
    "stop": {},
}
_REQUIRED = {"register": ("name", "table", "deadline_ms"), "done": ("ms",), "set": ("app",)}
_LOG = logging.getLogger(__name__)


def parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """What a message wants done, and its values; raises `ServiceError` for any other line.

    >>> parse(b'{"do": "done", "ms": 12.5}')
    ('done', {'ms': 12.5})
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"no JSON: {error}") from None
    do = message.pop("do", None) if isinstance(message, dict) else None
    if not isinstance(do, str) or do not in MESSAGES:
        raise ServiceError(f"do: got {do!r:.99}; {near(str(do), MESSAGES)}")
    values = {key: value for key, value in message.items() if value is not None}
    for key, value in values.items():
        if key not in MESSAGES[do]:
            raise ServiceError(f"{do}: unknown key {key!r:.99}; {near(key, MESSAGES[do])}")
        _check(f"{do}, {key}", value, MESSAGES[do][key])
    for key in _REQUIRED.get(do, ()):
        if key not in values:
            raise ServiceError(f"{do}: no {key}; expected one")
    return do, values


def _check(what: str, value: Any, kind: Any) -> None:
    if kind is list:
        right, expected = isinstance(value, list) and 0 < len(value) <= ROWS, f"1 to {ROWS} rows"
    elif kind is str:
        right = isinstance(value, str) and value.isprintable() and 0 < len(value) <= _TEXT
        expected = f"1 to {_TEXT} printable characters"
    else:
        low, high = kind
        right = isinstance(value, int | float) and not isinstance(value, bool)
        right = right and low <= value <= high
        expected = f"a number from {low:g} to {high:g}"
    if not right:
        raise ServiceError(f"{what}: got {value!r:.99}, expected {expected}")


def read_rows(name: str, rows: list[Any], board: Board) -> PointTable:
    """The table of a program; raises `DynlibError` naming row and column of what is none."""
    known = {"board": board.name, "batch": 1}
    full = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ServiceError(f"{name}, row {number}: got {row!r:.99}, expected an object")
        for column, value in row.items():
            if value is not None:
                kind = str if column in TEXT_COLUMNS else (0.0, 1e9)
                _check(f"{name}, row {number}, {column:.99}", value, kind)
        full.append(known | row | {"model": name})
    return PointTable(make_table(full), board)


class _Peer:
    """A connection; who is at its other end, the kernel says."""

    def __init__(self, link: socket.socket):
        self.link, self.rest, self.open = link, b"", True
        link.setblocking(False)
        said = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid, self.uid, _ = struct.unpack("3i", said)
        self.life = -1  # a file that can be read once the process has ended: a child of it may
        with contextlib.suppress(OSError, AttributeError):  # hold the socket open
            self.life = os.pidfd_open(self.pid)
        self.app = ""
        self.asks = False
        self.job: Job | None = None
        self.since_ms = 0.0

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something; who does not listen is cut off."""
        with contextlib.suppress(OSError):
            line = json.dumps(message).encode() + b"\n"
            if self.link.send(line) < len(line):
                self.link.shutdown(socket.SHUT_RDWR)


class _Door:
    """The socket: who comes and goes, what they say, and what of it is too much.

    Args:
        heard: called with a peer and a line of its.
        lost: called with one that is gone.
    """

    def __init__(
        self,
        path: Path,
        group: str,
        heard: Callable[[_Peer, bytes], None],
        lost: Callable[[_Peer], None],
    ):
        self.path, self.heard, self.lost = path, heard, lost
        self.peers: set[_Peer] = set()
        self.credit: dict[int, tuple[float, float]] = {}  # pid -> messages left, at a time
        self.selector = selectors.DefaultSelector()
        self.listening = _listen(path, group)
        self.selector.register(self.listening, selectors.EVENT_READ)

    def wait(self, seconds: float | None) -> None:
        """Until something happens, at most so long; None: for ever."""
        for key, _ in self.selector.select(seconds):
            peer = key.data
            if peer is None:
                self._accept()
            elif not peer.open:
                continue
            elif key.fd == peer.life:
                self.drop(peer)
            else:
                self._hear(peer)

    def refuse(self, peer: _Peer, why: str) -> None:
        """Say why, and let go."""
        _LOG.warning("process %d %s: %s", peer.pid, peer.app, why)
        peer.send({"error": why})
        self.drop(peer)

    def drop(self, peer: _Peer) -> None:
        """Let go of a connection."""
        if not peer.open:
            return
        peer.open = False
        self.peers.discard(peer)
        self.selector.unregister(peer.link)
        peer.link.close()
        if peer.life >= 0:
            self.selector.unregister(peer.life)
            os.close(peer.life)
        self.lost(peer)

    def close(self) -> None:
        """Let go of everybody."""
        for peer in list(self.peers):
            self.drop(peer)
        self.selector.close()
        self.listening.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            link, _ = self.listening.accept()
        except OSError as error:  # it has gone again, or we have no files left
            _LOG.warning("%s: %s", self.path, error)
            return
        peer = _Peer(link)
        self.peers.add(peer)
        self.selector.register(link, selectors.EVENT_READ, peer)
        if peer.life >= 0:
            self.selector.register(peer.life, selectors.EVENT_READ, peer)
        if len(self.peers) > CLIENTS:
            self.refuse(peer, f"{CLIENTS} connections; expected fewer")
        else:
            self._spend(peer, JOIN_COST)

    def _hear(self, peer: _Peer) -> None:
        try:
            part = peer.link.recv(1 << 16)
        except OSError:
            part = b""
        if not part:
            self.drop(peer)
            return
        if not self._spend(peer, max(part.count(b"\n"), 1) + len(part) // 256):
            return
        *lines, peer.rest = (peer.rest + part).split(b"\n")
        if len(peer.rest) > MESSAGE_BYTES:
            self.refuse(peer, f"a message of more than {MESSAGE_BYTES} bytes")
        for line in lines:
            if peer.open:
                self.heard(peer, line)

    def _spend(self, peer: _Peer, messages: int) -> bool:
        """Whether a process may send so much now; else it is refused."""
        now_s = time.monotonic()
        if len(self.credit) > 4 * CLIENTS:  # whoever was silent for a second has all of it again
            self.credit = {pid: had for pid, had in self.credit.items() if now_s - had[1] < 1}
        left, then_s = self.credit.get(peer.pid, (BURST, now_s))
        left = min(left + PER_S * (now_s - then_s), BURST) - messages
        self.credit[peer.pid] = max(left, -BURST), now_s
        if left < 0:
            self.refuse(peer, f"more than {PER_S} messages a second")
        return left >= 0


def _listen(path: Path, group: str) -> socket.socket:
    """A socket there that nobody else could have made, nor reach; raises `ServiceError`."""
    folder = path.parent
    folder.mkdir(0o750 if group else 0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.geteuid())
    if not ours or found.st_mode & 0o022:
        mode = stat.filemode(found.st_mode)
        raise ServiceError(
            f"{folder}: of user {found.st_uid}, {mode}; expected a folder of ours that nobody "
            "else may write to"
        )
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.connect(str(path))
    except OSError:  # nobody is there, as it should be
        listening.close()
    else:
        listening.close()
        raise ServiceError(f"{path}: a service is there already; expected none")
    # Made under another name, so that nobody sees it before its owner and mode are right.
    part = path.with_name(f".{os.getpid()}")
    part.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(part))
    if group:
        os.chown(part, -1, grp.getgrnam(group).gr_gid)
        os.chown(folder, -1, grp.getgrnam(group).gr_gid)
    part.chmod(0o660 if group else 0o600)
    listening.listen(CLIENTS)
    listening.setblocking(False)
    part.replace(path)
    return listening


class Service(Live):
    """The programs of a machine as a world: its places are the units of the board.

    Args:
        board: of this machine.
        make_policy: of board and tables; asked again whenever a program joins.
        path: of the socket; default `socket_path()`.
        machine: opened, and held with ``with``; None: no clock is turned.
        group: whose members may register too.
        apps: programs at a time; more are refused, and serve by themselves.
        journal: file that gets every event of the log as it comes.

    Raises `ServiceError` for a folder that is not ours alone, and where a service is already.
    """

    def __init__(
        self,
        board: Board,
        make_policy: Callable[[Board, Mapping[str, PointTable]], Policy],
        path: str | Path | None = None,
        *,
        machine: Machine | None = None,
        group: str = "",
        apps: int = APPS,
        journal: str | Path | None = None,
    ):
        case = Case(Workload("service"), board, {})
        super().__init__(case, make_policy(board, {}), {}, machine=machine, journal=journal)
        self.make_policy, self.most = make_policy, apps
        self.peers: dict[str, _Peer] = {}
        self.busy: dict[str, Job] = {}
        self.door = _Door(socket_path(path), group, self._heard, self._lost)

    # The world.

    def wait(self, until_ms: float) -> float:
        """Until then, or until somebody says something."""
        del self.log.events[:-_KEPT]
        left_s = max(until_ms / 1000 - self.wall_s(), 0.0)
        self.door.wait(None if math.isinf(left_s) else left_s)
        return self.clock_ms()

    def free(self) -> list[str]:
        """The units where nothing runs."""
        return [unit for unit, mhz in self.limits.items() if mhz and unit not in self.busy]

    def dispatch(self, place: str, job: Job) -> None:
        """Tell the program."""
        self.start(job, 0.0)
        self.busy[place] = job
        peer, point = job.content, job.point
        peer.job, peer.since_ms = job, self.clock_ms()
        setting = {key: value for key, value in point.setting._asdict().items() if value}
        peer.send({
            "subnet": point.subnet, "unit": point.unit, "setting": setting,
            "cpus": self.board.unit(point.unit).cpus, "deadline_ms": job.need.deadline_ms,
        })  # fmt: skip
        due_ms = self.now_ms + max(_OVERDUE_MS, _OVERDUE * point.latency_ms[0])
        self.push(due_ms, ASKED, (lambda: self._overdue(peer, job), None))
