"""Who decides inside a network: exits."""

from dynlib.decide.exits import block_features, exit_answers, exit_layers, train_exits

__all__ = ["block_features", "exit_answers", "exit_layers", "train_exits"]
