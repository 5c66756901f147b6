"""Boards as models: what a clock costs and brings, the kernel's governors, heat.

No file of a real machine is touched here. A network comes in as `dynlib.space.LayerSpec`s.
"""
