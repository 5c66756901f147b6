"""The suite's own notebooks keep the house rules; nothing is executed here."""

import ast
import json
import re
from pathlib import Path

import pytest

from suite.run.notebooks import discover, source

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MAX_LINES = 15
BUDGET_MINUTES = {"quick": 25, "full": 60}


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return [source(cell) for cell in cells if cell["cell_type"] == "code"]


def test_names_parameters_and_promises():
    """`discover` checks names, numbers, the tagged cell, its flat scalars, and the metadata."""
    notebooks = discover(FOLDER)
    assert [notebook.path for notebook in notebooks] == PATHS
    assert sum(n.minutes["quick"] for n in notebooks) <= BUDGET_MINUTES["quick"]
    for notebook in notebooks:
        assert notebook.parameters["profile"] == "quick", notebook.name
        assert notebook.parameters["out_dir"] in ("", "runs/quick"), notebook.name


@pytest.mark.parametrize("text", ["README.md", "notebooks/guide.md"])
def test_both_tables_of_contents_name_and_link_every_notebook(text):
    """In reading order, and with the same words."""
    content = (FOLDER.parent / text).read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\((\S+)\.ipynb\) \| (.+) \|$", content, re.MULTILINE)
    folder = "" if text.startswith("notebooks") else "notebooks/"
    assert [(name, link) for name, link, _ in rows] == [
        (path.stem, f"{folder}{path.stem}") for path in PATHS
    ]
    guide = (FOLDER / "guide.md").read_text()
    assert all(f"| {words} |\n" in guide for _, _, words in rows)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_thin_and_stripped(path):
    content = json.loads(path.read_text())
    first = content["cells"][0]
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# ")
    assert "](guide.md#words)" in source(first)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not stripped (nbstripout)"
            assert cell["execution_count"] is None
    for text in code_cells(path):
        lines = [line for line in text.splitlines() if line.strip()]
        if "profile = " not in text:  # the parameters, one a line
            assert len(lines) <= MAX_LINES, f"{len(lines)} lines in the cell\n{text}"
        classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
        assert not classes, "a class belongs into dynlib"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_who_names_another_notebook_links_to_it(path):
    others = {other.stem for other in PATHS} - {path.stem}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            bare = re.findall(r"(?<!\[)`(\d\d_\w+)`(?!\])", source(cell))
            assert not others & set(bare)
            links = re.findall(r"\[`(\d\d_\w+)`\]\((\S+?)\)", source(cell))
            assert all(target == f"{name}.ipynb" and name in others for name, target in links)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_uses_the_name_it_has(path):
    text = "\n".join(code_cells(path))
    assert f'start("{path.stem}"' in text.replace("notebook=", "")
    assert "run.finish()" in code_cells(path)[-1]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_that_is_named_is_linked(path):
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    named = set(re.findall(r"(?<!\[)`(\d\d_\w+)`", text)) & {other.stem for other in PATHS}
    assert named <= {path.stem}, "named without a link"
