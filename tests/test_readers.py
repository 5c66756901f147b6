"""Whatever the bytes, a reader returns or raises its declared error, in bounded time and memory.

Real files are mutated, by hypothesis and byte by byte, as notebook 22 does with the same code.
``READER_INPUTS=1000000`` tries that many inputs of each reader; a few hundred are the default.
"""

import functools
import io
import json
import os
import signal
import struct
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dynlib.data import load_dataset
from dynlib.errors import BundleError, CheckpointError, DataError
from dynlib.nets.supernet import Supernet
from suite.studies import fuzz
from suite.studies.fuzz import READERS, Subject, attempt, mutated

INPUTS = int(os.environ.get("READER_INPUTS", "100"))
FILES = [name for name in READERS if name not in ("message", "image cache")]


@pytest.fixture(scope="module")
def subject():
    """Name -> its reader, set up once."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:

        @functools.cache
        def set_up(name: str) -> Subject:
            place = Path(folder) / name.replace(" ", "_")
            place.mkdir(mode=0o700)
            return READERS[name].set_up(place)

        yield set_up


def check(subject: Subject, content: bytes) -> None:
    tried = attempt(subject, content)
    if tried.error:
        raise tried.error


@pytest.mark.parametrize("name", READERS)
def test_the_real_file_is_read(name, subject):
    reader = subject(name)
    reader.read(reader.put(reader.content))


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name, subject):
    rng = np.random.default_rng(0)
    for _ in range(max(INPUTS // READERS[name].cost, 10)):
        check(subject(name), mutated(subject(name).content, rng))


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=st.binary(max_size=300)
    | st.text(max_size=300).map(lambda t: t.encode("utf-8", "replace"))
)
def test_any_bytes(name, subject, content):
    check(subject(name), content)


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file(name, subject, memory):
    """A pipe is not waited for; a folder and nothing are refused."""
    reader = subject(name)
    os.mkfifo(memory / "pipe")
    (memory / "folder").mkdir()
    for path in ("pipe", "folder", "none"):
        if path == "none" and name in ("journal", "lease", "lease text"):
            continue  # it is made, or there was no manager
        with pytest.raises(reader.declared):
            reader.read(memory / path)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["undeclared", "hang"])
def test_the_fuzzer_would_find_it(fault, memory, monkeypatch):
    """Errors that nobody declared, and hangs, are counted as such."""

    def read(path):
        if b"9" * 100 in path.read_bytes():
            if fault == "undeclared":
                raise KeyError("nobody thought of this")
            time.sleep(60)

    def set_up(folder):
        return fuzz._file(folder, b"a = 1234\n" * 20, read, BundleError)

    monkeypatch.setattr(fuzz, "LIMIT_S", 0.2)
    monkeypatch.setitem(READERS, "bad", fuzz.Reader(set_up))
    timer = signal.getitimer(signal.ITIMER_REAL)  # pytest's own
    (row,) = fuzz.try_reader("bad", 60, seed=0)
    signal.setitimer(signal.ITIMER_REAL, *timer)
    assert row[fault] > 0
    assert row["taken"] + row[fault] == 60
    assert row["example"]


@pytest.mark.faults
def test_a_header_that_claims_more_than_the_file_has(subject):
    reader = subject("checkpoint")
    for claimed in (2**62, 14 * 2**30, 2**25):
        check(reader, struct.pack("<Q", claimed) + b" " * 700_000)
    entry = {"net.x": {"dtype": "F32", "shape": [14 * 2**28], "data_offsets": [0, 14 * 2**30]}}
    header = json.dumps(entry).encode()
    path = reader.put(struct.pack("<Q", len(header)) + header + bytes(683_000))
    with pytest.raises(CheckpointError, match="file"):
        Supernet.from_checkpoint(path)


# Images


def picture(size=8, kind="PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(content, kind)
    return content.getvalue()


def tar_of(path, members) -> Path:
    """A tar of (name, content) and of members as they are."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


GOOD = [(f"{name}/{i}.png", picture()) for name in "ab" for i in range(3)]


def special(name, kind, target="") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.faults
@pytest.mark.parametrize("member", [
    special("a/link.png", tarfile.SYMTYPE, "/etc/passwd"),
    special("a/hard.png", tarfile.LNKTYPE, "../../etc/passwd"),
    special("a/null.png", tarfile.CHRTYPE),
    special("a/pipe.png", tarfile.FIFOTYPE),
], ids=lambda member: member.name)  # fmt: skip
def test_a_tar_with_what_is_no_file(memory, member):
    """It counts as nothing, and nothing is unpacked."""
    path = tar_of(memory / "set.tar", [*GOOD, member])
    images = load_dataset(str(path), size=8, cache_dir=memory / "cache")
    assert len(images.train) + len(images.val) + len(images.test) == len(GOOD)
    assert sorted(p.name for p in memory.iterdir()) == ["cache", "set.tar"]


@pytest.mark.faults
def test_a_tar_that_leads_out_of_its_folder(memory):
    inside = memory / "inside"
    inside.mkdir()
    path = tar_of(inside / "set.tar", [*GOOD, ("../../a/out.png", picture())])
    load_dataset(str(path), size=8, cache_dir=inside / "cache")
    assert [p.name for p in memory.iterdir()] == ["inside"]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_a_terabyte_of_nothing(memory, kind):
    """A file with a hole costs nobody anything but its reader."""
    for name, content in GOOD:
        (memory / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (memory / "set" / name).write_bytes(content)
    bomb = memory / "set" / "a" / "9.jpeg"
    bomb.write_bytes(picture(kind=kind)[:3])
    os.truncate(bomb, 10**12)
    with pytest.raises(DataError, match=r"9\.jpeg is .* bytes"):
        load_dataset(str(memory / "set"), size=8, cache_dir=memory / "cache")
