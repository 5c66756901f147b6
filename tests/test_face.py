"""What the library offers at its face: few names, loaded late, each with an example that runs."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynlib

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "dynlib").glob("*/__init__.py"))


def test_the_face_has_at_most_26_names_and_they_are_all_there():
    assert len(dynlib.__all__) <= 26
    assert all(getattr(dynlib, name) is not None for name in dynlib.__all__)
    assert set(dynlib.__all__) <= set(dir(dynlib))
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it offers .*'train'"):
        _ = dynlib.trian


def test_names_are_not_those_of_modules():
    """`dynlib.search` must be the same before and after a room of that name were imported."""
    modules = {path.stem for path in (ROOT / "dynlib").iterdir()}
    assert not modules & set(dynlib.__all__)


def test_what_manages_comes_without_torch():
    code = (
        "import sys; from dynlib import Case, Manager, Workload, read_points, simulate; "
        "from dynlib import load_board; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("room", ROOMS)
def test_the_face_of_a_room_has_at_most_12_names(room):
    tree = ast.parse((ROOT / "dynlib" / room / "__init__.py").read_text())
    offered = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert offered, f"{room} has no __all__"
    assert 0 < len(offered[0]) <= 12
    module = __import__(f"dynlib.{room}", fromlist=["*"])
    assert all(getattr(module, name).__doc__ for name in offered[0] if name.islower())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where examples run: with the table that the example of `read_points` writes."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_example("read_points")
    assert (folder / "points.csv").is_file()
    return folder


@pytest.mark.parametrize("name", dynlib.__all__)
def test_every_name_has_an_example_that_runs(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_example(name)


def run_example(name):
    found = getattr(dynlib, name)
    assert inspect.getdoc(found), name
    finder = doctest.DocTestFinder(recurse=False)
    face = {other: getattr(dynlib, other) for other in dynlib.__all__}
    (example,) = finder.find(found, name, globs=face)
    assert example.examples, f"{name} has no example"
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=options)
    report: list[str] = []
    runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_examples_of_the_readme_run(number, tmp_path):
    """Each on its own, as a reader copies it, in a folder of its own."""
    code = blocks("python")[number].replace("pretrained=True", "pretrained=False")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_timm_can_be_imported_after_dynlib():
    """Even where torchvision's compiled operators do not fit the torch that is installed."""
    code = "import dynlib, timm, torchvision; print(timm.create_model('resnet18').num_classes)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "1000", found.stderr
