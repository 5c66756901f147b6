"""JupyterLab: what it opens on, and that a run by hand changes no file.

With ``DYNLIB_LAB=1`` the real server is started and a real browser runs notebooks in it (minutes;
needs Playwright's Python package and a Chromium, see `DYNLIB_BROWSER` in `test_site`).
``DYNLIB_LAB=all`` opens every notebook. Pictures of the screen land in ``runs/lab``.
"""

import json
import os
import subprocess

import pytest

from dynlib.files import repo_root
from suite.errors import SuiteError
from suite.run import lab
from suite.studies import in_lab

ROOT = repo_root()
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ASKED = os.environ.get("DYNLIB_LAB", "")
real = pytest.mark.skipif(not ASKED, reason="DYNLIB_LAB is not set")
SHOTS = ROOT / "runs" / "lab"


def committed() -> str:
    """What git says has changed; nothing below `runs/` is asked for."""
    command = ["git", "status", "--porcelain"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_a_run_leaves_in_a_notebook_is_not_saved(path):
    """As Lab has it after a run: outputs, counters, widgets, times, and what the kernel says."""
    text = path.read_text()
    content = json.loads(text)
    content["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    content["metadata"]["language_info"]["version"] = "3.14.0"
    for number, cell in enumerate(content["cells"]):
        cell["metadata"]["execution"] = {"shell.execute_reply": "2026-11-29T11:00:00Z"}
        if cell["cell_type"] == "code":
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1\n"}]
            cell["execution_count"] = number
    lab.bare({"type": "notebook", "content": content}, path="notebooks/x.ipynb")
    kept = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert kept == text  # as nbformat writes it, byte for byte


@pytest.mark.parametrize("model", [
    {"type": "file", "content": "text"},
    {"type": "notebook", "content": {"metadata": {}, "cells": [{"outputs": ["mine"]}]}},
], ids=["text", "own notebook"])  # fmt: skip
def test_what_is_not_the_suites_is_saved_as_it_is(model):
    before = json.dumps(model)
    lab.bare(model, path="notebooks/mine.ipynb")
    assert json.dumps(model) == before


def test_it_opens_on_a_page_that_is_there():
    assert (ROOT / lab.CONTENTS.removeprefix("/lab/tree/")).is_file()
    assert json.loads((lab.SETTINGS / "overrides.json").read_text())


def test_no_browser_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(in_lab.importlib.util, "find_spec", lambda name: None)
    assert "Playwright" in in_lab.no_browser()
    with pytest.raises(SuiteError, match="Playwright"):
        in_lab.try_in_lab(ROOT)
    monkeypatch.setattr(in_lab.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("DYNLIB_BROWSER", "no-such-browser")
    assert "DYNLIB_BROWSER" in in_lab.no_browser()


def test_what_goes_wrong_in_a_page_is_one_row_of_the_table():
    def fail():
        raise SuiteError("a dialog\nis in the way")

    row = in_lab.attempt("opens", "00_a", fail)
    assert row["error"] == "SuiteError: a dialog"
    assert row["seconds"] >= 0
    assert in_lab.attempt("runs", "00_a", lambda: 59.0) == {
        "what": "runs", "notebook": "00_a", "seconds": 59.0, "error": ""}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of JupyterLab as `run_all.sh lab` starts it, with nobody's settings."""
    with in_lab.lab_server(tmp_path_factory.mktemp("home")) as address:
        yield address


@pytest.fixture
def page(server):
    """A page of a browser."""
    assert not in_lab.no_browser()
    SHOTS.mkdir(parents=True, exist_ok=True)
    with in_lab.lab_page() as page:
        yield page


@real
@pytest.mark.timeout(900)
def test_from_the_table_of_contents_to_a_quickstart_that_has_run(server, page):
    before = committed()
    seconds = in_lab.run_quickstart(page, server, SHOTS)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
    assert committed() == before
    print(f"quickstart_seconds {seconds:.0f}")  # noqa: T201  no bar: other programs count too


@real
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_notebook_opens(server, page, path):
    if ASKED != "all":
        pytest.skip("DYNLIB_LAB is not all")
    in_lab.open_notebook(page, server, path)
    page.screenshot(path=SHOTS / f"{path.stem}.png")


@real
@pytest.mark.timeout(900)
def test_a_slider_moves_and_the_figure_follows(server, page):
    in_lab.move_slider(page, server, SHOTS)
