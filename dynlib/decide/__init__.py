"""Who decides inside a network: walks over pieces, and their decisions, gates and exits."""

from dynlib.decide.decisions import (
    Given,
    Highest,
    Sure,
    confidence,
    fit_temperature,
    threshold_table,
)
from dynlib.decide.exits import block_features, exit_answers, exit_head, exit_layers, train_exits
from dynlib.decide.gate import Gate, train_gate
from dynlib.decide.walk import STOP, Seen, Step, Walk, cascade, gated, with_exits

__all__ = [
    "STOP",
    "Gate",
    "Given",
    "Highest",
    "Seen",
    "Step",
    "Sure",
    "Walk",
    "block_features",
    "cascade",
    "confidence",
    "exit_answers",
    "exit_head",
    "exit_layers",
    "fit_temperature",
    "gated",
    "threshold_table",
    "train_exits",
    "train_gate",
    "with_exits",
]
