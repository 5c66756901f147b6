"""What the suite itself takes, and how much of the library its tests reach."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dynlib.files import repo_root
from suite.errors import SuiteError
from suite.run.execute import outside
from suite.run.results import read_manifest


def committed_runs() -> pd.DataFrame:
    """The runs that the committed results are of: notebook, profile, seconds from its first cell
    to its last."""
    paths = sorted((repo_root() / "data" / "results").glob("*/manifest.json"))
    manifests = [read_manifest(path) for path in paths]
    return pd.DataFrame([
        {"notebook": manifest["notebook"], "profile": manifest["parameters"]["profile"],
         "seconds": manifest["seconds"]}
        for manifest in manifests
    ])  # fmt: skip


def redraw_committed(folder: Path) -> tuple[int, float]:
    """(figures, seconds): ``run_all.sh --figures`` into a folder, from the committed tables.

    Raises `SuiteError` if it fails, or leaves out a picture of a table.
    """
    begin_s = time.monotonic()
    _python("-m", "suite.run", "--figures", "--out", str(folder))
    seconds = time.monotonic() - begin_s
    tables = sorted((repo_root() / "figures").glob("*.csv"))
    drawn = {path.stem for path in (folder / "figures").glob("*.png")}
    if missing := [table.stem for table in tables if table.stem not in drawn]:
        raise SuiteError(f"{folder}: not drawn: {', '.join(missing)}")
    return len(tables), seconds


def no_coverage() -> str:
    """Why lines cannot be counted here; "" where they can."""
    found = importlib.util.find_spec("pytest_cov")
    return "" if found else "the package pytest-cov is not installed"


def line_coverage(folder: Path, tests: Sequence[str] = ()) -> tuple[pd.DataFrame, str]:
    """(lines, result): which lines of `dynlib` the tests run, and how pytest sums them up.

    The tests run as CI runs them. Counted are their own processes, one a core: what tests start
    in others is not. `tests` are pytest's arguments, such as files; none: all tests. Columns: file,
    lines, covered. Raises `SuiteError` if pytest did not come to its end; tests that fail are told
    in the result.
    """
    told = folder / "coverage.json"
    said = _python(
        "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider",
        "-n", "logical", "--dist", "loadfile",
        "--cov", "dynlib", f"--cov-report=json:{told}", *tests,
        good=(0, 1),  # 1: a test failed
        COVERAGE_FILE=str(folder / "coverage"),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    files = json.loads(told.read_text())["files"]
    rows = [
        {"file": Path(name).as_posix(), "lines": of["summary"]["num_statements"],
         "covered": of["summary"]["covered_lines"]}
        for name, of in files.items()
    ]  # fmt: skip
    return pd.DataFrame(rows), said.splitlines()[-1]


def _python(*arguments: str, good: Sequence[int] = (0,), **variables: str) -> str:
    """What this Python prints in a process of its own with these variables of the environment;
    raises `SuiteError` with the end of it."""
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=repo_root(),
        env=outside() | {"MPLBACKEND": "agg"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode not in good:
        last = "\n".join(done.stdout.splitlines()[-10:])
        raise SuiteError(f"python {' '.join(arguments)} failed, exit {done.returncode}:\n{last}")
    return done.stdout
