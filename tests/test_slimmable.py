"""Slimmable networks: published sizes, the function of timm's networks, statistics per width."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dynlib._vision import timm
from dynlib.errors import ConfigError, ModelError
from dynlib.nets.families import Family
from dynlib.nets.slimmable import (
    DSNET_WIDTHS,
    WIDTHS_PCT,
    Separable,
    SlimmableMobileNet,
    SlimmableResNet,
    dsnet_plan,
    slimmable_space,
)
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SubnetConfig

ResNet50 = partial(SlimmableResNet, blocks=(3, 4, 6, 3), channels=64, bottleneck=True)
DSNet = partial(SlimmableMobileNet, plan=dsnet_plan)


def macs(build, width, resolution=224, classes=1000):
    config = SubnetConfig(resolution, width=(width,))
    blocks = Family(build).layers(config, classes).values()
    return sum(layer.macs for block in blocks for layer in block)


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (SlimmableMobileNet, {100: "569e6", 75: "325e6", 50: "150e6", 25: "41e6"}),
        (ResNet50, {100: "4.1e9", 75: "2.3e9", 50: "1.1e9", 25: "0.28e9"}),
    ],
)
def test_work_is_what_slimmable_networks_published(build, published):
    for width, want in published.items():
        digits = len(want.partition("e")[0].partition(".")[2])
        half = 0.5 * 10 ** (int(want[-1]) - digits)  # of the last published digit
        # One per cent of it more: the half-wide MobileNet has 149.497 M.
        assert abs(macs(build, width) - float(want)) <= 1.01 * half, (width, want)


def dsnet_pooling(width):
    """Additions of DS-Net's average pools, which its authors count as multiply-accumulates."""
    with torch.device("meta"):
        net, seen = DSNet(SubnetConfig(224, width=(width,)), 1000).eval(), []
        for module in net.modules():
            if isinstance(module, Separable):
                module.depthwise.register_forward_hook(lambda *a: seen.append(a[2].numel()))
        net.body[-1].register_forward_hook(lambda *a: seen.append(a[2].numel()))
        net(torch.empty(1, 3, 224, 224))
    return sum(seen)


def test_dsnet_has_the_published_work_at_all_14_widths():
    published = [133, 153, 175, 200, 226, 255, 286, 319, 355, 393, 433, 475, 519, 565]
    got = [round((macs(DSNet, w) + dsnet_pooling(w)) / 1e6) for w in DSNET_WIDTHS]
    assert got == published


def test_dsnet_has_the_parameters_counted_in_the_released_network():
    for index, millions in ((0, 2.66), (4, 3.85), (9, 5.65)):
        with torch.device("meta"):
            net = DSNet(SubnetConfig(224, width=(DSNET_WIDTHS[index],)), 1000)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("build", "name"), [(ResNet50, "resnet50"), (SlimmableMobileNet, "mobilenetv1_100")]
)
def test_at_full_width_it_computes_what_timm_computes(build, name):
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False).double().eval()
    ours = build(SubnetConfig(64, width=(100,)), 1000).double().eval()
    for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.bias.data.uniform_(-0.1, 0.1)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.running_mean.uniform_(-0.1, 0.1)
    values = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        want, got = theirs(images), ours(images)
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()


FAMILIES = [
    (SlimmableResNet, slimmable_space(16)),
    (partial(SlimmableResNet, blocks=(1, 1), channels=8, bottleneck=True), slimmable_space(32)),
    (SlimmableMobileNet, slimmable_space(32, (10, 25, 30))),
    (DSNet, slimmable_space(32, DSNET_WIDTHS[:2])),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=["resnet", "bottleneck", "mobilenet", "dsnet"])
def supernet(request):
    build, widths = request.param
    torch.manual_seed(0)
    return Supernet(widths, 10, build=build)


def test_there_are_14_widths():
    assert len(WIDTHS_PCT) == len(DSNET_WIDTHS) == slimmable_space(32).size == 14
    assert SlimmableResNet(SubnetConfig(32, width=(35,))).stem[0].out_channels == 6


@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_layers_count_the_macs_that_torch_counts(supernet, data):
    config = data.draw(st.sampled_from(list(supernet.space)))
    size = config.resolution
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        supernet.kind.build(config, 10).eval()(torch.empty(1, 3, size, size))
    assert sum(layer.macs for layer in supernet.layers(config)) == counter.get_total_flops() / 2


def test_every_width_has_statistics_of_its_own(supernet):
    small, large = supernet.space.smallest, supernet.space.largest
    size = small.resolution
    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1))
    supernet.statistics.clear()
    first = calibrate(supernet, small, [images])
    with pytest.raises(ModelError):
        supernet.prepare(large)
    second = calibrate(supernet, large, [images])
    assert first.keys() == second.keys()
    deep = [k for k in first if k.startswith("body") and k.endswith("mean")][-1]
    assert not torch.allclose(first[deep], second[deep][: len(first[deep])])
    for config in (small, large):
        prepared, alone = supernet.prepare(config), supernet.extract(config)
        got, want = prepared(images), alone(images)
        assert got.shape == (16, 10)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_width_in_between_is_refused(supernet):
    config = supernet.space.largest
    with pytest.raises(ConfigError, match="width0"):
        supernet.layers(SubnetConfig(config.resolution, width=(config.width[0] - 1,)))
