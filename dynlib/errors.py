"""What can go wrong, by what it is about. Every message says what was expected."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class DynlibError(Exception):
    """Root of every error the library raises on purpose."""


class DataError(DynlibError):
    """Images are missing or malformed; names the path."""


class ConfigError(DynlibError):
    """A sub-network's configuration is malformed, or lies outside its search space."""


class ModelError(DynlibError):
    """A network cannot do what it is asked: be elastic, have exits, run in an engine that is not
    there, or serve without statistics; names the part in the way."""


class CheckpointError(DynlibError):
    """A checkpoint or training state is truncated, of another network, or has wrong tensors; names
    file and tensor."""


class BundleError(DynlibError):
    """A bundle is damaged, made for another machine, or reaches outside its folder; names file
    and what was expected."""


class RecipeError(DynlibError):
    """A training recipe asks for what does not exist; names the field."""


class BoardError(DynlibError):
    """A board is unknown, its file is malformed, or it is asked for what it does not have; names
    file and key."""


class MachineError(DynlibError):
    """A knob, sensor or file of this machine is unknown, is asked for what it does not have, or is
    in other hands."""


class ProfileError(DynlibError):
    """Samples are too few, malformed or do not vary, so that they cannot carry what is asked."""


class TableError(DynlibError):
    """A table or decision log is malformed; names file, row and column."""


class WorkloadError(DynlibError):
    """A workload is malformed; names file and key."""


class PolicyError(DynlibError):
    """A policy asked for what the board or the table does not have.

    Attributes:
        log: the run's until then, if it chose a job that was not there.
    """

    log: Any = None


class ServiceError(DynlibError):
    """The manager service refuses a client, a message or a place for its socket; says why."""


class SearchError(DynlibError):
    """A search cannot be run, resumed or learnt from; says which study and why."""


class InfeasibleError(SearchError):
    """Nothing keeps the limits.

    Attributes:
        limit: the measure whose limit is in the way.
        reachable: its best value among what keeps the other limits.
        nearest: the row of the point that misses the limits by least.
    """

    def __init__(self, message: str, limit: str, reachable: float, nearest: Any):
        super().__init__(message)
        self.limit, self.reachable, self.nearest = limit, reachable, nearest


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: close matches, then all known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=2)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"known: {', '.join(known)}"
