"""Static networks that everybody knows, trained on the images of the super-network.

ResNet-20 (He et al. 2015, section 4.2), and one shaped as the record holder of short training on
CIFAR-10, airbench94 (Jordan 2024, arXiv 2404.00498, section 3).
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dynlib.data import with_train
from dynlib.files import repo_root
from dynlib.images import Dataset
from dynlib.nets.families import Builder
from dynlib.nets.resnet import STEM_CHANNELS
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training import Recipe, calibration_batches, train
from suite.studies.ablation import best_rate
from suite.studies.adapt_train import round_to_halves
from suite.studies.throughput import resnet20

ONE = SearchSpace((32,), ((1,),), ((16,),))  # the trainer's word for a network that does not change


class Group(nn.Module):
    """(N, I, H, W) -> (N, O, H // 2, W // 2): two convolutions, the first with a max-pool."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        for conv in (self.conv1, self.conv2):  # a partial identity
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x):
        """Shapes as in the class."""
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Airbench(nn.Module):
    """(N, 3, 32, 32) -> (N, classes); 118 MMACs and 2.0 M parameters.

    A stem that whitens 2x2 patches, which the trainer sets and fixes, and three groups of 64, 256
    and 256 channels. Of airbench94 it has not the scaled biases, the look-ahead, nor the mean over
    several crops when it is tested.
    """

    def __init__(self, classes: int = 10, widths: tuple[int, ...] = (64, 256, 256)):
        super().__init__()
        self.stem = nn.Conv2d(3, STEM_CHANNELS, 2)
        inputs = (STEM_CHANNELS, *widths[:-1])
        self.groups = nn.Sequential(*map(Group, inputs, widths))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images):
        """Shapes as in the class."""
        maps = self.groups(F.gelu(self.stem(images)))
        return self.head(maps.amax((2, 3)))


def fixed_resnet20(config: SubnetConfig, classes: int) -> nn.Module:
    """ResNet-20, whatever the configuration says: how `dynlib.training` is given a static net."""
    return resnet20(classes)


def fixed_airbench(config: SubnetConfig, classes: int) -> nn.Module:
    """The same for `Airbench`. Checkpoints hold the names of these functions."""
    return Airbench(classes)


BUILDERS: Mapping[str, Builder] = {"resnet20": fixed_resnet20, "airbench": fixed_airbench}


def static_path(dataset: str, kind: str) -> Path:
    """Where the trained network lies, if one is shipped for the data set."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.{kind}.safetensors"


def load_static(images: Dataset, kind: str) -> Supernet | None:
    """The network that `train_static` wrote for the images, if one is shipped for them."""
    path = static_path(images.name, kind)
    if not path.is_file():
        return None
    net, _ = Supernet.from_checkpoint(path, build=BUILDERS[kind])
    return net


def train_static(
    images: Dataset,
    path: Path,
    kind: str,
    *,
    rates: tuple[float, ...] = (0.08, 0.16),
    trial_epochs: int = 2,
    trial_images: int | None = None,
    epochs: int = 24,
    seed: int = 0,
    state_file: Path | None = None,
) -> Supernet:
    """A network of this kind by the solver and augmentation of the super-network, at its own rate.

    The learning rate is the best on validation images of short trainings, on all training images
    or on so many (see `best_rate`). Statistics are of 5,000 training images. Writes the checkpoint;
    the long training goes on from `state_file`.
    """

    def build(space: SearchSpace) -> Supernet:
        return Supernet(space, len(images.classes), build=BUILDERS[kind])

    short = Recipe(epochs=trial_epochs, batch_size=250)
    part = images if trial_images is None else with_train(images, trial_images, seed)
    _, lr = best_rate(short, rates, ONE, [ONE.largest], build, part, seed)
    recipe = replace(short, epochs=epochs, lr=lr)
    torch.manual_seed(seed)
    net = build(ONE)
    history = train(net, images, recipe, seed=seed, watch=0, state_file=state_file)
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
