"""A static network that everybody knows, trained on the images of the super-network: ResNet-20."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from dynlib.files import repo_root
from dynlib.images import Dataset
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training import Recipe, calibration_batches, train
from suite.studies.ablation import best_rate
from suite.studies.adapt_train import round_to_halves
from suite.studies.throughput import resnet20

ONE = SearchSpace((32,), ((1,),), ((16,),))  # the trainer's word for a network that does not change


def static_path(dataset: str) -> Path:
    """Where the trained ResNet-20 lies, if one is shipped for the data set."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.resnet20.safetensors"


def fixed_resnet20(config: SubnetConfig, classes: int) -> nn.Module:
    """ResNet-20, whatever the configuration says: how `dynlib.training` is given a static net."""
    return resnet20(classes)


def load_resnet20(images: Dataset) -> Supernet | None:
    """The ResNet-20 that `train_resnet20` wrote for the images, if one is shipped for them."""
    path = static_path(images.name)
    if not path.is_file():
        return None
    net, _ = Supernet.from_checkpoint(path, build=fixed_resnet20)
    return net


def train_resnet20(
    images: Dataset,
    path: Path,
    *,
    rates: tuple[float, ...] = (0.08, 0.16),
    trial_epochs: int = 2,
    epochs: int = 24,
    seed: int = 0,
) -> Supernet:
    """ResNet-20 by the solver and augmentation of the super-network, at a rate of its own.

    The learning rate is the best of short trainings on validation images (see `best_rate`).
    Statistics are of 5,000 training images. Writes the checkpoint.
    """

    def build(space: SearchSpace) -> Supernet:
        return Supernet(space, len(images.classes), build=fixed_resnet20)

    short = Recipe(epochs=trial_epochs, batch_size=250)
    _, lr = best_rate(short, rates, ONE, [ONE.largest], build, images, seed)
    recipe = replace(short, epochs=epochs, lr=lr)
    torch.manual_seed(seed)
    net = build(ONE)
    history = train(net, images, recipe, seed=seed, watch=0)
    round_to_halves(net.net)
    calibrate(net, ONE.largest, calibration_batches(images, 5000))
    minutes = float(history["seconds"].sum()) / 60
    net.save(
        path,
        half=True,
        dataset=images.name,
        recipe=asdict(recipe),
        minutes=minutes,
        threads=torch.get_num_threads(),
        seed=seed,
    )
    return net
