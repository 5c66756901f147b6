"""A vision transformer that is elastic in width, heads, MLP and depth, small enough for 32 pixels.

Pre-norm blocks (Dosovitskiy et al., arXiv 2010.11929) on non-overlapping patches, the mean of the
tokens instead of a class token. What is sliced follows DS-Net++ (arXiv 2109.10060): the embedding
by its first channels, attention by its first heads, the MLP by its first hidden channels, the depth
by its first blocks. LayerNorm takes its statistics over the channels that are there, so that a
sub-network needs no statistics of its own.

A configuration has one entry of `width` (channels of a token) and one of `depth` (blocks), and for
each possible block one of `heads` and one of `expand` (hidden channels of the MLP); the entries of
blocks beyond the depth have no effect. Of several resolutions a smaller one uses the central part
of the grid of position embeddings.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dynlib.errors import ConfigError
from dynlib.nets.attention import Attention, AttentionSpec
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

PATCH = 4  # pixels
HEAD_DIM = 32  # channels of a head, the same in every sub-network


class Block(nn.Module):
    """(N, T, C) tokens -> (N, T, C): attention, then a two-layer MLP, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, head_dim: int = HEAD_DIM):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        """Shapes as in the class."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """(N, 3, H, W) images -> (N, classes) logits, for one fixed configuration.

    `Supernet(space, classes, build=ViT, describe=layers)` holds a space of them; for other sizes of
    patches (in pixels) and heads give both as partial functions.

    Raises:
        ConfigError: there are fewer entries of `heads` or `expand` than blocks, or the resolution
            is no multiple of the patch.
    """

    def __init__(
        self, config: SubnetConfig, classes: int = 10, *, patch: int = PATCH,
        head_dim: int = HEAD_DIM,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        width, side = _check(config, patch)
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, side, side))
        sizes = zip(config.heads, config.expand, range(config.depth[0]), strict=False)
        self.blocks = nn.ModuleList(Block(width, *size, head_dim) for *size, _ in sizes)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        """Shapes as in the class; images of another size are resized first."""
        size = self.config.resolution
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        x = (self.patches(x) + self.position).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def layers(
    config: SubnetConfig, classes: int = 10, *, patch: int = PATCH, head_dim: int = HEAD_DIM
) -> list[LayerSpec]:
    """The layers of `ViT(config)` in order of execution, for MACs and board models."""
    width, side = _check(config, patch)
    sides = {"in_size": side, "out_size": side}
    specs = [LayerSpec("conv", 3, width, patch, patch, in_size=config.resolution, out_size=side)]
    for heads, hidden, _ in zip(config.heads, config.expand, range(config.depth[0]), strict=False):
        rows = heads * head_dim
        specs += [LayerSpec("linear", width, rows, **sides)] * 3
        specs.append(AttentionSpec("attention", rows, rows, groups=heads, **sides))
        pairs = (rows, width), (width, hidden), (hidden, width)
        specs += [LayerSpec("linear", *pair, **sides) for pair in pairs]
    return [*specs, LayerSpec("linear", width, classes)]


def canonical(config: SubnetConfig, space: SearchSpace) -> SubnetConfig:
    """One configuration for all that are the same network: unused blocks have their least size."""
    depth, smallest = config.depth[0], space.smallest
    heads = config.heads[:depth] + smallest.heads[depth:]
    expand = config.expand[:depth] + smallest.expand[depth:]
    return SubnetConfig(config.resolution, config.depth, config.width, config.kernel, expand, heads)


def _check(config: SubnetConfig, patch: int) -> tuple[int, int]:
    """Width, and patches on a side of the image."""
    (width,), (depth,) = config.width, config.depth
    if depth > min(len(config.heads), len(config.expand)):
        raise ConfigError(f"{config}: expected an entry of heads and expand for {depth} blocks")
    if config.resolution % patch:
        raise ConfigError(f"{config}: resolution is no multiple of the patch of {patch} pixels")
    return width, config.resolution // patch
