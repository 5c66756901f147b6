"""Batches that networks with exits join and leave."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.errors import WorkloadError
from dynlib.runtime.batching import BATCHINGS, Batching, serve_batches
from suite.errors import SuiteError
from suite.papers import fluid_batching as fluid

HOW = {how.name: how for how in BATCHINGS}
# Three nodes; a batch of b takes (2 + b) ms each: 3 ms alone, 6 ms for four.
TABLE = np.array([[3.0, 4.0, 5.0, 6.0]] * 3)
FOUR = {name: replace(how, most=min(how.most, 4), window_ms=min(how.window_ms, 5.0))
        for name, how in HOW.items()}  # fmt: skip


def serve(arrival_ms, nodes, how, deadline_ms=1000.0, table=TABLE):
    return serve_batches(arrival_ms, nodes, deadline_ms, table, how)


def finish(*args, **more):
    return serve(*args, **more).finish_ms.tolist()


def workload(load=0.7, count=400, seed=0, exits="typical"):
    table = fluid.node_ms(fluid.Npu())
    rate = load * 1000 * 8 / table[:, -1].sum()
    return (*fluid.requests(rate, count, seed, exits), table)


def test_adaptive_takes_what_is_there():
    assert finish([0, 1, 2], [3, 3, 3], FOUR["adaptive"]) == [9.0, 21.0, 21.0]


def test_static_waits_for_a_full_batch_or_its_window():
    assert finish([0, 4, 20], [3, 3, 3], FOUR["static"]) == [17.0, 17.0, 34.0]
    assert finish([0, 1, 2, 3], [3] * 4, FOUR["static"]) == [21.0] * 4


def test_newcomers_catch_up_and_join():
    # The second runs node 0 from 3 to 6 ms, then both nodes 1 and 2.
    assert finish([0, 1], [3, 3], FOUR["lazy"]) == [14.0, 14.0]


def test_newcomers_wait_if_somebody_would_be_late():
    # Joined, the first would end at 14 ms.
    assert finish([0, 1], [3, 3], FOUR["lazy"], 14.0) == [14.0, 14.0]
    assert finish([0, 1], [3, 3], FOUR["lazy"], 13.9) == [9.0, 18.0]


def test_who_knows_the_exits_expects_less():
    # Joined, all nodes end at 3 + 3 + 4 + 4 ms, but one in four comes to the last: 3 + 3 + 4 + 1.
    lazy, ours = (
        serve_batches([0, 1], [2, 2], 12.0, TABLE, FOUR[name], (1, 1, 0.25)).finish_ms.tolist()
        for name in ("lazy", "fluid")
    )
    assert lazy == [6.0, 12.0]
    assert ours == [10.0, 10.0]


def test_those_who_left_make_room_or_do_not():
    together, nodes = [0, 0, 0, 0], [1, 1, 1, 3]
    assert finish(together, nodes, FOUR["adaptive"]) == [6.0, 6.0, 6.0, 18.0]
    assert finish(together, nodes, FOUR["fluid"]) == [6.0, 6.0, 6.0, 12.0]
    sizes = [(node, size, room) for _, node, size, room in
             serve(together, nodes, FOUR["fluid"]).sizes]  # fmt: skip
    assert sizes == [(0, 4, 4), (1, 1, 1), (2, 1, 1)]


def test_the_benefit_test_keeps_newcomers_out_where_a_batch_gains_nothing():
    none_gained = np.array([[3.0, 6.0, 9.0, 12.0]] * 3)
    lazy = FOUR["lazy"]
    assert finish([0, 1], [3, 3], lazy, table=none_gained) == [18.0, 18.0]
    assert finish([0, 1], [3, 3], replace(lazy, benefit=True), table=none_gained) == [9.0, 18.0]


# The limits that the issue names.


@pytest.mark.parametrize("name", ["adaptive", "lazy", "lazy, reclaims", "fluid"])
def test_a_largest_batch_of_one_is_first_come_first_served(name):
    arrival_ms, nodes, table = workload(0.5)
    ours = serve_batches(arrival_ms, nodes, 50.0, table, replace(HOW[name], most=1)).finish_ms
    now_ms, expected = 0.0, []
    for t_ms, need in zip(arrival_ms, nodes, strict=True):
        now_ms = max(now_ms, t_ms)
        for node in range(need):
            now_ms += table[node][0]
        expected.append(now_ms)
    assert ours.tolist() == expected


@pytest.mark.parametrize("load", [0.4, 0.9])
def test_without_exits_fluid_is_lazy_bit_for_bit(load):
    arrival_ms, nodes, table = workload(load, exits="none")
    lazy, reclaims, ours = (
        serve_batches(arrival_ms, nodes, 60.0, table, HOW[name], fluid.reached("none"))
        for name in ("lazy", "lazy, reclaims", "fluid")
    )
    assert (lazy.finish_ms == ours.finish_ms).all()
    assert (reclaims.finish_ms == ours.finish_ms).all()
    assert lazy.sizes == ours.sizes
    assert max(size for _, _, size, _ in ours.sizes) > 1


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_what_every_batching_keeps(data):
    count = data.draw(st.integers(1, 25))
    gaps = data.draw(st.lists(st.floats(0, 8), min_size=count, max_size=count))
    nodes = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    how = FOUR[data.draw(st.sampled_from(sorted(FOUR)))]
    arrival_ms = np.cumsum(gaps)
    done = serve(arrival_ms, nodes, how, data.draw(st.floats(9, 60)))
    alone = np.array(nodes) * TABLE[0][0]
    assert (done.finish_ms >= arrival_ms + alone - 1e-9).all()
    assert all(1 <= size <= room <= how.most for _, _, size, room in done.sizes)
    # Every node of every request ran once.
    ran = Counter()
    for _, node, size, _ in done.sizes:
        ran[node] += size
    assert ran == Counter(node for need in nodes for node in range(need))
    busy_ms = [TABLE[node][room - 1] for _, node, _, room in done.sizes]
    begins = [t for t, *_ in done.sizes]
    ends = np.array(begins) + busy_ms
    assert (np.array(begins[1:]) >= ends[:-1] - 1e-9).all()


# The accelerator of the paper.


def test_the_tiles_of_a_layer():
    npu = fluid.Npu(rows=256, depth=16, columns=128, mhz=200.0)
    # 3136 pixels are 13 tiles of rows, 64 deep are 4, 64 filters are half a tile.
    assert npu.layer_ms(1, 3136, 64, 64) == pytest.approx(13 * 4 * 1 * 256 / 200e3)
    stacked = npu._replace(stackable=True)
    assert stacked.layer_ms(1, 3136, 64, 64) == pytest.approx(7 * 4 * 256 / 200e3)
    assert stacked.layer_ms(1, 3136, 64, 256) == npu.layer_ms(1, 3136, 64, 256)


def test_the_network_is_resnet_50():
    nodes = fluid.resnet50()
    assert len(nodes) == 18
    macs = sum(pixels * depth * filters for convs in nodes for pixels, depth, filters in convs)
    assert macs == pytest.approx(3.8e9, rel=0.02)
    assert sum(depth * filters for convs in nodes for _, depth, filters in convs) == pytest.approx(
        25.5e6, rel=0.005
    )


def test_larger_batches_take_longer_and_less_per_image():
    table = fluid.node_ms(fluid.Npu())
    assert (np.diff(table, axis=1) >= 0).all()
    each = table.sum(0) / np.arange(1, 9)
    assert each[-1] < 0.6 * each[0]


@pytest.mark.parametrize("bursts", [False, True])
def test_the_rate_is_as_asked(bursts):
    arrival_ms, nodes = fluid.requests(50.0, 40_000, 0, "typical", bursts)
    assert len(arrival_ms) / arrival_ms[-1] * 1000 == pytest.approx(50.0, rel=0.03)
    assert (np.diff(arrival_ms) >= 0).all()
    expected = fluid.reached("typical")
    seen = [(nodes > node).mean() for node in range(18)]
    assert seen == pytest.approx(expected, abs=0.01)


def test_loads_beyond_saturation_are_refused():
    with pytest.raises(SuiteError, match="load 1: expected one below saturation"):
        fluid.judge(1.0, 0, 10)


# Bad input.


@pytest.mark.parametrize(("change", "text"), [
    ({"arrival_ms": [], "nodes": []}, "0 arrivals"),
    ({"nodes": [3]}, "2 arrivals and 1 exits"),
    ({"arrival_ms": [0.0, -1.0]}, "request 1, arrival_ms: got -1.0"),
    ({"arrival_ms": [math.nan, 1.0]}, "request 0, arrival_ms: got nan"),
    ({"arrival_ms": [2.0, 1.0]}, "request 1, arrival_ms: got 1.0, expected times >= 0 in asc"),
    ({"nodes": [3, 4]}, "request 1, nodes: got 4, expected 1 to 3"),
    ({"deadline_ms": 0.0}, "deadline_ms: got 0.0"),
    ({"node_ms": TABLE * math.nan}, "expected times above 0"),
    ({"how": Batching("large", most=9)}, "batches up to 9, got 4"),
])  # fmt: skip
def test_bad_input_is_named(change, text):
    good = {"arrival_ms": [0.0, 1.0], "nodes": [3, 3], "deadline_ms": 9.0, "node_ms": TABLE,
            "how": FOUR["fluid"]}  # fmt: skip
    with pytest.raises(WorkloadError, match=text):
        serve_batches(**(good | change))
