"""Results of a run: are they complete, did they move, and may they replace the committed ones?"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynlib.files import MALFORMED, read_plain, sha256
from suite.errors import SuiteError
from suite.record.metrics import LARGEST_JSON, MetricChange, compare_metrics, read_metrics
from suite.record.provenance import FIGURE_SUFFIXES, MANIFEST_FIELDS
from suite.run.notebooks import ALWAYS_WRITTEN, Notebook, code_of

TABLE_SUFFIXES = (".csv", ".json", ".jsonl")
TABLE_BYTES = 2**20


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a ``manifest.json``; raises `SuiteError` naming the file and what it lacks."""
    try:
        manifest = json.loads(read_plain(path, LARGEST_JSON))
        for field in ("parameters", "outputs"):
            dict(manifest.get(field, {}))
    except (OSError, *MALFORMED) as error:
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

    A file over 1 MiB is left, and an earlier run's in its place is deleted.
    `table` is the suite's record of each notebook. Raises `SuiteError`, having copied nothing, if
    one is not "ok" there, is not complete, is not proved to be the suite's own run of the notebook
    as it is with its default parameters, or (without `force`) came from uncommitted code.
    """
    copies: list[tuple[Path, Path]] = []
    left: list[str] = []
    too_large: list[Path] = []
    for notebook in notebooks:
        name = notebook.name
        record = table.get(name)
        if record is None or record["status"] != "ok":
            status = record["status"] if record else "not run"
            raise SuiteError(f"not promoted: {name} is {status}; promote a clean run")
        try:
            check_complete(notebook, out_dir, record["profile"])
            manifest = read_manifest(out_dir / name / "manifest.json")
            _check_default_run(notebook, out_dir, record, manifest)
        except SuiteError as error:
            raise SuiteError(f"not promoted: {name} {error}") from None
        git = manifest["git"]
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
                too_large.append(root / "data" / "results" / path)
            else:
                copies.append((source, root / "data" / "results" / path))
        for figure in notebook.figures:
            for suffix in FIGURE_SUFFIXES:
                file = f"{figure}{suffix}"
                copies.append((out_dir / "figures" / file, root / "figures" / file))
    try:
        _replace_all(dict(copies), root)
    except OSError as error:
        raise SuiteError(f"not promoted, nothing was replaced: {error}") from error
    for path in too_large:
        path.unlink(missing_ok=True)  # what an earlier run left there is not of this one
    return [target for _, target in copies], left


def promote_pictures(
    notebooks: Sequence[Notebook], root: Path, git: Mapping[str, Any] | None, force: bool = False
) -> int:
    """Draw the committed figures again from their committed tables; returns how many.

    What was computed stays, so a look that has changed needs no run. The manifests get the hashes
    of the new pictures and, as ``drawn``, the state `git` of the code that drew them. Raises
    `SuiteError`, having replaced nothing, if a table is not the one that its manifest names, or
    (without `force`) if there is code that is not committed.
    """
    from suite.record.figures import draw_again

    if not force and (git is None or git["dirty"]):
        raise SuiteError("not promoted: code is not committed; commit, or give --force")
    copies: dict[Path, Path] = {}
    count = 0
    with tempfile.TemporaryDirectory(prefix=".figures-", dir=root) as place:
        for notebook in notebooks:
            target = root / "data" / "results" / notebook.name / "manifest.json"
            manifest = read_manifest(target) | {"drawn": git}
            for name in notebook.figures:
                table = root / "figures" / f"{name}.csv"
                if manifest["outputs"].get(f"figures/{table.name}") != sha256(table):
                    raise SuiteError(f"not promoted: {table} is not the table of {target}")
                scratch = Path(place) / table.name
                shutil.copyfile(table, scratch)
                draw_again(scratch)
                for suffix in set(FIGURE_SUFFIXES) - {table.suffix}:
                    picture = scratch.with_suffix(suffix)
                    manifest["outputs"][f"figures/{picture.name}"] = sha256(picture)
                    copies[picture] = root / "figures" / picture.name
                count += 1
            written = Path(place) / f"{notebook.name}.json"
            written.write_text(json.dumps(manifest, indent=2) + "\n")
            copies[written] = target
        try:
            _replace_all(copies, root)
        except OSError as error:
            raise SuiteError(f"not promoted, nothing was replaced: {error}") from error
    return count


def proofs(notebook: Notebook, out_dir: Path) -> dict[str, str]:
    """Hashes of the two files that prove a run: its manifest and its executed notebook."""
    folder = out_dir / notebook.name
    files = (folder / "manifest.json", _executed(notebook, out_dir))
    return {file.name: sha256(file) for file in files if file.is_file()}


def _executed(notebook: Notebook, out_dir: Path) -> Path:
    return out_dir / notebook.name / f"{notebook.name}.ipynb"


def _check_default_run(
    notebook: Notebook, out_dir: Path, record: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Raises `SuiteError` unless the files are what the suite's run with the defaults left."""
    # A run by hand, in JupyterLab say, leaves other files than the suite has seen.
    if len(record.get("proofs", ())) < 2 or record["proofs"] != proofs(notebook, out_dir):
        raise SuiteError("has another manifest or executed notebook than the suite's run left")
    executed = json.loads(_executed(notebook, out_dir).read_text())
    handed = executed["metadata"]["papermill"]["parameters"]
    used = manifest["parameters"] | handed
    given = {"profile": record["profile"], "out_dir": manifest["parameters"].get("out_dir")}
    for key, default in (notebook.parameters | given).items():
        value = used.get(key, default)
        if value != default or type(value) is not type(default):
            raise SuiteError(f"ran with {key} = {value!r}; its default is {default!r}")
    if code_of(_executed(notebook, out_dir)) != code_of(notebook.path):
        raise SuiteError("ran other cells than the notebook has now; run it again")
    promised = [f"{notebook.name}/metrics.json", *notebook.writes]
    promised += [
        f"figures/{name}{suffix}" for name in notebook.figures for suffix in FIGURE_SUFFIXES
    ]
    for path in promised:
        if manifest["outputs"].get(path) != sha256(out_dir / path):
            raise SuiteError(f"has another {path} than its manifest says; run it again")


def _replace_all(copies: Mapping[Path, Path], root: Path) -> None:
    """Put each source in its target's place, or on any error none."""
    with tempfile.TemporaryDirectory(prefix=".promote-", dir=root) as folder:
        old, new = Path(folder) / "old", Path(folder) / "new"
        old.mkdir()
        new.mkdir()
        for number, source in enumerate(copies):
            shutil.copyfile(source, new / str(number))  # a full disk shows here
        done: list[tuple[Path, Path]] = []
        try:
            for number, target in enumerate(copies.values()):
                target.parent.mkdir(parents=True, exist_ok=True)
                aside = old / str(number)
                done.append((aside, target))
                if target.exists():
                    target.rename(aside)
                (new / str(number)).rename(target)
        except BaseException:
            for aside, target in reversed(done):
                if aside.exists():
                    aside.replace(target)
                else:
                    target.unlink(missing_ok=True)
            raise
