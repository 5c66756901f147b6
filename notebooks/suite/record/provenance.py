"""The record of one notebook run: what it read and wrote, on which machine, from which code."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dynlib.files import FIGURE_SUFFIXES, atomic_write, repo_root, sha256
from suite.errors import SuiteError
from suite.record.metrics import Metrics

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Markdown

    from suite.record.figures import Picture

MANIFEST_FIELDS = (
    "notebook", "parameters", "seed", "git", "versions", "machine", "inputs", "outputs", "figures",
    "seconds",
)  # fmt: skip
VERSIONED = (
    "dynlib", "torch", "timm", "optuna", "numpy", "pandas",
    "onnx", "onnxruntime", "openvino", "ofa",
)  # fmt: skip
# Promoting results changes these; that does not make the code another one.
RESULTS = ("data/results", "figures", "README.md")


def find_input(path: str | Path, out_dir: Path, root: Path) -> Path | None:
    """Where an input is: a run's output, else the committed copy of it, else a repository file."""
    places = (out_dir / path, root / "data" / "results" / path, root / path)
    return next((place for place in places if place.exists()), None)


class NotebookRun:
    """One notebook's run; made by `start`, closed by `finish`.

    Attributes:
        dir: ``<out_dir>/<notebook>``, where its outputs go.
        figures: ``<out_dir>/figures``.
        profile: quick or full.
        metrics: the `Metrics` that `finish` writes.
    """

    def __init__(self, notebook: str, params: Mapping[str, Any]):
        """See `start`."""
        for needed in ("profile", "seed"):
            if needed not in params:
                raise SuiteError(f"{notebook}: its parameters lack {needed!r}")
        self.notebook = notebook
        self.params = dict(params)
        self.profile = params["profile"]
        self.root = repo_root()
        self.out_dir = self.root / (params.get("out_dir") or f"runs/{self.profile}")
        self.dir = self.out_dir / notebook
        self.figures = self.out_dir / "figures"
        self.metrics = Metrics(self.dir / "metrics.json", self.profile)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._inputs: dict[str, str] = {}
        self._outputs: set[Path] = set()
        self._figures: list[str] = []
        self._git = git_state(self.root)  # as it was when the code was loaded
        self._started_s = time.monotonic()

    @property
    def state(self) -> Path:
        """A folder for work to resume; kept when a run fails or is killed, gone after `finish`."""
        folder = self._state
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def _state(self) -> Path:
        return self.out_dir / ".state" / self.notebook

    def input(self, path: str | Path) -> Path:
        """Resolve an input and record its hash.

        `path` is "other_notebook/file", looked for in this run's outputs and then among the
        committed results, or a path relative to the repository. Raises `SuiteError` if there is
        none.
        """
        found = find_input(path, self.out_dir, self.root)
        if found is None:
            maker = Path(path).parts[0]
            raise SuiteError(
                f"{self.notebook}: input {path} is neither in {self._name(self.out_dir)} nor in "
                f"data/results nor in the repository"
                + (f"; run the notebook {maker} first" if maker[:2].isdigit() else "")
            )
        self._inputs[self._name(found)] = sha256(found)
        return found

    def output(self, name: str | Path) -> Path:
        """The path for an output file `name` in this run's folder; `finish` records its hash."""
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._outputs.add(path)
        return path

    def draw(self, name: str, table: "pd.DataFrame") -> "Picture":
        """Write `table` and the figure `name` drawn from it; see `figures.save`."""
        from suite.record import figures

        picture = figures.save(name, table, self.figures, profile=self.profile)
        if name not in self._figures:
            self._figures.append(name)
        return picture

    def says(self, *sentences: str) -> "Markdown":
        """What came out, as the last value of the last cell of a section.

        A number is a metric in braces, added before; see `suite.record.sentences`.
        """
        from IPython.display import Markdown

        return Markdown("**What came out.** " + self.metrics.says(*sentences))

    def finish(self) -> None:
        """Write ``metrics.json`` and ``manifest.json`` and drop the state to resume from.

        Among the metrics is how many numbers in the texts of the notebook are metrics.

        Raises `SuiteError` if an output that was asked for was never written.
        """
        if missing := [path for path in self._outputs if not path.exists()]:
            names = ", ".join(sorted(path.name for path in missing))
            raise SuiteError(f"{self.notebook}: announced but never wrote {names}")
        if self.metrics.numbers_said:
            self.metrics.add(
                "text_numbers_checked",
                self.metrics.numbers_said,
                unit="1",
                source="exact",
                tolerance=0,
                what="numbers in the sentences of this notebook that are metrics of its run",
            )
        drawn = [self.figures / f"{n}{suffix}" for n in self._figures for suffix in FIGURE_SUFFIXES]
        outputs = sorted({*self._outputs, self.metrics.write(), *drawn})
        manifest = {
            "notebook": self.notebook,
            "parameters": self.params,
            "seed": self.params["seed"],
            "git": self._git,
            "versions": versions(),
            "machine": machine(),
            "inputs": dict(sorted(self._inputs.items())),
            "outputs": {
                path.relative_to(self.out_dir).as_posix(): sha256(path) for path in outputs
            },
            "figures": self._figures,
            "seconds": round(time.monotonic() - self._started_s, 3),
        }
        atomic_write(self.dir / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(self._state, ignore_errors=True)

    def _name(self, path: Path) -> str:
        """A path as the manifest shows it; outside the repository only its last two parts."""
        if path.is_relative_to(self.root):
            return path.relative_to(self.root).as_posix()
        return Path(*path.parts[-2:]).as_posix()


def start(notebook: str, params: Mapping[str, Any]) -> NotebookRun:
    """Begin the record of a run of `notebook` with its parameters.

    `params` holds at least ``profile`` and ``seed``; ``out_dir`` is relative to the repository and
    defaults to ``runs/<profile>``. Raises `SuiteError` or `SuiteError` if one of them is unfit.
    """
    return NotebookRun(notebook, params)


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit and whether code differs from it; None outside git or before the first commit."""
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--", ".", *(f":!{p}" for p in RESULTS))
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changed.strip())}


def stored_in(path: Path) -> str:
    """Digest of a file of earlier results and the commit that brought it, such as ``c7bac5ba of
    commit 1f0d3c9``: what a number carries that was measured then and not in this run."""
    try:
        # A shallow clone would name its only commit.
        shallow = _git(path.parent, "rev-parse", "--is-shallow-repository").strip() == "true"
        log = _git(path.parent, "log", "-1", "--format=%h", "--", path.name)
        commit = "" if shallow else log.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return f"{sha256(path)[:8]} of commit {commit or 'unknown'}"


def _git(root: Path, *arguments: str) -> str:
    # Reading the state must not take the index lock from somebody who is committing.
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on, without importing them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """What the numbers were made on: processor, cores this process may use, memory, system."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return {
        "cpu": _cpu_model(),
        "cores": len(usable(0)),
        "memory_mb": round(psutil.virtual_memory().total / 2**20),
        "os": f"{platform.system()} {platform.release()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = (line.partition(":") for line in lines)
    models = (value.strip() for key, _, value in fields if key.strip() in ("model name", "Model"))
    return next(models, platform.processor() or platform.machine())
