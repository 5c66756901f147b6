"""Many independent runs on all cores."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

MOST = 8  # processes


def in_parallel(
    work: Callable[..., list[dict]],
    jobs: Iterable[tuple],
    processes: int | None = None,
    *,
    desc: str | None = None,
) -> pd.DataFrame:
    """A table of the rows that ``work(*job)`` returns for every job, in the order of the jobs.

    Args:
        work: a function that other processes can import.
        jobs: its arguments; the longest should come first.
        processes: default: one per core, at most `MOST`; 1: none but this one.
        desc: what the progress bar is called; without one there is none.
    """
    jobs = list(jobs)
    processes = min(processes or min(os.cpu_count() or 1, MOST), len(jobs))

    def watched(results: Iterable) -> list:
        return list(tqdm(results, desc, len(jobs), disable=None if desc else True))

    if processes < 2:
        found = watched(work(*job) for job in jobs)
    else:
        with ProcessPoolExecutor(processes, _processes(work)) as pool:
            found = watched(pool.map(work, *zip(*jobs, strict=True)))
    return pd.DataFrame([row for rows in found for row in rows])


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(*arguments)`` returns, in a process of its own, as its main thread."""
    with ProcessPoolExecutor(1, _processes(work)) as pool:
        return pool.submit(work, *arguments).result()


def _processes(work: Callable):
    context = get_context("forkserver")  # forking a process with threads may hang
    context.set_forkserver_preload([work.__module__])
    return context
