"""The README's table says what the committed metrics say."""

import json
from pathlib import Path

import pytest

from suite.errors import SuiteError
from suite.record import diagrams
from suite.record.headlines import BEGIN, END, headlines, write_headlines
from suite.run import cli
from suite.run.notebooks import discover

ROOT = Path(__file__).parents[1]
LIST = "system,arxiv,what,published,notebook,key\n"


def section(readme: Path) -> str:
    return readme.read_text().partition(BEGIN)[2].partition(END)[0]


@pytest.fixture
def root(tmp_path):
    """A repository with one headline."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "headlines.csv").write_text(
        LIST + "A,1234.5678,saved,9 %,05_x,saved_pct\n"
    )
    (tmp_path / "README.md").write_text(f"# A\n{BEGIN}{END}rest\n")
    return tmp_path


def promote(root: Path, **fields) -> None:
    entry = {"unit": "%", "source": "estimated", "profile": "full", "what": "saved"} | fields
    folder = root / "data" / "results" / "05_x"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"saved_pct": entry}))


def test_the_readme_agrees_with_the_committed_metrics():
    assert section(ROOT / "README.md") == headlines(ROOT), (
        "the README's headlines are stale: python -m suite.record.headlines (in notebooks/)"
    )


def test_every_headline_is_of_a_notebook_and_every_paper_is_linked():
    table = headlines(ROOT)
    for line in table.splitlines()[2:]:
        notebook = line.split("](notebooks/")[1].split(")")[0]
        assert (ROOT / "notebooks" / notebook).exists(), line
    assert table.count("arxiv.org/abs/") >= 15


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"value": 25.94}, "| **25.9 %** | estimated | full |"),
        ({"value": 25.94, "low": 1.0, "high": 30}, "| **25.9 %** [1, 30] |"),
        ({"value": 6287.7, "unit": "1"}, "| **6288x** |"),
        ({"value": None, "why": "no sensor"}, "| unknown | estimated |"),
    ],
)
def test_a_row_shows_value_interval_and_label(root, fields, shown):
    promote(root, **fields)
    write_headlines(root)
    assert shown in section(root / "README.md")
    assert (root / "README.md").read_text().endswith(f"{END}rest\n")


def test_a_changed_metric_makes_the_readme_stale(root):
    promote(root, value=1.0)
    write_headlines(root)
    assert section(root / "README.md") == headlines(root)
    promote(root, value=2.0)
    assert section(root / "README.md") != headlines(root)


def test_a_headline_without_a_promoted_run_says_so(root):
    assert "| not promoted yet |  |  |" in headlines(root)


def test_what_is_malformed_is_named(root):
    (root / "README.md").write_text("# A\n")
    with pytest.raises(SuiteError, match="lacks the lines"):
        write_headlines(root)
    (root / "data" / "headlines.csv").write_text("system\nA\n")
    with pytest.raises(SuiteError, match="expected"):
        headlines(root)


def test_promoting_writes_the_table(root):
    promote(root, value=3.0)
    cli._promote([], root / "runs", root, False)
    assert "| **3 %** |" in section(root / "README.md")


# The guide: where each published result is.


def test_the_guide_names_figures_that_notebooks_draw_and_reasons_where_there_are_none():
    text = (ROOT / "notebooks" / "guide.md").read_text()
    rows = text.partition("## Where each published result is")[2].partition("## Data")[0]
    drawn = {notebook.name: notebook.figures for notebook in discover(ROOT / "notebooks")}
    named = 0
    for row in rows.splitlines()[4:]:
        if not row:
            continue
        *_, notebook, figure = (cell.strip() for cell in row.strip("|").split("|"))
        if not notebook:
            assert figure.startswith("hole: "), row
            continue
        named += 1
        assert figure.split()[0] in drawn[notebook], row
    assert named >= 15


@pytest.mark.parametrize("citing", ["notebooks/guide.md", "CITATION.cff"])
def test_every_paper_of_the_headlines_is_cited(citing):
    text = (ROOT / citing).read_text()
    for arxiv in {line.split(",")[1] for line in (ROOT / "data" / "headlines.csv").open()}:
        assert arxiv == "arxiv" or arxiv in text


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_a_diagram_is_what_its_code_draws(name):
    """Not the bytes, which differ between versions of matplotlib: the words."""
    committed = (ROOT / "notebooks" / f"{name}.svg").read_text()
    boxes, _ = diagrams.DIAGRAMS[name]
    words = [line for _, _, text in boxes.values() for line in text.split("\n")]
    assert all(f">{word}<" in committed for word in words)
    assert all(f">{word}<" in diagrams.svg(name).decode() for word in words)
    assert f"]({name}.svg)" in (ROOT / "notebooks" / "guide.md").read_text()
