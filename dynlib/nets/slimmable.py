"""Slimmable networks: one width for the whole network, each width with its own statistics.

Slimmable Networks (arXiv 1812.08928) scale every layer by the same ratio; DS-Net (arXiv 2103.13258)
widens only the late stages of a MobileNetV1. Either way a width is one number, and `Supernet` keeps
the BatchNorm statistics of each: ``Supernet(slimmable_space(32), family="SlimmableResNet")``.
"""

from torch import nn
from torch.nn import functional as F

from dynlib.nets.chain import Row
from dynlib.nets.families import Family, register
from dynlib.space import SearchSpace, SubnetConfig

WIDTHS_PCT = tuple(range(35, 101, 5))
DSNET_WIDTHS = tuple(range(224, 641, 32))  # channels of stage 4; the narrowest and 13 wider ones


def slimmable_space(resolution: int, widths: tuple[int, ...] = WIDTHS_PCT) -> SearchSpace:
    """One input size in pixels and one width for all layers: percent, or DS-Net's channels."""
    return SearchSpace((resolution,), width=(widths,))


def share(channels: int, percent: int) -> int:
    """`percent` of `channels`."""
    exact = channels * percent / 100
    return max(1, round(exact))


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
    """A convolution of "same" padding without bias, and its BatchNorm."""
    same = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, same, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(conv, norm)


class _SlimmableRow(Row):
    """Stem, the blocks of ``body``, and a head on the mean over pixels."""

    def row(self):
        """As in `Row`: the blocks are ``body.0`` and so on."""
        yield "stem", self._stem
        for b, block in enumerate(self.body):
            yield f"body.{b}", block
        yield "head", self._head

    def _head(self, x):
        return self.head(x.mean((2, 3)))


class SlimmableResidual(nn.Module):
    """(N, C, H, W) -> (N, outputs, H / stride, W / stride): two 3x3, or 1x1, 3x3, 1x1 convolutions.

    Of a bottleneck the stride is in the 3x3 convolution. Where shapes differ the shortcut is a 1x1
    convolution (He et al., arXiv 1512.03385, option B).
    """

    def __init__(self, inputs: int, width: int, outputs: int, stride: int):
        super().__init__()
        if width == outputs:
            first = conv_norm(inputs, width, 3, stride)
            layers = [first, conv_norm(width, outputs, 3)]
        else:
            reduce = conv_norm(inputs, width, 1)
            middle = conv_norm(width, width, 3, stride)
            layers = [reduce, middle, conv_norm(width, outputs, 1)]
        self.layers = nn.ModuleList(layers)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x):
        """Shapes as in the class."""
        *first, last = self.layers
        y = x
        for layer in first:
            y = F.relu(layer(y), inplace=True)
        total = last(y) + self.shortcut(x)
        return F.relu(total, inplace=True)


class SlimmableResNet(_SlimmableRow):
    """(N, 3, H, W) -> (N, classes): a residual network at `config.width[0]` percent of its width.

    The defaults make ResNet-20 for 32-pixel images (arXiv 1512.03385, section 4.2). With
    `bottleneck` it has the stem and the four-fold outputs of ResNet-50: blocks (3, 4, 6, 3).
    """

    def __init__(
        self,
        config: SubnetConfig,
        classes: int = 10,
        *,
        blocks: tuple[int, ...] = (3, 3, 3),
        channels: int = 16,
        bottleneck: bool = False,
    ):
        super().__init__()
        self.config = config
        (percent,) = config.width
        inputs = share(channels, percent)
        if bottleneck:
            self.stem = conv_norm(3, inputs, kernel=7, stride=2)
            self.pool = nn.MaxPool2d(3, 2, 1)
        else:
            self.stem = conv_norm(3, inputs, kernel=3)
            self.pool = nn.Identity()
        body = []
        for stage, count in enumerate(blocks):
            full = channels * 2**stage
            width = share(full, percent)
            outputs = share(4 * full, percent) if bottleneck else width
            for block in range(count):
                first = stage > 0 and block == 0
                stride = 2 if first else 1
                body.append(SlimmableResidual(inputs, width, outputs, stride))
                inputs = outputs
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(inputs, classes)

    def _stem(self, images):
        return self.pool(F.relu(self.stem(images), inplace=True))


@register("SlimmableResNet")
def _resnet() -> Family:
    return Family(SlimmableResNet)


def mobilenet_plan(percent: int):
    """MobileNetV1 (arXiv 1704.04861, table 1): channels of the stem, and the blocks of the body.

    A block is (output channels, stride, hidden channels of its attention, 0 for none).
    """
    widths = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    halving = {128, 256, 512, 1024}  # at the first block of so many channels
    body = []
    for outputs in widths:
        stride = 2 if outputs in halving else 1
        halving -= {outputs}
        body.append((share(outputs, percent), stride, 0))
    return share(32, percent), body


def dsnet_plan(width: int):
    """DS-Net's MobileNetV1: attention everywhere, `width` and 512 more channels at the end.

    The attention's hidden channels are a quarter of its widest input in the released network,
    whose early stages were meant to be elastic too; hence the constants.
    """
    wide = width + 512
    body = [(32, 1, 6)]
    body += [(48, 2, 22), (48, 1, 42)]
    body += [(96, 2, 42), (96, 1, 66)]
    body += [(width, 2, 66), *[(width, 1, 160)] * 5]
    body += [(wide, 2, 160), (wide, 1, 288)]
    return 16, body


class Separable(nn.Module):
    """(N, C, H, W) -> (N, outputs, H / stride, W / stride): depth-wise 3x3, attention, 1x1.

    The attention scales channel c by ``sigmoid(W2 relu(W1 mean(x)))_c`` (DS-Net, section 3.3).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, hidden: int):
        super().__init__()
        self.depthwise = conv_norm(inputs, inputs, 3, stride, groups=inputs)
        self.attend = nn.Sequential()
        if hidden:
            self.attend.append(nn.Linear(inputs, hidden))
            self.attend.append(nn.ReLU())
            self.attend.append(nn.Linear(hidden, inputs))
            self.attend.append(nn.Sigmoid())
        self.pointwise = conv_norm(inputs, outputs, 1)
        self.act = F.silu if hidden else F.relu

    def forward(self, x):
        """Shapes as in the class."""
        x = self.act(self.depthwise(x), inplace=True)
        if len(self.attend):
            gate = self.attend(x.mean((2, 3)))
            x = x * gate[..., None, None]
        return self.act(self.pointwise(x), inplace=True)


class SlimmableMobileNet(_SlimmableRow):
    """(N, 3, H, W) -> (N, classes): a MobileNetV1; `plan` says what `config.width[0]` means."""

    def __init__(self, config: SubnetConfig, classes: int = 1000, *, plan=mobilenet_plan):
        super().__init__()
        self.config = config
        inputs, body = plan(config.width[0])
        self.stem = conv_norm(3, inputs, 3, 2)
        blocks = []
        for outputs, stride, hidden in body:
            blocks.append(Separable(inputs, outputs, stride, hidden))
            inputs = outputs
        self.act = blocks[0].act
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def _stem(self, images):
        return self.act(self.stem(images), inplace=True)


@register("SlimmableMobileNet")
def _mobilenet() -> Family:
    return Family(SlimmableMobileNet)
