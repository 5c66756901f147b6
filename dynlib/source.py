"""Where a number comes from, and what a mix of numbers may claim."""

from enum import Enum

from dynlib.errors import TableError


class Source(str, Enum):
    """Where a number comes from, strongest first."""

    __str__ = str.__str__

    EXACT = "exact"  # counted, or computed from nothing but counts
    MEASURED = "measured"  # timed on the named machine
    REPLAYED = "replayed"  # computed from somebody's published measurements
    SIMULATED = "simulated"  # a board model fitted to measurements
    ESTIMATED = "estimated"  # a board model with a guessed coefficient in it
    PREDICTED = "predicted"  # by a learned predictor
    PUBLISHED = "published"  # quoted

    @classmethod
    def _missing_(cls, value: object) -> "Source":
        raise TableError(f"unknown source {value!r}; expected one of {', '.join(cls)}")


def weakest(*sources: str) -> Source:
    """The source of a number computed from numbers of these sources; raises `TableError`."""
    if not sources:
        raise TableError("the weakest of no sources is not defined")
    order = list(Source)
    return max((Source(s) for s in sources), key=order.index)
