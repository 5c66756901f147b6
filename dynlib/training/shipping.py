"""From trained weights to a checkpoint worth shipping: chosen points, statistics, accuracies."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from dynlib.errors import DynlibError
from dynlib.files import atomic_write, checkpoints
from dynlib.images import Dataset
from dynlib.nets.supernet import Supernet, macs_m, params_m
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training.step import bf16_pays
from dynlib.training.trainer import evaluate

# The space of the shipped CIFAR-10 network: 112 to 11 MMACs, which two cores train in an hour.
CIFAR_SPACE = SearchSpace(
    resolution=(28, 30, 32),
    depth=((1,), (1, 2), (1, 2)),
    width=((24, 32, 40, 48, 64), (64, 80, 96, 128, 160, 192), (96, 128, 160, 192, 224, 256)),
)
# A smaller one for the generated set and for short training runs: 20 to 2 MMACs.
SMALL_SPACE = SearchSpace(
    resolution=(28, 30, 32),
    depth=((1,), (1, 2), (1, 2)),
    width=((8, 16, 24, 32), (24, 32, 48, 64), (32, 48, 64, 96)),
)


def checkpoint_path(dataset: str) -> Path:
    """Where the shipped checkpoint for a data set lies."""
    return checkpoints() / f"{dataset}.safetensors"


def pretrained(dataset: Dataset) -> tuple[Supernet, dict]:
    """The shipped super-network for `dataset`, and its provenance.

    Raises `DynlibError` when none is shipped for it.

    >>> supernet, provenance = pretrained(load_dataset("generated", generated=(400, 100)))
    >>> supernet.space.size, len(supernet.statistics), provenance["dataset"]
    (768, 8, 'generated')
    """
    path = checkpoint_path(dataset.name)
    if not path.is_file():
        ready = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise DynlibError(
            f"no checkpoint {path.name} in data/checkpoints, which holds {ready}; train one with "
            f"python -m dynlib.training --dataset {dataset.name} --out {path}"
        )
    return Supernet.from_checkpoint(path)


def choose_points(
    supernet: Supernet, dataset: Dataset, *, count: int = 8, candidates: int = 120, seed: int = 0
) -> list[SubnetConfig]:
    """Pick sub-networks spread evenly in log MACs, each the best on validation images near it.

    Both ends of the space are always among them. Between them, MACs are cut into ``count - 2``
    equal ratios, and each takes the most accurate of its random candidates, if it has any.
    """
    rng = np.random.default_rng([seed, 5])
    space = supernet.space
    ends = [space.smallest, space.largest]
    drawn = dict.fromkeys(space.sample(rng) for _ in range(candidates))
    held = dataset.val.take(slice(0, 2000))
    low, high = (np.log(macs_m(supernet, config)) for config in ends)
    best: dict[int, tuple[float, SubnetConfig]] = {}
    between = [config for config in drawn if config not in ends]
    for config in tqdm(between, desc="choose points", disable=None):
        accuracy = evaluate(supernet, config, dataset, held, bf16=bf16_pays())
        del supernet.statistics[config]
        share = (np.log(macs_m(supernet, config)) - low) / (high - low)
        part = int(share * (count - 2))
        if part not in best or accuracy > best[part][0]:
            best[part] = accuracy, config
    chosen = [config for _, (_, config) in sorted(best.items())]
    return [space.smallest, *chosen, space.largest]


def accuracy_table(
    supernet: Supernet, configs: list[SubnetConfig], dataset: Dataset, *, bf16: bool = False
) -> pd.DataFrame:
    """MACs, parameters, validation and test accuracy of each configuration, on all images."""
    rows = []
    for config in tqdm(configs, desc="evaluate", disable=None):
        row = {
            "subnet": str(config),
            "macs_m": macs_m(supernet, config),
            "params_m": params_m(supernet, config),
            "accuracy_val_pct": evaluate(supernet, config, dataset, dataset.val, bf16=bf16),
            "accuracy_test_pct": evaluate(supernet, config, dataset, dataset.test, bf16=bf16),
            "source": "measured",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def ship(
    supernet: Supernet,
    dataset: Dataset,
    path: str | Path,
    *,
    half: bool = True,
    candidates: int = 120,
    **provenance,
) -> pd.DataFrame:
    """Choose the operating points, store their statistics, and write checkpoint and accuracies.

    Writes `path` and beside it ``<name>.accuracy.csv``, which is also returned.
    """
    path = Path(path)
    if half:  # statistics and accuracies must belong to the weights as they are stored
        with torch.no_grad():
            for parameter in supernet.net.parameters():
                parameter.copy_(parameter.half())
    configs = choose_points(supernet, dataset, candidates=candidates)
    table = accuracy_table(supernet, configs, dataset)
    supernet.save(
        path,
        half=half,
        dataset=dataset.name,
        mean=dataset.mean.tolist(),
        std=dataset.std.tolist(),
        class_names=list(dataset.classes),
        **provenance,
    )
    text = table.to_csv(index=False, float_format="%.4f")
    atomic_write(path.with_suffix(".accuracy.csv"), text)
    return table


def guide_of(paths: Sequence[str | Path]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A teacher for `train`: images (N, 3, H, W) -> the logarithm of the mean probabilities (N,
    classes) of the largest sub-network in each checkpoint; every second one sees mirrored images,
    which is worth about as much as another network."""
    nets = []
    for path in paths:
        supernet, _ = Supernet.from_checkpoint(path)
        nets.append(supernet.prepare(supernet.canonical(supernet.space.largest)).eval())

    @torch.no_grad()
    def guide(images: torch.Tensor) -> torch.Tensor:
        views = images, images.flip(-1)
        answers = []
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16_pays()):
            for number, net in enumerate(nets):
                logits = net(views[number % 2]).float()
                answers.append(logits.softmax(1))
        return (sum(answers) / len(answers)).log()

    return guide
