"""Keeps a notebook's earlier results while it runs again: a failed or killed run loses nothing."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from dynlib.files import atomic_write
from suite.errors import SuiteError
from suite.record.provenance import FIGURE_SUFFIXES
from suite.run.notebooks import Notebook

PREVIOUS = ".previous"
COMPLETE = "complete"


@contextlib.contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Hold `out_dir` for one suite, and first put back what a killed one had set aside.

    Raises `SuiteError` if another suite is running in it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SuiteError(f"another run is using {out_dir}; wait, or give --out") from None
        for aside in sorted((out_dir / PREVIOUS).glob("[0-9]*")):
            _put_back(out_dir, aside)
        yield


@contextlib.contextmanager
def replacing(out_dir: Path, notebook: Notebook) -> Iterator[None]:
    """Start without earlier results; put them back if the body raises.

    The executed copy of a failed run stays, as ``<name>.failed.ipynb``.
    """
    folder = out_dir / notebook.name
    aside = out_dir / PREVIOUS / notebook.name
    _set_aside(out_dir, aside, notebook)
    try:
        yield
    except BaseException:
        executed = folder / f"{notebook.name}.ipynb"
        failed = executed.read_bytes() if executed.exists() else b""
        _put_back(out_dir, aside)
        if failed:
            folder.mkdir(exist_ok=True)
            (folder / f"{notebook.name}.failed.ipynb").write_bytes(failed)
        raise
    done = aside.with_name(f".{aside.name}.done")
    shutil.rmtree(done, ignore_errors=True)
    aside.rename(done)  # one step decides: from here on the new results stand
    shutil.rmtree(done)


def _set_aside(out_dir: Path, aside: Path, notebook: Notebook) -> None:
    (aside / "figures").mkdir(parents=True)
    folder = out_dir / notebook.name
    folder.mkdir(exist_ok=True)
    folder.rename(aside / "results")
    for path in _figure_files(out_dir, notebook.figures):
        if path.exists():
            path.rename(aside / "figures" / path.name)
    atomic_write(aside / COMPLETE, json.dumps(notebook.figures))


def _put_back(out_dir: Path, aside: Path) -> None:
    """Undo `_set_aside`, from whatever point it or an earlier undoing had reached."""
    if (complete := aside / COMPLETE).exists():
        shutil.rmtree(out_dir / aside.name, ignore_errors=True)
        for path in _figure_files(out_dir, json.loads(complete.read_text())):
            path.unlink(missing_ok=True)
        complete.unlink()  # what comes back must not be taken for the failed run's
    for path in (aside / "figures").glob("*"):
        path.rename(out_dir / "figures" / path.name)
    if (results := aside / "results").exists():
        results.rename(out_dir / aside.name)
        with contextlib.suppress(OSError):
            (out_dir / aside.name).rmdir()  # if there was nothing
    shutil.rmtree(aside)


def _figure_files(out_dir: Path, names: list[str] | tuple[str, ...]) -> list[Path]:
    return [out_dir / "figures" / f"{name}{suffix}" for name in names for suffix in FIGURE_SUFFIXES]
