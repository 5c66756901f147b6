"""What a live experiment needs around it: a board, its measured points, a load on a script.

The load is made of processes that burn the CPU, so that the kernel really shares it out.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import pandas as pd

from dynlib.boards.board import Board
from dynlib.machine.machine import Machine
from dynlib.points import make_table
from dynlib.profile.timing import Latency
from dynlib.runtime.live import Served

_P95_SIGMA = 1.645  # of a normal distribution
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


def live_board(board: Board, threads: Sequence[int]) -> Board:
    """`board` (of this machine) as a policy sees it live: a unit for each number of threads.

    Each has one clock, the kernel's business. Nobody knows its power, so that it counts as zero:
    ask for an objective that does not rest on it.
    """
    cpu = board.units[0]
    return replace(board, units=tuple(
        replace(cpu, name=f"cpu-{n}", cores=n, opps=(cpu.opps[-1],), c_uw_mhz_v2=0.0,
                settle_ms=0.0, stall_ms=0.0)
        for n in threads
    ))  # fmt: skip


def profile_live(
    subnets: Mapping[str, Mapping[str, float]],
    served: Served,
    board: Board,
    knobs: Machine | None = None,
    *,
    model: str,
    batch: int = 1,
    repeats: int = 100,
    gap_ms: float = 5.0,
) -> pd.DataFrame:
    """Operating points measured as they will be used: in turn, each after a switch and a pause.

    Args:
        subnets: name -> further columns of its rows, such as `accuracy_val_pct`.
        board: of `live_board`; `knobs`: the opened board, held with ``with``.

    `latency_ms` is the median and `latency_std_ms` that of the log-normal noise with the measured
    p95: the rare long stall of a busy machine is not what the next frame will be like.
    """
    samples: dict[tuple[str, str], list[float]] = {}
    known = knobs.knobs if knobs else {}
    if ("process", "quota_pct") in known:  # in the group where the frames will be served
        knobs.set("process", "quota_pct", known["process", "quota_pct"].bounds[1])
    for unit in board.units:
        if ("process", "threads") in known:
            knobs.set("process", "threads", unit.cores)
        for k in range(-2, repeats):  # two rounds warm up
            for subnet in subnets:
                time.sleep(gap_ms / 1000)
                served.switch(subnet)
                begin = time.perf_counter()
                served.answer(max(k, 0))
                if k >= 0:
                    ms = (time.perf_counter() - begin) * 1000
                    samples.setdefault((unit.name, subnet), []).append(ms)
    rows = []
    for (unit, subnet), times in samples.items():
        p95_ms, middle_ms = Latency(tuple(times)).p95_ms, median(times)
        cores, sigma = board.unit(unit).cores, math.log(p95_ms / middle_ms) / _P95_SIGMA
        rows.append({
            "model": model, "subnet": subnet, "board": board.name, "unit": unit, "batch": batch,
            "cores": cores, "threads": cores, "latency_ms": middle_ms, "latency_p95_ms": p95_ms,
            "latency_std_ms": middle_ms * math.sqrt(math.expm1(sigma**2)), "source": "measured",
            **subnets[subnet],
        })  # fmt: skip
    return make_table(rows)


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
