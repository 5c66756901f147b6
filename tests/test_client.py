"""A program's end of the service: it serves on, whoever is at the other end."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from service_cases import program, rows, serving, wait_for

from dynlib.deploy.client import Client, control, socket_path
from dynlib.errors import ServiceError

ROOT = Path(__file__).parents[1]


def alone(path, **values):
    return Client("cam", rows("a"), deadline_ms=20.0, path=path, pin=False, **values)


def test_needs_the_standard_library_alone():
    code = "import sys, dynlib.deploy.client; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    others = set(loaded) - sys.stdlib_module_names - {"__main__", "dynlib"}
    assert {name for name in others if not name.startswith("_")} == set()


def test_serves_by_itself_where_nobody_manages(memory):
    with alone(memory / "none.sock") as client:
        orders = [client.ask() for _ in range(3)]
        client.done()
    assert {(order.subnet, order.unit, order.managed) for order in orders} == {
        ("small", "a", False)
    }
    assert "No such file" in client.problem


@pytest.mark.parametrize("setting", [{"threads": 2.0}, {"backend": "fast", "precision": "int8"}])
def test_settings_are_told(memory, setting):
    table = [row | setting for row in rows("a")]
    with serving(memory) as service:
        with Client("cam", table, deadline_ms=50.0, path=service.door.path) as client:
            told = client.ask()
        unmanaged = Client("cam", table, deadline_ms=50.0, path=memory / "none.sock").ask()
    for order in (told, unmanaged):
        assert {key: getattr(order.setting, key) for key in setting} == setting


def test_finds_its_service_again(memory):
    with serving(memory) as service:
        client = program(service)
        assert client.ask().subnet == "large"
        control("set", path=service.door.path, app="cam", deadline_ms=4.0)
        for _ in range(3):
            client.done(0.01)
            client.ask()
        assert client.last.subnet == "small"
    order = client.ask()
    assert (order.subnet, order.managed) == ("small", False)  # as it was told last
    with serving(memory):
        wait_for(lambda: client.ask().managed)
        assert client.problem == ""
        assert client.last.deadline_ms == 4.0  # what was asked of the first
        client.close()


def listening(memory, answer):
    """A service of sorts, which answers each line with `answer`, or not at all."""
    link = socket.socket(socket.AF_UNIX)
    link.bind(str(memory / "odd.sock"))
    link.listen()

    def work():
        other, _ = link.accept()
        with other, other.makefile("rb") as lines:
            for _ in lines:
                if answer:
                    other.sendall(answer)

    threading.Thread(target=work, daemon=True).start()
    return link


ODD = [b"", b"junk\n", b"[]\n", b"{}\n", b'{"subnet": 1}\n', b"\xff\n", b"7" * (1 << 18)]


@pytest.mark.parametrize("answer", ODD, ids=range(len(ODD)))
def test_an_odd_service_keeps_no_frame_waiting(memory, monkeypatch, answer):
    monkeypatch.setattr("dynlib.deploy.client._START_S", 0.05)
    with listening(memory, answer), alone(memory / "odd.sock") as client:
        for _ in range(3):
            order = client.ask()
            assert (order.subnet, order.managed) == ("small", False)
            client.done()


def test_a_service_that_stops_answering_is_left(memory):
    registered = json.dumps({"registered": "cam"}).encode() + b"\n"
    with listening(memory, registered * 1), alone(memory / "odd.sock") as client:
        assert client.managed
        assert client.ask().managed is False  # told nothing that it knows
        assert client.problem


def test_stays_on_the_cpus_of_its_unit_while_managed(memory):
    from dataclasses import replace

    from service_cases import BOARD

    found = os.sched_getaffinity(0)
    first = min(found)
    units = tuple(replace(unit, cpus=(first,)) for unit in BOARD.units)
    with serving(memory, on=replace(BOARD, units=units)) as service:
        client = program(service, pin=True)
        client.ask()
        assert os.sched_getaffinity(0) == {first}
    client.ask()
    assert os.sched_getaffinity(0) == found


def test_where_the_socket_is(monkeypatch):
    monkeypatch.delenv("DYNLIB_SOCKET", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert socket_path() == Path("/run/user/1000/dynlib/manager.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ServiceError, match="XDG_RUNTIME_DIR is not set"):
        socket_path()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert socket_path() == Path("/run/dynlib/manager.sock")
    monkeypatch.setenv("DYNLIB_SOCKET", "there")
    assert (socket_path(), socket_path("here")) == (Path("there"), Path("here"))
