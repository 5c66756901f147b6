"""The way in: where it finds itself, whose environment it deletes, and two at once."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from dynlib.files import repo_root

pytestmark = pytest.mark.faults
PIN = r"([\w.-]+)(?:\[\w+\])?==([\w.]+)(?:; .+)?"
# What is installed by; a change of any of them brings an update.
INSTALLED = ("requirements.txt", "constraints.txt", "pyproject.toml")
# Stands for an installed Python: says what it is called with.
PYTHON = '#!/bin/sh\necho "python $*"\n'


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout, blanks in its name, with an environment that run_all.sh seems to have made."""
    root = tmp_path / "a check out"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("run_all.sh", *INSTALLED):
        shutil.copy(repo_root() / name, root / name)
    (root / ".venv" / "bin" / "python").write_text(PYTHON)
    (root / ".venv" / "bin" / "python").chmod(0o755)
    texts = [(root / name).read_text() for name in INSTALLED]
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


@pytest.mark.parametrize("changed", INSTALLED)
def test_what_is_installed_keeps_to_the_constraints(checkout, changed):
    with (checkout / changed).open("a") as file:
        file.write("# changed\n")
    done = run("bash", str(checkout / "run_all.sh"), "--list")
    pins, limits = checkout / "requirements.txt", checkout / "constraints.txt"
    assert f"install -qq -r {pins} -c {limits}\n" in done.stdout
    assert "pip" not in run("bash", str(checkout / "run_all.sh"), "--list").stdout  # once


def pins(path: Path) -> dict[str, str]:
    """Package, as pip compares names, -> its version; every line has to be a pin."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    found = [re.fullmatch(PIN, line).groups() for line in lines if line]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_constraints_agree_with_the_pins_and_have_all_that_these_bring():
    wanted = pins(repo_root() / "requirements.txt")
    within = pins(repo_root() / "constraints.txt")
    assert {name: within.get(name) for name in wanted} == wanted
    brought = set()
    for name in wanted:
        with contextlib.suppress(PackageNotFoundError):
            words = [
                re.match(r"[\w.-]+", line)[0] for line in requires(name) or () if ";" not in line
            ]
            brought |= {re.sub("[-_.]+", "-", word).lower() for word in words}
    assert brought <= set(within)


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


def start(*command) -> subprocess.Popen:
    """A job of a terminal: in a group of its own, whose signals are what a shell gives it."""

    def as_a_shell_does():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=as_a_shell_does,
    )  # fmt: skip


@pytest.mark.parametrize("kept", [True, False], ids=["nohup", "without"])
def test_nohup_survives_the_end_of_the_session(checkout, kept):
    """And what it started does too: nothing on the way takes the signal back."""
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho started\nsleep 1\nsh -c "sleep 1; echo to the end"\n')
    words = ["bash", str(checkout / "run_all.sh"), "--list"]
    job = start(*(["nohup", *words] if kept else words))
    assert "started\n" in job.stdout  # reads up to there
    os.killpg(job.pid, signal.SIGHUP)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == (0 if kept else -signal.SIGHUP)
    assert ("to the end" in said) is kept


@pytest.mark.parametrize("times", [1, 2])
def test_an_install_that_is_interrupted_is_done_again(checkout, times):
    """Ctrl-C reaches pip too; what was there stays, and nobody holds the lock."""
    with (checkout / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *install*) echo pip; sleep 30;; esac\n')
    script = str(checkout / "run_all.sh")
    job = start("bash", script, "--list")
    assert "pip\n" in job.stdout  # reads up to there
    time.sleep(0.5)  # a shell that is about to start something may miss the signal
    for _ in range(times):
        with contextlib.suppress(ProcessLookupError):  # it has ended at the first
            os.killpg(job.pid, signal.SIGINT)
    job.communicate(timeout=20)
    assert job.returncode == -signal.SIGINT
    python.write_text('#!/bin/sh\necho "python $*"\n')
    done = run("bash", script, "--list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip --disable-pip-version-check install" in done.stdout
    assert "python -P -m suite.run --list" in done.stdout


@pytest.mark.parametrize("name", ["python3.12", "python3.13", "python3.14"])
def test_any_python_from_3_11_on_will_do(checkout, name, tmp_path):
    """One that is older, or cannot make environments, is passed over."""
    shutil.rmtree(checkout / ".venv")
    commands = tmp_path / "bin"
    commands.mkdir()
    for tool in (
        "bash",
        "readlink",
        "dirname",
        "nproc",
        "flock",
        "cat",
        "cmp",
        "mkdir",
        "touch",
        "rm",
    ):
        if found := shutil.which(tool):
            (commands / tool).symlink_to(found)
    made = '#!/bin/sh\necho "$0 $*" >>"{log}"\n'.format(log=tmp_path / "log")
    makes = made + ('case "$*" in "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; esac\n')
    (commands / "python3").write_text("#!/bin/sh\nexit 1\n")  # too old
    (commands / name).write_text(makes)
    (commands / "cp").symlink_to(shutil.which("cp"))
    for path in (commands / "python3", commands / name):
        path.chmod(0o755)
    (commands / "sh").symlink_to("/bin/sh")
    done = run("bash", str(checkout / "run_all.sh"), "--list", env={"PATH": str(commands)})
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text()
    assert f"{commands / name} -m venv {checkout / '.venv'}" in log
    assert f"{checkout / '.venv/bin/python'} -P -m suite.run --list" in log
