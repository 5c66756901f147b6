"""MobileNetV3 of Once-for-All: published sizes, slices, transformed kernels, published weights."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dynlib.errors import CheckpointError, ConfigError, ModelError
from dynlib.nets.families import find_family
from dynlib.nets.mobilenet import OFA_W10, OFA_W12, MobileNetV3, channels, mobilenet_space
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training.trainer import evaluate
from suite.papers.ofa_weights import imagenet, load_ofa

FAMILY = find_family("MobileNetV3", {})
SMALL = mobilenet_space((25, 50), (32, 48), depth=(1, 2), kernel=(3, 5, 7), expand=(2, 3))
CONFIGS = st.integers(0, 2**32 - 1).map(lambda seed: SMALL.sample(np.random.default_rng(seed)))

# level, resolution, depth, kernel, expand, MMACs, M parameters (Dynamic-OFA, width 1.2)
LEVELS = """
6.0 176 32322 57773557775353373377 64464364644646464334 235.5 5.339
6.1 176 32332 73577357575353353337 64444666334646634333 254.0 5.900
6.2 192 33333 55737773777577737777 34344443443344444444 288.8 6.340
6.3 208 23334 73535733555777553337 66334433644464464633 375.5 7.121
6.4 224 24443 53377333753575737757 66434663463466664446 522.1 7.766
6.5 224 44444 55555773577777557555 66666646646666666663 731.1 9.718
7.0 176 32322 57773557775353373377 64464364644646464334 235.5 5.339
7.1 176 32333 73735333573557373353 66444643444466644334 290.0 6.511
7.2 176 43433 55755555573755533535 66444663646466634334 349.2 6.749
7.3 208 23334 73535733555777553337 66334433644464464633 375.5 7.121
7.4 208 33443 55577333777775573355 64444363644664344664 442.0 7.857
7.5 224 34444 55357373773755737753 44436646466666646664 590.8 9.615
7.6 224 44444 55555773577777557555 66666646646666666663 731.1 9.718
"""
# kernel, expand, depth, resolution, MMACs without squeeze-and-excitation
WITHOUT_SQUEEZE = """
3 3 2 160 99.93
3 3 2 176 123.26
3 3 2 192 142.44
3 3 2 208 170.17
3 3 2 224 192.68
5 4 3 160 197.80
5 4 3 176 244.20
5 4 3 192 283.37
5 4 3 208 338.52
5 4 3 224 384.51
7 6 4 160 429.91
7 6 4 176 530.50
7 6 4 192 617.61
7 6 4 208 737.18
7 6 4 224 839.44
53775375757377555777 34664636366466363434 43324 176 314.93
55553555573533373357 46646346633443344663 33433 208 381.69
37735377333335735333 43646446464334443666 34232 176 269.20
53735573777577733337 33663633466333363666 42424 176 287.50
77533533337777737373 43444646463464466333 33223 208 326.77
73357337573375757355 36464663363433334444 23333 224 349.90
53333557377337535335 66336634366644633363 23443 208 412.73
73737557557355557733 43446446634663446344 42433 224 447.79
33735755377575355377 46363346433643646634 22433 160 188.59
53375375773373357375 63344466463364436436 32424 208 343.85
"""


def layers(config, classes=1000):
    return [spec for specs in FAMILY.layers(config, classes).values() for spec in specs]


def digits(text, count):
    return tuple(map(int, text)) * (count if len(text) == 1 else 1)


def published(kernel, expand, depth, resolution):
    entries = digits(depth, 5), (120,), digits(kernel, 20), digits(expand, 20)
    return OFA_W12.check(SubnetConfig(int(resolution), *entries))


def params(config):
    with torch.device("meta"):
        return sum(p.numel() for p in MobileNetV3(config).parameters())


@pytest.mark.parametrize("line", LEVELS.split("\n")[1:-1])
def test_the_published_levels_have_their_macs_and_parameters(line):
    _, resolution, depth, kernel, expand, mmacs, millions = line.split()
    config = published(kernel, expand, depth, resolution)
    assert f"{sum(spec.macs for spec in layers(config)) / 1e6:.1f}" == mmacs
    assert f"{params(config) / 1e6:.3f}" == millions


@pytest.mark.parametrize("line", WITHOUT_SQUEEZE.split("\n")[1:-1])
def test_the_published_geometry_has_its_macs(line):
    *config, mmacs = line.split()
    specs = layers(published(*config))
    counted = [spec for spec in specs[:-2] if spec.op == "conv"] + specs[-2:]
    assert f"{sum(spec.macs for spec in counted) / 1e6:.2f}" == mmacs


def test_the_ends_of_the_published_spaces():
    ends = [params(end) for end in (OFA_W12.smallest, OFA_W12.largest)]
    assert [f"{count / 1e6:.2f}" for count in ends] == ["4.60", "10.70"]
    assert [OFA_W10.resolution[0], *np.unique(np.diff(OFA_W10.resolution))] == [128, 4]
    assert channels(OFA_W12.largest) == [24, 24, 32, 48, 96, 136, 192, 1152, 1536]
    with pytest.raises(ConfigError, match="5 depths"):
        MobileNetV3(SubnetConfig(224, (2, 2), (100,), (3,) * 8, (3,) * 8))


@settings(deadline=None, max_examples=10)
@given(CONFIGS)
def test_layers_count_the_macs_that_torch_counts(config):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        MobileNetV3(config, 10).eval()(torch.empty(1, 3, config.resolution, config.resolution))
    assert sum(spec.macs for spec in layers(config, 10)) == counter.get_total_flops() / 2


@pytest.fixture(scope="module", params=[False, True], ids=["crop", "transform"])
def supernet(request):
    torch.manual_seed(0)
    net = Supernet(SMALL, 10, family="MobileNetV3", transform=request.param)
    with torch.no_grad():
        for name, parameter in net.net.named_parameters():
            if name.endswith("_matrix"):
                parameter += 0.1 * torch.randn_like(parameter)
            elif "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return net


def images(seed, count=2, size=48):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def kernels_by_hand(net, name, shape):
    """The centre of a depth-wise kernel, transformed step by step, one channel after another."""
    matrices = dict(net.named_parameters())
    weight = matrices[name].double().numpy()[: shape[0]]
    for large, small in ((7, 5), (5, 3)):
        if weight.shape[-1] == large and shape[-1] < large:
            key = name.replace("weight", f"{large}to{small}_matrix")
            eye = torch.eye(small**2)
            matrix = matrices.get(key, eye).double().numpy()
            centre = weight[:, 0, 1:-1, 1:-1].reshape(shape[0], -1)
            rows = [[sum(m * c) for m in matrix] for c in centre]
            weight = np.array(rows).reshape(shape[0], 1, small, small)
    return torch.from_numpy(weight).float()


@torch.no_grad()
@settings(deadline=None, max_examples=8)
@given(CONFIGS)
def test_a_slow_obvious_network_gives_the_same_output(supernet, config):
    calibrate(supernet, config, [images(1, 8)])
    plain, big = MobileNetV3(config, 10), dict(supernet.net.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.ndim == 4 and "depthwise" in name:
            parameter.copy_(kernels_by_hand(supernet.net, name, parameter.shape))
        else:
            parameter.copy_(big[name][tuple(map(slice, parameter.shape))])
    plain.load_state_dict(supernet.statistics[supernet.canonical(config)], strict=False)
    got, want = supernet.prepare(config)(images(2)), plain.eval()(images(2))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@settings(deadline=None, max_examples=8)
@given(CONFIGS, st.integers(1, 2))
def test_prepared_networks_equal_extracted_ones(supernet, config, batch):
    calibrate(supernet, config, [images(1, 8)])
    got = supernet.prepare(config)(images(3, batch))
    same_layout = copy.deepcopy(supernet).prepare(config)  # copies with the strides of the views
    assert torch.equal(got, same_layout(images(3, batch)))
    extracted = supernet.extract(config)(images(3, batch))
    assert (got - extracted).abs().max() <= 1e-6 * extracted.abs().max()


def test_only_transformed_kernels_are_no_views(supernet):
    config = replace(SMALL.smallest, kernel=(3, 5) * 5)
    calibrate(supernet, config, [images(1, 4)])
    store = {p.untyped_storage().data_ptr() for p in supernet.net.parameters()}
    for name, parameter in supernet.prepare(config).named_parameters():
        transformed = supernet.transform and name.endswith("depthwise.conv.weight")
        shared = not transformed or name.startswith("stages.0")  # the first block is fixed
        assert (parameter.untyped_storage().data_ptr() in store) is shared, name


def test_a_new_transform_is_the_identity_and_learns():
    torch.manual_seed(0)
    transformed = Supernet(SMALL, 10, family="MobileNetV3", transform=True)
    torch.manual_seed(0)
    cropped = Supernet(SMALL, 10, family="MobileNetV3")
    got = transformed(images(4), SMALL.smallest)
    torch.testing.assert_close(got, cropped(images(4), SMALL.smallest))
    got.square().sum().backward()
    convolution = transformed.net.stages[1][0].depthwise.conv
    assert convolution.get_parameter("7to5_matrix").grad.abs().sum() > 0
    assert convolution.get_parameter("5to3_matrix").grad.abs().sum() > 0
    assert convolution.weight.grad[:, :, 1:-1, 1:-1].abs().sum() > 0


@settings(deadline=None, max_examples=50)
@given(CONFIGS, CONFIGS)
def test_configurations_are_one_network_exactly_if_their_canonical_form_is(one, other):
    other = replace(other, resolution=one.resolution, width=one.width, depth=one.depth)
    mixed = [
        replace(one, **{name: tuple(
            getattr(other if i % 2 >= one.depth[i // 2] else one, name)[i] for i in range(10)
        ) for name in ("kernel", "expand")}), other,
    ]  # fmt: skip
    canonical = FAMILY.canonical
    assert canonical(one, SMALL) in SMALL
    assert canonical(mixed[0], SMALL) == canonical(one, SMALL)
    for config in mixed:
        same = layers(config) == layers(one)
        assert (canonical(config, SMALL) == canonical(one, SMALL)) is same


def test_statistics_serve_every_name_of_a_network(supernet):
    config = replace(SMALL.smallest, kernel=(5, 7) * 5)
    supernet.statistics.clear()
    calibrate(supernet, config, [images(1, 4)])
    alias = replace(SMALL.smallest, kernel=(5, 3) * 5)
    assert torch.equal(supernet.prepare(alias)(images(2)), supernet.prepare(config)(images(2)))
    with pytest.raises(ModelError):
        supernet.prepare(replace(config, resolution=48))


def test_a_checkpoint_names_its_family(supernet, tmp_path):
    supernet.statistics.clear()
    calibrate(supernet, SMALL.largest, [images(1, 4)])
    path = supernet.save(tmp_path / "net.safetensors", note="x")
    back, provenance = Supernet.from_checkpoint(path)
    assert provenance == {"note": "x"}
    want = supernet.prepare(SMALL.largest)(images(2))
    assert torch.equal(back.prepare(SMALL.largest)(images(2)), want)
    other = Supernet(SMALL, 10, family="MobileNetV3", transform=not supernet.transform)
    with pytest.raises(CheckpointError, match="another transform"):
        other.load(path)
    residual = Supernet(SearchSpace((16,), ((1,),), ((8,),)))
    with pytest.raises(CheckpointError, match="another space"):
        residual.load(path)


def ofa_state(prefix="mobile_inverted_conv"):
    """Random tensors of the published keys and shapes, width 1.0."""
    torch.manual_seed(0)
    state = {}

    def norm(name, width):
        for key in ("weight", "bias", "running_mean", "running_var"):
            value = 0.1 * torch.randn(width)
            state[f"{name}.{key}"] = 1 + value.abs() if key in ("weight", "running_var") else value
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name, *shape):
        state[name] = torch.randn(shape) / max(1, np.prod(shape[1:])) ** 0.5

    conv("first_conv.conv.weight", 16, 3, 3, 3)
    norm("first_conv.bn", 16)
    conv(f"blocks.0.{prefix}.depth_conv.conv.weight", 16, 1, 3, 3)
    norm(f"blocks.0.{prefix}.depth_conv.bn", 16)
    conv(f"blocks.0.{prefix}.point_linear.conv.weight", 16, 16, 1, 1)
    norm(f"blocks.0.{prefix}.point_linear.bn", 16)
    widths = [16] + [24] * 4 + [40] * 4 + [80] * 4 + [112] * 4 + [160] * 4
    reduced = {40: 64, 80: 120, 112: 168, 160: 240, 24: 40}
    for i in range(1, 21):
        block, inputs, outputs = f"blocks.{i}.{prefix}", widths[i - 1], widths[i]
        hidden = 6 * inputs
        conv(f"{block}.inverted_bottleneck.conv.conv.weight", hidden, inputs, 1, 1)
        norm(f"{block}.inverted_bottleneck.bn.bn", hidden)
        state[f"{block}.depth_conv.conv.5to3_matrix"] = torch.eye(9) + 0.1 * torch.randn(9, 9)
        state[f"{block}.depth_conv.conv.7to5_matrix"] = torch.eye(25) + 0.1 * torch.randn(25, 25)
        conv(f"{block}.depth_conv.conv.conv.weight", hidden, 1, 7, 7)
        norm(f"{block}.depth_conv.bn.bn", hidden)
        if outputs in (40, 112, 160):
            middle = reduced[inputs]
            conv(f"{block}.depth_conv.se.fc.reduce.weight", middle, hidden, 1, 1)
            conv(f"{block}.depth_conv.se.fc.reduce.bias", middle)
            conv(f"{block}.depth_conv.se.fc.expand.weight", hidden, middle, 1, 1)
            conv(f"{block}.depth_conv.se.fc.expand.bias", hidden)
        conv(f"{block}.point_linear.conv.conv.weight", outputs, hidden, 1, 1)
        norm(f"{block}.point_linear.bn.bn", outputs)
    conv("final_expand_layer.conv.weight", 960, 160, 1, 1)
    norm("final_expand_layer.bn", 960)
    conv("feature_mix_layer.conv.weight", 1280, 960, 1, 1)
    conv("classifier.linear.weight", 1000, 1280)
    conv("classifier.linear.bias", 1000)
    return state


@pytest.fixture(scope="module")
def ofa():
    return Supernet(OFA_W10, 1000, family="MobileNetV3", transform=True)


@pytest.mark.parametrize("prefix", ["mobile_inverted_conv", "conv"])
def test_published_weights_find_their_places(ofa, tmp_path, prefix):
    state = ofa_state(prefix)
    assert len(state) == 475
    torch.save({"state_dict": state}, tmp_path / "published")
    load_ofa(ofa, tmp_path / "published")
    net, block = ofa.net, f"blocks.5.{prefix}"  # the first block of stage 2
    fifth = net.stages[2][0]
    pairs = {
        "first_conv.conv.weight": net.stem.conv.weight,
        f"{block}.inverted_bottleneck.conv.conv.weight": fifth.expand.conv.weight,
        f"{block}.depth_conv.conv.conv.weight": fifth.depthwise.conv.weight,
        f"{block}.depth_conv.conv.7to5_matrix": fifth.depthwise.conv.get_parameter("7to5_matrix"),
        f"{block}.depth_conv.bn.bn.bias": fifth.depthwise.norm.bias,
        f"{block}.depth_conv.se.fc.expand.weight": fifth.squeeze.expand.weight,
        f"blocks.20.{prefix}.point_linear.bn.bn.weight": net.stages[5][3].project.norm.weight,
        f"blocks.0.{prefix}.depth_conv.conv.weight": net.stages[0][0].depthwise.conv.weight,
        "feature_mix_layer.conv.weight": net.mix.weight,
        "classifier.linear.bias": net.head.bias,
    }
    for key, parameter in pairs.items():
        assert torch.equal(state[key].reshape(parameter.shape), parameter), key
    statistics = ofa.statistics[OFA_W10.largest]
    assert torch.equal(
        statistics["final.norm.running_var"], state["final_expand_layer.bn.running_var"]
    )
    assert ofa.prepare(OFA_W10.largest)(images(1, 1, 64)).isfinite().all()


def test_other_weights_are_refused_by_key_before_one_is_touched(ofa, tmp_path):
    load_ofa(ofa, ofa_state())
    before = {k: v.clone() for k, v in ofa.net.named_parameters()}
    good, key = ofa_state(), "blocks.3.mobile_inverted_conv.depth_conv.conv.5to3_matrix"
    ours = re.escape(key.replace("mobile_inverted_conv", "conv"))
    bad = {
        rf"{ours} has shape None, expected \(9, 9\)": {k: v for k, v in good.items() if k != key},
        rf"{ours} has shape \(3, 3\)": good | {key: torch.eye(3)},
        "extra.weight has no place": good | {"extra.weight": torch.zeros(1)},
        r"running_mean has shape \(2,\)": good | {"first_conv.bn.running_mean": torch.zeros(2)},
    }
    for message, state in bad.items():
        with pytest.raises(CheckpointError, match=message):
            load_ofa(ofa, state)
    (tmp_path / "broken").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="broken: no readable weights"):
        load_ofa(ofa, tmp_path / "broken")
    assert all(torch.equal(v, before[k]) for k, v in ofa.net.named_parameters())
    with pytest.raises(CheckpointError, match="transform=True"):
        load_ofa(Supernet(OFA_W10, 1000, family="MobileNetV3"), good)
    with pytest.raises(CheckpointError, match="not a ResNet"):
        load_ofa(Supernet(SearchSpace((16,), ((1,),), ((8,),))), good)


def test_published_weights_evaluate_on_an_imagenet_folder(ofa, tmp_path):
    load_ofa(ofa, ofa_state())
    rng = np.random.default_rng(0)
    for name in ("n01440764", "n01443537"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{i}.png")
    folder = imagenet(tmp_path / "val", 128, cache_dir=tmp_path / "cache")
    torch.testing.assert_close(folder.mean, torch.tensor([0.485, 0.456, 0.406]))
    assert folder.classes == ("n01440764", "n01443537")
    for config in (OFA_W10.smallest, replace(OFA_W10.largest, resolution=128)):
        accuracy = evaluate(ofa, config, folder, folder.train, calibration=4)
        net = ofa.prepare(config)
        guesses = torch.cat([net(folder.normalise(i[None])) for i in folder.train.images]).argmax(1)
        assert accuracy == 100 * (guesses == folder.train.labels).float().mean().item()
