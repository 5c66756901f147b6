"""Runs inside the guest: the manager as a service, two programs, the P-state register, heat, kills.

The register is read from the port itself: what sysfs says is only what the kernel meant to do.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ports
import pytest
from cases import KHZ, reset
from guest_cases import FS, make_machine, state

from dynlib.deploy.client import control
from dynlib.machine.bind import bind, load_board
from dynlib.machine.lease import lease_file

MHZ = sorted((khz / 1000 for khz in KHZ), reverse=True)  # of P-state 0, 1, ...
UNITS = {"first": ports.CLOCKS[0], "second": ports.CLOCKS[1]}
DEADLINES_MS = (1200, 400, 2000, 700, 3000, 300, 900, 500, 2500, 350)
SOCKET = Path("/run/dynlib/manager.sock")
HOT, COLD = 70, 10  # 95 and 35 degrees: passive cooling begins at 80
LATE_S = 0.05  # from a decision in the log until the register must show it
ports.allow()


def registers() -> dict[str, float]:
    """The clock of each unit, in MHz, as its register has it."""
    return {unit: MHZ[ports.read(port)] for unit, port in UNITS.items()}


def wait_for(condition, seconds: float, every_s: float = 0.1):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(every_s)
    return found


def cool() -> bool:
    states = FS.glob("sys/class/thermal/cooling_device*/cur_state")
    return all(FS.read(state) == "0" for state in states)


@pytest.fixture(autouse=True)
def _cold():
    yield
    ports.write(ports.HEAT, COLD)
    wait_for(cool, 90)


@pytest.mark.parametrize("unit", UNITS)
def test_the_register_follows_what_is_set(unit):
    with make_machine() as machine:
        bound = bind(load_board("/t/guest.toml"), machine)
        for mhz in (*MHZ, MHZ[2], MHZ[-1]):
            assert bound.set(unit, "clock_mhz", mhz).problem == ""
            assert registers()[unit] == mhz


@pytest.fixture(scope="module")
def cooling():
    """6.1 has no cooling device with states before the driver has been bound again."""
    most = "sys/class/thermal/cooling_device0/max_state"
    if FS.read(most) == "0":
        for cpu in ("cpu0", "cpu1"):
            for act in ("unbind", "bind"):
                FS.write(f"sys/bus/cpu/drivers/processor/{act}", cpu)
    assert FS.number(most) > 0


def test_heat_caps_the_clock(cooling):
    with make_machine() as machine:
        bound = bind(load_board("/t/guest.toml"), machine)
        assert bound.caps() == {}
        bound.set("first", "clock_mhz", MHZ[0])
        ports.write(ports.HEAT, HOT)
        wait_for(lambda: bound.caps().get("first", MHZ[0]) < MHZ[0], 30)
        assert registers()["first"] < MHZ[0]
        assert machine.read("acpitz").value == 95.0
        assert bound.set("first", "clock_mhz", MHZ[0]).problem
        ports.write(ports.HEAT, COLD)
        wait_for(lambda: not bound.caps(), 60)
        assert bound.set("first", "clock_mhz", MHZ[0]).problem == ""


class Programs:
    """The service and two clients, each a process of its own, and what they have said."""

    def __init__(self, folder: Path):
        self.folder, self.clients = folder, {}
        self.service = self._start_service()
        for name in ("camera", "radar"):
            self.start_client(name)

    def _start_service(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "dynlib.deploy.service", "--board", "/t/guest.toml",
                   "--socket", str(SOCKET), "--log", str(self.folder)]  # fmt: skip
        return subprocess.Popen(command, cwd="/t")

    def start_client(self, name: str) -> None:
        command = [sys.executable, "/t/numpy_program.py", name, str(SOCKET)]
        with (self.folder / name).open("w") as said:
            self.clients[name] = subprocess.Popen(command, cwd="/t", stdout=said)

    def restart(self) -> None:
        self.service = self._start_service()

    def managed_by_its_own_word(self, name: str) -> bool:
        said = (self.folder / name).read_text().split("\n")[:-1]
        return bool(said) and said[-1].split()[1] == "1"

    def ask_for(self, name: str, deadline_ms: float) -> None:
        """Set a deadline; a program that has just lost the service is waited for."""
        self.wait(*self.clients)
        control("set", path=SOCKET, app=name, deadline_ms=deadline_ms)

    def managed(self) -> set[str]:
        """Whom a service knows; nobody where there is none."""
        try:
            return set(control("status", path=SOCKET)["apps"])
        except OSError:
            return set()

    def wait(self, *names: str) -> None:
        wait_for(lambda: self.managed() == set(names), 300, every_s=0.5)

    def events(self) -> list[dict]:
        (*_, journal) = sorted(self.folder.glob("service-*.jsonl"))
        _, *lines = journal.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def guardian(self) -> int:
        """Pid of the service's guardian, which is nobody's child."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"lease import guard" in command:
                return int(folder.name)
        raise AssertionError("no guardian")

    def close(self) -> None:
        for process in (*self.clients.values(), self.service):
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    reset(FS)
    programs = Programs(tmp_path_factory.mktemp("programs"))
    try:
        yield programs
    finally:
        programs.close()
    assert_as_booted()


@pytest.fixture
def programs(running):
    """Both programs managed; the emulated machine takes half a minute to get there."""
    running.wait(*running.clients)
    return running


class Watch:
    """What the registers read while it is open, every few milliseconds."""

    def __enter__(self):
        self.seen, self.looks_s, self._stop = [], [], threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _poll(self):
        while not self._stop.wait(0.001):
            now_s, found = time.monotonic(), registers()
            self.looks_s.append(now_s)
            if not self.seen or self.seen[-1][1] != found:
                self.seen.append((now_s, found))

    def looked(self, begin_s: float, end_s: float) -> bool:
        """Whether it looked then: on a busy machine the emulated one stands still for a while."""
        return any(begin_s < t_s <= end_s for t_s in self.looks_s)

    def between(self, unit: str, begin_s: float, end_s: float) -> set[float]:
        """The clocks that a unit had then."""
        before = [found[unit] for t_s, found in self.seen if t_s <= begin_s][-1:]
        return {*before, *(found[unit] for t_s, found in self.seen if begin_s < t_s <= end_s)}


def set_by(events: list[dict], who: str) -> list[dict]:
    """The clocks that the policy set, or that a limit left."""
    return [event for event in events if (event["event"], event.get("reason")) == ("set", who)]


def log_begin_s(programs: Programs, watch_s: float = 3.0) -> float:
    """When the log's time began: no event can be seen before it happened."""
    began, known, end = float("inf"), len(programs.events()), time.monotonic() + watch_s
    while time.monotonic() < end:
        events = programs.events()
        now_s = time.monotonic()
        for event in events[known:]:
            began = min(began, now_s - event["t_s"])
        known = len(events)
    return began


def test_the_register_follows_the_decisions(programs):
    with Watch() as watch:
        began_s = log_begin_s(programs)
        first = len(programs.events())
        for n, deadline_ms in enumerate(DEADLINES_MS):
            programs.ask_for(("camera", "radar")[n % 2], deadline_ms)
            time.sleep(3)
        events = programs.events()[first:]
        time.sleep(1)
    seen, followed, sets = 0, 0, set_by(events, "policy")
    assert len({event["cpu_mhz"] for event in sets}) > 1, "the clocks were never changed"
    for n, event in enumerate(sets):
        later = [e["t_s"] for e in sets[n + 1 :] if e["unit"] == event["unit"]]
        begin_s = began_s + event["t_s"]
        end_s = min([begin_s + 0.5, *(began_s + t_s for t_s in later[:1])])
        if not watch.looked(begin_s + LATE_S, end_s):
            continue
        seen += 1
        there = watch.between(event["unit"], begin_s, end_s + 0.02)
        follows = event["cpu_mhz"] in there
        followed += follows
        shown = event["cpu_mhz"] if follows else max(there)
        print(f"CLOCK {n},{event['unit']},{event['cpu_mhz']:g},{shown:g}")  # noqa: T201
    assert followed == seen >= 10


def test_heat_reaches_the_decisions(programs, cooling):
    programs.ask_for("camera", 300)
    ports.write(ports.HEAT, HOT)
    limits = wait_for(lambda: set_by(programs.events(), "limit"), 60)
    assert min(limit["cpu_mhz"] for limit in limits) < MHZ[0]
    time.sleep(2)
    assert max(registers().values()) < MHZ[0]
    assert programs.managed() == {"camera", "radar"}


def test_a_client_is_killed(programs):
    radar = programs.clients.pop("radar")
    radar.kill()
    radar.wait()
    wait_for(lambda: "radar" not in programs.managed(), 10, every_s=0.5)
    programs.start_client("radar")
    programs.wait("camera", "radar")


def test_the_service_is_killed(programs):
    for name in programs.clients:
        wait_for(lambda name=name: programs.managed_by_its_own_word(name), 60)
    programs.service.kill()
    programs.service.wait()
    wait_for(lambda: not lease_file(FS).exists(), 60)
    assert_as_booted()
    for name, client in programs.clients.items():  # they serve on
        wait_for(lambda name=name: not programs.managed_by_its_own_word(name), 30)
        assert client.poll() is None
    programs.restart()
    programs.wait("camera", "radar")
    for name in programs.clients:
        wait_for(lambda name=name: programs.managed_by_its_own_word(name), 60)


def test_the_service_and_its_guardian_are_killed(programs):
    wait_for(lambda: set_by(programs.events(), "policy"), 60)
    os.kill(programs.guardian(), signal.SIGKILL)
    programs.service.kill()
    programs.service.wait()
    assert lease_file(FS).exists()
    programs.restart()
    programs.wait("camera", "radar")
    control("stop", path=SOCKET)
    programs.service.wait(60)
    assert not lease_file(FS).exists()
    assert_as_booted()


def assert_as_booted():
    now = state()
    reset(FS)
    assert now == state()
