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
from dynlib.nets.chain import Row, resized
from dynlib.nets.families import BlockLayers, Family, register
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

# Channels at width 100 %: stem, first block, the five stages, final expansion, feature mix.
OFA_CHANNELS = (16, 16, 24, 40, 80, 112, 160, 960, 1280)
STRIDES = (2, 2, 2, 1, 2)
SQUEEZED = (False, True, False, True, True)
SWISH = (False, False, True, True, True)


def mobilenet_space(
    width: tuple[int, ...] = (100,),
    resolution: tuple[int, ...] = tuple(range(128, 225, 4)),
    depth: tuple[int, ...] = (2, 3, 4),
    kernel: tuple[int, ...] = (3, 5, 7),
    expand: tuple[int, ...] = (3, 4, 6),
) -> SearchSpace:
    """The same choices for every stage (`depth`) and block (`kernel` px, `expand` ratio).

    `width` is one place, the multiplier of all channels in percent. With the defaults it is
    Once-for-All's space.
    """
    stages = len(STRIDES)
    blocks = stages * max(depth)
    return SearchSpace(
        resolution,
        depth=(depth,) * stages,
        width=(width,),
        kernel=(kernel,) * blocks,
        expand=(expand,) * blocks,
    )


OFA_W10 = mobilenet_space((100,))
OFA_W12 = mobilenet_space((120,))


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `value`, at least one, at most 10 % below `value`."""
    multiples = int(value + divisor / 2) // divisor
    nearest = max(divisor, multiples * divisor)
    if nearest < 0.9 * value:
        nearest += divisor
    return nearest


def channels(config: SubnetConfig) -> list[int]:
    """`OFA_CHANNELS` at the width of `config`."""
    (percent,) = config.width
    return [make_divisible(full * percent / 100) for full in OFA_CHANNELS]


@dataclass(frozen=True, slots=True)
class BlockSizes:
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


def stages(config: SubnetConfig) -> list[list[BlockSizes]]:
    """The blocks of `config`: the fixed first one, then the active ones of the five stages.

    Raises `ConfigError` when it has not the places of this family.
    """
    places, rest = divmod(len(config.kernel), len(STRIDES))
    malformed = (
        rest,
        len(config.depth) != len(STRIDES),
        len(config.width) != 1,
        len(config.expand) != len(config.kernel),
        max(config.depth, default=0) > places,
    )
    if any(malformed):
        raise ConfigError(
            f"{config}: MobileNetV3 takes 5 depths, 1 width, and as many entries of kernel and "
            "expand for each stage as it may have blocks"
        )
    stem, first, *widths = channels(config)[:-2]
    fixed = BlockSizes(stem, stem, first, kernel=3, stride=1, squeezed=False, swish=False)
    result = [[fixed]]
    inputs = first
    for stage, width in enumerate(widths):
        blocks = []
        for i in range(config.depth[stage]):
            place = stage * places + i
            sizes = BlockSizes(
                in_channels=inputs,
                hidden=make_divisible(inputs * config.expand[place]),
                out_channels=width,
                kernel=config.kernel[place],
                stride=STRIDES[stage] if i == 0 else 1,
                squeezed=SQUEEZED[stage],
                swish=SWISH[stage],
            )
            blocks.append(sizes)
            inputs = width
        result.append(blocks)
    return result


def _conv(inputs: int, outputs: int, kernel=1, stride=1, groups=1, act=None) -> nn.Sequential:
    same = kernel // 2  # as many pixels as the images have
    conv = nn.Conv2d(inputs, outputs, kernel, stride, same, groups=groups, bias=False)
    parts = OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs))
    if act is not None:
        parts["act"] = act(inplace=True)
    return nn.Sequential(parts)


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
        means = x.mean((2, 3))
        hidden = F.relu(self.reduce(means))
        gate = F.hardsigmoid(self.expand(hidden))
        return x * gate[:, :, None, None]


class InvertedResidual(nn.Module):
    """(N, C, H, W) -> (N, out, H / stride, W / stride): expand, filter each channel, project."""

    def __init__(self, sizes: BlockSizes):
        super().__init__()
        inputs = sizes.in_channels
        hidden = sizes.hidden
        outputs = sizes.out_channels
        act = nn.Hardswish if sizes.swish else nn.ReLU
        self.expand = None
        if hidden != inputs:
            self.expand = _conv(inputs, hidden, act=act)
        self.depthwise = _conv(hidden, hidden, sizes.kernel, sizes.stride, hidden, act)
        self.squeeze = None
        if sizes.squeezed:
            self.squeeze = SqueezeExcite(hidden, sizes.reduced)
        self.project = _conv(hidden, outputs)
        self.residual = sizes.stride == 1 and inputs == outputs

    def forward(self, x):
        """Shapes as in the class."""
        y = x
        if self.expand is not None:
            y = self.expand(y)
        y = self.depthwise(y)
        if self.squeeze is not None:
            y = self.squeeze(y)
        y = self.project(y)
        return x + y if self.residual else y


class MobileNetV3(Row):
    """(N, 3, H, W) images -> (N, classes) logits, for one fixed configuration.

    An ordinary static network; block i of a stage is called the same at every depth, so that the
    tensors of a smaller one are slices of those of the largest. Images of another size are resized
    first.
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

    def row(self):
        """As in `Row`: block b of stage s is ``stages.s.b``."""
        yield "stem", self._stem
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(stage):
                yield f"stages.{s}.{b}", block
        yield "head", self._head

    def _stem(self, images):
        images = resized(images, self.config.resolution)
        return self.stem(images)

    def _head(self, x):
        features = self.final(x)
        means = features.mean((2, 3))
        mixed = F.hardswish(self.mix(means))
        return self.head(mixed)


@register("MobileNetV3")
def _family() -> Family:
    return Family(MobileNetV3, _describe, _canonical)


def _describe(config: SubnetConfig, classes: int) -> BlockLayers:
    stem, *_, last, final, mixed = channels(config)
    pixels = config.resolution
    size = (pixels + 1) // 2
    first = LayerSpec("conv", 3, stem, 3, 2, in_size=pixels, out_size=size)
    found = {"stem": [first]}
    for s, stage in enumerate(stages(config)):
        for b, sizes in enumerate(stage):
            found[f"stages.{s}.{b}"] = _describe_block(sizes, size)
            size = (size - 1) // sizes.stride + 1
    found["head"] = [
        LayerSpec("conv", last, final, in_size=size, out_size=size),
        LayerSpec("linear", final, mixed),
        LayerSpec("linear", mixed, classes),
    ]
    return found


def _describe_block(sizes: BlockSizes, in_size: int) -> list[LayerSpec]:
    inputs = sizes.in_channels
    hidden = sizes.hidden
    outputs = sizes.out_channels
    kernel = sizes.kernel
    stride = sizes.stride
    size = (in_size - 1) // stride + 1
    specs = []
    if hidden != inputs:
        specs.append(LayerSpec("conv", inputs, hidden, in_size=in_size, out_size=in_size))
    specs.append(LayerSpec("conv", hidden, hidden, kernel, stride, hidden, in_size, size))
    if sizes.squeezed:
        specs.append(LayerSpec("linear", hidden, sizes.reduced))
        specs.append(LayerSpec("linear", sizes.reduced, hidden))
    specs.append(LayerSpec("conv", hidden, outputs, in_size=size, out_size=size))
    return specs


def _canonical(config: SubnetConfig, space: SearchSpace) -> SubnetConfig:
    """`config` with the entries of the blocks it skips set to the first choice.

    Two configurations of `space` are the same network exactly if this is equal.
    """
    places = len(config.kernel) // len(STRIDES)
    smallest = space.smallest
    kernel = list(config.kernel)
    expand = list(config.expand)
    for place in range(len(kernel)):
        stage, block = divmod(place, places)
        if block >= config.depth[stage]:
            kernel[place] = smallest.kernel[place]
            expand[place] = smallest.expand[place]
    return replace(config, kernel=tuple(kernel), expand=tuple(expand))
