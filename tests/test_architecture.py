"""The house of the design: who may stand on whom, and what importing a room costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dynlib"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import those on lower floors only. What is not named here is the ground floor: modules
# that know each other but no room.
FLOORS = {
    "nets": 1, "boards": 1, "machine": 1,
    "decide": 2, "profile": 2,
    "training": 3, "searching": 3, "manager": 3,
    "runtime": 4,
    "deploy": 5,
}  # fmt: skip
# The two places where a board's model meets a machine.
JOINTS = {"machine/bind.py": "boards", "machine/virtual.py": "boards"}
WITHOUT_TORCH = ("boards", "machine", "manager", "runtime")

BLOCK = """
import importlib, sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""


def imported(path: Path) -> list[str]:
    """Absolute names of our modules that a file imports, anywhere in it, for hints too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from dynlib import space` names a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module == "dynlib" else [node.module]
    return [name for name in found if name.split(".")[0] in ("dynlib", "suite")]


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def modules_of(name: str) -> set[str]:
    """The modules of ours that importing `name` loads."""
    code = (
        f"import sys, {name}\n"
        "print(*(m for m in sys.modules if m.partition('.')[0] == 'dynlib'), "
        "*(m for m in ('torch', 'scipy', 'optuna') if m in sys.modules))"
    )
    run = [sys.executable, "-c", code]
    return set(subprocess.check_output(run, text=True, cwd=ROOT).split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_imports_upwards_or_sideways(path):
    file = path.relative_to(PACKAGE).as_posix()
    mine = file.partition("/")[0].removesuffix(".py")
    assert "/" not in file or mine in FLOORS, f"{mine} has no floor in the design"
    for name in imported(path):
        assert name.split(".")[0] == "dynlib", f"{file} must not import {name}"
        other = room_of(name)
        if other == mine or other not in FLOORS or JOINTS.get(file) == other:
            continue
        assert FLOORS[other] < FLOORS.get(mine, 0), f"{file} must not import {name}"


def test_no_module_stands_in_a_circle():
    graph = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        graph[name] = [other for other in imported(path) if other != name]
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle of imports: {' -> '.join((*above, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_imports_without_torch(room):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((PACKAGE / room).glob("*.py"))
    ]
    code = "BLOCKED = ('torch',)\n" + BLOCK
    code += "".join(f"importlib.import_module({name!r})\n" for name in modules)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_suite_draws_and_lists_without_torch():
    code = "BLOCKED = ('torch',)\n" + BLOCK + "import suite.run.cli, suite.plots\n"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "notebooks",
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'notebooks'}", "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_policy_author_pays_for_the_manager_alone():
    loaded = modules_of("dynlib.manager")
    assert not loaded & {"torch", "scipy", "optuna"}
    assert len(loaded) <= 12, sorted(loaded)


def test_the_package_itself_loads_nothing():
    assert modules_of("dynlib") == {"dynlib"}


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
