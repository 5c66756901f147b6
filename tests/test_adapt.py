"""The study of networks that adapt to their input: look-ups equal what is executed."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynlib import load_board
from dynlib.decide import Sure, cascade, train_gate
from dynlib.decide.exits import exit_head
from dynlib.images import Images
from dynlib.manager import Manager
from dynlib.nets.supernet import Supernet, calibrate, macs_m
from dynlib.points import make_table
from dynlib.profile import at_full_clock
from dynlib.space import SearchSpace
from suite import studies
from suite.errors import SuiteError
from suite.studies import adapt_parts, adapt_train

SPACE = SearchSpace(resolution=(16,), depth=((1,), (1,)), width=((8, 16), (16, 32)))


@pytest.fixture(scope="module")
def supernet():
    torch.manual_seed(0)
    net = Supernet(SPACE)
    for config in SPACE:
        calibrate(net, config, [torch.randn(64, 3, 16, 16)])
    return net


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (96,), generator=generator)
    return Images(torch.randn(96, 3, 16, 16, generator=generator), labels)


@pytest.fixture(scope="module")
def pair(supernet, images):
    configs = SPACE.smallest, SPACE.largest
    with torch.inference_mode():
        said = [supernet.prepare(config)(images.images) for config in configs]
    costs = tuple(macs_m(supernet, config) for config in configs)
    return studies.Pair(*said, images.labels, costs, 0.8)


@given(threshold=st.floats(0.1, 0.9), recall=st.sampled_from([0.0, 0.2]))
def test_a_cascade_executed_is_right_where_the_look_up_says(
    supernet, images, pair, threshold, recall
):
    nets = [supernet.prepare(config) for config in (SPACE.smallest, SPACE.largest)]
    walk = studies.cascade_of(nets, Sure(threshold, 0.8), recall, images.images[:1])
    ran = studies.right(walk(images.images), images)
    looked_up = pair.right(threshold, recall)
    assert (ran != looked_up).sum() <= 1  # a confidence may lie on the threshold to the last digit


def test_ends_of_the_cascades_table_are_its_two_networks(pair, images):
    table = pair.table([0.0, 1.0]).set_index(["recall", "threshold"])
    assert table.loc[(0.0, 0.0), "macs_m"] == pair.macs_m[0]
    assert table.loc[(0.0, 1.0), "macs_m"] == pytest.approx(sum(pair.macs_m))
    small, large = (100 * studies.right(said, images).mean() for said in (pair.first, pair.last))
    assert table.loc[(0.0, 0.0), "accuracy_pct"] == pytest.approx(small)
    assert table.loc[(0.0, 1.0), "accuracy_pct"] == pytest.approx(large)


@pytest.mark.parametrize("recall", [0.0, 0.2])
def test_exits_executed_are_right_where_the_look_up_says(supernet, images, recall):
    torch.manual_seed(2)
    config = SPACE.largest
    net = supernet.prepare(config)
    seen = studies.features_of(net, _AsTheyAre, images)
    exits = [exit_head(f.shape[1], 10).eval() for f in seen[0]]
    told = studies.exits_said(supernet, config, exits, seen, images)
    heads = {place: studies.Exit(head).eval()
             for place, head in zip(told.places, exits, strict=True)}  # fmt: skip
    first, *_, last = told.places
    row = {"places": f"{first} {last}", "threshold": 0.15, "recall": recall}
    walk = studies.exits_of(net, row, heads, images.images[:1])
    assert (told.right(row) == studies.right(walk(images.images), images)).mean() >= 0.98
    assert told.at(row)["accuracy_pct"] == pytest.approx(100 * told.right(row).mean())
    table = told.table([tuple(told.places)], [0.0, 1.0], [recall])
    assert table["macs_m"].is_monotonic_increasing
    assert table["macs_m"].iloc[1] > macs_m(supernet, config)  # exits cost something


def test_a_file_of_exits_carries_its_hash(tmp_path):
    heads = [exit_head(8, 10).eval() for _ in range(2)]
    tensors = {f"{place}.{name}": value for place, head in enumerate(heads)
               for name, value in head.state_dict().items()}  # fmt: skip
    path = tmp_path / "exits.safetensors"
    adapt_train.write_exits(path, tensors, "{}")
    for head, again in zip(heads, studies.load_exits(path, 10), strict=True):
        torch.testing.assert_close(again(torch.ones(2, 8)), head(torch.ones(2, 8)))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SuiteError, match="has not the hash that it carries"):
        studies.load_exits(path, 10)


def test_the_peer_gives_the_same_logits(supernet, images):
    pytest.importorskip("earlyon")
    config = SPACE.largest
    net = supernet.prepare(config)
    place = "stages.0.blocks.0"
    head = studies.Exit(exit_head(4 * 16, 10)).eval()
    row = {"places": place, "threshold": 0.12, "recall": 0.0}
    walk = studies.exits_of(net, row, {place: head}, images.images[:1])
    one, many = studies.earlyon_of(supernet.prepare(config), row, {place: head}, 10, 16)
    for x in images.images[:8].split(1):
        torch.testing.assert_close(one(x), walk(x))
    assert many(images.images).shape == (96, 10)


class _AsTheyAre:
    """Stands for a data set whose images are normalised already."""

    @staticmethod
    def normalise(images):
        return images


def test_a_gates_table_is_what_the_gated_walk_does(supernet, images):
    ways = [config for config in SPACE if config.width[0] == 16]
    routes = studies.routes_of(supernet, ways, "stages.0.blocks.0", _AsTheyAre, images)
    gate = train_gate(
        routes.features, routes.losses, routes.right[:, 0], routes.macs_m, seed=0, epochs=2,
        batch_size=32,
    )  # fmt: skip
    for knob in (-1.0, 0.0, 1e6):
        row = routes.table(gate, [knob]).iloc[0]
        walk = studies.gated_of(
            supernet, ways, "stages.0.blocks.0", gate, knob, routes.macs_m, images.images[:1]
        )
        ran = 100 * studies.right(walk(images.images), images).mean()
        assert ran == pytest.approx(row["accuracy_pct"], abs=1.1)  # one image of 96
    assert (row["taken"] == len(ways) - 1).all()
    right = routes.right[torch.arange(96), torch.from_numpy(routes.losses.argmin(1).numpy())]
    assert right.float().mean() >= routes.right.float().mean(0).max()


@given(count=st.integers(2, 60), seed=st.integers(0, 5))
def test_an_even_sample_keeps_every_share(count, seed):
    score = np.random.default_rng(seed).random(500)
    chosen = studies.even_sample(score, count)
    assert len(set(chosen.tolist())) == count
    for level in (0.2, 0.5, 0.9):
        off = abs((score[chosen] < level).mean() - (score < level).mean())
        assert off <= 1 / count + 1e-9


def test_a_paired_drop_by_hand():
    drop = studies.paired_drop(np.array([1, 1, 1, 0], bool), np.array([1, 0, 1, 0], bool))
    assert drop["value"] == 25.0
    assert drop["high"] - drop["value"] == pytest.approx(1.96 * 50 / 2)


def test_speedups_are_of_rounds_and_percentiles_of_parts():
    rows = [("a", r, p, 2.0 + r) for r in (0, 1) for p in (0, 1)]
    rows += [("b", r, p, 1.0 + r + p) for r in (0, 1) for p in (0, 1)]
    times = pd.DataFrame(rows, columns=["run", "round", "part", "latency_ms"])
    gain = studies.speedup(times, "b", "a")
    assert gain["low"] == pytest.approx(3 / 2.5)
    assert gain["high"] == pytest.approx(2 / 1.5)
    assert studies.per_image(times).loc["b", "mean_ms"] == 2.0


def test_ranks_of_work_that_follows_difficulty():
    difficulty = np.linspace(0, 1, 100)
    ranks, table = studies.difficulty_ranks(1 + difficulty, difficulty)
    assert ranks["images"] == pytest.approx(1)
    assert ranks["deciles"] == pytest.approx(1)
    assert len(table) == 10


def test_the_manager_turns_the_threshold_before_it_switches_networks():
    board = at_full_clock(load_board("jetson-nano"))
    points = [("small", None, 80.0, 1.0), ("cascade", 0.6, 88.0, 2.0), ("cascade", 0.9, 90.0, 3.0),
              ("large", None, 91.0, 4.0)]  # fmt: skip
    about = {"model": "net", "board": board.name, "unit": board.units[-1].name, "batch": 1,
             "source": "estimated"}  # fmt: skip
    table = make_table(
        about | {"subnet": name, "exit_threshold": threshold, "accuracy_val_pct": accuracy,
                 "latency_ms": latency}
        for name, threshold, accuracy, latency in points
    )  # fmt: skip
    case = studies.knob_case(table, board, (1.5, 0.95, 0.65, 0.4), each_s=1.0)
    frames = case.simulate(Manager(board, case.tables, objective="accuracy"), seed=0).frames()
    served = list(dict.fromkeys(frames["accuracy_val_pct"]))
    assert served == [91.0, 90.0, 88.0, 80.0]


def test_composed_times_are_of_the_steps_that_images_come_to(supernet, images):
    nets = [supernet.prepare(config) for config in (SPACE.smallest, SPACE.largest)]
    example = images.images[:1]
    walks = {str(level): cascade(nets, [Sure(level)], example) for level in (0.0, 1.0)}
    composed = studies.predicted_share(walks, images.images, {"whole": nets[1]}, "whole", rounds=5)
    assert 0 < composed["0.0"] < composed["1.0"]


def test_halves_are_balanced():
    generator = torch.Generator().manual_seed(0)
    for shape in ((), (2, 5), (7, 7)):
        decide = adapt_parts.Halves(shape, generator)
        masks = torch.cat([decide(None) for _ in range(8)]).float()
        assert masks.shape == (8, *shape)
        assert (masks.mean(0) == 0.5).all()
    assert adapt_parts.prefix(4)(None).tolist() == [[[True, True, False, False]] * 2]


def test_saved_time_by_hand():
    rows = [(pixels, mode, size, r, 0, ms * (1 + r)) for pixels in (28, 14) for r in (0, 1)
            for mode, size, ms in (("whole", 0, 4.0), ("layer", 0, 2.0), ("spatial", 2, 9.0),
                                   ("spatial", {28: 14, 14: 7}[pixels], 3.0))]  # fmt: skip
    columns = ["pixels", "mode", "size", "round", "part", "latency_ms"]
    times = pd.DataFrame(rows, columns=columns)
    assert studies.saved_pct(times, "layer")["value"] == pytest.approx(50)
    assert studies.saved_pct(times, "spatial", [14])["value"] == pytest.approx(25)
    table = studies.part_table(times)
    ratios = table[table["pixels"] == 28].set_index(["mode", "size"])["ratio"]
    assert ratios.to_dict() == pytest.approx(
        {("layer", 0): 0.5, ("spatial", 2): 2.25, ("spatial", 14): 0.75}
    )


def test_slices_of_a_transformer_are_its_masks():
    assert studies.slices_against_masks(12, seed=0) <= 1e-5


def test_the_most_accurate_row_within_its_work_is_the_one_with_less_of_equals():
    table = pd.DataFrame({"accuracy_pct": [80.0, 92.0, 92.0, 95.0], "macs_m": [1.0, 4.0, 3.0, 9.0]})
    assert studies.most_accurate(table, 5.0).to_dict() == {"accuracy_pct": 92.0, "macs_m": 3.0}
    assert studies.most_accurate(table, 9.0)["accuracy_pct"] == 95.0
    assert studies.cheapest(table, 91.0)["macs_m"] == 3.0


def test_each_run_is_timed_on_images_in_a_row(monkeypatch):
    """And all runs on every image in every round, so that their times can be paired."""
    monkeypatch.setattr("suite.studies.adapt.IN_A_ROW", 2)
    served = []

    def named(name):
        return lambda images: served.append((name, int(images[0, 0, 0, 0])))

    images = torch.arange(3.0).view(3, 1, 1, 1)
    times = studies.time_rounds({"one": named("one"), "other": named("other")}, images, 1, 2)
    in_a_round = [("one", 0), ("one", 1), ("other", 0), ("other", 1), ("one", 2), ("other", 2)]
    assert served[-12:] == in_a_round * 2  # after those that nobody timed
    assert list(zip(times["run"], times["part"], strict=True)) == in_a_round * 2
    assert list(times["round"]) == [0] * 6 + [1] * 6
