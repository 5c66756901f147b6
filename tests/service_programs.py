"""Programs in processes of their own, as a service meets them: `start(service.door.path, what)`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from dynlib.deploy.client import Client

ROWS = [
    {"subnet": subnet, "latency_ms": ms, "accuracy_val_pct": accuracy_pct, "source": "measured"}
    for subnet, ms, accuracy_pct in (("small", 2.0, 70.0), ("large", 10.0, 80.0))
]


def start(path, what, *arguments):
    """The process; it writes a line once it is where it wants to be."""
    command = [sys.executable, __file__, str(path), what, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def client(path, name="cam", unit="a", **values):
    rows = [row | {"unit": unit} for row in ROWS]
    values = {"deadline_ms": 100.0, "period_ms": 100.0, "pin": False} | values
    return Client(name, rows, path=path, **values)


def flood(path, line):
    """100,000 lines; the last words of the service."""
    link = socket.socket(socket.AF_UNIX)
    link.connect(path)
    with contextlib.suppress(OSError):
        link.sendall(line.encode() * 100_000)
    say(link.recv(1 << 16).decode())


def many(path, count):
    """So many programs; how many of them were managed, refused, or got no answer."""
    came = {10: 0, 11: 0, 12: 0}
    children = []
    for k in range(int(count)):
        if not (child := os.fork()):
            one = client(path, f"program {k}", "ab"[k % 2], period_ms=1000.0)
            for _ in range(10):
                if one.ask():
                    one.done(0.01)
            refused = "programs are managed; expected fewer" in one.problem
            os._exit(10 if one.managed else 11 if refused else 12)
        children.append(child)
    for child in children:
        came[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
    say(*came.values())


def hold(path):
    """In the middle of a frame, its socket inherited by a child."""
    mine = client(path)
    mine.ask()
    child = os.fork()
    if child:
        say(child)
    signal.pause()


def serve(path, name="cam", unit="a"):
    """A frame every 10 ms, for ever; every change of who decides is a line."""
    managed = None
    with client(path, name, unit, deadline_ms=50.0, period_ms=10.0) as mine:
        while True:
            if order := mine.ask():
                mine.done(1.0)
            now = bool(order and order.managed) if order else managed
            if now is not managed:
                managed = now
                say("managed" if managed else "alone", order.subnet)
            time.sleep(0.01)


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _, path, what, *arguments = sys.argv
    globals()[what](path, *arguments)
