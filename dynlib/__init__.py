"""dynlib: train, profile, search and manage dynamic neural networks on embedded boards."""

__version__ = "0.1.0"
