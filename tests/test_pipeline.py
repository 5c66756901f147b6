"""Stages over links: cut well, compressed as said, exact where nothing is compressed."""

from itertools import combinations
from math import prod

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import CheckpointError, ModelError, PeerError, RecipeError
from dynlib.nets.resnet import ResNet
from dynlib.training.compress import Codec, Columns, Dense, LowRank, TopK, adaptive_ratios
from dynlib.training.pipeline import (
    BlockCost,
    Link,
    Pipeline,
    fence,
    iteration_s,
    place,
    survey,
    wire_bytes,
)  # fmt: skip
from suite.studies.across import can_link, kill_some, time_grid
from suite.studies.across_worker import NET

SHAPE = (2, 6, 3, 3)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.floats(1 / 3, 1e3))
def test_the_slowest_link_is_compressed_hardest(times_s, ratio):
    found = adaptive_ratios(times_s, ratio)
    assert found[times_s.index(max(times_s))] == pytest.approx(max(1, 3 * ratio))
    assert min(found) >= 1
    assert [x for _, x in sorted(zip(times_s, found, strict=True))] == sorted(found)
    assert adaptive_ratios(times_s, 1 / 3) == pytest.approx([1.0] * len(times_s))
    assert len(set(adaptive_ratios([2.0] * 3, ratio))) == 1


@pytest.mark.parametrize("ratio", [0.3, 0.0, -1.0, float("nan")])
def test_a_ratio_below_a_third_is_refused(ratio):
    with pytest.raises(RecipeError, match="at least 1/3"):
        adaptive_ratios([1.0], ratio)


@given(st.floats(1, 60), st.integers(0, 2**31))
def test_top_k_keeps_the_largest_and_says_where(ratio, seed):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    packing = TopK(SHAPE, ratio)
    buffer = packing.pack(x)
    assert buffer.shape == (packing.floats,)
    back = packing.unpack(buffer)
    kept = back != 0
    assert torch.equal(back[kept], x[kept])
    if packing.floats == prod(SHAPE):
        assert torch.equal(back, x)
    else:
        assert kept.sum() == packing.kept
        assert x[kept].abs().min() >= x[~kept].abs().max()


def test_a_buffer_that_nobody_wrote_is_no_crash():
    packing = TopK(SHAPE, 9.0)
    garbage = torch.full((packing.floats,), float("nan"))
    assert packing.unpack(garbage).shape == SHAPE


@pytest.mark.parametrize("kind", [Columns, LowRank])
def test_other_packings_are_exact_when_nothing_is_left_out(kind):
    x = torch.randn(SHAPE)
    packing = kind(SHAPE, 1.0 if kind is Columns else 0.5)
    buffer = packing.pack(x)
    assert buffer.shape == (packing.floats,)
    torch.testing.assert_close(packing.unpack(buffer), x, atol=1e-4, rtol=1e-4)


def test_both_directions_are_compressed_each_by_its_own():
    codec = Codec(SHAPE, TopK, 9.0)
    x = torch.randn(SHAPE, requires_grad=True)
    gradient = torch.randn(SHAPE)
    y = codec.decode(codec.encode(x))
    y.backward(gradient)
    packing = TopK(SHAPE, 9.0)
    assert torch.equal(y, packing.unpack(packing.pack(x.detach())))
    assert torch.equal(x.grad, packing.unpack(packing.pack(gradient)))


def test_what_was_left_out_comes_later():
    codec = Codec(SHAPE, TopK, 9.0, feedback=True, slots=1)
    x = torch.randn(SHAPE)
    total = sum(codec.decode(codec.encode(x)) for _ in range(400))
    torch.testing.assert_close(total / 400, x, atol=0.1, rtol=0.1)


def costs_of(seconds, sizes, heavy=None):
    heavy = heavy or [True] * len(seconds)
    return [
        BlockCost(f"b{i}", s / 3, 2 * s / 3, (size,), ("w",) * has)
        for i, (s, size, has) in enumerate(zip(seconds, sizes, heavy, strict=True))
    ]


@given(st.integers(2, 4), st.integers(1, 8), st.data())
def test_no_cut_is_better_than_the_one_found(stages, n, data):
    count = data.draw(st.integers(stages, 7))
    numbers = st.integers(1, 50)
    seconds = data.draw(st.lists(numbers, min_size=count, max_size=count))
    sizes = data.draw(st.lists(numbers, min_size=count, max_size=count))
    slow = data.draw(st.lists(numbers, min_size=stages, max_size=stages))
    costs = costs_of(seconds, sizes)

    def crossing_s(link, block):
        return block.shape[0] * slow[link] / 10

    def step_s(behind):
        ends = [*behind, count]
        own = [costs[a:b] for a, b in zip([0, *behind], ends, strict=True)]
        forward = [sum(c.forward_s for c in part) for part in own]
        backward = [sum(c.backward_s for c in part) for part in own]
        over = [crossing_s(k, costs[end - 1]) for k, end in enumerate(behind)]
        return iteration_s(forward, backward, over, n, "1f1b")

    found = [int(name[1:]) + 1 for name in place(costs, crossing_s, stages, n)]
    best = min(map(step_s, map(list, combinations(range(1, count), stages - 1))))
    assert step_s(found) == pytest.approx(best)


def test_no_stage_is_left_without_weights():
    costs = costs_of([1, 1, 1], [1, 1, 1], [True, False, False])
    with pytest.raises(ModelError, match="1 with weights: no 2 stages"):
        place(costs, lambda *_: 0.0, 2, 4)


def test_the_badly_linked_machine_stands_at_an_end():
    rates = [1000, 8, 1000, 1000]
    pairs = np.array([[min(a, b) * (i != j) for j, b in enumerate(rates)]
                      for i, a in enumerate(rates)])  # fmt: skip
    assert fence(pairs)[0] == 1
    two = np.full((4, 4), 1.0)
    two[:2, :2] = two[2:, 2:] = 100.0
    np.fill_diagonal(two, 0)
    assert abs(fence(two).index(0) - fence(two).index(1)) == 1


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_link_where_nothing_gets_through_is_refused(rate):
    with pytest.raises(PeerError, match="link 0-1"):
        Link("0-1", rate)
    assert Link("0-1", 1e6, 0.01).time_s(1000) == pytest.approx(0.01 + wire_bytes(1000) / 1e6)


def test_a_survey_leaves_the_network_as_it_was():
    net = ResNet(NET.largest).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    costs = survey(net, torch.randn(2, 3, 32, 32), repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    named = [name for cost in costs for name in cost.weights]
    assert sorted(named) == sorted(name for name, _ in net.named_parameters())


def test_more_stages_than_processes_are_refused(lonely):
    net = ResNet(NET.largest)
    costs = survey(net, torch.randn(2, 3, 32, 32), repeats=1)
    with pytest.raises(PeerError, match="2 stages for 1 processes"):
        Pipeline(net, ["stages.1"], costs, 2)


def test_the_state_of_another_cut_is_refused(lonely, tmp_path):
    net = ResNet(NET.largest)
    costs = survey(net, torch.randn(2, 3, 32, 32), repeats=1)
    pipeline = Pipeline(net, [], costs, 2)
    solver = torch.optim.SGD(pipeline.weights, 0.1)
    assert pipeline.load(tmp_path, solver) == 0
    for step in (5, 10, 15):
        pipeline.save(tmp_path, step, solver)
    assert len(list(tmp_path.iterdir())) == 2
    assert pipeline.load(tmp_path, solver) == 15
    pipeline.behind = ["stages.1"]
    with pytest.raises(CheckpointError, match="cut behind"):
        pipeline.load(tmp_path, solver)


CASES = [{"schedule": "1f1b", "placed": True, "ratio": 6.0}]


def test_a_slow_link_takes_the_time_it_should():
    """Shaped by the kernel, or in the sender where that is not allowed."""
    table = time_grid([[50, 50]], CASES, steps=1, batch=16, micro_batches=2)
    row = table.iloc[0]
    assert row["step_s"] > 0
    if not can_link():
        assert abs(row["sent_bytes"] / row["expected_bytes"] - 1) < 0.3
        assert row["slowest_mbit"] < 100
    assert isinstance(table, pd.DataFrame)


@pytest.mark.faults
def test_a_killed_stage_costs_one_interval_at_most():
    table = kill_some(1, 0, interval=4, steps=10)
    assert table["noticed"].all()
    assert table["lost"].max() <= 4
    assert table["last"].iloc[-1] == 19


def test_dense_packing_is_the_whole():
    x = torch.randn(SHAPE)
    assert torch.equal(Dense(SHAPE).unpack(Dense(SHAPE).pack(x)), x)
