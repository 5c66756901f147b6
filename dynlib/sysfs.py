"""Text files below a root: the only code that opens what the kernel shows."""

import errno
import os
import re
from pathlib import Path

from dynlib.errors import MachineError

_INTEGER = re.compile(r"-?[0-9]{1,19}")  # digits of other scripts are no numbers
_PAGE = 1 << 16


class SysFs:
    """Text files below a root: the only code that opens what the kernel shows.

    Paths are relative to `root`; one that leads outside raises `MachineError`. Files are opened
    anew each time, because a kept descriptor dies with its driver or governor.
    """

    def __init__(self, root: str | Path = "/"):
        self.root = Path(root).resolve()
        self._inside: dict[str, str] = {}

    def path(self, path: str) -> str:
        """Absolute path of `path`, links followed, checked to lie inside the root."""
        if path not in self._inside:
            full = self.root / path
            target = Path(os.path.realpath(full))
            if path.startswith("/") or not target.is_relative_to(self.root):
                raise MachineError(f"{path}: outside {self.root}; expected a path inside the root")
            self._inside[path] = str(full)
        return self._inside[path]

    def read(self, path: str) -> str:
        """Text of a file without the blanks around it; never waits for a writer of a FIFO."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(self.path(path), flags)
        try:
            # Bytes are stripped: text would also lose control characters that make it nonsense.
            raw = os.read(handle, _PAGE).strip()
            return raw.decode("utf-8", "replace")
        finally:
            os.close(handle)

    def write(self, path: str, text: str) -> None:
        """Write `text` in one call to a file that exists."""
        flags = os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
        handle = os.open(self.path(path), flags)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)

    def number(self, path: str) -> int:
        """The integer in a file; raises `ValueError` for anything else, -1 (an error) included."""
        text = self.read(path)
        if not _INTEGER.fullmatch(text) or text == "-1":
            raise ValueError(f"{path}: {text[:40]!r}; expected a whole number")
        return int(text)

    def words(self, path: str) -> list[str]:
        """Words of a file; none where it cannot be read."""
        try:
            return self.read(path).split()
        except OSError:
            return []

    def integers(self, path: str) -> tuple[int, ...]:
        """Numbers of a file, such as the CPUs of a cluster; other words count for nothing."""
        decimals = filter(str.isdecimal, self.words(path))
        return tuple(map(int, decimals))

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return Path(self.path(path)).exists()

    def writable(self, path: str) -> bool:
        """Whether this user may write a file that exists."""
        return os.access(self.path(path), os.W_OK)

    def glob(self, pattern: str) -> list[str]:
        """Relative paths, sorted so that policy2 comes before policy10."""
        found = [path.relative_to(self.root).as_posix() for path in self.root.glob(pattern)]
        return sorted(found, key=_natural)

    def mkdir(self, path: str) -> None:
        """Make a folder (a control group)."""
        Path(self.path(path)).mkdir()

    def rmdir(self, path: str) -> None:
        """Remove a folder (a control group; the kernel removes the files in it)."""
        Path(self.path(path)).rmdir()


def _natural(path: str) -> list[str | int]:
    words = re.split(r"(\d+)", path)
    return [int(word) if word.isdigit() else word for word in words]


def is_gone(error: OSError) -> bool:
    """Whether a file failed because what it stands for is no longer there."""
    gone = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ESRCH)
    return error.errno in gone
