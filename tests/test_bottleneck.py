"""Dynamic bottlenecks compute what their masks say, for every pattern, and refuse misfits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynlib._vision import timm
from dynlib.decide.bottleneck import Bottleneck, Columns, Patches
from dynlib.decide.decisions import Given, Kept, Sure
from dynlib.decide.maskers import ChannelMasker, PatchMasker
from dynlib.decide.walk import cascade, one_of
from dynlib.errors import ModelError
from dynlib.nets.chain import Chain, chain

GROUPS, SIDE, INNER = 4, 4, 16


def block_of(stride: int) -> nn.Module:
    """A block of timm with weights and statistics that are nowhere one or zero."""
    torch.manual_seed(stride)
    layers = timm.models.resnet
    inputs = 4 * INNER if stride == 1 else 24
    down = layers.downsample_conv(inputs, 4 * INNER, 1, stride) if stride > 1 else None
    block = layers.Bottleneck(inputs, INNER, stride, down).eval()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (norm.bias, norm.running_mean):
                nn.init.normal_(values, std=0.3)
    return block


BLOCKS = {stride: block_of(stride) for stride in (1, 2)}
# What comes to a block has passed the rectifier of the one before.
INPUTS = {stride: torch.randn(3, block.conv1.in_channels, 8 * stride, 8 * stride).relu()
          for stride, block in BLOCKS.items()}  # fmt: skip
STRIDES = st.sampled_from([1, 2])


class Unheard(nn.Module):
    """Stands for a masker whose decision is given."""

    def forward(self, x):
        return x


def masks(*shape: int):
    count = torch.Size(shape).numel()
    bits = st.lists(st.booleans(), min_size=count, max_size=count)
    return bits.map(lambda drawn: torch.tensor(drawn).view(shape))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_folded_it_is_the_block_of_timm(stride):
    block, x = BLOCKS[stride], INPUTS[stride]
    close(Bottleneck(block)(x), block(x.clone()))


@settings(max_examples=60, deadline=None)
@given(STRIDES, masks(3, 2, GROUPS), st.integers(1, 3))
def test_columns_compute_what_the_masks_say(stride, mask, count):
    columns = Columns(BLOCKS[stride], Unheard(), GROUPS, Given(mask))
    x = INPUTS[stride][:count]
    close(columns(x), columns.masked(x))


@settings(max_examples=60, deadline=None)
@given(STRIDES, masks(3, SIDE, SIDE), st.integers(1, 3))
def test_patches_compute_what_the_masks_say(stride, mask, count):
    patches = Patches(BLOCKS[stride], Unheard(), SIDE, Given(mask))
    x = INPUTS[stride][:count]
    close(patches(x), patches.masked(x))


@settings(max_examples=20, deadline=None)
@given(STRIDES, masks(3), st.integers(1, 3))
def test_a_skipped_block_is_its_shortcut(stride, mask, count):
    block, x = Bottleneck(BLOCKS[stride]), INPUTS[stride][:count]
    walk = one_of([block.bypass, block], Unheard(), Given(mask.long()), x[:1])
    close(walk(x), walk.masked(x))
    run = mask[:count, None, None, None]
    close(walk(x), torch.where(run, block(x), torch.relu(block.shortcut(x))))
    assert torch.equal(walk.visits(x)[:, 2], mask[:count])


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_everything_kept_is_the_block_and_nothing_kept_its_shortcut(stride):
    block, x = Bottleneck(BLOCKS[stride]), INPUTS[stride]
    for keep in (True, False):
        expected = block(x) if keep else block.bypass(x)
        decide = Given(torch.full((3, SIDE, SIDE), keep))
        close(Patches(BLOCKS[stride], Unheard(), SIDE, decide)(x), expected)
        # A mask of channels that keeps nothing would make a layer without inputs.
        decide = Given(torch.full((3, 2, GROUPS), keep))
        close(Columns(BLOCKS[stride], Unheard(), GROUPS, decide)(x), block(x))


@torch.no_grad()
def test_a_prefix_is_the_narrower_block():
    block, x = Bottleneck(BLOCKS[1]), INPUTS[1]
    mask = torch.tensor([True, True, False, False]).expand(3, 2, GROUPS)
    columns = Columns(BLOCKS[1], Unheard(), GROUPS, Given(mask))
    half = INNER // 2
    first, second, third = block.convs
    weight = first.weight[:half, :, None, None]
    hidden = torch.relu(nn.functional.conv2d(x, weight, first.bias[:half]))
    weight = second.weight[:half, :half]
    hidden = torch.relu(nn.functional.conv2d(hidden, weight, second.bias[:half], padding=1))
    weight = third.weight[:, :half, None, None]
    branch = nn.functional.conv2d(hidden, weight, third.bias)
    close(columns(x), torch.relu(branch + x))


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_batch_and_one_of_one_keep_their_shape(count):
    block, x = Bottleneck(BLOCKS[2]), INPUTS[2]
    channels = x.shape[1]
    for dynamic in (
        Columns(BLOCKS[2], ChannelMasker(channels, GROUPS), GROUPS, Kept()),
        Patches(BLOCKS[2], PatchMasker(channels, SIDE), SIDE, Kept()),
        one_of([block.bypass, block], PatchMasker(channels, 1), Kept(), x[:1]),
    ):
        assert dynamic(x[:count]).shape == (count, 4 * INNER, 8, 8)


def test_masks_that_nobody_knows_keep_the_whole_block():
    class Broken(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.shape = shape

        def forward(self, x):
            return torch.full((len(x), 2, *self.shape), torch.nan)

    block, x = Bottleneck(BLOCKS[1]), INPUTS[1]
    for dynamic in (
        Columns(BLOCKS[1], Broken(2, GROUPS), GROUPS, Kept()),
        Patches(BLOCKS[1], Broken(SIDE, SIDE), SIDE, Kept()),
        one_of([block.bypass, block], Broken(), Kept(), x[:1]),
    ):
        close(dynamic(x), block(x))


def test_what_does_not_fit_is_named():
    block, x = BLOCKS[1], INPUTS[1]
    channels = x.shape[1]
    with pytest.raises(ModelError, match="16 channels do not fall into 5 groups"):
        Columns(block, ChannelMasker(channels, 5), 5, Kept())
    with pytest.raises(ModelError, match="a map of 8 x 8 does not fall into 3 patches"):
        Patches(block, PatchMasker(channels, 3), 3, Kept())(x)
    with pytest.raises(ModelError, match="the masker does not fit the block"):
        Patches(block, PatchMasker(5, SIDE), SIDE, Kept())(x)
    with pytest.raises(ModelError, match=r"a mask of \(3, 2, 8\); expected \(3, 2, 4\)"):
        Columns(block, ChannelMasker(channels, 8), GROUPS, Kept())(x)
    with pytest.raises(ModelError, match="step 0 does not fit"):
        one_of([nn.Identity(), block], PatchMasker(5, 1), Kept(), x[:1])
    squeezed = timm.create_model("seresnet50").eval().layer1[0]
    for other in (squeezed, timm.models.resnet.Bottleneck(64, 16), nn.Identity()):
        with pytest.raises(ModelError, match="expected a plain bottleneck, in evaluation"):
            Bottleneck(other)


def test_a_dynamic_block_stands_in_a_chain_and_in_a_walk():
    torch.manual_seed(0)
    net = timm.create_model("resnet26", num_classes=10, zero_init_last=False).eval()
    images = torch.randn(3, 3, 32, 32)
    row = chain(net)
    name = "layer3.1"
    block = net.get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 2, 8, generator=generator) < 0.5
    columns = Columns(block, Unheard(), 8, Given(mask))
    dynamic = Chain(row.blocks | {name: columns})
    reference = Chain(row.blocks | {name: columns.masked})
    with torch.no_grad():
        close(dynamic(images), reference(images))
    assert not torch.allclose(dynamic(images), net(images))
    walk = cascade([net, net], [Sure(1.0)], images[:1])
    walk.steps[1] = walk.steps[1].__class__(dynamic, from_images=True)
    close(walk(images), reference(images))
