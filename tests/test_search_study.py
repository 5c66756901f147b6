"""What a search is worth: the replay, samplers and archives at equal effort, a front as a study."""

import numpy as np
import pytest
import test_evolve as evolution
import test_search as small
from hypothesis import given
from hypothesis import strategies as st
from test_predictor import SPACE, truth, work

from dynlib.pareto import pareto_mask
from dynlib.searching import front, search
from suite.studies.search import (
    RankedPopulation,
    compare_archives,
    compare_samplers,
    compare_stopping,
    gains,
    record_front,
    replayed,
)


def test_a_replay_keeps_what_was_measured_and_is_as_rough():
    rng = np.random.default_rng(0)
    everything = {config: truth(config) + rng.normal(0, 0.3) for config in SPACE}
    known = {str(config): everything[config] for config in list(everything)[::3]}
    replay = replayed(known, SPACE, work, rng)
    assert set(replay) == set(everything)
    assert all(replay[config] == everything[config] for config in list(everything)[::3])
    unseen = [config for config in SPACE if str(config) not in known]
    errors = np.array([replay[config] - truth(config) for config in unseen])
    assert 0.1 < errors.std() < 0.6
    everybody = {str(config): accuracy for config, accuracy in reversed(everything.items())}
    measured = replayed(everybody, SPACE, work, rng)
    assert list(measured.items()) == list(everything.items())  # in the order of the space


def test_samplers_are_compared_at_equal_trials_and_a_seed_repeats():
    accuracy = {config: truth(config) for config in SPACE}
    tables = [
        compare_samplers(SPACE, accuracy, work, work, trials=12, seeds=range(5), generations=25)
        for _ in "ab"
    ]
    one, two = (table.drop(columns="s_per_trial") for table in tables)
    assert one.equals(two)
    published = one["sampler"] == "evolution, published"
    assert one.loc[published, "generations"].tolist() == [25] * 5
    assert (one.loc[published, "trials"] > 12).all()
    assert one["share_of_truth"].between(0, 1).all()
    assert one.loc[published, "share_of_truth"].min() > 0.95
    one = one[~published]
    assert (one["trials"] == 12).all()
    assert one.groupby("sampler")["seed"].nunique().to_dict() == dict.fromkeys(
        ("evolution", "gp", "guided", "nsga2", "random", "tpe"), 5
    )
    rivals = gains(one, "sampler", "guided")
    assert set(rivals.index) == {"evolution", "gp", "nsga2", "random", "tpe"}
    assert (rivals["low"] < rivals["gain_pct"]).all()
    assert (rivals["gain_pct"] < rivals["high"]).all()
    best = one.pivot(index="seed", columns="sampler", values="hypervolume")
    expected = 100 * (np.exp(np.log(best["guided"] / best["nsga2"]).mean()) - 1)
    assert rivals.loc["nsga2", "gain_pct"] == pytest.approx(expected)


def test_stopping_saves_images_and_hardly_any_of_the_front():
    accuracy = {config: truth(config) - 20 for config in SPACE}
    one, two = (
        compare_stopping(SPACE, accuracy, work, images=5000, trials=30, seeds=range(5))
        for _ in "ab"
    )
    assert one.equals(two)
    table = one.pivot(index=["sampler", "seed"], columns="risk")
    assert len(table) == 10
    assert (table["images", 0.0] == 30 * 5000).all()
    assert (table["stopped", 0.0] == 0).all()
    assert (table["images", 0.05] < table["images", 0.0]).all()
    assert (table["stopped", 0.05] < 30).all()
    by_chance = table.loc["random", "hypervolume"]  # of the same networks
    assert (by_chance[0.05] <= by_chance[0.0]).all()
    assert (by_chance[0.05] / by_chance[0.0]).mean() > 0.95


def test_archives_are_compared_at_equal_evaluations():
    table = compare_archives(
        evolution.evaluate,
        evolution.CHOICES,
        evolution.PLACES,
        evolution.KINDS,
        (16.0, 0.0),
        generations=(1, 4),
        seeds=range(2),
    )
    assert table.groupby("evaluations")["archive"].nunique().tolist() == [2, 2]
    by_look = table.pivot(index=["archive", "seed"], columns="evaluations", values="hypervolume")
    assert (np.diff(by_look, axis=1) >= 0).all()


@given(st.integers(0, 2**32))
def test_a_ranked_population_keeps_the_front_and_its_size(seed):
    rng = np.random.default_rng(seed)
    population = RankedPopulation(np.zeros(0), 1)
    population.size = 20
    points = rng.integers(0, 30, (60, 2)).astype(float)  # some are equal
    for part in np.split(points, 3):
        population.add(np.zeros((20, 1), np.int8), part[:, 0], part[:, 1])
    assert len(population.score) <= 20
    front = points[pareto_mask(np.stack([-points[:, 0], points[:, 1]], axis=1))]
    elite = population.elite()
    kept = np.stack([population.score[elite], population.cost[elite]], axis=1)
    assert sorted(map(tuple, kept)) == sorted(map(tuple, front))
    assert set(elite) <= set(population.elite(slack=1.0))


def test_a_front_found_elsewhere_becomes_a_study(tmp_path):
    storage = tmp_path / "study.log"
    found = search(small.SPACE, small.objective, small.GOALS, trials=20, seed=0)
    table = front(found, small.GOALS)
    for _ in range(2):  # writing twice changes nothing
        study = record_front(small.SPACE, table, small.GOALS, storage=storage, name="mine")
    assert len(study.trials) == len(table)
    assert {t.user_attrs["subnet"] for t in study.best_trials} == set(table["subnet"])
    more = search(
        small.SPACE,
        small.objective,
        small.GOALS,
        trials=25,
        seed=1,
        storage=storage,
        name="mine",
    )
    assert list(more["subnet"][: len(table)]) == list(table["subnet"])
