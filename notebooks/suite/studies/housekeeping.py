"""What the suite itself takes, and how much of the library its tests reach."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from dynlib.files import repo_root
from suite.errors import SuiteError
from suite.run.execute import PACKAGES
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


def _python(*arguments: str) -> str:
    """What this Python prints in a process of its own; raises `SuiteError` with the end of it."""
    # A kernel has matplotlib draw into its notebook.
    packages = os.pathsep.join(map(str, PACKAGES))
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": packages}
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=repo_root(),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-10:])
        raise SuiteError(f"python {' '.join(arguments)} failed, exit {done.returncode}:\n{last}")
    return done.stdout
