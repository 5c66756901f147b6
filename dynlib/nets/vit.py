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

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from dynlib.errors import ConfigError
from dynlib.nets.attention import Attention, AttentionSpec
from dynlib.nets.chain import Row, resized
from dynlib.nets.families import BlockLayers, Family, register
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

PATCH = 4  # pixels
HEAD_DIM = 32  # channels of a head, the same in every sub-network


class TransformerBlock(nn.Module):
    """(N, T, C) tokens -> (N, T, C): attention, then a two-layer MLP, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, head_dim: int = HEAD_DIM):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        """Shapes as in the class."""
        x = x + self.attention(self.norm1(x))
        hidden = F.gelu(self.up(self.norm2(x)))
        return x + self.down(hidden)


class ViT(Row):
    """(N, 3, H, W) images -> (N, classes) logits, for one fixed configuration.

    Images of another size are resized first. For other sizes of patches (in pixels) and heads give
    ``Supernet(space, build=partial(ViT, patch=8))``.

    Raises:
        ConfigError: there are fewer entries of `heads` or `expand` than blocks, or the resolution
            is no multiple of the patch.
    """

    def __init__(
        self,
        config: SubnetConfig,
        classes: int = 10,
        *,
        patch: int = PATCH,
        head_dim: int = HEAD_DIM,
    ):
        super().__init__()
        self.config = config
        width, side = _check(config, patch)
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, side, side))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, hidden, head_dim) for heads, hidden in _blocks(config)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def row(self):
        """As in `Row`; between stem and head go tokens (N, T, C)."""
        yield "stem", self._stem
        for b, block in enumerate(self.blocks):
            yield f"blocks.{b}", block
        yield "head", self._head

    def _stem(self, images):
        images = resized(images, self.config.resolution)
        patches = self.patches(images) + self.position
        return patches.flatten(2).transpose(1, 2)

    def _head(self, tokens):
        tokens = self.norm(tokens)
        return self.head(tokens.mean(1))


@register("ViT")
def _family() -> Family:
    return Family(ViT, _describe, _canonical)


def _describe(config: SubnetConfig, classes: int) -> BlockLayers:
    width, side = _check(config, PATCH)

    def linear(inputs: int, outputs: int) -> LayerSpec:
        return LayerSpec("linear", inputs, outputs, in_size=side, out_size=side)

    pixels = config.resolution
    stem = LayerSpec("conv", 3, width, PATCH, PATCH, in_size=pixels, out_size=side)
    found = {"stem": [stem]}
    for b, (heads, hidden) in enumerate(_blocks(config)):
        rows = heads * HEAD_DIM
        attention = AttentionSpec(
            "attention", rows, rows, groups=heads, in_size=side, out_size=side
        )
        projection = linear(width, rows)  # of queries, of keys and of values
        found[f"blocks.{b}"] = [
            projection,
            projection,
            projection,
            attention,
            linear(rows, width),
            linear(width, hidden),
            linear(hidden, width),
        ]
    return found | {"head": [LayerSpec("linear", width, classes)]}


def _canonical(config: SubnetConfig, space: SearchSpace) -> SubnetConfig:
    """Blocks beyond the depth have no effect: theirs are the least sizes."""
    depth = config.depth[0]
    smallest = space.smallest
    heads = config.heads[:depth] + smallest.heads[depth:]
    expand = config.expand[:depth] + smallest.expand[depth:]
    return replace(config, heads=heads, expand=expand)


def _blocks(config: SubnetConfig) -> list[tuple[int, int]]:
    """Heads and hidden channels of the MLP of each block."""
    depth = config.depth[0]
    heads = config.heads[:depth]
    expand = config.expand[:depth]
    return list(zip(heads, expand, strict=True))


def _check(config: SubnetConfig, patch: int) -> tuple[int, int]:
    """Width, and patches on a side of the image."""
    (width,) = config.width
    (depth,) = config.depth
    if depth > min(len(config.heads), len(config.expand)):
        raise ConfigError(f"{config}: expected an entry of heads and expand for {depth} blocks")
    if config.resolution % patch:
        raise ConfigError(f"{config}: resolution is no multiple of the patch of {patch} pixels")
    return width, config.resolution // patch
