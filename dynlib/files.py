"""Where files are, and how to write them so that they are either whole or not there."""

import errno
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from dynlib.errors import DataError

FIGURE_SUFFIXES = (".png", ".pdf", ".csv")  # what a figure is kept as, the last its table
# What parsing a text that somebody else wrote may raise, json's deep nesting included.
MALFORMED = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)
LARGEST_TEXT = 2**30  # bytes of a file that is read as a whole


def repo_root() -> Path:
    """The repository: `$DYNLIB_ROOT` if set, else the folder that holds the package."""
    given = os.environ.get("DYNLIB_ROOT")
    if given:
        return Path(given).resolve()
    return Path(__file__).resolve().parents[1]


def checkpoints() -> Path:
    """The folder of the networks that ship: of the repository, or in an installed package."""
    ours = repo_root() / "data" / "checkpoints"
    return ours if ours.is_dir() else Path(__file__).with_name("checkpoints")


def work_dir() -> Path:
    """Where there is what can be made again: ``runs/`` of the repository; without one, as with an
    installed package, ``$XDG_CACHE_HOME/dynlib`` or ``~/.cache/dynlib``."""
    root = repo_root()
    if os.environ.get("DYNLIB_ROOT") or (root / "run_all.sh").is_file():
        return root / "runs"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "dynlib"


def data_places(data_dir: str | Path = "") -> list[Path]:
    """Where data are looked for: `data_dir`, ``$DYNLIB_DATA``, the repository's ``data/``.

    Raises `DataError` where one of the first two is given and no folder.
    """
    places = []
    for name, given in (("data_dir", data_dir), ("DYNLIB_DATA", os.environ.get("DYNLIB_DATA"))):
        if not given:
            continue
        place = Path(given)
        if not place.is_dir():
            raise DataError(f"{name} is {str(given)!r}; expected a folder with data sets")
        places.append(place)
    return [*places, repo_root() / "data"]


def atomic_write(path: str | Path, content: str | bytes | memoryview, mode: int = 0o666) -> Path:
    """Replace the file at `path` in one step, so that no reader and no crash ever sees half of it.

    Makes the folder if it is missing; the umask cuts `mode`. Raises `OSError`, and then the old
    file is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def open_plain(path: str | Path) -> BinaryIO:
    """Open a plain file to read; raises `OSError` for a pipe, device or folder, unwaited for."""
    file = open(  # noqa: SIM115  the caller closes it
        path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return file


def read_plain(path: str | Path, most_bytes: int = LARGEST_TEXT) -> bytes:
    """The content of a plain file; raises `OSError` for all else and for one that is larger."""
    with open_plain(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes", str(path))
    return content


def shown(value: object, most: int = 60) -> str:
    """The start of a value's `repr`, which fails for a number of 5,000 digits or deep nesting."""
    try:
        return repr(value)[:most]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def sha256(path: str | Path) -> str:
    """Hash of a file, or of a folder's files with their names; hexadecimal."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listing = "\n".join(f"{sha256(p)} {p.relative_to(path).as_posix()}" for p in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return digest(file)


def digest(file: BinaryIO) -> str:
    """SHA-256 of what is left to read of a file; hexadecimal."""
    sha = hashlib.sha256()
    while chunk := file.read(2**20):
        sha.update(chunk)
    return sha.hexdigest()
