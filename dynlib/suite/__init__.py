"""Runs the notebooks: parameters checked, limits kept, completeness proved, results promoted.

``python -m dynlib.suite --help`` lists what it does; ``run_all.sh`` is the way in.
"""

from dynlib import DynlibError


class SuiteError(DynlibError):
    """A notebook or a request to the suite is unfit; names the notebook and what was expected."""
