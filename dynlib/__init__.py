"""dynlib: train, profile, search and manage dynamic neural networks on embedded boards.

The names below are all that a user with a network, images, a board and a workload needs to begin
with; each has an example. They are loaded when they are asked for, so that importing this
package costs nothing, and managing needs no torch. What else there is lives in the rooms:
`dynlib.nets`, `decide`, `boards`, `machine`, `profile`, `searching`, `training`, `manager`,
`runtime`.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

if sys.platform == "win32":  # files are opened, locked and watched as POSIX has it
    raise ImportError("dynlib: this is win32; expected Linux or macOS, and WSL 2 is a Linux")

# Where each name lives.
_HOMES = {
    "dynlib.data": ("load_dataset",),
    "dynlib.space": ("SearchSpace", "SubnetConfig"),
    "dynlib.nets": ("Supernet", "SubnetServer", "calibrate", "elastify"),
    "dynlib.training": ("Recipe", "evaluate", "pretrained", "train"),
    "dynlib.machine.bind": ("load_board", "open_machine"),
    "dynlib.boards.simulated": ("simulate_points",),
    "dynlib.profile": ("profile_points",),
    "dynlib.searching": ("search",),
    "dynlib.pareto": ("pareto_front",),
    "dynlib.points": ("read_points",),
    "dynlib.workload": ("App", "Change", "Workload", "load_workload"),
    "dynlib.manager": ("Manager",),
    "dynlib.runtime": ("Case", "serve", "simulate"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


class _BeforeVision:
    """Finds no module, but prepares torch when torchvision, or timm, is first imported."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "torchvision" and _BeforeVision in sys.meta_path:
            sys.meta_path.remove(_BeforeVision)
            importlib.import_module("dynlib._operators")


sys.meta_path.insert(0, _BeforeVision)


def __getattr__(name: str) -> Any:
    """Load a name of the face when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'dynlib' has no attribute {name!r}; it offers {__all__}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found  # the next look-up is an ordinary one
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
