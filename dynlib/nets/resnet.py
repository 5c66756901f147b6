"""A residual network for 32-pixel images, laid out for fast training on few cores.

Dense 3x3 convolutions, early down-sampling and no depth-wise layers: a processor reaches several
times more of its peak on these than on inverted residuals of the same MACs. The stem whitens 2x2
patches and stays fixed; the others start as partial identities (Jordan, arXiv 2404.00498, sections
3.2 and 3.3).
"""

import torch
from torch import nn
from torch.nn import functional as F

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
        return x + F.relu(self.norm(self.conv(x)), inplace=True)


class Stage(nn.Module):
    """(N, C, H, W) -> (N, width, H // 2, W // 2): conv3x3, 2x2 max-pool, then `depth` residuals."""

    def __init__(self, in_channels: int, width: int, depth: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))

    def forward(self, x):
        """Shapes as in the class."""
        x = F.relu(self.norm(F.max_pool2d(self.conv(x), 2)), inplace=True)
        for block in self.blocks:
            x = block(x)
        return x


class ResNet(nn.Module):
    """(N, 3, H, W) images -> (N, classes) logits, for one fixed configuration.

    An ordinary static network. The super-network of a space is the one of its largest
    configuration; every other is built from prefix slices of the tensors of the same name.
    """

    def __init__(self, config: SubnetConfig, classes: int = 10):
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, STEM_CHANNELS, 2)
        inputs = (STEM_CHANNELS, *config.width[:-1])
        sizes = zip(inputs, config.width, config.depth, strict=True)
        self.stages = nn.ModuleList(Stage(*size) for size in sizes)
        self.head = nn.Linear(config.width[-1], classes)
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):  # starts as close to the identity as it can
                nn.init.dirac_(module.weight[: module.in_channels])
        nn.init.normal_(self.head.weight, std=1 / config.width[-1])
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        """Shapes as in the class; images of another size are resized first."""
        size = self.config.resolution
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.amax((2, 3)))


def layers(config: SubnetConfig, classes: int = 10) -> list[LayerSpec]:
    """The layers of `ResNet(config)` in order of execution, for MACs and board models."""
    size = config.resolution - 1
    specs = [LayerSpec("conv", 3, STEM_CHANNELS, 2, in_size=config.resolution, out_size=size)]
    channels = STEM_CHANNELS
    for width, depth in zip(config.width, config.depth, strict=True):
        specs.append(LayerSpec("conv", channels, width, 3, in_size=size, out_size=size))
        size //= 2
        specs += [LayerSpec("conv", width, width, 3, in_size=size, out_size=size)] * depth
        channels = width
    return [*specs, LayerSpec("linear", channels, classes)]


def whiten_stem(stem: nn.Conv2d, images: torch.Tensor, eps: float = 5e-4) -> None:
    """Set the stem to the whitening transform of the 2x2 patches of `images` (N, 3, H, W) in place.

    Both signs of every principal direction are kept, because a rectifier follows.
    """
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).movedim(1, 3).reshape(-1, 12).double()
    cov = patches.T @ patches / len(patches)
    values, vectors = torch.linalg.eigh(cov)
    filters = (vectors / (values + eps).sqrt()).T.reshape(12, 3, 2, 2).flip(0)
    with torch.no_grad():
        stem.weight.copy_(torch.cat([filters, -filters]))
        stem.bias.zero_()
