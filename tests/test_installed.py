"""dynlib installed, not cloned: ``pip install .`` into an environment of its own, used elsewhere.

With ``DYNLIB_INSTALL=1`` (half a minute): what dynlib needs is taken from the environment that runs
the tests.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from test_face import blocks

from dynlib.files import repo_root

pytestmark = pytest.mark.skipif(
    not os.environ.get("DYNLIB_INSTALL"), reason="DYNLIB_INSTALL is not set"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Its Python, and the folder with its packages; those of the tests come after its own."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    source = folder / "source"  # building leaves files beside what it builds
    for name in ("dynlib", "data/checkpoints"):
        shutil.copytree(repo_root() / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root() / name, source / name)
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    run += ["--no-build-isolation", "--ignore-installed", "--target", packages, source]
    subprocess.run(list(map(str, run)), check=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    # As text, not through `site`: the editable install of the tests' environment stays out.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, packages


@pytest.fixture
def ran(installed, tmp_path_factory, tmp_path):
    """Run code with the installed package in a folder of its own, with no settings."""

    def run(code):
        environment = {
            "HOME": str(tmp_path_factory.getbasetemp() / "home"), "PYTHONSAFEPATH": "1",
            "PATH": os.environ["PATH"], "DYNLIB_DATA": os.environ.get("DYNLIB_DATA", ""),
        }  # fmt: skip
        done = subprocess.run(
            [installed[0], "-B", "-c", code], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


def test_it_is_the_installed_one(ran, installed):
    said = ran("import dynlib; print(dynlib.__file__)")
    assert Path(said.strip()).is_relative_to(installed[1])


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_readmes_examples_run_and_write_nothing_beside_the_package(number, ran, installed):
    before = files(installed[1])
    ran(blocks("python")[number].replace("pretrained=True", "pretrained=False"))
    assert files(installed[1]) == before
    assert not (installed[1] / "runs").exists()


def test_the_commands_are_there(ran, installed):
    ran("import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('dynlib.training', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code")  # fmt: skip
    assert (installed[1] / "dynlib" / "deploy" / "manager.service").is_file()
