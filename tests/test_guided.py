"""The sampler that knows the costs: what a point adds, what it beats, what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_predictor import SPACE, truth, work

from dynlib.errors import SearchError
from dynlib.pareto import hypervolume, pareto_mask
from dynlib.searching import GuidedSampler, search
from dynlib.searching.guided import added_area
from suite.record.statistics import volumes


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_the_gain_of_a_point_is_the_hypervolume_that_it_adds(seed):
    rng = np.random.default_rng(seed)
    seen, new = rng.random((8, 2)), rng.uniform(-0.2, 1.2, (10, 2))
    reference = seen.max(axis=0)
    before = hypervolume(seen, reference)
    after = [hypervolume(np.vstack([seen, point]), reference) for point in new]
    gains = added_area(seen[pareto_mask(seen)], new, reference)
    np.testing.assert_allclose(gains, np.array(after) - before, atol=1e-12)


def test_a_guided_search_beats_chance():
    goals = {"accuracy": "maximize", "cost": "minimize"}

    def objective(config):
        return {"accuracy": truth(config), "cost": work(config)}

    tables = []
    for seed in range(3):
        guided = GuidedSampler(SPACE, work, work, seed=seed)
        tables.append(search(SPACE, objective, goals, trials=25, seed=seed, sampler=guided))
        tables.append(search(SPACE, objective, goals, trials=25, seed=seed, sampler="random"))
    ours, chance = volumes(tables, goals).reshape(3, 2).T
    assert (ours > chance).all()
    again = GuidedSampler(SPACE, work, work, seed=2)
    repeat = search(SPACE, objective, goals, trials=25, seed=2, sampler=again)
    assert list(repeat["subnet"]) == list(tables[4]["subnet"])


@pytest.mark.parametrize("goals", [
    {"cost": "minimize", "accuracy": "maximize"},
    {"accuracy": "maximize", "cost": "minimize", "energy": "minimize"},
])  # fmt: skip
def test_other_objectives_are_refused(goals):
    def objective(config):
        return {"accuracy": truth(config), "cost": work(config), "energy": work(config)}

    guided = GuidedSampler(SPACE, work, work, seed=0)
    with pytest.raises(SearchError, match="expected accuracy to maximize, then a cost"):
        search(SPACE, objective, goals, trials=10, seed=0, sampler=guided)
