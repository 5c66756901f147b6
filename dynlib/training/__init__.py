"""Training of super-networks."""

from dynlib.training.recipes import PUBLISHED, Recipe
from dynlib.training.shipping import (
    accuracy_table,
    checkpoint_path,
    macs_m,
    params_m,
    pretrained,
    ship,
)
from dynlib.training.step import bf16_pays
from dynlib.training.trainer import calibration_batches, evaluate, train

__all__ = [
    "PUBLISHED",
    "Recipe",
    "accuracy_table",
    "bf16_pays",
    "calibration_batches",
    "checkpoint_path",
    "evaluate",
    "macs_m",
    "params_m",
    "pretrained",
    "ship",
    "train",
]
