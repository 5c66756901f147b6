"""The manager as a service: what programs are told, and who is refused for what."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_cases import (
    BOARD,
    Raw,
    accuracy,
    program,
    rows,
    serving,
    status,
    wait_for,
)
from service_programs import start

from dynlib.deploy import service as service_module
from dynlib.deploy.client import control
from dynlib.deploy.door import BURST, MESSAGES, ROWS, parse
from dynlib.deploy.service import Service, main
from dynlib.errors import ServiceError
from dynlib.log import DecisionLog
from dynlib.manager.manager import Manager
from dynlib.runtime.case import Case
from dynlib.runtime.summary import Run

REGISTER = {"do": "register", "name": "cam", "table": rows("a"), "deadline_ms": 100.0}


@pytest.fixture
def service(memory):
    with serving(memory) as service:
        yield service


def frames(client, count=1):
    """The networks that `count` frames in a row are served with; None where it is not told."""
    orders = []
    for _ in range(count):
        orders.append(client.ask())
        client.done(0.01)
        time.sleep(0.002)  # more than 2,000 messages a second are too many
    return [order.subnet if order and order.managed else None for order in orders]


def goes_on(client, count=3):
    """Whether it is still told, and every time."""
    return None not in frames(client, count)


def test_a_program_is_told_network_unit_and_cpus(service):
    with program(service) as client:
        order = client.ask()
        client.done()
    assert (order.subnet, order.unit, order.cpus, order.managed) == ("large", "a", (), True)
    assert order.deadline_ms == 100


def test_two_programs_on_two_units_run_at_once(service):
    with program(service, "one") as one, program(service, "two", units=("b",)) as two:
        assert [one.ask().unit, two.ask().unit] == ["a", "b"]  # neither waits for the other
        one.done()
        two.done()


def test_two_programs_on_one_unit_take_turns(service):
    one = program(service, "one", deadline_ms=5000)
    two = program(service, "two", deadline_ms=5000)
    with one, two, ThreadPoolExecutor(1) as thread:
        assert one.ask()
        second = thread.submit(two.ask)
        wait_for(lambda: status(service)["apps"]["two"]["frames"] == 1)
        assert not second.done()
        one.done()
        assert second.result(20).managed
        two.done()


def test_a_frame_that_waits_for_too_long_need_not_be_served(service):
    with program(service, "one") as one, program(service, "two", deadline_ms=30.0) as two:
        assert one.ask()
        assert two.ask() is None
        two.done()  # nothing is owed
        one.done()
        assert two.ask().managed


def test_requirements_are_set_from_outside(service):
    with program(service) as client:
        assert frames(client) == ["large"]
        control("set", path=service.door.path, app="cam", deadline_ms=4.0)
        frames(client)
        assert frames(client, 3) == ["small"] * 3
        assert client.last.deadline_ms == 4
        control("set", path=service.door.path, app="cam", deadline_ms=90.0, accuracy_floor_pct=75.0)
        assert status(service)["apps"]["cam"]["floor_pct"] == 75
        assert status(service)["apps"]["cam"]["deadline_ms"] == 90
        assert service.workload.changes == ()  # nothing grows with the number of changes


def test_programs_come_and_go(service):
    for _ in range(2):
        with program(service) as client:
            assert goes_on(client, 2)
            assert list(status(service)["apps"]) == ["cam"]
            assert status(service)["apps"]["cam"]["pid"] == os.getpid()
        wait_for(lambda: not status(service)["apps"])
    assert (service.apps, service.tables, service.workload.apps) == ({}, {}, ())
    numbers = [e["frame"] for e in service.log if e["event"] == "arrive"]
    assert numbers == [0, 1, 2, 3]  # no two frames of a program have one number


def test_the_log_is_that_of_any_run(memory):
    with serving(memory, journal=memory / "log.jsonl") as service:
        with program(service, period_ms=20.0) as client:
            tables = dict(service.tables)
            frames(client, 20)
        control("stop", path=service.door.path)
    log = DecisionLog.read(memory / "log.jsonl")
    run = Run(Case(service.workload, BOARD, tables), log)
    assert log.header["models"] == {"cam": "cam"}
    assert run.frames()["on_time"].all()
    assert len(run.frames()) == 20
    assert set(run.frames()["subnet"]) <= {"small", "large"}


@pytest.mark.parametrize(("trust_ms", "low", "high"), [(0.0, 1.5, 99.0), (1e9, 0.01, 0.01)])
def test_who_takes_a_unit_for_long_cannot_say_it_was_a_moment(
    service, monkeypatch, trust_ms, low, high
):
    monkeypatch.setattr(service_module, "_TRUST_MS", trust_ms)
    with program(service) as client:
        client.ask()
        wait_for(lambda: service.clock_ms() > service.peers["cam"].since_ms + 30)
        client.done(0.1)  # of a network that takes 10 ms
        wait_for(lambda: ("cam", "a") in service.memory.times)
        assert low <= service.memory.times["cam", "a"].ratios[-1] <= high


JUNK = {
    b"": "no JSON", b"\xff\xfe": "no JSON", b"{": "no JSON", b"[" * 5000: "no JSON",
    b"7" * 5000: "no JSON", b"[]": "do: got None", b'{"do": []}': "do: got []",
    b'{"do": "run"}': "do: got 'run'; known: ask, done", b'{"do": "ask"}': "to register first",
    b'{"do": "done", "ms": 3}': "expected to be told first", b'{"do": "done"}': "done: no ms",
    b'{"do": "set", "app": "x", "deadline_ms": 5}': "no program 'x'",
    b'{"do": "done", "ms": NaN}': "ms: got nan, expected a number from 0",
    b'{"do": "done", "ms": true}': "ms: got True", b'{"do": "ask", "pid": 1}': "unknown key 'pid'",
}  # fmt: skip


@pytest.mark.parametrize("line", JUNK, ids=lambda line: line[:20].decode(errors="replace"))
def test_what_makes_no_sense_is_refused_by_name(service, line):
    with program(service, "good") as good:
        assert JUNK[line] in Raw(service).refusal(line)
        assert goes_on(good)


TABLES = {
    "1 to 256 rows": [],
    "expected 1 to 256 rows": rows("a") * ROWS,
    "row 1: got 7, expected an object": [7],
    "row 1: got {'pid': 1}, expected an object of model": [{"pid": 1}],
    "row 1, subnet: got 7, expected 1 to 64": [rows("a")[0] | {"subnet": 7}],
    "row 2, latency_ms: got -1, expected a number from 0": [
        rows("a")[0], rows("a")[1] | {"latency_ms": -1},
    ],
    "column 'unit': got 'gpu', expected one of ['a', 'b']": rows("gpu"),
    "column 'board': got 'nano', expected 'tiny'": [rows("a")[0] | {"board": "nano"}],
    "one row per sub-network": rows("a", "a"),
    "latency_ms: got inf": [rows("a")[0] | {"latency_ms": float("inf")}],
}  # fmt: skip


@pytest.mark.parametrize("expected", TABLES)
def test_a_table_that_is_none_is_refused_by_name(service, expected):
    with program(service, "good") as good:
        assert expected in Raw(service).refusal(REGISTER | {"table": TABLES[expected]})
        assert goes_on(good)
        assert list(status(service)["apps"]) == ["good"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "a\nb"}, "printable"), ({"name": "a" * 65}, "1 to 64"),
        ({"deadline_ms": 0.5}, "deadline_ms: got 0.5, expected a number from 1 to 10000"),
        ({"priority": 400}, "from 0 to 9"), ({"pid": 1}, "unknown key 'pid'"),
        ({"period_ms": 1e-9}, "from 1 to 60000"), ({"deadline_ms": None}, "no deadline_ms"),
        ({"deadline_ms": 10**400}, "deadline_ms: got 1000"),
    ],
)  # fmt: skip
def test_a_program_that_asks_for_nonsense_is_refused_by_name(service, change, expected):
    assert expected in Raw(service).refusal(REGISTER | change)
    with program(service) as client:
        assert frames(client) == ["large"]


def test_a_program_says_what_it_wants_in_turn(service):
    raw = Raw(service)
    raw.say(REGISTER)
    assert raw.hear()["registered"] == "cam"
    assert "is there already" in Raw(service).refusal(REGISTER)
    raw.say({"do": "ask"})
    assert raw.hear()["subnet"] == "large"
    assert "the frame before to be done" in raw.refusal({"do": "ask"})
    again = Raw(service)
    again.say(REGISTER)
    assert "expected another" in again.refusal(REGISTER)


def test_a_time_that_cannot_be_is_refused(service):
    raw = Raw(service)
    raw.say(REGISTER)
    assert raw.hear()["registered"] == "cam"
    raw.say({"do": "ask"})
    assert raw.hear()["subnet"] == "large"
    assert "done, ms: got 90000, expected at most" in raw.refusal({"do": "done", "ms": 90_000})


@given(st.binary(max_size=300) | st.dictionaries(st.text(max_size=9) | st.just("do"),
       st.text(max_size=9) | st.sampled_from([*MESSAGES]) | st.floats() | st.none()).map(
           lambda made: json.dumps(made).encode()))  # fmt: skip
def test_any_line_is_a_message_or_refused(line):
    try:
        do, values = parse(line)
    except ServiceError:
        return
    assert values.keys() <= MESSAGES[do].keys()


def test_half_a_message_keeps_nobody_waiting(service, monkeypatch):
    half = Raw(service)
    half.link.sendall(b'{"do": "regis')
    with program(service) as client:
        assert goes_on(client)
    half.link.sendall(b'ter"}\n')
    assert half.hear() == {"error": "register: no name; expected one"}
    half.close()


def test_who_never_says_what_for_is_let_go(memory, monkeypatch):
    monkeypatch.setattr(service_module, "_SILENT_MS", 50.0)
    with serving(memory) as service:
        assert "nothing registered within 50 ms" in Raw(service).refusal()


def test_a_message_without_an_end_is_cut_off(service):
    raw = Raw(service)
    assert "a message of more than" in raw.refusal(b"7" * (1 << 18))


@pytest.mark.parametrize(("line", "expected"), [
    ('{"do": "status"}\n', "messages a second"),
    ("\n", "messages a second"),
    ("x" * 100, "more than"),
])  # fmt: skip
def test_a_flood_is_cut_off_and_nobody_else(service, line, expected):
    with program(service) as client, start(service.door.path, "flood", line) as other:
        while other.poll() is None:
            assert goes_on(client)
        assert expected in other.stdout.read()
        assert goes_on(client)


def test_who_connects_too_often_is_cut_off(service):
    reasons = [Raw(service).refusal({"do": "ask"}) for _ in range(2 * BURST // 100)]
    assert "messages a second" in str(reasons[-1])


def test_a_frame_that_is_never_reported_gives_its_unit_back(memory, monkeypatch):
    monkeypatch.setattr(service_module, "_OVERDUE_MS", 100.0)
    monkeypatch.setattr(service_module, "_OVERDUE", 0)
    with serving(memory) as service:
        hangs = program(service, "hangs")
        assert hangs.ask()
        with program(service, deadline_ms=5000.0) as client:
            assert goes_on(client)
        hangs.done()
        assert hangs.ask().managed is False
        assert hangs.problem == "frame 0 not done within 100 ms"
        hangs.close()


def test_a_hundred_programs(memory):
    with ExitStack() as stack:
        service = stack.enter_context(serving(memory, most_apps=8))
        first = stack.enter_context(program(service, "first", ("b",), deadline_ms=5000.0))
        others = stack.enter_context(start(service.door.path, "many", 100))
        while others.poll() is None:
            assert goes_on(first)
        managed, refused, alone = map(int, others.stdout.read().split())
        assert goes_on(first)
    assert managed >= 7
    assert refused > 50
    assert managed + refused + alone == 100


def test_more_programs_than_can_be_managed_serve_by_themselves(memory):
    with ExitStack() as stack:
        service = stack.enter_context(serving(memory, most_apps=1))
        one, two = (stack.enter_context(program(service, name)) for name in ("one", "two"))
        assert (one.managed, two.managed) == (True, False)
        assert two.problem == "1 programs are managed; expected fewer"
        assert two.ask().subnet == "small"  # the first of its table


def test_a_socket_is_its_owners(memory):
    with serving(memory) as service:
        assert service.door.path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ServiceError, match=r"a service is there already; expected none"):
            Service(BOARD, accuracy, service.door.path)
    assert not service.door.path.exists()
    (memory / "manager.sock").touch()  # of one that was killed
    with serving(memory, group=group_name()) as service:
        found = service.door.path.stat()
        assert (found.st_mode & 0o777, found.st_gid) == (0o660, os.getgid())


def group_name():
    import grp

    return grp.getgrgid(os.getgid()).gr_name


@pytest.mark.parametrize("wrong", ["mode", "link"])
def test_a_folder_that_others_may_write_to_is_refused(memory, wrong):
    folder = memory / "place"
    if wrong == "mode":
        folder.mkdir()
        folder.chmod(0o770)
    else:
        folder.symlink_to(memory)
    with pytest.raises(ServiceError, match=f"{folder}: of user .* expected a folder of ours"):
        Service(BOARD, accuracy, folder / "manager.sock")


def test_others_do_not_decide_about_a_program(service):
    with program(service):
        peer = service.peers["cam"]
        peer.uid = stranger = 12345
        service._only(peer, stranger)
        with pytest.raises(ServiceError, match="user 12345 may not"):
            service._only(peer)


def test_a_policy_that_fails_stops_nobody(memory):
    class Broken(Manager):
        def decide(self, state, limits):
            if state.apps:
                raise ZeroDivisionError("a bug")
            return super().decide(state, limits)

    with serving(memory, Broken) as service, program(service, deadline_ms=50.0) as client:
        assert client.ask() is None
        assert "a bug" in status(service)["problems"]["policy"]
        service.make_policy = accuracy
        with program(service, "next", units=("b",)) as other:  # who joins brings another policy
            frames(other)
            wait_for(lambda: frames(client) == ["large"])


def test_what_breaks_inside_is_the_end_of_one_connection(service, monkeypatch):
    monkeypatch.setattr(service, "_on_status", lambda peer: 1 / 0)
    with program(service) as client:
        with pytest.raises(ServiceError, match="unexpected ZeroDivisionError"):
            status(service)
        assert frames(client) == ["large"]


def test_the_command(service, capsys):
    where = ["--socket", str(service.door.path)]
    with program(service) as client:
        assert main(["set", "cam", "deadline_ms=4", *where]) == 0
        frames(client)
        assert frames(client) == ["small"]
        assert main(["status", *where]) == 0
        assert json.loads(capsys.readouterr().out.partition("\n}\n")[2])["apps"]["cam"]
        assert main(["set", "cat", "deadline_ms=4", *where]) == 1
        assert capsys.readouterr().err == "set: no program 'cat'; did you mean cam? known: cam\n"
        assert main(["set", "cam", "deadline=4", *where]) == 1
        assert "unknown key 'deadline'; did you mean deadline_ms" in capsys.readouterr().err
    wait_for(lambda: not status(service)["apps"])
    assert main(["set", "cam", "deadline_ms=4", *where]) == 1
    assert capsys.readouterr().err == "set: no program 'cam'; no program is registered\n"
    assert main(["stop", *where]) == 0
    wait_for(lambda: main(["status", *where]) == 1)


def test_the_command_says_how_to_start_a_service_where_none_is(tmp_path, capsys):
    path = tmp_path / "none.sock"
    assert main(["status", "--socket", str(path)]) == 1
    start = f"python -m dynlib.deploy.service --socket {path}"
    assert capsys.readouterr().err == f"no service at {path}; start one with `{start}`\n"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # and nobody listens
        assert main(["stop", "--socket", str(path)]) == 1
    assert f"no service at {path}" in capsys.readouterr().err


def test_a_process_that_ends_is_gone_though_a_child_holds_its_socket(service):
    with start(service.door.path, "hold") as parent:
        child = int(parent.stdout.readline())
        assert list(status(service)["apps"]) == ["cam"]
        parent.kill()
        wait_for(lambda: not status(service)["apps"])
        os.kill(child, signal.SIGKILL)
    with program(service) as client:  # the unit is free again
        assert goes_on(client)


def test_the_unit_for_systemd_names_what_there_is():
    text = Path(service_module.__file__).with_name("manager.service").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    assert "-m dynlib.deploy.service" in command
    main_options = command.split("dynlib.deploy.service")[1].split()
    with pytest.raises(SystemExit) as ended:
        main([*main_options, "--help"])
    assert ended.value.code == 0
