"""Boards as models: what a clock costs and brings, the kernel's governors, heat.

No file of a real machine is touched here. A network comes in as `dynlib.space.LayerSpec`s. Imported
from their modules, because they need numpy, pandas or scipy, are `simulated.simulate_points`,
`platform.Platform` and `calibration.fit_samples`.
"""

from dynlib.boards.board import Board, LayerCost, Opp, Unit
from dynlib.boards.file import list_boards, read_board
from dynlib.boards.governors import GOVERNORS, make_governor
from dynlib.boards.latency import layer_us, network_ms
from dynlib.boards.thermal import PowerAllocator, ThermalRC

__all__ = [
    "GOVERNORS",
    "Board",
    "LayerCost",
    "Opp",
    "PowerAllocator",
    "ThermalRC",
    "Unit",
    "layer_us",
    "list_boards",
    "make_governor",
    "network_ms",
    "read_board",
]
