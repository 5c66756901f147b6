"""Operating points measured on the machine this runs on, as a live run will use them."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import pandas as pd

from dynlib.boards.board import Board
from dynlib.errors import ProfileError
from dynlib.machine.control import Missing
from dynlib.machine.machine import Machine
from dynlib.machine.usage import CALM, Usage
from dynlib.points import make_table
from dynlib.profile.timing import Latency, samples_needed

_WARMUP_ROUNDS = 2
_P95_SIGMA = 1.645  # of a normal distribution


def at_full_clock(board: Board) -> Board:
    """`board` as a policy sees it that cannot set clocks: each unit has its highest one alone.

    Where nobody knows its power, that counts as zero.
    """
    units = []
    for unit in board.units:
        highest = unit.opps[-1:]
        power = unit.c_uw_mhz_v2 or 0.0
        units.append(replace(unit, opps=highest, c_uw_mhz_v2=power, settle_ms=0.0, stall_ms=0.0))
    return replace(board, units=tuple(units))


def profile_points(
    board: Board,
    subnets: Mapping[str, Mapping[str, float | str]],
    switch: Callable[[str], object],
    answer: Callable[[int], object],
    *,
    model: str,
    threads: Iterable[int] | None = None,
    machine: Machine | None = None,
    batch: int = 1,
    repeats: int = 100,
    gap_ms: float = 5.0,
) -> pd.DataFrame:
    """Operating points measured as they will be used: in turn, each after a switch and a pause.

    Args:
        board: of this machine (`load_board("auto")`); its first unit runs the networks.
        subnets: name -> further columns of its rows, such as `accuracy_val_pct` or `backend`.
        switch: makes the named sub-network serve.
        answer: serves frame k, its work done on return.
        threads: settings to measure, if `machine` can turn them; by default one thread there, and
            without a machine as many as the numeric library has.
        machine: the opened machine, held with ``with``: its threads are turned, and its CPU quota
            is lifted. Without one only sub-networks change.
        batch: images of a frame.
        repeats: frames of each sub-network in each setting; at least 90 for the p95.
        gap_ms: pause before each.

    Frames during which other programs used the CPUs are measured again, up to `repeats` of them.
    `latency_ms` is the median and `latency_std_ms` that of the log-normal noise with the measured
    p95: the rare long stall of a busy machine is not what the next frame will be like.

    Raises `ProfileError` for too few repeats, and for several numbers of threads where nothing
    turns them.

    >>> import time
    >>> pause_s = {"small": 0.001, "large": 0.004}  # stands for two sub-networks
    >>> now = {}
    >>> points = profile_points(
    ...     load_board("auto"), {name: {"accuracy_val_pct": 70.0} for name in pause_s},
    ...     switch=lambda name: now.update(s=pause_s[name]), answer=lambda k: time.sleep(now["s"]),
    ...     model="example", repeats=90, gap_ms=0.0,
    ... )
    >>> bool(points["latency_ms"].is_monotonic_increasing), set(points["source"])
    (True, {'measured'})
    """
    knobs = machine.knobs if machine else {}
    quota = knobs.get(("process", "quota_pct"))
    if quota:  # in the group where the frames will be served
        machine.set("process", "quota_pct", quota.bounds[1])
    turned = ("process", "threads") in knobs
    counts = list(threads or [1 if turned else _threads(board.units[0].cores)])
    if len(counts) > 1 and not turned:
        raise ProfileError(f"threads: got {counts}, expected one number: no machine turns them")
    usage = Usage(board.units[0].cpus) if board.units[0].cpus else None
    rows = []
    for count in counts:
        if turned:
            machine.set("process", "threads", count)
        samples: dict[str, list[tuple[float, bool]]] = {subnet: [] for subnet in subnets}
        for k in range(-_WARMUP_ROUNDS, 2 * repeats):
            if k >= repeats and all(len(_calm(times)) >= repeats for times in samples.values()):
                break
            for subnet, times in samples.items():
                time.sleep(gap_ms / 1000)
                switch(subnet)
                begin_s = time.perf_counter()
                answer(max(k, 0))
                took_s = time.perf_counter() - begin_s
                others = usage.others() if usage else Missing("")
                if k >= 0:
                    times.append((took_s * 1000, isinstance(others, Missing) or others < CALM))
        where = {"board": board.name, "unit": board.units[0].name, "batch": batch}
        setting = {"cores": count, "threads": count, "source": "measured"}
        for subnet, times in samples.items():
            row = {"model": model, "subnet": subnet, **where, **setting}
            rows.append(row | _latency(times) | subnets[subnet])
    return make_table(rows)


def _threads(cores: int) -> int:
    """Of the numeric library, as far as there are cores for them; one without a library."""
    library = sys.modules.get("torch")
    return min(library.get_num_threads(), cores) if library else 1


def _calm(samples: list[tuple[float, bool]]) -> list[float]:
    return [ms for ms, calm in samples if calm]


def _latency(samples: list[tuple[float, bool]]) -> dict[str, float]:
    calm, every = _calm(samples), [ms for ms, _ in samples]
    seen = Latency(tuple(calm if len(calm) >= samples_needed(0.95) else every))
    p95_ms, middle_ms = seen.p95_ms, seen.median_ms
    sigma = math.log(p95_ms / middle_ms) / _P95_SIGMA
    std_ms = middle_ms * math.sqrt(math.expm1(sigma**2))
    return {"latency_ms": middle_ms, "latency_p95_ms": p95_ms, "latency_std_ms": std_ms}
