"""Trials that end early: none that belongs on the front, and none that was not beaten."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_search import SPACE

from dynlib.errors import SearchError
from dynlib.pareto import pareto_mask
from dynlib.searching import StopHopeless, front, search
from dynlib.space import SubnetConfig

NETS = [SubnetConfig(32, width=(width,)) for width in range(1, 7)]
GOALS = {"accuracy_val_pct": "maximize", "latency_ms": "minimize"}


def racing(outcomes, latency_ms, looks=10, **more):
    """An objective over given outcomes by network, and the parts that each was asked for."""
    asked = dict.fromkeys(outcomes, 0)

    def answers(config):
        for part in np.array_split(outcomes[config], looks):
            asked[config] += len(part)
            yield part

    images = len(next(iter(outcomes.values())))
    measure = StopHopeless(
        answers, lambda config: {"latency_ms": latency_ms[config]}, images=images, **more
    )
    return measure, asked


def corners(points):
    return sorted(map(tuple, np.round(points, 9)[pareto_mask(np.round(points, 9))].tolist()))


def drawn(seed, nets=NETS, images=60):
    rng = np.random.default_rng(seed)
    outcomes = {net: rng.random(images) < rng.random() for net in nets}
    return outcomes, {net: float(rng.integers(1, 4)) for net in nets}


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.05, 0.5]))
def test_who_is_stopped_is_below_a_rival_as_it_is_told(seed, risk):
    outcomes, latency_ms = drawn(seed)
    measure, asked = racing(outcomes, latency_ms, risk=risk)
    whole = []
    for net in NETS:
        told = measure(net)
        assert told["images"] == asked[net]  # no part is computed for nothing
        right = np.count_nonzero(outcomes[net][: asked[net]])
        assert told["accuracy_val_pct"] == 100 * right / asked[net]
        if told["images"] == 60:
            whole.append(told)
            continue
        rivals = [other for other in whole if other["latency_ms"] <= told["latency_ms"]]
        assert max(other["accuracy_val_pct"] for other in rivals) > told["accuracy_val_pct"]


@given(st.integers(0, 2**32))
def test_without_risk_the_front_is_the_one_of_all_images(seed):
    outcomes, latency_ms = drawn(seed)
    measure, _ = racing(outcomes, latency_ms, risk=1e-12)  # stops at what cannot be any more
    everything = [(latency_ms[net], -100 * right.mean()) for net, right in outcomes.items()]
    told = [measure(net) for net in NETS]
    found = [(row["latency_ms"], -row["accuracy_val_pct"]) for row in told]
    assert corners(found) == corners(everything)


def test_a_look_is_the_sum_that_the_docstring_says():
    """Where the chance is just below the risk it stops, just above it goes on."""
    images, best, shown, right = 100, 90, 10, 6
    chance = sum(
        Fraction(comb(best, k) * comb(images - best, shown - k), comb(images, shown))
        for k in range(right + 1)
    )
    rival = np.arange(images) < best
    mine = np.r_[np.arange(shown) < right, np.ones(images - shown, bool)]
    for risk, images_shown in ((float(chance) * 1.001, 10), (float(chance) * 0.999, images)):
        outcomes = {NETS[0]: rival, NETS[1]: mine}
        measure, _ = racing(outcomes, dict.fromkeys(NETS, 1.0), risk=risk)
        assert measure(NETS[0])["images"] == images
        assert measure(NETS[1])["images"] == images_shown


def test_only_who_costs_no_more_is_a_rival():
    outcomes = {NETS[0]: np.ones(100, bool), NETS[1]: np.zeros(100, bool)}
    faster, _ = racing(outcomes, {NETS[0]: 2.0, NETS[1]: 1.0})
    assert [faster(net)["images"] for net in NETS[:2]] == [100, 100]
    slower, _ = racing(outcomes, {NETS[0]: 1.0, NETS[1]: 2.0})
    assert [slower(net)["images"] for net in NETS[:2]] == [100, 10]


def test_a_study_of_two_objectives_ends_hopeless_trials_early():
    rng = np.random.default_rng(0)
    outcomes = {net: rng.random(500) < 0.5 + 0.01 * sum(net.width) for net in SPACE}
    latency_ms = {net: float(net.resolution * sum(net.width) * sum(net.depth)) for net in SPACE}
    measure, asked = racing(outcomes, latency_ms)
    table = search(SPACE, measure, GOALS, trials=40, seed=0, start=SPACE.ladder(3))
    assert len(table) == 40
    assert table["images"].sum() == sum(asked.values()) < 0.8 * 40 * 500
    assert (front(table, GOALS)["images"] == 500).all()


@pytest.mark.parametrize("said", [59, 61])
def test_another_number_of_images_than_said_is_an_error(said):
    measure = StopHopeless(lambda config: [np.ones(60, bool)], lambda config: {}, images=said)
    with pytest.raises(SearchError, match=rf"r32-w1: answers to 60 images, expected {said}"):
        measure(NETS[0])
