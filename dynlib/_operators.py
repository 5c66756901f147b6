"""Declares torchvision's operators where its compiled ones do not fit the torch beside them.

A CPU build of torch cannot load those of PyPI's torchvision, and importing it, as timm does, then
fails on registering shapes for `nms`. Declaring two of them first is enough: nothing here ever
calls them. Where they load, this module does nothing. `dynlib` imports it before torchvision.
"""

from importlib.machinery import PathFinder
from pathlib import Path

import torch

_found = PathFinder.find_spec("torchvision")
try:
    for _library in Path(_found.origin if _found else ".").parent.glob("_C*.so"):
        torch.ops.load_library(_library)
except OSError:
    # The library object must outlive the import, or the declarations go with it.
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
