"""Where files are, and how to write them so that they are either whole or not there."""

import hashlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from dynlib.errors import DataError

FIGURE_SUFFIXES = (".png", ".pdf", ".csv")  # what a figure is kept as, the last its table


def repo_root() -> Path:
    """The repository: `$DYNLIB_ROOT` if set, else the folder that holds the package."""
    given = os.environ.get("DYNLIB_ROOT")
    if given:
        return Path(given).resolve()
    return Path(__file__).resolve().parents[1]


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
            raise DataError(f"{name} is {str(given)!r}; expected a folder with data, cifar10/ say")
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
