"""Exits: small classifiers on the features of a frozen backbone, one behind every block.

All of them are trained at once (HADAS, arXiv 2212.03354) and none changes the backbone or another
exit, so what every exit says to every image is computed once and looked up from then on.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dynlib.errors import ModelError
from dynlib.nets.chain import chain, cut
from dynlib.nets.supernet import Supernet
from dynlib.space import LayerSpec, SubnetConfig

GRID = 2  # features are averaged down to 2 x 2 pixels
HIDDEN = 64


def _places(names: Sequence[str], behind: Sequence[str] | None) -> Sequence[str]:
    """Names of the blocks with an exit behind them."""
    possible = names[:-2]  # the last block is followed by the backbone's own classifier
    places = possible[1:] if behind is None else behind
    if not places or not set(places) <= set(possible):
        raise ModelError(f"exits behind {list(places)}: expected some of {list(possible)}")
    return places


def exit_layers(
    supernet: Supernet, config: SubnetConfig, behind: Sequence[str] | None = None
) -> tuple[list[list[LayerSpec]], list[list[LayerSpec]]]:
    """The layers that lead from each of the P positions to the next, and those of each classifier.

    The last position is the end of the backbone, and its classifier the backbone's own.

    Args:
        behind: names of the blocks with an exit behind them, as in `chain`; by default all but the
            stem and the last.

    Raises:
        ModelError: there is no such block.
    """
    blocks = supernet.blocks(config)
    places = _places(list(blocks), behind)
    body = dict(blocks)
    _, own = body.popitem()
    segments = []
    for piece in cut(body, places):
        segments.append([layer for layers in piece.values() for layer in layers])
    heads = []
    for segment in segments[:-1]:
        features = segment[-1].out_channels * GRID**2
        first = LayerSpec("linear", features, HIDDEN)
        second = LayerSpec("linear", HIDDEN, supernet.classes)
        heads.append([first, second])
    return segments, [*heads, own]


@torch.inference_mode()
def block_features(
    net: nn.Module, images: torch.Tensor, behind: Sequence[str] | None = None, *, bf16: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features (N, channels * GRID**2) behind the blocks with an exit, and logits (N, classes).

    Args:
        net: a prepared sub-network.
        images: normalised, (N, 3, H, W).
        behind: names of these blocks, as in `chain`; by default all but the stem and the last.

    Raises:
        ModelError: there is no such block, or the network is no chain of blocks.
    """
    row = chain(net)
    *pieces, rest = row.cut(_places(row.names, behind))
    features = []
    x = images
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        for piece in pieces:
            x = piece(x)
            features.append(_pooled(x.float()))
        logits = rest(x).float()
    return features, logits


def _pooled(x: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, H, W) or tokens (N, T, C), averaged over parts of the image, row after row."""
    if x.ndim == 3:
        pooled = F.adaptive_avg_pool1d(x.transpose(1, 2), GRID**2)
    else:
        pooled = F.adaptive_avg_pool2d(x, GRID)
    return pooled.flatten(1)


def train_exits(
    features: Sequence[torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    epochs: int = 8,
    batch_size: int = 250,
    lr: float = 4e-3,
    decay: float = 0.05,
) -> list[nn.Module]:
    """One classifier for each of the `features`: cross-entropy plus the divergence from `logits`.

    `loss = mean over exits of CE(z_i, y) + KL(softmax(z) || softmax(z_i))` with z the backbone's
    own logits (HADAS's released code; its exits are a 3x3 convolution).
    """
    classes = logits.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        exits = nn.ModuleList(exit_head(f.shape[1], classes) for f in features)
        solver = torch.optim.AdamW(exits.parameters(), lr, weight_decay=decay)
        steps = epochs * math.ceil(len(labels) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(solver, lr, total_steps=steps)
        teacher = logits.softmax(1)
        for _ in range(epochs):
            for index in torch.randperm(len(labels)).split(batch_size):
                losses = []
                for net, inputs in zip(exits, features, strict=True):
                    said = net(inputs[index])
                    logs = said.log_softmax(1)
                    drift = F.kl_div(logs, teacher[index], reduction="batchmean")
                    error = F.cross_entropy(said, labels[index])
                    losses.append(error + drift)
                loss = torch.stack(losses).mean()
                loss.backward()
                solver.step()
                solver.zero_grad()
                schedule.step()
    return [net.eval().requires_grad_(False) for net in exits]


def exit_head(inputs: int, classes: int) -> nn.Module:
    """An untrained exit: features (N, inputs) as of `block_features` -> logits (N, classes)."""
    return nn.Sequential(
        nn.BatchNorm1d(inputs),
        nn.Dropout(0.2),
        nn.Linear(inputs, HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(HIDDEN, classes),
    )


@torch.inference_mode()
def exit_answers(
    exits: Sequence[nn.Module],
    features: Sequence[torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each position is right about each image, and its largest probability; both (N, P)."""
    pairs = zip(exits, features, strict=True)
    said = [net(inputs) for net, inputs in pairs]
    answers = torch.stack([*said, logits], 1)
    probabilities = answers.softmax(2)
    sure, guess = probabilities.max(2)
    right = guess == labels[:, None]
    return right.numpy(), sure.numpy()
