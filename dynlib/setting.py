"""How a sub-network runs: the setting of an operating point."""

from typing import NamedTuple


class Setting(NamedTuple):
    """How a sub-network runs on its unit; None where the table does not say.

    Args:
        exit_threshold: confidence from which on an image leaves at an exit, 0 to 1.
        backend, precision: the engine, and the numbers it computes with.
        threads: of the engine; how many cores they keep busy is the point's `cores`.
        quota: share of one core that the process may use, in percent.
        batch: images that run together.
    """

    exit_threshold: float | None = None
    backend: str | None = None
    precision: str | None = None
    threads: float | None = None
    quota: float | None = None
    batch: float = 1


PLAIN = Setting()
