"""Measuring on the machine this runs on: latencies, switches, layers, operating points."""

from dynlib.profile.describing import describe, write_template
from dynlib.profile.layertable import Affine, build_table, leave_one_out, torch_layer
from dynlib.profile.measuring import measure_board, measure_clocks
from dynlib.profile.points import at_full_clock, profile_points
from dynlib.profile.switching import profile_switches
from dynlib.profile.timing import profile_latency

__all__ = [
    "Affine",
    "at_full_clock",
    "build_table",
    "describe",
    "leave_one_out",
    "measure_board",
    "measure_clocks",
    "profile_latency",
    "profile_points",
    "profile_switches",
    "torch_layer",
    "write_template",
]
