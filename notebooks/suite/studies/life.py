"""Workloads from life: what XR applications ask for, and how requests reached public services.

``python -m suite.studies.life`` (with `notebooks` on the path) makes the workload files
``data/workloads/*.toml`` anew, byte for byte, from the facts in the CSV files beside them; another
folder may be named. Where the facts come from stands in ``data/workloads/README.md``.

The files say what was asked of *their* machines, in real time. `life_case` makes of one of them a
case for a board: the same frames in the same order, at a pace that suits its tables.
"""

import csv
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

from dynlib.boards.board import Board
from dynlib.errors import WorkloadError, near
from dynlib.files import repo_root
from dynlib.points import PointTable
from dynlib.runtime.case import Case
from dynlib.workload import App, Workload, dump_workload, load_workload

# File name -> the name of the scenario in XRBench.
XRBENCH = {
    "xrbench_vr_gaming": "VR_gaming",
    "xrbench_ar_gaming": "AR_gaming",
    "xrbench_ar_assistant": "AR_Assistant",
    "xrbench_outdoor_a": "outdoor_activity_A",
    "xrbench_outdoor_b": "outdoor_activity_B",
    "xrbench_social_a": "social_interactionA",
    "xrbench_social_b": "social_interactionB",
}
# File name -> (name of the app and its model, file of its arrivals).
AZURE = {
    "azure_llm_code": ("code", "azure_llm_code.csv"),
    "azure_llm_conversation": ("conversation", "azure_llm_conv.csv"),
}
TWITTER = "twitter"
LIFE = (*XRBENCH, *AZURE, TWITTER)

XRBENCH_S = 20.0  # ours: XRBench runs for 0.7 s
TRACE_S = 120.0  # the length of the windows that were cut out of the traces
TWITTER_EVERY = 16  # one of so many requests becomes a frame
DEADLINE_GAPS = 4.0  # ours: the traces state no deadlines; in mean gaps between two arrivals
LOAD = 0.7  # of the busiest unit, by the largest networks at the highest clock; see `life_case`
TRACE_LOAD = 0.35  # the same for traces, whose busiest seconds ask for up to six times the mean
FLOOR = 0.5  # from the lowest to the highest accuracy of a table


def workloads_folder() -> Path:
    """Where the facts and the workload files are."""
    return repo_root() / "data" / "workloads"


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file of facts."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def xrbench_workload(name: str, facts: Path) -> Workload:
    """One of XRBench's usage scenarios, for `XRBENCH_S` seconds.

    Every network is an app, named as there; its model is its task. It is asked for at its target
    rate, and a frame is due when the next one comes, as there. A network that depends on another
    has its frames at the same times and with the same deadlines, as there; that it waits for the
    other's result cannot be said in a workload. Where it follows only with a probability, it has
    those frames of the other that a fixed draw leaves.
    """
    scenario = XRBENCH[name]
    rows = [row for row in _rows(facts / "xrbench_scenarios.csv") if row["scenario"] == scenario]
    apps = []
    for row in rows:
        period_ms = 1000 / float(row["rate_hz"])
        probability = float(row["probability"] or 1.0)
        if probability == 1.0:
            app = App(row["network"], row["task"], period_ms, period_ms=period_ms)
        else:
            times = _thinned(period_ms, probability, f"{scenario}/{row['network']}")
            app = App(row["network"], row["task"], period_ms, "trace", trace_ms=times)
        apps.append(app)
    return Workload(name, XRBENCH_S, tuple(apps))


def _thinned(period_ms: float, probability: float, seed: str) -> tuple[float, ...]:
    """The periodic times (ms) of `XRBENCH_S` seconds, each kept with a probability.

    The numbers of Python's own generator are the same in every version.
    """
    draws = Random(seed)
    frames = round(XRBENCH_S * 1000 / period_ms)
    times = [round(i * period_ms, 3) for i in range(frames)]
    return tuple(t_ms for t_ms in times if draws.random() < probability)


def azure_workload(name: str, facts: Path) -> Workload:
    """The requests that a language model served in a bursty window of a real day, as they came."""
    app, file = AZURE[name]
    times = [float(row["arrival_ms"]) for row in _rows(facts / file)]
    return _trace_workload(name, app, times)


def twitter_workload(facts: Path) -> Workload:
    """The messages of the window in which their rate changed most, one of `TWITTER_EVERY`.

    Only counts per second are known: the requests of a second are taken to come evenly.
    """
    times = []
    seen = 0
    for row in _rows(facts / "twitter_per_second.csv"):
        second, requests = int(row["second"]), int(row["requests"])
        for i in range(requests):
            if (seen + i) % TWITTER_EVERY == 0:
                times.append(round(1000 * (second + i / requests), 3))
        seen += requests
    return _trace_workload(TWITTER, "twitter", times)


def _trace_workload(name: str, app: str, times: list[float]) -> Workload:
    """A workload of one app whose frames come at these times (ms)."""
    mean_gap_ms = TRACE_S * 1000 / len(times)
    deadline_ms = round(DEADLINE_GAPS * mean_gap_ms, 3)
    return Workload(name, TRACE_S, (App(app, app, deadline_ms, "trace", trace_ms=tuple(times)),))


def life_workload(name: str, facts: Path | None = None) -> Workload:
    """The workload of that name, made from the facts."""
    facts = facts or workloads_folder()
    if name in XRBENCH:
        return xrbench_workload(name, facts)
    if name in AZURE:
        return azure_workload(name, facts)
    if name == TWITTER:
        return twitter_workload(facts)
    raise WorkloadError(f"unknown workload {name!r}; {near(name, LIFE)}")


def write_workloads(folder: Path) -> list[Path]:
    """Make all workload files from the facts."""
    return [dump_workload(life_workload(name), folder / f"{name}.toml") for name in LIFE]


def life_case(
    name: str,
    board: Board,
    tables: Mapping[str, PointTable],
    load: float | None = None,
    floor: float = FLOOR,
) -> Case:
    """One of `LIFE` on a board: the work of the file, at a pace that suits the tables.

    Args:
        tables: the models of the workload take them in turn, in the order in which they appear.
        load: all times (periods, deadlines, arrivals, horizon) are multiplied by one factor, so
            that the largest networks at the highest clock would keep the busiest unit busy for
            this share of the time. Default: `LOAD`, and `TRACE_LOAD` for traces.
        floor: of every app, from 0, the lowest accuracy of its table's main unit, to 1, the
            highest. Ours, as the sources state none; nor do they state priorities, so there are
            none.

    Raises `WorkloadError` for an unknown name and for a load that is not above 0.
    """
    if name not in LIFE:
        raise WorkloadError(f"unknown workload {name!r}; {near(name, LIFE)}")
    if load is None:
        load = LOAD if name in XRBENCH else TRACE_LOAD
    if not load > 0:
        raise WorkloadError(f"{name}: got load {load!r}, expected a number above 0")
    workload = load_workload(workloads_folder() / f"{name}.toml")
    table_of = _in_turn(workload, tables)
    times_slower = max(largest_loads(workload, table_of).values()) / load
    apps = []
    for app in workload.apps:
        table = table_of[app.model]
        slower = _slower(app, times_slower)
        apps.append(
            replace(
                slower,
                model=table.model,
                accuracy_floor_pct=_floor_pct(table, floor),
                start_unit=table.main_unit,
            )
        )
    return Case(Workload(name, workload.horizon_s * times_slower, tuple(apps)), board, tables)


def _in_turn(workload: Workload, tables: Mapping[str, PointTable]) -> dict[str, PointTable]:
    """Model of the workload -> its table."""
    models = list(dict.fromkeys(app.model for app in workload.apps))
    given = list(tables.values())
    return {model: given[i % len(given)] for i, model in enumerate(models)}


def largest_loads(workload: Workload, table_of: Mapping[str, PointTable]) -> dict[str, float]:
    """Unit -> the share of the time that the largest networks would keep it busy.

    Every app runs on the main unit of its table, at the highest clock, over the whole horizon.
    """
    loads: dict[str, float] = {}
    for app in workload.apps:
        table = table_of[app.model]
        if app.arrival == "trace":
            per_ms = len(app.trace_ms) / (workload.horizon_s * 1000)
        else:
            per_ms = 1 / app.period_ms
        busy = per_ms * table.largest.latency_ms[-1]
        loads[table.main_unit] = loads.get(table.main_unit, 0.0) + busy
    return loads


def _slower(app: App, times_slower: float) -> App:
    """The same frames at another pace."""
    period_ms = None if app.period_ms is None else app.period_ms * times_slower
    return replace(
        app,
        deadline_ms=app.deadline_ms * times_slower,
        period_ms=period_ms,
        trace_ms=tuple(t_ms * times_slower for t_ms in app.trace_ms),
    )


def _floor_pct(table: PointTable, floor: float) -> float:
    """The accuracy that lies at `floor` between the lowest and the highest of the main unit."""
    accuracies = [point.accuracy_val_pct for point in table.on(table.main_unit)]
    lowest, highest = min(accuracies), max(accuracies)
    return lowest + floor * (highest - lowest)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python -m suite.studies.life [FOLDER]")
    write_workloads(Path(sys.argv[1]) if sys.argv[1:] else workloads_folder())
