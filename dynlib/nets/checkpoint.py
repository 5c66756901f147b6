"""The file of a super-network: what it is, its weights, and the statistics of its sub-networks.

Every file carries the SHA-256 of what it says; one without it, or with another, is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dynlib.errors import CheckpointError, ConfigError
from dynlib.files import MALFORMED, atomic_write, open_plain
from dynlib.space import SearchSpace

FORMAT = "dynlib-supernet-1"
IDENTITY = ("space", "classes", "family", "options", "transform")
# The first checkpoints hold a residual network and do not say so.
DEFAULTS = {"family": "ResNet", "transform": False, "options": {}}
LARGEST_CHOICE = 2**16  # channels, pixels or classes
LARGEST_HEADER = 2**24  # bytes

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
    content = save(tensors, _metadata(json.dumps(about), tensors))
    return atomic_write(path, content)


def _metadata(about: str, tensors: Tensors) -> dict[str, str]:
    return {"format": FORMAT, "about": about, "sha256": _digest(about, tensors)}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote, or raise `CheckpointError` naming the file."""
    try:
        _check_plain(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a super-network checkpoint ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        _check_digest(path, metadata, tensors)
        about = DEFAULTS | json.loads(metadata["about"])
        about["space"] = SearchSpace.from_dict(about["space"])
        about["classes"] = int(about["classes"])
        about["options"] = dict(about["options"])
        identity = {key: about[key] for key in IDENTITY}
        provenance = dict(about["provenance"])
    except (OSError, KeyError, *MALFORMED, ConfigError, SafetensorError) as error:
        said = str(error) if isinstance(error, ConfigError) else repr(error)  # of type and key
        raise CheckpointError(f"{path}: cannot be read: {said:.300}") from error
    checkpoint = Checkpoint(identity, provenance, *_parted(tensors))
    _check_sizes(path, checkpoint)
    return checkpoint


def _check_plain(path: str | Path) -> None:
    """Raise for what is no plain file, which would be waited for, and for an absurd header."""
    with open_plain(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise ValueError(f"a header of {size} bytes; expected at most {LARGEST_HEADER}")


def _check_digest(path: str | Path, metadata: Mapping[str, str], tensors: Tensors) -> None:
    if "sha256" not in metadata:
        raise CheckpointError(
            f"{path}: has no SHA-256 to check it by; if you trust it, `sign_checkpoint` it"
        )
    # Files of earlier versions hash their tensors alone.
    if metadata["sha256"] not in (_digest(metadata["about"], tensors), _digest("", tensors)):
        raise CheckpointError(f"{path}: damaged: it does not add up to its SHA-256")


def _check_sizes(path: str | Path, checkpoint: Checkpoint) -> None:
    """Refuse a description that asks for more than the file holds, before anything is built."""
    space, classes = checkpoint.identity["space"], checkpoint.identity["classes"]
    numbers = [classes, *(choice for _, choices in space.axes() for choice in choices)]
    if not all(type(n) is int and 0 <= n <= LARGEST_CHOICE for n in numbers):
        raise CheckpointError(f"{path}: expected whole sizes up to {LARGEST_CHOICE} in its space")
    blocks = sum(space.largest.depth)
    if blocks > len(checkpoint.weights):
        raise CheckpointError(
            f"{path}: a space of {blocks} blocks in {len(checkpoint.weights)} weights"
        )


def sign_checkpoint(path: str | Path) -> Path:
    """Give a file from before there were hashes its own; what it holds stays as it is."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()["about"]
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    return atomic_write(path, save(tensors, _metadata(about, tensors)))


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


def _digest(about: str, tensors: Tensors) -> str:
    """Hexadecimal SHA-256 of the description and of the tensors; of these alone without one."""
    sha = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        if about:
            sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.flatten().view(torch.uint8)
        sha.update(raw.numpy())
    return sha.hexdigest()
