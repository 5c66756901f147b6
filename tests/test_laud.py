"""The analytic predictor against its public simulator."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import DynlibError
from suite.papers.laud_operators import DEVICES, Conv, conv_s, tiles
from suite.papers.laudnet import (
    REFERENCE,
    Bottleneck,
    channel_s,
    judge,
    laud_network_ms,
    layer_s,
    spatial_s,
    static_s,
)

BLOCK = Bottleneck(256, 256, 56)


def test_all_published_values_within_a_percent():
    judged = judge()
    assert len(judged) == 50
    assert sum(row["mode"] == "static" for row in judged) == 10
    worst = max(judged, key=lambda row: abs(row["error_pct"]))
    assert abs(worst["error_pct"]) <= 1, worst


def test_the_sign_flip():
    """Skipping half of all pixels is slower than none on a large GPU, faster on a small one."""
    depths = (3, 4, 23, 3)
    for name, faster in (("v100", False), ("rtx3090", False), ("tx2", True), ("nano", True)):
        static = laud_network_ms(DEVICES[name], depths)
        assert (laud_network_ms(DEVICES[name], depths, "spatial") < static) == faster


@pytest.mark.parametrize("n", [1, 2, 7, 14, 56, 64, 300])
def test_tiles(n):
    sides = tiles(n)
    assert list(sides) == sorted(set(sides.tolist()))
    assert {1, -(-n // 2)} <= set(sides.tolist()) or n == 2
    assert sides.max() <= max(2 * n, 1)


@given(st.sampled_from(sorted(DEVICES)), st.floats(0, 1), st.floats(0, 1))
def test_less_density_is_never_slower(name, a, b):
    a, b = sorted((round(a, 2), round(b, 2)))
    device = DEVICES[name]
    for time in (layer_s, lambda d, block, r: conv_s(d, block.convs[1], 1.0, r)):
        assert time(device, BLOCK, a) <= time(device, BLOCK, b) * (1 + 1e-9)
    assert conv_s(device, Conv(8, 8, 8)) > 8e-6


def test_everything_active_costs_more_than_static():
    for device in DEVICES.values():
        static = static_s(device, BLOCK)
        assert layer_s(device, BLOCK, 1.0) > static
        assert channel_s(device, BLOCK, 2, 1.0) > static
        assert spatial_s(device, BLOCK, 1, 1.0) > static


def test_a_faster_memory_helps():
    slow, fast = DEVICES["nano"], DEVICES["tx2"]
    assert laud_network_ms(fast, (3, 4, 6, 3)) < laud_network_ms(slow, (3, 4, 6, 3))


def test_requests_that_mean_nothing():
    with pytest.raises(DynlibError, match="'token'; expected one of static"):
        laud_network_ms(DEVICES["tx2"], (3, 4, 6, 3), "token")
    with pytest.raises(DynlibError, match="share from 0 to 1"):
        laud_network_ms(DEVICES["tx2"], (3, 4, 6, 3), "layer", density=1.5)
    assert np.isfinite([ms for row in REFERENCE for ms in row[3]]).all()
