"""Search for the sub-networks worth keeping."""

from dynlib.searching.guided import GuidedSampler
from dynlib.searching.lookup import DESIGN_KNOBS, Lookup, exit_outcomes
from dynlib.searching.predictor import AccuracyPredictor, stratified
from dynlib.searching.stopping import StopHopeless
from dynlib.searching.study import best_within, front, search
from dynlib.searching.two_level import codesign, inner_search

__all__ = [
    "DESIGN_KNOBS",
    "AccuracyPredictor",
    "GuidedSampler",
    "Lookup",
    "StopHopeless",
    "best_within",
    "codesign",
    "exit_outcomes",
    "front",
    "inner_search",
    "search",
    "stratified",
]
