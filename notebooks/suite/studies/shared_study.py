"""A study of Optuna in a database that several processes share, some of them killed.

`python -m suite.studies.shared_study` is one of them: the job comes on its standard input, and it
ends with its parent.
"""

import contextlib
import functools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dynlib.files import repo_root
from dynlib.searching.study import measured, open_study, search
from dynlib.space import SearchSpace, SubnetConfig
from suite.errors import SuiteError

SPACE = SearchSpace((32, 48, 64), ((1, 2, 3), (1, 2, 3)), ((8, 16, 24, 32), (16, 32, 48, 64)))
GOALS = {"work": "minimize", "width": "maximize"}


def measure(config: SubnetConfig) -> dict[str, float]:
    """What nobody can get wrong."""
    width = sum(config.width)
    return {"work": float(config.resolution * width * sum(config.depth)), "width": float(width)}


# -- the server -------------------------------------------------------------------------------


def no_postgres() -> str:
    """Empty if a server can be started and spoken to here, else what is missing."""
    if not _program("initdb"):
        return "no PostgreSQL server on this machine (apt install postgresql)"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no driver of PostgreSQL (pip install '.[database]')"
    return ""


def _program(name: str) -> str | None:
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    return shutil.which(name, path=path)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a server of its own, gone afterwards with all it stored.

    Raises `SuiteError` where there is none, or it does not answer.
    """
    if why := no_postgres():
        raise SuiteError(why)
    # It refuses to run as root.
    own = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
    password = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        word = Path(folder, "password")
        word.write_text(password)
        if own:
            for path in (word, folder):
                shutil.chown(path, "nobody")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True,
                                timeout=120, cwd=folder, **own)  # fmt: skip
        data = f"{folder}/data"
        try:
            run([_program("initdb"), "-D", data, "-U", "dynlib", "-A", "scram-sha-256",
                 "--pwfile", str(word), "--no-sync", "--encoding=UTF8", "--locale=C"])  # fmt: skip
            options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
            run([_program("pg_ctl"), "-D", data, "-w", "-o", options, "-l", f"{folder}/log",
                 "start"])  # fmt: skip
        except subprocess.SubprocessError as error:
            raise SuiteError(f"no server: {error.stderr or error}") from error
        try:
            yield f"postgresql+psycopg://dynlib:{password}@127.0.0.1:{port}/postgres"
        finally:
            run([_program("pg_ctl"), "-D", data, "-m", "immediate", "stop"])


# -- its users --------------------------------------------------------------------------------


def kill_searchers(url: str, kills: int, seed: int, trials: int = 20) -> pd.DataFrame:
    """A row for each study that two processes share until one of them is killed.

    Each writes down which trials it knows to be finished. `lost` are those that the database does
    not have in the end, or has with other values; `done` is how many it has, all that were asked
    for if the other process came to its end.
    """
    rng = random.Random(seed)
    rows = []
    for kill in range(kills):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            job = {"url": url, "name": f"shared-{seed}-{kill}", "trials": trials}
            crew = [_searcher(stack, folder, job, number) for number in range(2)]
            wanted = rng.randint(1, trials // 3)
            _await(lambda f=folder, w=wanted, c=crew: len(_written(f)) >= w or _ended(c))
            time.sleep(0.1 * rng.random())
            victim = crew.pop(rng.randrange(2))
            _end(victim)
            _await(lambda crew=crew: _ended(crew))
            if crew[0].returncode:
                said = "".join(path.read_text() for path in Path(folder).glob("*.said"))
                raise SuiteError(f"the other searcher ended with {crew[0].returncode}: {said}")
            rows.append({
                "kill": kill, "killed": victim.returncode == -signal.SIGKILL,
                **_compare(folder, url, job["name"]),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _searcher(stack, folder: str, job: dict, number: int) -> subprocess.Popen:
    path = [str(repo_root()), str(repo_root() / "notebooks"), os.environ.get("PYTHONPATH", "")]
    with Path(folder, f"{number}.said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "suite.studies.shared_study"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    stack.callback(_end, process)
    own = job | {"seed": number, "log": f"{folder}/{number}.log"}
    process.stdin.write(json.dumps(own).encode() + b"\n")  # a command line is everybody's to read
    process.stdin.flush()
    return process


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdin.close()
    process.wait()


def _await(done) -> None:
    deadline = time.monotonic() + 120
    while not done():
        if time.monotonic() > deadline:
            raise SuiteError("the searchers did not go on within 120 s")
        time.sleep(0.01)


def _ended(crew: list[subprocess.Popen]) -> bool:
    return all(process.poll() is not None for process in crew)


def _written(folder: str) -> list[str]:
    """The sub-networks that the processes know to be measured and stored."""
    text = "".join(path.read_text() for path in sorted(Path(folder).glob("*.log")))
    return text.splitlines()


def _compare(folder: str, url: str, name: str) -> dict[str, int]:
    written = set(_written(folder))
    stored = measured(open_study(SPACE, GOALS, url, name))
    right = {each for each in written if stored.get(each) == measure(SubnetConfig.parse(each))}
    return {"written": len(written), "lost": len(written - right), "done": len(stored)}


def _search(job: dict) -> None:
    before: list[str] = []

    def noting(config: SubnetConfig) -> dict[str, float]:
        # Asked for another one, the trial before is stored.
        if before:
            with Path(job["log"]).open("a") as log:
                log.write(f"{before.pop()}\n")
        before.append(str(config))
        time.sleep(0.2)  # a short measurement
        return measure(config)

    search(SPACE, noting, GOALS, trials=job["trials"], seed=job["seed"], sampler="random",
           storage=job["url"], name=job["name"])  # fmt: skip


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _search(given)
