"""Maskers and their losses, against the equations and constants of LAUDNet."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.decide.decisions import Kept
from dynlib.decide.maskers import (
    ChannelMasker,
    PatchMasker,
    bottleneck_work,
    bounds_at,
    bounds_loss,
    drawn,
    tau_at,
)
from dynlib.decide.walk import Seen


def kept(logits: torch.Tensor, bonus: float = 0.0) -> torch.Tensor:
    return Kept(bonus)(Seen(torch.arange(len(logits)), logits, logits))


@pytest.mark.parametrize(
    ("masker", "shape", "probability"),
    [
        (PatchMasker(8, 1), (3, 2), 0.993),
        (PatchMasker(8, 4), (3, 2, 4, 4), 0.993),
        (ChannelMasker(8, 5), (3, 2, 2, 5), 0.982),
    ],
)
def test_a_masker_gives_two_logits_a_part_and_starts_at_keeping_it(masker, shape, probability):
    said = masker(torch.zeros(3, 8, 8, 8))
    assert said.shape == shape
    if isinstance(masker, PatchMasker):  # without an input, and without hidden units
        torch.testing.assert_close(
            said.softmax(1)[:, 0], torch.full_like(said[:, 0], probability), rtol=0, atol=5e-4
        )
    assert kept(masker(torch.randn(3, 8, 8, 8))).all()


def test_channels_start_at_plus_and_minus_two():
    masker = ChannelMasker(8, 5)
    assert masker.logits.bias.view(2, 2, 5)[0].eq(2).all()
    assert masker.logits.bias.view(2, 2, 5)[1].eq(-2).all()
    assert masker.hidden.out_features == 16
    assert ChannelMasker(8, 512).hidden.out_features == 32
    assert torch.sigmoid(torch.tensor(4.0)).item() == pytest.approx(0.982, abs=5e-4)


def test_patches_are_means_over_their_pixels():
    masker = PatchMasker(1, 2)
    torch.nn.init.ones_(masker.logits.weight)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    said = masker(x)[0, 0] - 5
    assert said.tolist() == [[2.5, 4.5], [10.5, 12.5]]
    layer = PatchMasker(1, 1)
    torch.nn.init.ones_(layer.logits.weight)
    assert layer(x).tolist() == [[12.5, 7.5]]


def test_at_test_time_the_larger_logit_decides_and_who_knows_nothing_keeps():
    logits = torch.tensor([[1.0, 1.0], [0.9, 1.0], [torch.nan, 9.0], [0.0, torch.nan]])
    assert kept(logits).tolist() == [1, 0, 1, 1]
    assert kept(logits, bonus=0.2).tolist() == [1, 1, 1, 1]


@settings(max_examples=20)
@given(st.floats(-3, 3), st.floats(0.1, 5))
def test_drawn_masks_keep_with_the_probability_of_the_logits(difference, tau):
    logits = torch.tensor([difference, 0.0]).view(1, 2, 1).expand(4000, 2, 5)
    torch.manual_seed(0)
    mask = drawn(logits, tau)
    assert mask.shape == (4000, 5)
    assert ((mask - mask.round()).abs() < 1e-5).all()
    assert mask.mean().item() == pytest.approx(1 / (1 + math.exp(-difference)), abs=0.02)


def test_gradients_reach_the_masker_straight_through():
    masker = ChannelMasker(8, 4)
    drawn(masker(torch.randn(6, 8, 4, 4)), 1.0).sum().backward()
    assert masker.logits.weight.grad.abs().sum() > 0


def test_the_temperature_falls_exponentially():
    assert tau_at(0.0) == 5.0
    assert tau_at(1.0) == pytest.approx(0.1)
    assert tau_at(0.5) == pytest.approx(math.sqrt(5.0 * 0.1))


@given(st.floats(0, 1), st.floats(0, 1))
def test_bounds_widen_around_the_target(progress, target):
    low, high = bounds_at(progress, target)
    assert -1e-12 <= low <= target + 1e-12
    assert target - 1e-12 <= high <= 1 + 1e-12
    assert bounds_at(0.0, target) == pytest.approx((target, target))
    assert bounds_at(0.34, target) == pytest.approx((0.0, 1.0))
    assert bounds_at(0.165, target) == pytest.approx((target / 2, 1 - (1 - target) / 2))


def test_the_loss_of_bounds_by_hand():
    densities = torch.tensor([0.9, 0.5, 0.2])
    # At first every block is held at the target, later only the network's work is.
    first = bounds_loss(densities, torch.tensor(0.6), 0.5, 0.0)
    assert first.item() == pytest.approx((0.4**2 + 0.3**2) / 3 + 0.1**2)
    later = bounds_loss(densities, torch.tensor(0.6), 0.5, 0.4)
    assert later.item() == pytest.approx(0.1**2)
    half_way = bounds_loss(densities, torch.tensor(0.5), 0.5, 0.165)
    assert half_way.item() == pytest.approx((0.15**2 + 0.05**2) / 3)


def test_work_of_a_bottleneck():
    convs = (64 * 256, 64 * 64 * 9, 64 * 256)  # a pixel of ResNet-50's first stage
    half = bottleneck_work(convs, torch.tensor(0.5))
    assert half.item() == pytest.approx((0.5 * 16384 + 0.25 * 36864 + 0.5 * 16384) / 69632)
    assert bottleneck_work(convs, torch.tensor(1.0), 0.3).item() == pytest.approx(0.3)
