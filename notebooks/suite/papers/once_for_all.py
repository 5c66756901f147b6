"""Once-for-all's own library as a peer to measure against (requirements-peers.txt).

Its wheel imports torchvision at once, which beside a CPU build of torch takes the declarations of
`dynlib._vision`; nothing else has to be changed, and nothing in its tree is.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import dynlib._vision  # noqa: F401  before once-for-all imports torchvision
from dynlib.nets.supernet import Supernet
from dynlib.space import SubnetConfig
from suite.papers.ofa_weights import load_ofa

PEERS = ("ofa", "openvino")


def missing() -> str:
    """Why there is nothing to compare with; empty if all peers are installed."""
    absent = [package for package in PEERS if find_spec(package) is None]
    return f"{', '.join(absent)} not installed (requirements-peers.txt)" if absent else ""


class OnceForAll:
    """Its MobileNetV3 super-network, random weights, as its own users drive it.

    Args:
        images: (N, 3, H, W) from which its BatchNorm statistics are computed, once.
        width: 1.0 or 1.2.
        generator: perturbs the scales and shifts of BatchNorm, which start as 1 and 0.
    """

    def __init__(self, images: torch.Tensor, generator: torch.Generator, width: float = 1.0):
        from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3
        from ofa.imagenet_classification.networks import MobileNetV3

        self._static = MobileNetV3
        self.net = OFAMobileNetV3(
            dropout_rate=0, width_mult=width,
            ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4],
        ).requires_grad_(False)  # fmt: skip
        for norm in (m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None  # the statistics of these images alone
            norm.weight.uniform_(0.8, 1.2, generator=generator)
            norm.bias.normal_(0, 0.1, generator=generator)
        self.net.set_max_net()
        self.net.train()(images)
        self.net.eval()

    def switch(self, config: SubnetConfig) -> nn.Module:
        """Set the active sub-network of the dynamic network."""
        self.net.set_active_subnet(list(config.kernel), list(config.expand), list(config.depth))
        return self.net

    def extract(self, config: SubnetConfig) -> nn.Module:
        """A static copy with its weights, ready for a frame."""
        return self.switch(config).get_active_subnet(preserve_weight=True).eval()

    def save(self, config: SubnetConfig, path: Path) -> str:
        """Write the static copy's weights; returns the JSON that `reload` needs beside the file."""
        alone = self.extract(config)
        torch.save(alone.state_dict(), path)
        return json.dumps(alone.config)

    def reload(self, description: str, path: Path) -> nn.Module:
        """What a manager of separate models does at a switch: build one and read its weights."""
        net = self._static.build_from_config(json.loads(description))
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()


def adopt(supernet: Supernet, peer: OnceForAll, configs: Iterable[SubnetConfig]) -> None:
    """Give `supernet` the weights of `peer`, and each sub-network the statistics it has there.

    An active sub-network of once-for-all takes the leading entries of the shared statistics.
    """
    load_ofa(supernet, peer.net.state_dict())
    largest = supernet.statistics[supernet.space.largest]
    for config in map(supernet.canonical, configs):
        sizes = {name: len(view) for name, view in supernet.slices(config).items()}
        supernet.statistics[config] = {
            key: values[: sizes[f"{norm}.weight"]].clone()
            for key, values in largest.items()
            if f"{(norm := key.rpartition('.')[0])}.weight" in sizes
        }
