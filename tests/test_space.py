"""Configurations and search spaces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import ConfigError
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

BLOCKS = SearchSpace((176, 224), ((2, 3),), kernel=((3, 5, 7), (3, 5)), expand=((3, 4, 6), (3, 6)))
SPACE = SearchSpace((28, 32), ((1,), (1, 2)), ((8, 16), (16, 24, 32)))


def seeds():
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@given(st.sampled_from([SPACE, BLOCKS]), seeds())
def test_a_sample_round_trips_through_string_indices_and_dict(space, rng):
    config = space.sample(rng)
    assert config in space
    assert SubnetConfig.parse(str(config)) == config
    assert space.decode(space.encode(config)) == config
    assert SearchSpace.from_dict(space.to_dict()) == space


def test_a_string_names_only_the_dimensions_that_are_elastic():
    config = SubnetConfig(176, (2,), kernel=(7, 5), expand=(6, 3))
    assert str(config) == "r176-d2-k7.5-e6.3"
    assert config in BLOCKS
    assert config not in SPACE


def test_strings_are_unique_and_count_the_space():
    assert len({str(c) for c in SPACE}) == SPACE.size == 2 * 1 * 2 * 2 * 3
    assert SPACE.largest == SubnetConfig(32, (1, 2), (16, 32))
    assert SPACE.smallest == SubnetConfig(28, (1, 1), (8, 16))


def test_a_ladder_climbs_from_end_to_end():
    rungs = SPACE.ladder(5)
    assert rungs[0] == SPACE.smallest
    assert rungs[-1] == SPACE.largest
    steps = np.diff([SPACE.encode(config) for config in rungs], axis=0)
    assert (steps >= 0).all()
    assert len(set(rungs)) == len(rungs) <= 5


@given(seeds(), st.floats(0, 1))
def test_a_mutation_stays_in_the_space(rng, p):
    assert SPACE.mutate(SPACE.largest, rng, p) in SPACE


def test_mutating_with_probability_zero_changes_nothing():
    rng = np.random.default_rng(0)
    config = SPACE.sample(rng)
    assert SPACE.mutate(config, rng, 0.0) == config


@pytest.mark.parametrize("text", ["", "d1", "r32-d1-w", "r32-w8-d1", "r32-w8,16", "x", "r-1"])
def test_a_malformed_string_is_refused(text):
    with pytest.raises(ConfigError, match="expected"):
        SubnetConfig.parse(text)


def test_a_configuration_outside_names_the_axis():
    with pytest.raises(ConfigError, match="width1 is 99"):
        SPACE.check(SubnetConfig(32, (1, 2), (16, 99)))
    with pytest.raises(ConfigError, match="1 entries of depth, expected 2"):
        SPACE.check(SubnetConfig(32, (1,), (16,)))
    assert SubnetConfig(32, (1,), (16,)) not in SPACE


def test_a_space_needs_ascending_choices_and_known_keys():
    with pytest.raises(ConfigError, match="width0"):
        SearchSpace((32,), ((1,),), ((16, 8),))
    with pytest.raises(ConfigError, match="resolution"):
        SearchSpace.from_dict({"depth": [[1]]})
    with pytest.raises(ConfigError, match="resolution"):
        SearchSpace.from_dict({"resolution": [32], "height": [[1]]})


def test_a_layer_counts_its_work():
    layer = LayerSpec("conv", 16, 32, kernel=3, in_size=8, out_size=8)
    assert layer.params == 9 * 16 * 32
    assert layer.macs == layer.params * 64
    assert LayerSpec("conv", 32, 32, 3, groups=32).params == 9 * 32


def test_a_share_of_every_axis_and_a_text_for_a_configuration():
    assert SPACE.at(0) == SPACE.smallest
    assert SPACE.at(1) == SPACE.largest
    assert SPACE.at(0.9) in SPACE
    text = str(SPACE.at(0.9))
    assert SPACE.check(text) == SPACE.at(0.9)
    assert text in SPACE
    assert "r1-w1" not in SPACE
    with pytest.raises(ConfigError, match=r"share 1.5: expected 0"):
        SPACE.at(1.5)
