"""Stages over links: cut well, compressed as said, exact where nothing is compressed."""

import copy
import json
import os
import re
import subprocess
from dataclasses import replace
from itertools import combinations
from math import prod

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.errors import CheckpointError, ModelError, PeerError, RecipeError
from dynlib.nets.resnet import ResNet
from dynlib.training.compress import Codec, Columns, Dense, Levels, LowRank, TopK, adaptive_ratios
from dynlib.training.pipeline import (
    BlockCost,
    Link,
    Pipeline,
    fence,
    iteration_s,
    needed_bytes,
    place,
    survey,
    wire_bytes,
)  # fmt: skip
from suite.studies.across import (
    can_link,
    drop_link,
    kill_some,
    learn_text,
    linked,
    time_grid,
    together,
)
from suite.studies.across_worker import NET
from suite.studies.at_scale import draw_rates, predict_steps

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


@given(st.sampled_from([TopK, Levels, Columns, LowRank]), st.data())
def test_a_buffer_that_nobody_wrote_is_no_crash(kind, data):
    packing = kind(SHAPE, 9.0)
    size = 4 * packing.floats
    garbage = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    assert packing.unpack(torch.frombuffer(garbage, dtype=torch.float32)).shape == SHAPE


@settings(max_examples=10)
@given(st.sampled_from([4.0, 8.0]), st.integers(0, 2**31))
def test_levels_are_off_by_less_than_a_step_and_right_on_average(ratio, seed):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    packing = Levels(SHAPE, ratio)
    buffer = packing.pack(x)
    assert buffer.shape == (packing.floats,)
    spread = x.amax((0, 2, 3)) - x.amin((0, 2, 3))
    step = (spread / (2**packing.bits - 1)).view(-1, 1, 1)
    assert ((packing.unpack(buffer) - x).abs() <= 1.001 * step + 1e-6).all()
    mean = sum(packing.unpack(packing.pack(x)) for _ in range(200)) / 200
    assert ((mean - x).abs() <= 0.2 * step + 1e-6).all()  # five times its deviation at most


def test_levels_of_what_is_all_the_same_are_exact():
    x = torch.full(SHAPE, 3.0)
    packing = Levels(SHAPE, 8.0)
    assert torch.equal(packing.unpack(packing.pack(x)), x)
    dense = Levels(SHAPE, 1.0)
    assert torch.equal(dense.unpack(dense.pack(x)), x)


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


@pytest.mark.parametrize("kind", [TopK, Levels, Columns, LowRank])
def test_a_sender_goes_on_from_its_state_as_if_nothing_had_happened(kind):
    senders = [Codec(SHAPE, kind, 8.0, feedback=True, slots=2).encode.send for _ in range(3)]
    steady, restarted, fresh = senders
    draws = torch.Generator().manual_seed(1)
    for _ in range(3):
        steady(torch.randn(SHAPE, generator=draws))
    restarted.load_state_dict(copy.deepcopy(steady.state_dict()))
    for _ in range(3):
        x = torch.randn(SHAPE, generator=draws)
        buffer = steady(x).view(torch.int32)  # whose bits need not be those of numbers
        assert torch.equal(restarted(x).view(torch.int32), buffer)
        assert not torch.equal(fresh(x).view(torch.int32), buffer)


def test_another_packing_is_still_owed_what_was_left_out():
    codec = Codec(SHAPE, LowRank, 8.0, feedback=True)
    codec.encode.send(torch.randn(SHAPE))
    state = codec.encode.send.state_dict()
    dense = Codec(SHAPE, feedback=True).encode.send
    dense.load_state_dict(state)
    torch.testing.assert_close(dense(torch.zeros(SHAPE)), state["left_out"][0].flatten())
    plain = Codec(SHAPE).encode.send
    plain.load_state_dict(state)
    assert torch.equal(plain(torch.zeros(SHAPE)), torch.zeros(SHAPE).flatten())


def costs_of(seconds, sizes, heavy=None):
    heavy = heavy or [True] * len(seconds)
    return [
        BlockCost(f"b{i}", s / 3, 2 * s / 3, (size,), ("w",) * has)
        for i, (s, size, has) in enumerate(zip(seconds, sizes, heavy, strict=True))
    ]


@given(st.integers(2, 4), st.integers(1, 8), st.booleans(), st.data())
def test_no_cut_is_better_than_the_one_found(stages, n, is_tight, data):
    count = data.draw(st.integers(stages, 7))
    numbers = st.integers(1, 50)
    seconds = data.draw(st.lists(numbers, min_size=count, max_size=count))
    sizes = data.draw(st.lists(numbers, min_size=count, max_size=count))
    slow = data.draw(st.lists(numbers, min_size=stages, max_size=stages))
    weights = data.draw(st.lists(numbers, min_size=count, max_size=count))
    memory = data.draw(st.lists(st.integers(100, 800), min_size=stages, max_size=stages))
    costs = [
        replace(cost, weight_bytes=weight, kept_bytes=size)
        for cost, weight, size in zip(costs_of(seconds, sizes), weights, sizes, strict=True)
    ]

    def crossing_s(link, block):
        return block.shape[0] * slow[link] / 10

    def parts(behind):
        return [costs[a:b] for a, b in zip([0, *behind], [*behind, count], strict=True)]

    def fits(behind):
        needed = [needed_bytes(p, stages - k, n) for k, p in enumerate(parts(behind))]
        return not is_tight or all(a <= b for a, b in zip(needed, memory, strict=True))

    def step_s(behind):
        own = parts(behind)
        forward = [sum(c.forward_s for c in part) for part in own]
        backward = [sum(c.backward_s for c in part) for part in own]
        over = [crossing_s(k, costs[end - 1]) for k, end in enumerate(behind)]
        return iteration_s(forward, backward, over, n, "1f1b")

    ways = [list(way) for way in combinations(range(1, count), stages - 1) if fits(way)]
    limits = memory if is_tight else None
    if not ways:
        with pytest.raises(ModelError, match=f"no {stages} stages within"):
            place(costs, crossing_s, stages, n, limits)
        return
    found = [int(name[1:]) + 1 for name in place(costs, crossing_s, stages, n, limits)]
    assert fits(found)
    assert step_s(found) == pytest.approx(min(map(step_s, ways)))


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
    weights = sum(weight.nbytes for weight in net.parameters())
    assert sum(cost.weight_bytes for cost in costs) == weights
    assert all(cost.kept_bytes >= 4 * prod(cost.shape) for cost in costs[1:-1])


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


CASES = [{"schedule": "1f1b", "placed": True, "ratio": 6.0, "kind": "top-k"}]


def test_a_slow_link_takes_the_time_it_should():
    """Shaped by the kernel, or in the sender where that is not allowed."""
    table = time_grid([[50, 50]], CASES, steps=1, batch=16, micro_batches=2)
    row = table.iloc[0]
    assert row["step_s"] > 0
    if not can_link():
        assert abs(row["sent_bytes"] / row["expected_bytes"] - 1) < 0.3
        assert row["slowest_mbit"] < 100
    assert isinstance(table, pd.DataFrame)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of 20 steps in two stages."""
    job = {
        "work": "train", "folder": str(tmp_path_factory.mktemp("state")), "interval": 4,
        "behind": "stages.1", "steps": 20,
    }  # fmt: skip
    return together(job, 2)[1]["losses"]


@pytest.mark.faults
def test_a_killed_stage_costs_one_interval_and_changes_nothing(undisturbed):
    table = kill_some(1, 0, interval=4, steps=10)
    assert table["noticed"].all()
    assert table["lost"].max() <= 4
    assert table["last"].iloc[-1] == 19
    assert table["loss"].iloc[-1] == undisturbed[-1]


@pytest.mark.faults
def test_a_link_that_falls_to_a_tenth_changes_nothing_that_is_learnt(undisturbed):
    if why := can_link():
        pytest.skip(f"no links here: {why}")
    table = drop_link(20)
    assert table["loss"].tolist() == undisturbed
    assert table["rate_mbit"].nunique() == 2


COMPRESSED = [
    {"schedule": schedule, "kind": kind, "ratio": ratio, "feedback": feedback}
    for schedule, kind, ratio, feedback in (
        ("gpipe", "dense", 1.0, False), ("1f1b", "dense", 1.0, False),
        ("gpipe", "top-k", 12.0, False), ("1f1b", "top-k", 12.0, False),
        ("1f1b", "top-k", 12.0, True), ("1f1b", "levels", 8.0, False),
        ("1f1b", "columns", 8.0, False), ("1f1b", "low rank", 8.0, False),
    )
]  # fmt: skip


def test_stages_compute_what_one_process_with_the_same_compression_does():
    """Gradients, and the moments of batch normalisation, which a search for shapes would spoil."""
    job = {"work": "compare", "cases": COMPRESSED, "behind": "stages.1"}
    found = pd.DataFrame([row for rows in together(job, 2) for row in rows])
    assert len(found) == 2 * len(COMPRESSED)
    assert (found["gradients"] > 2).all()
    assert (found["buffers"] > 0).any()
    assert (found["gradient_max"] > 1e-3).all()
    assert found["gradient_diff"].max() < 1e-6
    assert found["buffer_diff"].max() < 1e-6
    dense, compressed = (
        found.query("schedule == '1f1b' and kind == @kind and not feedback")["gradient_max"]
        for kind in ("dense", "top-k")
    )
    assert dense.tolist() != compressed.tolist()


@pytest.mark.faults
def test_bad_input_is_refused_by_name_on_every_process(tmp_path):
    job = {"work": "refuse", "folder": str(tmp_path), "timeout_s": 6.0}
    expected = {
        "stages": "PeerError: 3 stages for 2 processes",
        "weights": "ModelError: stage 1 .* has no weights",
        "ratio": "RecipeError: .* 0.3, expected at least 1/3",
        "batch": "RecipeError: recipe, batch_size: 7, expected a multiple of 2",
        "zero": "PeerError: link 0-1: measured as 0.0 bytes/s",
        "cut": "CheckpointError: .*stage1-5.pt: cut behind .'stages.0'., expected .'stages.1'.",
        "spoilt": "CheckpointError: .*stage1-5.pt: no readable state",
        "silent": "PeerError: link 0-1: nothing came through",
    }
    for said in together(job, 2):  # both come to their end
        assert said.keys() == expected.keys()
        for name, words in expected.items():
            assert re.match(words, said[name]), said[name]


def test_namespaces_of_the_dead_are_removed():
    if why := can_link():
        pytest.skip(f"no links here: {why}")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, alive = f"dl{dead.pid}n0", f"dl{os.getpid()}n77"
    for name in (left, alive):
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with linked([100.0]):
            said = subprocess.run(["ip", "-j", "netns", "list"], capture_output=True, check=True)
        names = [space["name"] for space in json.loads(said.stdout)]
        assert left not in names
        assert alive in names
    finally:
        subprocess.run(["ip", "netns", "del", alive], check=True)


def test_what_is_said_of_many_machines_follows_from_their_links():
    rates = draw_rates(0)
    assert rates.shape == (48, 48)
    assert (rates == rates.T).all()
    step_s = {row["case"]: row["step_s"] for row in predict_steps(rates, 100.0)}
    assert step_s["placed, uniform"] <= step_s["placed, adaptive"] < step_s["placed"]
    assert step_s["placed"] <= step_s["as listed"]
    equal = np.full((48, 48), 100.0)
    np.fill_diagonal(equal, 0)
    step_s = {row["case"]: row["step_s"] for row in predict_steps(equal, 100.0)}
    assert step_s["placed, uniform"] == step_s["placed, adaptive"]
    assert step_s["placed"] == step_s["as listed"]
    step_s = {row["case"]: row["step_s"] for row in predict_steps(rates, 1 / 3)}
    assert step_s["placed, adaptive"] == step_s["placed"]


def test_dense_packing_is_the_whole():
    x = torch.randn(SHAPE)
    assert torch.equal(Dense(SHAPE).unpack(Dense(SHAPE).pack(x)), x)


@pytest.mark.parametrize("method", ["dense", "levels"])
def test_text_can_be_learnt_over_the_cuts(method):
    (row,) = learn_text(method, 1 / 8, seed=0, steps=8)
    assert row["loss"] < np.log(256)
    assert row["share"] == (1.0 if method == "dense" else pytest.approx(1 / 8, rel=0.1))
