"""The door of the manager service: who comes, what they may say, and what of it is too much.

A message is one line of JSON, an object whose `do` is a key of `MESSAGES`; its keys are there too.
Who a program is, the kernel says (SO_PEERCRED), not the program. What somebody gets wrong ends that
connection, by name, and nobody else's: no message, one too long, too many.
"""

import contextlib
import grp
import json
import logging
import os
import selectors
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlib.deploy.client import MESSAGE_BYTES, encode
from dynlib.errors import ServiceError, near

if TYPE_CHECKING:
    from dynlib.runtime.jobs import Job

CLIENTS = 128  # connections
ROWS = 256  # of a program's table
PER_S, BURST = 2000, 1000  # messages of a process; every 256 bytes are one
JOIN_COST = 100  # messages that a connection counts for
_TEXT = 64  # characters of a name

NEED = {
    "deadline_ms": (1.0, 10_000.0),
    "period_ms": (1.0, 60_000.0),
    "accuracy_floor_pct": (0.0, 100.0),
}
# do -> key -> its type, or the lowest and the highest number
MESSAGES: dict[str, dict[str, Any]] = {
    "register": {"name": str, "table": list, **NEED, "priority": (0, 9)},
    "ask": {},
    "done": {"ms": (0.0, 1e6)},
    "status": {},
    "set": {"app": str, **NEED},
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
        check(f"{do}, {key}", value, MESSAGES[do][key])
        if isinstance(value, int):
            values[key] = float(value)
    for key in _REQUIRED.get(do, ()):
        if key not in values:
            raise ServiceError(f"{do}: no {key}; expected one")
    return do, values


def check(what: str, value: Any, kind: Any) -> None:
    """Raise `ServiceError` unless a value is of a kind, as in `MESSAGES`."""
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


class Peer:
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
        self.since_ms = 0.0  # that it was told
        self.told: tuple | None = None
        self.order = b""  # in one line

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something."""
        self.write(encode(message))

    def write(self, line: bytes) -> None:
        """Say it; who does not listen is cut off."""
        with contextlib.suppress(OSError):
            if self.link.send(line) < len(line):
                self.link.shutdown(socket.SHUT_RDWR)


class Door:
    """The socket: who comes and goes, what they say, and what of it is too much.

    `owner` is told of each: `came(peer)`, `heard(peer, line)`, `lost(peer)`.
    """

    def __init__(self, path: Path, group: str, owner: Any):
        self.path, self.owner = path, owner
        self.peers: set[Peer] = set()
        self.credit: dict[int, tuple[float, float]] = {}  # pid -> messages left, at a time
        self.selector = selectors.DefaultSelector()
        self.listening = _listen(path, group)
        self.bell, self.ringing = os.eventfd(0), threading.Lock()
        for each in (self.listening, self.bell):
            self.selector.register(each, selectors.EVENT_READ)

    def wait(self, seconds: float | None) -> None:
        """Until something happens, at most so long; None: for ever."""
        for key, _ in self.selector.select(seconds):
            peer = key.data
            if key.fd == self.bell:
                os.eventfd_read(self.bell)
            elif peer is None:
                self._accept()
            elif not peer.open:
                continue
            elif key.fd == peer.life:
                self.drop(peer)
            else:
                self._hear(peer)

    def set(self) -> None:
        """End a `wait`, from any thread."""
        with self.ringing:
            if self.bell >= 0:
                os.eventfd_write(self.bell, 1)

    def refuse(self, peer: Peer, why: str) -> None:
        """Say why, and let go."""
        if not peer.open:
            return
        _LOG.warning("process %d %s: %s", peer.pid, peer.app, why)
        peer.send({"error": why})
        self.drop(peer)

    def drop(self, peer: Peer) -> None:
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
        self.owner.lost(peer)

    def close(self) -> None:
        """Let go of everybody."""
        for peer in list(self.peers):
            self.drop(peer)
        self.selector.close()
        self.listening.close()
        with self.ringing:  # its number may be another file's from here on
            os.close(self.bell)
            self.bell = -1
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            link, _ = self.listening.accept()
        except OSError as error:  # it has gone again, or we have no files left
            _LOG.warning("%s: %s", self.path, error)
            return
        peer = Peer(link)
        self.peers.add(peer)
        self.selector.register(link, selectors.EVENT_READ, peer)
        if peer.life >= 0:
            self.selector.register(peer.life, selectors.EVENT_READ, peer)
        if len(self.peers) > CLIENTS:
            self.refuse(peer, f"{CLIENTS} connections; expected fewer")
        elif self._spend(peer, JOIN_COST):
            self.owner.came(peer)

    def _hear(self, peer: Peer) -> None:
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
                self.owner.heard(peer, line)

    def _spend(self, peer: Peer, messages: int) -> bool:
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
    if not hasattr(socket, "SO_PEERCRED"):
        raise ServiceError(
            f"{sys.platform} does not say which program is at the other end of a socket; "
            "expected Linux"
        )
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
