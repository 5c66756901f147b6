"""The kinds of network that a super-network's checkpoint can name.

@register("TwoLayers")
def _two_layers() -> Family:
    return Family(TwoLayers)

Supernet(space, family="TwoLayers")
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dynlib.errors import ConfigError, near
from dynlib.nets.chain import chain
from dynlib.nets.trace import layers_of
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

BlockLayers = dict[str, list[LayerSpec]]  # by the names that `chain` gives the blocks
Builder = Callable[[SubnetConfig, int], nn.Module]
Describer = Callable[[SubnetConfig, int], BlockLayers]
Canonical = Callable[[SubnetConfig, SearchSpace], SubnetConfig]


class Family(NamedTuple):
    """One kind of network.

    `build(config, classes)` makes the static network of a configuration. `describe(config,
    classes)` lists the layers of each of its blocks; by default they are recorded from a run
    without data. `canonical(config, space)` gives equal networks one configuration.
    """

    build: Builder
    describe: Describer | None = None
    canonical: Canonical = lambda config, space: config

    def layers(self, config: SubnetConfig, classes: int) -> BlockLayers:
        """The layers of each block, in order of execution."""
        if self.describe is not None:
            return self.describe(config, classes)
        with torch.device("meta"):
            net = self.build(config, classes)
        return layers_of(net, config.resolution, chain(net).blocks)


FAMILIES: dict[str, Callable[..., Family]] = {}


def register(name: str) -> Callable[[Callable[..., Family]], Callable[..., Family]]:
    """Decorates a function that makes the family `name` of the options a checkpoint stores.

    Raises `ConfigError` when there is one of this name.
    """

    def add(make: Callable[..., Family]) -> Callable[..., Family]:
        if name in FAMILIES:
            raise ConfigError(f"there is a family {name!r} already, of {FAMILIES[name].__module__}")
        FAMILIES[name] = make
        return make

    return add


def find_family(name: str, options: Mapping[str, Any]) -> Family:
    """The family `name` made with `options`; raises `ConfigError` when there is none such."""
    if name not in FAMILIES:
        raise ConfigError(f"family {name!r} is not registered; {near(name, FAMILIES)}")
    try:
        return FAMILIES[name](**options)
    except TypeError as error:
        raise ConfigError(f"family {name!r} with {sorted(options)}: {error}") from error
