"""Files that somebody else wrote: what every reader of the house makes of damaged and hostile ones.

Whatever the bytes, a reader returns or raises its declared error, in bounded time and memory. Real
files are mutated; where a hash guards a file, the description behind it is mutated too and the hash
made anew, since whoever writes a file writes its hash.
"""

import contextlib
import hashlib
import io
import json
import logging
import resource
import shutil
import signal
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

import dynlib._vision  # noqa: F401  once, where processes begin
from dynlib.boards.board import Board
from dynlib.boards.file import BOARD_DIR, read_board
from dynlib.data import load_dataset
from dynlib.deploy.bundle import export_bundle
from dynlib.deploy.door import parse
from dynlib.deploy.runner import MANIFEST, STORE, Runner
from dynlib.errors import (
    BoardError,
    BundleError,
    CheckpointError,
    DataError,
    DynlibError,
    MachineError,
    SearchError,
    ServiceError,
    TableError,
    WorkloadError,
)
from dynlib.files import repo_root, sha256
from dynlib.log import DecisionLog
from dynlib.machine.control import Undo
from dynlib.machine.lease import Lease, recover
from dynlib.nets.checkpoint import _metadata
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.points import make_table, read_points
from dynlib.profile.layertable import LayerTable
from dynlib.searching import search
from dynlib.space import SearchSpace
from dynlib.sysfs import SysFs
from dynlib.workload import load_workload
from suite.errors import SuiteError
from suite.record.metrics import read_metrics
from suite.run.results import read_manifest
from suite.studies.judge_machine import cpu_files, write_tree
from suite.studies.parallel import in_parallel

LIMIT_S = 20.0  # of one input; the slowest takes under a second on an idle machine
ROOM_BYTES = 2**32  # that a process may take beside what it has
SPACE = SearchSpace((12, 16), ((1,), (0, 1)), ((8, 16), (16, 24)))
LAYERS = (
    "op,in_channels,out_channels,kernel,stride,groups,in_size,out_size,density,mean_ms,std_ms,count\n"
    "conv,3,24,2,1,1,32,31,1.0,0.1,0.01,30\nlinear,64,10,1,1,1,1,1,1.0,0.01,0.001,30\n"
)
MESSAGE = {
    "do": "register", "name": "camera", "deadline_ms": 40.0, "period_ms": 40.0, "priority": 1,
    "table": [{"subnet": "small", "accuracy_val_pct": 70.0, "latency_ms": 2.5}],
}  # fmt: skip
_RESULTS = repo_root() / "data" / "results"
_PIXELS = 8


@dataclass(frozen=True)
class Subject:
    """A reader, and what to try it with.

    Args:
        content: of a real file.
        read: reads what is at a path.
        declared: what it may raise.
        put: writes a content where it is to be read, and returns that place.
    """

    content: bytes
    read: Callable[[Path], object]
    declared: type[DynlibError]
    put: Callable[[bytes], Path]


def _file(folder: Path, content: bytes, read, declared, name: str = "file") -> Subject:
    """A reader of one file."""
    path = folder / name

    def put(content: bytes) -> Path:
        path.write_bytes(content)
        return path

    return Subject(content, read, declared, put)


def _board(folder: Path) -> Subject:
    return _file(folder, (BOARD_DIR / "hikey960.toml").read_bytes(), read_board, BoardError)


def _workload(folder: Path) -> Subject:
    """A workload, and the first frames it offers."""

    def read(path):
        workload = load_workload(path)
        for app in workload.apps:
            for _ in zip(range(100), workload.arrivals(app, seed=0), strict=False):
                pass

    real = repo_root() / "data/workloads/xrbench_social_a.toml"
    return _file(folder, real.read_bytes(), read, WorkloadError)


def _rows(board: Board, unit: str, subnets: Sequence[str]) -> list[dict]:
    about = {"model": "net", "board": board.name, "unit": unit, "batch": 1, "source": "measured"}
    times_ms = range(10, 10 * len(subnets) + 10, 10)
    return [
        about
        | {"subnet": subnet, "latency_ms": ms, "latency_std_ms": 1.0, "accuracy_val_pct": 70.0}
        for subnet, ms in zip(subnets, times_ms, strict=True)
    ]


def _points(folder: Path) -> Subject:
    board = read_board(BOARD_DIR / "jetson-nano.toml")
    content = make_table(_rows(board, "gpu", ("small", "large"))).to_csv(index=False)
    return _file(folder, content.encode(), lambda path: read_points(path, board), TableError)


def _layers(folder: Path) -> Subject:
    return _file(folder, LAYERS.encode(), LayerTable.read, TableError)


def _log(folder: Path) -> Subject:
    real = _RESULTS / "06_manage_two_models" / "manager_T1.jsonl"
    lines = real.read_bytes().splitlines(keepends=True)
    return _file(folder, b"".join(lines[:40]), DecisionLog.read, TableError)


def _net() -> Supernet:
    """A small one, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Supernet(SPACE)
        for config in (SPACE.smallest, SPACE.largest):
            calibrate(net, config, [torch.randn(32, 3, 16, 16)])
    return net


def _checkpoint(folder: Path) -> Subject:
    content = _net().save(folder / "net.safetensors", mean=[0.5]).read_bytes()
    return _file(folder, content, Supernet.from_checkpoint, CheckpointError)


def _checkpoint_text(folder: Path) -> Subject:
    """The description in a checkpoint, hashed again."""
    whole = _net().save(folder / "net.safetensors", mean=[0.5])
    with safe_open(whole, framework="pt") as file:
        about = file.metadata()["about"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def put(content: bytes) -> Path:
        text = content.decode(errors="replace")
        whole.write_bytes(save(tensors, _metadata(text, tensors)))
        return whole

    return Subject(about.encode(), Supernet.from_checkpoint, CheckpointError, put)


def _metrics(folder: Path) -> Subject:
    real = _RESULTS / "04_switch_subnets" / "metrics.json"
    return _file(folder, real.read_bytes(), read_metrics, SuiteError)


def _manifest(folder: Path) -> Subject:
    real = _RESULTS / "04_switch_subnets" / "manifest.json"
    return _file(folder, real.read_bytes(), read_manifest, SuiteError)


def _journal(folder: Path) -> Subject:
    def measure(config):
        return {"latency_ms": float(sum(config.width))}

    def read(path):
        goals = {"latency_ms": "minimize"}
        return search(SPACE, measure, goals, trials=4, seed=0, storage=path)

    made = folder / "made"
    read(made)
    return _file(folder, made.read_bytes(), read, SearchError)


def _lease(folder: Path) -> Subject:
    """The lease of a manager that was killed."""
    fs, content = _held(folder)
    return _file(folder, content, lambda path: recover(fs, path), MachineError)


def _lease_text(folder: Path) -> Subject:
    """What a lease says, hashed again."""
    fs, content = _held(folder)
    path = folder / "file"

    def put(content: bytes) -> Path:
        text = content.decode(errors="replace")
        digest = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps({"sha256": digest, "body": text}))
        return path

    body = json.loads(content)["body"].encode()
    return Subject(body, lambda path: recover(fs, path), MachineError, put)


def _held(folder: Path) -> tuple[SysFs, bytes]:
    """A tree of clocks, and the lease that was held on it."""
    fs = SysFs(write_tree(folder / "root", cpu_files([((0, 1), (600_000, 1_200_000))])))
    governor = "sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
    lease = Lease(fs, lambda: [Undo("write", governor, "schedutil")], folder=folder)
    content = lease.file.read_bytes()
    lease.release()
    return fs, content


def _bundle(folder: Path) -> Subject:
    """The manifest of a bundle."""
    bundle = _exported(folder)
    manifest = bundle / MANIFEST

    def put(content: bytes) -> Path:
        manifest.write_bytes(content)
        return bundle

    return Subject(manifest.read_bytes(), _serve, BundleError, put)


def _bundle_store(folder: Path) -> Subject:
    """The weights of a bundle, hashed again."""
    bundle = _exported(folder)
    said = json.loads((bundle / MANIFEST).read_text())

    def put(content: bytes) -> Path:
        (bundle / STORE).write_bytes(content)
        said["files"][STORE] = sha256(bundle / STORE)
        (bundle / MANIFEST).write_text(json.dumps(said))
        return bundle

    return Subject((bundle / STORE).read_bytes(), _serve, BundleError, put)


def _exported(folder: Path) -> Path:
    net = _net()
    board = read_board(BOARD_DIR / "jetson-nano.toml")
    table = make_table(_rows(board, "gpu", [str(config) for config in net.statistics]))
    return export_bundle(net, table, folder / "bundle", modes=("shared",), blocked=False)


def _serve(bundle: Path) -> None:
    runner = Runner(bundle, mode="shared")
    runner.switch(runner.subnets[-1])


def _image_folder(folder: Path) -> Subject:
    """One image of a folder."""
    images = _class_folders(folder, "JPEG")
    first = images / "a" / "0.jpeg"

    def put(content: bytes) -> Path:
        first.write_bytes(content)
        return images

    return Subject(first.read_bytes(), _images_read(folder), DataError, put)


def _image_tar(folder: Path) -> Subject:
    images = _class_folders(folder, "PNG")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(images, ".")
    return _file(folder, packed.getvalue(), _images_read(folder), DataError, "packed.tar")


def _image_cache(folder: Path) -> Subject:
    """What was decoded before: if it is damaged, the images are decoded again, and are the same."""
    images = _class_folders(folder, "PNG")
    whole = load_dataset(str(images), size=_PIXELS, cache_dir=folder / "cache")
    (cache,) = (folder / "cache").iterdir()

    def put(content: bytes) -> Path:
        cache.write_bytes(content)
        return images

    def read(path):
        again = load_dataset(str(path), size=_PIXELS, cache_dir=folder / "cache")
        if not again.train.images.equal(whole.train.images):
            raise ValueError("other images")

    return Subject(cache.read_bytes(), read, DataError, put)


def _class_folders(folder: Path, kind: str) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(256, size=(_PIXELS, _PIXELS, 3), dtype=np.uint8)
            path = folder / "images" / name / f"{number}.{kind.lower()}"
            Image.fromarray(pixels).save(path, kind)
    return folder / "images"


def _images_read(folder: Path) -> Callable[[Path], object]:
    def read(path):
        try:
            load_dataset(str(path), size=_PIXELS, cache_dir=folder / "cache")
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)

    return read


def _message(folder: Path) -> Subject:
    """A line that a program sends to the manager service."""
    content = json.dumps(MESSAGE).encode()
    return _file(folder, content, lambda path: parse(path.read_bytes()), ServiceError)


class Reader(NamedTuple):
    """How to set a reader up in a folder, and what an input costs, as so many of the cheap ones."""

    set_up: Callable[[Path], Subject]
    cost: int = 1


READERS = {
    "bundle": Reader(_bundle, 10),
    "bundle weights": Reader(_bundle_store, 10),
    "journal": Reader(_journal, 10),
    "image folder": Reader(_image_folder, 8),
    "image tar": Reader(_image_tar, 8),
    "image cache": Reader(_image_cache, 8),
    "checkpoint": Reader(_checkpoint, 4),
    "checkpoint text": Reader(_checkpoint_text, 8),
    "workload": Reader(_workload, 4),
    "board": Reader(_board, 4),
    "points": Reader(_points, 4),
    "layers": Reader(_layers, 2),
    "log": Reader(_log),
    "lease": Reader(_lease),
    "lease text": Reader(_lease_text, 2),
    "metrics": Reader(_metrics),
    "manifest": Reader(_manifest),
    "message": Reader(_message),
}

NASTY = [
    b"9" * 5000, b"0x" + b"f" * 5000, b"1" + b"0" * 300, b"1000000000000", b"-1", b"-0.0",
    b"1e-300", b"1e300", b"1e999", b"NaN", b"nan", b"inf", b"-inf",
    b"null", b"true", b'""', b"''", b"[]", b"{}", b"x = {y = {z = 1}}", b"[[x]]\n" * 50,
    b"[" * 2000, b"[" * 100_000, b'{"a":' * 3000, b"a" + b".a" * 20_000 + b" = 1",
    b"\0", b"\xff\xfe", b"\xe2\x80\xa8", b"\n", b"\r", b",", b'"', b"#",
]  # fmt: skip


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: flipped, cut, doubled, moved, or a value replaced by a nasty one."""
    content = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        if not content:
            break
        at, end = sorted(rng.integers(len(content) + 1, size=2).tolist())
        kind = rng.integers(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del content[at : at + 1 + int(rng.integers(40))]
        elif kind == 2:
            content[at:at] = content[at : min(end, at + 200)]
        elif kind == 3 and rng.random() < 0.2:
            del content[at:]
        elif kind == 4:
            content[at:at] = NASTY[rng.integers(len(NASTY))]
        else:  # a whole number or word
            words = [b"-+.0123456789e", b"abcdefghijklmnopqrstuvwxyz_"][int(rng.integers(2))]
            stop = at
            while stop < len(content) and content[stop] in words:
                stop += 1
            while at and content[at - 1] in words:
                at -= 1
            content[at:stop] = NASTY[rng.integers(len(NASTY))]
    return bytes(content)


class Hang(BaseException):
    """An input took longer than `LIMIT_S`; no reader can take this for an error of its own."""


class Tried(NamedTuple):
    """What became of an input: `taken`, `refused` as declared, `undeclared` or `hang`."""

    outcome: str
    seconds: float
    error: BaseException | None = None  # if it was undeclared or a hang


def attempt(subject: Subject, content: bytes) -> Tried:
    """Have a reader read a content."""
    path = subject.put(content)
    began_s = time.monotonic()
    outcome, wrong = "taken", None
    try:
        subject.read(path)
    except subject.declared:
        outcome = "refused"
    except Hang as error:
        outcome, wrong = "hang", error
    except Exception as error:
        outcome, wrong = "undeclared", error
    seconds = time.monotonic() - began_s
    if outcome != "undeclared" and seconds > LIMIT_S:
        outcome, wrong = "hang", wrong or Hang(f"{seconds:.0f} s")
    return Tried(outcome, seconds, wrong)


def shares(inputs: int) -> dict[str, int]:
    """How many of so many inputs each reader gets: as many as cost the same time."""
    weights = {name: 1 / reader.cost for name, reader in READERS.items()}
    total = sum(weights.values())
    return {name: int(np.ceil(inputs * weight / total)) for name, weight in weights.items()}


def try_readers(inputs: int, seed: int):
    """At least so many mutated files over all `READERS`.

    One row a reader: reader, inputs; taken, refused, undeclared, hang (inputs each); slowest_ms;
    memory_mb, what it took at most beside what reading the real file took; example, the first
    error that was not declared.
    """
    jobs = [(name, count, seed) for name, count in shares(inputs).items()]
    return in_parallel(try_reader, jobs)


def try_reader(name: str, inputs: int, seed: int) -> list[dict]:
    """The row of one reader, see `try_readers`."""
    rng = np.random.default_rng([seed, *name.encode()])
    found = dict.fromkeys(("taken", "refused", "undeclared", "hang"), 0)
    slowest_s, example = 0.0, ""
    memory = Path("/dev/shm")  # a busy disk makes truncating files slow
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder, _quiet():
        subject = READERS[name].set_up(Path(folder))
        subject.read(subject.put(subject.content))
        before_mb = _most_mb()
        with _bounded():
            for _ in range(inputs):
                signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
                tried = attempt(subject, mutated(subject.content, rng))
                signal.setitimer(signal.ITIMER_REAL, 0)
                found[tried.outcome] += 1
                slowest_s = max(slowest_s, tried.seconds)
                if tried.error and not example:
                    example = f"{tried.error!r:.200}"
    return [{
        "reader": name, "inputs": inputs, **found, "slowest_ms": 1000 * slowest_s,
        "memory_mb": _most_mb() - before_mb, "example": example,
    }]  # fmt: skip


def _most_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Whoever hangs is interrupted, whoever wants too much memory does not get it."""

    def interrupt(number, frame):
        raise Hang(f"{LIMIT_S:.0f} s")

    handler = signal.signal(signal.SIGALRM, interrupt)
    old = resource.getrlimit(resource.RLIMIT_AS)
    room = psutil.Process().memory_info().vms + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What readers say of damaged files is not news here; and tiny tensors need no threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
