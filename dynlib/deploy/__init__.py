"""On a machine of one's own: bundles, the runner that serves them, and the manager as a service.

Names are loaded when they are asked for: a client needs the standard library alone, a runner no
torch.
"""

import importlib
from typing import Any

__all__ = ["Client", "Runner", "Service", "control", "export_bundle", "export_pte"]

_HOME = {
    "Client": "client",
    "Runner": "runner",
    "Service": "service",
    "control": "client",
    "export_bundle": "bundle",
    "export_pte": "executorch",
}


def __getattr__(name: str) -> Any:
    """Load a name when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {__all__}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
