"""The manager live on this computer for long, and whether anything goes wrong meanwhile.

Real frames of the shipped network, a real load that comes and goes, a cap on the clock that comes
and goes too, and at every look at it the question what is not as it must be.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from dynlib.log import DecisionLog
from dynlib.machine.bind import load_board, open_machine
from dynlib.machine.machine import Machine
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Policy
from dynlib.points import PointTable
from dynlib.runtime.case import Case
from dynlib.runtime.live import Live, Served
from dynlib.workload import App, Change, Workload
from suite.studies.live import bursts
from suite.studies.load import background
from suite.studies.own_board import free_of_charge, kept_to
from suite.studies.parallel import alone

CYCLE_S = 10.0  # of the load
CAP_CYCLE_S = 8.0  # and of the cap: with and without load
CAP = 0.4  # of the highest clock
IMAGES_PER_FRAME = 4
PART_MB, PARTS = 1.0, 3  # of the log on disk
ROOM_MB = 20.0  # that memory may grow after the first fifth: arenas of threads, not frames
STALE_MS = 10_000.0  # a frame without an answer and not given up after that is lost


def soak_live(
    folder: Path, seconds: float, looks: int, dataset: str = "auto", data_dir: str = ""
) -> pd.DataFrame:
    """The manager serves for so long, in a process of its own; the machine is put back.

    Columns, a row a look: seconds, since the look before; frames, that came meanwhile; answered and
    given_up, of all so far; rss_mb of the process; log_mb on disk; problems, in words, "" if none.
    """
    return pd.DataFrame(alone(_soak_live, folder, seconds, looks, dataset, data_dir))


def trouble_free_minutes(looks: pd.DataFrame) -> float:
    """How long it went on until the first look that found a problem: what is broken stays so."""
    well = (looks["problems"] == "").cummin()
    return float(looks["seconds"][well].sum() / 60)


def _soak_live(
    folder: Path, seconds: float, looks: int, dataset: str, data_dir: str
) -> list[dict[str, Any]]:
    board = free_of_charge(load_board("auto"))
    server, answer, points = _shipped(board, dataset, data_dir)
    table = PointTable(points, board)
    longest_ms = float(points["latency_ms"].iloc[-1])
    camera = App("camera", table.model, 3 * longest_ms, period_ms=6 * longest_ms)
    case = Case(Workload("soak", seconds, (camera,), tuple(_caps(board, seconds))), board,
                {table.model: table})  # fmt: skip
    policy = Manager(board, case.tables, objective="accuracy", target_miss_pct=2.0)
    machine = open_machine("auto")
    found = kept_to(machine)
    with ExitStack() as stack:
        stack.enter_context(machine)
        script = bursts(seconds, CYCLE_S, psutil.cpu_count() or 1)
        stack.enter_context(background(script))()
        networks = {camera.name: Served(server.switch, answer)}
        rows = watch(case, policy, networks, folder / "live.jsonl", looks, machine)
    left = not_as_found(machine, found)
    rows[-1]["problems"] = "; ".join(filter(None, [rows[-1]["problems"], *left]))
    return rows


def not_as_found(machine: Machine, found: Mapping[str, object]) -> list[str]:
    """What a machine that was let go of is not as it was, in words; `found` is of `kept_to`."""
    left = [f"{what} was not put back: {why}" for what, why in machine.problems.items()]
    for kind, value in kept_to(machine).items():
        if value != found[kind]:
            left.append(f"process.{kind} was {found[kind]} and is {value}")
    return left


def _caps(board, seconds: float) -> list[Change]:
    """The clock of the first unit is capped in the second half of every cycle."""
    unit = board.units[0]
    capped_mhz = unit.at_or_above(CAP * unit.max_mhz)
    changes = []
    for t_s in np.arange(CAP_CYCLE_S / 2, seconds, CAP_CYCLE_S):
        changes.append(Change(float(t_s), unit=unit.name, cap_mhz=capped_mhz))
        end_s = float(t_s) + CAP_CYCLE_S / 2
        if end_s < seconds:
            changes.append(Change(end_s, unit=unit.name, cap_mhz=unit.max_mhz))
    return changes


def _shipped(board, dataset: str, data_dir: str):
    """(server, answer(k), points) of the smallest, a middle and the largest shipped network."""
    from dynlib import SubnetServer, load_dataset, pretrained, profile_points
    from dynlib.profile import at_full_clock
    from dynlib.training import checkpoint_path

    images = load_dataset(dataset, data_dir)
    supernet, _ = pretrained(images)
    accuracy = pd.read_csv(checkpoint_path(images.name).with_suffix(".accuracy.csv"))
    accuracy = accuracy.sort_values("macs_m").drop(columns="source")
    accuracy = accuracy.iloc[[0, len(accuracy) // 2, len(accuracy) - 1]]
    configs = {str(config): config for config in supernet.statistics}
    server = SubnetServer(supernet, [configs[name] for name in accuracy["subnet"]])
    frames = len(images.test) // IMAGES_PER_FRAME

    def answer(k: int):
        first = k % frames * IMAGES_PER_FRAME
        shown = images.test.images[first : first + IMAGES_PER_FRAME]
        return server(images.normalise(shown)).argmax(1)

    rows = accuracy.set_index("subnet").to_dict("index")
    with open_machine("auto") as machine:
        points = profile_points(at_full_clock(board), rows, server.switch, answer,
                                model=images.name, machine=machine, batch=IMAGES_PER_FRAME,
                                repeats=90, gap_ms=1.0)  # fmt: skip
    return server, answer, points


def watch(
    case: Case,
    policy: Policy,
    networks: Mapping[str, Served],
    journal: Path,
    looks: int,
    machine: Machine | None = None,
) -> list[dict[str, Any]]:
    """Serve a case live and look at it so often; rows of `soak_live`."""
    run = _Watched(case, policy, networks, journal, looks, machine)
    try:
        log = run.serve().log
    except Exception as error:  # counted, whatever it is
        run.problems["run"] = repr(error)
    else:
        if DecisionLog.read(journal).events[-len(log.events) :] != log.events:
            run.problems["log"] = "what is on disk does not end with what memory has"
        if run.pending:
            run.problems["frames"] = f"{len(run.pending)} neither answered nor given up at the end"
    run.look()
    return run.rows


class _Watched(Live):
    """A live run that counts its frames, and looks at itself now and then."""

    def __init__(self, case, policy, networks, journal: Path, looks: int, machine):
        super().__init__(case, policy, networks, machine=machine)
        # As a service that runs for months: nothing may be kept for ever.
        self.log.most = 1000
        self.log.journal(journal, part_mb=PART_MB, parts=PARTS)
        self.folder, self.process = journal.parent, psutil.Process()
        self.looks, self.every_ms = looks, self.horizon_ms / looks
        self.looked_ms, self.came = 0.0, 0
        self.answered = self.given_up = 0
        self.pending: dict[tuple[str, int], float] = {}
        self.rows: list[dict[str, Any]] = []
        self.told: set[str] = set()

    def settle(self) -> None:
        """Look when it is time."""
        super().settle()
        if self.now_ms >= self.looked_ms + self.every_ms:
            self.look()

    def record(self, event: str, job, **values: Any) -> None:
        """Count it."""
        super().record(event, job, **values)
        frame = job.app, job.frame
        if event == "arrive":
            self.came += 1
            self.pending[frame] = self.now_ms
        elif event in ("finish", "drop"):
            self.pending.pop(frame, None)
            self.answered += event == "finish"
            self.given_up += event == "drop"
            self.answers.pop(frame, None)  # nobody reads them

    def look(self) -> None:
        """A row of what is now, with what has become a problem since the last one."""
        log_bytes = sum(part.stat().st_size for part in self.folder.glob("*.jsonl"))
        row = {
            "seconds": (self.now_ms - self.looked_ms) / 1000, "frames": self.came,
            "answered": self.answered, "given_up": self.given_up,
            "rss_mb": self.process.memory_info().rss / 1e6, "log_mb": log_bytes / 1e6,
        }  # fmt: skip
        self.looked_ms, self.came = self.now_ms, 0
        self.rows.append(row | {"problems": "; ".join(self._found(row))})

    def _found(self, row: Mapping[str, float]) -> list[str]:
        found = [f"{what}: {why}" for what, why in self.problems.items() if what not in self.told]
        self.told |= set(self.problems)
        settled_mb = [earlier["rss_mb"] for earlier in self.rows[self.looks // 5 :]]
        if settled_mb and row["rss_mb"] > settled_mb[0] + ROOM_MB:
            found.append(f"memory grew from {settled_mb[0]:.0f} to {row['rss_mb']:.0f} MB")
        if row["log_mb"] > PART_MB * (PARTS + 1) + 0.1:
            found.append(f"the log takes {row['log_mb']:.1f} MB")
        lost = [k for k, since_ms in self.pending.items() if self.now_ms > since_ms + STALE_MS]
        if lost:
            found.append(f"{len(lost)} frames neither answered nor given up, such as {lost[0]}")
        return found
