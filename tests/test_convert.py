"""Real timm models of five families turned into super-networks: nothing lost, nothing mixed up."""

import copy
import functools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynlib._vision import timm
from dynlib.errors import CheckpointError, ModelError
from dynlib.nets.convert import elastify
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace

VIT = {"img_size": 32, "patch_size": 8, "depth": 3}
SWIN = {
    "img_size": 64,
    "embed_dim": 24,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}
SHORT = {"layers": (1, 1, 1, 1)}
MODELS = {
    "resnet18": {},
    "resnet26d": {"layers": (2, 1, 1, 1), "block_args": {"attn_layer": "se"}},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT | {"depth": 2, "qk_norm": True},
}
EACH = pytest.mark.parametrize("name", MODELS)


def create(name, seed=0, **options):
    """A timm model whose normalisations and statistics are far from the identity."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=7, **options).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn_like(value) * (0.2 if value.ndim < 2 else value.std() / 5)
                value += noise.abs() if key.endswith("running_var") else noise
    return model


@functools.cache
def converted(name):
    model = create(name, **MODELS[name])
    return model, elastify(model, resolution=(32,))


def some(supernet, count=1):
    rng = np.random.default_rng(0)
    return [supernet.space.smallest, *(supernet.space.sample(rng) for _ in range(count))]


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@EACH
def test_at_full_size_nothing_has_changed(name):
    model, supernet = converted(name)
    x = images(2, 3, 32, 32).double()
    want = copy.deepcopy(model).double()(x)
    got = supernet.prepare(supernet.space.largest).double()(x)
    assert want.std() > 1e-3
    assert distance(got, want) < 1e-5  # measured: below 1e-14


@EACH
def test_the_channels_are_sorted_and_the_model_is_left_alone(name):
    model, supernet = converted(name)
    fresh = create(name, **MODELS[name]).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())
    moved = [k for k, p in supernet.net.named_parameters() if k in fresh and (p != fresh[k]).any()]
    assert len(moved) > len(fresh) / 4


@EACH
def test_prepared_equals_extracted_and_the_work_is_right(name):
    _, supernet = converted(name)
    for config in some(supernet):
        calibrate(supernet, config, [images(4, 3, 32, 32, seed=2)])
        net, alone = supernet.prepare(config), supernet.extract(config)
        x = images(1, 3, 32, 32)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            want = alone(x)
        assert torch.equal(net(x), copy.deepcopy(supernet).prepare(config)(x))
        assert distance(net(x), want) <= 1e-6
        specs = supernet.layers(config)
        assert sum(s.macs for s in specs) == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)
        assert all(type(size) is int for s in specs for size in (s.in_size, s.out_size))
        layers = (m for m in alone.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        assert sum(s.params for s in specs) == sum(layer.weight.numel() for layer in layers)


@EACH
def test_the_smallest_is_small_and_learns(name):
    _, supernet = converted(name)
    space = supernet.space
    work = [sum(s.macs for s in supernet.layers(c)) for c in (space.smallest, space.largest)]
    assert work[0] < 0.4 * work[1]
    supernet.zero_grad()
    supernet(images(4, 3, 32, 32), space.smallest).logsumexp(1).sum().backward()
    slices = {k: v.shape for k, v in supernet.slices(space.smallest).items()}
    for key, parameter in supernet.net.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad.clone()
            inside = whole[tuple(map(slice, slices[key]))]
            assert torch.isfinite(inside).all(), key
            inside.zero_()
            assert not whole.any(), key


def test_what_is_elastic():
    space = converted("resnet18")[1].space
    assert space.depth == ((1, 2),) * 4
    assert space.width == ((32, 48, 64), (64, 96, 128), (128, 192, 256), (256, 384, 512))
    assert len(space.expand) == 8
    space = converted("vit_tiny_patch16_224")[1].space
    assert space == SearchSpace(
        (32,), ((1, 2, 3),), ((96, 144, 192),), (), ((384, 576, 768),) * 3, ((2, 3),) * 3
    )
    space = converted("convnext_atto")[1].space
    assert space.depth == ((1, 2), (1, 2), (1, 2, 3, 4, 5, 6), (1, 2))
    assert len(space.width) == 4
    assert len(space.expand) == 12
    for name in ("mobilenetv3_small_050", "efficientnet_b0"):
        space = converted(name)[1].space
        assert space.depth
        assert min(len(space.width), len(space.expand)) >= 6


def test_a_shorter_network_is_the_model_without_its_last_blocks():
    model, supernet = converted("vit_tiny_patch16_224")
    config = replace(supernet.space.largest, depth=(2,))
    calibrate(supernet, config, [images(1, 3, 32, 32)])
    short = copy.deepcopy(model)
    del short.blocks[2:]
    x = images(2, 3, 32, 32)
    assert distance(supernet.prepare(config)(x), short(x)) < 1e-5


def test_fewer_channels_are_the_model_with_the_least_ones_cut_out():
    """By hand on one bottleneck of known importance, for all tensors that touch its channels."""
    model = create("resnet18", **SHORT)
    dead = [3, 40, 41, 63]
    block = model.layer1[0]
    with torch.no_grad():
        block.conv1.weight[dead] = 0
        block.conv2.weight[:, dead] = 0
    supernet = elastify(
        model, resolution=(32,), width=(), depth=None, divisor=4, expand=(60 / 64,),
        modules=["layer1.0.conv1"],
    )  # fmt: skip
    assert supernet.space == SearchSpace((32,), expand=((60, 64),))
    small = supernet.space.smallest
    calibrate(supernet, small, [images(2, 3, 32, 32)])
    given = supernet.statistics[supernet.space.largest]
    measured = supernet.statistics[small]
    supernet.statistics[small] = {k: given[k][: len(v)] for k, v in measured.items()}
    x = images(2, 3, 32, 32)
    assert distance(supernet.prepare(small)(x), model(x)) < 1e-5


def test_filters_over_channels_keep_their_order():
    model = create("resnet26", **SHORT, block_args={"attn_layer": "eca"})
    supernet = elastify(model, resolution=(32,))
    assert len(supernet.space.expand) == 8
    x = images(2, 3, 32, 32).double()
    got = supernet.prepare(supernet.space.largest).double()(x)
    assert distance(got, copy.deepcopy(model).double()(x)) < 1e-5
    with pytest.raises(ModelError, match=r"layer1\.0\.conv3 .*se\.conv runs over channels"):
        elastify(model, resolution=(32,), modules=["layer1.0.conv3"])


def test_layers_that_are_recorded_as_one_keep_their_parts_together():
    """timm's ConvMlp is no graph to torch.fx, and a run without data forgives a long bias."""
    torch.manual_seed(0)
    tail = timm.models.vgg.ConvMlp(16, 32, kernel_size=1, mlp_ratio=2)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), tail, nn.Flatten(), nn.LazyLinear(7)).eval()
    x = images(2, 3, 8, 8)
    want = model(x)
    supernet = elastify(model, resolution=(8,), divisor=4)
    assert distance(supernet.prepare(supernet.space.largest)(x), want) < 1e-5
    assert supernet.space.width[0] == (8, 12, 16)
    assert supernet(x, supernet.space.smallest).shape == (2, 7)


def test_grouped_channels_are_refused_by_name_and_the_rest_is_elastic():
    model = create("resnet26", **SHORT, cardinality=32, base_width=4)
    held = r"layer1\.0\.conv2 has 32 groups of 4 channels"
    for layer in ("layer1.0.conv1", "layer1.0.conv2"):
        with pytest.raises(ModelError, match=f"{layer} cannot be elastic: {held}"):
            elastify(model, resolution=(32,), modules=[layer])
    supernet = elastify(model, resolution=(32,))
    assert len(supernet.space.width) == 5
    assert supernet.space.expand == ()
    config = supernet.space.smallest
    calibrate(supernet, config, [images(4, 3, 32, 32)])
    assert supernet.prepare(config)(images(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ["fc"]}, "fc cannot be elastic: its channels are the outputs of the model"),
        ({"modules": ["layer9.*"]}, r"layer9\.\*: the model has no such layer"),
        ({"modules": ["conv1"], "width": (1,)}, "conv1: no share of 64 channels is smaller"),
        ({"width": (0.5, 1.5)}, "up to 1"),
        ({"resolution": (32, 0)}, "0 px"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ModelError, match=message):
        elastify(create("resnet18", **SHORT), **{"resolution": (32,)} | options)


def test_a_model_that_cannot_be_read_is_refused():
    class Moody(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="give resolution"):
        elastify(Moody())
    with pytest.raises(ModelError, match="Moody cannot be read"):
        elastify(Moody(), resolution=(32,))
    with pytest.raises(ModelError, match="Input height"):
        elastify(create("vit_tiny_patch16_224", **VIT), resolution=(32, 64))


def test_several_resolutions():
    model = create("resnet18", **SHORT)
    supernet = elastify(model, resolution=(64, 32))
    large = supernet.space.largest
    assert large.resolution == 64
    x = images(2, 3, 64, 64)
    assert distance(supernet.prepare(large)(x), model(x)) < 1e-5
    small = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    half = replace(large, resolution=32)
    assert distance(supernet.prepare(half)(x), model(small)) < 1e-5


def test_a_checkpoint_comes_back_into_the_same_model(tmp_path):
    first, second = (elastify(create("resnet18", s, **SHORT), resolution=(32,)) for s in (0, 1))
    small, x = first.space.smallest, images(1, 3, 32, 32)
    calibrate(first, small, [images(4, 3, 32, 32)])
    path = first.save(tmp_path / "net.safetensors", dataset="x")
    assert second.load(path) == {"dataset": "x"}
    for config in (small, first.space.largest):
        assert torch.equal(first.prepare(config)(x), second.prepare(config)(x))
    narrow = elastify(create("resnet18", **SHORT), resolution=(32,), width=(0.25, 1))
    with pytest.raises(CheckpointError, match="another space"):
        narrow.load(path)


@pytest.mark.parametrize(("name", "options"), [("densenet121", {}), ("mobilevit_xxs", {})])
def test_models_of_many_coupled_channels_are_read_within_seconds(name, options):
    """Whatever is concatenated stays as it is; the search for what shrinks with it is bounded."""
    model = create(name, **options)
    start = time.monotonic()
    supernet = elastify(model, resolution=(64,))
    assert time.monotonic() - start < 60  # measured: 7 s, on two cores that others use as well
    x = images(2, 3, 64, 64).double()
    got = supernet.prepare(supernet.space.largest).double()(x)
    assert distance(got, copy.deepcopy(model).double()(x)) < 1e-5
    assert len(supernet.space.expand) + len(supernet.space.width) >= 10
    assert supernet(x.float(), supernet.space.smallest).shape == (2, 7)


class Branches(nn.Module):
    """Many convolutions whose outputs are concatenated."""

    def __init__(self, count):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 16, 3) for _ in range(count))
        self.head = nn.Linear(16 * count, 7)

    def forward(self, x):
        return self.head(torch.cat([branch(x) for branch in self.branches], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("count", "said"), [(3, "cat in .* needs all 16 channels"), (14, "cat in .* couples too much")]
)
def test_what_holds_channels_is_said(count, said):
    with pytest.raises(ModelError, match=rf"branches\.0 cannot be elastic: {said}"):
        elastify(Branches(count), resolution=(8,), modules=["branches.0"])


def test_rows_that_are_picked_by_number_keep_their_order():
    """The biases of Swin's attention: a row belongs to a distance, not to a channel."""
    model = create("swin_tiny_patch4_window7_224", **SWIN)
    supernet = elastify(model, resolution=(64,))
    assert any("bias_table" in name for name, _ in model.named_parameters())
    x = images(2, 3, 64, 64).double()
    got = supernet.prepare(supernet.space.largest).double()(x)
    assert distance(got, copy.deepcopy(model).double()(x)) < 1e-5


NAMED = {
    "resnet18": ({}, None),
    "mobilenetv3_small_050": ({}, None),
    "vit_tiny_patch16_224": ({"img_size": 32}, None),
    "vit_small_patch16_224": (VIT, VIT | {"num_classes": 7}),
    "swin_tiny_patch4_window7_224": (SWIN, SWIN | {"num_classes": 7}),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_checkpoint_opens_without_the_model_it_was_made_of(name, tmp_path, monkeypatch):
    options, created = NAMED[name]
    if created is not None:
        created = {"model_name": name, **created}
    size = options.get("img_size", 32)
    supernet = elastify(create(name, **options), resolution=(size,), created=created)
    small, x = supernet.space.smallest, images(2, 3, size, size)
    calibrate(supernet, small, [images(4, 3, size, size)])
    path = supernet.save(tmp_path / "net.safetensors", note="x")

    def never(*_, **__):
        raise AssertionError("elastified again")

    monkeypatch.setattr("dynlib.nets.convert.Structure", never)
    back, provenance = Supernet.from_checkpoint(path)
    assert provenance == {"note": "x"}
    for config in (small, supernet.space.largest):
        assert torch.equal(back.prepare(config)(x), supernet.prepare(config)(x))
        assert back.blocks(config) == supernet.blocks(config)
    assert supernet.load(back.save(tmp_path / "again.safetensors", note="y")) == {"note": "y"}
    assert (tmp_path / "again.safetensors").stat().st_size == path.stat().st_size


def test_a_model_that_its_name_does_not_make_is_not_opened(tmp_path):
    """Other depths, and the same weights that are used otherwise."""
    for options in (SHORT, {"act_layer": "gelu"}):
        supernet = elastify(create("resnet18", **options), resolution=(32,))
        path = supernet.save(tmp_path / "net.safetensors")
        with pytest.raises(CheckpointError, match=r"elastic ResNet' is not .* load it into"):
            Supernet.from_checkpoint(path)
    with pytest.raises(ModelError, match=r"created: timm makes another model of .*resnet18"):
        elastify(create("resnet18", **SHORT), created={"model_name": "resnet18"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "hf-hub:some/where"}, "timm has no model 'hf-hub:some/where'"),
        ({"model_name": None}, "timm has no model 'None'"),
        ({"checkpoint_path": "/etc/passwd"}, r"made without \['checkpoint_path'\]"),
        ({"pretrained": True}, r"made without \['pretrained'\]"),
        ({"layers": [1, 1, 1, 10**9]}, "numbers up to 4096"),
        ({"layers": 3}, "no elastic model of"),
        ({"unheard": 3}, "unexpected keyword"),
        ({"model_name": "resnet50", "base_width": 4096}, "more than 1073741824 parameters"),
        ({"num_classes": 8}, r"fc.bias has shape \(7,\), expected \(8,\)"),
    ],
)
def test_a_checkpoint_cannot_ask_for_what_it_likes(changes, message, tmp_path):
    model = create("resnet18", **SHORT)
    created = {"model_name": "resnet18", "num_classes": 7, **SHORT}
    supernet = elastify(model, resolution=(32,), created=created)
    supernet.options["created"] |= changes
    path = supernet.save(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Supernet.from_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 3},
        {"groups": [["width", 1, [["nowhere", 0]]]]},
        {"groups": [["width", 1, [["fc.weight", 7]]]]},
        {"groups": [["depth", 1, [["fc.weight", 1]]]]},
        {"groups": [["width", 0, [["fc.weight", 1]]]]},
        {"groups": []},
        {"stages": ["layer9"]},
        {"stages": ["conv1"]},
        {"stages": []},
        {"more": 1},
    ],
)
def test_a_checkpoint_with_malformed_groups_is_refused(changes, tmp_path):
    created = {"model_name": "resnet18", "num_classes": 7}
    supernet = elastify(create("resnet18"), resolution=(32,), created=created)
    supernet.options |= changes
    path = supernet.save(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"net\.safetensors"):
        Supernet.from_checkpoint(path)


def test_blocks_with_names_keep_them():
    """Its stages are sequences of named blocks, which a deleted slice would rename."""
    model = create("efficientvit_b0")
    supernet = elastify(model, resolution=(64,))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want, got = model(images), supernet.prepare(supernet.space.largest).eval()(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    names = set(model.state_dict())
    calibrate(supernet, supernet.space.smallest, [images])
    assert set(supernet.prepare(supernet.space.smallest).state_dict()) < names


def short():
    return create("resnet18", **SHORT)


def grey():
    return create("resnet18", **SHORT, in_chans=1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: "resnet18", {}, r"model: 'resnet18', expected a network, such as timm.create"),
        (grey, {}, r"on images \(1, 3, 32, 32\): .*channels"),
        (short, {"width": 0.5}, r"width: 0.5, .* such as \(0.5,\)"),
        (short, {"resolution": 64}, r"resolution: 64, .* \(64,\)"),
        (short, {"modules": "fc"}, r"modules: 'fc', expected several"),
    ],
)  # fmt: skip
def test_what_is_no_argument_is_said_in_words(make, options, message):
    with pytest.raises(ModelError, match=message):
        elastify(make(), **{"resolution": (32,)} | options)


class Placed(nn.Module):
    """Channels of a convolution meet a table whose entries belong to places, as biases of attention
    do: run without weights it cannot be told from channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.other = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 7)

    def forward(self, x):
        x = self.conv(x).mean((2, 3), keepdim=True)
        x = self.other(x.cumsum(1)).flatten(1)
        return self.head(x)


def test_channels_that_cannot_change_places_stay_and_it_is_said():
    torch.manual_seed(0)
    model = Placed().eval()
    supernet = elastify(model, resolution=(8,), divisor=4)
    x = images(2, 3, 8, 8)
    assert distance(supernet.prepare(supernet.space.largest)(x), model(x)) < 1e-5
    report = supernet.report.set_index("part")
    assert report.loc["conv", "why_not"] == "its channels cannot change places"
    assert report.loc["other", "choices"] == (8, 12, 16)
    with pytest.raises(ModelError, match="conv cannot be elastic: its channels cannot change"):
        elastify(model, resolution=(8,), modules=["conv"])


def test_the_report_names_every_layer():
    supernet = elastify(create("resnet26", **SHORT, cardinality=32, base_width=4), resolution=(32,))
    report = supernet.report.set_index("part")
    assert report.loc["fc", "why_not"] == "its channels are the outputs of the model"
    assert report.loc["layer1.0.conv2", "why_not"] == "layer1.0.conv2 has 32 groups of 4 channels"
    assert report.loc["conv1", "elastic"] == "width"
    for name, module in supernet.net.named_modules():
        assert not isinstance(module, nn.Conv2d | nn.Linear) or name in report.index
    assert (report["why_not"] == "").sum() == (report["elastic"] != "").sum()
