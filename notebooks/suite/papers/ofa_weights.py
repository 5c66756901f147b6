"""The published weights of Once-for-All (MobileNetV3, width 1.0 or 1.2), by their own names.

They fit ``Supernet(OFA_W10, 1000, family="MobileNetV3", transform=True)``, or that of `OFA_W12`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dynlib.data import load_dataset
from dynlib.errors import CheckpointError
from dynlib.images import Dataset
from dynlib.nets.supernet import MOMENTS, Supernet
from dynlib.nets.trace import NORMS

OUTSIDE = {
    "stem": "first_conv", "final": "final_expand_layer", "mix": "feature_mix_layer.conv",
    "head": "classifier.linear",
}  # fmt: skip
INSIDE = {
    "expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear",
    "squeeze": "depth_conv.se.fc",
}  # fmt: skip


def published_key(name: str, places: int = 4) -> str:
    """The published key of our tensor `name`, where a stage has `places` blocks at most."""
    first, *rest = name.split(".")
    if first != "stages":
        return ".".join([OUTSIDE[first], *rest]).replace(".norm.", ".bn.")
    stage, block, part, *rest = rest
    index = max(0, 1 + (int(stage) - 1) * places + int(block))
    tail = ".".join(rest)
    if index > 0 and part != "squeeze":  # elastic layers there wrap the plain one
        tail = tail.replace("conv.weight", "conv.conv.weight").replace("norm.", "bn.bn.")
    return f"blocks.{index}.conv.{INSIDE[part]}.{tail}".replace(".norm.", ".bn.")


def load_ofa(supernet: Supernet, weights: str | Path | Mapping[str, torch.Tensor]) -> None:
    """Replace the weights of `supernet`, and the statistics of its largest sub-network.

    Args:
        weights: a published file, or its state dict.

    Raises:
        CheckpointError: a key is missing, unknown or of another shape; nothing is changed then.
    """
    source = "the state dict" if isinstance(weights, Mapping) else weights
    if supernet.family != "MobileNetV3":
        raise CheckpointError(f"{source}: holds a MobileNetV3, not a {supernet.family}")
    state = weights if isinstance(weights, Mapping) else _read(weights)
    state = {k.replace(".mobile_inverted_conv.", ".conv."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}

    shapes = {name: tuple(p.shape) for name, p in supernet.net.named_parameters()}
    for name, module in supernet.net.named_modules():
        if isinstance(module, NORMS):
            shapes |= {f"{name}.{moment}": (module.num_features,) for moment in MOMENTS}
    places = max(supernet.space.depth[0])
    keys = {name: published_key(name, places) for name in shapes}
    for key in state.keys() - set(keys.values()):
        hint = "; build the super-network with transform=True" if key.endswith("_matrix") else ""
        raise CheckpointError(f"{source}: {key} has no place in the super-network{hint}")
    for name, key in keys.items():
        got = tuple(state[key].shape) if key in state else None
        want = shapes[name]  # our matrix products may be 1x1 convolutions there
        if got != want and not (len(want) == 2 and got == (*want, 1, 1)):
            raise CheckpointError(f"{source}: {key} has shape {got}, expected {want}")
    ours = {name: state[key].reshape(shapes[name]) for name, key in keys.items()}
    statistics = {name: ours.pop(name) for name in list(ours) if name.endswith(MOMENTS)}
    supernet.assign(ours, {str(supernet.space.largest): statistics}, source)


def _read(path: str | Path) -> Mapping[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise CheckpointError(f"{path}: no readable weights: {error}") from error


def imagenet(path: str | Path, size: int = 224, **options) -> Dataset:
    """A folder or tar of class folders, normalised as the published weights expect.

    `options` go to `load_dataset`.
    """
    from dynlib._vision import timm

    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    images = load_dataset(str(path), size=size, resize=True, **options)
    return replace(images, mean=torch.tensor(mean), std=torch.tensor(std))
