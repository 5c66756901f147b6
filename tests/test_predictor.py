"""The accuracy predictor."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from dynlib.errors import SearchError
from dynlib.searching.predictor import AccuracyPredictor, stratified
from dynlib.space import SearchSpace

SPACE = SearchSpace((24, 28, 32), ((1,), (1, 2), (1, 2)), ((8, 16, 24), (16, 32, 48), (32, 64)))


def work(config):
    return config.resolution**2 * sum(
        d * w for d, w in zip(config.depth, config.width, strict=True)
    )


def truth(config):
    """Accuracy grows with work, and some choices are better than their work."""
    return 60 + 4 * np.log(work(config)) + 1.5 * (config.depth[1] == 2) - (config.width[0] == 24)


def test_a_predictor_recovers_a_smooth_truth_and_knows_where_it_does_not():
    rng = np.random.default_rng(0)
    train = stratified(SPACE, work, 60, rng)
    unseen = stratified(SPACE, work, 60, rng, avoid=train)
    assert not set(train) & set(unseen)
    measured = [truth(c) + rng.normal(0, 0.1) for c in train]
    mean, sd = AccuracyPredictor(SPACE, work).fit(train, measured).predict(unseen)
    true = [truth(c) for c in unseen]
    tau = kendalltau(mean, true).statistic
    assert tau > 0.9
    assert tau > kendalltau([work(c) for c in unseen], true).statistic
    assert (np.abs(mean - true) < 4 * sd + 0.2).all()
    few, sd_few = AccuracyPredictor(SPACE, work).fit(train[:6], measured[:6]).predict(unseen)
    assert np.shape(few) == np.shape(mean)
    assert sd_few.mean() > sd.mean()


def test_learning_from_equal_accuracies_is_no_error():
    configs = stratified(SPACE, work, 8, np.random.default_rng(0))
    mean, sd = AccuracyPredictor(SPACE, work).fit(configs, [50.0] * len(configs)).predict(configs)
    assert mean == pytest.approx(50)
    assert np.isfinite(sd).all()
    with pytest.raises(SearchError, match="needs 5"):
        AccuracyPredictor(SPACE, work).fit(configs[:4], [1, 2, 3, 4])


def test_stratified_draws_are_even_in_log_work():
    drawn = stratified(SPACE, work, 40, np.random.default_rng(0), strata=4)
    assert len(drawn) == len(set(drawn)) == 40
    logs = np.log([work(c) for c in drawn])
    low, high = (np.log(work(c)) for c in (SPACE.smallest, SPACE.largest))
    counts, _ = np.histogram((logs - low) / (high - low), bins=4, range=(0, 1))
    assert counts.min() >= 5
