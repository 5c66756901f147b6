"""A transformer whose heads, hidden channels and depth a gate chooses: DS-Net++'s slices of a ViT.

Training multiplies by masks (arXiv 2109.10060), here `masked_vit`; what is served are slices, a
`gated` walk. The two must be the same function.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dynlib.decide import gated
from dynlib.decide.decisions import Given
from dynlib.decide.gate import Gate
from dynlib.nets.families import Family, find_family, register
from dynlib.nets.supernet import Supernet
from dynlib.nets.vit import HEAD_DIM, ViT
from dynlib.space import SearchSpace, SubnetConfig

BLOCKS = 5
WIDTH = 96
# The first block is the same in every sub-network: behind it a gate chooses the others.
BEHIND = "blocks.0"
SPACE = SearchSpace(
    resolution=(32,),
    depth=((1, 3, 5),),
    width=((WIDTH,),),
    expand=((128,), *((96, 192, 288),) * (BLOCKS - 1)),
    heads=((2,), *((1, 2, 3),) * (BLOCKS - 1)),
)


class ConvViT(ViT):
    """A `ViT` on 4 x 4 tokens, which three convolutions make of 32 pixels.

    They learn much faster than one layer on patches (Xiao et al., arXiv 2106.14881). Their
    normalisation is over each image, so that no sub-network needs statistics of its own.
    """

    def __init__(self, config: SubnetConfig, classes: int = 10):
        super().__init__(config, classes, patch=8)
        (width,) = config.width
        self.patches = nn.Sequential(
            *_halving(3, 24), *_halving(24, 64), nn.Conv2d(64, width, 3, 2, 1)
        )


def _halving(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(1, outputs), nn.GELU()]


@register("ConvViT")
def _family() -> Family:
    return Family(ConvViT, canonical=find_family("ViT", {}).canonical)


def route(depth: int, hidden: int = 0, heads: int = 0) -> SubnetConfig:
    """The sub-network whose blocks behind the first one have so many hidden channels and heads."""
    largest = SPACE.largest
    later = BLOCKS - 1
    expand = (largest.expand[0], *(hidden or largest.expand[1],) * later)
    number = (largest.heads[0], *(heads or largest.heads[1],) * later)
    return replace(largest, depth=(depth,), expand=expand, heads=number)


# Fewer blocks, heads and hidden channels, by work; the last is the whole.
ROUTES = (route(1), route(3, 96, 1), route(5, 96, 1), route(3), route(5, 192, 2), route(5))


@torch.no_grad()
def masked_vit(net: ViT, configs: Sequence[SubnetConfig], images: torch.Tensor) -> torch.Tensor:
    """The whole network, in which what each image's configuration lacks is multiplied by zero."""
    (_, stem), *_, (_, head) = net.row()
    x = stem(images)
    for number, block in enumerate(net.blocks):
        heads = _first([c.heads[number] * HEAD_DIM for c in configs], block.attention.proj)
        hidden = _first([c.expand[number] for c in configs], block.down)
        with _masking(block.attention.proj, heads), _masking(block.down, hidden):
            y = block(x)
        runs = torch.tensor([number < c.depth[0] for c in configs])
        x = torch.where(runs[:, None, None], y, x)
    return head(x)


def _first(counts: Sequence[int], layer: nn.Linear) -> torch.Tensor:
    """Masks (N, 1, inputs of the layer) that keep the first so many of them."""
    return torch.arange(layer.in_features) < torch.tensor(counts).view(-1, 1, 1)


@contextlib.contextmanager
def _masking(layer: nn.Module, mask: torch.Tensor):
    """Multiply what comes to the layer by the mask."""
    hook = layer.register_forward_pre_hook(lambda _, inputs: (mask * inputs[0],))
    try:
        yield
    finally:
        hook.remove()


def slices_against_masks(count: int, seed: int) -> float:
    """Largest difference of logits between slices as served and masks as trained, random routes."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    supernet = Supernet(SPACE, family="ConvViT")
    nets = [supernet.prepare(config) for config in ROUTES]
    images = torch.randn(count, 3, 32, 32, generator=generator)
    routes = torch.randint(len(ROUTES), (count,), generator=generator)
    gate = Gate(WIDTH, len(ROUTES)).eval()
    walk = gated(nets, BEHIND, gate, Given(routes), images[:1])
    expected = masked_vit(nets[-1], [ROUTES[route] for route in routes], images)
    return (walk(images) - expected).abs().max().item()
