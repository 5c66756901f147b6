"""Boards: what a clock costs and brings, the kernel's governors, and measuring on this machine.

Imports without torch. A network reaches this package only as `dynlib.space.LayerSpec`s.
"""
