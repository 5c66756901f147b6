"""Runs of a case, simulated or on this machine; the baselines and the optimum beside them."""

from dynlib.runtime.case import Case, simulate
from dynlib.runtime.live import LiveRun, Served, serve
from dynlib.runtime.oracle import Optimum, offered, optimum
from dynlib.runtime.rivals import Static, best_static, linux_default
from dynlib.runtime.summary import Run

__all__ = [
    "Case",
    "LiveRun",
    "Optimum",
    "Run",
    "Served",
    "Static",
    "best_static",
    "linux_default",
    "offered",
    "optimum",
    "serve",
    "simulate",
]
