"""dynlib: train, profile, search and manage dynamic neural networks on embedded boards."""

__version__ = "0.1.0"


class DynlibError(Exception):
    """Root of every error the library raises on purpose; its message says what was expected."""
