"""Elastic networks: the super-network, its families, and what serves it."""
