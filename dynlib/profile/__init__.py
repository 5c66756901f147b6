"""Measuring on the machine this runs on: latencies, switches, layers, operating points."""

from dynlib.profile.layertable import Affine, LayerTable, build_table, leave_one_out, torch_layer
from dynlib.profile.measuring import measure_board
from dynlib.profile.points import at_full_clock, profile_points
from dynlib.profile.switching import profile_switches
from dynlib.profile.timing import paired_ratio, profile_latency

__all__ = [
    "Affine",
    "LayerTable",
    "at_full_clock",
    "build_table",
    "leave_one_out",
    "measure_board",
    "paired_ratio",
    "profile_latency",
    "profile_points",
    "profile_switches",
    "torch_layer",
]
