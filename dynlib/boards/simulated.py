"""Operating points of networks on a simulated board: every unit, every clock, one table."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from dynlib.boards.board import Board
from dynlib.boards.latency import network_ms, network_source
from dynlib.points import make_table
from dynlib.source import weakest
from dynlib.space import LayerSpec


def simulate_points(
    board: Board,
    networks: Mapping[str, Sequence[LayerSpec]],
    *,
    model: str,
    batch: int = 1,
    units: Iterable[str] | None = None,
    known: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """One row per network, unit and clock, with the other units at their lowest clocks and idle.

    `latency_ms` and `energy_mj` are of one batch. `energy_mj` is the whole board's, static power
    included; `idle_power_mw` is what the board would draw with nothing running.

    Args:
        networks: layers of each sub-network, by its name.
        units: which units to simulate; default all.
        known: further columns of each sub-network, such as its accuracy.

    Raises `BoardError` for a board without a power or latency model.

    >>> from dynlib.space import LayerSpec
    >>> layers = [LayerSpec("conv", 3, 64, 3, 1, 1, 32, 32), LayerSpec("linear", 64, 10)]
    >>> points = simulate_points(load_board("jetson-nano"), {"tiny": layers}, model="example")
    >>> str(points["source"].iloc[-1]), sorted(set(points["unit"]))
    ('estimated', ['cpu', 'gpu'])
    """
    known = known or {}
    common = {"model": model, "board": board.name, "batch": batch}
    common["idle_power_mw"] = board.power_mw({}, {})
    rows = []
    for name in units or [unit.name for unit in board.units]:
        unit = board.unit(name)
        source = weakest(board.source([name]), network_source(unit))
        busy = float(unit.cores)
        clock = "cpu_mhz" if unit.kind == "cpu" else "gpu_mhz"
        for subnet, layers in networks.items():
            row = {**common, "unit": name, "cores": busy, "source": source, "subnet": subnet}
            row["macs_m"] = sum(layer.macs for layer in layers) / 1e6
            row |= known.get(subnet, {})
            for mhz in unit.freqs:
                latency_ms = network_ms(layers, unit, mhz, batch)
                power_mw = board.power_mw({name: mhz}, {name: busy})
                energy_mj = power_mw * latency_ms / 1e3
                costs = {"latency_ms": latency_ms, "power_mw": power_mw, "energy_mj": energy_mj}
                rows.append({**row, **costs, clock: mhz})
    return make_table(rows)


def fitting_batch(board: Board, unit: str, layers: Sequence[LayerSpec], at_least_ms: float) -> int:
    """Smallest batch with which `layers` take `at_least_ms` at the highest clock of `unit`."""
    target = board.unit(unit)
    batch = 1
    while network_ms(layers, target, target.max_mhz, batch) < at_least_ms:
        batch += 1
    return batch
