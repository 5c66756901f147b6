"""A walk computes what its definition says, for every pattern of decisions, and refuses misfits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import SPACE, calibrated
from torch import nn

from dynlib.decide import cascade, fit_temperature, gated, train_gate, with_exits
from dynlib.decide.decisions import Given, Highest, Sure, threshold_table
from dynlib.decide.gate import Gate
from dynlib.decide.walk import STOP, Seen, Step, Walk
from dynlib.errors import ModelError
from dynlib.nets.chain import Chain, chain
from dynlib.space import SubnetConfig

SMALL = SubnetConfig(16, (1, 1), (8, 6))
LARGE = SubnetConfig(16, (1, 2), (8, 12))
OTHER = SubnetConfig(16, (1, 2), (4, 12))  # narrower from the first stage on
BEHIND = "stages.0.blocks.0"
EXAMPLE = torch.zeros(1, 3, 16, 16)
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SUPERNET = calibrated([SMALL, LARGE, OTHER])
NETS = [SUPERNET.prepare(config) for config in (SMALL, LARGE)]


def pooled_head(channels: int, outputs: int = 10) -> nn.Module:
    torch.manual_seed(2)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(channels, outputs)).eval()


def tiny_walk(first: Given, second: Given, third: Given) -> Walk:
    """Everything at once: an exit, a width gate, a skipped block, a start from the images again."""
    row = chain(NETS[1])
    trunk, block, rest = row.cut([BEHIND, "stages.1.blocks.0"])
    small = chain(NETS[0])
    return Walk(
        [
            Step(trunk, (STOP, 1, 4), first, pooled_head(8)),
            Step(block, (2, 3), second),
            Step(Chain({"stages.1.blocks.0": nn.Identity()}), (3,)),
            Step(rest, (STOP, 4), third),
            Step(small, from_images=True, recall=0.3),
        ],
        EXAMPLE,
    )


def patterns(routes: int):
    return st.lists(st.integers(0, routes - 1), min_size=5, max_size=5).map(torch.tensor)


@settings(max_examples=40)
@given(patterns(3), patterns(2), patterns(2), st.integers(1, 5))
def test_every_pattern_of_decisions_gives_what_the_definition_says(first, second, third, count):
    walk = tiny_walk(Given(first), Given(second), Given(third))
    images = IMAGES[:count]
    logits = walk(images)
    assert logits.shape == (count, 10)
    torch.testing.assert_close(logits, walk.masked(images), rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(patterns(3), patterns(2), patterns(2))
def test_only_the_steps_on_the_way_are_run(first, second, third):
    walk = tiny_walk(Given(first), Given(second), Given(third))
    visits = walk.visits(IMAGES)
    assert visits[:, 0].all()
    assert torch.equal(visits[:, 1], first == 1)
    assert torch.equal(visits[:, 3], first == 1)
    assert torch.equal(visits[:, 2], (first == 1) & (second == 0))
    assert torch.equal(visits[:, 4], (first == 2) | ((first == 1) & (third == 1)))


def test_the_ends_of_a_cascade_are_its_networks():
    for threshold, net in ((0.0, NETS[0]), (1.0, NETS[1])):
        walk = cascade(NETS, [Sure(threshold)], EXAMPLE)
        assert torch.equal(walk(IMAGES), net(IMAGES))
        assert torch.equal(walk(IMAGES[:1]), net(IMAGES[:1]))


def test_the_second_network_recalls_what_the_first_said():
    walk = cascade(NETS, [Sure(1.0)], EXAMPLE, recall=0.2)
    first, second = (net(IMAGES).log_softmax(1) for net in NETS)
    torch.testing.assert_close(walk(IMAGES), second + 0.2 * first)


def test_a_gate_sends_each_image_to_its_width():
    gate = Gate(8, 2).eval()
    for route, net in enumerate(NETS):
        walk = gated(NETS, BEHIND, gate, Given.fixed(route, 5), EXAMPLE)
        # The trunk is the largest network's, with its own statistics.
        trunk, _ = chain(NETS[1]).cut([BEHIND])
        _, rest = chain(net).cut([BEHIND])
        torch.testing.assert_close(walk(IMAGES), rest(trunk(IMAGES)))
    walk = gated(NETS, BEHIND, gate, Highest(), EXAMPLE)
    torch.testing.assert_close(walk(IMAGES), walk.masked(IMAGES), rtol=1e-5, atol=1e-5)


def test_exits_shrink_the_batch():
    walk = with_exits(NETS[1], [BEHIND], [pooled_head(8)], [Given(torch.tensor([1, 0, 1, 0, 0]))],
                      EXAMPLE)  # fmt: skip
    assert walk.visits(IMAGES).sum(0).tolist() == [5, 2]
    torch.testing.assert_close(walk(IMAGES)[[0, 2]], NETS[1](IMAGES[[0, 2]]))


@pytest.mark.parametrize("count", [1, 5])
def test_exits_on_an_engine_say_the_same(count):
    ways = [NETS[1], [BEHIND], [pooled_head(8)], [Given(torch.tensor([1, 0, 1, 0, 0]))], EXAMPLE]
    plain, folded = (with_exits(*ways, 0.2, engine) for engine in ("torch", "torch-folded"))
    images = IMAGES[:count]
    torch.testing.assert_close(folded(images), plain(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="no engine 'fast'"):
        with_exits(*ways, engine="fast")


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_batch_and_one_of_one_keep_their_shape(count):
    for walk in (
        cascade(NETS, [Sure(0.5)], EXAMPLE),
        with_exits(NETS[1], [BEHIND], [pooled_head(8)], [Sure(0.5)], EXAMPLE),
        gated(NETS, BEHIND, Gate(8, 2).eval(), Highest(), EXAMPLE),
    ):
        assert walk(IMAGES[:count]).shape == (count, 10)
        assert walk.visits(IMAGES[:count]).shape == (count, len(walk.steps))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_threshold_is_a_confidence(threshold):
    with pytest.raises(ModelError, match="expected a confidence, 0 to 1"):
        Sure(threshold)
    with pytest.raises(ModelError, match="expected a number above 0"):
        Sure(0.5, temperature=-abs(threshold))


def test_what_nobody_knows_is_served_by_the_largest():
    class Broken(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.outputs = outputs

        def forward(self, x):
            return torch.full((len(x), self.outputs), torch.nan)

    exits = with_exits(NETS[1], [BEHIND], [Broken(10)], [Sure(0.0)], EXAMPLE)
    torch.testing.assert_close(exits(IMAGES), NETS[1](IMAGES))
    gate = gated(NETS, BEHIND, Broken(2), Highest(), EXAMPLE)
    torch.testing.assert_close(gate(IMAGES), NETS[1](IMAGES))


def test_pieces_that_do_not_fit_are_named_before_anything_is_served():
    other = SUPERNET.prepare(OTHER)
    with pytest.raises(ModelError, match="step 1 does not fit"):
        gated([other, NETS[1]], BEHIND, Gate(8, 2).eval(), Highest(), EXAMPLE)
    with pytest.raises(ModelError, match="step 0 does not fit"):  # a gate of another chain
        gated(NETS, BEHIND, Gate(4, 2).eval(), Highest(), EXAMPLE)
    with pytest.raises(ModelError, match="cannot cut behind 'nowhere'"):
        gated(NETS, "nowhere", Gate(8, 2).eval(), Highest(), EXAMPLE)
    with pytest.raises(ModelError, match="no BatchNorm statistics"):
        SUPERNET.prepare(SPACE.smallest)
    net = chain(NETS[0])
    for routes in ((0,), (1,), (), (-2,)):
        with pytest.raises(ModelError, match="step 0 leads to"):
            Walk([Step(net, routes)], EXAMPLE)
    with pytest.raises(ModelError, match="no route leads to step 1"):
        Walk([Step(net), Step(net)], EXAMPLE)


def test_a_route_that_is_not_there_is_never_a_wrong_shape():
    walk = cascade(NETS, [Given(torch.tensor([0, 2, 1, 0, -1]))], EXAMPLE)
    with pytest.raises(ModelError, match="step 0 has 2 routes; decided"):
        walk(IMAGES)


def test_decisions_that_are_given():
    right = torch.tensor([[0, 1], [1, 1], [0, 0]]).bool()
    assert Given.oracle(right).routes.tolist() == [1, 0, 1]
    drawn = Given.random([0.0, 1.0], 7, torch.Generator().manual_seed(0))
    assert drawn.routes.tolist() == [1] * 7
    seen = Seen(torch.tensor([2, 0]), torch.zeros(2, 1), torch.zeros(2, 2))
    assert Given.oracle(right)(seen).tolist() == [1, 1]


def test_the_temperature_undoes_a_scale():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.1)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.3)


def test_the_table_of_thresholds_by_hand():
    right = np.array([[1, 1], [0, 1], [0, 0]])
    sure = np.array([[0.9, 0.1], [0.5, 0.1], [0.2, 0.1]])
    table = threshold_table(right, sure, [1.0, 5.0], [0.4, 0.8, 1.0])
    assert table["accuracy_pct"].tolist() == pytest.approx([100 / 3, 200 / 3, 200 / 3])
    assert table["cost"].tolist() == pytest.approx([7 / 3, 11 / 3, 5])
    assert table["stays_pct"].tolist() == pytest.approx([100 / 3, 200 / 3, 100])


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_costs_less(seed, one, other):
    rng = np.random.default_rng(seed)
    right = rng.random((20, 3)) < 0.5
    low, high = sorted((one, other))
    table = threshold_table(right, rng.random((20, 3)), [1, 2, 4], [low, high])
    assert table["cost"].is_monotonic_increasing


def test_a_gate_learns_who_is_hard_and_is_repeatable():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 32, generator=generator)
    hard = features[:, 0] > 0.5
    losses = torch.stack([hard * 4.0, torch.full((2000,), 0.1)], 1)
    gates = [train_gate(features, losses, ~hard, [1.0, 4.0], seed=3) for _ in range(2)]
    scores = [gate(features) for gate in gates]
    assert torch.equal(*scores)
    assert (scores[0].argmax(1) == hard).float().mean() > 0.9
