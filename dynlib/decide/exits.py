"""Exits: small classifiers on the features of a frozen backbone, one behind every block.

All of them are trained at once (HADAS, arXiv 2212.03354) and none changes the backbone or another
exit, so what every exit says to every image is computed once and looked up from then on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dynlib.errors import ModelError
from dynlib.nets.supernet import Supernet
from dynlib.space import LayerSpec, SubnetConfig

GRID = 2  # features are averaged down to 2 x 2 pixels
HIDDEN = 64


def exit_layers(
    supernet: Supernet, config: SubnetConfig
) -> tuple[list[list[LayerSpec]], list[list[LayerSpec]]]:
    """The layers that lead from each of the P positions to the next, and those of each classifier.

    The last position is the end of the backbone, and its classifier the backbone's own.
    """
    stem, first, *blocks, own = supernet.layers(config)
    heads = [
        [
            LayerSpec("linear", layer.out_channels * GRID**2, HIDDEN),
            LayerSpec("linear", HIDDEN, supernet.classes),
        ]
        for layer in (first, *blocks[:-1])
    ]
    return [[stem, first], *([block] for block in blocks)], [*heads, [own]]


@torch.inference_mode()
def block_features(
    net: nn.Module, images: torch.Tensor, *, bf16: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features (N, channels * GRID**2) behind every block but the last, and logits (N, classes).

    Args:
        net: a prepared sub-network of the ResNet family.
        images: normalised, (N, 3, H, W).

    Raises `ModelError` for a network of another family.
    """
    stages = getattr(net, "stages", ())
    if not stages or not all(len(getattr(stage, "blocks", ())) for stage in stages):
        raise ModelError(f"{type(net).__name__}: expected stages of one block or more (ResNet)")
    kept: list[torch.Tensor] = []

    def keep(_, inputs, output=None):
        features = inputs[0] if output is None else output
        kept.append(F.adaptive_avg_pool2d(features.float(), GRID).flatten(1))

    hooks = []
    for stage in stages:
        hooks.append(stage.blocks[0].register_forward_pre_hook(keep))  # behind the reduction
        hooks += [block.register_forward_hook(keep) for block in stage.blocks]
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = net(images).float()
    finally:
        for hook in hooks:
            hook.remove()
    return kept[:-1], logits


def train_exits(
    features: Sequence[torch.Tensor], logits: torch.Tensor, labels: torch.Tensor, *, seed: int,
    epochs: int = 8, batch_size: int = 250, lr: float = 4e-3, decay: float = 0.05,
) -> list[nn.Module]:  # fmt: skip
    """One classifier for each of the `features`: cross-entropy plus the divergence from `logits`.

    `loss = mean over exits of CE(z_i, y) + KL(softmax(z) || softmax(z_i))` with z the backbone's
    own logits (HADAS's released code; its exits are a 3x3 convolution).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        exits = nn.ModuleList(_classifier(f.shape[1], logits.shape[1]) for f in features)
        solver = torch.optim.AdamW(exits.parameters(), lr, weight_decay=decay)
        steps = epochs * -(-len(labels) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(solver, lr, total_steps=steps)
        teacher = logits.softmax(1)
        for _ in range(epochs):
            for index in torch.randperm(len(labels)).split(batch_size):
                losses = []
                for net, inputs in zip(exits, features, strict=True):
                    said = net(inputs[index])
                    drift = F.kl_div(said.log_softmax(1), teacher[index], reduction="batchmean")
                    losses.append(F.cross_entropy(said, labels[index]) + drift)
                torch.stack(losses).mean().backward()
                solver.step()
                solver.zero_grad()
                schedule.step()
    return [net.eval().requires_grad_(False) for net in exits]


def _classifier(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(inputs), nn.Dropout(0.2), nn.Linear(inputs, HIDDEN), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(HIDDEN, classes),
    )  # fmt: skip


@torch.inference_mode()
def exit_answers(
    exits: Sequence[nn.Module], features: Sequence[torch.Tensor], logits: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Whether each position is right about each image, and its largest probability; both (N, P)."""
    said = [net(inputs) for net, inputs in zip(exits, features, strict=True)]
    sure, guess = torch.stack([*said, logits], 1).softmax(2).max(2)
    return (guess == labels[:, None]).numpy(), sure.numpy()
