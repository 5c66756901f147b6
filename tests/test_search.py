"""The Optuna study: equal trials, resuming, fronts and volumes."""

import numpy as np
import pytest

from dynlib.search.study import SearchError, front, growth, paired_ratio, search, volumes
from dynlib.space import SearchSpace

SPACE = SearchSpace((16, 24, 32), ((1, 2), (1, 2)), ((8, 16, 24), (8, 16, 24)))
GOALS = {"accuracy": "maximize", "latency_ms": "minimize"}


def objective(config):
    """Wide networks are better and slower; depth only costs, so search can find that out."""
    work = config.resolution * sum(config.width)
    return {"accuracy": np.log(work), "latency_ms": work * sum(config.depth), "other": 1.0}


@pytest.mark.parametrize("sampler", ["nsga2", "random"])
def test_trials_stay_in_the_space_and_repeat_for_a_seed(sampler):
    one, two = (search(SPACE, objective, GOALS, trials=12, seed=3, sampler=sampler) for _ in "ab")
    assert list(one["subnet"]) == list(two["subnet"])
    assert len(one) == 12
    assert one["subnet"].is_unique
    assert {"accuracy", "latency_ms", "other", "sampler", "seed"} <= set(one)


def test_an_interrupted_study_resumes_on_disk(tmp_path):
    calls = []

    def breaks(config):
        calls.append(config)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return objective(config)

    journal = tmp_path / "study.log"
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, breaks, GOALS, trials=10, seed=0, storage=journal)
    table = search(SPACE, breaks, GOALS, trials=10, seed=0, storage=journal)
    assert len(table) == 10
    assert len(calls) == 11  # four kept, one lost, six more
    assert len(search(SPACE, breaks, GOALS, trials=10, seed=0, storage=journal)) == 10
    assert len(calls) == 11
    with pytest.raises(SearchError, match="objectives"):
        search(SPACE, objective, {"accuracy": "maximize"}, trials=1, seed=0, storage=journal)


def test_a_search_tries_its_start_first():
    start = SPACE.ladder(4)
    table = search(SPACE, objective, GOALS, trials=6, seed=0, start=start)
    assert list(table["subnet"][: len(start)]) == [str(config) for config in start]
    assert len(table) == 6


def test_a_repeated_proposal_costs_nothing_and_a_small_space_is_enough():
    calls = []
    tiny = SearchSpace((16,), ((1, 2),), ((8, 16),))

    def count(config):
        calls.append(config)
        return objective(config)

    table = search(tiny, count, GOALS, trials=10, seed=0, population=2)
    assert len(calls) == len(set(calls)) == len(table) == tiny.size


def test_unknown_sampler_is_refused():
    with pytest.raises(SearchError, match="nsga2"):
        search(SPACE, objective, GOALS, trials=1, seed=0, sampler="genetic")


def test_the_front_holds_no_dominated_row():
    table = search(SPACE, objective, GOALS, trials=40, seed=1)
    best = front(table, GOALS)
    assert best["latency_ms"].is_monotonic_increasing
    assert best["accuracy"].is_monotonic_increasing
    assert best["subnet"].is_unique


def test_volumes_use_one_reference_and_ratios_need_five_pairs():
    tables = [search(SPACE, objective, GOALS, trials=30, seed=s) for s in range(2)]
    one, two = volumes(tables, GOALS)
    assert one > 0
    assert two > 0
    same = volumes([tables[0]] * 2, GOALS)
    assert same[0] == same[1]
    for curve, end in zip(growth(tables, GOALS), (one, two), strict=True):
        assert (np.diff(curve) >= 0).all()
        assert curve[-1] == end
    mean, low, high = paired_ratio(np.array([2, 2.2, 1.8, 2, 2]), np.ones(5))
    assert low < mean < high
    assert mean == pytest.approx(2, rel=0.05)
    with pytest.raises(SearchError, match="at least 5"):
        paired_ratio(np.ones(4), np.ones(4))
