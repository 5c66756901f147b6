"""What is lost when a search or a manager is killed, and what one that runs for long takes."""

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from dynlib.log import DecisionLog
from dynlib.machine.bind import load_board
from dynlib.machine.knobs import find_knobs
from dynlib.machine.machine import Machine
from dynlib.manager.manager import Manager
from dynlib.points import PointTable, make_table
from dynlib.runtime.case import Case
from dynlib.runtime.simulation import Simulation
from dynlib.searching.study import measured, open_study, search
from dynlib.space import SearchSpace
from dynlib.sysfs import SysFs
from dynlib.workload import App, Change, Workload
from suite.errors import SuiteError
from suite.run.child import kill_tree
from suite.studies.judge_machine import cpu_files, write_tree
from suite.studies.parallel import alone
from suite.studies.serve_many import in_time, read_tree, wait_for

GOALS = {"latency_ms": "minimize", "width": "maximize"}
SPACE = SearchSpace((16, 24, 32), ((1, 2, 3), (1, 2, 3)), ((8, 16, 24, 32), (16, 32, 48, 64)))
TRIALS = 40
EVALUATION_S = 0.01
KILLED_WITHIN_S = 0.5
MOST_EVENTS = 1000  # of a log that stay in memory
PART_MB, PARTS = 1.0, 3  # of a log on disk
LEAST_DECISIONS_PER_S = 30  # a frame of the camera brings two
CHANGES = 20
_KHZ = (600_000, 1_200_000, 1_800_000, 2_400_000)


def _processes():
    """Where processes start: forking one with threads may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


# A search that is killed


def kill_searches(folder: Path, times: int, seed: int) -> pd.DataFrame:
    """Kill -9 of a search at random moments, and resume it; a study that is done gives way to a new
    one.

    A sub-network counts as measured once the next one is being measured, or the search is done: by
    then its measures have to be in the journal. One row a kill: study, measured, and lost, how many
    of them the journal no longer has.
    """
    rng = np.random.default_rng(seed)
    rows, study, before = [], 0, 0
    while len(rows) < times:
        journal, said = folder / f"{study}.log", folder / f"{study}.txt"
        done = _killed(journal, said, before, rng.uniform(0.0, KILLED_WITHIN_S), seed)
        begun = _said(said)
        whole = begun if done else begun[:-1]
        kept = measured(open_study(SPACE, GOALS, journal, "search"))
        if not done:
            rows.append({"study": study, "measured": len(set(whole)),
                         "lost": len(set(whole) - set(kept))})  # fmt: skip
        # What was under way is measured again, and not lost.
        said.write_text("".join(f"{subnet}\n" for subnet in whole))
        before = len(whole)
        if done:
            study, before = study + 1, 0
    return pd.DataFrame(rows)


def _killed(journal: Path, said: Path, before: int, after_s: float, seed: int) -> bool:
    """Search, and be killed some time after a measurement has begun; whether it was done before."""
    process = _processes().Process(target=_search, args=(journal, said, seed))
    process.start()
    wait_for(lambda: len(_said(said)) > before or not process.is_alive(), "a measurement")
    process.join(after_s)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SuiteError(f"{journal}: the search failed, exit {process.exitcode}")
    return process.exitcode == 0


def _search(journal: Path, said: Path, seed: int) -> None:
    def measure(config):
        with said.open("a") as file:
            file.write(f"{config}\n")
        time.sleep(EVALUATION_S)
        return {"latency_ms": float(sum(config.width)), "width": float(min(config.width))}

    search(SPACE, measure, GOALS, trials=TRIALS, seed=seed, storage=journal)


def _said(path: Path) -> list[str]:
    """The sub-networks whose measurement has begun, but for a line that is being written."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


# A manager that is killed


def kill_holders(folder: Path, times: int, seed: int) -> pd.DataFrame:
    """Kill a manager with all that it started, as the suite does with a notebook past its limit,
    at a random moment while it turns clocks.

    The machine are the files of a tree. One row a kill: restored, whether every file is as it was
    found and no lease is left; restored_ms, after which time.
    """
    root = write_tree(folder / "root", cpu_files([((0, 1), _KHZ), ((2, 3), _KHZ)]))
    rng, found, rows = np.random.default_rng(seed), read_tree(root), []
    for _ in range(times):
        process = _processes().Process(target=_hold, args=(root, folder))
        process.start()
        wait_for(lambda: read_tree(root) != found, "a clock of the manager's")
        time.sleep(rng.uniform(0.0, 0.05))
        kill_tree(process.pid)
        killed_s = time.monotonic()
        process.join()
        restored = in_time(lambda: not any(folder.glob("*.json"))) and read_tree(root) == found
        rows.append({"restored": restored, "restored_ms": 1000 * (time.monotonic() - killed_s)})
    return pd.DataFrame(rows)


def _hold(root: Path, folder: Path) -> None:
    """Turn clocks until killed."""
    fs = SysFs(root)
    with Machine("tree", find_knobs(fs), fs, folder=folder, settle_s=0) as machine:
        for unit in ("policy0", "policy2"):
            machine.set(unit, "governor", "userspace")
        while True:
            for khz in _KHZ:
                machine.set("policy0", "clock_mhz", khz / 1000)
                machine.set("policy2", "clock_mhz", khz / 1000)


# A manager that runs for long


def soak(folder: Path, decisions: int, seed: int, looks: int = 50) -> pd.DataFrame:
    """A manager on a simulated board until it has decided so often, in a process of its own.

    Two apps, one periodic, one at random times; competitors come and go and requirements change.
    Memory keeps the last events of the log, the disk its last parts.

    Columns, at each of so many looks: decisions, t_s (simulated), rss_mb of the process, log_mb on
    disk. Raises `SuiteError` if the log that is on disk does not end with the events in memory.
    """
    return pd.DataFrame(alone(_soak, folder, decisions, seed, looks))


def rss_growth_mb(looks: pd.DataFrame) -> float:
    """By how much memory grew at most after the first fifth of the decisions."""
    settled = looks["decisions"] >= looks["decisions"].max() / 5
    rss_mb = looks["rss_mb"][settled]
    return float(rss_mb.max() - rss_mb.iloc[0])


def _soak(folder: Path, decisions: int, seed: int, looks: int) -> list[dict]:
    run = _Soak(_soak_case(decisions), seed, decisions, looks, folder / "soak.jsonl")
    log = run.run()
    kept = DecisionLog.read(folder / "soak.jsonl").events[-len(log.events) :]
    if kept != log.events:
        raise SuiteError(f"{folder}: the parts of the log do not end with what memory has")
    return run.rows


class _Soak(Simulation):
    """A run that ends after so many decisions, and looks at its memory on the way."""

    def __init__(self, case: Case, seed: int, decisions: int, looks: int, journal: Path):
        super().__init__(case, Manager(case.board, case.tables), seed)
        self.wanted, self.every, self.decided = decisions, max(decisions // looks, 1), 0
        self.rows: list[dict] = []
        self.process, self.folder = psutil.Process(), journal.parent
        self.log.most = MOST_EVENTS
        self.log.journal(journal, part_mb=PART_MB, parts=PARTS)

    def decide(self) -> None:
        """Count it."""
        super().decide()
        self.decided += 1
        if self.decided % self.every == 0:
            log_bytes = sum(part.stat().st_size for part in self.folder.glob("soak*.jsonl"))
            self.rows.append({
                "decisions": self.decided, "t_s": self.now_ms / 1000,
                "rss_mb": self.process.memory_info().rss / 1e6, "log_mb": log_bytes / 1e6,
            })  # fmt: skip
        if self.decided == self.wanted:
            self.stop()


def _soak_case(decisions: int) -> Case:
    board = load_board("jetson-xavier-nx")
    about = {"model": "net", "board": board.name, "unit": "gpu", "batch": 1, "source": "estimated"}
    sizes = (("small", 4.0, 70.0), ("middle", 8.0, 75.0), ("large", 14.0, 78.0))
    rows = [
        about | {"subnet": subnet, "latency_ms": ms, "latency_std_ms": 0.05 * ms,
                 "accuracy_val_pct": accuracy_pct}
        for subnet, ms, accuracy_pct in sizes
    ]  # fmt: skip
    camera = App("camera", "net", deadline_ms=33.0, period_ms=33.0)
    door = App("door", "net", arrival="server", deadline_ms=60.0, period_ms=50.0)
    horizon_s = decisions / LEAST_DECISIONS_PER_S
    changes = []
    for number, t_s in enumerate(np.linspace(0, horizon_s, CHANGES + 2)[1:-1]):
        floor_pct = (0.0, 72.0, 76.0)[number % 3]
        changes.append(Change(t_s, "camera", accuracy_floor_pct=floor_pct))
        changes.append(Change(t_s, unit="gpu", stretch=(1.3, 1.0)[number % 2], announced=False))
    workload = Workload("soak", horizon_s, (camera, door), tuple(changes))
    return Case(workload, board, {"net": PointTable(make_table(rows), board)})
