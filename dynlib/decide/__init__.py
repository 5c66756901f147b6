"""Who decides inside a network: walks over pieces, and their decisions, gates and exits."""

from dynlib.decide.decisions import Sure, confidence, fit_temperature
from dynlib.decide.exits import block_features, exit_answers, exit_layers, train_exits
from dynlib.decide.gate import train_gate
from dynlib.decide.walk import Walk, cascade, gated, with_exits

__all__ = [
    "Sure",
    "Walk",
    "block_features",
    "cascade",
    "confidence",
    "exit_answers",
    "exit_layers",
    "fit_temperature",
    "gated",
    "train_exits",
    "train_gate",
    "with_exits",
]
