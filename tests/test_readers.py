"""Whatever the bytes, a reader returns or raises its declared error, in bounded time and memory.

Real files are mutated, by hypothesis and byte by byte. ``READER_INPUTS=1000000`` tries that many
inputs of each reader; a few hundred are the default.
"""

import contextlib
import json
import os
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_cases import board
from safetensors import safe_open
from safetensors.torch import save
from small_nets import SPACE, calibrated

from dynlib.boards.file import BOARD_DIR, read_board
from dynlib.errors import (
    BoardError,
    CheckpointError,
    SearchError,
    TableError,
    WorkloadError,
)
from dynlib.files import repo_root
from dynlib.log import DecisionLog
from dynlib.nets.checkpoint import _metadata
from dynlib.nets.supernet import Supernet
from dynlib.points import make_table, read_points
from dynlib.profile.layertable import LayerTable
from dynlib.searching import search
from dynlib.workload import load_workload
from suite.errors import SuiteError
from suite.record.metrics import read_metrics
from suite.run.results import read_manifest

INPUTS = int(os.environ.get("READER_INPUTS", "150"))
LIMIT_S = 20  # of one input; the slowest takes under a second on an idle machine
TINY = board()
GPU = {"model": "net", "board": "tiny", "unit": "gpu", "batch": 1, "source": "measured"}
POINTS = [
    GPU | {"subnet": subnet, "latency_ms": ms, "latency_std_ms": 1.0, "accuracy_val_pct": 70.0}
    for subnet, ms in (("small", 10.0), ("large", 20.0))
]
LAYERS = (
    "op,in_channels,out_channels,kernel,stride,groups,in_size,out_size,density,mean_ms,std_ms,count\n"
    "conv,3,24,2,1,1,32,31,1.0,0.1,0.01,30\nlinear,64,10,1,1,1,1,1,1.0,0.01,0.001,30\n"
)


def first_lines(path, count):
    return b"".join(path.read_bytes().splitlines(keepends=True)[:count])


def checkpoint(folder):
    return calibrated((SPACE.smallest,)).save(folder / "net.safetensors", mean=[0.5]).read_bytes()


def journal(folder):
    read_journal(folder / "made")
    return (folder / "made").read_bytes()


def read_journal(path):
    def measure(config):
        return {"latency_ms": float(sum(config.width))}

    return search(SPACE, measure, {"latency_ms": "minimize"}, trials=4, seed=0, storage=path)


def read_workload(path):
    """A workload and the first frames it offers."""
    workload = load_workload(path)
    for app in workload.apps:
        for _ in zip(range(100), workload.arrivals(app, seed=0), strict=False):
            pass


RESULTS = repo_root() / "data" / "results"
READERS = {
    "board": (lambda _: (BOARD_DIR / "hikey960.toml").read_bytes(), read_board, BoardError),
    "workload": (
        lambda _: (repo_root() / "data/workloads/xrbench_social_a.toml").read_bytes(),
        read_workload,
        WorkloadError,
    ),
    "points": (
        lambda _: make_table(POINTS).to_csv(index=False).encode(),
        lambda path: read_points(path, TINY),
        TableError,
    ),
    "layers": (lambda _: LAYERS.encode(), LayerTable.read, TableError),
    "log": (
        lambda _: first_lines(RESULTS / "06_manage_two_models" / "manager_T1.jsonl", 40),
        DecisionLog.read,
        TableError,
    ),
    "checkpoint": (checkpoint, Supernet.from_checkpoint, CheckpointError),
    "metrics": (
        lambda _: (RESULTS / "04_switch_subnets" / "metrics.json").read_bytes(),
        read_metrics,
        SuiteError,
    ),
    "manifest": (
        lambda _: (RESULTS / "04_switch_subnets" / "manifest.json").read_bytes(),
        read_manifest,
        SuiteError,
    ),
    "journal": (journal, read_journal, SearchError),
}
SLOW = {"checkpoint": 4, "journal": 10}  # so many times fewer inputs

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


def attempt(name: str, path, content: bytes) -> None:
    """Read `content`; it has to be refused as declared, or taken, in time."""
    _, read, declared = READERS[name]
    path.write_bytes(content)
    started_s = time.monotonic()
    with contextlib.suppress(declared):
        read(path)
    assert time.monotonic() - started_s < LIMIT_S, "a hang"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    return {name: make(folder) for name, (make, _, _) in READERS.items()}


@pytest.mark.parametrize("name", READERS)
def test_the_real_file_is_read(name, seeds, memory):
    (memory / "file").write_bytes(seeds[name])
    READERS[name][1](memory / "file")


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name, seeds, memory):
    rng = np.random.default_rng(0)
    for _ in range(INPUTS // SLOW.get(name, 1)):
        attempt(name, memory / "file", mutated(seeds[name], rng))


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    content=st.binary(max_size=300)
    | st.text(max_size=300).map(lambda t: t.encode("utf-8", "replace"))
)
def test_any_bytes(name, memory, content):
    attempt(name, memory / "file", content)


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file(name, memory):
    """A pipe is not waited for; a folder and nothing are refused."""
    _, read, declared = READERS[name]
    os.mkfifo(memory / "pipe")
    (memory / "folder").mkdir()
    for path in ("pipe", "folder", "none"):
        if (name, path) == ("journal", "none"):
            continue  # it is made
        with pytest.raises(declared):
            read(memory / path)


@pytest.mark.faults
def test_a_description_that_adds_up_and_makes_no_sense(seeds, memory):
    """Past the hash: whoever writes a checkpoint can write any description."""
    path = memory / "net.safetensors"
    path.write_bytes(seeds["checkpoint"])
    with safe_open(path, framework="pt") as file:
        about = file.metadata()["about"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    rng = np.random.default_rng(0)
    for _ in range(INPUTS):
        text = mutated(about.encode(), rng).decode(errors="replace")
        attempt("checkpoint", path, save(tensors, _metadata(text, tensors)))


@pytest.mark.faults
def test_a_header_that_claims_more_than_the_file_has(memory):
    for claimed in (2**62, 14 * 2**30, 2**25):
        attempt("checkpoint", memory / "file", struct.pack("<Q", claimed) + b" " * 700_000)
    entry = {"net.x": {"dtype": "F32", "shape": [14 * 2**28], "data_offsets": [0, 14 * 2**30]}}
    header = json.dumps(entry).encode()
    (memory / "file").write_bytes(struct.pack("<Q", len(header)) + header + bytes(683_000))
    with pytest.raises(CheckpointError, match="file"):
        Supernet.from_checkpoint(memory / "file")
