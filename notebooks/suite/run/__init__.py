"""Runs the notebooks: parameters checked, limits kept, completeness proved, results promoted.

``python -m suite.run --help`` lists what it does; ``run_all.sh`` is the way in.
"""
