"""Several sub-networks as the methods of one ExecuTorch program: ``pip install executorch``."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dynlib.errors import BundleError
from dynlib.files import atomic_write
from dynlib.nets.chain import resized
from dynlib.nets.supernet import Supernet
from dynlib.space import SubnetConfig


def export_pte(supernet: Supernet, configs: Sequence[SubnetConfig], path: str | Path) -> list[str]:
    """Write a program for XNNPACK; the names of its methods, in the order of `configs`.

    A method takes one image of the resolution of its sub-network and gives logits. XNNPACK packs
    the weights of each method for itself, so that methods share none: eight points of the shipped
    network take 34.1 MB in one file and 34.5 MB in eight (`Runner` shares them).

    Raises `BundleError` where ExecuTorch is not installed.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise BundleError(f"{error}; expected ExecuTorch: pip install executorch") from error
    size = max(config.resolution for config in configs)
    probe = torch.zeros(1, 3, size, size)
    methods = {}
    for number, config in enumerate(configs):
        # XNNPACK refuses channels_last.
        net = supernet.extract(config).eval().to(memory_format=torch.contiguous_format)
        methods[f"point_{number}"] = torch.export.export(net, (resized(probe, config.resolution),))
    partitioners = {name: [XnnpackPartitioner()] for name in methods}
    program = to_edge_transform_and_lower(methods, partitioner=partitioners).to_executorch()
    atomic_write(path, program.buffer)
    return list(methods)
