"""Boards as models: what a clock costs and brings, the kernel's governors, heat.

No file of a real machine is touched here. A network comes in as `dynlib.space.LayerSpec`s. What
needs numpy, pandas or scipy is loaded when it is asked for.
"""

import importlib
from typing import Any

from dynlib.boards.board import Board, Unit
from dynlib.boards.file import list_boards, read_board, save_board
from dynlib.boards.governors import make_governor
from dynlib.boards.latency import network_ms

_LATER = {
    "Platform": "platform",
    "calibrate": "calibration",
    "fit_samples": "calibration",
    "fitting_batch": "simulated",
    "simulate_points": "simulated",
}

__all__ = [
    "Board",
    "Platform",
    "Unit",
    "calibrate",
    "fit_samples",
    "fitting_batch",
    "list_boards",
    "make_governor",
    "network_ms",
    "read_board",
    "save_board",
    "simulate_points",
]


def __getattr__(name: str) -> Any:
    """Load a name that costs more than this room when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
