"""A service in a thread of the test, and programs that talk to it; shared by tests and faults."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from runtime_cases import board, unit

from dynlib.deploy.client import Client, control
from dynlib.deploy.service import Service
from dynlib.manager.manager import Manager
from dynlib.profile.points import at_full_clock

BOARD = at_full_clock(board(unit("a", "cpu"), unit("b", "cpu")))


def rows(*units, small_ms=2.0, large_ms=10.0):
    """A small and a large network on each of these units."""
    points = (("small", small_ms, 70.0), ("large", large_ms, 80.0))
    return [
        {"subnet": subnet, "unit": name, "latency_ms": ms, "accuracy_val_pct": accuracy_pct,
         "source": "measured"}
        for name in units for subnet, ms, accuracy_pct in points
    ]  # fmt: skip


def accuracy(on, tables):
    return Manager(on, tables, objective="accuracy")


@contextlib.contextmanager
def serving(folder, make_policy=accuracy, on=BOARD, **options):
    """A service; ends with the block, whose errors it has to outlive."""
    service = Service(on, make_policy, folder / "manager.sock", **options)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(service.serve)
        try:
            yield service
        finally:
            service.stop()
            run.result(20)


def program(service, name="cam", units=("a",), deadline_ms=100.0, **values):
    values = {"period_ms": 100.0, "path": service.door.path, "pin": False} | values
    return Client(name, rows(*units), deadline_ms=deadline_ms, **values)


def status(service):
    return control("status", path=service.door.path)


def wait_for(condition, seconds=20.0):
    """Until it holds; fails if it never does."""
    until_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


class Raw:
    """A connection that says what it likes."""

    def __init__(self, service):
        self.link = socket.socket(socket.AF_UNIX)
        self.link.settimeout(20)
        self.link.connect(str(service.door.path))
        self.lines = self.link.makefile("rb")

    def say(self, *messages):
        for message in messages:
            line = message if isinstance(message, bytes) else json.dumps(message).encode()
            self.link.sendall(line + b"\n")

    def hear(self):
        """The next answer; None at the end."""
        try:
            line = self.lines.readline()
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def refusal(self, *messages):
        """Why the service lets go of whoever says this."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.say(*messages)
        while (answer := self.hear()) and "error" not in answer:
            pass
        assert self.hear() is None
        self.close()
        return answer and answer["error"]

    def close(self):
        self.lines.close()
        self.link.close()
