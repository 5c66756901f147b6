"""Timing of switches, on a clock that the test turns."""

from itertools import pairwise

import numpy as np
import pytest

from dynlib.errors import ProfileError
from dynlib.profile.switching import profile_switches


def test_switch_and_frames_are_timed_apart():
    now = [0]
    seen = []

    def switch(name):
        now[0] += 3_000
        seen.append(name)

    def frame():
        now[0] += 1_000_000

    table = profile_switches(
        switch, frame, ["a", "b", "c"], count=50, rng=np.random.default_rng(0), clock=lambda: now[0]
    )
    assert set(table["switch_us"]) == {3.0}
    assert set(table["first_frame_us"]) == set(table["next_frame_us"]) == {1000.0}
    assert set(table["later_frame_us"]) == {1000.0}
    assert set(table["subnet"]) == {"a", "b", "c"}
    visits = ["a", *table["subnet"]]
    assert all(one != two for one, two in pairwise(visits))
    assert seen[-50:] == list(table["subnet"])


def test_one_subnet_cannot_be_switched():
    with pytest.raises(ProfileError, match="two sub-networks"):
        profile_switches(print, print, ["a"], count=5, rng=np.random.default_rng(0))


def test_a_slow_first_frame_is_seen_as_one():
    now, fresh = [0], [False]

    def switch(_):
        fresh[0] = True

    def frame():
        now[0] += 1_500_000 if fresh[0] else 1_000_000
        fresh[0] = False

    table = profile_switches(
        switch, frame, ["a", "b"], count=5, rng=np.random.default_rng(0), clock=lambda: now[0]
    )
    assert set(table["first_frame_us"] - table["next_frame_us"]) == {500.0}
    assert set(table["next_frame_us"] - table["later_frame_us"]) == {0.0}
