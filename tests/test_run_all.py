"""The way in: where it finds itself, whose environment it deletes, and two at once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dynlib.files import repo_root

pytestmark = pytest.mark.faults
# Stands for an installed Python: says what it is called with.
PYTHON = '#!/bin/sh\necho "python $*"\n'


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout, blanks in its name, with an environment that run_all.sh seems to have made."""
    root = tmp_path / "a check out"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("run_all.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(repo_root() / name, root / name)
    (root / ".venv" / "bin" / "python").write_text(PYTHON)
    (root / ".venv" / "bin" / "python").chmod(0o755)
    texts = [(root / name).read_text() for name in ("requirements.txt", "pyproject.toml")]
    (root / ".venv" / ".installed").write_text(f"{root}\n" + "".join(texts))
    return root


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_it_finds_itself_from_anywhere(checkout, tmp_path):
    (tmp_path / "link").symlink_to(checkout / "run_all.sh")
    (tmp_path / "elsewhere" / "a check out").mkdir(parents=True)
    bare = {"PATH": os.environ["PATH"], "CDPATH": str(tmp_path / "elsewhere")}  # and no HOME
    for script, folder in (
        (checkout / "run_all.sh", "/"),
        (tmp_path / "link", "/"),
        ("a check out/run_all.sh", tmp_path),
    ):
        done = run("bash", str(script), "--list", cwd=folder, env=bare)
        assert (done.returncode, done.stdout) == (0, "python -P -m suite.run --list\n"), done.stderr


def test_an_environment_that_it_did_not_make_is_never_deleted(checkout):
    (checkout / ".venv" / ".installed").unlink()
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    done = run("bash", str(checkout / "run_all.sh"), "--list")
    assert done.returncode == 1
    assert "was not made by run_all.sh" in done.stderr
    assert (checkout / ".venv" / "bin" / "python").exists()


def test_an_update_that_fails_keeps_the_environment_that_was_there(checkout):
    """Without a network pip fails; the next try begins with the same environment."""
    with (checkout / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *install*) exit 1;; esac\necho "python $*"\n')
    for _ in range(2):
        assert run("bash", str(checkout / "run_all.sh"), "--list").returncode == 1
        assert python.exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
def test_the_second_waits_for_the_first(checkout):
    holder = subprocess.Popen(
        ["flock", str(checkout / ".venv.lock"), "sh", "-c", "echo held; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    second = subprocess.Popen(
        ["bash", str(checkout / "run_all.sh"), "--list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "another one is installing" in second.stderr.readline()
    assert second.poll() is None
    holder.communicate("\n", timeout=30)
    assert "suite.run" in second.communicate(timeout=30)[0]
