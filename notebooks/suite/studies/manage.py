"""Many runs at once: policies against scenarios over seeds, and how much guesses matter."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import process_time

import numpy as np
import pandas as pd

from dynlib.boards.board import Board
from dynlib.errors import DynlibError
from dynlib.manager.manager import Manager
from dynlib.manager.planner import Speed
from dynlib.manager.policy import Placement, Policy
from dynlib.points import PointTable, Tables, make_table
from dynlib.runtime.case import Case
from dynlib.runtime.oracle import optimum
from dynlib.runtime.rivals import TRIAL_SEEDS, Static, best_static, linux_default
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import GPU_LEVELS, PUBLISHED_MODEL, Reactive, published_tables
from suite.papers.ztt import train_agent
from suite.studies.compare import compare_policies, recovery_frames
from suite.studies.foresight import foresight
from suite.studies.parallel import in_parallel
from suite.studies.scenarios import scenario

Maker = Callable[[int], Case]
Scenarios = Mapping[str, Maker] | Iterable[str]


def contenders(board: Board, tables: Tables) -> dict[str, Callable[[Maker], Policy]]:
    """Who is compared: the Linux default, and the manager for each of its objectives."""
    return {
        "linux": linux_default,
        "manager": lambda make: Manager(board, tables),
        "accuracy": lambda make: Manager(board, tables, objective="accuracy"),
        "latency": lambda make: Manager(board, tables, objective="latency"),
    }


def rivals(board: Board, tables: Tables) -> dict[str, Callable[[Maker], Policy | None]]:
    """What else the manager is compared with: the best static setting, Dynamic-OFA's loop, the
    manager with one knob alone, and each kernel governor alone."""
    found: dict[str, Callable] = {
        "best static": best_static,
        "reactive": lambda make: Reactive(board, tables),
    }
    for knob in POLICY_KNOBS:
        found[f"{knob} only"] = partial(only, knob)
    for governor in ("performance", "powersave", "ondemand", "conservative", "schedutil"):
        found[governor] = partial(linux_default, name=governor, governor=governor)
    return found


def everybody(board: Board, tables: Tables) -> dict[str, Callable[[Maker], Policy | None]]:
    """The Linux default, the manager for energy, and `rivals`."""
    found = contenders(board, tables)
    return {name: found[name] for name in ("linux", "manager")} | rivals(board, tables)


def tables_by_work(board: Board) -> Tables:
    """The six published networks where nobody timed them: their work at the rate that the board's
    cost model gives each of its units. Left out, so too fast: launches, traffic, and that
    depth-wise layers are slower."""
    rows = [
        {"model": PUBLISHED_MODEL, "subnet": name, "board": board.name, "unit": unit.name,
         "cores": unit.cost.cores, "batch": 1, "accuracy_val_pct": accuracy_pct,
         "latency_ms": macs_m * unit.cost.us_per_mmac / 1000, "macs_m": macs_m,
         "params_m": params_m, "source": "estimated"}
        for unit in board.units if unit.cost
        for name, accuracy_pct, _, macs_m, params_m in GPU_LEVELS
    ]  # fmt: skip
    return {PUBLISHED_MODEL: PointTable(make_table(rows), board)}


def published_and_own(board: Board, points: pd.DataFrame) -> dict[str, Tables]:
    """Two sets of operating points on a board: "published", the networks of Dynamic-OFA, and "own",
    the rows of `points` (an operating-point table) for its GPU; left out where there are none."""
    own = points[(points["board"] == board.name) & (points["unit"] == board.gpu.name)]
    tables = {"published": published_tables(board)}
    if len(own):
        tables["own"] = PointTable.of_models(own, board)
    return tables


def simulate_many(
    scenarios: Scenarios,
    board: Board,
    tables: Tables,
    policies: Mapping[str, Callable[[Maker], Policy | None]] | None = None,
    seeds: Iterable[int] = range(20),
) -> pd.DataFrame:
    """Run every policy on every scenario and seed; one row each, as `Run.summary` gives them.

    Args:
        scenarios: names from `SCENARIOS`, or name -> (seed -> case).
        policies: name -> (function of seed -> case that builds the policy, once per scenario;
            None: it has none for this one). Default: `contenders`.
        seeds: of the evaluation; building a policy must use others.

    Everybody meets the same frames: same horizon, same arrivals, same noise per seed. The column
    `source` labels the numbers.
    """
    scenarios = _makers(scenarios, board, tables)
    policies = policies or contenders(board, tables)
    seeds, rows = list(seeds), []
    for scenario_name, make in scenarios.items():
        cases = {seed: make(seed) for seed in seeds}
        for policy_name, build in policies.items():
            policy = build(make)
            if policy is None:
                continue
            for seed, case in cases.items():
                row = case.simulate(policy, seed).summary()
                rows.append(row | {"scenario": scenario_name, "policy": policy_name})
    return pd.DataFrame(rows).drop(columns="apps", errors="ignore")  # nobody had a policy


def simulate_each(
    scenarios: Iterable[str],
    board: Board,
    tables: Tables,
    seeds: Iterable[int],
    policies: Callable[[Board, Tables], Mapping[str, Callable]] = contenders,
    names: Iterable[str] = (),
) -> pd.DataFrame:
    """`simulate_many` of scenarios by name, on all cores; `policies` as `contenders` and `rivals`
    are, for other processes to import, and of them those of `names` (default: all)."""
    jobs = [
        (name, policy, board, tables, list(seeds), policies)
        for name in scenarios
        for policy in names or policies(board, tables)
    ]
    return in_parallel(_with_policy, jobs)


def _with_policy(name: str, policy: str, board: Board, tables: Tables, seeds, policies):
    build = policies(board, tables)[policy]
    runs = simulate_many([name], board, tables, {policy: build}, seeds)
    return runs.to_dict("records")


def taught(name: str, board: Board, tables: Tables, seed: int, seeds) -> list[dict]:
    """Q-learning of one scenario, a job of `in_parallel`: rows of its learning curve, with
    `episode`, and of the runs of the agent that came out."""
    make = partial(scenario, name, board, tables)
    agent, curve = train_agent(make, seed=seed)
    policies = {"q-learning": lambda make: agent}
    runs = simulate_many({name: make}, board, tables, policies, seeds)
    curve = curve.assign(scenario=name, policy="q-learning")
    return [*curve.to_dict("records"), *runs.to_dict("records")]


def optimum_rows(board: Board, points: str, tables: Tables, name: str, seeds) -> list[dict]:
    """`against_optimum` for one scenario; a job of `in_parallel`."""
    table = against_optimum([name], board, tables, seeds=seeds)
    return table.assign(board=board.name, points=points).to_dict("records")


def sensitivity(
    scenarios: Iterable[str],
    board: Board,
    make_tables: Callable[[Board], Tables],
    seeds: Iterable[int] = range(5),
    draws: int = 32,
    floors: Iterable[str] = ("asked",),
) -> pd.DataFrame:
    """What the manager saves on boards that `board` may be: `draws` of them (`Board.perturbed`).

    The scenarios and the manager keep believing in `board`; the runs, and the trials that find the
    baseline, happen on the drawn one. `make_tables`, which other processes can import, gives the
    operating points on a board (`published_tables` does).

    Args:
        seeds: of the runs, one a draw, in turn: so draws differ in noise too.
        floors: "asked", the floors of the scenario, and "equal", the accuracy of the network that
            the Linux default runs on the drawn board (`as_accurate`).

    A row per draw, scenario and floor, with columns `draw`, `seed`, `floor` and those of
    `compare_policies` that need one run alone.
    """
    scenarios, seeds, floors = list(scenarios), list(seeds), tuple(floors)
    jobs = [
        (draw, real, board, make_tables, scenarios, seeds[draw % len(seeds)], floors)
        for draw, real in enumerate(board.perturbed(draws))
    ]
    return in_parallel(_on_drawn, jobs)


def _on_drawn(
    draw: int,
    real: Board,
    board: Board,
    make_tables: Callable[[Board], Tables],
    scenarios: Iterable[str],
    seed: int,
    floors: tuple[str, ...],
) -> list[dict]:
    believed, tables = make_tables(board), make_tables(real)
    rows = []
    for name in scenarios:
        make = partial(_moved, partial(scenario, name, board, believed), real, tables)
        linux, manager = linux_default(make), Manager(board, believed)
        asked = make(seed)
        base = asked.simulate(linux, seed).summary()
        for floor in floors:
            case = asked if floor == "asked" else as_accurate(asked, linux)
            ours = case.simulate(manager, seed).summary()
            runs = pd.DataFrame([base | {"policy": "linux"}, ours | {"policy": "manager"}])
            (row,) = compare_policies(runs.assign(scenario=name)).to_dict("records")
            row = {key: v for key, v in row.items() if not key.endswith(("_low", "_high"))}
            rows.append({
                "draw": draw, "seed": seed, "floor": floor, **row, "source": ours["source"],
            })  # fmt: skip
    return rows


def as_accurate(case: Case, policy: Static) -> Case:
    """The case with every floor at the accuracy of the network that a static policy runs."""
    workload, floors = case.workload, {}
    for app in workload.apps:
        point = case.tables[app.model].point(*policy.placements[app.name])
        floors[app.name] = point.accuracy_val_pct
    apps = tuple(replace(app, accuracy_floor_pct=floors[app.name]) for app in workload.apps)
    changes = []
    for change in workload.changes:
        if change.accuracy_floor_pct is None:
            changes.append(change)
        elif change.deadline_ms or change.period_ms:
            changes.append(replace(change, accuracy_floor_pct=floors[change.app]))
    return case.under(replace(workload, apps=apps, changes=tuple(changes)))


def _moved(make: Maker, board: Board, tables: Tables, seed: int) -> Case:
    """The workload of a case on another board."""
    return Case(make(seed).workload, board, tables)


def against_optimum(
    scenarios: Scenarios,
    board: Board,
    tables: Tables,
    build: Callable[[Maker], Policy] | None = None,
    seeds: Iterable[int] = range(3),
) -> pd.DataFrame:
    """How far a policy (default: the manager) is from `optimum`: one row per scenario and seed.

    Columns: scenario, seed, energy_over_oracle (board energy per on-time frame over that of the
    optimum), above_idle_over_oracle (energy above idle, for the frames that the policy served in
    time), above_idle_least (the least of it without foreknowledge of the noise, see `foresight`;
    NaN where that does not apply), deadline_miss_pct (outside the spans that the optimum calls
    infeasible), infeasible_pct (frames in these spans), energy_over_oracle_same_frames (board
    energy over the least for the frames served in time), served_of_optimum (these over the most
    that anybody serves), optimum_gap, source.
    """
    rows = []
    for name, make in _makers(scenarios, board, tables).items():
        policy = build(make) if build else Manager(board, tables)
        least = _least(make(0))
        for seed in seeds:
            case = make(seed)
            done = case.simulate(policy, seed)
            summary, frames = done.summary(), done.frames()
            best = optimum(case, seed)
            served = frames[frames["on_time"]]
            same = optimum(case, seed, zip(served["app"], served["frame"], strict=True))
            inside = within(frames, best.spans_s)
            outside = frames[~inside]
            per_frame_mj = best.energy_mj / best.served if best.served else math.nan
            rows.append({
                "scenario": name, "seed": seed, "policy": policy.name,
                "energy_over_oracle": summary["energy_per_frame_mj"] / per_frame_mj,
                "above_idle_over_oracle": (summary["energy_mj"] - same.idle_mj)
                / max(same.energy_mj - same.idle_mj, 1e-9),
                "above_idle_least": least,
                "deadline_miss_pct": 100 * (~outside["on_time"]).mean() if len(outside) else 0.0,
                "infeasible_pct": 100 * inside.mean(),
                "energy_over_oracle_same_frames": summary["energy_mj"] / same.energy_mj,
                "served_of_optimum": len(served) / best.served if best.served else math.nan,
                "optimum_gap": max(best.gap, same.gap),
                "source": summary["source"],
            })  # fmt: skip
    return pd.DataFrame(rows)


def within(frames: pd.DataFrame, spans_s: Iterable[tuple[float, float]]) -> pd.Series:
    """Which frames have their time, from arrival to deadline, partly in one of the spans (s)."""
    start_s, end_s = frames["arrival_s"], frames["arrival_s"] + frames["deadline_ms"] / 1000
    inside = pd.Series(False, frames.index)
    for first_s, last_s in spans_s:
        inside |= (start_s < last_s) & (end_s > first_s)
    return inside


def _least(case: Case) -> float:
    workload = case.workload
    alone = len(workload.apps) == 1 and workload.apps[0].arrival == "periodic"
    if not alone or not all(change.app for change in workload.changes):
        return math.nan  # somebody else is there too
    with suppress(DynlibError):
        return foresight(case)
    return math.nan


def over_linux(runs: pd.DataFrame) -> pd.DataFrame:
    """Energy per on-time frame of every policy over the Linux default's: a row per policy and
    scenario, with deadline_miss_pct and source."""
    means = runs.groupby(["policy", "scenario"], sort=False)
    table = means[["energy_per_frame_mj", "deadline_miss_pct"]].mean().reset_index()
    linux = table[table["policy"] == "linux"].set_index("scenario")["energy_per_frame_mj"]
    ratio = table["energy_per_frame_mj"] / table["scenario"].map(linux)
    return table.assign(energy_over_linux=ratio, source=runs["source"].iloc[0])


def levels(case: Case, span_s: float = 0.6) -> pd.DataFrame:
    """What the two levels of the manager do with a case of one app, for a figure.

    Columns panel, kind, x, y, source. `upper`: every network of the chosen unit at every clock, by
    planned time over deadline and mean power (mW). `lower`: clock (MHz), frames (start, end in s)
    and deadlines over `span_s` seconds.
    """
    board, tables, workload = case.board, case.tables, case.workload
    manager = Manager(board, tables)
    done = case.simulate(manager)
    log, app = done.log, workload.apps[0]
    table = tables[app.model]
    need = workload.timeline(app)[0][1]
    first = next(e for e in log if e["event"] == "decide")
    unit, rows = board.unit(first["unit"]), []
    changes = [e for e in log if e["event"] == "set" and e["reason"] == "acts"
               and e["unit"] == unit.name]  # fmt: skip
    mhz = "gpu_mhz" if unit.kind == "gpu" else "cpu_mhz"
    for point in table.on(unit.name):
        for i, ms in enumerate(point.latency_ms):
            planned_ms = ms * manager.planner.margin(point, Speed())
            fits = planned_ms <= need.deadline_ms and point.accuracy_val_pct >= need.floor_pct
            kind = "feasible" if fits else "misses deadline or floor"
            rows.append(("upper", kind, planned_ms / need.deadline_ms,
                         point.active_mw[i] * ms / need.period_ms))  # fmt: skip
    feasible = [row for row in rows if row[1] == "feasible" and row[2] <= 1]
    chosen = min(feasible, key=lambda row: row[3])
    rows.append(("upper", "chosen", *chosen[2:]))
    start_s = 1.0
    now = [e[mhz] for e in changes if e["t_s"] <= start_s] or [unit.min_mhz]
    inside = [(e["t_s"], e[mhz]) for e in changes if start_s < e["t_s"] < start_s + span_s]
    steps = [(start_s, now[-1]), *inside, (start_s + span_s, (inside or [(0, now[-1])])[-1][1])]
    rows += [("lower", "clock", *step) for step in steps]
    for frame in done.frames().itertuples():
        end_s = start_s + span_s
        if start_s < frame.finish_s and frame.start_s < end_s:
            rows.append(("lower", "frame", max(frame.start_s, start_s), min(frame.finish_s, end_s)))
            due_s = frame.arrival_s + frame.deadline_ms / 1000
            rows += [("lower", "deadline", due_s, 0.0)] if due_s < end_s else []
    source = log.header["source"]
    return pd.DataFrame(rows, columns=["panel", "kind", "x", "y"]).assign(source=source)


def recoveries(
    board: Board, tables: Tables, build: Callable[[Maker], Policy], seeds: Iterable[int]
) -> list[int]:
    """`recovery_frames` of S4 over all seeds, without frames that the optimum calls infeasible."""
    make = partial(scenario, "S4", board, tables)
    policy, found = build(make), []
    for seed in seeds:
        case = make(seed)
        frames = case.simulate(policy, seed).frames()
        hopeless = optimum(case, seed).infeasible
        fair = [key not in hopeless for key in zip(frames["app"], frames["frame"], strict=True)]
        found += recovery_frames(frames[fair], case.workload)
    return found


def simulation_speed(
    board: Board, tables: Tables, policy: Policy, horizon_s: float = 60.0
) -> float:
    """Simulated seconds per second of CPU time: two periodic apps that fill a third of the main
    unit each, at 30 fps once times are scaled; with the full log."""
    model, table = next(iter(tables.items()))
    period_ms = 3 * table.smallest.latency_ms[-1]
    apps = tuple(App(n, model, period_ms, period_ms=period_ms, start_unit=table.main_unit)
                 for n in "ab")  # fmt: skip
    workload = Workload("speed", horizon_s * period_ms * 30 / 1000, apps)
    case = Case(workload, board, tables)
    begin = process_time()
    case.simulate(policy)
    return horizon_s / (process_time() - begin)


def decision_us(
    board: Board, apps: int, points: int, seed: int = 0, repeats: int = 5
) -> list[float]:
    """CPU time of every decision, in us: `apps` apps with `points` sub-networks of their own on the
    fastest unit, all clocks, and requirements that change, announced or not, every second.

    The same run is made `repeats` times by a manager that starts anew; each decision counts with
    its median, so that what else a shared machine does is not counted as the manager's.
    """
    unit = next((u for u in board.units if u.kind == "gpu"), board.units[-1])
    rng, rows = np.random.default_rng(seed), []
    for i in range(points):
        ms, accuracy_pct = 10 + 10 * i / points, 70 + 10 * (i / points) ** 0.5
        for mhz in unit.freqs:
            rows.append({
                "model": "many", "subnet": f"n{i}", "board": board.name, "unit": unit.name,
                "cores": 1, "batch": 1, f"{unit.kind}_mhz": mhz, "accuracy_val_pct": accuracy_pct,
                "latency_ms": ms * unit.clock_scale(mhz),
                "source": "estimated",
            })  # fmt: skip
    tables = {"many": PointTable(make_table(rows), board)}
    who = tuple(
        App(f"app{i}", "many", 40.0 * apps, period_ms=40.0 * apps + 3 * i) for i in range(apps)
    )
    changes = tuple(
        Change(float(t), who[t % apps].name, deadline_ms=float(rng.uniform(30, 50)) * apps,
               accuracy_floor_pct=float(rng.uniform(70, 78)), announced=bool(t % 2))
        for t in range(1, 30)
    )  # fmt: skip
    times: list[list[float]] = [[] for _ in range(repeats)]
    case = Case(Workload("many", 30.0, who, changes), board, tables)
    for taken in times:  # the garbage collector stays on, as it would be
        case.simulate(Manager(board, tables), seed, decision_ms=taken)
    return (1000 * np.median(times, axis=0)).tolist()


def _makers(scenarios: Scenarios, board: Board, tables: Tables) -> dict[str, Maker]:
    if isinstance(scenarios, Mapping):
        return dict(scenarios)
    return {name: partial(scenario, name, board, tables) for name in scenarios}


POLICY_KNOBS = ("clocks", "network", "placement")


def only(knob: str, make: Callable[[int], Case], **options) -> Manager:
    """The manager with one of `POLICY_KNOBS`; the others stay as the Linux default has them.

    Where a unit does not know the network that the default runs, placement alone may take the one
    of nearest accuracy there.
    """
    if knob not in POLICY_KNOBS:
        raise DynlibError(f"unknown knob {knob!r}; expected one of {POLICY_KNOBS}")
    base, case = linux_default(make, **options), make(TRIAL_SEEDS[0])
    mine = dict(case.tables)
    for app, placement in base.placements.items():
        table = case.tables[case.workload.app(app).model]
        kept = _within_reach(knob, table, placement)
        frame = table.frame
        rows = [pair in kept for pair in zip(frame["subnet"], frame["unit"], strict=True)]
        mine[app] = PointTable(frame[rows], case.board)
    governors = {} if knob == "clocks" else base.governors
    manager = Manager(case.board, mine, governors=governors)
    manager.name = f"{knob} only"
    return manager


def _within_reach(knob: str, table: PointTable, home: Placement) -> set[tuple[str, str]]:
    """The (sub-network, unit) that one knob reaches from where the Linux default has an app."""
    if knob == "clocks":
        return {(home.subnet, home.unit)}
    if knob == "network":
        return {(point.subnet, home.unit) for point in table.on(home.unit)}
    aim_pct = table.point(*home).accuracy_val_pct
    nearest = {
        unit: min(table.on(unit), key=lambda point: abs(point.accuracy_val_pct - aim_pct))
        for unit in table.units
    }
    return {(home.subnet, home.unit)} | {
        (point.subnet, unit) for unit, point in nearest.items() if unit != home.unit
    }
