"""The site of a run: every link leads somewhere, nothing comes from another host, and it opens."""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import nbformat.v4 as v4
import pytest
from test_suite import PARAMETERS, write_notebook

import suite.plots  # noqa: F401  before a test of others has a registry of its own
from suite.errors import SuiteError
from suite.run.cli import main
from suite.run.notebooks import discover
from suite.run.site import WIDGET, build_site

ROOT = Path(__file__).parents[1]
FIGURE = "quickstart_frames"
TEXT = """\
See [the other](02_read_table.ipynb), a [word](guide.md#the-floor):
$a_1 < b$ and $$\\frac{1}{2}$$"""
# What Chromium asks for on its own, whatever the page: the time, updates.
BROWSERS_OWN = re.compile(
    r"(\w+\.)*(google\.com|gvt1\.com)|(update|optimizationguide-pa|safebrowsing)\.googleapis\.com"
)
LOADING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


@pytest.fixture
def root(tmp_path):
    """A repository with a run of one notebook; the other was not run."""
    books, out = tmp_path / "notebooks", tmp_path / "runs" / "quick"
    write_notebook(books, "01_make_table", [PARAMETERS], figures=[FIGURE, "search_front"])
    write_notebook(books, "02_read_table", [PARAMETERS])
    (books / "guide.md").write_text("## Words\n\n### The floor\n\n[one](01_make_table.ipynb)\n")
    (out / "figures").mkdir(parents=True)
    for suffix in (".png", ".pdf", ".csv"):
        shutil.copy(ROOT / "figures" / f"{FIGURE}{suffix}", out / "figures")
    execute(out, "01_make_table", [
        {"text/plain": f"Picture({FIGURE}.png)", "image/png": "aWdub3JlZA=="},
        {"text/plain": "interactive()", WIDGET: {"model_id": "1"}},
        {"text/plain": "4 < 5"},
    ])  # fmt: skip
    return tmp_path


def execute(out: Path, name: str, data: list[dict]) -> None:
    """Leave what a run leaves: an executed copy, metrics and a manifest."""
    code = v4.new_code_cell("draw()", execution_count=1)
    code.outputs = [v4.new_output("display_data", data=each) for each in data]
    hidden = v4.new_code_cell("add('saved_pct')", metadata={"tags": ["metrics"]})
    book = v4.new_notebook(cells=[v4.new_markdown_cell(f"# About {name}\n\n{TEXT}"), code, hidden])
    folder = out / name
    folder.mkdir(parents=True)
    (folder / f"{name}.ipynb").write_text(json.dumps(book))
    known = {"value": 1.5, "unit": "ms", "source": "measured", "profile": "quick", "what": "time"}
    unknown = known | {"value": None, "why": "no <sensor>"}
    (folder / "metrics.json").write_text(json.dumps({"a_ms": known, "b_ms": unknown}))
    (folder / "manifest.json").write_text(json.dumps({"git": {"commit": "c" * 40, "dirty": True}}))


class Page(HTMLParser):
    """What a page links to, loads, shows and can be linked at."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.ids, self.alts, self.tags = [], [], set(), [], set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADING and LOADING[tag] in found:
            self.loaded.append(found[LOADING[tag]])
        if tag == "img":
            self.alts.append(found.get("alt", ""))

    def handle_data(self, data):
        self.text += data


def pages(site: Path) -> dict[str, Page]:
    return {path.name: Page(path) for path in site.glob("*.html")}


def broken(site: Path) -> list[str]:
    """Links and assets of all pages that lead nowhere, or that load from another host."""
    found = []
    read = pages(site)
    for name, page in read.items():
        for target in page.loaded:
            if not target.startswith("data:") and not (site / target).is_file():
                found.append(f"{name} loads {target}")
        for target in page.links:
            url = urlsplit(target)
            if url.scheme in ("http", "https"):  # only followed by a reader's click
                continue
            file = url.path or name
            if not (site / file).is_file():
                found.append(f"{name} links to {target}")
            elif url.fragment and url.fragment not in read[file].ids:
                found.append(f"{name} links to {target}, which {file} does not have")
    return found


def test_a_site_holds_together_and_loads_nothing_from_elsewhere(root, capsys):
    execute(root / "runs" / "quick", "02_read_table", [])
    assert main(["--site"], root) == 0
    assert "runs/quick/site/index.html" in capsys.readouterr().out
    site = root / "runs" / "quick" / "site"
    assert broken(site) == []
    found = pages(site)
    assert set(found) == {
        "index.html", "gallery.html", "guide.html", "01_make_table.html", "02_read_table.html",
    }  # fmt: skip
    for page in found.values():
        assert "script" not in page.tags
        assert all(page.alts)
    assert "@import" not in (site / "style.css").read_text()
    assert "url(" not in (site / "style.css").read_text()


def test_a_page_has_its_equations_figures_and_metrics(root):
    page = Page(build_site(discover(root / "notebooks"), root / "runs/quick", root).parent
                / "01_make_table.html")  # fmt: skip
    assert {"math", "mfrac", "figure", "figcaption"} <= page.tags
    assert "$" not in page.text
    assert "interactive()" not in page.text  # a widget without its kernel
    assert "4 < 5" in page.text
    assert "draw()" in page.text
    assert "saved_pct" not in page.text  # a collapsed cell
    assert f"figures/{FIGURE}.png" in page.loaded
    assert "A stream of frames" in page.alts[0]
    assert "unknown" in page.text
    assert "time: no <sensor>" in page.text
    assert f"figures/{FIGURE}.csv" in page.links


def test_what_was_not_run_or_drawn_is_said_and_not_linked(root):
    site = build_site(discover(root / "notebooks"), root / "runs" / "quick", root).parent
    index = pages(site)["index.html"]
    assert "02_read_table (not run)" in index.text
    assert "02_read_table.html" not in index.links
    assert f"gallery.html#{FIGURE}" in index.links
    assert "gallery.html#search_front" not in index.links
    assert "cccccccccc + changes" in index.text


def test_an_older_site_is_replaced(root):
    stale = root / "runs" / "quick" / "site" / "stale.html"
    stale.parent.mkdir()
    stale.touch()
    build_site(discover(root / "notebooks"), root / "runs" / "quick", root)
    assert not stale.exists()


def test_without_a_run_there_is_no_site(root, capsys):
    with pytest.raises(SuiteError, match="no executed notebooks in"):
        build_site(discover(root / "notebooks"), root / "runs" / "full", root)
    assert main(["--site", "--profile", "full"], root) == 2
    assert "run them first" in capsys.readouterr().out


def test_a_broken_link_would_be_found(root):
    """The check above must be able to fail."""
    site = build_site(discover(root / "notebooks"), root / "runs" / "quick", root).parent
    assert broken(site) == ["01_make_table.html links to 02_read_table.html"]
    (site / "index.html").write_text('<img src="https://example.org/x.png"><a href="#none"></a>')
    assert len(broken(site)) == 3


# In a browser


def _chromium() -> str:
    """Chromium as Debian has it. `$DYNLIB_BROWSER`: its path, or `required`, and then no skip."""
    asked = os.environ.get("DYNLIB_BROWSER", "")
    found = shutil.which(asked if asked not in ("", "required") else "chromium")
    if found is None:
        assert not asked, f"DYNLIB_BROWSER is {asked!r}, and there is no such browser"
        pytest.skip("chromium is not installed")
    return found


def test_a_browser_opens_every_page_and_asks_nobody_else(root, tmp_path):
    """The site is served by a proxy through which all of the browser's requests must go."""
    browser = _chromium()
    execute(root / "runs" / "quick", "02_read_table", [])
    site = build_site(discover(root / "notebooks"), root / "runs" / "quick", root).parent
    asked: list[str] = []

    class Proxy(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.path = urlsplit(self.path).path
            super().do_GET()

        def do_CONNECT(self):
            asked.append(f"https://{self.path}")
            with contextlib.suppress(BrokenPipeError):
                self.send_error(403)

        def translate_path(self, path):
            return str(site / path.lstrip("/"))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("index.html", "01_make_table.html"):
            done = subprocess.run(
                [
                    browser, "--headless", "--no-sandbox", "--disable-gpu",
                    "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
                    f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,8000",
                    f"--proxy-server=http://127.0.0.1:{server.server_port}",
                    "--dump-dom", f"http://site.test/{name}",
                ],
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "<main>" in done.stdout, name
        server.shutdown()
    paths = {urlsplit(url).path for url in asked if urlsplit(url).hostname == "site.test"}
    assert {f"/figures/{FIGURE}.png", "/style.css", "/01_make_table.html"} <= paths
    others = {urlsplit(url).hostname for url in asked} - {"site.test"}
    assert {host for host in others if not BROWSERS_OWN.fullmatch(host)} == set()
