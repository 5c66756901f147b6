"""Packages whose names are loaded when they are asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A ``__getattr__`` for `package`: the names in `homes`, by the module of it that has them."""
    home = {name: module for module, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name not in home:
            known = ", ".join(sorted(home))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {known}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return load
