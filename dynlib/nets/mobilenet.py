"""MobileNetV3 of Once-for-All's shape, for images of 128 to 224 pixels.

Five stages of two to four inverted residual blocks; each block has its own kernel and expansion
(Once-for-All, arXiv 1908.09791, section 4; MobileNetV3, arXiv 1905.02244). Published weights load
through `suite.papers.ofa_weights`.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

from torch import nn
from torch.nn import functional as F

from dynlib.errors import ConfigError
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

# Channels at width 100 %: stem, first block, the five stages, final expansion, feature mix.
OFA_CHANNELS = (16, 16, 24, 40, 80, 112, 160, 960, 1280)
STRIDES = (2, 2, 2, 1, 2)
SQUEEZED = (False, True, False, True, True)
SWISH = (False, False, True, True, True)


def space(
    width: tuple[int, ...] = (100,), resolution: tuple[int, ...] = tuple(range(128, 225, 4)),
    depth: tuple[int, ...] = (2, 3, 4), kernel: tuple[int, ...] = (3, 5, 7),
    expand: tuple[int, ...] = (3, 4, 6),
) -> SearchSpace:  # fmt: skip
    """The same choices for every stage (`depth`) and block (`kernel` px, `expand` ratio).

    `width` is one place, the multiplier of all channels in percent. With the defaults it is
    Once-for-All's space.
    """
    stages = len(STRIDES)
    blocks = stages * max(depth)
    return SearchSpace(
        resolution, (depth,) * stages, (width,), (kernel,) * blocks, (expand,) * blocks
    )


OFA_W10 = space((100,))
OFA_W12 = space((120,))


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `value`, at least one, at most 10 % below `value`."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def channels(config: SubnetConfig) -> list[int]:
    """`OFA_CHANNELS` at the width of `config`."""
    return [make_divisible(c * config.width[0] / 100) for c in OFA_CHANNELS]


def canonical(config: SubnetConfig, space: SearchSpace) -> SubnetConfig:
    """`config` with the entries of the blocks it skips set to the first choice.

    Two configurations of `space` are the same network exactly if this is equal.
    """
    places = len(config.kernel) // len(STRIDES)
    used = [i % places < config.depth[i // places] for i in range(len(config.kernel))]

    def keep(values, choices):
        return tuple(v if u else c[0] for v, u, c in zip(values, used, choices, strict=True))

    return replace(
        config, kernel=keep(config.kernel, space.kernel), expand=keep(config.expand, space.expand)
    )


@dataclass(frozen=True, slots=True)
class Block:
    """The sizes of one inverted residual block; without an expansion `hidden` = `in_channels`."""

    in_channels: int
    hidden: int
    out_channels: int
    kernel: int
    stride: int
    squeezed: bool
    swish: bool

    @property
    def reduced(self) -> int:
        """Channels inside squeeze-and-excitation."""
        return make_divisible(self.hidden // 4)


def stages(config: SubnetConfig) -> list[list[Block]]:
    """The blocks of `config`: the fixed first one, then the active ones of the five stages.

    Raises `ConfigError` when it has not the places of this family.
    """
    places, rest = divmod(len(config.kernel), len(STRIDES))
    if (
        rest or len(config.depth) != len(STRIDES) or len(config.width) != 1
        or len(config.expand) != len(config.kernel) or max(config.depth) > places
    ):  # fmt: skip
        raise ConfigError(
            f"{config}: MobileNetV3 takes 5 depths, 1 width, and as many entries of kernel and "
            "expand for each stage as it may have blocks"
        )
    stem, first, *widths = channels(config)[:-2]
    result, inputs = [[Block(stem, stem, first, 3, 1, False, False)]], first
    for stage, width in enumerate(widths):
        blocks = []
        for i in range(config.depth[stage]):
            place, stride = stage * places + i, STRIDES[stage] if i == 0 else 1
            hidden = make_divisible(inputs * config.expand[place])
            kernel, kind = config.kernel[place], (SQUEEZED[stage], SWISH[stage])
            blocks.append(Block(inputs, hidden, width, kernel, stride, *kind))
            inputs = width
        result.append(blocks)
    return result


def _conv(inputs: int, outputs: int, kernel=1, stride=1, groups=1, act=None) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts = {"conv": conv, "norm": nn.BatchNorm2d(outputs)}
    return nn.Sequential(OrderedDict(parts | ({"act": act(inplace=True)} if act else {})))


class SqueezeExcite(nn.Module):
    """(N, C, H, W) -> (N, C, H, W): each channel times a gate computed from all channel means.

    Linear layers and not 1x1 convolutions: a matrix product reads a slice of a larger weight as it
    is, a convolution would copy it on every call.
    """

    def __init__(self, width: int, reduced: int):
        super().__init__()
        self.reduce = nn.Linear(width, reduced)
        self.expand = nn.Linear(reduced, width)

    def forward(self, x):
        """Shapes as in the class."""
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class InvertedResidual(nn.Module):
    """(N, C, H, W) -> (N, out, H / stride, W / stride): expand, filter each channel, project."""

    def __init__(self, block: Block):
        super().__init__()
        hidden, act = block.hidden, nn.Hardswish if block.swish else nn.ReLU
        self.expand = None if hidden == block.in_channels else _conv(
            block.in_channels, hidden, act=act
        )  # fmt: skip
        self.depthwise = _conv(hidden, hidden, block.kernel, block.stride, hidden, act)
        self.squeeze = SqueezeExcite(hidden, block.reduced) if block.squeezed else None
        self.project = _conv(hidden, block.out_channels)
        self.residual = block.stride == 1 and block.in_channels == block.out_channels

    def forward(self, x):
        """Shapes as in the class."""
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        if self.squeeze is not None:
            y = self.squeeze(y)
        y = self.project(y)
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """(N, 3, H, W) images -> (N, classes) logits, for one fixed configuration.

    An ordinary static network; block i of a stage is called the same at every depth, so that the
    tensors of a smaller one are slices of those of the largest.
    """

    def __init__(self, config: SubnetConfig, classes: int = 1000):
        super().__init__()
        self.config = config
        stem, *_, last, final, mixed = channels(config)
        self.stem = _conv(3, stem, 3, 2, act=nn.Hardswish)
        self.stages = nn.ModuleList(
            nn.Sequential(*map(InvertedResidual, blocks)) for blocks in stages(config)
        )
        self.final = _conv(last, final, act=nn.Hardswish)
        self.mix = nn.Linear(final, mixed, bias=False)
        self.head = nn.Linear(mixed, classes)

    def forward(self, x):
        """Shapes as in the class; images of another size are resized first."""
        size = self.config.resolution
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.hardswish(self.mix(self.final(x).mean((2, 3)))))


def layers(config: SubnetConfig, classes: int = 1000) -> list[LayerSpec]:
    """The layers of `MobileNetV3(config)` in order of execution, for MACs and board models."""
    stem, *_, last, final, mixed = channels(config)
    half = (config.resolution + 1) // 2
    specs = [LayerSpec("conv", 3, stem, 3, 2, in_size=config.resolution, out_size=half)]
    size = half
    for block in (block for stage in stages(config) for block in stage):
        hidden, kernel, stride = block.hidden, block.kernel, block.stride
        if hidden != block.in_channels:
            specs.append(LayerSpec("conv", block.in_channels, hidden, in_size=size, out_size=size))
        out = (size - 1) // stride + 1
        specs.append(LayerSpec("conv", hidden, hidden, kernel, stride, hidden, size, out))
        size = out
        if block.squeezed:
            specs.append(LayerSpec("linear", hidden, block.reduced))
            specs.append(LayerSpec("linear", block.reduced, hidden))
        specs.append(LayerSpec("conv", hidden, block.out_channels, in_size=size, out_size=size))
    specs.append(LayerSpec("conv", last, final, in_size=size, out_size=size))
    return [*specs, LayerSpec("linear", final, mixed), LayerSpec("linear", mixed, classes)]
