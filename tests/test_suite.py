"""The runner: whatever goes wrong in a notebook makes the run fail, say so, and lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import nbformat.v4 as v4
import psutil
import pytest
from matplotlib.figure import Figure

from dynlib.files import sha256
from suite.errors import SuiteError
from suite.record import figures
from suite.record.metrics import read_metrics
from suite.record.provenance import MANIFEST_FIELDS
from suite.run import execute
from suite.run.cli import main
from suite.run.execute import PACKAGES
from suite.run.keep import locked, replacing
from suite.run.notebooks import discover, read_notebook, select

PARAMETERS = """\
profile = "quick"
seed = 0
board = "auto"
dataset = "generated"
data_dir = ""
out_dir = "runs/quick"
value = 1.0
mode = ""
"""
START = """\
from suite.record import start
run = start(NAME, {"profile": profile, "seed": seed, "out_dir": out_dir})
"""
WORK = """\
run.output("table.csv").write_text(f"value\\n{value}\\n")
run.metrics.add("a_ms", value, unit="ms", source="simulated", what="a number", tolerance=0.1)
run.metrics.add("b_ms", None, unit="ms", source="measured", what="another", why="no sensor")
run.metrics.add("c_ms", value, unit="ms", source="measured", what="timed", tolerance=0.1)
"""
FIGURE = """\
from matplotlib.figure import Figure
from suite.record.figures import figure
import pandas as pd
if mode != "no figure":
    figure("front")(lambda table: Figure())
    run.draw("front", pd.DataFrame({"x": [1], "source": "measured"}))
"""
# One notebook with a mode for each way to fail: a kernel start costs more than all the rest.
FAULTS = """\
import os, signal, sys, time
if mode == "exit":
    sys.exit(0)
if mode == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "raise":
    raise ValueError("the thing broke")
if mode == "sleep":
    time.sleep(60)
"""
# Three of them are too long together; a kernel that starts slowly has not begun the last.
NAP = 'if mode == "naps": time.sleep(8)'


def write_notebook(folder: Path, name: str, cells: list[str], **promises) -> Path:
    book = v4.new_notebook()
    book.cells = [v4.new_markdown_cell(f"# About {name}")]
    for source in cells:
        cell = v4.new_code_cell(source.replace("NAME", repr(name)))
        if source.startswith("profile ="):
            cell.metadata["tags"] = ["parameters"]
        book.cells.append(cell)
    book.metadata["dynlib"] = {"reads": [], "writes": [], "figures": [], "minutes": 1} | promises
    path = folder / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(book))
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one notebook that works, unless told otherwise, and one that reads it."""
    monkeypatch.chdir(tmp_path)
    # A user's own kernel of the same name is neither used nor touched.
    kernel = tmp_path / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_configdir())
    books = tmp_path / "notebooks"
    write_notebook(
        books,
        "01_make_table",
        [PARAMETERS, START, WORK, FAULTS, NAP, NAP, NAP, FIGURE, "run.finish()"],
        writes=["01_make_table/table.csv"],
        figures=["front"],
    )
    reader = ['text = run.input("01_make_table/table.csv").read_text()', "run.finish()"]
    write_notebook(
        books, "02_read_table", [PARAMETERS, START, *reader], reads=["01_make_table/table.csv"]
    )
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def earlier(root):
    """Earlier results of the first notebook, made up, since only their survival matters."""
    out = root / "runs" / "quick"
    for path in ("01_make_table/table.csv", "01_make_table/old.bin", "figures/front.png"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(f"earlier {path}")
    return out


@pytest.mark.notebooks
def test_runs_checks_and_promotes(root, capsys):
    assert main([], root) == 0
    out = root / "runs" / "quick"
    shown = capsys.readouterr().out
    assert "02_read_table  ok" in shown
    assert "total" in shown
    record = json.loads((out / "suite.json").read_text())
    assert [row["status"] for row in record["notebooks"]] == ["ok", "ok"]
    manifest = json.loads((out / "02_read_table" / "manifest.json").read_text())
    assert list(manifest["inputs"]) == ["runs/quick/01_make_table/table.csv"]
    assert files(root / "home") == {".local/share/jupyter/kernels/python3/kernel.json": b"{}"}

    # Nothing is committed, and the code is not under git.
    assert main(["--check", "--no-run"], root) == 2
    assert "no committed metrics" in capsys.readouterr().out
    assert main(["--promote", "--no-run"], root) == 2
    assert "not committed" in capsys.readouterr().out
    assert not (root / "data").exists()

    assert main(["--promote", "--no-run", "--force"], root) == 0
    results = root / "data" / "results"
    assert sorted(files(results)) == sorted(
        [
            f"{n}/{f}.json"
            for n in ("01_make_table", "02_read_table")
            for f in ("metrics", "manifest")
        ]
        + ["01_make_table/table.csv"]
    )
    assert sorted(files(root / "figures")) == ["front.csv", "front.pdf", "front.png"]
    assert str(root) not in "".join(p.read_text() for p in results.rglob("*.json"))
    assert main(["--check", "--no-run"], root) == 0

    # A second run of one notebook, with a value that moved.
    capsys.readouterr()
    assert main(["--only", "1", "--set", "value=1.2", "--check"], root) == 1
    shown = capsys.readouterr().out
    assert "a_ms moved: 1.0 -> 1.2" in shown
    assert "c_ms drifted: 1.0 -> 1.2 (tolerance 0.1)" in shown
    assert "3 metrics compared, 1 moved or missing, 1 measured" in shown
    assert "02_read_table" not in shown
    assert read_metrics(out / "01_make_table" / "metrics.json")["a_ms"]["value"] == 1.2
    assert len(json.loads((out / "suite.json").read_text())["notebooks"]) == 2


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.notebooks
def test_only_the_clean_default_run_is_promoted(root, capsys):
    """Whatever is changed after the run, or was given to it, nothing at all is copied."""
    out = root / "runs" / "quick"
    promote = ["--promote", "--no-run", "--force"]

    def refused(message):
        capsys.readouterr()
        assert main(promote, root) == 2
        assert message in capsys.readouterr().out
        assert not (root / "data").exists()
        assert not (root / "figures").exists()

    assert main(["--set", "seed=1"], root) == 0
    refused("01_make_table ran with seed = 1; its default is 0")
    assert main(["--board", "jetson-nano", "--only", "1"], root) == 0
    refused("ran with board = 'jetson-nano'")
    assert main([], root) == 0
    for path, old, new, message in (
        ("01_make_table/metrics.json", "1.0", "2.0", "another 01_make_table/metrics.json"),
        ("01_make_table/table.csv", "1.0", "2.0", "another 01_make_table/table.csv"),
        ("figures/front.csv", "1", "2", "another figures/front.csv"),
        ("02_read_table/manifest.json", '"seed": 0', '"seed" : 0', "another manifest"),
        ("01_make_table/01_make_table.ipynb", "time.sleep", "time.slept", "executed notebook"),
        ("../../notebooks/02_read_table.ipynb", "text =", "words =", "other cells"),
    ):
        before = (out / path).read_bytes()
        rewrite(out / path, old, new)
        refused(message)
        (out / path).write_bytes(before)
    (root / "figures").write_text("no folder")  # which comes after the tables
    assert main([*promote, "--only", "1"], root) == 2
    assert "not promoted" in capsys.readouterr().out
    assert (root / "figures").read_text() == "no folder"
    assert not files(root / "data")


def test_a_table_too_large_to_promote_leaves_no_earlier_one_behind(root, capsys, monkeypatch):
    promote = ["--only", "1", "--promote", "--no-run", "--force"]
    table = root / "data" / "results" / "01_make_table" / "table.csv"
    assert main(["--only", "1"], root) == 0
    assert main(promote, root) == 0
    assert table.is_file()
    monkeypatch.setattr("suite.run.results.TABLE_BYTES", 2)
    assert main(promote, root) == 0
    assert "01_make_table/table.csv (over 1 MiB)" in capsys.readouterr().out
    assert not table.exists()


def test_a_new_look_is_promoted_without_a_run(root, capsys, monkeypatch):
    """Pictures and their hashes change; tables, metrics and all else that was computed do not."""
    table = root / "figures" / "look.csv"
    table.parent.mkdir()
    table.write_text("x,source,profile\n1,measured,quick\n")
    for picture in ("look.png", "look.pdf"):
        (table.parent / picture).write_text("as it was drawn once")
    promises = {"writes": ["01_make_table/table.csv"], "figures": ["look"]}
    write_notebook(root / "notebooks", "01_make_table", [PARAMETERS], **promises)
    folder = root / "data" / "results" / "01_make_table"
    folder.mkdir(parents=True)
    hashes = {f"figures/{path.name}": sha256(path) for path in table.parent.iterdir()}
    old = dict.fromkeys(MANIFEST_FIELDS, "kept") | {"parameters": {}, "outputs": hashes}
    (folder / "manifest.json").write_text(json.dumps(old))
    monkeypatch.setitem(figures._drawings, "look", lambda table: Figure())
    command = ["--figures", "--promote", "--only", "1"]
    before = files(root / "figures")

    assert main(command, root) == 2  # no git here
    assert "not committed" in capsys.readouterr().out
    rewrite(table, "1,", "2,")
    assert main([*command, "--force"], root) == 2
    assert "look.csv is not the table of" in capsys.readouterr().out
    rewrite(table, "2,", "1,")
    assert files(root / "figures") == before

    assert main([*command, "--force"], root) == 0
    assert table.read_bytes() == before["look.csv"]
    manifest = json.loads((folder / "manifest.json").read_text())
    for picture in ("look.png", "look.pdf"):
        path = table.with_name(picture)
        assert path.read_bytes() != before[picture]
        assert manifest["outputs"].pop(f"figures/{picture}") == sha256(path)
    assert manifest.pop("drawn") is None  # the state of the code, which git would know
    del old["outputs"]["figures/look.png"], old["outputs"]["figures/look.pdf"]
    assert manifest == old


def test_figures_are_never_drawn_over_the_committed_ones(root, capsys, monkeypatch):
    monkeypatch.setattr("suite.record.figures.redraw", lambda folder: [str(folder)])
    committed = root / "figures" / "front.csv"
    committed.parent.mkdir()
    committed.write_text("x,source,profile\n1,measured,quick\n")
    assert main(["--figures"], root) == 0
    assert str(root / "runs" / "quick" / "figures") in capsys.readouterr().out
    assert list(files(root / "figures")) == ["front.csv"]
    assert main(["--figures", "--out", str(root)], root) == 2


@pytest.mark.notebooks
@pytest.mark.faults
@pytest.mark.parametrize(
    ("mode", "limits_s", "messages"),
    [
        ("exit", (60, 60), ["ended early in cell 5"]),
        ("kill", (60, 60), ["the kernel died in cell 5"]),
        ("raise", (60, 60), ["ValueError in cell 5", "the thing broke"]),
        ("sleep", (10, 60), ["cell 5", "ran past its limit of 10 s a cell"]),
        ("naps", (60, 20), ["ran past its limit of 20 s in cell"]),
        ("no figure", (60, 60), ["declares figure 'front'", "front.png"]),
    ],
)
def test_a_fault_fails_the_run_and_keeps_earlier_results(
    root, earlier, capsys, mode, limits_s, messages
):
    before, others = files(earlier), psutil.Process().children(recursive=True)
    assert main(["--only", "01", "--set", f"mode={mode}"], root, limits_s) == 1
    shown = capsys.readouterr().out
    assert "01_make_table FAILED" in shown
    for message in messages:
        assert message in shown
    after = files(earlier)
    assert {name: after[name] for name in before} == before
    new = set(after) - set(before) - {".lock"}
    assert new == {"01_make_table/01_make_table.failed.ipynb", "suite.json"}
    assert main(["--only", "01", "--promote", "--no-run", "--force"], root) == 2
    assert "01_make_table is failed" in capsys.readouterr().out
    left = set(psutil.Process().children(recursive=True)) - set(others)
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def start_suite(root, *ignored) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A suite in a process of its own whose notebook sleeps; papermill and its kernel."""
    environment = {
        **os.environ,
        "DYNLIB_ROOT": str(root),
        "PYTHONPATH": os.pathsep.join(map(str, PACKAGES)),
    }

    def as_a_shell_does():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    suite = subprocess.Popen(
        [sys.executable, "-m", "suite.run", "--only", "01", "--set", "mode=sleep"],
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=as_a_shell_does,
    )
    descendants: list[psutil.Process] = []
    deadline = time.monotonic() + 40
    while len(descendants) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        descendants = psutil.Process(suite.pid).children(recursive=True)
    assert len(descendants) >= 2
    return suite, descendants


@pytest.mark.notebooks
@pytest.mark.faults
@pytest.mark.parametrize(
    ("signals", "status"),
    [([signal.SIGKILL], -9), ([signal.SIGINT], 130), ([signal.SIGINT] * 2, None)],
    ids=["kill", "Ctrl-C", "Ctrl-C twice"],
)
def test_a_killed_suite_stops_its_kernel_and_loses_nothing(root, earlier, signals, status):
    before = files(earlier)
    suite, descendants = start_suite(root)
    for number in signals:
        suite.send_signal(number)
        time.sleep(0.05)
    suite.wait(30)
    assert suite.returncode == status or (status is None and suite.returncode)
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive
    with locked(earlier):
        after = files(earlier)
    after.pop(".lock")
    after.pop("01_make_table/01_make_table.failed.ipynb", None)
    assert after == before


@pytest.mark.notebooks
@pytest.mark.faults
def test_a_suite_under_nohup_survives_the_end_of_the_session(root):
    suite, descendants = start_suite(root, signal.SIGHUP)
    suite.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    assert suite.poll() is None
    suite.terminate()
    assert suite.wait(30) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive


def test_sets_aside_and_puts_back_at_every_point(root, earlier):
    """A kill may come between any two renames; stand-ins for it are partly undone set-asides."""
    notebook = discover(root / "notebooks")[0]
    before = files(earlier)

    def interrupted_run():
        with locked(earlier), replacing(earlier, notebook):
            assert not (earlier / "01_make_table").exists()
            (earlier / "01_make_table").mkdir()
            for path in ("01_make_table/half", "figures/front.png", "figures/front.csv"):
                (earlier / path).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert files(earlier) == before | {".lock": b""}

    aside = earlier / ".previous" / "01_make_table"
    (aside / "figures").mkdir(parents=True)
    (earlier / "01_make_table").rename(aside / "results")  # killed before the figures moved
    with locked(earlier):
        assert files(earlier) == before | {".lock": b""}


def test_success_replaces_earlier_results(root, earlier):
    notebook = discover(root / "notebooks")[0]
    with locked(earlier), replacing(earlier, notebook):
        (earlier / "01_make_table").mkdir()
        (earlier / "01_make_table" / "new").write_text("new")
    assert set(files(earlier)) == {"01_make_table/new", ".lock"}


def test_one_suite_at_a_time(root, capsys):
    out = root / "runs" / "quick"
    with locked(out):
        assert main([], root) == 2
    assert "another run is using" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "vlaue=2"], "01_make_table: unknown parameter 'vlaue'; did you mean value"),
        (["--set", "value=two"], "parameter 'value' takes float like 1.0, not 'two'"),
        (["--set", "value=nan"], "not 'nan'"),
        (["--set", "value"], "expected NAME=VALUE"),
        (["--set", "profile=full"], "without an own option"),
        (["--only", "9"], "no notebook '9'; there are 01_make_table, 02_read_table"),
        (["--from", "three"], "no notebook 'three'"),
        (["--board", "jetson-xavier-nxx"], "jetson-xavier-nx"),
        (["--figures"], "no tables of figures"),
    ],
)
def test_misuse_is_an_error_before_anything_runs(root, capsys, options, message):
    assert main(options, root) == 2
    assert message in capsys.readouterr().out
    assert not list(root.glob("runs/quick/0*"))


def test_a_missing_input_names_its_maker(root, capsys):
    assert main(["--only", "2"], root) == 1
    assert "reads 01_make_table/table.csv" in (shown := capsys.readouterr().out)
    assert "run 01_make_table first" in shown


def test_list(root, capsys):
    assert main(["--list"], root) == 0
    shown = capsys.readouterr().out
    assert "01_make_table: About 01_make_table" in shown
    assert "quick 1, full 1; figures: front" in shown


def test_select(root):
    notebooks = discover(root / "notebooks")
    assert select(notebooks, None, None) == notebooks
    assert select(notebooks, None, "02") == notebooks[1:]
    assert select(notebooks, "01_make_table", None) == notebooks[:1]


@pytest.mark.parametrize("text", [None, "", '{"cells": [{"cell_ty', "{}"])
def test_a_half_written_copy_of_a_killed_notebook_has_no_cells(tmp_path, text):
    copy = tmp_path / "01.ipynb"
    if text is not None:
        copy.write_text(text)
    assert list(execute._cells(copy)) == []


@pytest.mark.parametrize(
    ("name", "cells", "promises", "message"),
    [
        ("1_bad", [PARAMETERS], {}, "NN_verb_object"),
        ("03_no_tag", ["x = 1"], {}, "one cell tagged `parameters`, has 0"),
        ("03_two_tags", [PARAMETERS, PARAMETERS], {}, "has 2"),
        ("03_lacks", ["profile = 'quick'"], {}, "lacks seed, board"),
        ("03_derived", [PARAMETERS + "double = 2 * value\n"], {}, "may only hold lines like"),
        ("03_nested", [PARAMETERS + "sizes = [1, 2]\n"], {}, "may only hold"),
        ("03_minutes", [PARAMETERS], {"minutes": {"quick": 1}}, "one for each of quick, full"),
        ("03_zero", [PARAMETERS], {"minutes": 0}, "positive"),
        ("03_more", [PARAMETERS], {"budget": 1}, "must have exactly"),
        ("03_texts", [PARAMETERS], {"figures": "front"}, "must be a list of texts"),
    ],
)
def test_a_notebook_that_breaks_the_contract(tmp_path, name, cells, promises, message):
    path = write_notebook(tmp_path, name, cells, **promises)
    with pytest.raises(SuiteError, match=message) as raised:
        read_notebook(path)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("promises", "message"),
    [
        ({"reads": ["04_later/table.csv"]}, "no earlier notebook writes"),
        ({"reads": ["01_make_table/other.csv"]}, "no earlier notebook writes"),
        ({"writes": ["01_make_table/x.csv"]}, "may write only below 03_more/"),
        ({"figures": ["front"]}, "which 01_make_table draws"),
    ],
)
def test_promises_that_cannot_be_kept(root, promises, message):
    write_notebook(root / "notebooks", "03_more", [PARAMETERS], **promises)
    with pytest.raises(SuiteError, match=message):
        discover(root / "notebooks")


def test_two_notebooks_with_one_number(root):
    write_notebook(root / "notebooks", "02_another_one", [PARAMETERS])
    with pytest.raises(SuiteError, match="same number"):
        discover(root / "notebooks")
