"""One weight store: slices, statistics, extraction, checkpoints."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small_nets import SPACE, calibrated, fresh
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynlib.errors import CheckpointError, ConfigError, DynlibError, ModelError
from dynlib.nets.checkpoint import _metadata, read_checkpoint, sign_checkpoint
from dynlib.nets.families import FAMILIES, Family, find_family, register
from dynlib.nets.resnet import ResNet, whiten_stem
from dynlib.nets.serve import SubnetServer
from dynlib.nets.supernet import Supernet, calibrate, crop
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training.shipping import checkpoint_path

ALL = st.sampled_from(list(SPACE))


def layers(config):
    return Supernet(SPACE).layers(config)


@pytest.fixture(scope="module")
def supernet():
    return calibrated(SPACE)


def assert_close(got, want, relative=1e-6):
    assert (got - want).abs().max() <= relative * want.abs().max()


@settings(deadline=None, max_examples=20)
@given(ALL, st.integers(1, 3))
def test_prepared_networks_equal_extracted_ones(supernet, config, batch):
    images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    got = supernet.prepare(config)(images)
    same_layout = copy.deepcopy(supernet).prepare(config)  # copies with the strides of the views
    assert torch.equal(got, same_layout(images))
    assert_close(got, supernet.extract(config)(images))  # compact: BLAS may sum in another order


@settings(deadline=None, max_examples=20)
@given(ALL)
def test_prepared_parameters_are_views_and_extracted_ones_are_not(supernet, config):
    store = {p.untyped_storage().data_ptr() for p in supernet.net.parameters()}
    for net, shared in ((supernet.prepare(config), True), (supernet.extract(config), False)):
        for name, parameter in net.named_parameters():
            assert (parameter.untyped_storage().data_ptr() in store) is shared, name


@settings(deadline=None, max_examples=20)
@given(ALL)
def test_a_grown_network_still_holds_every_old_one(supernet, config):
    wider = SearchSpace(SPACE.resolution, SPACE.depth, ((4, 8, 10), (6, 8, 12, 20)))
    grown, images = supernet.grown(wider), torch.randn(4, 3, 16, 16)
    assert_close(grown(images, config), supernet(images, config))
    assert_close(grown(images, wider.largest), supernet(images, SPACE.largest))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (SearchSpace((16,), ((1,), (0, 1)), ((4, 8), (6, 12))), r"blocks\.1.* are in one only"),
        (SearchSpace((16,), SPACE.depth, ((4, 8), (6, 10))), r"\(12, 8, 3, 3\) has no place in"),
    ],
)
def test_a_space_that_is_not_wider_is_refused(supernet, space, said):
    with pytest.raises(ConfigError, match=said):
        supernet.grown(space)


@settings(deadline=None, max_examples=20)
@given(ALL)
def test_a_slow_obvious_network_gives_the_same_output(supernet, config):
    """Copy every prefix by hand into a freshly built static network and compare."""
    plain = ResNet(config)
    big = dict(supernet.net.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            source = big[name]
            for axis, size in enumerate(parameter.shape):
                source = source.narrow(axis, 0, size)
            parameter.copy_(source)
    plain.load_state_dict(supernet.statistics[config], strict=False)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(plain.eval()(images), supernet.prepare(config)(images))


@settings(deadline=None, max_examples=20)
@given(ALL)
def test_layers_count_the_macs_that_torch_counts(config):
    with FlopCounterMode(display=False) as counter:
        ResNet(config).eval()(torch.randn(1, 3, 16, 16))
    assert sum(layer.macs for layer in layers(config)) == counter.get_total_flops() / 2


def test_work_grows_along_every_axis():
    def work(config):
        specs = layers(config)
        return sum(s.macs for s in specs), sum(s.params for s in specs)

    for config in SPACE:
        index = SPACE.encode(config)
        for axis, (name, choices) in enumerate(SPACE.axes()):
            if index[axis] + 1 < len(choices):
                larger = SPACE.decode(index + np.eye(len(index), dtype=int)[axis])
                assert work(larger)[0] > work(config)[0], name
                assert work(larger)[1] >= work(config)[1], name


@given(st.data())
def test_a_crop_is_the_prefix_of_every_layer_and_the_centre_of_a_kernel(data):
    """Dense and depth-wise convolutions, linear layers, norms, position embeddings."""
    kinds = [(6, 4, 7, 7), (6, 1, 5, 5), (6, 4), (6,), (1, 5, 6)]
    big = data.draw(st.sampled_from(kinds))
    small = [data.draw(st.integers(1, n)) for n in big]
    if len(big) == 4:
        small[2:] = [data.draw(st.sampled_from(range(1, big[2] + 1, 2)))] * 2
    weight = torch.randn(big)
    got = crop(weight, small)
    assert list(got.shape) == small
    assert got.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    for index in np.ndindex(*small):
        shift = [(b - s) // 2 if len(big) == 4 and axis > 1 else 0
                 for axis, (b, s) in enumerate(zip(big, small, strict=True))]  # fmt: skip
        assert got[index] == weight[tuple(np.add(index, shift))]


def test_gradients_reach_only_the_prefix():
    torch.manual_seed(0)
    net = Supernet(SPACE)
    net(torch.randn(8, 3, 16, 16), SPACE.smallest).sum().backward()
    gradient = net.net.stages[1].conv.weight.grad
    assert gradient[:6, :4].abs().sum() > 0
    assert gradient[6:].abs().sum() == 0
    assert gradient[:, 4:].abs().sum() == 0


def test_calibration_gives_the_statistics_of_the_images():
    torch.manual_seed(0)
    net = Supernet(SPACE)
    config, images = SPACE.largest, torch.randn(64, 3, 16, 16)
    calibrate(net, config, [images])
    frozen = net.prepare(config)(images)
    # With the very batch it was calibrated on, only the unbiased variance makes a difference.
    torch.testing.assert_close(frozen, net(images, config), rtol=0.05, atol=0.05)


def test_missing_statistics_and_foreign_configurations_are_refused():
    net = Supernet(SPACE)
    with pytest.raises(ModelError, match="calibrate"):
        net.prepare(SPACE.largest)
    with pytest.raises(ConfigError, match="width0"):
        net.prepare(SubnetConfig(16, (1, 1), (5, 6)))
    with pytest.raises(Exception, match="no images"):
        calibrate(net, SPACE.largest, [])


def test_the_stem_whitens_patches():
    torch.manual_seed(0)
    net = ResNet(SPACE.largest)
    images = torch.randn(256, 3, 16, 16).cumsum(2).cumsum(3) / 8
    whiten_stem(net.stem, images, eps=1e-6)
    out = net.stem(images)[:, :12].movedim(1, 3).reshape(-1, 12)
    torch.testing.assert_close(out.T @ out / len(out), torch.eye(12), atol=0.02, rtol=0)
    torch.testing.assert_close(net.stem.weight[:12], -net.stem.weight[12:])


def test_a_checkpoint_round_trips(supernet, tmp_path):
    path = supernet.save(tmp_path / "net.safetensors", dataset="x")
    back, provenance = Supernet.from_checkpoint(path)
    assert provenance == {"dataset": "x"}
    images = torch.randn(2, 3, 16, 16)
    for config in (SPACE.smallest, SPACE.largest):
        assert torch.equal(back.prepare(config)(images), supernet.prepare(config)(images))
    half = supernet.save(tmp_path / "half.safetensors", half=True)
    assert half.stat().st_size < path.stat().st_size


def test_a_bad_checkpoint_is_refused_before_a_weight_is_touched(supernet, tmp_path):
    path = supernet.save(tmp_path / "net.safetensors")
    victim = copy.deepcopy(supernet)
    before = {k: v.clone() for k, v in victim.net.state_dict().items()}
    whole = path.read_bytes()
    for cut in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            victim.load(path)
    other = Supernet(SearchSpace((16,), ((1,),), ((8,),)))
    with pytest.raises(CheckpointError, match="another space"):
        victim.load(other.save(tmp_path / "other.safetensors"))
    wrong = copy.deepcopy(supernet)
    wrong.net.head = torch.nn.Linear(12, 7)
    with pytest.raises(CheckpointError, match=r"head\.bias has shape \(7,\), expected \(10,\)"):
        victim.load(wrong.save(tmp_path / "wrong.safetensors"))
    with pytest.raises(CheckpointError, match="none"):
        victim.load(tmp_path / "none.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in victim.net.state_dict().items())


def rewrite(path, tensors=None, **changes):
    """Change tensors and the description of a checkpoint; None takes an entry out."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"]) | changes
        held = {k: file.get_tensor(k) for k in file.keys()} | (tensors or {})  # noqa: SIM118
    about = {k: v for k, v in about.items() if v is not None}
    held = {k: v for k, v in held.items() if v is not None}
    save_file(held, path, _metadata(json.dumps(about), held))


def test_a_checkpoint_without_its_hash_or_with_another_is_refused(supernet, tmp_path):
    path = supernet.save(tmp_path / "net.safetensors", mean=[0.5])
    with safe_open(path, framework="pt") as file:
        about = file.metadata() | {"about": file.metadata()["about"].replace("0.5", "0.4")}
        held = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(held, path, about)
    with pytest.raises(CheckpointError, match="damaged"):
        Supernet.from_checkpoint(path)
    save_file(held, path, {key: about[key] for key in ("format", "about")})
    with pytest.raises(CheckpointError, match="no SHA-256"):
        Supernet.from_checkpoint(path)
    back, provenance = Supernet.from_checkpoint(sign_checkpoint(path))
    assert provenance == {"mean": [0.4]}
    assert torch.equal(back.net.head.weight, supernet.net.head.weight)


@pytest.mark.parametrize("name", ["cifar10", "generated"])
def test_no_flipped_bit_of_a_shipped_checkpoint_loads(name, tmp_path):
    whole = bytearray(checkpoint_path(name).read_bytes())
    path = tmp_path / "net.safetensors"
    rng = np.random.default_rng(0)
    for at in rng.integers(len(whole), size=20):
        flipped = whole.copy()
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            read_checkpoint(path)


def test_a_description_takes_no_memory_that_the_file_has_not(supernet, tmp_path):
    """The file is small; what it describes would take gigabytes, or hours to build."""
    path = supernet.save(tmp_path / "net.safetensors")
    space = SPACE.to_dict()
    for changes in (
        {"classes": 60_000},
        {"classes": 10**12},
        {"space": space | {"width": [[60_000], [60_000]]}},
        {"space": space | {"width": [[10**30], [6]]}},
        {"space": space | {"depth": [[65_000], [0, 1]]}},
        {"space": space | {"resolution": [1.5]}},
        {"provenance": 3},
    ):
        rewrite(path, **changes)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            Supernet.from_checkpoint(path)


def test_bad_statistics_and_descriptions_are_refused_before_a_weight_is_touched(supernet, tmp_path):
    name = f"{SPACE.smallest}/stages.0.norm.running_mean"
    outside = f"{SubnetConfig(20, (1, 0), (4, 6))}/stages.0.norm.running_mean"
    victim = Supernet(SPACE)
    before = {k: v.clone() for k, v in victim.net.state_dict().items()}
    for message, changes in {
        r"running_mean has shape \(3,\), expected \(4,\)": {"tensors": {name: torch.zeros(3)}},
        r"running_mean has shape None, expected \(4,\)": {"tensors": {name: None}},
        "resolution is 20": {"tensors": {outside: torch.zeros(4)}},
        "'what' is not a sub-network": {"tensors": {"what/ever": torch.zeros(4)}},
        "another classes: 11, not 10": {"classes": 11},
        "another family: Unheard": {"family": "Unheard"},
        "cannot be read": {"space": None},
        "cannot be read: a search space needs": {"space": {"depth": [[1]]}},
    }.items():
        path = supernet.save(tmp_path / "net.safetensors")
        rewrite(path, **changes)
        with pytest.raises(CheckpointError, match=message):
            victim.load(path)
    rewrite(path, space=SPACE.to_dict(), family="Unheard")
    with pytest.raises(CheckpointError, match=r"'Unheard' is not registered; known: .*ResNet"):
        Supernet.from_checkpoint(path)
    assert all(torch.equal(v, before[k]) for k, v in victim.net.state_dict().items())
    assert victim.statistics == {}


def test_checkpoints_from_before_there_were_families_still_load(supernet, tmp_path):
    path = supernet.save(tmp_path / "net.safetensors")
    rewrite(path, family=None, transform=None)
    back, _ = Supernet.from_checkpoint(path)
    images = torch.randn(1, 3, 16, 16)
    want = supernet.prepare(SPACE.smallest)(images)
    assert torch.equal(back.prepare(SPACE.smallest)(images), want)


def test_a_family_of_ones_own_is_restored_by_its_builder(tmp_path):
    class Own(ResNet):
        pass

    own = Supernet(SPACE, build=Own)
    assert own.layers(SPACE.largest) == layers(SPACE.largest)  # recorded, as it says none
    path = own.save(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="Own' is not registered"):
        Supernet.from_checkpoint(path)
    back, _ = Supernet.from_checkpoint(path, build=Own)
    assert torch.equal(back.net.head.weight, own.net.head.weight)


def test_a_registered_family_of_ones_own_is_restored_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("dynlib.nets.families.FAMILIES", FAMILIES.copy())

    @register("Narrow")
    def narrow(classes_more=0):
        return Family(lambda config, classes: ResNet(config, classes + classes_more))

    own = Supernet(SPACE, 10, family="Narrow", options={"classes_more": 2})
    back, _ = Supernet.from_checkpoint(own.save(tmp_path / "net.safetensors"))
    assert back.options == {"classes_more": 2}
    assert back.net.head.out_features == 12
    with pytest.raises(ConfigError, match="there is a family 'Narrow' already"):
        register("Narrow")(narrow)
    with pytest.raises(ConfigError, match=r"'Narrow' with .'wrong'.: .*unexpected"):
        Supernet(SPACE, family="Narrow", options={"wrong": 1})
    with pytest.raises(ConfigError, match="'Narow' is not registered; did you mean Narrow"):
        find_family("Narow", {})


def test_a_server_switches_between_frames(supernet):
    server = SubnetServer(supernet, [SPACE.largest, SPACE.smallest])
    images = torch.randn(1, 3, 16, 16)
    outputs = {str(c): supernet.extract(c)(images) for c in (SPACE.largest, SPACE.smallest)}
    for name in (*server.subnets, *server.subnets):
        server.switch(name)
        assert server.subnet == name
        assert_close(server(images), outputs[name])


def test_a_refused_switch_leaves_the_old_network_serving(supernet):
    server = SubnetServer(supernet, [SPACE.smallest])
    with pytest.raises(ConfigError, match="not prepared"):
        server.switch(SPACE.largest)
    assert server.subnet == str(SPACE.smallest)
    assert server(torch.randn(1, 3, 16, 16)).shape == (1, 10)
    with pytest.raises(ConfigError, match="at least one"):
        SubnetServer(supernet, [])


def test_a_text_will_do_for_a_configuration():
    text = str(SPACE.smallest)
    net = calibrated([SPACE.smallest])
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(net.prepare(text)(images), net.prepare(SPACE.smallest)(images))
    assert torch.equal(net.extract(text)(images), net.extract(SPACE.smallest)(images))
    assert net.layers(text) == net.layers(SPACE.smallest)


def test_any_loader_calibrates_and_is_told_how_many_images_are_safe(caplog):
    net, images = fresh(SPACE), torch.randn(8, 3, 16, 16)
    plain = calibrate(net, SPACE.smallest, [images])
    pairs = torch.utils.data.TensorDataset(images, torch.arange(8))
    with caplog.at_level("INFO"):
        loaded = calibrate(net, str(SPACE.smallest), torch.utils.data.DataLoader(pairs, 8))
    assert all(torch.equal(plain[name], loaded[name]) for name in plain)
    assert "8 images; 2000 are safe" in caplog.text
    with pytest.raises(DynlibError, match=r"expected batches \(N, 3, H, W\), 2000 images in all"):
        calibrate(net, SPACE.smallest, [])
    with pytest.raises(DynlibError, match=r"expected batches .* got str"):
        calibrate(net, SPACE.smallest, ["cat.jpg"])


@pytest.mark.parametrize(("channels", "kernel", "stride", "padding", "size"), [
    (48, 5, 2, 2, (1, 1)), (48, 3, 2, 1, (3, 1)), (24, (3, 1), 2, 0, (4, 1)),
    (16, 7, (1, 2), 3, (1, 1)), (24, (3, 1), 2, "valid", (4, 1)), (24, (3, 2), 2, "valid", (4, 4)),
])  # fmt: skip
def test_a_strided_convolution_of_one_column_has_the_gradient_of_single_precision(
    channels, kernel, stride, padding, size
):
    """oneDNN leaves unwritten what places of the kernel learn that see no pixel."""

    def build(config, classes):
        conv = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
        head = nn.Linear(channels, classes)
        return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    torch.manual_seed(0)
    net = Supernet(SearchSpace((8,)), build=build)
    images = torch.randn(4, channels, *size).contiguous(memory_format=torch.channels_last)
    gradients = []
    for bf16 in (False, True):
        poison = [torch.full((2**n,), float("nan")) for n in range(8, 19) for _ in range(20)]
        del poison  # what is not written is NaN now
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            answer = net(images, net.space.largest)
        answer.float().sum().backward()
        gradients.append(net.net[0].weight.grad.clone())
        assert torch.isfinite(gradients[-1]).all()
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05)


def test_a_strided_1x1_convolution_of_few_channels_is_trained_without_stride():
    """oneDNN's weight gradient of it in channels_last writes past its buffer (issue 6035)."""

    def build(config, classes):
        return nn.Sequential(nn.Conv2d(3, 8, 1, (2, 3)), nn.Flatten(), nn.Linear(96, classes))

    net = Supernet(SearchSpace((8,)), build=build)
    largest = net.space.largest
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    answer = net(images, largest)
    answer.sum().backward()
    torch.testing.assert_close(answer, net.prepare(largest)(images))
    assert net._skeleton(largest)[0].stride == (1, 1)
    assert net.prepare(largest)[0].stride == (2, 3)
