"""The suite's command line: choose notebooks, run them, compare and promote what they left."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlib.errors import DynlibError
from dynlib.files import MALFORMED, atomic_write, repo_root
from suite.errors import SuiteError
from suite.record.headlines import write_headlines
from suite.record.metrics import PROFILES
from suite.record.provenance import find_input, git_state
from suite.run.execute import execute
from suite.run.keep import locked, replacing
from suite.run.notebooks import Notebook, discover, select
from suite.run.results import (
    check_complete,
    compare_with_committed,
    promote,
    promote_pictures,
    proofs,
)

EPILOG = """\
also:
  run_all.sh test [...]   install, then run the tests; what follows goes to pytest
  run_all.sh lab  [...]   install, then open JupyterLab on the notebooks
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Runs every notebook in reading order and draws every figure.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="quick", help="sizes to run with (default: quick)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="NN", help="run this notebook alone")
    which.add_argument("--from", metavar="NN", dest="first", help="run this one and those after it")
    add("--board", metavar="NAME|PATH", help="board for all notebooks, not their own choice")
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="set a notebook parameter")
    add("--out", metavar="DIR", type=Path, help="where to write (default: runs/<profile>)")
    add("--check", action="store_true", help="then compare the metrics with the committed ones")
    add("--promote", action="store_true", help="then copy the results over the committed ones")
    add("--no-run", action="store_true", help="check or promote the run that is there")
    add("--force", action="store_true", help="promote results of uncommitted code too")
    add(
        "--figures",
        action="store_true",
        help="only draw the figures again from their tables; with --promote the committed ones",
    )
    add("--site", action="store_true", help="only make a static site of the run that is there")
    add("--list", action="store_true", help="only list the notebooks")
    return parser


def main(
    argv: Sequence[str], root: Path | None = None, limits_s: tuple[float, float] | None = None
) -> int:
    """Run the command line and return its exit status: 0, 1 if something failed, 2 if misused.

    Args:
        argv: the options, without a program name.
        root: the repository; found from the package if None.
        limits_s: of a cell and a notebook; taken from each notebook's budget if None.
    """
    args = _parser().parse_args(argv)
    root = root or repo_root()
    out_dir = (args.out or root / "runs" / args.profile).resolve()
    try:
        if args.figures and not args.promote:
            return _figures(out_dir, root)
        notebooks = discover(root / "notebooks")
        if args.site:
            return _site(notebooks, out_dir, root)
        if args.list:
            return _list(notebooks)
        chosen = select(notebooks, args.only, args.first)
        if args.figures:
            count = promote_pictures(chosen, root, git_state(root), args.force)
            print(f"drew {count} committed figures of {len(chosen)} notebooks again")
            return 0
        parameters = _parameters(chosen, args, out_dir, root)
        with locked(out_dir):
            failed = False
            if not args.no_run:
                failed = not _run(chosen, parameters, out_dir, root, args.profile, limits_s)
            if args.check:
                failed |= not _check(chosen, out_dir, root, args.profile)
            if args.promote:
                _promote(chosen, out_dir, root, args.force)
        return int(failed)
    except (DynlibError, OSError) as error:
        print(f"error: {error}")
        return 2


def _parameters(
    chosen: Sequence[Notebook], args: argparse.Namespace, out_dir: Path, root: Path
) -> dict[str, dict[str, Any]]:
    """What each notebook is handed. All is checked before the first one runs."""
    shared: dict[str, Any] = {"profile": args.profile, "out_dir": _shown(out_dir, root)}
    if args.board is not None:
        from dynlib.machine.bind import load_board

        given = Path(args.board)
        shared["board"] = _shown(given.resolve(), root) if given.is_file() else args.board
        load_board(given if given.is_file() else args.board)
    texts = {}
    for setting in args.set:
        name, equals, text = setting.partition("=")
        if not equals or name in ("profile", "out_dir", "board"):
            raise SuiteError(f"--set {setting}: expected NAME=VALUE, NAME without an own option")
        texts[name] = text
    handed = {}
    for notebook in chosen:
        notebook.check_parameters([*shared, *texts])
        typed = {name: _typed(notebook, name, text) for name, text in texts.items()}
        handed[notebook.name] = shared | typed
    return handed


def _shown(path: Path, root: Path) -> str:
    """A path as notebooks and manifests get it: relative, if it is inside the repository."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _typed(notebook: Notebook, name: str, text: str) -> Any:
    default = notebook.parameters[name]
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text) if kind in (int, float) else text
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
    except (ValueError, KeyError):
        raise SuiteError(
            f"{notebook.name}: parameter {name!r} takes {kind.__name__} like {default!r}, "
            f"not {text!r}"
        ) from None
    return value


def _run(
    chosen: Sequence[Notebook],
    parameters: dict[str, dict[str, Any]],
    out_dir: Path,
    root: Path,
    profile: str,
    limits_s: tuple[float, float] | None,
) -> bool:
    """Run the notebooks one after the other, whatever becomes of each; True if all are well."""
    record = _record(out_dir)
    rows = []
    for notebook in chosen:
        budget_s = 60 * notebook.minutes[profile]
        print(f"{notebook.name} ... (budget {budget_s:.0f} s)", flush=True)
        started_s = time.monotonic()
        row = {"notebook": notebook.name, "profile": profile, "status": "failed"}
        try:
            _check_inputs(notebook, out_dir, root)
            with replacing(out_dir, notebook):
                executed = out_dir / notebook.name / f"{notebook.name}.ipynb"
                limits = limits_s or notebook.limits_s(profile)
                execute(notebook, parameters[notebook.name], executed, root, limits)
                check_complete(notebook, out_dir, profile)
            row |= {"status": "ok", "proofs": proofs(notebook, out_dir)}
        except (DynlibError, OSError) as error:  # a full disk, a folder that cannot be written
            row["error"] = str(error)
            print(f"{notebook.name} FAILED: {error}", flush=True)
        row |= {"seconds": round(time.monotonic() - started_s, 1), "budget_s": round(budget_s, 1)}
        rows.append(row)
        record[notebook.name] = row
        try:
            _write_record(out_dir, record)
        except OSError as error:
            row |= {"status": "failed", "error": str(error)}
    _print_table(rows)
    return all(row["status"] == "ok" for row in rows)


def _check_inputs(notebook: Notebook, out_dir: Path, root: Path) -> None:
    for path in notebook.reads:
        if find_input(path, out_dir, root) is None:
            raise SuiteError(
                f"reads {path}, which is neither in {_shown(out_dir, root)} nor in data/results "
                f"nor in the repository; run {Path(path).parts[0]} first"
            )


def _record(out_dir: Path) -> dict[str, dict[str, Any]]:
    """What is known of each notebook in `out_dir`, from this and earlier runs."""
    path = out_dir / "suite.json"
    try:
        rows = json.loads(path.read_text())["notebooks"] if path.exists() else []
        return {row["notebook"]: row for row in rows}
    except (OSError, KeyError, *MALFORMED) as error:
        raise SuiteError(f"{path}: unreadable ({error!r}); delete it and run again") from None


def _write_record(out_dir: Path, record: dict[str, dict[str, Any]]) -> None:
    rows = [record[name] for name in sorted(record)]
    total_s = round(sum(row["seconds"] for row in rows), 1)
    content = {"notebooks": rows, "total_seconds": total_s}
    atomic_write(out_dir / "suite.json", json.dumps(content, indent=2) + "\n")


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["notebook"]) for row in rows)
    print(f"\n{'notebook':{width}}  status  seconds  budget_s")
    for row in rows:
        print(
            f"{row['notebook']:{width}}  {row['status']:6}  {row['seconds']:7.1f}  "
            f"{row['budget_s']:8.0f}" + ("  over" if row["seconds"] > row["budget_s"] else "")
        )
    seconds, budget_s = (sum(row[key] for row in rows) for key in ("seconds", "budget_s"))
    failed = sum(row["status"] != "ok" for row in rows)
    for row in rows:
        if "error" in row:
            print(f"{row['notebook']}: {row['error'].splitlines()[0]}")
    status = f"{failed} bad" if failed else "ok"
    print(f"{'total':{width}}  {status:6}  {seconds:7.1f}  {budget_s:8.0f}", flush=True)


def _check(chosen: Sequence[Notebook], out_dir: Path, root: Path, profile: str) -> bool:
    found = compare_with_committed(chosen, out_dir, root / "data" / "results", profile)
    compared, bad, drifted = 0, 0, 0
    for name, changes in found.items():
        if isinstance(changes, str):
            print(f"{name}: not compared: {changes}")
            continue
        for change in changes:
            compared += change.verdict in ("same", "moved", "drifted", "missing")
            bad += change.is_bad
            drifted += change.verdict == "drifted"
            if change.is_bad or change.verdict == "drifted":
                print(
                    f"{name}: {change.key} {change.verdict}: {change.old} -> {change.new} "
                    f"(tolerance {change.tolerance})"
                )
    print(
        f"check: {compared} metrics compared, {bad} moved or missing, "
        f"{drifted} measured ones beyond their tolerance (no failure)",
        flush=True,
    )
    return bad == 0


def _promote(chosen: Sequence[Notebook], out_dir: Path, root: Path, force: bool) -> None:
    copied, left = promote(chosen, out_dir, root, _record(out_dir), force)
    for path in left:
        print(f"not promoted: {path}")
    if (root / "data" / "headlines.csv").exists():
        write_headlines(root)
    print(f"promoted {len(copied)} files of {len(chosen)} notebooks", flush=True)


def _figures(out_dir: Path, root: Path) -> int:
    folder, committed = out_dir / "figures", root / "figures"
    if folder.resolve() == committed.resolve():
        raise SuiteError(f"--out {out_dir} would draw over the committed figures; give another")
    # Those that no run has drawn here are drawn from the committed tables, on copies of these.
    for table in sorted(committed.glob("*.csv")):
        if not (folder / table.name).exists():
            atomic_write(folder / table.name, table.read_bytes())
    if not any(folder.glob("*.csv")):
        raise SuiteError(f"no tables of figures in {folder} or {committed}")
    from suite.record.figures import redraw

    names = redraw(folder)
    print(f"drew {len(names)} figures in {_shown(folder, root)}: {', '.join(names)}")
    return 0


def _site(notebooks: Sequence[Notebook], out_dir: Path, root: Path) -> int:
    from suite.run.site import build_site

    with locked(out_dir):
        index = build_site(notebooks, out_dir, root)
    print(f"made {_shown(index, root)}")
    return 0


def _list(notebooks: Sequence[Notebook]) -> int:
    for notebook in notebooks:
        budgets = ", ".join(f"{profile} {notebook.minutes[profile]:g}" for profile in PROFILES)
        figures = ", ".join(notebook.figures) or "none"
        print(f"{notebook.name}: {notebook.title}\n    minutes: {budgets}; figures: {figures}")
    return 0
