"""The file of a super-network: what it is, its weights, and the statistics of its sub-networks."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dynlib.errors import CheckpointError, ConfigError
from dynlib.files import atomic_write
from dynlib.space import SearchSpace

FORMAT = "dynlib-supernet-1"
IDENTITY = ("space", "classes", "family", "options", "transform")
# The first checkpoints hold a residual network and do not say so.
DEFAULTS = {"family": "ResNet", "transform": False, "options": {}}

Tensors = dict[str, torch.Tensor]


class Checkpoint(NamedTuple):
    """What a file holds: the super-network's arguments, free words about it, and its tensors."""

    identity: dict[str, Any]
    provenance: dict[str, Any]
    weights: Tensors
    statistics: dict[str, Tensors]  # by the canonical string of the configuration


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a safetensors file atomically: weights are ``net.<name>``, statistics
    ``<config>/<name>``."""
    tensors = {}
    for name, value in checkpoint.weights.items():
        tensors[f"net.{name}"] = value.contiguous()
    for config, values in checkpoint.statistics.items():
        for name, value in values.items():
            tensors[f"{config}/{name}"] = value.contiguous()

    space = checkpoint.identity["space"]
    about = checkpoint.identity | {"space": space.to_dict()}
    if not about["options"]:
        del about["options"]
    about["provenance"] = checkpoint.provenance
    metadata = {"format": FORMAT, "about": json.dumps(about), "sha256": _digest(tensors)}
    content = save(tensors, metadata)
    return atomic_write(path, content)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote, or raise `CheckpointError` naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a super-network checkpoint ({FORMAT})")
            about = DEFAULTS | json.loads(metadata["about"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        about["space"] = SearchSpace.from_dict(about["space"])
        about["classes"] = int(about["classes"])
        about["options"] = dict(about["options"])
        identity = {key: about[key] for key in IDENTITY}
        provenance = about["provenance"]
    except (OSError, ValueError, KeyError, TypeError, ConfigError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors):
        raise CheckpointError(f"{path}: damaged: its tensors do not add up to its SHA-256")
    return Checkpoint(identity, provenance, *_parted(tensors))


def _parted(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, Tensors]]:
    weights: Tensors = {}
    statistics: dict[str, Tensors] = {}
    for full_name, value in tensors.items():
        config, slash, name = full_name.partition("/")
        if slash:
            statistics.setdefault(config, {})[name] = value
        elif full_name.startswith("net."):
            weights[full_name.removeprefix("net.")] = value
    return weights, statistics


def _digest(tensors: Tensors) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        raw = tensor.flatten().view(torch.uint8)
        sha.update(raw.numpy())
    return sha.hexdigest()
