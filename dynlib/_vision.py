"""timm and torchvision, importable beside a torch that torchvision's compiled operators do not fit.

A CPU build of torch cannot load them, and `import torchvision` then fails on registering shapes for
`nms`. Declaring the two missing operators first is enough: nothing here ever calls them. Where
they load, this module does nothing. Import `timm` and `torchvision` from here.
"""

import sys

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    # The library object must outlive the import, or the declarations go with it.
    _operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import timm
import timm.data
import timm.optim

__all__ = ["timm", "torchvision"]
