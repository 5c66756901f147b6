"""The study of trained maskers: what is executed is what the masks say, and what it is held to."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from dynlib import load_dataset
from suite.errors import SuiteError
from suite.studies import adapt_laud
from suite.studies.adapt_laud import DENSE, GROUPS, MODES, RIVALS, Masked, Net

SIZE, CLASSES = 32, 8
TRIED = (*MODES, "control", "depth 1 2")


@pytest.fixture(scope="module")
def images():
    return load_dataset("generated", generated=(400, 100))


@pytest.fixture(scope="module")
def dense():
    """With statistics and scales by chance, so that nothing is zero or equal."""
    torch.manual_seed(0)
    net = Net(CLASSES, SIZE).eval()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                spread = torch.rand_like(value)
                value += spread if name.endswith("running_var") else 0.3 * (spread - 0.5)
    return net


@pytest.fixture(scope="module")
def batch(images):
    return images.normalise(images.test.images[:24])


@pytest.fixture(scope="module")
def masked(dense, batch):
    """In each mode a dynamic network whose maskers keep one thing here and another there."""
    work = adapt_laud.work_of(CLASSES, SIZE)
    nets = {}
    for mode in MODES:
        torch.manual_seed(1)
        nets[mode] = net = Masked(dense, mode, work).eval()
        labels = torch.randint(CLASSES, (len(batch),))
        adapt_laud.start(net, [(0.0, batch, labels, torch.randn(len(batch), CLASSES))])
    return nets


@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_what_is_executed_is_what_the_masks_say(mode, masked, batch):
    expected, share = masked[mode](batch)
    assert share.std() > 0.01  # images differ, or the test says nothing
    run = adapt_laud.executed(masked[mode], batch[:1])
    for x, wanted in ((batch, expected), (batch[3:4], expected[3:4])):
        assert (run(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@torch.inference_mode()
def test_a_static_network_is_executed_as_it_is(dense, batch):
    expected = dense(batch)
    got = adapt_laud.executed(dense, batch[:1])(batch)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_keeping_everything_is_the_dense_network_and_all_its_work(mode, masked, dense, batch):
    def everything(logits):
        return torch.ones_like(logits[:, 0])

    logits, share = masked[mode](batch, everything)
    assert torch.allclose(logits, dense(batch), atol=1e-5)
    assert torch.equal(share, torch.ones(len(batch)))


@torch.inference_mode()
def test_keeping_nothing_leaves_the_work_outside_branches(masked, batch):
    def nothing(logits):
        return torch.zeros_like(logits[:, 0])

    work = adapt_laud.work_of(CLASSES, SIZE)
    branches = sum(sum(layers[:3]) for name, layers in work.items() if name.startswith("stages"))
    total = sum(map(sum, work.values()))
    _, share = masked["layer"](batch, nothing)
    assert share.tolist() == pytest.approx([1 - branches / total] * len(batch))
    _, share = masked["channel"](batch, nothing)  # the first group is always kept
    narrow = [[inner // GROUPS for inner in stage] for stage in DENSE]
    least = sum(map(sum, adapt_laud.work_of(CLASSES, SIZE, narrow).values()))
    assert share.tolist() == pytest.approx([least / total] * len(batch))


@pytest.mark.parametrize("widths", RIVALS.values())
def test_widths_are_those_asked_for(widths):
    net = Net(CLASSES, SIZE, widths)
    assert [[block.conv1.out_channels for block in stage] for stage in net.stages] == [
        list(stage) for stage in widths
    ]


def test_branches_are_most_of_the_work():
    for size in (32, 128):
        work = adapt_laud.work_of(10, size)
        branches = sum(sum(layers[:3]) for name, layers in work.items() if "stages" in name)
        assert branches >= 0.8 * sum(map(sum, work.values()))


@torch.inference_mode()
def test_channels_in_order_compute_the_same(dense, batch):
    ordered = adapt_laud.cut_from(dense, CLASSES, SIZE, DENSE).eval()
    adapt_laud.put_in_order(ordered)
    assert not torch.equal(ordered.stages[0][0].conv1.weight, dense.stages[0][0].conv1.weight)
    assert torch.allclose(ordered(batch), dense(batch), atol=1e-5)
    block = ordered.stages[1][1]
    weight = block.conv3.weight.abs().sum((0, 2, 3)) * block.bn2.weight.abs()
    assert (weight.diff() <= 0).all()


def test_groups_are_nested():
    mask = torch.tensor([[[0, 1, 1, 0], [1, 1, 0, 1]]])
    assert adapt_laud.nested(mask).tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0]]]


def test_images_are_ranked_by_the_loss_of_the_dense_network():
    said = torch.tensor([[9.0, 0], [0, 9], [1, 0]])  # right, wrong, not sure
    assert adapt_laud.harder(said, torch.tensor([0, 0, 0])).tolist() == [-1, 1, 0]


def test_views_are_the_same_for_a_seed(images):
    first, again, other = (list(adapt_laud.views(images, 5, 100, seed)) for seed in (0, 0, 1))
    assert [len(labels) for _, _, labels in first] == [100] * 5
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Some kinds after a short training: the images, and where they were written."""
    home = tmp_path_factory.mktemp("laud")
    parts = {"train": images.train.take(slice(0, 60)), "test": images.test.take(slice(0, 40))}
    fewer = dataclasses.replace(images, **parts)
    plan = adapt_laud.Plan(1, 60, 2, 20, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(adapt_laud.PLANS, images.name, plan)
        with patch.context() as some:
            some.setattr(adapt_laud, "work_dir", lambda: home)
            some.setattr(adapt_laud, "KINDS", TRIED)
            adapt_laud.train_all(fewer, [0], home)
        yield fewer, home


def test_what_is_shipped_answers_as_its_row_says(trained):
    images, home = trained
    table = pd.read_csv(home / "laud.csv").set_index("mode")
    assert list(table.index) == list(TRIED)
    nets = adapt_laud.shipped(images, home)
    assert list(nets) == list(TRIED)
    for kind in TRIED:
        row = adapt_laud.row_of(kind, nets[kind], images, 0)
        assert row["accuracy_test_pct"] == pytest.approx(table["accuracy_test_pct"][kind])
        assert row["macs_share_mean"] == pytest.approx(table["macs_share_mean"][kind], abs=1e-4)
    assert table["macs_share_sd"][list(TRIED[2:])].eq(0).all()
    assert table["macs_share_mean"]["depth 1 2"] < table["macs_share_mean"]["control"] == 1


def test_training_moves_maskers_and_weights(trained):
    images, home = trained
    start = adapt_laud.dense_of(images)
    nets = adapt_laud.shipped(images, home)
    before, after = start.head[-1].weight, nets["layer"].net.head[-1].weight
    assert not torch.allclose(before, after, atol=1e-3)
    for masker in nets["layer"].maskers:
        assert masker.masker.logits.bias.tolist() != [1.0, 0.0]


def test_a_changed_file_is_refused(trained, tmp_path):
    images, home = trained
    path = home / f"{images.name}.laud.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    (tmp_path / path.name).write_bytes(content)
    with pytest.raises(SuiteError, match="hash"):
        adapt_laud.shipped(images, tmp_path)


def test_a_row_takes_the_place_of_the_same_one(tmp_path):
    path = tmp_path / "laud.csv"
    for value in (1.0, 2.0):
        adapt_laud.add_row(path, {"dataset": "a", "mode": "layer", "seed": 0, "macs_m": value})
    adapt_laud.add_row(path, {"dataset": "a", "mode": "layer", "seed": 1, "macs_m": 3.0})
    assert pd.read_csv(path)["macs_m"].tolist() == [2.0, 3.0]


def test_accuracy_is_held_to_the_static_network_of_equal_time():
    times = pd.DataFrame(
        {
            "run": ["layer", "channel", "control", "depth 2 3", "depth 1 2", "width 2/3"],
            "part": 0,
            "latency_ms": [1.5, 9.0, 4.0, 2.0, 1.0, 2.0],
        }
    )
    answered = {
        "layer": np.array([1, 1, 1, 0], bool),
        "channel": np.array([1, 1, 0, 0], bool),
        "control": np.array([1, 1, 1, 1], bool),
        "depth 2 3": np.array([1, 1, 0, 0], bool),
        "depth 1 2": np.array([0, 0, 0, 0], bool),
        "width 2/3": np.array([1, 0, 0, 0], bool),
    }
    # Half way between 0 % and 50 % lies 25 %.
    gain = adapt_laud.against_static(times, answered, "layer")
    assert gain["value"] == pytest.approx(75 - 25)
    assert gain["time"] == pytest.approx(1.5 / 4)
    # Slower than the largest static one: held to that.
    assert adapt_laud.against_static(times, answered, "channel")["value"] == pytest.approx(-50)
    rows = pd.DataFrame({"mode": list(answered), "seed": 3})
    rows["accuracy_test_pct"] = [75, 50, 100, 50, 0, 25]
    gains = adapt_laud.over_seeds(times, rows, "layer")
    assert gains["accuracy_vs_static"].to_dict() == pytest.approx({3: 50})
    assert gains["accuracy_vs_control"].to_dict() == pytest.approx({3: 75 - 100})


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_the_shipped_networks_open_and_have_their_rows(name, images):
    size = 128 if name == "imagenette" else 32
    pixels = images.train.images[:2].repeat_interleave(size // 32, 2)
    pixels = pixels.repeat_interleave(size // 32, 3)
    some = dataclasses.replace(images.train.take(slice(0, 2)), images=pixels)
    held = dataclasses.replace(images, name=name, train=some)
    nets = adapt_laud.shipped(held)
    assert list(nets) == list(adapt_laud.KINDS)
    rows = pd.read_csv(adapt_laud.SHIPPED / "laud.csv").set_index(["dataset", "seed", "mode"])
    assert set(rows.loc[name, 0].index) == set(nets)
    assert (rows.loc[name, 0].loc[list(MODES), "macs_share_sd"] > 0.05).all()
    with torch.inference_mode():
        x = held.normalise(pixels)
        expected, _ = nets["layer"](x)
        got = adapt_laud.executed(nets["layer"], x[:1])(x)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
