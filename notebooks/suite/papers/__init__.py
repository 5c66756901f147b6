"""Reproductions, one file a paper."""
