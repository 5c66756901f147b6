"""The suite's figures, a module per part of the story: each a pure function of a tidy table.

Importing this package imports all of them, which registers every figure under its name.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
