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

The messages are those of `dynlib.deploy.door`.
"""

import argparse
import contextlib
import gc
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dynlib.boards.board import Board
from dynlib.deploy.client import control, encode, socket_path
from dynlib.deploy.door import NEED, Door, Peer, check, parse
from dynlib.errors import DynlibError, ServiceError, near
from dynlib.machine.bind import bind, host_board, load_board, open_machine
from dynlib.machine.knobs import CPU
from dynlib.machine.machine import Machine
from dynlib.manager.manager import Manager
from dynlib.manager.planner import OBJECTIVES
from dynlib.manager.policy import Action, Placement, Policy, State
from dynlib.points import POINT_COLUMNS, TEXT_COLUMNS, PointTable
from dynlib.profile.points import at_full_clock
from dynlib.runtime.case import Case
from dynlib.runtime.jobs import AppRun, Job
from dynlib.runtime.live import Live, LiveRun
from dynlib.runtime.loop import ASKED, WAKE, Loop
from dynlib.workload import App, Change, Workload

APPS = 16  # programs that are managed at a time: planning takes the longer the more there are
_SILENT_MS = 5_000.0  # after which a connection has said what it wants
_OVERDUE_MS, _OVERDUE = 1_000.0, 20  # a frame that takes so long, or so many times its network's
_CLOCK_MS = 1.0  # that two clocks may be apart
_TRUST_MS = 20.0  # of a frame that nobody may ask about
_LET_GO_MS = 0.2  # for a program to take up what it was told
_TIDY_MS = 10_000.0  # between two collections of garbage
_PART_MB, _PARTS = 64.0, 16  # of its log: so many parts are kept, each so long
_LOG = logging.getLogger(__name__)


def read_rows(name: str, rows: list[Any], board: Board) -> PointTable:
    """The table of a program; raises `DynlibError` naming row and column of what is none."""
    known = {"board": board.name, "batch": 1}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() <= set(POINT_COLUMNS):
            expected = f"an object of {', '.join(POINT_COLUMNS)}"
            raise ServiceError(f"{name}, row {number}: got {row!r:.99}, expected {expected}")
        for column, value in row.items():
            if value is not None:
                kind = str if column in TEXT_COLUMNS else (0.0, 1e9)
                check(f"{name}, row {number}, {column}", value, kind)
    full = [known | row | {"model": name} for row in rows]
    return PointTable(pd.DataFrame(full, columns=list(POINT_COLUMNS)), board)


class Service(Live):
    """The programs of a machine as a world: its places are the units of the board.

    Args:
        board: of this machine.
        make_policy: of board and tables; asked again whenever a program joins.
        path: of the socket; default `socket_path()`.
        machine: opened, and held with ``with``; None: no clock is turned.
        group: whose members may register too.
        most_apps: programs at a time; more are refused, and serve by themselves.
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
        most_apps: int = APPS,
        journal: str | Path | None = None,
    ):
        case = Case(Workload("service", math.inf, ()), board, {})
        super().__init__(case, make_policy(board, {}), {}, machine=machine)
        self.make_policy, self.most_apps = make_policy, most_apps
        self.turned = {}  # threads and quota are the programs' own,
        self.usage = {}  # and what they take of the CPUs is no competitor's
        self.cpus = {unit.name: unit.cpus for unit in board.units}
        self.peers: dict[str, Peer] = {}
        self.busy: dict[str, Job] = {}
        self.told_ms = -math.inf  # when somebody was last answered
        self.frames: dict[str, int] = {}  # of programs that have left
        self.bell = self.door = Door(socket_path(path), group, self)
        self.reader = ThreadPoolExecutor(1)  # a table takes longer to check than many a frame
        if journal:
            self.log.journal(journal, part_mb=_PART_MB, parts=_PARTS)

    # The world.

    def serve(self) -> LiveRun:
        """Until it is stopped."""
        gc.freeze()  # what there is now stays, and need not be looked at again
        self._tidy()
        try:
            return super().serve()
        finally:
            self.door.close()
            self.reader.shutdown()

    def _tidy(self) -> None:
        gc.collect()
        self._later(_TIDY_MS, self._tidy)

    def wait(self, until_ms: float) -> float:
        """Until then, or until somebody says something."""
        left_s = max(until_ms / 1000 - self.wall_s(), 0.0)
        self.door.wait(None if math.isinf(left_s) else left_s)
        return self.clock_ms()

    def free(self) -> list[str]:
        """The units where nothing runs."""
        return [unit for unit, mhz in self.limits.items() if mhz and unit not in self.busy]

    def ready(self) -> dict[str, list[Job]]:
        """Each unit is a place."""
        return Loop.ready(self)

    def dispatch(self, place: str, job: Job) -> None:
        """Tell the program."""
        self._tell(job.content, job.run)
        self._told(job)

    def _tell(self, peer: Peer, run: AppRun) -> None:
        told = run.placement, run.known
        if told != peer.told:
            point, need = run.table.point(*run.placement), run.known
            setting = {key: value for key, value in point.setting._asdict().items() if value}
            peer.told, peer.order = told, encode({
                "subnet": point.subnet, "unit": point.unit, "setting": setting,
                "cpus": self.cpus[point.unit], "deadline_ms": need.deadline_ms,
                "accuracy_floor_pct": need.floor_pct,
            })  # fmt: skip
        peer.since_ms = self.clock_ms()
        peer.write(peer.order)
        self.told_ms = self.clock_ms()

    def _told(self, job: Job) -> None:
        self.start(job, 0.0)
        self.busy[job.point.unit] = job
        peer, most_ms = job.content, max(_OVERDUE_MS, _OVERDUE * job.point.latency_ms[0])
        peer.job = job
        self._later(most_ms, lambda: self._overdue(peer, job, most_ms))

    def settle(self) -> None:
        """Decide, unless somebody was answered just now and nobody waits: we may be on his CPU."""
        soon_ms = self.told_ms + _LET_GO_MS
        waits = any(run.waiting for run in self.apps.values())
        if self.ask and not waits and self.clock_ms() < soon_ms:
            self.ask = False
            self.push(soon_ms, WAKE)
        super().settle()

    def drop(self, job: Job, reason: str) -> None:
        """Tell the program that it need not serve this frame."""
        super().drop(job, reason)
        job.content.asks = False
        job.content.send({"drop": reason})

    def finish(self, job: Job, **values: Any) -> None:
        """What it tells holds from the next frame on, which is not kept waiting for it."""
        Loop.finish(self, job, **values)

    def switch(self, run: AppRun, placement: Placement | None) -> Placement | None:
        """The program switches, with its next frame."""
        return Loop.switch(self, run, placement)

    def consult(self, state: State, limits: Mapping[str, float]) -> Action:
        """Ask the policy; one that fails is not asked again until another program joins."""
        try:
            return super().consult(state, limits)
        except Exception as error:  # nothing was decided yet
            self._policy_fails(error)
            return Action()

    def _turn(self) -> None:
        """Nothing of this process follows the plan."""

    # Programs come, ask and go.

    def came(self, peer: Peer) -> None:
        """Somebody is there, and has to say what for."""
        why = f"nothing registered within {_SILENT_MS:g} ms"
        self._later(_SILENT_MS, lambda: peer.app or self.door.refuse(peer, why))

    def heard(self, peer: Peer, line: bytes) -> None:
        """Somebody wants something; it is done as soon as its time has come."""
        # Not `post`: in this thread nobody has to be woken up.
        do = lambda: self._handle(peer, lambda: self._do(peer, line))  # noqa: E731
        self.inbox.append((self.clock_ms(), do, None))

    def lost(self, peer: Peer) -> None:
        """Somebody is gone."""
        self.post(lambda: self.peers.get(peer.app) is peer and self._leave(peer.app))

    def _later(self, after_ms: float, do: Callable[[], Any]) -> None:
        self.push(self.now_ms + after_ms, ASKED, (do, None))

    def _handle(self, peer: Peer, do: Callable[[], Any]) -> None:
        """Do what somebody wants; what is wrong with it ends that connection alone."""
        try:
            if peer.open:
                do()
        except DynlibError as error:
            self.door.refuse(peer, str(error))
        except Exception as error:  # the others are to be served whatever it was
            _LOG.exception("process %d", peer.pid)
            self.door.refuse(peer, f"unexpected {error!r}")

    def _do(self, peer: Peer, line: bytes) -> None:
        do, values = parse(line)
        getattr(self, f"_on_{do}")(peer, **values)

    def _on_register(
        self,
        peer: Peer,
        name: str,
        table: list[Any],
        deadline_ms: float,
        period_ms: float | None = None,
        accuracy_floor_pct: float = 0.0,
        priority: float = 0,
    ) -> None:
        if peer.app:
            raise ServiceError(f"register: this connection is {peer.app!r}; expected another")
        if name in self.names:
            raise ServiceError(f"name: {name!r} is there already; expected another")
        if len(self.names) >= self.most_apps:
            raise ServiceError(f"{self.most_apps} programs are managed; expected fewer")
        app = App(
            name,
            name,
            deadline_ms,
            "pushed",
            period_ms,
            accuracy_floor_pct=accuracy_floor_pct,
            priority=int(priority),
        )
        self.names.add(name)
        read = self.reader.submit(read_rows, name, table, self.board)
        read.add_done_callback(lambda _: self.post(lambda: self._registered(peer, app, read)))

    def _registered(self, peer: Peer, app: App, read: Future) -> None:
        self.names.discard(app.name)
        self._handle(peer, lambda: self._admit(peer, app, read.result()))

    def _admit(self, peer: Peer, app: App, table: PointTable) -> None:
        self._join(app, table, None)
        self.names.add(app.name)
        peer.app, self.peers[app.name] = app.name, peer
        peer.send({"registered": app.name, **self._described()})

    def _on_ask(self, peer: Peer) -> None:
        if not peer.app or peer.asks:
            expected = "the frame before to be done" if peer.app else "to register first"
            raise ServiceError(f"ask: expected {expected}")
        peer.asks = True
        run = self.apps[peer.app]
        # Where nothing is in the way a program is told what holds, before anything is written
        # down; what is decided about this frame holds from the next one on.
        where = run.placement
        at_once = where is not None and where.unit in self.free() and peer.app not in self.hold
        if at_once:
            self._tell(peer, run)
        asked = self.ask
        job = self._arrive(run, run.known)
        job.content = peer
        if at_once:
            self._told(job)
            if not self.clocked:  # what it tells is in time with its end
                self.ask = asked
        else:  # nothing else may happen until it is too late
            self._later(job.need.deadline_ms, lambda: None)

    def _on_done(self, peer: Peer, ms: float) -> None:
        job = peer.job
        took_ms = self.now_ms - peer.since_ms
        if job is None or ms > took_ms + _CLOCK_MS:
            expected = f"at most {took_ms:.3f}, since it was told" if job else "to be told first"
            raise ServiceError(f"done, ms: got {ms:g}, expected {expected}")
        # Who takes a unit for long cannot say that it was a moment.
        believed = took_ms <= 2 * ms + _TRUST_MS
        job.ran[self.clocks[job.point.unit]] = ms if believed else took_ms / 2
        self._released(peer, job)
        self.finish(job)

    def _on_status(self, peer: Peer) -> None:
        apps = {}
        for name, who in self.peers.items():
            run = self.apps[name]
            need, where = run.known, run.placement
            placed = {"subnet": where.subnet, "unit": where.unit} if where else {}
            apps[name] = {"pid": who.pid, "frames": run.frames, **need._asdict(), **placed}
        peer.send({**self._described(), "apps": apps, "problems": self.problems})

    def _on_set(self, peer: Peer, app: str, **asked: float) -> None:
        if app not in self.peers:
            known = near(app, self.peers) if self.peers else "no program is registered"
            raise ServiceError(f"set: no program {app!r}; {known}")
        self._only(peer, self.peers[app].uid)
        self._require(Change(self.now_ms / 1000, app, **asked))
        peer.send({"set": app, **asked})

    def _on_stop(self, peer: Peer) -> None:
        self._only(peer)
        self._stop()
        peer.send({"stop": True})

    def _only(self, peer: Peer, *users: int) -> None:
        if peer.uid not in (0, os.geteuid(), *users):
            raise ServiceError(f"user {peer.uid} may not; expected the program's, ours or root")

    def _described(self) -> dict[str, Any]:
        return {
            "board": self.board.name,
            "policy": self.policy.name,
            "units": self.cpus,
        }

    def _overdue(self, peer: Peer, job: Job, most_ms: float) -> None:
        if peer.job is job:
            self.door.refuse(peer, f"frame {job.frame} not done within {most_ms:g} ms")

    def _released(self, peer: Peer, job: Job) -> None:
        peer.asks, peer.job = False, None
        del self.busy[job.point.unit]

    def _join(self, app: App, table: PointTable | None, policy: Policy | None) -> None:
        tables = {**self.tables, app.model: table}
        super()._join(app, table, policy or self.make_policy(self.board, tables))
        self.apps[app.name].frames = self.frames.pop(app.name, 0)
        self.problems.pop("policy", None)

    def _require(self, change: Change) -> None:
        super()._require(change)
        # What was asked for before is in the log: here it would grow for ever.
        run = self.apps[change.app]
        need = run.steps[-1][1]
        run.app = replace(run.app, deadline_ms=need.deadline_ms, accuracy_floor_pct=need.floor_pct)
        if change.period_ms is not None:
            run.app = replace(run.app, period_ms=need.period_ms)
        self._only_apps(changes=())

    def _leave(self, name: str) -> None:
        self.names.discard(name)
        peer, run = self.peers.pop(name), self.apps[name]
        super()._leave(name)
        if peer.job is not None:
            run.jobs.remove(peer.job)
            self.record("drop", peer.job, reason="app left")
            self._released(peer, peer.job)
        self.frames[name] = run.frames
        self.apps = {key: each for key, each in self.apps.items() if key != name}
        self.tables = {key: each for key, each in self.tables.items() if key != name}
        self._only_apps()

    def _only_apps(self, **values: Any) -> None:
        apps = tuple(run.app for run in self.apps.values())
        self.workload = replace(self.workload, apps=apps, **values)

    def _stop(self) -> None:
        super()._stop()
        for name in list(self.peers):
            self._leave(name)


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m dynlib.deploy.service")
    parser.add_argument(
        "do", nargs="?", default="serve", choices=("serve", "status", "set", "stop")
    )
    parser.add_argument("app", nargs="?", help="the program to set requirements of")
    parser.add_argument("values", nargs="*", help=f"key=number, of {', '.join(NEED)}")
    parser.add_argument("--socket", help="where it listens")
    parser.add_argument("--board", default="auto", help="name or file")
    parser.add_argument("--objective", default="energy", choices=OBJECTIVES)
    parser.add_argument("--group", default="", help="whose members may register too")
    parser.add_argument("--apps", type=int, default=APPS, help="programs at a time")
    parser.add_argument("--log", help="folder for the decision log of every start")
    parser.add_argument("--root", default="/", help="of the files of the machine")
    parser.add_argument("--lease", type=Path, help="folder of the lease")
    given = parser.parse_args(arguments)
    sys.setswitchinterval(0.0005)  # a frame is not to wait while a table is checked
    try:
        if given.do == "serve":
            _serve(given)
        else:
            asked = dict(each.split("=", 1) for each in given.values)
            values = {"app": given.app} if given.app else {}
            values |= {key: float(text) for key, text in asked.items()}
            try:
                answer = control(given.do, path=given.socket, **values)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                path = socket_path(given.socket)
                start = f"python -m dynlib.deploy.service --socket {path}"
                raise ServiceError(f"no service at {path}; start one with `{start}`") from error
            sys.stdout.write(json.dumps(answer, indent=1) + "\n")
    except (DynlibError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _serve(given: argparse.Namespace) -> None:
    with open_machine("auto", root=given.root, folder=given.lease, own=False) as machine:
        auto = given.board == "auto"
        board = host_board(f"{given.root}/{CPU}/cpufreq") if auto else load_board(given.board)
        bound, full = bind(board, machine), at_full_clock(board)
        units = [u if bound.has(u.name, "clock_mhz") else full.unit(u.name) for u in board.units]
        board = replace(board, units=tuple(units))
        journal = None
        if given.log:
            journal = Path(given.log) / f"service-{time.time_ns()}.jsonl"
        service = Service(
            board,
            lambda board, tables: Manager(board, tables, objective=given.objective),
            given.socket,
            machine=machine,
            group=given.group,
            most_apps=given.apps,
            journal=journal,
        )
        # Who asks is not to wait for the end of a time slice of another one, which computes. The
        # kernel keeps a share for the others, whatever we do.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        service.serve()


if __name__ == "__main__":
    sys.exit(main())
