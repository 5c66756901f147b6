"""What is run: a workload on a board, with the operating points of its models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dynlib.boards.board import Board
from dynlib.errors import TableError
from dynlib.manager.policy import Policy
from dynlib.points import PointTable
from dynlib.runtime.live import LiveRun, Served, serve
from dynlib.runtime.simulation import Simulation
from dynlib.runtime.summary import Run
from dynlib.workload import Workload


@dataclass(frozen=True)
class Case:
    """Everything a run depends on but its policy and its seed.

    Args:
        workload: apps, and what changes.
        board: where; runs read powers from it, so that a board with other coefficients can be run
            against the tables of the first.
        tables: model -> its operating points (`read_points`); runs read latencies there.

    Raises `TableError` for tables that are none, such as data frames.

    >>> board = load_board("jetson-nano")
    >>> points = read_points("points.csv", board)  # as the example of `read_points` wrote it
    >>> camera = App("camera", "example", deadline_ms=33.0, period_ms=33.0, accuracy_floor_pct=75.0)
    >>> case = Case(Workload("street", 10.0, (camera,)), board, points)
    >>> run = case.simulate(Manager(board, case.tables), seed=1)
    >>> summary = run.summary()
    >>> summary["offered"], summary["deadline_miss_pct"], summary["accuracy_mean_pct"]
    (303, 0.0, 80.0)
    >>> sorted(set(run.frames()["subnet"]))
    ['large']
    """

    workload: Workload
    board: Board
    tables: Mapping[str, PointTable]

    def __post_init__(self):
        by_model = isinstance(self.tables, Mapping)
        tables = self.tables.values() if by_model else [self.tables]
        wrong = [type(table).__name__ for table in tables if not isinstance(table, PointTable)]
        if wrong:
            expected = "a PointTable for each model; PointTable.of_models(table, board) makes them"
            raise TableError(f"{self.workload.name}, tables: got {wrong[0]}, expected {expected}")

    def under(self, workload: Workload) -> "Case":
        """The same board and points under another workload."""
        return replace(self, workload=workload)

    def simulate(self, policy: Policy, seed: int = 0, **options: Any) -> Run:
        """A run on the simulated board; same arguments, same log, bit for bit.

        `options` are those of `Simulation`. Raises `PolicyError` for an app, clock, unit of a clock
        or model that does not exist, `TableError` for a sub-network that is not where it is placed.
        """
        return Run(self, Simulation(self, policy, seed, **options).run())

    def serve(self, policy: Policy, networks: Mapping[str, Served], **options: Any) -> LiveRun:
        """A run on the machine this runs on; see `serve`."""
        return serve(self, policy, networks, **options)


def simulate(case: Case, policy: Policy, seed: int = 0, **options: Any) -> Run:
    """See `Case.simulate`.

    >>> board = load_board("jetson-nano")
    >>> points = read_points("points.csv", board)  # as the example of `read_points` wrote it
    >>> camera = App("camera", "example", deadline_ms=33.0, period_ms=33.0)
    >>> case = Case(Workload("street", 10.0, (camera,)), board, points)
    >>> simulate(case, Manager(board, points), seed=1).frames()["on_time"].all()
    np.True_
    """
    return case.simulate(policy, seed, **options)
