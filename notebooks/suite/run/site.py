"""The executed notebooks of a run as a static site: pages, an index, a gallery of all figures.

No page asks another host for anything: equations are MathML, which browsers draw themselves,
pictures and the style lie beside the pages, and there is no script.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from dynlib.files import atomic_write
from suite.errors import SuiteError
from suite.record.figures import caption
from suite.record.metrics import read_metrics
from suite.record.provenance import FIGURE_SUFFIXES
from suite.run.notebooks import Notebook

# What a notebook's cell shows of a figure that was saved; see `suite.record.figures.Picture`.
PICTURE = re.compile(r"Picture\((\w+)\.png\)")
# Links between notebooks and texts, which are pages here.
PAGE_LINK = re.compile(r'(href="[^":#]+)\.(?:ipynb|md)(["#])')
ANCHOR = re.compile(r'(?:id="|href="#)[^"]*"')
METRIC_COLUMNS = ("value", "unit", "low", "high", "n", "source", "profile", "what")
# Widgets need a script and a kernel; what they print without is of no use to a reader.
WIDGET = "application/vnd.jupyter.widget-view+json"
STYLE = """\
body {font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: auto;
  padding: 0 1rem 4rem}
nav {padding: .8rem 0; border-bottom: 1px solid #ccc} nav a {margin-right: 1.2rem}
img {max-width: 100%} figure {margin: 1.5rem 0} figcaption {color: #555; font-size: .9rem}
pre, .dataframe, .scroll {overflow-x: auto} pre {padding: .5rem; margin: .3rem 0; font-size: .85rem}
.highlight pre {background: #f5f5f5} table {border-collapse: collapse; font-size: .85rem}
th, td {padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left}
.prompt, .anchor-link {display: none} math[display=block] {margin: 1rem 0}
"""


class _Renderer(IPythonRenderer):
    """Markdown as nbconvert's, with equations that need no script."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)

    def heading(self, text: str, level: int, **attributes: Any) -> str:
        # Links say `#words` for "Words", as on GitHub.
        html = super().heading(text, level, **attributes)
        return ANCHOR.sub(lambda found: found[0].lower(), html)


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        return _html(source)


def _html(markdown: str) -> str:
    rendered = MarkdownWithMath(renderer=_Renderer(escape=False)).render(markdown)
    return PAGE_LINK.sub(r"\1.html\2", rendered)


def build_site(notebooks: Sequence[Notebook], out_dir: Path, root: Path) -> Path:
    """Write the site of the run in `out_dir` to ``<out_dir>/site`` and return its index.

    Notebooks that were not run are named on the index. Raises `SuiteError` if none was.
    """
    executed = [n for n in notebooks if (out_dir / n.name / f"{n.name}.ipynb").is_file()]
    if not executed:
        raise SuiteError(f"no executed notebooks in {out_dir}; run them first, then ask for a site")
    site = out_dir / "site"
    shutil.rmtree(site, ignore_errors=True)
    atomic_write(site / "style.css", STYLE + HtmlFormatter().get_style_defs(".highlight"))

    figures = {}
    for notebook in executed:
        for name in notebook.figures:
            if all((out_dir / "figures" / f"{name}{s}").is_file() for s in FIGURE_SUFFIXES):
                figures[name] = _copy_figure(name, notebook, out_dir, site)
    for notebook in executed:
        body = _notebook(out_dir / notebook.name / f"{notebook.name}.ipynb", figures)
        _write_page(site, notebook.name, notebook.title, body)

    guide = root / "notebooks" / "guide.md"
    if guide.is_file():
        for picture in guide.parent.glob("*.svg"):
            shutil.copyfile(picture, site / picture.name)
        _write_page(site, "guide", "Guide", _html(guide.read_text(encoding="utf-8")))
    _write_page(site, "gallery", "All figures", _gallery(figures))
    _write_page(site, "index", "dynlib", _index(notebooks, out_dir, site))
    return site / "index.html"


def _write_page(site: Path, name: str, title: str, body: str) -> None:
    head = (
        f'<!DOCTYPE html>\n<html lang="en"><head><title>{escape(title)}</title>'
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        '<link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="style.css"></head><body>'
    )
    navigation = (
        '<nav><a href="index.html">Notebooks</a> <a href="gallery.html">All figures</a></nav>'
    )
    atomic_write(site / f"{name}.html", f"{head}{navigation}<main>{body}</main></body></html>\n")


def _copy_figure(name: str, notebook: Notebook, out_dir: Path, site: Path) -> str:
    """Copy a figure's files; returns it as HTML, with caption, sources and a link to its table."""
    (site / "figures").mkdir(exist_ok=True)
    for suffix in FIGURE_SUFFIXES:
        shutil.copyfile(
            out_dir / "figures" / f"{name}{suffix}", site / "figures" / f"{name}{suffix}"
        )
    table = pd.read_csv(site / "figures" / f"{name}.csv", usecols=["source", "profile"])
    labels = ", ".join(sorted({*table["source"]}) + [f"{p} profile" for p in {*table["profile"]}])
    text = escape(caption(name))
    return (
        f'<figure><img src="figures/{name}.png" alt="{text}" loading="lazy">'
        f"<figcaption>{text} ({escape(labels)}; "
        f'<a href="{notebook.name}.html">{notebook.name}</a>, '
        f'<a href="figures/{name}.csv">CSV</a>, <a href="figures/{name}.pdf">PDF</a>)'
        "</figcaption></figure>"
    )


def _notebook(path: Path, figures: Mapping[str, str]) -> str:
    content = nbformat.read(path, as_version=4)
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [_static(out, figures) for out in cell.outputs if not _is_widget(out)]
            if "metrics" in cell.metadata.get("tags", ()):  # collapsed; the page ends with a table
                cell.metadata.transient = {"remove_source": True}
    # The template's body alone: around it, all of nbconvert's load scripts from other hosts.
    body, _ = _Exporter(template_name="basic").from_notebook_node(content)
    return body + _metrics(path.with_name("metrics.json"))


def _is_widget(output: Mapping[str, Any]) -> bool:
    return WIDGET in output.get("data", {})


def _static(output: NotebookNode, figures: Mapping[str, str]) -> NotebookNode:
    """The output, a figure of the suite as the one of the gallery."""
    shown = PICTURE.fullmatch(output.get("data", {}).get("text/plain", ""))
    if shown and shown[1] in figures:
        output["data"] = NotebookNode({"text/html": figures[shown[1]]})
    return output


def _metrics(path: Path) -> str:
    if not path.is_file():
        return ""
    rows = []
    for key, entry in read_metrics(path).items():
        if entry["value"] is None:
            entry = entry | {"value": "unknown", "what": f"{entry['what']}: {entry['why']}"}
        rows.append([key, *(_cell(entry.get(column)) for column in METRIC_COLUMNS)])
    return "<h2>Metrics</h2>" + _table(["key", *METRIC_COLUMNS], rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return escape(f"{value:.5g}" if isinstance(value, float) else str(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _gallery(figures: Mapping[str, str]) -> str:
    parts = [f'<section id="{name}">{figure}</section>' for name, figure in figures.items()]
    count = f"{len(figures)} figures, each with the table it was drawn from."
    return f"<h1>All figures</h1><p>{count}</p>" + "".join(parts)


def _index(notebooks: Sequence[Notebook], out_dir: Path, site: Path) -> str:
    rows = []
    for notebook in notebooks:
        name, drawn, code = f"{notebook.name} (not run)", "", ""
        if (site / f"{notebook.name}.html").exists():
            name = f'<a href="{notebook.name}.html">{notebook.name}</a>'
            there = [f for f in notebook.figures if (site / "figures" / f"{f}.png").exists()]
            drawn = ", ".join(f'<a href="gallery.html#{f}">{f}</a>' for f in there)
            code = _commit(out_dir / notebook.name / "manifest.json")
        rows.append([name, escape(notebook.title), drawn, code])
    about = (
        "Dynamic networks on embedded boards: every notebook as it was run, every figure with its "
        "table, every number with where it comes from."
    )
    if (site / "guide.html").exists():
        about += (
            ' The <a href="guide.html">guide</a> explains the words and lists what was published.'
        )
    table = _table(["notebook", "question", "figures", "code"], rows)
    return f"<h1>dynlib</h1><p>{about}</p>{table}"


def _commit(manifest: Path) -> str:
    git = json.loads(manifest.read_text()).get("git") if manifest.is_file() else None
    if git is None:
        return "unknown"
    return escape(git["commit"][:10] + (" + changes" if git["dirty"] else ""))
