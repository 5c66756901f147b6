"""Runs: one workload, one board, one policy; the baselines and the optimum."""
