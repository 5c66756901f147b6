"""Bottlenecks of a ResNet that run only what is kept of them: LAUDNet (arXiv 2308.15949), executed.

    y = relu(s(x) + M * F(x)),   F(x) = W3 (c2 * relu(W2 (c1 * relu(W1 x))))

s is the shortcut, M a mask of patches, c1 and c2 are masks of channels. LAUDNet's code multiplies
by them; here what they drop is not computed. A dynamic block stands in a chain like any other:

    row = chain(net)
    name, block = "layer3.1", net.layer3[1]
    masker = ChannelMasker(1024, groups=32)
    dynamic = Chain(row.blocks | {name: Columns(block, masker, 32, Kept())})
    logits = dynamic(images)

To skip a whole block is to choose one of two: `walk.one_of([block.bypass, block], masker, ...)`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynlib.decide.walk import Decide, Seen
from dynlib.errors import ModelError

LAYERS = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "downsample")


class Pointwise(nn.Module):
    """A 1x1 convolution as one product of all pixels: (N, C, H, W) -> (N, C', H / s, W / s).

    With a stride and channels last torch's own takes two to three times as long.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = nn.Parameter(conv.weight.flatten(1))
        self.bias = conv.bias
        self.stride = conv.stride[0]

    def forward(self, x):
        """Shapes as in the class."""
        read = x[:, :, :: self.stride, :: self.stride].permute(0, 2, 3, 1)
        out = F.linear(read.contiguous(), self.weight, self.bias)
        return out.permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """(N, C, H, W) -> (N, C', H / stride, W / stride): one of timm, its normalisation folded in.

    Args:
        block: 1x1, 3x3 and 1x1 convolution, each normalised, in evaluation; its weights are copied.

    Raises `ModelError` for any other block, such as one with groups or with squeeze-excitation.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        if not _is_plain(block):
            raise ModelError(f"{type(block).__name__}: expected a plain bottleneck, in evaluation")
        first = Pointwise(fuse_conv_bn_eval(block.conv1, block.bn1))
        second = fuse_conv_bn_eval(block.conv2, block.bn2)
        third = Pointwise(fuse_conv_bn_eval(block.conv3, block.bn3))
        self.convs = nn.ModuleList([first, second, third])
        self.stride = block.stride
        self.shortcut = nn.Identity()
        if block.downsample is not None:
            *before, conv, norm = block.downsample
            projection = fuse_conv_bn_eval(conv, norm)
            if conv.kernel_size == (1, 1):
                projection = Pointwise(projection)
            self.shortcut = nn.Sequential(*before, projection)
        self.to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, x):
        """The whole block; shapes as in the class."""
        first, second, third = self.convs
        hidden = F.relu_(second(F.relu_(first(x))))
        return third(hidden).add_(self.shortcut(x)).relu_()

    def bypass(self, x):
        """The block without its branch; what comes from a block before is rectified already."""
        return x if isinstance(self.shortcut, nn.Identity) else F.relu_(self.shortcut(x))


class Columns(Bottleneck):
    """A bottleneck of which only some groups of inner channels run.

    A mask (n, 2, groups) says which behind the first and which behind the second layer; one that
    keeps none keeps all. Images with equal masks run together. Groups that are a prefix are views
    of the weights, others are gathered.

    Args:
        block: as of `Bottleneck`.
        masker: (n, C, H, W) -> logits (n, 2, 2, groups).
        groups: that the inner channels fall into.
        decide: logits -> mask.

    Raises `ModelError` where channels do not fall into groups, or masker and block do not fit.
    """

    def __init__(self, block: nn.Module, masker: nn.Module, groups: int, decide: Decide):
        super().__init__(block)
        inner = len(self.convs[0].weight)
        if groups < 1 or inner % groups:
            raise ModelError(f"{inner} channels do not fall into {groups} groups")
        self.masker = masker
        self.decide = decide
        self.groups = groups
        # What is gathered lies in rows: inner channels of the third layer, groups of the second.
        _, second, third = (conv.weight.detach() for conv in self.convs)
        self._third = third.T.contiguous()
        self._second = second.contiguous().view(inner * groups, -1)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """The mask of each image, (n, 2, groups) bool."""
        kept = _mask(self.masker, self.decide, x, (2, self.groups))
        return kept | ~kept.any(2, keepdim=True)

    @torch.no_grad()
    def forward(self, x):
        """Shapes as in the class."""
        kept = self.kept(x)
        if len(x) == 1 or len(patterns := kept.unique(dim=0)) == 1:
            return self._run(x, kept[0])
        out = F.relu(self.shortcut(x))
        for pattern in patterns:
            rows = (kept == pattern).all(2).all(1).nonzero()[:, 0]
            out[rows] = self._run(x[rows], pattern)
        return out

    def _run(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        first, second, third = self.convs
        each = len(first.weight) // self.groups
        inputs, outputs = (_places(row.repeat_interleave(each)) for row in kept)
        weight = first.weight[inputs]
        hidden = F.linear(x.permute(0, 2, 3, 1), weight, first.bias[inputs])
        hidden = F.relu_(hidden).permute(0, 3, 1, 2)
        if isinstance(inputs, slice) and isinstance(outputs, slice):
            weight = second.weight[outputs, inputs]
        else:
            outputs = kept[1].repeat_interleave(each).nonzero()
            rows = outputs * self.groups + kept[0].nonzero()[:, 0]
            outputs = outputs[:, 0]
            weight = self._second[rows.flatten()].view(len(outputs), -1, 3, 3)
        hidden = F.relu_(F.conv2d(hidden, weight, second.bias[outputs], self.stride, 1))
        branch = hidden.permute(0, 2, 3, 1) @ self._third[outputs]
        branch.add_(third.bias)
        return branch.permute(0, 3, 1, 2).add_(self.shortcut(x)).relu_()

    @torch.no_grad()
    def masked(self, x: torch.Tensor) -> torch.Tensor:
        """The same by definition: everything is computed, and multiplied by the masks."""
        each = len(self.convs[0].weight) // self.groups
        kept = self.kept(x).repeat_interleave(each, 2)
        c1, c2 = kept[..., None, None].unbind(1)
        first, second, third = self.convs
        hidden = c1 * F.relu(first(x))
        hidden = c2 * F.relu(second(hidden))
        return F.relu(third(hidden) + self.shortcut(x))


class Patches(Bottleneck):
    """A bottleneck that runs on some patches of its map; elsewhere its input goes on as it is.

    A mask (n, side, side) says on which. The first layer runs on their pixels and on those around,
    the second on the patches as a batch of small maps.

    Args:
        block: as of `Bottleneck`.
        masker: (n, C, H, W) -> logits (n, 2, side, side).
        side: number of patches along a side of the block's output.
        decide: logits -> mask.

    Raises `ModelError` where a map does not fall into the patches, or masker and block do not fit.
    """

    def __init__(self, block: nn.Module, masker: nn.Module, side: int, decide: Decide):
        super().__init__(block)
        self.masker = masker
        self.decide = decide
        self.side = side

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """The mask of each image, (n, side, side) bool."""
        if x.shape[2] != x.shape[3] or x.shape[2] % (self.side * self.stride):
            *_, height, width = x.shape
            raise ModelError(f"a map of {height} x {width} does not fall into {self.side} patches")
        return _mask(self.masker, self.decide, x, (self.side, self.side))

    @torch.no_grad()
    def forward(self, x):
        """Shapes as in the class.

        With two patches a side of a map of four pixels, and the upper right one kept::

            . . 2 3        . . . . . .
            . . 6 7        . 1 2 3 +         halo: rows 0-3, columns 2-5 of the padded map
            . . . .        . 5 6 7 +         (+ is its padding, of zeros), needed: 1 2 3 5 6 7
            . . . .        . 9 a b +         and 9 a b, for the 3x3 convolution
        """
        image, row, column = self.kept(x).nonzero(as_tuple=True)
        shortcut = self.shortcut(x)
        count, channels, whole, _ = shortcut.shape
        shortcut = _pixels(shortcut)
        out = F.relu(shortcut)
        if len(image):
            _, second, third = self.convs
            size = whole // self.side
            step = size * self.stride
            padded = x.shape[2] + 2
            reach = (size - 1) * self.stride + 3
            halo = _squares(image * padded + row * step, column * step, reach, padded)
            maps = self._around(x, halo, padded)[halo].permute(0, 3, 1, 2)
            maps = F.relu_(F.conv2d(maps, second.weight, second.bias, self.stride))
            branch = F.linear(_pixels(maps), third.weight, third.bias)
            own = _squares(image * whole + row * size, column * size, size, whole).flatten()
            out[own] = F.relu_(shortcut[own] + branch)
        return out.view(count, whole, whole, channels).permute(0, 3, 1, 2)

    def _around(self, x: torch.Tensor, halo: torch.Tensor, padded: int) -> torch.Tensor:
        """The first layer's pixels (n x padded x padded, inner), zero where nobody needs them."""
        first = self.convs[0]
        needed = torch.zeros(len(x), padded, padded, dtype=torch.bool)
        needed.view(-1)[halo.flatten()] = True
        image, row, column = needed[:, 1:-1, 1:-1].nonzero(as_tuple=True)
        side = padded - 2
        pixels = _pixels(x)[(image * side + row) * side + column]
        hidden = F.linear(pixels, first.weight, first.bias)
        inner = x.new_zeros(len(x) * padded**2, len(first.weight))
        inner[(image * padded + row + 1) * padded + column + 1] = F.relu_(hidden)
        return inner

    @torch.no_grad()
    def masked(self, x: torch.Tensor) -> torch.Tensor:
        """The same by definition: everything is computed, and multiplied by the mask."""
        first, second, third = self.convs
        branch = third(F.relu(second(F.relu(first(x)))))
        size = branch.shape[2] // self.side
        mask = self.kept(x).repeat_interleave(size, 1).repeat_interleave(size, 2)
        return F.relu(self.shortcut(x) + mask[:, None] * branch)


def _is_plain(block: nn.Module) -> bool:
    if not all(hasattr(block, name) for name in LAYERS) or block.training:
        return False
    extras = (block.se, block.drop_path)
    identities = isinstance(block.aa, nn.Identity) and isinstance(block.act1, nn.ReLU)
    plain = block.conv2.groups == 1 and block.conv2.dilation == (1, 1)
    return extras == (None, None) and identities and plain


def _mask(masker: nn.Module, decide: Decide, x: torch.Tensor, shape: tuple) -> torch.Tensor:
    """What `decide` keeps of each image, (n, *shape) bool."""
    try:
        said = masker(x)
    except RuntimeError as error:
        raise ModelError(f"the masker does not fit the block: {error}") from error
    kept = decide(Seen(torch.arange(len(x)), x, said))
    if kept.shape != (len(x), *shape):
        raise ModelError(f"a mask of {tuple(kept.shape)}; expected {(len(x), *shape)}")
    return kept.bool()


def _places(kept: torch.Tensor) -> slice | torch.Tensor:
    """Which of (channels,) are kept: a prefix as a slice, which makes views."""
    count = int(kept.sum())
    if kept[:count].all():
        return slice(count)
    return kept.nonzero()[:, 0]


def _pixels(maps: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, H, W) as rows (N x H x W, C): a view where channels lie last."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _squares(top: torch.Tensor, left: torch.Tensor, side: int, width: int) -> torch.Tensor:
    """Numbers (P, side, side) of the pixels of squares in rows of `width` pixels.

    `top` (P,) counts rows through all images, `left` (P,) columns.
    """
    along = torch.arange(side)
    rows = top[:, None] + along
    columns = left[:, None] + along
    return rows[:, :, None] * width + columns[:, None, :]
