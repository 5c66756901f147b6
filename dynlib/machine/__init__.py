"""The real thing: knobs, sensors, process limits, a lease that puts everything back.

`open_machine` and `load_board` are imported from `dynlib.machine.bind`: the guardian process of a
lease imports this package too, and must be up before anything is written.
"""

from dynlib.machine.control import Knob, MachineUnit, Missing, Parts, Reading, Sensor, Undo
from dynlib.machine.machine import Applied, Machine
from dynlib.machine.window import Window

__all__ = [
    "Applied",
    "Knob",
    "Machine",
    "MachineUnit",
    "Missing",
    "Parts",
    "Reading",
    "Sensor",
    "Undo",
    "Window",
]
