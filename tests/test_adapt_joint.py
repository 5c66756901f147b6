"""Networks trained together with their exits or their gate: what is stored, chosen and executed."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from dynlib import load_dataset, pretrained
from dynlib.errors import CheckpointError
from dynlib.nets.chain import chain
from dynlib.nets.supernet import Supernet, calibrate, macs_m
from dynlib.space import SearchSpace
from dynlib.training import calibration_batches
from suite import studies
from suite.errors import SuiteError
from suite.studies import adapt_joint

FEW = {"epochs": 1, "batch_size": 25, "lr": 3e-4, "lr_heads": 3e-3}


@pytest.fixture(scope="module")
def images():
    return load_dataset("generated", generated=(120, 80))


@pytest.fixture(scope="module")
def supernet(images):
    return pretrained(images)[0]


@pytest.fixture(scope="module")
def as_shipped(supernet, images):
    return adapt_joint.train_exits_jointly(supernet, images, seed=0, epochs=0)


@pytest.fixture(scope="module")
def joint(supernet, images):
    return adapt_joint.train_exits_jointly(supernet, images, seed=0, **FEW)


@pytest.fixture(scope="module")
def gated(supernet, images):
    return adapt_joint.train_gate_jointly(supernet, images, seed=0, **FEW)


def _losses(joint, images):
    told = joint.said(images, images.train)
    labels = told.labels[:, None].expand(-1, told.logits.shape[2])
    return F.cross_entropy(told.logits, labels, reduction="none").mean(0)


def test_without_training_the_network_is_the_shipped_one(supernet, images, as_shipped):
    large = supernet.space.largest
    calibrate(copy := adapt_joint.restricted(supernet, [large]), large,
              calibration_batches(images))  # fmt: skip
    x = images.normalise(images.test.images)
    ours = as_shipped.said(images, images.test).logits[..., -1]
    torch.testing.assert_close(ours, copy.prepare(large)(x), atol=0.05, rtol=0.01)


def test_an_exit_begins_as_the_narrow_networks_end(supernet, images, as_shipped):
    """With the first stage of the largest: the same slices, statistics of the same images."""
    large, small = supernet.space.largest, supernet.space.smallest
    config = replace(large, depth=(large.depth[0], *small.depth[1:]),
                     width=(large.width[0], *small.width[1:]))  # fmt: skip
    calibrate(supernet, config, calibration_batches(images))
    said = supernet.prepare(config)(images.normalise(images.test.images))
    behind = f"stages.0.blocks.{large.depth[0] - 1}"
    place = as_shipped.places.index(behind)
    ours = as_shipped.said(images, images.test).logits[..., place]
    torch.testing.assert_close(ours, said, atol=0.05, rtol=0.01)


def test_trunk_and_exits_learn_together(supernet, images, as_shipped, joint):
    before = dict(supernet.net.named_parameters())
    for name, after in joint.trunk.net.named_parameters():
        if after.ndim > 1:  # others are too large to move by a half's last digit in a few steps
            moved = not torch.equal(after, before[name].half().float())
            assert moved == (not name.startswith("stem")), name
    earlier, later = (_losses(net, images) for net in (as_shipped, joint))
    assert (later[:-1] < earlier[:-1]).all(), "exits"
    assert later[-1] < earlier[-1] + 0.1, "the end has forgotten"


def test_training_is_reproducible(supernet, images):
    few = {"seed": 1, "epochs": 0.25, "batch_size": 25}
    one, two = (adapt_joint.train_exits_jointly(supernet, images, **few) for _ in range(2))
    heads = ([p for head in net.heads.values() for p in head.parameters()] for net in (one, two))
    ours = zip(*heads, strict=True)
    assert all(torch.equal(a, b) for a, b in ours)
    ours = zip(one.trunk.net.parameters(), two.trunk.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in ours)


@pytest.mark.parametrize("recall", [0.0, 0.2])
def test_the_walk_equals_its_masked_reference_and_the_look_up(images, joint, recall):
    part = images.test
    told = joint.said(images, part)
    sure = told.said(told.places, recall)[1]
    places = " ".join(told.places)
    row = {"places": places, "threshold": float(np.median(sure)), "recall": recall}
    x = images.normalise(part.images)
    walk = joint.walk(row, x[:1])
    logits = walk(x)
    assert len(walk.visits(x).sum(1).unique()) > 1, "all images leave at one place"
    torch.testing.assert_close(logits, walk.masked(x), atol=1e-5, rtol=0)
    assert (studies.right(logits, part) != told.right(row)).sum() <= 1


def test_work_is_that_of_the_layers_that_run(images, joint):
    net = joint.prepare()
    whole = macs_m(joint.trunk, joint.trunk.space.largest)
    pieces = chain(net).cut(joint.places)[:-1]
    x = images.normalise(images.test.images[:1])
    counted = joint.macs_at(joint.places)
    spent = 0.0
    for place, piece, said in zip(joint.places, pieces, counted[:-1], strict=True):
        blocks = joint.trunk.blocks(joint.trunk.space.largest)
        spent += sum(layer.macs for name in piece.blocks for layer in blocks[name]) / 1e6
        x = piece(x)
        head = joint.heads[place]
        spent += _conv_macs(head, x) / 1e6
        assert said == pytest.approx(spent)
    assert counted[-1] > whole


def _conv_macs(head: torch.nn.Module, x: torch.Tensor) -> int:
    """Counted from what the layers are given."""
    found = []

    def count(layer, args, out):
        found.append(layer.weight.numel() * out[0].numel() // len(out[0]))

    layers = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    head(x)
    for hook in hooks:
        hook.remove()
    return sum(found)


def test_what_is_stored_is_what_was_judged(tmp_path, supernet, images, joint):
    path = tmp_path / "joint.safetensors"
    joint.save(path, {"dataset": images.name})
    again = adapt_joint.load_joint_exits(path, supernet)
    assert again.places == joint.places
    ours = joint.said(images, images.test).logits
    assert torch.equal(again.said(images, images.test).logits, ours)
    narrower = SearchSpace((32,), depth=((1,),) * 3, width=((8,), (24,), (32,)))
    with pytest.raises(CheckpointError, match="has shape"):
        adapt_joint.load_joint_exits(path, Supernet(narrower, len(images.classes)))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SuiteError, match="has not the hash that it carries"):
        adapt_joint.load_joint_exits(path, supernet)


def test_all_routes_and_the_gate_learn(supernet, images, gated):
    before = adapt_joint.restricted(supernet, gated.ways)
    for config in gated.ways:
        calibrate(before, config, calibration_batches(images))
    was = studies.routes_of(before, gated.ways, gated.behind, images, images.train)
    routes = gated.routes(images, images.train)
    assert routes.losses[:, 0].mean() < was.losses[:, 0].mean()
    assert routes.losses[:, -1].mean() < was.losses[:, -1].mean() + 0.1
    assert routes.macs_m == tuple(sorted(routes.macs_m))
    scores = gated.gate(routes.features)
    assert scores.std(0).min() > 0, "every image is the same to the gate"


def test_the_gated_walk_equals_its_masked_reference(images, gated):
    x = images.normalise(images.test.images)
    macs = gated.routes(images, images.test).macs_m
    walk = studies.gated_of(gated.supernet, gated.ways, gated.behind, gated.gate, 0.0, macs, x[:1])
    torch.testing.assert_close(walk(x), walk.masked(x), atol=1e-5, rtol=0)


def test_the_first_stage_is_one_for_all_routes(gated):
    names = [name for name, _ in gated.supernet.net.named_parameters() if "stages.0" in name]
    views = [dict(gated.supernet.slices(config)) for config in gated.ways]
    for name in names:
        assert len({view[name].shape for view in views}) == 1


def test_a_choice_out_of_reach_is_the_most_accurate():
    table = pd.DataFrame({"accuracy_pct": [80.0, 92.0, 91.0], "macs_m": [1.0, 4.0, 3.0]})
    assert adapt_joint.choose(table, 95.0)["macs_m"] == 4.0
    assert adapt_joint.choose(table, 90.0)["macs_m"] == 3.0


def test_rows_of_every_seed_are_written_after_it(tmp_path, monkeypatch, supernet, images):
    monkeypatch.setattr(adapt_joint, "THRESHOLDS", [0.3, 0.6, 0.9])
    monkeypatch.setattr(adapt_joint, "KNOBS", [0.0, 1e6])
    rows_path, checkpoint = tmp_path / "joint.csv", tmp_path / "joint.safetensors"
    rows = adapt_joint.train_all(
        supernet, images, exits=[(0, 0.25)], gates=[(1, 0.25)], rows_path=rows_path,
        checkpoint=checkpoint,
    )  # fmt: skip
    written = pd.read_csv(rows_path)
    assert len(written) == len(rows)
    assert set(written["kind"]) == {
        "exit alone", "exits", "exits, stronger recall",
        "route alone", "gate", "gate, trained anew",
    }  # fmt: skip
    assert checkpoint.is_file()
    shipped = adapt_joint.load_joint_exits(checkpoint, supernet)
    alone = rows[rows["kind"] == "exit alone"].set_index("choice")
    told = shipped.said(images, images.test)
    for place, name in enumerate([*shipped.places, "end"]):
        share = studies.right(told.logits[..., place], images.test).mean()
        assert alone.loc[name, "accuracy_test_pct"] == pytest.approx(100 * share)
    whole = rows[(rows["kind"] == "exit alone") & (rows["choice"] == "end")]
    assert whole["macs_ratio"].item() == pytest.approx(1)
    assert ((rows["low"] <= rows["drop_pp"]) & (rows["drop_pp"] <= rows["high"])).all()
