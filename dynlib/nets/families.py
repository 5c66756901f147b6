"""The kinds of network that a super-network's checkpoint can name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from dynlib.nets import mobilenet, resnet, slimmable, vit
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

Build = Callable[[SubnetConfig, int], nn.Module]
Describe = Callable[[SubnetConfig, int], list[LayerSpec]]


class Family(NamedTuple):
    """`build(config, classes)` makes the static network of a configuration, `describe(config,
    classes)` lists its layers, `canonical(config, space)` gives equal networks one configuration.
    """

    build: Build
    describe: Describe
    canonical: Callable[[SubnetConfig, SearchSpace], SubnetConfig] = lambda config, space: config


FAMILIES = {
    "ResNet": Family(resnet.ResNet, resnet.layers),
    "MobileNetV3": Family(mobilenet.MobileNetV3, mobilenet.layers, mobilenet.canonical),
    "ViT": Family(vit.ViT, vit.layers, vit.canonical),
    **{
        build.__name__: Family(build, slimmable.describe(build))
        for build in (slimmable.SlimmableResNet, slimmable.SlimmableMobileNet)
    },
}
