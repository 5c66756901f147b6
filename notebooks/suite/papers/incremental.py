"""A CNN that grows by increments, each of which leaves the earlier ones as they were.

The channels of every convolution form groups with no connection between them (Xun et al., arXiv
2105.03600, section 3), so an increment is a narrow network of its own whose logits are added:

    logits_i(x) = b + sum_{j <= i} W_j f_j(x)

Removing the last increments removes whole filters with all their inputs, and the classifier's
columns; nothing is retrained. A configuration is the number of increments it keeps, the only entry
of `SubnetConfig.width`, and its tensors are prefixes of the largest network's.
"""

import itertools
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from dynlib.errors import ModelError
from dynlib.nets.chain import Row
from dynlib.nets.families import BlockLayers, Family, register
from dynlib.nets.supernet import Supernet
from dynlib.space import SearchSpace, SubnetConfig

# Of one increment: few, so that the next one has work left.
INCREMENT_CHANNELS = (4, 16, 24, 24, 24)
POOLED = (1, 3)  # convolutions that a 2x2 max-pool follows


def _layer(place: int, inputs: int, outputs: int, groups: int = 1) -> list[nn.Module]:
    """Convolution number `place` with what follows it; the first one halves the image."""
    stride = 1 if place else 2
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
    pool = [nn.MaxPool2d(2)] if place in POOLED else []
    return [conv, *pool, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class IncrementalCNN(Row):
    """(N, 3, H, W) -> (N, classes): five convolutions of `config.width[0]` increments, classifier.

    Every BatchNorm channel belongs to one increment, so its statistics never change later.
    """

    def __init__(self, config: SubnetConfig, classes: int = 10, channels=INCREMENT_CHANNELS):
        super().__init__()
        self.config = config
        (increments,) = config.width
        layers, inputs = [], 3
        for i, width in enumerate(channels):
            layers += _layer(i, inputs, increments * width, increments if i else 1)
            inputs = increments * width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def row(self):
        """As in `Row`: a convolution with what follows it is a block."""
        convs = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.Conv2d)]
        for start, stop in itertools.pairwise([*convs, len(self.features)]):
            yield f"features.{start}" if start else "stem", self.features[start:stop]
        yield "head", self._head

    def _head(self, x):
        return self.head(x.amax((2, 3)))


@register("IncrementalCNN")
def _family() -> Family:
    return Family(IncrementalCNN, _describe)


def _describe(config: SubnetConfig, classes: int) -> BlockLayers:
    """The layers of one increment, once for each.

    A group is listed as the dense convolution it is; `groups` would read as depth-wise to a board.
    """
    (increments,) = config.width
    one = Family(IncrementalCNN).layers(replace(config, width=(1,)), classes)
    return {name: specs * increments for name, specs in one.items()}


class DenseIncrementalCNN(nn.Module):
    """The same widths grown without groups: a new filter also reads every earlier channel.

    The rival of the memory comparison (Tann et al., arXiv 1607.05418): removing an increment again
    leaves the earlier ones intact, but the connections between increments are weights as well.
    """

    def __init__(self, increments: int, classes: int = 10, channels=INCREMENT_CHANNELS):
        super().__init__()
        self.stages, inputs = nn.ModuleList(), 0
        for i, width in enumerate(channels):
            seen = [inputs * (j + 1) if i else 3 for j in range(increments)]
            self.stages.append(nn.ModuleList(nn.Sequential(*_layer(i, n, width)) for n in seen))
            inputs = width
        self.head = nn.Linear(increments * inputs, classes)

    def forward(self, x: torch.Tensor, increments: int | None = None):
        """(N, 3, H, W) -> (N, classes) with the first `increments`, or all."""
        parts = None
        for stage in self.stages:
            parts = [
                layer(x if parts is None else torch.cat(parts[: j + 1], 1))
                for j, layer in enumerate(stage[:increments])
            ]
        features = torch.cat(parts, 1).amax((2, 3))
        weight = self.head.weight[:, : features.shape[1]]
        return F.linear(features, weight, self.head.bias)


def increment_space(increments: int = 4, resolution: int = 32) -> SearchSpace:
    """The networks of 1 to `increments` increments on images of `resolution` pixels."""
    return SearchSpace((resolution,), width=(tuple(range(1, increments + 1)),))


def part(supernet: Supernet, index: int) -> dict[str, torch.Tensor]:
    """Views of the weights that increment `index`, from 0, alone owns; of the first, the bias too.

    They have the names and shapes of a network of one increment.
    """
    views = {}
    for name, weight in supernet.net.named_parameters():
        if name == "head.bias":
            views |= {name: weight} if index == 0 else {}
        else:
            axis = 1 if name == "head.weight" else 0
            views[name] = weight.chunk(supernet.space.size, axis)[index]
    return views


def increment(supernet: Supernet, index: int) -> nn.Module:
    """The trained increment `index`, from 0, alone: images -> what it adds to the logits.

    Raises `ModelError` when it has not been added.
    """
    if index >= len(supernet.statistics):
        raise ModelError(f"increment {index + 1}: only {len(supernet.statistics)} were added")
    config = list(supernet.space)[index]
    net = supernet.kind.build(supernet.space.smallest, supernet.classes)
    state = net.state_dict() | {"head.bias": torch.zeros(supernet.classes)}
    state |= {k: v.detach() for k, v in part(supernet, index).items()}
    state |= {k: v.chunk(index + 1)[index] for k, v in supernet.statistics[config].items()}
    net.load_state_dict(state)
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def next_increment(supernet: Supernet) -> Supernet:
    """The increment to be trained next as a super-network of its own, with its initial weights.

    Only the first has a bias. Raises `ModelError` when `supernet` is complete.
    """
    index = len(supernet.statistics)
    if index == supernet.space.size:
        raise ModelError(f"all {index} increments are there")
    alone = Supernet(
        increment_space(1, supernet.space.resolution[0]), supernet.classes, family=supernet.family
    )
    own = part(supernet, index)
    for name, parameter in alone.net.named_parameters():
        parameter.copy_(own.get(name, torch.zeros(())))
        parameter.requires_grad_(name in own)
    return alone.to(next(supernet.parameters()).device)


@torch.no_grad()
def add_increment(supernet: Supernet, alone: Supernet) -> SubnetConfig:
    """Make `alone`, a trained and calibrated `next_increment`, part of `supernet`.

    Its weights go where no earlier configuration looks, and its statistics behind the stored ones.
    Returns the configuration that can be prepared from now on.

    Raises `ModelError` when statistics are missing or `supernet` is complete.
    """
    configs, index = list(supernet.space), len(supernet.statistics)
    if index == len(configs) or configs[0] not in alone.statistics:
        raise ModelError(
            f"increment {index + 1} of {len(configs)} cannot be added; expected a calibrated "
            f"network and fewer than {len(configs)} increments so far"
        )
    new = dict(alone.net.named_parameters())
    for name, view in part(supernet, index).items():
        view.copy_(new[name])
    earlier = supernet.statistics[configs[index - 1]] if index else {}
    supernet.statistics[configs[index]] = {
        name: torch.cat([*([earlier[name]] if index else []), value])
        for name, value in alone.statistics[configs[0]].items()
    }
    return configs[index]
