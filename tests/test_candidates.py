"""What a plan may choose from."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import NETS, net_table

from dynlib.manager.planner import Candidates


@given(NETS, st.integers(50, 90), st.integers(1, 4))
@settings(max_examples=60)
def test_only_beaten_points_are_left_out(nets, floor_pct, share_mb):
    points = net_table(nets).on("gpu")
    every = Candidates.of(points, lambda point: 1.1)
    kept = [every.points[i] for i in every.useful(floor_pct, share_mb, unbeaten=True)]
    fit = [p for p in points
           if p.accuracy_val_pct >= floor_pct and p.memory_mb <= share_mb]  # fmt: skip
    assert set(kept) <= set(fit)
    for point in fit:
        assert any(
            np.less_equal(k.latency_ms, point.latency_ms).all()
            and np.less_equal(k.active_mw, point.active_mw).all()
            for k in kept
        )
    # And nobody who is left is beaten by a faster one that is.
    for i, a in enumerate(kept):
        assert not any(
            np.less_equal(b.latency_ms, a.latency_ms).all()
            and np.less_equal(b.active_mw, a.active_mw).all() and b.memory_mb <= a.memory_mb
            for b in kept[:i]
        )  # fmt: skip


@given(NETS)
@settings(max_examples=30)
def test_the_bounds_of_a_point_hold_for_it_and_all_slower_ones(nets):
    every = Candidates.of(net_table(nets).on("gpu"), lambda point: 1.0 + point.noise_cv)
    times = [p.latency_ms[-1] for p in every.points]
    assert times == sorted(times)
    for i in range(len(times)):
        rest = every.points[i:]
        ms = zip(*(p.latency_ms for p in rest), strict=True)
        uj = zip(*(np.multiply(p.latency_ms, p.active_mw) for p in rest), strict=True)
        assert every.fastest_ms[i] == [min(clock) for clock in ms]
        assert every.cheapest_uj[i] == [min(clock) for clock in uj]
        assert every.least_margin[i] == 1.0 + min(p.noise_cv for p in rest)
