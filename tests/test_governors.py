from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.boards.governors import (
    GOVERNORS,
    make_governor,
    ondemand_target,
    podgov_step,
    schedutil_next_khz,
    schedutil_perf,
    simple_ondemand_target,
)
from dynlib.boards.pelt import Pelt, decay, util_est
from dynlib.errors import DynlibError
from dynlib.machine.bind import load_board

BIG = load_board("hikey960").unit("big")
GPU = load_board("jetson-xavier-nx").gpu
UNITS = [BIG, GPU, load_board("hikey960").unit("little"), load_board("odroid-xu4").gpu]


# Reference vectors, from the kernel's formulae.


def test_pelt_ramps_as_the_kernel_does():
    pelt, ramp = Pelt(), {}
    for segment in range(1, 101):
        ramp[segment] = pelt.update(1024, running=True)
    assert {n: ramp[n] for n in (1, 8, 16, 32, 64, 100)} == {
        1: 21, 8: 163, 16: 300, 32: 512, 64: 768, 100: 907,
    }  # fmt: skip
    at_once = [Pelt().update(1024 * n, running=True) for n in (1, 8, 16, 32, 64, 100)]
    assert at_once == [21, 162, 299, 512, 768, 906]
    assert next(n for n, util in ramp.items() if util >= 0.8 * 1024) * 1.024 == pytest.approx(
        76, abs=2
    )


def test_pelt_decays_by_half_in_32_segments():
    assert decay(1 << 20, 32) == pytest.approx(1 << 19, abs=1)
    assert decay(1 << 20, 32 * 63 + 1) == 0
    pelt = Pelt()
    pelt.update(1024 * 345, running=True)
    before = pelt.util_avg
    assert pelt.update(1024 * 32, running=False) == pytest.approx(before / 2, abs=1)


@given(st.lists(st.tuples(st.integers(0, 50_000), st.booleans()), max_size=30))
def test_pelt_stays_in_range_and_splits(steps):
    whole, halves = Pelt(), Pelt()
    for us, running in steps:
        assert 0 <= whole.update(us, running) <= 1024
        halves.update(us // 2, running)
        halves.update(us - us // 2, running)
        assert halves.period_contrib == whole.period_contrib
        assert halves.util_avg == pytest.approx(whole.util_avg, abs=3 + len(steps))


def test_pelt_is_clock_invariant():
    """10 ms of work in every 40 ms at full clock, or 20 ms at half: the same utilisation."""
    fast, slow = Pelt(), Pelt()
    for _ in range(20):
        fast.run(10_000, 1.0)
        fast.idle(30_000)
        slow.run(20_000, 0.5)
        slow.idle(20_000)
    assert slow.util_avg == pytest.approx(fast.util_avg, abs=1)


def test_util_est_smooths_decreases_only():
    assert util_est(100, 400) == 400
    assert util_est(400, 200) == 350
    assert util_est(400, 391) == 400
    assert util_est(400, 200, runnable=300) == 400


@pytest.mark.parametrize(
    ("util", "perf", "khz", "opp"),
    [(400, 500, 1_153_320, 1421), (732, 915, 2_110_576, 2112), (733, 916, 2_112_882, 2362),
     (819, 1023, 2_359_693, 2362), (820, 1024, 2_362_000, 2362)],
)  # fmt: skip
def test_schedutil_vectors(util, perf, khz, opp):
    assert schedutil_perf(util, 1024) == perf
    assert schedutil_next_khz(util, 1024, 2_362_000) == khz
    assert BIG.at_or_above(khz / 1000) == opp


def test_schedutil_bounds():
    assert schedutil_perf(100, 1024, util_min=512) == 512
    assert schedutil_perf(900, 1024, util_max=600) == 600
    assert schedutil_perf(900, 592) == 592


def test_simple_ondemand_vectors():
    assert simple_ondemand_target(60, 100, 500_000_000, 921_600_000) == 340_909_090
    assert simple_ondemand_target(91, 100, 500_000_000, 921_600_000) == 921_600_000
    assert simple_ondemand_target(88, 100, 500_000_000, 921_600_000) == 500_000_000
    assert simple_ondemand_target(0, 0, 500_000_000, 921_600_000) == 921_600_000
    assert simple_ondemand_target(1, 2, 0, 921_600_000) == 921_600_000


@pytest.mark.parametrize(
    ("busyness", "rt", "out"), [(850, 850, 586), (700, 950, 981), (350, 350, 370)]
)
def test_podgov_vectors(busyness, rt, out):
    norm, avg = (-(-per_mille * 522 // 1000) for per_mille in (rt, busyness))
    assert podgov_step(522, norm, avg, 522, 1377)[0] == out


def test_ondemand_and_conservative_vectors():
    assert ondemand_target(50, 903_000, 2_362_000) == 1_632_500
    assert make_governor("ondemand", BIG).update(0, 4, 8, 903) == 1805
    assert make_governor("ondemand", BIG).update(0, 8, 8, 903) == 2362
    conservative, clock, asked = make_governor("conservative", BIG), 903.0, []
    for i in range(5):
        clock = conservative.update(8.0 * i, 8, 8, clock)
        asked.append(round(conservative.requested_mhz, 1))
    assert asked == [1021.1, 1139.2, 1257.3, 1375.4, 1493.5]
    assert clock == 1421
    for i in range(5, 9):
        clock = conservative.update(8.0 * i, 0, 8, clock)
    assert clock == 1421  # 1021.1 asked, rounded up
    assert conservative.update(80, 0, 8, clock) == 903


# The state machines.


def test_fixed_governors():
    assert make_governor("performance", GPU).update(0, 0, 10, 204) == 1109.25
    assert make_governor("performance", GPU, max_mhz=800).update(0, 0, 10, 204) == 752.25
    assert make_governor("powersave", GPU, min_mhz=300).update(0, 10, 10, 1109.25) == 306
    assert make_governor("userspace", GPU, setspeed_mhz=700).update(0, 0, 9, 204) == 701.25
    capped = make_governor("userspace", GPU, setspeed_mhz=2000, max_mhz=500)
    assert capped.update(0, 0, 9, 204) == 408


def test_schedutil_climbs_under_load_and_falls_when_idle():
    governor, clock, clocks = make_governor("schedutil", BIG), BIG.min_mhz, []
    for i in range(60):
        clock = governor.update(4.0 * i, 4.0, 4.0, clock)
        clocks.append(clock)
    assert clocks == sorted(clocks)
    assert clocks[-1] == BIG.max_mhz
    for i in range(60, 120):
        clock = governor.update(4.0 * i, 0.0, 4.0, clock)
    assert clock == BIG.min_mhz


def test_schedutil_settles_on_a_clock_that_fits_a_steady_load():
    governor, clock, i = make_governor("schedutil", BIG), BIG.max_mhz, 0
    unfinished = []
    for _ in range(50):  # 16 ms of work at the highest clock in every 32 ms
        left = 16.0
        for _ in range(8):
            busy = min(4.0, left * BIG.max_mhz / clock)
            left -= busy * clock / BIG.max_mhz
            clock = governor.update(4.0 * i, busy, 4.0, clock)
            i += 1
        unfinished.append(left)
    assert unfinished[0] > 1  # the signal starts at 0 and lags
    assert max(unfinished[5:]) < 1e-6


def test_schedutil_respects_its_rate_limit():
    governor = make_governor("schedutil", BIG, rate_limit_us=10_000)
    changed = []
    clock = BIG.min_mhz
    for i in range(100):
        new = governor.update(4.0 * i, 4.0 * (i % 13 < 8), 4.0, clock)
        if new != clock:
            changed.append(4.0 * i)
        clock = new
    assert changed
    assert min(b - a for a, b in pairwise(changed)) >= 10
    assert make_governor("schedutil", BIG).rate_limit_us == 450  # 1.5 x 300 us


def test_single_core_schedutil_does_not_fall_while_busy():
    prime = load_board("jetson-xavier-nx").unit("carmel0")
    governor = make_governor("schedutil", replace(prime, cores=1))
    assert governor.update(0, 4, 4, 1907.2) == 1907.2
    assert governor.update(4, 3, 4, 1907.2) < 1907.2


def test_podgov_waits_out_its_window_and_keeps_without_samples():
    governor = make_governor("nvhost_podgov", GPU)
    first = governor.update(0, 25, 25, 114.75)
    assert first > 114.75
    assert governor.update(25, 0, 25, first) == first
    assert governor.update(60, 0, 0, first) == first
    assert governor.update(75, 0, 25, first) < first


def test_podgov_smooths_only_outside_its_window():
    governor = make_governor("nvhost_podgov", GPU)
    clock = governor.update(0, 25, 25, 510)
    avg, favg = governor.avg, governor.favg
    governor.update(25, 25, 25, clock)
    assert governor.avg > avg
    assert governor.favg == favg


def test_limits_can_change_while_running():
    governor = make_governor("performance", GPU)
    governor.set_limits(max_mhz=0.72 * GPU.max_mhz)
    assert governor.update(0, 1, 1, 1109.25) == 752.25
    governor.set_limits()
    assert governor.update(0, 1, 1, 752.25) == 1109.25


def test_unknown_names_and_empty_limits_are_errors():
    with pytest.raises(DynlibError, match="did you mean schedutil"):
        make_governor("shedutil", BIG)
    with pytest.raises(DynlibError, match=r"'rate_limit'.*rate_limit_us"):
        make_governor("schedutil", BIG, rate_limit=1)
    with pytest.raises(DynlibError, match=r"no OPP from 100 to 200 MHz.*903"):
        make_governor("schedutil", BIG, min_mhz=100, max_mhz=200)


WINDOWS = st.lists(st.tuples(st.floats(0, 60), st.floats(0, 1)), max_size=60)


@settings(deadline=None)
@given(st.sampled_from(sorted(GOVERNORS)), st.sampled_from(UNITS), st.data(), WINDOWS)
def test_every_governor_stays_on_allowed_clocks_and_repeats_itself(name, unit, data, windows):
    low, high = sorted(data.draw(st.tuples(*[st.sampled_from(unit.freqs)] * 2)))

    def drive():
        governor, now, clock = make_governor(name, unit, min_mhz=low, max_mhz=high), 0.0, low
        for total, share in windows:
            now += total
            clock = governor.update(now, total * share, total, clock)
            yield clock

    clocks = list(drive())
    assert all(clock in unit.freqs and low <= clock <= high for clock in clocks)
    assert clocks == list(drive())
    assert make_governor(name, unit).period_ms > 0
