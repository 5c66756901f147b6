"""The small networks that the study of adaptive networks ships, and how they were trained."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from dynlib.decide.exits import block_features, exit_head, train_exits
from dynlib.files import atomic_write, repo_root
from dynlib.images import Dataset, Images
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training import Recipe, bf16_pays, calibration_batches, train
from suite.errors import SuiteError


def first_path(dataset: str) -> Path:
    """Where the first network of the cascade lies, if one is shipped for the data set."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.first.safetensors"


def train_first(
    supernet: Supernet, images: Dataset, path: Path, *, epochs: int = 6, seed: int = 0
) -> Supernet:
    """The smallest stored sub-network, trained on alone, on the labels.

    It starts as a copy of its slices and then has weights of its own, a file of its own beside the
    super-network's.
    """
    small = next(iter(supernet.statistics))
    first = restricted(supernet, [small])
    recipe = Recipe(epochs=epochs, lr=0.04, lr_bias=2.0)
    train(first, images, recipe, seed=seed, watch=1000)
    round_to_halves(first.net)
    calibrate(first, first.space.largest, calibration_batches(images, 5000))
    first.save(
        path,
        half=True,
        dataset=images.name,
        trained=f"{epochs} epochs on labels, from the slices of {small}, seed {seed}",
    )
    return first


def restricted(supernet: Supernet, configs: Sequence[SubnetConfig]) -> Supernet:
    """A copy whose space holds these sub-networks, with weights of its own; the stem stays fixed.

    Statistics are not taken over.
    """

    def choices(dimension: str) -> tuple:
        places = zip(*(getattr(config, dimension) for config in configs), strict=True)
        return tuple(tuple(sorted(set(place))) for place in places)

    resolution = tuple(sorted({config.resolution for config in configs}))
    space = SearchSpace(resolution, depth=choices("depth"), width=choices("width"))
    copy = Supernet(space, supernet.classes, family=supernet.family)
    slices = supernet.slices(space.largest)
    with torch.no_grad():
        for name, parameter in copy.net.named_parameters():
            parameter.copy_(slices[name])
    copy.net.stem.requires_grad_(False)
    return copy


@torch.no_grad()
def round_to_halves(net: nn.Module) -> None:
    """Weights as they are stored: statistics must belong to these."""
    for parameter in net.parameters():
        parameter.copy_(parameter.half())


def exits_path(dataset: str) -> Path:
    """Where the exits of the largest network lie, if they are shipped for the data set."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.exits.safetensors"


def features_of(net: nn.Module, images: Dataset, part: Images, *, bf16: bool = False):
    """Features behind every block with an exit, each (N, inputs), and logits (N, classes)."""
    found = []
    for batch in part.images.split(250):
        found.append(block_features(net, images.normalise(batch), bf16=bf16))
    features, logits = zip(*found, strict=True)
    return [torch.cat(some) for some in zip(*features, strict=True)], torch.cat(logits)


def ship_exits(
    supernet: Supernet, images: Dataset, path: Path, *, count: int = 45_000, seed: int = 0
) -> list[nn.Module]:
    """Exits behind every block of the largest network, which stays as it is, into a file."""
    largest = supernet.space.largest
    part = images.train.take(slice(0, count))
    features, logits = features_of(supernet.prepare(largest), images, part, bf16=bf16_pays())
    exits = train_exits(features, logits, part.labels, seed=seed)
    tensors = {}
    for place, net in enumerate(exits):
        for name, value in net.state_dict().items():
            kept = value.half() if name.endswith("weight") and value.ndim == 2 else value
            tensors[f"{place}.{name}"] = kept.contiguous()
    trained = f"frozen {largest}, {len(part)} training images, seed {seed}"
    write_exits(path, tensors, json.dumps({"dataset": images.name, "trained": trained}))
    return exits


def write_exits(path: Path, tensors: Mapping[str, torch.Tensor], about: str) -> None:
    """A safetensors file that carries the hash of what it says."""
    atomic_write(path, save(dict(tensors), {"about": about, "sha256": _digest(about, tensors)}))


def _digest(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def read_exits(path: Path) -> dict[str, torch.Tensor]:
    """What `write_exits` wrote; raises `SuiteError` where the file is not as it was written."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = file.metadata()
    if said.get("sha256") != _digest(said["about"], tensors):
        raise SuiteError(f"{path}: its content has not the hash that it carries; train it again")
    return tensors


def load_exits(path: Path, classes: int) -> list[nn.Module]:
    """What `ship_exits` wrote; raises as `read_exits` does."""
    tensors = read_exits(path)
    count = 1 + max(int(name.split(".")[0]) for name in tensors)
    exits = []
    for place in range(count):
        mine = {name.partition(".")[2]: value for name, value in tensors.items()
                if name.startswith(f"{place}.")}  # fmt: skip
        net = exit_head(len(mine["0.weight"]), classes)
        net.load_state_dict({name: value.to(net.state_dict()[name].dtype)
                             for name, value in mine.items()})  # fmt: skip
        exits.append(net.eval().requires_grad_(False))
    return exits
