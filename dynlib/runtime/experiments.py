"""Many runs at once: policies against scenarios over seeds, and how much guesses matter."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import pandas as pd

from dynlib.hardware.board import Board
from dynlib.runtime.engine import run
from dynlib.runtime.manager import Manager
from dynlib.runtime.measures import compare, summarise
from dynlib.runtime.policies import linux_default
from dynlib.runtime.scenarios import scenario
from dynlib.runtime.state import Policy
from dynlib.runtime.tables import Tables
from dynlib.runtime.workload import Workload

Maker = Callable[[int], Workload]
Scenarios = Mapping[str, Maker] | Iterable[str]


def contenders(board: Board, tables: Tables) -> dict[str, Callable[[Maker], Policy]]:
    """Who is compared: the Linux default, and the manager for least energy and for accuracy."""
    return {
        "linux": lambda make: linux_default(make, board, tables),
        "manager": lambda make: Manager(board, tables),
        "accuracy": lambda make: Manager(board, tables, objective="accuracy"),
    }


def simulate_many(
    scenarios: Scenarios,
    board: Board,
    tables: Tables,
    policies: Mapping[str, Callable[[Maker], Policy | None]] | None = None,
    seeds: Iterable[int] = range(20),
) -> pd.DataFrame:
    """Run every policy on every scenario and seed; one row each, columns as `summarise` gives them.

    Args:
        scenarios: names from `SCENARIOS`, or name -> (seed -> workload).
        policies: name -> (function of seed -> workload that builds the policy, once per scenario;
            None: it has none for this one). Default: `contenders`.
        seeds: of the evaluation; building a policy must use others.

    Everybody meets the same frames: same horizon, same arrivals, same noise per seed. The column
    `source` labels the numbers.
    """
    scenarios = _makers(scenarios, board, tables)
    policies = policies or contenders(board, tables)
    seeds, rows = list(seeds), []
    for scenario_name, make in scenarios.items():
        workloads = {seed: make(seed) for seed in seeds}
        for policy_name, build in policies.items():
            policy = build(make)
            if policy is None:
                continue
            for seed, workload in workloads.items():
                log = run(workload, board, tables, policy, seed)
                row = summarise(log, workload, tables, board)
                rows.append(row | {"scenario": scenario_name, "policy": policy_name})
    return pd.DataFrame(rows).drop(columns="apps")


def sensitivity(
    scenarios: Scenarios,
    board: Board,
    make_tables: Callable[[Board], Tables],
    seeds: Iterable[int] = range(5),
    factors: Iterable[float] = (0.7, 1.0, 1.3),
) -> pd.DataFrame:
    """`compare` with every guessed coefficient of the board scaled, per factor and scenario.

    The scenarios and the manager keep believing in `board`; the runs, and the trials that find the
    baseline, happen on the board whose guesses are wrong. `make_tables` gives the operating points
    on a board (`published_tables` does). Column `factor`, then those of `compare`.
    """
    believed = make_tables(board)
    makers = _makers(scenarios, board, believed)
    results = []
    for factor in factors:
        real = board.perturbed(factor)
        tables = make_tables(real)
        policies = {
            "linux": lambda make, real=real, tables=tables: linux_default(make, real, tables),
            "manager": lambda make: Manager(board, believed),
        }
        table = compare(simulate_many(makers, real, tables, policies, list(seeds)))
        table.insert(0, "factor", factor)
        results.append(table)
    return pd.concat(results, ignore_index=True)


def _makers(scenarios: Scenarios, board: Board, tables: Tables) -> dict[str, Maker]:
    if isinstance(scenarios, Mapping):
        return dict(scenarios)
    return {name: partial(_scenario, name, board, tables) for name in scenarios}


def _scenario(name: str, board: Board, tables: Tables, seed: int) -> Workload:
    return scenario(name, tables, board, seed)
