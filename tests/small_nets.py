"""Super-networks small enough to train or try out in a test."""

from collections.abc import Iterable

import torch

from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace, SubnetConfig

SPACE = SearchSpace((12, 16), ((1,), (0, 1, 2)), ((4, 8), (6, 8, 12)))


def fresh(space: SearchSpace) -> Supernet:
    """Always the same random weights."""
    torch.manual_seed(0)
    return Supernet(space)


def calibrated(configs: Iterable[SubnetConfig]) -> Supernet:
    """One of `SPACE`, ready to serve `configs`."""
    net = fresh(SPACE)
    for config in configs:
        calibrate(net, config, [torch.randn(32, 3, 16, 16)])
    return net


def weights(supernet: Supernet) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in supernet.net.parameters()])
