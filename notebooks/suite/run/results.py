"""Results of a run: are they complete, did they move, and may they replace the committed ones?"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynlib.files import FIGURE_SUFFIXES, atomic_write
from suite.errors import SuiteError
from suite.record.metrics import MetricChange, compare_metrics, read_metrics
from suite.record.provenance import MANIFEST_FIELDS
from suite.run.notebooks import ALWAYS_WRITTEN, Notebook

TABLE_SUFFIXES = (".csv", ".json", ".jsonl")
TABLE_BYTES = 2**20


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a ``manifest.json``; raises `SuiteError` naming the file and what it lacks."""
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SuiteError(f"{path}: not a readable manifest: {error}") from None
    missing = [field for field in MANIFEST_FIELDS if field not in manifest]
    if missing:
        raise SuiteError(f"{path}: lacks {', '.join(missing)}")
    return manifest


def check_complete(notebook: Notebook, out_dir: Path, profile: str) -> None:
    """Raises `SuiteError` unless the run left all that `notebook` promises, and no other figure."""
    folder = out_dir / notebook.name
    absent = [name for name in ALWAYS_WRITTEN if not (folder / name).exists()]
    if absent:
        raise SuiteError(f"wrote no {' and no '.join(absent)}; end it with `run.finish()`")
    for key, entry in read_metrics(folder / "metrics.json").items():
        if entry["profile"] != profile:
            raise SuiteError(
                f"metric {key!r} says profile {entry['profile']}, the run is {profile}"
            )
    manifest = read_manifest(folder / "manifest.json")
    if manifest["notebook"] != notebook.name:
        raise SuiteError(f"its manifest is of {manifest['notebook']!r}")
    for path in notebook.writes:
        if not (out_dir / path).exists():
            raise SuiteError(f"declares to write {path}, and did not")
    for name in notebook.figures:
        for suffix in FIGURE_SUFFIXES:
            if not (out_dir / "figures" / f"{name}{suffix}").exists():
                raise SuiteError(f"declares figure {name!r}, and left out {name}{suffix}")
    if extra := sorted(set(manifest["figures"]) - set(notebook.figures)):
        raise SuiteError(f"draws figures it does not declare: {', '.join(extra)}")


def compare_with_committed(
    notebooks: Sequence[Notebook], out_dir: Path, committed: Path, profile: str
) -> dict[str, list[MetricChange] | str]:
    """Each notebook's changed metrics, or a text if the committed ones are of another profile.

    Raises `SuiteError` if nothing is committed for one, or nothing at all could be compared.
    """
    found: dict[str, list[MetricChange] | str] = {}
    for notebook in notebooks:
        name = notebook.name
        try:
            old = read_metrics(committed / name / "metrics.json")
        except SuiteError as error:
            raise SuiteError(f"{name}: no committed metrics to compare with: {error}") from None
        others = {entry["profile"] for entry in old.values()} - {profile}
        if others:
            found[name] = f"the committed metrics are of profile {', '.join(sorted(others))}"
        else:
            path = out_dir / name / "metrics.json"
            found[name] = compare_metrics(old, read_metrics(path) if path.exists() else {})
    if all(isinstance(changes, str) for changes in found.values()):
        raise SuiteError(f"no committed metrics of profile {profile}: nothing was compared")
    return found


def promote(
    notebooks: Sequence[Notebook],
    out_dir: Path,
    root: Path,
    table: Mapping[str, Mapping[str, Any]],
    force: bool = False,
) -> tuple[list[Path], list[str]]:
    """Copy the results of `notebooks` over the committed ones; returns what was copied and left.

    `table` is the suite's record of each notebook. Raises `SuiteError`, having copied nothing, if
    one is not "ok" there, is not complete, or (without `force`) came from uncommitted code.
    """
    copies: list[tuple[Path, Path]] = []
    left: list[str] = []
    for notebook in notebooks:
        name = notebook.name
        record = table.get(name)
        if record is None or record["status"] != "ok":
            status = record["status"] if record else "not run"
            raise SuiteError(f"not promoted: {name} is {status}; promote a clean run")
        try:
            check_complete(notebook, out_dir, record["profile"])
        except SuiteError as error:
            raise SuiteError(f"not promoted: {name} {error}") from None
        git = read_manifest(out_dir / name / "manifest.json")["git"]
        if not force and (git is None or git["dirty"]):
            raise SuiteError(
                f"not promoted: {name} ran from code that is not committed; commit and run again, "
                "or give --force"
            )
        for path in (*(f"{name}/{file}" for file in ALWAYS_WRITTEN), *notebook.writes):
            source = out_dir / path
            if source.suffix not in TABLE_SUFFIXES or source.is_dir():
                left.append(f"{path} (no table)")
            elif source.stat().st_size > TABLE_BYTES:
                left.append(f"{path} (over 1 MiB)")
            else:
                copies.append((source, root / "data" / "results" / path))
        for figure in notebook.figures:
            for suffix in FIGURE_SUFFIXES:
                file = f"{figure}{suffix}"
                copies.append((out_dir / "figures" / file, root / "figures" / file))
    for source, target in dict(copies).items():
        atomic_write(target, source.read_bytes())
    return [target for _, target in copies], left
