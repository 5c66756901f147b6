"""How long a network takes on a simulated unit: a per-layer roofline with launch overhead.

A layer costs a fixed overhead, its multiply-accumulates and its memory traffic. On a unit that runs
layers one by one (CPU) the three add; where launching overlaps work (GPU) the largest counts, so a
small network is launch-bound there. The clock then stretches the share of the time it governs.
"""

from collections.abc import Sequence

from dynlib.boards.board import LayerCost, Unit
from dynlib.errors import BoardError
from dynlib.space import LayerSpec


def layer_us(layer: LayerSpec, cost: LayerCost, batch: int = 1, cores: int | None = None) -> float:
    """Time of one layer at the highest clock, in us.

    A batch multiplies work and activations, not the overhead nor the weights read. More or fewer
    `cores` than in the measurement divide the work perfectly, a guess. Layers without weights
    (pooling, additions) cost only their traffic: the tables show no launch overhead for them.
    """
    weighted = layer.op in ("conv", "linear")
    weights = layer.params if weighted else 0
    depthwise = weighted and layer.groups == layer.in_channels > 1
    activations = 4 * (
        layer.in_channels * layer.in_size**2 + layer.out_channels * layer.out_size**2
    )
    rate = cost.us_per_mmac_depthwise if depthwise else cost.us_per_mmac
    spread = cost.cores / (cores or cost.cores)
    works = weighted or layer.op == "attention"  # products of activations with each other
    compute_us = rate * batch * layer.macs / 1e6 * spread if works else 0.0
    traffic_us = cost.us_per_mbyte * (batch * activations + 4 * weights) / 1e6
    fixed_us = cost.overhead_us if weighted else 0.0
    if depthwise:
        fixed_us += cost.us_per_kweight_depthwise * weights / 1e3
    if cost.asynchronous:
        return max(fixed_us, compute_us, traffic_us)
    return fixed_us + max(compute_us, traffic_us)


def network_ms(
    layers: Sequence[LayerSpec],
    unit: Unit,
    freq_mhz: float,
    batch: int = 1,
    cores: int | None = None,
) -> float:
    """Time of one batch through `layers` on `unit`, in ms, without execution noise.

    Args:
        layers: what the network runs, in order.
        freq_mhz: clock of the unit.
        batch: images per run.
        cores: cores used, up to `unit.cores`; None means all of them.

    Raises `BoardError` when the unit has no latency model, or for more cores than it has.
    """
    if unit.cost is None:
        raise BoardError(f"{unit.name}: no latency model for this unit")
    cores = unit.cores if cores is None else cores
    if not 1 <= cores <= unit.cores:
        raise BoardError(f"{unit.name}: {cores} cores; expected 1 to {unit.cores}")
    if batch < 1:
        raise BoardError(f"{unit.name}: batch of {batch}; expected at least 1")
    top_us = sum(layer_us(layer, unit.cost, batch, cores) for layer in layers)
    return top_us / 1e3 * unit.clock_scale(freq_mhz)


def network_source(unit: Unit, cores: int | None = None) -> str:
    """Label of a `network_ms`: `estimated` if a coefficient or the spread over cores is a guess."""
    if unit.cost and (cores or unit.cores) != unit.cost.cores:
        return "estimated"
    return unit.latency_source
