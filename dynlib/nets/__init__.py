"""Elastic networks: the super-network, its families, and what serves it."""

from dynlib.nets import mobilenet, resnet, slimmable, vit  # noqa: F401  each registers its family
from dynlib.nets.chain import Chain, Row, chain
from dynlib.nets.convert import elastify
from dynlib.nets.engines import ENGINES
from dynlib.nets.families import Family, register
from dynlib.nets.serve import SubnetServer
from dynlib.nets.supernet import Supernet, calibrate, macs_m, params_m

__all__ = [
    "ENGINES",
    "Chain",
    "Family",
    "Row",
    "SubnetServer",
    "Supernet",
    "calibrate",
    "chain",
    "elastify",
    "macs_m",
    "params_m",
    "register",
]
