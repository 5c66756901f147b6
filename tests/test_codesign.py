from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.boards.latency import network_ms
from dynlib.boards.platform import Platform
from dynlib.errors import BoardError, DynlibError, InfeasibleError
from dynlib.machine.bind import load_board
from dynlib.searching.lookup import DESIGN_KNOBS, Lookup, exit_outcomes
from dynlib.searching.study import best_within
from dynlib.searching.two_level import DIRECTIONS, codesign, inner_search
from dynlib.space import LayerSpec, SearchSpace
from suite.papers.hadas import (
    HADAS_SPACE,
    exhaustive,
    published_exits,
    share_half_way,
    split_gain,
    without_dissimilarity,
)

AGX = "jetson-agx-xavier"
THRESHOLDS = (0.5, 0.8)


def conv(channels: int, size: int) -> LayerSpec:
    return LayerSpec("conv", channels, channels, 3, in_size=size, out_size=size)


def small_board():
    """Jetson TX2 with few clocks: 3 x 3 x 2 settings."""
    board = load_board("jetson-tx2")
    units = tuple(replace(u, opps=u.opps[2::5][-3:]) for u in board.units)
    memory = replace(board.memory, opps=board.memory.opps[::6])
    return replace(board, units=units, memory=memory)


SMALL = Platform(small_board())


def look_up(seed: int, positions: int = 3, images: int = 40) -> Lookup:
    """A backbone whose later exits are right more often, and surer when they are."""
    rng = np.random.default_rng(seed)
    right = rng.random((images, positions)) < np.linspace(0.5, 0.9, positions)
    sure = np.clip(rng.random((images, positions)) * 0.6 + 0.4 * right, 0, 1)
    segments = [[conv(int(rng.integers(16, 96)), 16)] for _ in range(positions)]
    heads = [[LayerSpec("linear", 64, 10)]] * positions
    return Lookup(f"net{seed}", right, sure, segments, heads, SMALL, batch=16,
                  thresholds=THRESHOLDS)  # fmt: skip


def everything(lookup: Lookup, knobs=DESIGN_KNOBS):
    k, f = lookup.free(knobs)
    return lookup.table(*(m.ravel() for m in np.meshgrid(k, f, indexing="ij")))


# -- the spaces ---------------------------------------------------------------------------------


def test_spaces_have_the_published_sizes():
    assert f"{HADAS_SPACE.size:.2e}" == "4.40e+11"
    platform = Platform(load_board(AGX))
    assert platform.shape == (29, 14, 9)
    assert len(np.unique(platform.settings, axis=0)) == 3654
    assert platform.settings.max(axis=0).tolist() == [2265.6, 1377.0, 2133.0]
    assert platform.settings.min(axis=0).tolist() == [115.2, 114.75, 204.0]


def test_the_new_board_reproduces_its_measurements():
    board = load_board(AGX)
    (measured,) = board.measured
    modelled = [board.power_mw({"gpu": f}, {"gpu": 1.0}) for f in measured.column("gpu_mhz")]
    assert modelled == pytest.approx(measured.column("power_mw_c4"), rel=0.075)


# -- what layers cost under three clocks --------------------------------------------------------


@pytest.mark.parametrize("name", ["jetson-tx2", AGX], ids=str)
def test_at_the_highest_cpu_and_memory_clocks_it_is_the_boards_own_model(name):
    board = load_board(name)
    platform = Platform(board)
    layers = [conv(256, 32), conv(128, 32)]  # work outlasts the launch
    ms, mj = platform.cost(layers, batch=8)
    cpu, gpu, emc = platform.settings.T
    for i in np.flatnonzero((cpu == cpu.max()) & (emc == emc.max())):
        assert ms[i] == pytest.approx(network_ms(layers, board.gpu, gpu[i], 8))
        power_mw = board.power_mw({"gpu": gpu[i], board.cpus[0].name: cpu[i]},
                                  {"gpu": 1.0, board.cpus[0].name: 1.0})  # fmt: skip
        assert mj[i] == pytest.approx(power_mw * ms[i] / 1e3)


def test_each_clock_stretches_its_part():
    board = load_board(AGX)
    platform = Platform(board)
    launched, _ = platform.cost([LayerSpec("linear", 8, 8)])  # nothing but the launch
    worked, _ = platform.cost([conv(256, 32)], batch=8)
    shape = platform.shape
    launched, worked = launched.reshape(shape), worked.reshape(shape)
    assert np.ptp(launched, axis=(1, 2)).max() == 0
    assert launched[0, 0, 0] / launched[-1, 0, 0] == pytest.approx(2265.6 / 115.2)
    m = board.gpu.memory_share
    assert worked[-1, -1, 0] / worked[-1, -1, -1] == pytest.approx(1 - m + m * 2133 / 204)
    assert worked[-1, 0, -1] / worked[-1, -1, -1] == pytest.approx(m + (1 - m) * 1377 / 114.75)


def test_a_memory_clock_saves_its_share_of_the_static_power():
    layers = [LayerSpec("linear", 8, 8)]  # the memory clock does not slow a launch
    none = Platform(small_board(), memory_power_share=0.0).cost(layers)
    some = Platform(small_board(), memory_power_share=0.5).cost(layers)
    emc = SMALL.settings[:, 2]
    saved_mj = 0.5 * small_board().static_mw * (1 - emc / emc.max()) * none[0] / 1e3
    assert some[1] == pytest.approx(none[1] - saved_mj)


def test_a_board_without_a_gpu_or_memory_clocks_is_refused():
    for name in ("raspberry-pi-4", "sdm845-pixel3"):
        with pytest.raises(BoardError, match="needs GPU, memory clocks"):
            Platform(load_board(name))


# -- looking up ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 20))
def test_outcomes_are_those_of_one_image_after_the_other(seed, positions, images):
    rng = np.random.default_rng(seed)
    right = rng.random((images, positions)) < 0.6
    sure = rng.choice([0.3, 0.5, 0.7, 0.8, 0.9], (images, positions))
    choices, left, good = exit_outcomes(right, sure, THRESHOLDS)
    assert len(choices) == (len(THRESHOLDS) + 1) ** (positions - 1)
    levels = [*THRESHOLDS, np.inf]
    for k in rng.permutation(len(choices))[:9]:
        expected = np.zeros((2, positions))
        for image in range(images):
            at = next((p for p, level in enumerate(choices[k])
                       if sure[image, p] >= levels[level]), positions - 1)  # fmt: skip
            expected[:, at] += 1, right[image, at]
        assert np.array([left[k], good[k]]) == pytest.approx(expected / images)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1.0, 0.0), (0.5, 0.5), (1.0, 2.0)]))
def test_a_look_up_equals_running_the_exits_one_by_one(seed, powers):
    rng = np.random.default_rng(seed)
    right, sure = rng.random((15, 3)) < 0.7, rng.random((15, 3))
    segments = [[conv(32, 16), conv(32, 16)], [conv(64, 8)], [conv(24, 8)]]
    heads = [[LayerSpec("linear", 128, 64)], [LayerSpec("linear", 64, 10)], []]
    look = Lookup("net", right, sure, segments, heads, SMALL, thresholds=THRESHOLDS, powers=powers)
    k, f = rng.integers(len(look.choices)), rng.integers(len(SMALL.settings))
    whole_ms, whole_mj = (c[-1] for c in SMALL.cost([layer for s in segments for layer in s]))
    mj, score, hits = [], 0.0, 0
    for image in range(len(right)):
        ran, at = [], 0
        for at in range(3):
            ran += segments[at]
            level = look.choices[k][at] if at < 2 else None
            if level == len(THRESHOLDS):
                continue
            ran += heads[at]
            if level is None or sure[image, at] >= THRESHOLDS[level]:
                break
        ms_, mj_ = (c[f] for c in SMALL.cost(ran))
        mj.append(mj_)
        hits += right[image, at]
        score += right[image, at] * (whole_mj / mj_) ** powers[0] * (whole_ms / ms_) ** powers[1]
    found = look.measure(k, f)
    assert found["energy_mj"] == pytest.approx(np.mean(mj))
    assert found["accuracy_val_pct"] == pytest.approx(100 * hits / 15)
    assert found["score"] == pytest.approx(score / 15)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_a_higher_threshold_lets_no_more_images_go(seed, positions):
    look = look_up(seed, positions)
    options = (len(THRESHOLDS) + 1,) * (positions - 1)
    for p in range(positions - 1):
        gone = look.left[:, : p + 1].sum(axis=1).reshape(options)
        assert (np.diff(gone, axis=p) <= 1e-12).all()


def test_a_redundant_exit_costs_its_classifier_and_adds_nothing():
    right = np.ones((10, 3), bool)
    sure = np.column_stack([np.full(10, 0.9), np.full(10, 0.9), np.ones(10)])
    segments, heads = [[conv(32, 16)]] * 3, [[LayerSpec("linear", 64, 10)]] * 3
    look = Lookup("net", right, sure, segments, heads, SMALL, thresholds=(0.8,))
    score = {tuple(c): s for c, s in zip(look.choices, look.measure(np.arange(4), 0)["score"],
                                         strict=True)}  # fmt: skip
    assert score[0, 0] == score[0, 1] > score[1, 0] > score[1, 1]


# -- the inner search ---------------------------------------------------------------------------


def limits_of(look: Lookup, slack_pp: float) -> dict[str, float]:
    return {"accuracy_val_pct": float(look.accuracy_pct[-1]) - slack_pp,
            "latency_ms": 1.6 * look.reference[1]}  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 5.0]), st.sampled_from(["score", "energy_mj"]))
def test_exhaustive_is_brute_force(seed, slack_pp, objective):
    look = look_up(seed)
    limits = limits_of(look, slack_pp)
    brute = best_within(everything(look), objective, DIRECTIONS, limits)
    best = exhaustive(look, objective, limits)
    assert best[objective] == pytest.approx(brute[objective])
    assert (best["accuracy_val_pct"] >= limits["accuracy_val_pct"]) & (
        best["latency_ms"] <= limits["latency_ms"]
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 5.0]), st.integers(1, 200))
def test_inner_search_keeps_to_its_budget_and_below_the_optimum(seed, slack_pp, evaluations):
    look = look_up(seed)
    limits = limits_of(look, slack_pp)
    best = best_within(everything(look), "score", DIRECTIONS, limits)["score"]
    table = inner_search(look, limits=limits, evaluations=evaluations, seed=seed)
    assert 0.5 * min(evaluations, len(everything(look))) <= len(table) <= evaluations
    assert not table.duplicated(["choice", "setting"]).any()
    if evaluations >= len(everything(look)):
        assert best_within(table, "score", DIRECTIONS, limits)["score"] == best
    with_limits = table[(table["accuracy_val_pct"] >= limits["accuracy_val_pct"])
                        & (table["latency_ms"] <= limits["latency_ms"])]  # fmt: skip
    assert with_limits["score"].max() <= best + 1e-12 or with_limits.empty


def test_inner_search_reaches_the_optimum_with_a_fraction_of_the_look_ups():
    gaps = []
    for seed in range(10):
        look = look_up(seed, positions=5)
        limits = limits_of(look, 2.0)
        table = inner_search(look, limits=limits, evaluations=240, seed=seed)
        assert len(table) == 240 < len(everything(look)) / 4
        found = best_within(table, "score", DIRECTIONS, limits)["score"]
        gaps.append(1 - found / exhaustive(look, limits=limits)["score"])
    assert max(gaps) <= 0.01


def test_the_same_seed_looks_up_the_same_points():
    look = look_up(3, positions=5)
    first, second = (inner_search(look, evaluations=150, seed=7) for _ in range(2))
    assert first.equals(second)
    assert not first.equals(inner_search(look, evaluations=150, seed=8))


@pytest.mark.parametrize("knobs", [(), ("exits",), ("gpu",), ("cpu", "memory"), ("exits", "gpu")])
def test_what_is_not_free_stays_where_it_is(knobs):
    look = look_up(1, positions=4)
    table = inner_search(look, evaluations=40, seed=0, knobs=knobs)
    fixed = {"cpu": "cpu_mhz", "gpu": "gpu_mhz", "memory": "emc_mhz"}
    for knob, column in fixed.items():
        assert (table[column].nunique() == 1) == (knob not in knobs)
        assert knob in knobs or table[column].iloc[0] == everything(look)[column].max()
    assert ("exits" in knobs) or set(table["exits"]) == {"none"}


# -- infeasible demands -------------------------------------------------------------------------


def test_an_unreachable_accuracy_is_named_with_the_best_there_is():
    look = look_up(2)
    with pytest.raises(InfeasibleError, match="accuracy_val_pct") as caught:
        exhaustive(look, "energy_mj", {"accuracy_val_pct": 100.01})
    error, whole = caught.value, everything(look)
    assert isinstance(error, DynlibError)
    assert error.limit == "accuracy_val_pct"
    assert error.reachable == pytest.approx(whole["accuracy_val_pct"].max())
    at_best = whole[whole["accuracy_val_pct"] >= error.reachable - 1e-9]
    assert error.nearest["energy_mj"] == pytest.approx(at_best["energy_mj"].min())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 0.3))
def test_an_unreachable_deadline_is_named_with_the_nearest_point(seed, share):
    look = look_up(seed)
    limits = {"accuracy_val_pct": float(look.accuracy_pct.min()),
              "latency_ms": share * look.reference[1]}  # fmt: skip
    with pytest.raises(InfeasibleError) as caught:
        exhaustive(look, "score", limits)
    whole = everything(look)
    fast = whole["latency_ms"].min()
    assert caught.value.limit == "latency_ms"
    assert caught.value.reachable == pytest.approx(fast)
    assert caught.value.nearest["latency_ms"] == pytest.approx(fast)


# -- both levels, and who saves what ------------------------------------------------------------

SPACE = SearchSpace((32,), depth=((1, 2), (1, 2)))


def test_the_outer_search_is_handed_the_inner_result_and_keeps_to_the_budget(tmp_path):
    looks = {c: look_up(i, positions=2 + sum(c.depth)) for i, c in enumerate(SPACE)}
    asked = []

    def look(config):
        asked.append(config)
        return looks[config]

    found = codesign(SPACE, look, evaluations=200, per_backbone=100, seed=0, slacks_pp=(0.0, 5.0))
    assert len(set(asked)) == 2
    assert 100 < len(found) <= 200
    again = codesign(SPACE, look, evaluations=200, per_backbone=100, seed=0, slacks_pp=(0.0, 5.0))
    assert found.equals(again)
    for _ in range(2):  # the second only reads the study
        kept = codesign(SPACE, look, evaluations=200, per_backbone=100, seed=0,
                        slacks_pp=(0.0, 5.0), storage=tmp_path / "study.log")  # fmt: skip
        assert kept.equals(found)
    alone = codesign(SPACE, look, evaluations=200, per_backbone=100, seed=0, knobs=())
    assert len(alone) == SPACE.size  # every backbone, one point each
    assert set(alone["exits"]) == {"none"}


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_the_gains_of_the_knobs_sum_up_to_the_gain_of_all(seed):
    look = look_up(seed)
    limits = limits_of(look, 1.0)
    rows = split_gain(look, limits).set_index("knob")
    energy = {}
    for knobs in (DESIGN_KNOBS, (), ("gpu",), ("exits", "cpu", "memory")):
        best = best_within(everything(look, knobs), "energy_mj", DIRECTIONS, limits)
        energy[knobs] = best["energy_mj"]
    all_pct = 100 * (1 - energy[DESIGN_KNOBS] / energy[()])
    assert rows["gain_pct"].sum() == pytest.approx(all_pct)
    assert rows.loc["gpu", "alone_pct"] == pytest.approx(100 * (1 - energy["gpu",] / energy[()]))
    without = 100 * (1 - energy["exits", "cpu", "memory"] / energy[()])
    assert rows.loc["gpu", "last_pct"] == pytest.approx(all_pct - without)
    assert (rows["alone_pct"] >= -1e-9).all()


# -- what is published, and D without dissimilarity ---------------------------------------------


def test_published_exits_end_with_the_classifier_behind_the_last_block():
    blocks = published_exits().groupby("group")["position"].max() + 1
    assert blocks.to_dict() == {"A0": 17, "A3": 21, "A5": 21}


def test_half_way_lies_between_the_exits_around_it():
    exits = pd.DataFrame({"position": [0, 2, 3], "value": [10.0, 30.0, 80.0]})
    assert share_half_way(exits) == pytest.approx(100 * 20 / 80)  # two of four blocks


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_without_dissimilarity_every_exit_in_use_counts_for_itself(seed):
    """Against the slow obvious way, at the highest clocks and at others."""
    lookup, rng = look_up(seed), np.random.default_rng(seed)
    right = rng.random((40, 3)) < 0.7
    setting = int(rng.integers(len(SMALL.settings)))
    scores = without_dissimilarity(lookup, right, setting)
    reference_mj, _ = lookup.reference
    for k in range(len(lookup.choices)):
        spent_mj, parts = 0.0, []
        for position in range(3):
            spent_mj += lookup.segments[position][1][setting]
            if lookup.used[k, position]:
                spent_mj += lookup.heads[position][1][setting]
                parts.append(right[:, position].mean() * reference_mj / spent_mj)
        assert scores[k] == pytest.approx(np.mean(parts))
