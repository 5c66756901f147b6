"""Several programs under the manager service: processes that are started, asked, and killed."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.boards.board import Opp
from dynlib.boards.file import save_board
from dynlib.deploy.client import control
from dynlib.errors import ServiceError
from dynlib.files import repo_root
from dynlib.machine.bind import host_board
from dynlib.profile.points import at_full_clock
from suite.errors import SuiteError
from suite.studies import served_program
from suite.studies.judge_machine import cpu_files, write_tree
from suite.studies.served_program import COLUMNS, PrefixNet

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_KHZ = (600_000, 1_200_000, 1_800_000, 2_400_000)
_RIDGE = 100.0


def train_prefixes(
    train: tuple[np.ndarray, np.ndarray],
    frames: tuple[np.ndarray, np.ndarray],
    widths: Sequence[int],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """A network for `PrefixNet`: random features, and for each width a readout by ridge regression.

    Images are rows of standardised floats; `frames` are those to be served, (frames, images, ...).
    """
    images, labels = train
    features = rng.standard_normal((max(widths), images.shape[1]), dtype=np.float32)
    features /= np.sqrt(images.shape[1])
    hidden = np.maximum(images @ features.T, 0)
    targets = np.eye(labels.max() + 1, dtype=np.float32)[labels]
    gram, cross = hidden.T @ hidden, hidden.T @ targets
    arrays = {"features": features, "images": frames[0], "labels": frames[1]}
    for n in widths:
        ridge = _RIDGE * np.eye(n, dtype=np.float32)
        arrays[f"readout_{n}"] = np.linalg.solve(gram[:n, :n] + ridge, cross[:n]).T.copy()
    return arrays


def accuracy_pct(net: PrefixNet, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Width -> right answers."""
    return {w: 100 * float((net.answer(w, images) == labels).mean()) for w in net.widths}


def board_by_core(path: Path, most: int = 2) -> Path:
    """A board file of this machine: each CPU is a unit, whose clock is the kernel's business."""
    here = at_full_clock(host_board())
    unit = here.units[0]
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    units = tuple(
        replace(unit, name=f"core{cpu}", cores=1, cpus=(cpu,), opps=(Opp(unit.max_mhz, 1000.0),))
        for cpu in allowed[:most]
    )
    by_core = replace(here, name="by core", units=units, static_mw=0.0)
    return save_board(by_core, path, overwrite=True)


def measured_rows(network: Path, accuracy: dict[str, float], repeats: int) -> list[dict]:
    """Operating points of a program, measured in a process like the one that will serve; on any
    CPU, so that they have no unit yet."""
    command = [sys.executable, served_program.__file__, network, "measure", repeats]
    output = subprocess.check_output(list(map(str, command)), env=_one_thread(), text=True)
    return [
        {
            "subnet": width, "accuracy_val_pct": accuracy[width],
            "latency_ms": float(np.median(ms)), "latency_p95_ms": float(np.percentile(ms, 95)),
            "latency_std_ms": float(np.percentile(ms, 95) - np.median(ms)) / 1.645,
            "threads": 1, "source": "measured",
        }
        for width, ms in json.loads(output).items()
    ]  # fmt: skip


class Stage:
    """A service and its programs, in processes of their own; none outlives the block.

    The machine is the folder `machine`: what is in it are its clocks. So no other run has to wait
    until this one is done with the real ones.

    Args:
        folder: of this user alone; for socket, machine, lease, logs and frames.
        options: further words of the service's command line.
    """

    def __init__(self, folder: Path, network: Path, *options: str):
        self.folder, self.network, self.options = folder, network, options
        self.path, self.root = folder / "manager.sock", folder / "machine"
        self.root.mkdir(exist_ok=True)
        self.service: subprocess.Popen | None = None
        self.programs: dict[str, subprocess.Popen] = {}
        self.arguments: dict[str, list[str]] = {}
        self.events: list[tuple[float, str]] = []

    def __enter__(self) -> "Stage":
        self.start_service()
        return self

    def __exit__(self, *_) -> None:
        for process in (*self.programs.values(), self.service):
            process.kill()
            process.wait()

    def start_service(self) -> None:
        """Start it; returns once it answers."""
        command = [sys.executable, "-m", "dynlib.deploy.service", "--socket", str(self.path)]
        places = {"root": self.root, "lease": self.folder, "log": self.folder / "logs"}
        command += [word for key, place in places.items() for word in (f"--{key}", str(place))]
        command += self.options
        with (self.folder / "service.txt").open("a") as said:
            self.service = subprocess.Popen(command, env=_one_thread(), stderr=said)
        if not in_time(self.answers, 30.0, step_s=0.05):
            said = (self.folder / "service.txt").read_text()
            raise SuiteError(f"the service is not there after 30 s: {said}")
        self.note("service starts")

    def start_program(self, name: str, rows: list[dict], deadline_ms: float, period_ms: float):
        """Start it for the first time."""
        table = self.folder / f"{name}.json"
        table.write_text(json.dumps(rows))
        words = [self.network, "serve", name, self.path, table, self.folder / f"{name}.csv"]
        self.arguments[name] = [*map(str, words), str(deadline_ms), str(period_ms)]
        self.again(name)

    def again(self, name: str) -> None:
        """Start a program; returns once it is managed."""
        command = [sys.executable, served_program.__file__, *self.arguments[name]]
        since_s = time.monotonic()
        with (self.folder / f"{name}.txt").open("a") as said:
            self.programs[name] = subprocess.Popen(command, env=_one_thread(), stderr=said)
        wait_for(lambda: self.since(name, since_s, 1), name)
        self.note(f"{name} starts")

    def answers(self) -> bool:
        """Whether there is a service."""
        with contextlib.suppress(OSError, ServiceError):
            return "apps" in control("status", path=self.path)
        return False

    def on_all_units(self, points: list[dict]) -> list[dict]:
        """Rows of a table for each unit of the service's board."""
        units = control("status", path=self.path)["units"]
        return [row | {"unit": unit} for unit in units for row in points]

    def set(self, app: str, **values: float) -> None:
        """Change what a program requires, from outside."""
        control("set", path=self.path, app=app, **values)
        text = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
        self.note(f"{app}: {text}")

    def kill(self, what: str) -> float:
        """Kill -9: `service`, `service and guardian`, or a program; when."""
        process = self.programs.get(what, self.service)
        guardians = guardians_of(self.root) if "guardian" in what else []
        for pid in (*guardians, process.pid):
            os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        process.wait()
        self.note(f"{what} killed")
        return killed_s

    def note(self, what: str) -> None:
        """Remember that something happens now."""
        self.events.append((time.monotonic(), what))

    def rows(self, name: str) -> list[dict[str, str]]:
        """The frames of a program so far, without a line that is being written."""
        path = self.folder / f"{name}.csv"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return list(csv.DictReader(whole, fieldnames=COLUMNS))

    def since(self, name: str, since_s: float, managed: int) -> float | None:
        """When a program first was, or was not, managed after a time."""
        times_s = (float(row["t_s"]) for row in self.rows(name) if row["managed"] == str(managed))
        return next((t_s for t_s in times_s if t_s >= since_s), None)

    def frames(self) -> pd.DataFrame:
        """All frames of all programs."""
        tables = [pd.DataFrame(self.rows(name)).assign(app=name) for name in self.arguments]
        frames = pd.concat(tables, ignore_index=True)
        numbers = [column for column in COLUMNS if column not in ("subnet", "unit")]
        frames[numbers] = frames[numbers].apply(pd.to_numeric)
        return frames

    def log(self) -> str:
        """What the services have written into their decision logs."""
        return "".join(path.read_text() for path in sorted((self.folder / "logs").iterdir()))


def play(stage: Stage, script: Sequence[tuple[float, Callable[[], object]]]) -> pd.DataFrame:
    """Do things at times (s), the last of which is the end.

    The rows of `served_program.COLUMNS` of every program with its name in `app`, `t_s` from the
    start on; and events, whose `app` is empty and whose `what` says what they are.
    """
    begin_s = time.monotonic()
    for at_s, do in script:
        time.sleep(max(begin_s + at_s - time.monotonic(), 0.0))
        do()
    events = pd.DataFrame(stage.events, columns=["t_s", "what"])
    both = pd.concat([stage.frames(), events], ignore_index=True)
    both["t_s"] -= begin_s
    return both[both["t_s"] >= 0]


def ask_many(
    folder: Path, network: Path, programs: dict[str, tuple], seconds: float
) -> pd.DataFrame:
    """Frames of two programs, each on a CPU of its own, as in `kill_many`; ask_us is the time from
    a program's request to the reply."""
    board = board_by_core(folder / "board.toml")
    options = ("--board", str(board), "--objective", "accuracy")
    with Stage(folder, network, *options) as stage:
        units = list(control("status", path=stage.path)["units"])
        for number, (name, (points, *need)) in enumerate(programs.items()):
            unit = units[number % len(units)]
            stage.start_program(name, [row | {"unit": unit} for row in points], *need)
        frames = play(stage, [(seconds, lambda: None)])
    return frames[frames["managed"] == 1]


def kill_many(folder: Path, network: Path, programs: dict[str, tuple], times: int) -> pd.DataFrame:
    """Kill the service, the service with its guardian, and a program, `times` each.

    `programs`: name -> rows of its table without a unit, deadline_ms, period_ms; on a machine of
    two CPUs whose clocks are files, one program each.

    Columns: kind; restored, whether the machine was put back, the programs served on meanwhile and
    were managed again (of a program: it was dropped, the other served on managed, and it was taken
    back); recovery_ms until the last one was; dead_ms until the service had dropped a program.
    """
    root = write_tree(folder / "machine", cpu_files([((cpu,), _KHZ) for cpu in (0, 1)]))
    found, rows = read_tree(root), []
    with Stage(folder, network) as stage:
        for cpu, (name, (points, *need)) in enumerate(programs.items()):
            stage.start_program(name, [row | {"unit": f"policy{cpu}"} for row in points], *need)
        for kind in ("service", "service and guardian", next(iter(programs))):
            for _ in range(times):
                wait_for(lambda: read_tree(root) != found, "a clock of the manager's")
                if kind in programs:
                    rows.append({"kind": "program", **_kill_program(stage, kind)})
                else:
                    rows.append({"kind": kind, **_kill_service(stage, kind, root, found)})
    return pd.DataFrame(rows)


def _kill_service(stage: Stage, kind: str, root: Path, found: dict) -> dict:
    killed_s = stage.kill(kind)
    names = list(stage.programs)
    good = all(in_time(lambda n=n: stage.since(n, killed_s, 0)) for n in names)
    if kind == "service":
        good &= in_time(lambda: read_tree(root) == found)
    stage.start_service()
    good &= in_time(lambda: all(stage.since(n, killed_s, 1) for n in names))
    back_s = [stage.since(n, killed_s, 1) or np.inf for n in names]
    if kind != "service":  # nobody was left to put it back: the next one has, before it began
        control("stop", path=stage.path)
        stage.service.wait()
        good &= read_tree(root) == found
        stage.start_service()
        again_s = time.monotonic()
        good &= in_time(lambda: all(stage.since(n, again_s, 1) for n in names))
    return {"restored": bool(good), "recovery_ms": 1000 * (max(back_s) - killed_s)}


def _kill_program(stage: Stage, name: str) -> dict:
    left = stage.log().count('"leaves"')
    others = [other for other in stage.programs if other != name]
    killed_s = stage.kill(name)
    good = in_time(lambda: stage.log().count('"leaves"') > left)
    dead_s = time.monotonic()
    good &= in_time(lambda: all(stage.since(o, killed_s, 1) for o in others))
    good &= not any(stage.since(o, killed_s, 0) for o in others)
    good &= name not in control("status", path=stage.path)["apps"]
    stage.again(name)
    return {"restored": bool(good), "dead_ms": 1000 * (dead_s - killed_s)}


def guardians_of(root: Path) -> list[int]:
    """The processes that would put a machine back; raises `SuiteError` if there are none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"guard(" in b"".join(words[2:3]) and str(root).encode() in words:
                found.append(int(process.name))
    if not found:
        raise SuiteError(f"{root}: no guardian of a lease; expected one")
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Until it holds; raises `SuiteError` if it does not."""
    if not in_time(condition, 30.0):
        raise SuiteError(f"{what}: not there after 30 s")


def in_time(condition: Callable[[], object], seconds: float = 10.0, step_s: float = 0.002) -> bool:
    """Whether it holds before so much time has passed."""
    until_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(step_s)
    return True


def read_tree(root: Path) -> dict[str, str]:
    """Path below the root -> text, of every file: a machine, or what is to stay as it is."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_text().strip() for path in files}


def _one_thread() -> dict[str, str]:
    paths = [str(repo_root()), os.environ.get("PYTHONPATH", "")]
    return os.environ | dict.fromkeys(_THREADS, "1") | {"PYTHONPATH": os.pathsep.join(paths)}


def small_images(images: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) as rows of half the height and width."""
    n, channels, height, width = images.shape
    blocks = images.reshape(n, channels, height // 2, 2, width // 2, 2)
    return blocks.mean(axis=(3, 5), dtype=np.float32).reshape(n, -1)
