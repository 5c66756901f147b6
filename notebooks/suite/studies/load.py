"""A load on a script beside what is measured.

It is made of processes that burn the CPU, so that the kernel really shares it out.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

# A worker of the load: times on the system's monotonic clock come in, a pair a line.
_BURN = """
import sys, time
for line in sys.stdin:
    start, end = map(float, line.split())
    time.sleep(max(start - time.monotonic(), 0))
    while time.monotonic() < end:
        sum(range(10_000))
"""


class Burst(NamedTuple):
    """So many processes burn the CPU from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    workers: int


@contextmanager
def background(script: Sequence[Burst]) -> Iterator[Callable[[], None]]:
    """Processes that burn the CPU by `script`; yields what starts it, once or again.

    They are started here, before any quota is set, so that none of ours holds for them, and are
    killed at the end whatever happens.
    """
    with ExitStack() as stack:
        workers = []
        for _ in range(max((burst.workers for burst in script), default=0)):
            worker = subprocess.Popen(  # a session each: the scheduler shares by session
                [sys.executable, "-c", _BURN], stdin=subprocess.PIPE, start_new_session=True
            )
            stack.callback(_end, worker)
            workers.append(worker)

        def start() -> None:
            now = time.monotonic()
            for i, worker in enumerate(workers):
                lines = (f"{now + b.start_s} {now + b.end_s}\n" for b in script if i < b.workers)
                worker.stdin.write("".join(lines).encode())
                worker.stdin.flush()

        yield start


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    worker.stdin.close()
