"""The runtime manager, and what any policy sees and answers.

A policy author needs nothing but this room: numpy.
"""

from dynlib.manager.manager import Manager
from dynlib.manager.policy import (
    Action,
    AppState,
    Finished,
    Placement,
    Policy,
    Ready,
    State,
    edf,
    fifo,
    share_done,
)

__all__ = [
    "Action",
    "AppState",
    "Finished",
    "Manager",
    "Placement",
    "Policy",
    "Ready",
    "State",
    "edf",
    "fifo",
    "share_done",
]
