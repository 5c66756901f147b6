"""The rate of a search with one and with many workers."""

from datetime import datetime, timedelta

import optuna
import pytest
from optuna.distributions import FloatDistribution

import suite.studies.workers
from dynlib.searching.study import open_storage
from dynlib.space import SearchSpace
from suite.studies.workers import Pause, trials_per_s

SPACE = SearchSpace((16, 24), ((1, 2),) * 3, ((8, 16, 24),) * 3)


def test_a_pause_measures_its_sub_network():
    config = SPACE.largest
    assert Pause(0.0)(config) == {"size": 6 + 72, "resolution": 24}


def test_a_rate_counts_trials_and_not_the_start_of_processes(tmp_path, monkeypatch):
    """Twenty trials, one a quarter of a second, after processes that took a minute to start."""
    begin = datetime(2026, 1, 1)
    quarter = timedelta(seconds=0.25)
    distribution = {"x": FloatDistribution(0.0, 1.0)}

    def slow_to_start(*_, trials, storage, name, **__):
        study = optuna.create_study(study_name=name, storage=open_storage(storage))
        for i in range(trials):
            start = begin + timedelta(minutes=1) + i * quarter
            trial = optuna.trial.create_trial(
                params={"x": 0.5}, distributions=distribution, value=1.0
            )
            trial.datetime_start, trial.datetime_complete = start, start + quarter
            study.add_trial(trial)
        return range(trials)

    monkeypatch.setattr(suite.studies.workers, "search", slow_to_start)
    storage = tmp_path / "study.log"
    rate = trials_per_s(SPACE, storage, workers=4, trials=20, pause_s=0.05)
    assert rate == pytest.approx(20 / 5)


def test_every_trial_of_several_workers_counts(tmp_path):
    storage = tmp_path / "study.log"
    rate = trials_per_s(SPACE, storage, workers=2, trials=10, pause_s=0.01)
    study = optuna.load_study(study_name="pause-2", storage=open_storage(storage))
    starts = [trial.datetime_start for trial in study.trials]
    ends = [trial.datetime_complete for trial in study.trials]
    assert rate == pytest.approx(10 / (max(ends) - min(starts)).total_seconds())
