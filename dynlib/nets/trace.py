"""The layers of a network, recorded while an image of no content passes through it."""

import math

import torch
from torch import nn

from dynlib.nets.attention import Attention, AttentionSpec
from dynlib.space import LayerSpec


def record(net: nn.Module, resolution: int) -> list[LayerSpec]:
    """Convolutions, linear layers and attentions of `net`, in order of execution.

    `net` lies on the meta device, is used up and takes (1, 3, resolution, resolution). Tokens count
    as the pixels of a square map; where they fill none (a class token comes on top of the patches)
    it is the nearest square, and `density` says how much more or less than it the work is.
    """
    specs: list[LayerSpec] = []
    for module in net.eval().modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Attention):
            module.register_forward_hook(lambda *run: specs.append(_spec(*run)))
    with torch.no_grad():
        net(torch.empty(1, 3, resolution, resolution, device="meta"))
    return specs


def _spec(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> LayerSpec:
    if isinstance(module, nn.Conv2d):
        return LayerSpec(
            "conv", module.in_channels, module.out_channels, module.kernel_size[0],
            module.stride[0], module.groups, inputs[0].shape[-1], output.shape[-1],
        )  # fmt: skip
    tokens = output.shape[:-1].numel()
    side = round(math.sqrt(tokens))
    sizes = {"in_size": side, "out_size": side}
    if isinstance(module, Attention):  # its work grows with the tokens squared
        rows, density = module.q.out_features, tokens**2 / side**4
        groups = rows // module.head_dim
        return AttentionSpec("attention", rows, rows, groups=groups, density=density, **sizes)
    density = tokens / side**2
    return LayerSpec("linear", module.in_features, module.out_features, density=density, **sizes)
