"""What a plan may choose from."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import NETS, net_table

from dynlib.runtime.candidates import Candidates


@given(NETS, st.integers(50, 90), st.integers(1, 4))
@settings(max_examples=60)
def test_only_beaten_points_are_left_out(nets, floor_pct, share_mb):
    points = net_table(nets).on("gpu")
    kept = Candidates.of(points, lambda point: 1.1).useful(floor_pct, share_mb, unbeaten=True)
    fit = [p for p in points
           if p.accuracy_val_pct >= floor_pct and p.memory_mb <= share_mb]  # fmt: skip
    assert set(kept.points) <= set(fit)
    for point in fit:
        assert any(
            np.less_equal(k.latency_ms, point.latency_ms).all()
            and np.less_equal(k.active_mw, point.active_mw).all()
            for k in kept.points
        )
    # And nobody who is left is beaten by a faster one that is.
    for i, a in enumerate(kept.points):
        assert not any(
            np.less_equal(b.latency_ms, a.latency_ms).all()
            and np.less_equal(b.active_mw, a.active_mw).all() and b.memory_mb <= a.memory_mb
            for b in kept.points[:i]
        )  # fmt: skip


@given(NETS)
@settings(max_examples=30)
def test_the_best_of_each_clock_is_that_of_some_point(nets):
    every = Candidates.of(net_table(nets).on("gpu"), lambda point: 1.0 + point.noise_cv)
    kept = every.useful(0.0, 4.0, unbeaten=False)
    assert [p.latency_ms[-1] for p in kept.points] == sorted(p.latency_ms[-1] for p in kept.points)
    np.testing.assert_allclose(kept.fastest_ms, [min(c) for c in zip(
        *(p.latency_ms for p in kept.points), strict=True)])  # fmt: skip
    assert kept.least_margin == 1.0 + min(p.noise_cv for p in kept.points)
    assert (kept.cheapest_uj <= kept.energy_uj).all()
