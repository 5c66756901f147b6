"""JupyterLab: what it opens on, and that a run by hand changes no file.

With ``DYNLIB_LAB=1`` the real server is started and a real browser runs notebooks in it (minutes;
needs Playwright's Python package and a Chromium, see `DYNLIB_BROWSER` in `test_site`).
``DYNLIB_LAB=all`` opens every notebook. Pictures of the screen land in ``runs/lab``.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from dynlib.files import repo_root
from suite.run import lab

ROOT = repo_root()
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ASKED = os.environ.get("DYNLIB_LAB", "")
real = pytest.mark.skipif(not ASKED, reason="DYNLIB_LAB is not set")
SHOTS = ROOT / "runs" / "lab"
# Runs in the page: cells that show an error, and how many code cells have run to their end.
STATE = """() => {
  const model = window.jupyterapp.shell.currentWidget.content.model;
  const cells = [...model.cells].map(cell => cell.toJSON()).filter(c => c.cell_type == "code");
  const errors = cells.flatMap(c => c.outputs.filter(o => o.output_type == "error"));
  const shown = cells.flatMap(c => c.outputs.map(o => Object.keys(o.data ?? {stream: 1})).flat());
  return {code: cells.length, run: cells.filter(c => c.execution_count).length,
          errors: errors.map(e => e.evalue), shown: shown};
}"""


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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of JupyterLab as `run_all.sh lab` starts it, with nobody's settings."""
    home = tmp_path_factory.mktemp("home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1"}
    said = (home / "said.txt").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-P", "-m", "suite.run.lab", "--no-browser", "--allow-root",
            f"--ServerApp.port={port}", "--IdentityProvider.token=",
            "--LabApp.expose_app_in_browser=True",
        ],
        cwd=ROOT, env=environment, stderr=said, stdout=said,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            time.sleep(0.5)
            assert process.poll() is None, (home / "said.txt").read_text()
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1)
            except OSError:
                continue
            break
        yield address
    finally:
        process.terminate()
        process.wait(120)  # it stops its kernels first


@pytest.fixture
def page(server):
    """A page of a browser on the server, and the errors that its console shows."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which(os.environ.get("DYNLIB_BROWSER", "") or "chromium")
    assert browser, "no Chromium; set DYNLIB_BROWSER"
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        yield page
        chromium.close()


def run_all(page, seconds: float) -> dict:
    """Run all cells of the notebook in front; its state once all have run or one has failed."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        state = page.evaluate(STATE)
        if state["errors"] or state["run"] == state["code"]:
            break
        page.wait_for_timeout(1000)
    return state


@real
@pytest.mark.timeout(900)
def test_from_the_table_of_contents_to_a_quickstart_that_has_run(server, page):
    before = committed()
    page.goto(server)
    link = page.locator(".jp-MarkdownViewer a", has_text="00_quickstart").first
    link.wait_for()
    page.screenshot(path=SHOTS / "contents.png")
    assert page.locator(".jp-MarkdownViewer a", has_text="_").count() >= len(PATHS)
    link.click()
    page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext?.isReady")
    began_s = time.monotonic()
    state = run_all(page, 500)
    seconds = time.monotonic() - began_s
    assert state["errors"] == []
    assert state["run"] == state["code"]
    assert sum(kind in ("image/png", "text/html") for kind in state["shown"]) >= 3
    page.screenshot(path=SHOTS / "quickstart.png")
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
    assert committed() == before
    print(f"quickstart_seconds {seconds:.0f}")  # noqa: T201  no bar: other programs count too


@real
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_notebook_opens(server, page, path):
    """Cells, headings and links show; nothing runs."""
    if ASKED != "all":
        pytest.skip("DYNLIB_LAB is not all")
    page.goto(f"{server}/lab/tree/notebooks/{path.name}?reset")
    page.locator(".jp-NotebookPanel:visible .jp-RenderedMarkdown h1").first.wait_for()
    cells = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.cells.length")
    assert cells == len(json.loads(path.read_text())["cells"])
    page.screenshot(path=SHOTS / f"{path.stem}.png")
    assert page.locator(".jp-Dialog").count() == 0


@real
@pytest.mark.timeout(900)
def test_a_slider_moves_and_the_figure_follows(server, page):
    """The panel of notebook 06, on a small case."""
    made = ROOT / "runs" / "lab" / "panel.ipynb"
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": []}
    cell["source"] = PANEL
    book = {"cells": [cell], "metadata": {"kernelspec": lab.KERNEL}, "nbformat": 4}
    book["nbformat_minor"] = 5
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(json.dumps(book))
    page.goto(f"{server}/lab/tree/runs/lab/{made.name}?reset")
    page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext?.isReady")
    state = run_all(page, 120)
    assert state["errors"] == []
    picture = page.locator(
        ".jp-OutputArea img.widget-image, .jp-OutputArea .widget-image img"
    ).first
    picture.wait_for()
    before = picture.get_attribute("src")
    readout = page.locator(".widget-readout").first
    readout.click()
    readout.fill("20")
    readout.press("Enter")
    page.wait_for_function(
        "before => [...document.querySelectorAll('img')].some(i => i.classList.contains("
        "'widget-image') && i.src != before)",
        arg=before,
    )
    page.screenshot(path=SHOTS / "panel.png")


PANEL = """\
from dynlib import App, Case, Workload, load_board
from dynlib.points import PointTable, make_table
from suite.studies import Panel
board = load_board("jetson-nano")
row = {"model": "net", "board": board.name, "unit": "gpu", "batch": 1, "source": "estimated"}
table = make_table([
    row | {"subnet": "small", "latency_ms": 10.0, "accuracy_val_pct": 70.0},
    row | {"subnet": "large", "latency_ms": 25.0, "accuracy_val_pct": 80.0}])
apps = tuple(App(n, "net", deadline_ms=90.0, period_ms=90.0) for n in ("camera", "door"))
panel = Panel(Case(Workload("two", 10.0, apps), board, {"net": PointTable(table, board)}))
panel.widget()
"""
