"""The elastic vision transformer: slices, exactness, work."""

import copy
import operator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynlib.errors import ConfigError
from dynlib.nets.attention import Attention
from dynlib.nets.families import Family, find_family
from dynlib.nets.supernet import Supernet
from dynlib.nets.vit import ViT
from dynlib.space import SearchSpace, SubnetConfig

SPACE = SearchSpace(
    (16, 24, 32), ((1, 2, 3),), ((32, 48, 64),), (),
    ((32, 64, 128),) * 3, ((1, 2, 3),) * 3,
)  # fmt: skip
ALL = st.builds(
    lambda indices: SPACE.decode(indices),
    st.tuples(*(st.integers(0, len(choices) - 1) for _, choices in SPACE.axes())),
)


FAMILY = find_family("ViT", {})


def layers(config):
    return [spec for specs in FAMILY.layers(config, 10).values() for spec in specs]


@pytest.fixture(scope="module")
def supernet():
    torch.manual_seed(0)
    return Supernet(SPACE, family="ViT")


@settings(deadline=None, max_examples=25)
@given(ALL, st.integers(1, 3))
def test_prepared_networks_equal_extracted_ones(supernet, config, batch):
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    got = supernet.prepare(config)(images)
    assert torch.equal(got, copy.deepcopy(supernet).prepare(config)(images))
    want = supernet.extract(config)(images)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@settings(deadline=None, max_examples=15)
@given(ALL)
def test_a_slow_obvious_attention_of_the_first_heads_agrees(supernet, config):
    """Head by head, with the softmax written out, on hand-cut prefixes."""
    net = supernet.prepare(config)
    width, heads = config.width[0], config.heads[0]
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(2))
    large = supernet.net.blocks[0].attention
    want = large.proj.bias[:width]
    for head in range(heads):
        rows = slice(32 * head, 32 * head + 32)
        q, k, v = (
            x @ part.weight[rows, :width].T + part.bias[rows]
            for part in (large.q, large.k, large.v)
        )
        scores = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1)
        want = want + scores @ v @ large.proj.weight[:width, rows].T
    torch.testing.assert_close(net.blocks[0].attention(x), want.detach())


@settings(deadline=None, max_examples=15)
@given(ALL)
def test_layers_count_the_macs_and_weights_that_torch_counts(config):
    net = ViT(config).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(torch.randn(1, 3, config.resolution, config.resolution))
    specs = layers(config)
    assert sum(layer.macs for layer in specs) == counter.get_total_flops() / 2
    weights = (m.weight for m in net.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    assert sum(layer.params for layer in specs) == sum(weight.numel() for weight in weights)


def test_gradients_reach_only_the_prefix(supernet):
    supernet.zero_grad()
    supernet(torch.randn(2, 3, 32, 32), SPACE.smallest).square().sum().backward()
    for name, size in (("q", 32), ("k", 32), ("v", 32)):
        gradient = supernet.net.blocks[0].attention.get_submodule(name).weight.grad
        assert gradient[:size, :32].abs().sum() > 0
        assert gradient[size:].abs().sum() + gradient[:, 32:].abs().sum() == 0
    assert supernet.net.blocks[1].up.weight.grad is None
    position = supernet.net.position.grad[0, :32]
    assert position[:, 2:6, 2:6].abs().min() > 0  # 16 of 32 pixels: the central half of the grid
    assert position[:, :2].abs().sum() == 0


def test_blocks_beyond_the_depth_do_not_matter(supernet):
    images = torch.randn(1, 3, 32, 32)
    a = SubnetConfig(32, (1,), (48,), (), (64, 128, 64), (2, 3, 1))
    b = FAMILY.canonical(a, SPACE)
    assert b == SubnetConfig(32, (1,), (48,), (), (64, 32, 32), (2, 1, 1))
    assert FAMILY.canonical(SPACE.largest, SPACE) == SPACE.largest
    assert torch.equal(supernet.prepare(a)(images), supernet.prepare(b)(images))


def test_other_patches_and_heads():
    net = Supernet(SPACE, 5, build=partial(ViT, patch=8, head_dim=16))
    assert net.prepare(SPACE.smallest)(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert net.net.blocks[0].attention.q.out_features == 3 * 16
    assert net.layers(SPACE.largest)[0].out_size == 4


@settings(deadline=None, max_examples=5)
@given(ALL)
def test_its_own_list_of_layers_is_what_a_run_shows(config):
    recorded = Family(ViT).layers(config, 10)
    told = FAMILY.layers(config, 10)
    assert list(told) == list(recorded)
    for name, specs in told.items():
        key = operator.attrgetter("op", "in_channels", "out_channels")
        assert sorted(specs, key=key) == sorted(recorded[name], key=key)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="3 blocks"):
        ViT(SubnetConfig(32, (3,), (32,), (), (64, 64), (1, 1)))
    with pytest.raises(ConfigError, match="patch of 4"):
        layers(SubnetConfig(30, (1,), (32,), (), (64,), (1,)))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qkv_bias": True, "qk_norm": True}])
def test_fused_attention_is_taken_apart(options):
    from dynlib._vision import timm

    torch.manual_seed(0)
    fused = timm.layers.Attention(48, 3, norm_layer=torch.nn.LayerNorm, **options).double().eval()
    x = torch.randn(2, 7, 48, dtype=torch.double)
    separate = Attention.from_fused(fused)
    torch.testing.assert_close(separate(x), fused(x), rtol=1e-12, atol=1e-12)
    mask = torch.randn(7, 7, dtype=torch.double)
    torch.testing.assert_close(separate(x, attn_mask=mask), fused(x, attn_mask=mask))
