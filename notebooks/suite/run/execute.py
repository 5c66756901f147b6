"""Executes one notebook within its limits and says which cell failed and why."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import dynlib
from suite.errors import SuiteError
from suite.run.child import kill_tree
from suite.run.notebooks import ADDED, Notebook, source

ANSI = re.compile(r"\x1b\[[0-9;]*m")
SHOWN_LINES = 12
# Where a kernel finds the packages `suite` and `dynlib`.
PACKAGES = (Path(__file__).parents[2], Path(dynlib.__file__).parents[1])
# How the names of variables begin that only a kernel has, and what it starts should not.
KERNELS_OWN = ("JUPYTER", "JPY", "IPYTHON", "MPLBACKEND", "CLICOLOR", "FORCE_COLOR")


def execute(
    notebook: Notebook,
    parameters: Mapping[str, Any],
    executed: Path,
    root: Path,
    limits_s: tuple[float, float],
) -> None:
    """Run `notebook` with working directory `root`; its executed copy goes to `executed`.

    `limits_s` bounds each cell and the whole run. Raises `SuiteError` if a cell fails or never
    runs, the kernel dies, or a limit is passed; the executed copy is there all the same.
    """
    cell_s, total_s = limits_s
    executed.parent.mkdir(parents=True, exist_ok=True)
    job = {
        "notebook": str(notebook.path),
        "executed": str(executed),
        "parameters": dict(parameters),
        "root": str(root),
        "cell_limit_s": math.ceil(cell_s),
    }
    with tempfile.TemporaryDirectory(prefix="dynlib-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "suite.run.child"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=root,
                env=_environment(Path(folder), root),
                start_new_session=True,  # an interrupt is for the suite to handle
            )
        timed_out = False
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            child.wait(total_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        except BrokenPipeError:
            child.wait()
        finally:
            kill_tree(child.pid)
            child.wait()
        message = log.read_text(errors="replace")
    cells = list(_cells(executed))
    if timed_out:
        where = _where(_last_started(cells))
        raise SuiteError(f"ran past its limit of {total_s:g} s in {where}")
    _check_cells(cells, job["cell_limit_s"], message)
    if child.returncode != 0:
        raise SuiteError(f"papermill failed:\n{_tail(message)}")


def _environment(folder: Path, root: Path) -> dict[str, str]:
    """Ours, but with a kernel that is this Python, and nothing of Jupyter in the user's home."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3 (ipykernel)", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return {
        **os.environ,
        "DYNLIB_ROOT": str(root),
        "PYTHONPATH": os.pathsep.join(map(str, PACKAGES)),
        "JUPYTER_PATH": str(folder),
        **{f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")},
        "IPYTHONDIR": str(folder / "ipython"),
    }


def outside() -> dict[str, str]:
    """The environment for what a notebook starts, as it is in a shell where ours are found."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(KERNELS_OWN)}
    paths = filter(None, [*map(str, PACKAGES), kept.get("PYTHONPATH")])
    return kept | {"PYTHONPATH": os.pathsep.join(paths)}


def _cells(executed: Path) -> Iterator[tuple[int, dict]]:
    """The code cells that hold code, with their numbers in the notebook, counted from 1."""
    number, cells = 0, []
    with suppress(OSError, ValueError, KeyError):  # a killed run may leave half of it, or nothing
        cells = json.loads(executed.read_text())["cells"]
    for cell in cells:
        if ADDED.isdisjoint(cell["metadata"].get("tags", ())):
            number += 1
            if cell["cell_type"] == "code" and source(cell).strip():
                yield number, cell


def _where(numbered: tuple[int, dict] | None) -> str:
    if numbered is None:
        return "no cell: the kernel did not start"
    number, cell = numbered
    return f"cell {number} ({source(cell).strip().splitlines()[0][:60]})"


def _last_started(cells: list[tuple[int, dict]]) -> tuple[int, dict] | None:
    # Not papermill's status, which calls every cell completed once the kernel is dead.
    started = [numbered for numbered in cells if _timing(numbered[1]).get("start_time")]
    return started[-1] if started else None


def _timing(cell: dict) -> dict[str, Any]:
    return cell["metadata"].get("papermill", {})


def _check_cells(cells: list[tuple[int, dict]], cell_limit_s: float, message: str) -> None:
    for numbered in cells:
        # papermill only interrupts the cell, which may look like any error, or like none.
        if (_timing(numbered[1]).get("duration") or 0.0) >= cell_limit_s:
            raise SuiteError(f"{_where(numbered)} ran past its limit of {cell_limit_s} s a cell")
        for output in numbered[1]["outputs"]:
            if output["output_type"] != "error":
                continue
            if output["ename"] == "SystemExit":
                raise SuiteError(f"ended early in {_where(numbered)}: SystemExit")
            trace = _tail("\n".join(output["traceback"]))
            raise SuiteError(f"{output['ename']} in {_where(numbered)}\n{trace}")
    if "DeadKernelError" in message:
        raise SuiteError(f"the kernel died in {_where(_last_started(cells))}")
    for numbered in cells:
        if numbered[1]["execution_count"] is None:
            raise SuiteError(f"{_where(numbered)} never ran\n{_tail(message)}".rstrip())


def _tail(text: str) -> str:
    return "\n".join(ANSI.sub("", text).rstrip().splitlines()[-SHOWN_LINES:])
