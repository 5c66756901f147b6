"""The transformer of the study of adaptive networks: trained, shipped, and what its routes say."""

from dataclasses import replace

import pytest
import torch

from dynlib import load_dataset
from dynlib.images import Images
from dynlib.nets.supernet import Supernet, macs_m
from suite import studies
from suite.studies import adapt_vit, adapt_vit_train

ROUTES = adapt_vit.ROUTES


class _AsTheyAre:
    """Stands for a data set whose images are normalised already."""

    @staticmethod
    def normalise(images):
        return images


@pytest.fixture(scope="module")
def supernet():
    torch.manual_seed(0)
    supernet = Supernet(adapt_vit.SPACE, family="ConvViT")
    with torch.no_grad():
        supernet.net.head.weight.mul_(20)  # so that confidences differ
    return supernet


@pytest.fixture(scope="module")
def routes(supernet):
    """Labels are what the smallest or the largest route says."""
    found = {}
    for seed, part in enumerate(("val", "test")):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(96, 3, 32, 32, generator=generator)
        ends = [supernet.prepare(config)(pixels).argmax(1) for config in (ROUTES[0], ROUTES[-1])]
        images = Images(pixels, torch.where(torch.rand(96, generator=generator) < 0.4, *ends))
        found[part] = images, studies.vit_routes(supernet, _AsTheyAre, images)
    return found


def said(routes):
    return {part: some for part, (_, some) in routes.items()}


def test_routes_differ_behind_the_first_block_and_are_ordered_by_work(supernet):
    work = [macs_m(supernet, config) for config in ROUTES]
    assert work == sorted(work)
    first = [supernet.blocks(config)[adapt_vit.BEHIND] for config in ROUTES]
    assert all(layers == first[0] for layers in first)
    assert len({supernet.canonical(config) for config in ROUTES}) == len(ROUTES)


def test_routes_are_what_the_networks_say(supernet, routes):
    images, mine = routes["val"]
    for number, config in enumerate(ROUTES):
        logits = supernet.prepare(config)(images.images)
        torch.testing.assert_close(mine.logits[:, number], logits)


def test_gates_do_what_their_rows_say(supernet, routes):
    images, mine = routes["test"]
    rows, gates = studies.gate_rows(said(routes), range(2), lost_pp=5.0)
    for gate, (_, row) in zip(gates, rows.iterrows(), strict=True):
        walk = studies.gated_of(
            supernet, ROUTES, adapt_vit.BEHIND, gate, row["knob"], mine.macs_m, images.images[:1]
        )
        right = 100 * studies.right(walk(images.images), images).mean()
        assert right == pytest.approx(row["accuracy_pct"], abs=1.1)  # one image of 96
        spent = sum(row[f"route{number}"] * work for number, work in enumerate(mine.macs_m))
        assert spent == pytest.approx(row["macs_m"], rel=1e-5)
        assert row["reduction_ratio"] == pytest.approx(max(mine.macs_m) / row["macs_m"])
    assert rows["low"].le(rows["drop_pp"]).all()


def test_who_may_lose_more_works_less(supernet, routes):
    careless, careful = (
        studies.confidence_rows(supernet, said(routes), lost_pp=lost) for lost in (100.0, 0.0)
    )
    assert (careless["reduction_ratio"] >= careful["reduction_ratio"]).all()
    assert careless["reduction_ratio"].gt(1.2).all()


def test_the_exit_does_what_its_row_says(supernet, routes):
    images, _ = routes["test"]
    rows = studies.confidence_rows(supernet, said(routes), lost_pp=30.0).set_index("method")
    row = rows.loc["exit"]
    walk = studies.exit_of(supernet, row, images.images[:1])
    right = 100 * studies.right(walk(images.images), images).mean()
    assert right == pytest.approx(row["accuracy_pct"], abs=1.1)
    visits = walk.visits(images.images).float().mean(0)
    trunk = sum(
        layer.macs
        for name in ("stem", adapt_vit.BEHIND)
        for layer in supernet.blocks(ROUTES[-1])[name]
    ) / 1e6  # fmt: skip
    small, large = (macs_m(supernet, config) for config in (ROUTES[0], ROUTES[-1]))
    spent = small + visits[1].item() * (large - trunk)
    assert spent == pytest.approx(row["macs_m"], rel=0.02)
    assert rows.loc["exit", "macs_m"] <= rows.loc["cascade", "macs_m"]


def test_static_rows_end_with_the_largest(supernet, routes):
    rows = studies.static_rows(supernet, said(routes))
    last = rows.iloc[-1]
    assert (last["lost_val_pp"], last["drop_pp"], last["reduction_ratio"]) == (0, 0, 1)
    assert rows["reduction_ratio"].is_monotonic_decreasing


def test_training_teaches_and_the_shipped_file_says_the_same(tmp_path):
    images = load_dataset("generated", generated=(400, 100))
    recipe = replace(adapt_vit_train.RECIPE, epochs=2, batch_size=100)
    supernet, history = studies.train_vit(images, recipe, watch=0)
    assert history["loss_max"].iloc[-1] < history["loss_max"].iloc[0]
    path = tmp_path / "generated.vit.safetensors"
    studies.ship_vit(supernet, history, images, path, seed=0)
    again = studies.load_vit(path)
    pixels = images.normalise(images.test.images[:20])
    for config in (ROUTES[0], ROUTES[-1]):
        ours, theirs = (net.prepare(config)(pixels) for net in (supernet, again))
        torch.testing.assert_close(theirs, ours, atol=0.02, rtol=0.02)
    assert len(path.with_suffix(".history.csv").read_text().splitlines()) == 3


def test_a_seed_says_what_is_learned():
    images = load_dataset("generated", generated=(200, 100))
    recipe = replace(adapt_vit_train.RECIPE, epochs=1, batch_size=200)
    runs = [studies.train_vit(images, recipe, seed=seed, watch=0)[1] for seed in (0, 0, 1)]
    losses = [run["loss_max"].item() for run in runs]
    assert losses[0] == losses[1] != losses[2]
