"""timm and torchvision, with the parts of them that are used here."""

import timm
import timm.data
import timm.optim
import torchvision

__all__ = ["timm", "torchvision"]
