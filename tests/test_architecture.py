"""The house of the design: who may stand on whom, what needs no torch, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dynlib"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# A room may import those on lower floors only; private modules of the package are the cellar.
FLOORS = {
    "space": 0, "points": 0, "data": 0, "report": 0,
    "nets": 1, "hardware": 1,
    "training": 2, "search": 2, "runtime": 2,
    "suite": 3,
}  # fmt: skip
WITHOUT_TORCH = ("space", "points", "report", "hardware", "runtime", "report.figures", "suite.cli")

# Needs nothing, and whoever writes a file needs it.
CELLAR = "dynlib.report.files"
# What the design says beyond floors.
FORBIDDEN = {("training", "hardware"), ("runtime", "nets")}


BLOCK_TORCH = """
import importlib, sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> list[str]:
    """Absolute names of the dynlib modules that a file imports, anywhere in it."""
    package = [*path.relative_to(PACKAGE.parent).with_suffix("").parts][:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            # `from dynlib import space` names a room, `from dynlib import DynlibError` does not.
            found += names if base == "dynlib" else [base]
    return [name for name in found if name.split(".")[0] == "dynlib"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_imports_upwards_or_sideways(path):
    mine = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if mine == "__init__":
        assert imported(path) == []
        return
    assert mine in FLOORS or mine.startswith("_"), f"{mine} has no floor in the design"
    for name in imported(path):
        other = room(name)
        if other == mine or other not in FLOORS or name == CELLAR:
            continue
        assert FLOORS[other] < FLOORS.get(mine, -1), f"{mine} must not import {name}"
        assert (mine, other) not in FORBIDDEN, f"{mine} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_imports_without_torch():
    """One process for all: each module that may not need torch, with torch made unimportable."""
    code = BLOCK_TORCH + "".join(
        f"importlib.import_module('dynlib.{name}')\n" for name in WITHOUT_TORCH
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda p: p.name
)
def test_no_test_is_hidden(path):
    """A test whose name is used twice, or that is decorated as a fixture, would never run."""
    body = ast.parse(path.read_text()).body
    tests = [n for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    names = [test.name for test in tests]
    assert len(names) == len(set(names))
    for test in tests:
        decorators = [ast.unparse(d).partition("(")[0] for d in test.decorator_list]
        assert "pytest.fixture" not in decorators, test.name
