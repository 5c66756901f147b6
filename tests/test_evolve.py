"""The vectorised archive search and the published evolutionary search."""

import itertools

import numpy as np
import pytest

from dynlib.errors import SearchError
from dynlib.space import SearchSpace
from suite.papers.evolution import evolve, published_evolution

CHOICES = np.array([3, 4, 4, 4, 4])
PLACES = np.array([0, 1, 1, 2, 2])
KINDS = np.array([0, 1, 2, 1, 2])


def evaluate(genes):
    """Cost is the sum; the score prefers the later axes, so that the front is known."""
    genes = genes.astype(float)
    return genes @ [0.5, 1, 2, 3, 4], genes.sum(axis=1) + 1


def everything():
    genes = np.array(list(itertools.product(*map(range, CHOICES))), np.int8)
    return genes, *evaluate(genes)


def search(seed, **more):
    ticks = itertools.count()  # a clock that counts calls makes runs equal on any machine
    return list(
        evolve(evaluate, CHOICES, PLACES, KINDS, seed=seed, checkpoints=(10, 120), islands=3,
               merge_s=20, population=32, clock=lambda: next(ticks), **more)
    )  # fmt: skip


def test_the_front_is_the_exhaustive_one():
    _, score, cost = everything()
    end = search(0)[-1]
    for cap in range(1, 16):
        assert end.best_below(cap) == score[cost <= cap].max()
    assert end.best_below(0.5) == -np.inf


def test_a_front_rises_and_its_genes_are_its_points():
    for front in search(1):
        assert (np.diff(front.cost) > 0).all()
        assert (np.diff(front.score) > 0).all()
        score, cost = evaluate(front.genes)
        np.testing.assert_array_equal(score, front.score)
        np.testing.assert_array_equal(cost, front.cost)
        assert (front.genes < CHOICES).all()


def test_checkpoints_come_in_order_and_a_seed_repeats():
    one, two = search(2), search(2)
    assert [f.cpu_s for f in one] == [10, 120]
    assert one[0].evaluations < one[1].evaluations
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.genes, b.genes)
    assert all(one[1].best_below(c) >= one[0].best_below(c) for c in range(1, 16))


SPACE = SearchSpace((16, 24, 32), ((1, 2),), ((8, 16, 24), (8, 16, 24)))


def cost(config):
    return config.resolution * sum(config.width) * config.depth[0]


def objective(config):
    return {"accuracy": float(np.log(cost(config))) - config.depth[0], "latency_ms": cost(config)}


def test_published_evolution_spends_its_trials_below_the_caps():
    caps = (600, 1200, 3072)
    table = published_evolution(SPACE, objective, cost, caps, score="accuracy", trials=24, seed=0)
    assert len(table) == table["subnet"].nunique() == 24
    assert (table["latency_ms"] <= caps[-1]).all()
    assert (table["latency_ms"][:8] <= caps[0]).all()
    again = published_evolution(SPACE, objective, cost, caps, score="accuracy", trials=24, seed=0)
    assert list(again["subnet"]) == list(table["subnet"])


def test_published_evolution_does_not_hang_on_an_infeasible_cap():
    with pytest.raises(SearchError, match="costs 1 or less; the smallest"):
        published_evolution(SPACE, objective, cost, (1,), score="accuracy", trials=5, seed=0)


def test_published_evolution_starts_where_it_is_told():
    start = SPACE.ladder(3)
    table = published_evolution(
        SPACE, objective, cost, (3072,), score="accuracy", trials=10, seed=0, start=start
    )
    assert list(table["subnet"][:3]) == [str(config) for config in start]
