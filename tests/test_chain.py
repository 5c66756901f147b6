"""Chains: the blocks of a network, one after the other, are the network."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import calibrated
from test_convert import MODELS, converted, some
from torch import nn

from dynlib.errors import ModelError
from dynlib.nets.chain import Chain, chain
from dynlib.nets.convert import elastify
from dynlib.nets.mobilenet import mobilenet_space
from dynlib.nets.slimmable import DSNET_WIDTHS, SlimmableMobileNet, dsnet_plan, slimmable_space
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace, SubnetConfig
from suite.papers.incremental import increment_space

VIT_SPACE = SearchSpace((16, 24), ((1, 2, 3),), ((32, 48),), (), ((32, 64),) * 3, ((1, 2),) * 3)
RESNET_SPACE = SearchSpace((12, 16), ((1,), (0, 1, 2)), ((4, 8), (6, 8, 12)))
MOBILENET_SPACE = mobilenet_space((25, 50), (32, 48), (1, 2), (3, 5), (2, 3))
DSNET = {"build": partial(SlimmableMobileNet, plan=dsnet_plan)}
OURS = {
    "resnet": (RESNET_SPACE, {"family": "ResNet"}),
    "mobilenet": (MOBILENET_SPACE, {"family": "MobileNetV3"}),
    "vit": (VIT_SPACE, {"family": "ViT"}),
    "slim": (slimmable_space(16), {"family": "SlimmableResNet"}),
    "slim mobilenet": (slimmable_space(32, (10, 25)), {"family": "SlimmableMobileNet"}),
    "dsnet": (slimmable_space(32, DSNET_WIDTHS[:2]), DSNET),
    "increments": (increment_space(3, 16), {"family": "IncrementalCNN"}),
}


@pytest.fixture(scope="module", params=OURS)
def supernet(request):
    space, kind = OURS[request.param]
    torch.manual_seed(0)
    return Supernet(space, 10, **kind)


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def prepared(supernet, config):
    calibrate(supernet, config, [images(config.resolution, 4)])
    return supernet.prepare(config)


def assert_is_the_network(net, x, data):
    """Whole, block by block, and in pieces cut anywhere."""
    row = chain(net)
    want = net(x)
    assert torch.equal(row(x), want)
    names = data.draw(st.lists(st.sampled_from(row.names[:-1]), unique=True))
    names.sort(key=row.names.index)
    pieces = row.cut(names)
    assert tuple(itertools.chain(*(piece.names for piece in pieces))) == row.names
    assert [piece.names[-1] for piece in pieces[:-1]] == names
    assert torch.equal(Chain(dict(enumerate(pieces)))(x), want)


@torch.no_grad()
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_the_blocks_of_our_families_are_the_network(supernet, data):
    space = supernet.space
    config = space.decode([data.draw(st.integers(0, len(c) - 1)) for _, c in space.axes()])
    x = images(data.draw(st.sampled_from([config.resolution, space.resolution[-1]])))
    assert_is_the_network(prepared(supernet, config), x, data)


@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_layers_are_those_of_the_blocks(supernet, data):
    """Each block has the weights that its layers say, and names that the largest network has."""
    space = supernet.space
    config = space.decode([data.draw(st.integers(0, len(c) - 1)) for _, c in space.axes()])
    blocks = supernet.blocks(config)
    assert tuple(blocks) == chain(supernet.kind.build(config, 10)).names
    assert set(blocks) <= set(supernet.blocks(space.largest))
    assert [spec for specs in blocks.values() for spec in specs] == supernet.layers(config)
    assert all(blocks.values())


def test_the_blocks_of_a_residual_network_have_their_own_layers():
    blocks = Supernet(RESNET_SPACE).blocks(SubnetConfig(16, (1, 2), (8, 12)))
    assert list(blocks) == [
        "stem", "stages.0", "stages.0.blocks.0",
        "stages.1", "stages.1.blocks.0", "stages.1.blocks.1", "head",
    ]  # fmt: skip
    layers = [spec for (spec,) in blocks.values()]
    assert [spec.in_channels for spec in layers] == [3, 24, 8, 8, 12, 12, 12]
    assert [spec.out_channels for spec in layers] == [24, 8, 8, 12, 12, 12, 10]


@torch.no_grad()
@settings(deadline=None, max_examples=2)
@given(data=st.data())
@pytest.mark.parametrize("name", MODELS)
def test_elastified_models_are_chains(name, data):
    _, supernet = converted(name)
    for config in some(supernet):
        net = prepared(supernet, config)
        assert_is_the_network(net, images(32), data)
        assert_is_the_network(net, images(40), data)  # resized in the stem
        blocks = supernet.blocks(config)
        assert tuple(blocks) == chain(net).names
        assert set(blocks) <= set(supernet.blocks(supernet.space.largest))
        assert all(blocks.values())


def test_elastified_models_are_cut_between_the_blocks_of_their_stages():
    names = {
        name: chain(converted(name)[0]).names
        for name in ("resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224")
    }
    stages = [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert names["resnet18"] == ("stem", *stages, "head")
    assert names["vit_tiny_patch16_224"] == ("stem", "blocks.0", "blocks.1", "blocks.2", "head")
    start = ("stem", "stages.0.blocks.0", "stages.0.blocks.1", "stages.1", "stages.1.blocks.0")
    assert names["convnext_atto"][:5] == start
    assert names["mobilenetv3_small_050"][:4] == ("stem", "blocks.0.0", "blocks.1.0", "blocks.1.1")


def test_a_chain_shares_the_parameters_and_follows_the_shared_weights():
    _, supernet = converted("resnet18")
    net = prepared(supernet, supernet.space.smallest)
    row = chain(net)
    x = images(32)
    before = row(x)
    with torch.no_grad():
        net.get_submodule("layer2.0.conv1").weight.mul_(2)
        assert torch.equal(row(x), net(x))
        net.get_submodule("layer2.0.conv1").weight.div_(2)
        assert torch.equal(row(x), before)


def test_a_model_without_blocks_is_refused_but_its_layers_are_known():
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 7))
    with pytest.raises(ModelError, match="Sequential cannot be cut"):
        chain(plain)
    supernet = elastify(plain, resolution=(8,))
    assert [len(specs) for specs in supernet.blocks(supernet.space.largest).values()] == [2]

    class Moody(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="Moody cannot be read"):
        chain(Moody())


@pytest.mark.parametrize(
    "behind", [["head"], ["nowhere"], ["stages.1", "stages.0"], ["stages.0", "stages.0"]]
)
def test_a_cut_that_leaves_no_pieces_in_order_is_refused(behind):
    net = calibrated([RESNET_SPACE.largest]).prepare(RESNET_SPACE.largest)
    with pytest.raises(ModelError, match=f"cannot cut behind '{behind[-1]}'; expected one of"):
        chain(net).cut(behind)
