"""Notebooks in JupyterLab itself: the real server, a real browser, and what it shows."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dynlib.files import repo_root
from suite.errors import SuiteError
from suite.run.execute import outside
from suite.run.lab import KERNEL
from suite.studies.parallel import alone

if TYPE_CHECKING:
    from playwright.sync_api import Page

START_S = 120.0  # that the server may take
PAGE_MS = 120_000  # that anything in the page may take

# Runs in the page: cells that show an error, and how many code cells have run to their end.
STATE = """() => {
  const model = window.jupyterapp.shell.currentWidget.content.model;
  const cells = [...model.cells].map(cell => cell.toJSON()).filter(c => c.cell_type == "code");
  const errors = cells.flatMap(c => c.outputs.filter(o => o.output_type == "error"));
  const shown = cells.flatMap(c => c.outputs.map(o => Object.keys(o.data ?? {stream: 1})).flat());
  return {code: cells.length, run: cells.filter(c => c.execution_count).length,
          errors: errors.map(e => e.evalue), shown: shown};
}"""
# Types a folder into the parameters, as one would who wants results kept elsewhere.
TYPE_OUT_DIR = """folder => {
  for (const cell of window.jupyterapp.shell.currentWidget.content.model.cells) {
    const text = cell.sharedModel.getSource();
    cell.sharedModel.setSource(text.replace(/^out_dir = ""/m, `out_dir = "${folder}"`));
  }
}"""
# The panel of notebook 06, on a small case.
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


def chromium() -> str | None:
    """A Chromium: what `$DYNLIB_BROWSER` names, else the one on the path."""
    return shutil.which(os.environ.get("DYNLIB_BROWSER") or "chromium")


def no_browser() -> str:
    """Why nothing can be tried in a browser here; "" where it can."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed"
    return "" if chromium() else "no Chromium here; DYNLIB_BROWSER names one"


@contextmanager
def lab_server(home: Path) -> Iterator[str]:
    """JupyterLab as ``run_all.sh lab`` starts it, with nobody's settings; yields its address.

    Raises `SuiteError` with what it said if it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = home / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "suite.run.lab", "--no-browser", "--allow-root",
                f"--ServerApp.port={port}", "--IdentityProvider.token=",
                "--LabApp.expose_app_in_browser=True",
            ],
            cwd=repo_root(), env=outside() | {"HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1"},
            stderr=output, stdout=output,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until_s = time.monotonic() + START_S
        while not _answers(f"{address}/api"):
            if process.poll() is not None or time.monotonic() > until_s:
                raise SuiteError(f"JupyterLab did not start:\n{said.read_text()}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(120)  # it stops its kernels first


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=1)
    except OSError:
        return False
    return True


@contextmanager
def lab_page() -> Iterator["Page"]:
    """A page of a browser, which needs that `no_browser` has nothing to say."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PAGE_MS)
        yield page
        browser.close()


def run_all(page: "Page", seconds: float) -> dict[str, Any]:
    """Run all cells of the notebook in front; its state once all have run or one has failed."""
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext?.isReady")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        state = page.evaluate(STATE)
        if state["errors"] or state["run"] == state["code"]:
            break
        page.wait_for_timeout(1000)
    return state


def _check_run(state: dict[str, Any]) -> None:
    if state["errors"] or state["run"] < state["code"]:
        ran = f"{state['run']} of {state['code']} cells ran"
        raise SuiteError("; ".join([ran, *state["errors"]]))


def open_notebook(page: "Page", address: str, path: Path) -> None:
    """Its cells, headings and links show; nothing runs. Raises `SuiteError` if not so."""
    page.goto(f"{address}/lab/tree/notebooks/{path.name}?reset")
    page.locator(".jp-NotebookPanel:visible .jp-RenderedMarkdown h1").first.wait_for()
    shown = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.cells.length")
    if shown != (count := len(json.loads(path.read_text())["cells"])):
        raise SuiteError(f"{path.name}: shows {shown} cells of {count}")
    if page.locator(".jp-Dialog").count():
        raise SuiteError(f"{path.name}: a dialog is in the way")


def run_quickstart(page: "Page", address: str, shots: Path, out_dir: str = "") -> float:
    """From the table of contents to a quickstart that has run; the seconds that its cells took.

    Raises `SuiteError` for a cell that fails, and if it shows no figures and tables.
    """
    page.goto(address)
    contents = page.locator(".jp-MarkdownViewer a")
    link = contents.filter(has_text="00_quickstart").first
    link.wait_for()
    page.screenshot(path=shots / "contents.png")
    notebooks = len(list((repo_root() / "notebooks").glob("*.ipynb")))
    if contents.filter(has_text="_").count() < notebooks:
        raise SuiteError("the table of contents does not link to every notebook")
    link.click()
    page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
    if out_dir:
        page.evaluate(TYPE_OUT_DIR, out_dir)
    begin_s = time.monotonic()
    state = run_all(page, 500)
    seconds = time.monotonic() - begin_s
    page.screenshot(path=shots / "quickstart.png")
    _check_run(state)
    if sum(kind in ("image/png", "text/html") for kind in state["shown"]) < 3:
        raise SuiteError(f"the quickstart shows only {state['shown']}")
    return seconds


def move_slider(page: "Page", address: str, folder: Path) -> None:
    """A slider of the manager's panel moves and the figure follows; raises `SuiteError` if a cell
    fails, and Playwright's error if the figure stays.

    `folder` lies in the repository, and gets a notebook with the panel.
    """
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": []}
    book = {"cells": [cell | {"source": PANEL}], "metadata": {"kernelspec": KERNEL},
            "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    made = folder / "panel.ipynb"
    made.write_text(json.dumps(book))
    page.goto(f"{address}/lab/tree/{made.relative_to(repo_root()).as_posix()}?reset")
    page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
    _check_run(run_all(page, 120))
    picture = ".jp-OutputArea img.widget-image, .jp-OutputArea .widget-image img"
    before = page.locator(picture).first.get_attribute("src")
    readout = page.locator(".widget-readout").first
    readout.click()
    readout.fill("20")
    readout.press("Enter")
    page.wait_for_function(
        "before => [...document.querySelectorAll('img')].some(i => i.classList.contains("
        "'widget-image') && i.src != before)",
        arg=before,
    )
    page.screenshot(path=folder / "panel.png")


def try_in_lab(home: Path) -> pd.DataFrame:
    """Every notebook opened in JupyterLab, the quickstart run, and a slider moved.

    Pictures of the screen land in ``runs/lab``, and what the quickstart leaves; `home` is an empty
    folder. Columns, a row an attempt: what (opens, runs or slider), notebook, seconds, error ("" if
    none). Raises `SuiteError` if there is no browser, or the server does not start.
    """
    if why := no_browser():
        raise SuiteError(why)
    return pd.DataFrame(alone(_try_in_lab, home))  # a kernel's own loop is in Playwright's way


def _try_in_lab(home: Path) -> list[dict]:
    shots = repo_root() / "runs" / "lab"
    shots.mkdir(parents=True, exist_ok=True)
    paths = sorted((repo_root() / "notebooks").glob("*.ipynb"))
    with lab_server(home) as address, lab_page() as page:
        rows = [
            attempt("opens", path.stem, lambda path=path: open_notebook(page, address, path))
            for path in paths
        ]
        elsewhere = "runs/lab/quickstart"  # not over a run of the suite's
        rows += [
            attempt("runs", paths[0].stem, lambda: run_quickstart(page, address, shots, elsewhere)),
            attempt("slider", "", lambda: move_slider(page, address, shots)),
        ]
    return rows


def attempt(what: str, notebook: str, do: Callable[[], float | None]) -> dict[str, Any]:
    """Do it, and tell how long it took and what went wrong; the seconds are its own where it
    counts them."""
    begin_s, seconds, error = time.monotonic(), None, ""
    try:
        seconds = do()
    except Exception as wrong:  # whatever the page does, the others are tried
        error = f"{type(wrong).__name__}: {wrong}".splitlines()[0]
    took_s = time.monotonic() - begin_s if seconds is None else seconds
    return {"what": what, "notebook": notebook, "seconds": took_s, "error": error}
