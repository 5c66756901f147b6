"""No policy serves more than the optimum says, or takes less energy for what it serves."""

import numpy as np
import pytest
from runtime_cases import NOISY, board, tables, unit

from dynlib.machine.bind import load_board
from dynlib.points import PointTable
from dynlib.runtime.case import Case
from dynlib.workload import App, Change, Workload
from suite.papers.dynamic_ofa import published_tables
from suite.studies.bound import Clairvoyant, attackers, below_optimum

# At once obedient, so that a clairvoyant policy gets near the bound; and with two equal clusters.
PROMPT = board(unit(settle_ms=0.0), unit("cpu", "cpu", cores=2, settle_ms=0.0, noise_cv=0.1))
TWINS = board(unit("a", noise_cv=0.05), unit("b", noise_cv=0.05), unit("cpu", "cpu", cores=4))
ARRIVALS = ("periodic", "server", "offline", "trace")


def random_case(on, points, seed):
    """One to three apps of all kinds of arrival, and up to five changes."""
    rng = np.random.default_rng([seed, len(on.units)])
    (model, table), *_ = points.items()
    unit_ms = table.largest.latency_ms[-1]
    horizon_ms = 15 * unit_ms

    def between(low, high):
        return float(rng.uniform(low, high))

    accuracies = [point.accuracy_val_pct for point in table.points.values()]
    apps, changes = [], []
    for i in range(rng.integers(1, 4)):
        trace_ms = tuple(sorted(rng.uniform(0, horizon_ms, 5).tolist()))
        apps.append(App(
            f"app{i}", model, between(0.4, 5) * unit_ms, str(rng.choice(ARRIVALS)),
            between(0.6, 4) * unit_ms, trace_ms, int(rng.integers(1, 15)),
            float(rng.choice([0.0, *accuracies])), int(rng.integers(0, 3)),
            start_s=between(0, horizon_ms / 4000), end_s=between(horizon_ms / 2000, 1e3),
        ))  # fmt: skip
    sizes_mb = [point.memory_mb for point in table.points.values()]
    for _ in range(rng.integers(0, 6)):
        t_s, where = between(0, horizon_ms / 1000), on.units[rng.integers(len(on.units))]
        kind = rng.integers(6)
        if kind == 0:
            changes.append(Change(t_s, unit=where.name, cap_mhz=float(rng.choice(where.freqs))))
        elif kind == 1:
            changes.append(Change(t_s, unit=where.name, stretch=between(1, 3)))
        elif kind == 2:
            changes.append(Change(t_s, unit=where.name, lost=True))
            changes.append(Change(between(t_s, 1.1 * t_s + 0.1), unit=where.name, lost=False))
        elif kind == 3:
            changes.append(Change(t_s, memory_mb=between(0.5, 2.5) * max(sizes_mb)))
        elif kind == 4:
            floor_pct = float(rng.choice(accuracies))
            changes.append(Change(t_s, "app0", deadline_ms=between(0.4, 3) * unit_ms,
                                  accuracy_floor_pct=floor_pct))  # fmt: skip
        elif on.memory:
            slow = float(rng.choice([opp.freq_mhz for opp in on.memory.opps]))
            changes.append(Change(t_s, emc_mhz=slow))
    return Case(Workload("random", horizon_ms / 1000, tuple(apps), tuple(changes)), on, points)


def with_memory(points, on):
    """The same points, where more accurate networks take more memory."""
    sized = {}
    for model, table in points.items():
        frame = table.frame.assign(memory_mb=table.frame["accuracy_val_pct"] - 50)
        sized[model] = PointTable(frame, on)
    return sized


@pytest.mark.parametrize(
    "on", [NOISY, PROMPT, TWINS, "hikey960", "jetson-tx2"],
    ids=["noisy", "prompt", "twins", "hikey960", "jetson-tx2"],
)  # fmt: skip
def test_nobody_is_below_the_optimum(on):
    if isinstance(on, str):
        on = load_board(on)
        points = published_tables(on)
    else:
        points = tables(on, units=[unit.name for unit in on.units])
    points = with_memory(points, on)
    for seed in range(4):
        case = random_case(on, points, seed)
        rows = below_optimum(case, attackers(case, seed), seed, search_s=0.2)
        below = [row for row in rows if row["is_below"]]
        assert not below, f"seed {seed}"


def test_one_who_knows_the_noise_gets_near():
    workload = Workload("calm", 5.0, (App("app", "net", 100.0, period_ms=100.0),))
    case = Case(workload, PROMPT, tables(PROMPT))
    (row,) = below_optimum(case, {"clairvoyant": Clairvoyant(case, 0)})
    assert not row["is_below"]
    assert row["on_time"] == row["most_on_time"] == 50
    assert row["energy_mj"] <= 1.01 * row["least_mj"]
