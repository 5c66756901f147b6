"""A whole space in one walk gives what each sub-network gives alone."""

import pytest

from dynlib.data import load_dataset
from dynlib.nets.supernet import Supernet
from dynlib.space import SearchSpace
from dynlib.training.trainer import evaluate
from suite.studies.whole_space import measure_space


@pytest.mark.parametrize("bf16", [False, True])
def test_the_walk_agrees_with_every_network_alone(bf16):
    images = load_dataset("generated", size=16, generated=(300, 150))
    space = SearchSpace((14, 16), ((0, 1), (1, 2)), ((8, 16), (8, 16, 24)))
    supernet = Supernet(space, len(images.classes))
    parts = images.val, images.test
    found = measure_space(supernet, list(space), images, parts, calibration=100, bf16=bf16)
    assert set(found) == set(space)
    for config in space:
        alone = [evaluate(supernet, config, images, part, calibration=100, bf16=bf16)
                 for part in parts]  # fmt: skip
        assert list(found[config]) == alone
    assert len(set(found.values())) > space.size / 4  # they do differ


def test_only_what_is_asked_for_is_measured():
    images = load_dataset("generated", size=16, generated=(300, 60))
    space = SearchSpace((16,), ((1,), (1, 2)), ((8, 16), (8,)))
    supernet = Supernet(space, len(images.classes))
    some = [space.smallest, space.largest]
    assert set(measure_space(supernet, some, images, [images.val], calibration=100)) == set(some)
