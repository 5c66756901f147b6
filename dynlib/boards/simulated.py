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
    """
    rows = []
    for unit in [board.unit(name) for name in units] if units else board.units:
        busy = 1.0 if unit.kind == "gpu" else float(unit.cores)
        source = weakest(board.source([unit.name]), network_source(unit))
        clock = "gpu_mhz" if unit.kind == "gpu" else "cpu_mhz"
        for subnet, layers in networks.items():
            for mhz in unit.freqs:
                latency_ms = network_ms(layers, unit, mhz, batch)
                power_mw = board.power_mw({unit.name: mhz}, {unit.name: busy})
                rows.append(
                    {
                        "model": model, "subnet": subnet, "board": board.name, "unit": unit.name,
                        "cores": busy, clock: mhz, "batch": batch, "latency_ms": latency_ms,
                        "power_mw": power_mw, "idle_power_mw": board.power_mw({}, {}),
                        "energy_mj": power_mw * latency_ms / 1e3,
                        "macs_m": sum(layer.macs for layer in layers) / 1e6,
                        "source": source, **(known or {}).get(subnet, {}),
                    }
                )  # fmt: skip
    return make_table(rows)


def fitting_batch(board: Board, unit: str, layers: Sequence[LayerSpec], at_least_ms: float) -> int:
    """Smallest batch with which `layers` take `at_least_ms` at the highest clock of `unit`."""
    target = board.unit(unit)
    batch = 1
    while network_ms(layers, target, target.max_mhz, batch) < at_least_ms:
        batch += 1
    return batch
