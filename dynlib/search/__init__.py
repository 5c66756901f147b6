"""Search for the sub-networks worth keeping."""

from dynlib.search.lookup import DESIGN_KNOBS, Lookup, exit_outcomes
from dynlib.search.predictor import AccuracyPredictor, kendall, stratified, tau_ceiling
from dynlib.search.study import best_within, front, search
from dynlib.search.two_level import codesign, inner_search

__all__ = [
    "DESIGN_KNOBS",
    "AccuracyPredictor",
    "Lookup",
    "best_within",
    "codesign",
    "exit_outcomes",
    "front",
    "inner_search",
    "kendall",
    "search",
    "stratified",
    "tau_ceiling",
]
