"""Recipes: what each one draws, who teaches, and that one trainer runs and resumes them all."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import fresh, weights

from dynlib.data import load_dataset
from dynlib.errors import RecipeError
from dynlib.nets.supernet import Supernet, macs_m
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training.recipes import PUBLISHED, Average, Recipe, draw_configs
from dynlib.training.step import Step, normalise_
from dynlib.training.trainer import train

SPACE = SearchSpace((12, 16), ((1,), (0, 1)), ((8, 16), (8, 16, 24)))


@pytest.fixture(scope="module")
def images():
    return load_dataset("generated", size=16, generated=(200, 40))


@torch.no_grad()
def label_loss(supernet, dataset) -> float:
    batch = dataset.normalise(dataset.train.images)
    logits = supernet(batch, SPACE.largest)
    return torch.nn.functional.cross_entropy(logits, dataset.train.labels).item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_recipe_learns_and_resumes_bit_for_bit(name, images, tmp_path):
    recipe = Recipe(epochs=4, batch_size=50, **PUBLISHED[name])
    whole = fresh(SPACE)
    before = label_loss(whole, images)
    train(whole, images, recipe)
    assert label_loss(whole, images) < before
    for _ in range(2):
        parts = fresh(SPACE)
        train(parts, images, recipe, state_file=tmp_path / "state.pt", stop_after_epochs=2)
    assert torch.equal(weights(whole), weights(parts))


@given(st.integers(0, 2**32 - 1), st.integers(0, 99), st.floats(0, 1))
def test_a_sandwich_holds_the_largest_and_in_turn_the_smallest(seed, step, progress):
    rng = np.random.default_rng(seed)
    drawn = draw_configs(Recipe(students=1), SPACE, step, progress, rng)
    assert drawn[0] == SPACE.largest
    assert len(drawn) == 2
    assert drawn[1] in SPACE
    if step % 2 == 0:
        assert drawn[1] == SPACE.smallest


def test_shrinking_starts_with_the_largest_and_unlocks_depth_before_width():
    recipe, rng = Recipe(sampling="shrink", teacher="frozen"), np.random.default_rng(0)

    def seen(progress):
        steps = [draw_configs(recipe, SPACE, i, progress, rng) for i in range(40)]
        return {config for configs in steps for config in configs}

    assert seen(0.1) == {SPACE.largest}
    assert seen(0.3) == {SubnetConfig(r, (1, 1), (16, 24)) for r in (12, 16)}
    assert {c.depth for c in seen(0.6)} == {(1, 0), (1, 1)}
    assert {c.width for c in seen(0.6)} == {(16, 24)}
    assert len({c.width for c in seen(0.9)}) == 6


def test_a_space_of_one_is_trained_alone():
    config = SubnetConfig(12, (1, 0), (8, 16))
    space = SearchSpace((12,), ((1,), (0,)), ((8,), (16,)))
    assert draw_configs(Recipe(), space, 0, 0.5, np.random.default_rng(0)) == [config]
    assert space.size == 1


def test_the_average_starts_at_the_weights_and_lags_behind():
    net = fresh(SPACE)
    average = Average(net, 0.5)
    before = weights(net).clone()
    with torch.no_grad():
        for p in net.net.parameters():
            p.add_(1)
    average.update(net)
    lag = weights(average.supernet) - before
    assert (lag > 0.5).all()
    assert (lag < 1).all()
    assert not any(p.requires_grad for p in average.supernet.parameters())


def test_students_of_another_view_see_another_image(images):
    views = iter([torch.zeros(4, 3, 16, 16), torch.ones(4, 3, 16, 16)])
    step = Step(fresh(SPACE), Recipe(teacher="ema", own_view=True))
    step.gradients(lambda: next(views), torch.arange(4), [SPACE.largest, SPACE.smallest])
    assert next(views, None) is None


def test_a_guide_replaces_the_labels():
    net, images = fresh(SPACE), torch.randn(8, 3, 16, 16)
    step = Step(net, Recipe(), guide=lambda x: torch.zeros(len(x), 10))
    labels = torch.zeros(8, dtype=torch.long)
    first = step.gradients(lambda: images, labels, [SPACE.largest])
    other = step.gradients(lambda: images, labels + 1, [SPACE.largest])
    assert first == other


def test_best_up_keeps_the_ends_and_never_picks_a_worse_one():
    net, images, labels = fresh(SPACE), torch.randn(8, 3, 16, 16), torch.arange(8)
    step, rng = Step(net, Recipe(sampling="best-up")), np.random.default_rng(1)
    for end in (SPACE.largest, SPACE.smallest):
        assert step._best_up(end, images, labels, rng) == end
    config = SubnetConfig(12, (1, 1), (8, 24))
    best = step._best_up(config, images, labels, rng)
    assert abs(macs_m(net, best) / macs_m(net, config) - 1) <= 0.1

    def loss(c):
        return torch.nn.functional.cross_entropy(step._logits(net, images, c), labels).item()

    assert loss(best) <= loss(config)


def test_normalising_changes_no_direction():
    net = fresh(SPACE)
    step = Step(net, Recipe())
    before = net.net.stages[0].conv.weight.clone()
    normalise_(step.solvers[0])
    after = net.net.stages[0].conv.weight
    assert after.norm().item() == pytest.approx(len(after) ** 0.5, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), 0) > 0.9999


@pytest.mark.parametrize("field", ["sampling", "teacher"])
def test_an_unknown_choice_is_refused(field):
    with pytest.raises(RecipeError, match=f"{field}: 'magic', expected one of"):
        Recipe(**{field: "magic"})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epochs", 0, "a whole number of at least 1"),
        ("epochs", -1, "a whole number of at least 1"),
        ("batch_size", 0.5, "a whole number of at least 1"),
        ("students", -1, "a whole number of at least 0"),
        ("lr", "big", "a finite number above 0"),
        ("lr_head", 0, "a finite number above 0"),
        ("distill", float("nan"), "a finite number of at least 0"),
        ("warmup", -0.1, "a finite number of at least 0"),
    ],
)
def test_a_number_that_cannot_be_is_refused(field, value, expected):
    with pytest.raises(RecipeError, match=f"recipe, {field}: {value!r}, expected {expected}"):
        Recipe(**{field: value})


def test_a_transformers_layers_are_moved_by_muon_and_the_rest_by_adamw():
    space = SearchSpace((16,), ((1, 2),), ((32,),), expand=((32, 64),) * 2, heads=((1, 2),) * 2)
    torch.manual_seed(0)
    net = Supernet(space, family="ViT")
    step = Step(net, Recipe(solver="muon+adamw", lr=1e-3, warmup=0.0, decay=0.0))
    layer, bias = net.net.blocks[0].up.weight, net.net.blocks[0].up.bias
    before = {p: p.detach().clone() for p in (layer, bias, net.net.head.weight)}
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    step(lambda: images, labels, step=0, progress=0.0, rng=np.random.default_rng(0))
    moved = {p: p.detach() - old for p, old in before.items()}
    spread = torch.linalg.svdvals(moved[layer])
    assert spread.median() > 0.8 * spread.max()  # an orthogonal step: all directions alike
    for p in (bias, net.net.head.weight):  # AdamW's first step is as large for every weight
        sizes = moved[p].abs()
        assert sizes.quantile(0.1) > 0.95 * sizes.max()
