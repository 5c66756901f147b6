"""What a network itself needs, counted by hand; timings that somebody disturbed."""

import pytest
import torch
from torch import nn

from dynlib.profile.timing import Latency
from suite.studies import own_memory_mb, quietest


def test_memory_is_weights_and_the_largest_layer_by_hand():
    net = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 2)).eval()
    weights = 10 * 100 + 100 + 100 * 2 + 2
    assert own_memory_mb(net, torch.zeros(1, 10)) == pytest.approx(4e-6 * (weights + 100 + 100))
    assert own_memory_mb(net, torch.zeros(5, 10)) == pytest.approx(4e-6 * (weights + 5 * 200))
    assert not net[0]._forward_hooks


def test_memory_does_not_depend_on_who_ran_before():
    small, large = nn.Linear(4, 4), nn.Linear(1000, 1000)
    before = own_memory_mb(small, torch.zeros(1, 4))
    own_memory_mb(large, torch.zeros(1, 1000))
    assert own_memory_mb(small, torch.zeros(1, 4)) == before


def test_a_disturbed_timing_is_repeated_and_the_least_disturbed_kept():
    calm, wild, wilder = (Latency((1.0,) * 90 + (slow,) * 10) for slow in (1.1, 5.0, 9.0))
    coming = iter([wild, calm])
    assert quietest(lambda: next(coming)) is calm
    coming = iter([wilder, wild, wilder])
    assert quietest(lambda: next(coming), attempts=3) is wild
