"""Networks that grow: what is added later changes nothing that was there before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dynlib.errors import ConfigError, ModelError
from dynlib.images import Dataset, Images
from dynlib.nets.serve import storage_bytes
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SubnetConfig
from dynlib.training.recipes import Recipe
from suite.papers.incremental import (
    INCREMENT_CHANNELS,
    DenseIncrementalCNN,
    IncrementalCNN,
    add_increment,
    increment,
    increment_space,
    next_increment,
    part,
)
from suite.papers.incremental_training import grow

SPACE = increment_space(4, 16)
RECIPE = Recipe(epochs=2, batch_size=32)


def make() -> Supernet:
    torch.manual_seed(0)
    return Supernet(SPACE, 10, family="IncrementalCNN")


def images(count=8, seed=1):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dataset():
    """Ten classes that differ in the brightness of their left half."""
    draws = torch.Generator().manual_seed(3)
    labels = torch.arange(320) % 10
    pixels = torch.randint(0, 40, (320, 3, 16, 16), generator=draws)
    pixels[..., :8] += 20 * labels[:, None, None, None]
    parts = Images(pixels.to(torch.uint8), labels)
    return Dataset("bars", tuple("0123456789"), parts, parts, parts, *torch.full((2, 3), 0.4))


@pytest.fixture(scope="module")
def grown(dataset):
    """A super-network of all four increments, and the outputs of each as soon as it was there."""
    supernet, outputs, snapshots = make(), [], []
    for count in range(1, 5):
        history = grow(supernet, dataset, RECIPE, until=count)
        assert set(history["increment"]) == {count}
        prepared = supernet.prepare(SubnetConfig(16, width=(count,)))
        outputs.append(prepared(images()))
        snapshots.append({k: v.clone() for k, v in prepared.state_dict().items()})
    return supernet, outputs, snapshots


def test_earlier_increments_are_bit_unchanged_when_later_ones_are_added(grown):
    supernet, outputs, snapshots = grown
    for config, output, snapshot in zip(SPACE, outputs, snapshots, strict=True):
        now = supernet.prepare(config)
        assert torch.equal(now(images()), output), config
        assert all(torch.equal(v, snapshot[k]) for k, v in now.state_dict().items()), config
    assert not torch.equal(outputs[0], outputs[-1])


def test_every_increment_adds_to_the_logits(grown):
    supernet, outputs, _ = grown
    total = torch.zeros(8, 10)
    for index, output in enumerate(outputs):
        added = increment(supernet, index)(images())
        assert added.abs().max() > 0.01
        total += added
        torch.testing.assert_close(total, output, rtol=1e-4, atol=1e-4)


def test_statistics_of_an_increment_are_a_prefix_of_the_larger_ones(grown):
    supernet, _, _ = grown
    largest = supernet.statistics[SPACE.largest]
    for config in SPACE:
        for name, value in supernet.statistics[config].items():
            assert torch.equal(value, largest[name][: len(value)])


def test_training_learns_and_is_repeatable(grown, dataset):
    supernet, _, _ = grown
    again = make()
    grow(again, dataset, RECIPE, until=2)
    for name, value in again.slices(SubnetConfig(16, width=(2,))).items():
        assert torch.equal(value, supernet.slices(SubnetConfig(16, width=(2,)))[name]), name
    net = supernet.prepare(SPACE.largest)
    hits = (net(dataset.normalise(dataset.test.images)).argmax(1) == dataset.test.labels).float()
    assert hits.mean() > 0.3  # chance is 0.1


def test_growth_goes_on_from_a_checkpoint(grown, dataset, tmp_path):
    _, outputs, _ = grown
    half = make()
    grow(half, dataset, RECIPE, until=2)
    path = half.save(tmp_path / "half.safetensors")
    other = make()
    other.load(path)
    grow(other, dataset, RECIPE)
    assert torch.equal(other.prepare(SPACE.largest)(images()), outputs[-1])


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 3), st.integers(0, 2**31))
def test_noise_in_one_increment_reaches_no_earlier_one(grown, index, seed):
    supernet, outputs, _ = grown
    noisy = make()
    noisy.load_state_dict(supernet.state_dict())
    noisy.statistics = dict(supernet.statistics)
    draws = torch.Generator().manual_seed(seed)
    for view in part(noisy, index).values():
        view.data.add_(torch.randn(view.shape, generator=draws))
    for count, config in enumerate(SPACE, 1):
        same = torch.equal(noisy.prepare(config)(images()), outputs[count - 1])
        assert same == (count <= index), (count, index)


def test_what_is_not_there_is_refused():
    supernet = make()
    with pytest.raises(ModelError):
        supernet.prepare(SPACE.smallest)
    with pytest.raises(ModelError, match="only 0 were added"):
        increment(supernet, 0)
    alone = next_increment(supernet)
    with pytest.raises(ModelError, match="calibrated"):
        add_increment(supernet, alone)
    calibrate(alone, alone.space.smallest, [images(32)])
    for _ in SPACE:
        add_increment(supernet, alone)
    with pytest.raises(ModelError, match="fewer than 4"):
        add_increment(supernet, alone)
    with pytest.raises(ModelError, match="all 4"):
        next_increment(supernet)
    with pytest.raises(ConfigError, match="width0"):
        supernet.prepare(SubnetConfig(16, width=(5,)))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_layers_count_what_the_grouped_network_does(count):
    config = SubnetConfig(16, width=(count,))
    net = IncrementalCNN(config)
    specs = make().layers(config)
    with FlopCounterMode(display=False) as counter:
        net.eval()(images(1))
    assert sum(layer.macs for layer in specs) == counter.get_total_flops() / 2
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert sum(layer.params for layer in specs) == weights


def test_no_group_reads_another():
    net = IncrementalCNN(SPACE.largest).eval()
    first, last = INCREMENT_CHANNELS[0], INCREMENT_CHANNELS[-1]
    inputs = torch.randn(1, 4 * first, 8, 8, requires_grad=True)
    later = net.features[3:](inputs)  # from the second convolution on
    later[:, last : 2 * last].sum().backward()
    reached = inputs.grad.abs().sum((0, 2, 3)) > 0
    assert reached.nonzero().flatten().tolist() == list(range(first, 2 * first))


def test_the_dense_rival_also_keeps_its_earlier_increments():
    torch.manual_seed(0)
    net = DenseIncrementalCNN(4).eval()
    before = [net(images(), count) for count in (1, 2, 3)]
    with torch.no_grad():
        for stage in net.stages:
            for parameter in stage[3].parameters():
                parameter.add_(1)
        net.head.weight[:, -INCREMENT_CHANNELS[-1] :] += 1
    for count, want in enumerate(before, 1):
        assert torch.equal(net(images(), count), want)
    assert not torch.allclose(net(images()), before[-1])


def test_groups_need_two_fifths_of_the_dense_rivals_memory():
    """Both have the same channels; g (g + 1) / 2 blocks of connections against g."""
    grouped, dense = IncrementalCNN(SPACE.largest), DenseIncrementalCNN(4)
    inner = [p.numel() for n, p in grouped.named_parameters() if p.ndim == 4][1:]
    rival = [
        sum(m.weight.numel() for m in stage.modules() if isinstance(m, torch.nn.Conv2d))
        for stage in dense.stages
    ]
    assert rival[1:] == [2.5 * n for n in inner]
    channels = [m.num_features for m in grouped.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert channels == [
        sum(m.num_features for m in stage.modules() if isinstance(m, torch.nn.BatchNorm2d))
        for stage in dense.stages
    ]
    assert storage_bytes(dense) / storage_bytes(grouped) >= 2.4
