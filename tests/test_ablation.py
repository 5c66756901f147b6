"""Recipes side by side, and sub-networks against their twins alone."""

from dataclasses import replace

import pytest
import torch

from dynlib.data import load_dataset
from dynlib.nets.supernet import Supernet
from dynlib.space import SearchSpace
from dynlib.training.recipes import PUBLISHED, Recipe
from dynlib.training.step import bf16_pays
from dynlib.training.trainer import evaluate, train
from suite.studies.ablation import compare_alone, compare_recipes, single

SPACE = SearchSpace((16,), ((1,), (0, 1)), ((8, 16), (8, 16)))
SHORT = Recipe(epochs=2, batch_size=50)


@pytest.fixture(scope="module")
def images():
    return load_dataset("generated", size=16, generated=(300, 60))


def build(space):
    return Supernet(space, 10)


RECIPES = {
    name: Recipe(epochs=1, batch_size=50, **PUBLISHED[name])
    for name in ("slimmable", "bootstrapping")
}


def test_one_row_per_seed_recipe_and_network(images):
    table = compare_recipes(RECIPES, SPACE.ladder(2), SPACE, images, seeds=(3, 4), processes=1)
    assert list(table["seed"]) == [3] * 4 + [4] * 4
    assert list(table["recipe"]) == ["slimmable", "slimmable", "bootstrapping", "bootstrapping"] * 2
    assert table["accuracy_val_pct"].between(0, 100).all()
    assert (table["seconds"] > 0).all()


def test_in_other_processes_recipes_come_to_the_same(images):
    """One thread each, here and there: sums are in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here, there = (compare_recipes(RECIPES, [SPACE.largest], SPACE, images, processes=many)
                       for many in (1, 2))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert here.drop(columns="seconds").equals(there.drop(columns="seconds"))


def test_a_comparison_goes_on_from_its_states(images, tmp_path, monkeypatch):
    one = {"slimmable": RECIPES["slimmable"]}
    configs = [SPACE.largest]
    first = compare_recipes(one, configs, SPACE, images, state=tmp_path, processes=1)
    states = list(tmp_path.iterdir())
    assert len(states) == 1

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("dynlib.training.step.Step.__call__", never)
    again = compare_recipes(one, configs, SPACE, images, state=tmp_path, processes=1)
    assert again.equals(first)


def test_the_largest_alone_is_what_training_a_space_of_one_gives(images):
    """So nothing of the super-network leaks into its rival, and the better rate is taken."""
    recipes = {"one": SHORT, "other": replace(SHORT, teacher="labels")}
    both = compare_alone(recipes, [0.001, 0.1], [SPACE.largest], build, SPACE, images)
    assert list(both["recipe"]) == ["one", "other"]
    assert both["alone_pct"].nunique() == both["alone_lr"].nunique() == 1  # trained once
    table = both.iloc[0]
    by_rate = {}
    best = table["alone_lr"]
    for lr in {0.001, 0.1, best / 2, best, best * 2}:
        torch.manual_seed(0)
        net = build(single(SPACE.largest))
        train(net, images, Recipe(epochs=2, batch_size=50, lr=lr), watch=0)
        val, test = (evaluate(net, SPACE.largest, images, part, bf16=bf16_pays())
                     for part in (images.val, images.test))  # fmt: skip
        by_rate[lr] = val, test
    assert by_rate[best][0] == max(val for val, _ in by_rate.values())
    assert table["alone_pct"] == by_rate[best][1]


def test_other_seeds_take_the_rates_of_the_first(images):
    configs = [SPACE.smallest, SPACE.largest]
    recipes = {"shipped": SHORT, "other": replace(SHORT, teacher="labels")}
    table = compare_alone(recipes, [0.1, 0.2], configs, build, SPACE, images, seeds=(0, 1))
    assert list(table["seed"]) == [0, 0, 0, 0, 1, 1]
    assert set(table.loc[table["seed"] == 1, "recipe"]) == {"shipped"}
    assert (table["distilled_alone_pct"].notna() == (table["seed"] == 0)).all()
    assert (table.groupby("subnet")[["alone_lr", "supernet_lr"]].nunique() == 1).all(axis=None)
    shipped = table[table["recipe"] == "shipped"]
    first, second = (shipped[shipped["seed"] == seed] for seed in (0, 1))
    assert list(first["alone_pct"]) != list(second["alone_pct"])
