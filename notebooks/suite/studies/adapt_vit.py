"""A transformer whose heads, hidden channels and depth a gate chooses: DS-Net++'s slices of a ViT.

Training multiplies by masks (arXiv 2109.10060), here `masked_vit`; what is served are slices, a
`gated` walk. The two must be the same function.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from dynlib.decide import gated
from dynlib.decide.decisions import Given
from dynlib.decide.gate import Gate
from dynlib.nets.supernet import Supernet
from dynlib.nets.vit import HEAD_DIM, ViT
from dynlib.space import SearchSpace, SubnetConfig

BLOCKS = 4
SPACE = SearchSpace(
    resolution=(32,),
    depth=((2, 3, 4),),
    width=((96,),),
    expand=((64, 128, 192),) * BLOCKS,
    heads=((1, 2, 3),) * BLOCKS,
)
# Fewer heads, hidden channels, blocks, and all of these; the last is the whole.
ROUTES = tuple(
    SubnetConfig(32, (depth,), (96,), (), (hidden,) * BLOCKS, (heads,) * BLOCKS)
    for depth, hidden, heads in (
        (2, 64, 1), (4, 192, 1), (4, 64, 3), (2, 192, 3), (3, 128, 2), (4, 192, 3)
    )
)  # fmt: skip


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
    supernet = Supernet(SPACE, family="ViT")
    nets = [supernet.prepare(config) for config in ROUTES]
    images = torch.randn(count, 3, 32, 32, generator=generator)
    routes = torch.randint(len(ROUTES), (count,), generator=generator)
    gate = Gate(96, len(ROUTES)).eval()
    walk = gated(nets, "stem", gate, Given(routes), images[:1])
    expected = masked_vit(nets[-1], [ROUTES[route] for route in routes], images)
    return (walk(images) - expected).abs().max().item()
