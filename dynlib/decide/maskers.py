"""Maskers of LAUDNet (arXiv 2308.15949): which parts of a residual branch an image needs.

A masker gives each part two logits, to keep it and to drop it: (N, 2, *parts). A part is the whole
branch (layer), a patch of its map (spatial) or a group of its inner channels (channel). At test
time `decisions.Kept` compares the two; in training `drawn` draws, so that gradients reach it.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

RELAXED = 0.33  # share of the training after which the bounds of a density hold nothing any more


class PatchMasker(nn.Module):
    """Maps (N, C, H, W) -> (N, 2, side, side): `side` squared patches of the map.

    With a side of one the only patch is the whole branch, (N, 2): a layer masker. It starts at
    keeping a part with probability sigmoid(5) = 0.993.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.side = side
        self.logits = nn.Conv2d(channels, 2, 1)
        _start_at(self.logits.bias, 5.0, 0.0)

    def forward(self, x):
        """Shapes as in the class."""
        if self.side == 1:  # the same, but many times faster
            weight = self.logits.weight.flatten(1)
            return F.linear(x.mean((2, 3)), weight, self.logits.bias)
        return self.logits(F.adaptive_avg_pool2d(x, self.side))


class ChannelMasker(nn.Module):
    """Maps (N, C, H, W) -> (N, 2, 2, groups): groups behind a bottleneck's first and second layer.

    It starts at keeping a group with probability sigmoid(2 + 2) = 0.982.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.groups = groups
        hidden = max(groups // 16, 16)
        self.hidden = nn.Linear(channels, hidden)
        self.logits = nn.Linear(hidden, 4 * groups)
        _start_at(self.logits.bias, 2.0, -2.0)

    def forward(self, x):
        """Shapes as in the class."""
        hidden = F.relu(self.hidden(x.mean((2, 3))))
        return self.logits(hidden).view(-1, 2, 2, self.groups)


def _start_at(bias: nn.Parameter, keep: float, drop: float) -> None:
    """Set the first half of a bias, of logits to keep, and the second, of those to drop."""
    with torch.no_grad():
        first, second = bias.chunk(2)
        first.fill_(keep)
        second.fill_(drop)


def drawn(logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Masks (N, *parts) of 0 and 1 in training: Gumbel-softmax, hard, straight through."""
    return F.gumbel_softmax(logits, tau, hard=True, dim=1)[:, 0]


def tau_at(progress: float, first: float = 5.0, last: float = 0.1) -> float:
    """Temperature of `drawn` after this share of the training: exponentially from first to last."""
    return first * (last / first) ** progress


def bounds_at(progress: float, target: float) -> tuple[float, float]:
    """Between which densities a block may lie: from the target itself, in a cosine, to 0 and 1.

    `p = cos^2(pi/2 min(1, progress / 0.33))`, low `p t`, high `1 - p (1 - t)`.

    >>> bounds_at(0.0, 0.5), bounds_at(0.165, 0.5), bounds_at(0.33, 0.5)
    ((0.5, 0.5), (0.25, 0.75), (0.0, 1.0))
    """
    p = math.cos(math.pi / 2 * min(1.0, progress / RELAXED)) ** 2
    return p * target, 1 - p * (1 - target)


def bounds_loss(
    densities: torch.Tensor, work: torch.Tensor, target: float, progress: float
) -> torch.Tensor:
    """What keeps the network at its target of work, and at first each block at its own.

    `mean_b(max(0, r_b - high)^2 + max(0, low - r_b)^2) + (F / F_full - t)^2`

    Args:
        densities: mean share of parts kept in each block, (blocks,).
        work: of the network relative to its dense one, a scalar.
        target: of that work, 0 to 1.
        progress: share of the training done.
    """
    low, high = bounds_at(progress, target)
    above = (densities - high).clamp(min=0)
    below = (low - densities).clamp(min=0)
    return (above**2 + below**2).mean() + (work - target) ** 2


def bottleneck_work(
    weights: tuple[float, float, float], channels: torch.Tensor, area: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Share of a bottleneck's work that is left: its layers go with r, r^2 and r of the channels.

    Args:
        weights: multiply-accumulates of its three layers.
        channels: mean share r of the channels kept.
        area: share of the map kept.
    """
    first, second, third = weights
    left = first * channels + second * channels**2 + third * channels
    return area * left / sum(weights)
