"""A residual network for 32-pixel images, laid out for fast training on few cores.

Dense 3x3 convolutions, early down-sampling and no depth-wise layers: a processor reaches several
times more of its peak on these than on inverted residuals of the same MACs. The stem whitens 2x2
patches and stays fixed; the others start as partial identities (Jordan, arXiv 2404.00498, sections
3.2 and 3.3).
"""

import torch
from torch import nn
from torch.nn import functional as F

from dynlib.nets.chain import Row, resized
from dynlib.nets.families import BlockLayers, Family, register
from dynlib.space import LayerSpec, SubnetConfig

STEM_CHANNELS = 24  # the 12 principal directions of a 2x2 RGB patch, each with both signs


class Residual(nn.Module):
    """(N, C, H, W) -> (N, C, H, W): x + act(norm(conv3x3(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        """Shapes as in the class."""
        y = self.norm(self.conv(x))
        return x + F.relu(y, inplace=True)


class Stage(nn.Module):
    """(N, C, H, W) -> (N, width, H // 2, W // 2): conv3x3 and 2x2 max-pool, which `depth` residual
    blocks follow: `reduce`, then each of `blocks`."""

    def __init__(self, in_channels: int, width: int, depth: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))

    def reduce(self, x):
        """Shapes as in the class."""
        pooled = F.max_pool2d(self.conv(x), 2)
        return F.relu(self.norm(pooled), inplace=True)


class ResNet(Row):
    """(N, 3, H, W) images -> (N, classes) logits, for one fixed configuration.

    An ordinary static network. The super-network of a space is the one of its largest
    configuration; every other is built from prefix slices of the tensors of the same name.
    Images of another size are resized first.
    """

    def __init__(self, config: SubnetConfig, classes: int = 10):
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, STEM_CHANNELS, 2)
        self.stages = nn.ModuleList()
        inputs = STEM_CHANNELS
        for width, depth in zip(config.width, config.depth, strict=True):
            self.stages.append(Stage(inputs, width, depth))
            inputs = width
        self.head = nn.Linear(inputs, classes)
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):  # starts as close to the identity as it can
                nn.init.dirac_(module.weight[: module.in_channels])
        nn.init.normal_(self.head.weight, std=1 / inputs)
        nn.init.zeros_(self.head.bias)

    def row(self):
        """As in `Row`: a stage's reduction, ``stages.0``, then ``stages.0.blocks.0`` and so on."""
        yield "stem", self._stem
        for s, stage in enumerate(self.stages):
            yield f"stages.{s}", stage.reduce
            for b, block in enumerate(stage.blocks):
                yield f"stages.{s}.blocks.{b}", block
        yield "head", self._head

    def _stem(self, images):
        images = resized(images, self.config.resolution)
        return F.relu(self.stem(images))

    def _head(self, x):
        largest = x.amax((2, 3))
        return self.head(largest)


@register("ResNet")
def _family() -> Family:
    return Family(ResNet, _describe)


def _describe(config: SubnetConfig, classes: int) -> BlockLayers:
    pixels = config.resolution
    size = pixels - 1
    stem = LayerSpec("conv", 3, STEM_CHANNELS, 2, in_size=pixels, out_size=size)
    found = {"stem": [stem]}
    channels = STEM_CHANNELS
    for s, depth in enumerate(config.depth):
        width = config.width[s]
        found[f"stages.{s}"] = [_conv3x3(channels, width, size)]
        size //= 2
        for b in range(depth):
            found[f"stages.{s}.blocks.{b}"] = [_conv3x3(width, width, size)]
        channels = width
    found["head"] = [LayerSpec("linear", channels, classes)]
    return found


def _conv3x3(inputs: int, outputs: int, size: int) -> LayerSpec:
    return LayerSpec("conv", inputs, outputs, 3, in_size=size, out_size=size)


def whiten_stem(stem: nn.Conv2d, images: torch.Tensor, eps: float = 5e-4) -> None:
    """Set the stem to the whitening transform of the 2x2 patches of `images` (N, 3, H, W) in place.

    Both signs of every principal direction are kept, because a rectifier follows.
    """
    windows = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, H - 1, W - 1, 2, 2)
    pixels_last = windows.movedim(1, 3)
    patches = pixels_last.reshape(-1, 12).double()
    covariance = patches.T @ patches / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    deviations = (values + eps).sqrt()
    scaled = vectors / deviations
    ascending = scaled.T.reshape(12, 3, 2, 2)
    filters = ascending.flip(0)  # the largest variance first
    both_signs = torch.cat([filters, -filters])
    with torch.no_grad():
        stem.weight.copy_(both_signs)
        stem.bias.zero_()
