"""The one error of the suite."""

from dynlib.errors import DynlibError


class SuiteError(DynlibError):
    """A notebook, metric, figure or request is unfit; names it and what was expected."""
