"""Managing at run time: workloads, one event engine, policies, and what a run is worth.

Imports without torch. It stands on boards and operating-point tables, never on a live network.
"""

from dynlib.runtime.engine import EngineError, run
from dynlib.runtime.experiments import (
    against_optimum,
    contenders,
    decision_us,
    levels,
    over_linux,
    recoveries,
    rivals,
    sensitivity,
    simulate_many,
    simulation_speed,
    tables_by_work,
)
from dynlib.runtime.foresight import foresight
from dynlib.runtime.manager import Manager
from dynlib.runtime.measures import (
    compare,
    energy_mj,
    frames_of,
    headline,
    published_ladder,
    recovery_frames,
    reductions,
    summarise,
    timeline,
)
from dynlib.runtime.oracle import Optimum, offered, oracle
from dynlib.runtime.policies import Reactive, Static, best_static, linux_default, only
from dynlib.runtime.qlearning import QAgent, matches, train_agent
from dynlib.runtime.scenarios import SCENARIOS, scenario
from dynlib.runtime.state import Action, Placement, Policy, State
from dynlib.runtime.tables import PointTable, published_frame, published_tables
from dynlib.runtime.workload import (
    App,
    Change,
    Workload,
    WorkloadError,
    dump_workload,
    load_workload,
)

__all__ = [
    "SCENARIOS",
    "Action",
    "App",
    "Change",
    "EngineError",
    "Manager",
    "Optimum",
    "Placement",
    "PointTable",
    "Policy",
    "QAgent",
    "Reactive",
    "State",
    "Static",
    "Workload",
    "WorkloadError",
    "against_optimum",
    "best_static",
    "compare",
    "contenders",
    "decision_us",
    "dump_workload",
    "energy_mj",
    "foresight",
    "frames_of",
    "headline",
    "levels",
    "linux_default",
    "load_workload",
    "matches",
    "offered",
    "only",
    "oracle",
    "over_linux",
    "published_frame",
    "published_ladder",
    "published_tables",
    "recoveries",
    "recovery_frames",
    "reductions",
    "rivals",
    "run",
    "scenario",
    "sensitivity",
    "simulate_many",
    "simulation_speed",
    "summarise",
    "tables_by_work",
    "timeline",
    "train_agent",
]  # fmt: skip
