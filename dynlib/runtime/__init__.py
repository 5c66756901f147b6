"""Managing at run time: workloads, one event engine, policies, and what a run is worth.

Imports without torch. It stands on boards and operating-point tables, never on a live network.
"""

from dynlib.runtime.engine import EngineError, run
from dynlib.runtime.experiments import contenders, sensitivity, simulate_many
from dynlib.runtime.manager import Manager
from dynlib.runtime.measures import (
    compare,
    energy_mj,
    frames_of,
    headline,
    published_ladder,
    reductions,
    summarise,
    timeline,
)
from dynlib.runtime.policies import Static, best_static, linux_default
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
    "SCENARIOS", "Action", "App", "Change", "EngineError", "Manager", "Placement", "PointTable",
    "Policy", "State", "Static", "Workload", "WorkloadError", "best_static", "compare",
    "contenders", "dump_workload", "energy_mj", "frames_of", "headline", "linux_default",
    "load_workload", "published_frame", "published_ladder", "published_tables", "reductions",
    "run", "scenario", "sensitivity", "simulate_many", "summarise", "timeline",
]  # fmt: skip
