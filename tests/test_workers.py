"""The rate of a search with one and with many workers."""

from dynlib.space import SearchSpace
from suite.studies.workers import Pause, trials_per_s

SPACE = SearchSpace((16, 24), ((1, 2),) * 3, ((8, 16, 24),) * 3)


def test_a_pause_measures_its_sub_network():
    config = SPACE.largest
    assert Pause(0.0)(config) == {"size": 6 + 72, "resolution": 24}


def test_a_rate_counts_trials_and_not_the_start_of_processes(tmp_path):
    """Forty pauses take at least forty pauses: no faster for one worker, four times for four."""
    for workers in (1, 4):
        rate = trials_per_s(SPACE, tmp_path / "study.log", workers=workers, trials=40, pause_s=0.05)
        assert 0 < rate <= workers / 0.05
