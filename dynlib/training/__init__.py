"""Training of super-networks."""

from dynlib.training.recipes import PUBLISHED, Recipe
from dynlib.training.shipping import (
    CIFAR_SPACE,
    SMALL_SPACE,
    accuracy_table,
    checkpoint_path,
    pretrained,
    ship,
)
from dynlib.training.step import bf16_pays
from dynlib.training.trainer import calibration_batches, evaluate, train

__all__ = [
    "CIFAR_SPACE",
    "PUBLISHED",
    "SMALL_SPACE",
    "Recipe",
    "accuracy_table",
    "bf16_pays",
    "calibration_batches",
    "checkpoint_path",
    "evaluate",
    "pretrained",
    "ship",
    "train",
]
