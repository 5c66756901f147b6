"""Order, accuracy, clocks and joules together: on the loop of the house, against the optimum.

The networks' times are those of the synthetic traces, taken for the GPU of a board at its highest
clock; their cheaper versions are those of `schedule.LADDER`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from dynlib.boards.board import Board, Unit
from dynlib.machine.bind import load_board
from dynlib.manager.pacer import Pacer, Work, in_order
from dynlib.manager.policy import Action, Placement, State, share_done
from dynlib.pareto import lower_hull
from dynlib.points import PointTable, make_table
from dynlib.runtime.case import Case
from dynlib.runtime.drain import Trace
from dynlib.runtime.rivals import Static
from dynlib.runtime.schedulers import Index, Ordered
from dynlib.workload import App, Workload
from suite.papers.dysta import Benchmark, poisson, profiles, traces
from suite.studies.schedule import DROP_PP, LADDER

FULL_PCT = 80.0  # accuracy of a full network; only drops count


def board_case(bench: Benchmark, board: Board, unit: str = "gpu") -> tuple[Case, dict[str, Trace]]:
    """Requests as a case of the house, an app a network, and what its frames take."""
    apps, takes, rows = [], {}, []
    offered = bench.offered
    arrival_ms, deadline_ms = np.asarray(offered.arrival_ms), np.asarray(offered.deadline_ms)
    for name, trace in traces(bench.workload).items():
        mine = [i for i, model in enumerate(offered.model) if model == name]
        inputs = [offered.sample[i] for i in mine]
        if not mine:
            continue
        # Times are relative to their mean, so that the table has the mean of these very inputs.
        takes[name] = Trace(name, trace.ms[inputs], trace.density[inputs])
        arrivals = tuple(arrival_ms[mine].tolist())
        apps.append(App(name, name, float(deadline_ms[mine[0]]), "trace", trace_ms=arrivals))
        spec = board.unit(unit)
        rows += [
            {"model": name, "subnet": f"level{g}", "board": board.name, "unit": unit, "batch": 1,
             "gpu_mhz": mhz, "accuracy_val_pct": FULL_PCT - DROP_PP[g], "source": "estimated",
             "latency_ms": takes[name].mean_ms * scale * spec.max_mhz / mhz}
            for g, scale in enumerate(LADDER) for mhz in spec.freqs
        ]  # fmt: skip
    horizon_s = (arrival_ms[-1] + 3 * deadline_ms.max()) / 1000
    tables = PointTable.of_models(make_table(rows), board)
    return Case(Workload(bench.workload, float(horizon_s), tuple(apps)), board, tables), takes


@dataclass(frozen=True, eq=False)
class Thrifty(Ordered):
    """Ours: a level by the backlog, the next by `Index`, and the clock of the manager's pacer."""

    unit: Unit | None = None
    tables: Mapping[str, PointTable] | None = None
    backlog: float = 8.0
    kept: float = 0.85  # of what is left until a deadline, for requests to come
    least_mhz: float = 0.0
    static = False

    def elapsed_ms(self, job) -> float:
        """As if at the highest clock in the full network."""
        if job.point is None:
            return 0.0
        done = share_done(job.point, job.ran.items(), self.unit.freqs)
        return done * self.tables[job.app].point("level0", self.unit.name).latency_ms[-1]

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """Levels of what starts next, and the clock for all that is at hand."""
        work = list(self._at_hand(state))
        backlog = sum(max(item.typical, 0.0) for item in work)
        level = min(max(math.ceil(backlog / self.backlog) - 1, 0), len(LADDER) - 1)
        placements = {a.name: Placement(f"level{level}", self.unit.name) for a in state.apps}
        if not work:
            return Action(placements, {self.unit.name: self.unit.min_mhz}, reason=self.name)
        pacer = Pacer(self.unit)
        now_mhz = state.clocks[self.unit.name]
        pace = pacer.choose(state.t_ms, now_mhz, in_order(work), (), self.least_mhz,
                            limits[self.unit.name])  # fmt: skip
        wake_ms = pace.again_ms if math.isfinite(pace.again_ms) else None
        return Action(placements, {self.unit.name: pace.mhz}, wake_ms, reason=self.name)

    def _at_hand(self, state: State):
        for app in state.apps:
            table = self.tables[app.name]
            spread = self.profiles[app.name].sigma_ms[0] / self.profiles[app.name].mean_ms
            for frame in app.waiting:
                point = table.point("level0", self.unit.name)
                yield Work(self._pace_to(frame, state), 1.0, 1.0 + spread, point, 0.0, spread)
            for frame in app.running:
                point = table.point(frame.subnet, self.unit.name)
                done = share_done(point, frame.ran, self.unit.freqs)
                left = max(1.0 - done, 0.1)
                due_ms = self._pace_to(frame, state)
                yield Work(due_ms, left, left + spread, point, done, spread)

    def _pace_to(self, frame, state: State) -> float:
        return state.t_ms + (1 - self.kept) * (frame.deadline_at_ms - state.t_ms)


@dataclass(frozen=True, eq=False)
class EdgeServing(Thrifty):
    """The rule of EdgeServing (arXiv 2605.05527) as its abstract tells it, which has no formula.

    Whole networks, the highest clock; the queue next whose oldest request has used up most of its
    deadline, at the most accurate exit with which no other request at hand is predicted late.
    """

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """The exit of what starts next, from mean times."""
        waiting = [(f, self.tables[a.name]) for a in state.apps for f in a.waiting]
        waiting.sort(key=lambda item: item[0].deadline_at_ms)
        level = len(LADDER) - 1
        for g in range(len(LADDER)):
            t_ms, good = state.t_ms, True
            for number, (frame, table) in enumerate(waiting):
                name = f"level{g}" if number == 0 else f"level{len(LADDER) - 1}"
                t_ms += table.point(name, self.unit.name).latency_ms[-1]
                good = good and t_ms <= frame.deadline_at_ms
            if good:
                level = g
                break
        placements = {a.name: Placement(f"level{level}", self.unit.name) for a in state.apps}
        return Action(placements, {self.unit.name: limits[self.unit.name]}, reason=self.name)

    def choose(self, ready: Sequence, now_ms: float):
        """What runs, to its end; then the most urgent."""
        started = [job for job in ready if job.segment]
        if started:
            return started[0]
        return max(ready, key=lambda j: (now_ms - j.arrival_ms) / (j.deadline_at_ms - j.arrival_ms))


def least_energy(bench: Benchmark, unit: Unit, finish_ms: np.ndarray, drop_pp: float) -> float:
    """The least energy above idle, in mJ, that the same accuracy and the same misses allow.

    Requests may be cut anywhere and mixed from levels and clocks; they are done by their deadline,
    or when the policy was done with them if that was later. Every schedule of a run with this drop
    of accuracy is a solution, so that none takes less.
    """
    arrival_ms = np.asarray(bench.offered.arrival_ms)
    due_ms = np.maximum(arrival_ms + bench.offered.deadline_ms, finish_ms)
    freqs = _useful_clocks(unit)
    slow = unit.max_mhz / np.array(freqs)
    joules = slow * [unit.power_mw(f) - unit.power_mw(unit.min_mhz, 0.0) for f in freqs] / 1000
    ends = np.unique(np.concatenate([arrival_ms, due_ms]))
    first, last = np.searchsorted(ends, arrival_ms), np.searchsorted(ends, due_ms)
    request = np.repeat(np.arange(len(arrival_ms)), last - first)
    cell = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
    count, levels, clocks = len(arrival_ms), len(LADDER), len(freqs)
    runs = len(request) * clocks
    column = np.arange(runs)
    # Work done in all cells and clocks is that of the levels; levels add up to one.
    level_column = runs + np.arange(count * levels)
    of = np.repeat(np.arange(count), levels)
    work = -np.repeat(bench.alone_ms, levels) * np.tile(LADDER, count)
    equal = coo_array(
        (np.concatenate([np.ones(runs), work, np.ones(count * levels)]),
         (np.concatenate([np.repeat(request, clocks), of, count + of]),
          np.concatenate([column, level_column, level_column]))),
    )  # fmt: skip
    cells = len(ends) - 1
    most = coo_array(
        (np.concatenate([np.tile(slow, len(request)), np.tile(DROP_PP, count) / count]),
         (np.concatenate([np.repeat(cell, clocks), np.full(count * levels, cells)]),
          np.concatenate([column, level_column]))),
    )  # fmt: skip
    cost = np.concatenate([np.tile(joules, len(request)), np.zeros(count * levels)])
    found = linprog(
        cost, most.tocsr(), np.append(np.diff(ends), drop_pp + 1e-9), equal.tocsr(),
        np.append(np.zeros(count), np.ones(count)), method="highs",
    )  # fmt: skip
    return float(found.fun)


def _useful_clocks(unit: Unit) -> list[float]:
    """Those on the lower hull of time and energy above idle."""
    idle_mw = unit.power_mw(unit.min_mhz, 0.0)
    pairs = [(1 / f, (unit.power_mw(f) - idle_mw) / f) for f in unit.freqs]
    return [1 / slow for slow, _ in lower_hull(pairs)]


def energy_rows(workload: str, rate: float, count: int, seed: int, board: str) -> list[dict]:
    """Ours and EdgeServing's rule on the same requests: energy a request above idle, misses,
    accuracy given up, and the least energy at that accuracy and those misses."""
    bench = poisson(workload, rate, count, (seed, 2))
    board = load_board(board)
    spec = replace(board.unit("gpu"), noise_cv=0.0)
    board = replace(board, units=tuple(spec if u.name == "gpu" else u for u in board.units))
    case, takes = board_case(bench, board)
    known = {app: profiles(workload, True)[app] for app in takes}
    base = Static("base", {})
    # No clock below the one that takes least energy.
    common = {"base": base, "profiles": known, "unit": spec, "tables": case.tables,
              "least_mhz": max(_useful_clocks(spec)[-1], spec.min_mhz)}  # fmt: skip
    found = []
    for policy in (
        Thrifty(scheduler=Index(dear=12.0, patience=3.0, name="ours"), **common),
        EdgeServing(scheduler=Index(name="EdgeServing"), **common),
    ):
        run = case.simulate(policy, seed, traces=takes, switch_ms=0.0)
        frames = run.frames().sort_values("arrival_s")
        idle_mj = board.power_mw({}, {}) * case.workload.horizon_s
        energy_mj = (run.energy_mj - idle_mj) / count
        drop_pp = FULL_PCT - frames["accuracy_val_pct"].mean()
        finish_ms = 1000 * frames["finish_s"].to_numpy()
        best_mj = least_energy(bench, spec, finish_ms, drop_pp) / count
        found.append({
            "workload": workload, "seed": seed, "policy": policy.name, "energy_mj": energy_mj,
            "optimum_mj": best_mj, "over_optimum": energy_mj / best_mj, "drop_pp": drop_pp,
            "violation_pct": 100 * (~frames["on_time"]).mean(), "requests": count,
        })  # fmt: skip
    return found
