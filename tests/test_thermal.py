"""The thermal body, and the kernel's power allocator against reference vectors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.boards.thermal import Actor, PowerAllocator, ThermalRC, granted_mhz
from dynlib.errors import DynlibError
from dynlib.machine.bind import load_board

HIKEY = load_board("hikey960")
SUM_MAX = 4 * 1571 + 4 * 245


def hikey_ipa():
    return PowerAllocator(65, 75, 4500)


def test_hikey960_sustains_its_power_at_its_trip():
    body = ThermalRC.of(HIKEY, tau_s=20)
    assert body.r_k_w == pytest.approx(11.1, abs=0.05)
    assert body.step(4500, 1000) == pytest.approx(75)
    with pytest.raises(DynlibError, match="no sustainable power"):
        ThermalRC.of(load_board("jetson-nano"), tau_s=20)
    with pytest.raises(DynlibError, match="above 0"):
        ThermalRC(0, 1)


@given(st.floats(0, 20_000), st.floats(0.1, 100), st.integers(1, 20))
def test_a_step_may_be_split(power_mw, seconds, parts):
    whole, split = ThermalRC(10, 30), ThermalRC(10, 30)
    for _ in range(parts):
        split.step(power_mw, seconds / parts)
    assert split.temp_c == pytest.approx(whole.step(power_mw, seconds), abs=1e-6)
    assert 25 - 1e-9 <= whole.temp_c <= 25 + power_mw / 100 + 1e-9


def test_ipa_constants_of_hikey960():
    ipa = hikey_ipa()
    assert (ipa.k_po, ipa.k_pu, ipa.k_i) == (460, 921, 92)


@pytest.mark.parametrize(("temp", "mw"), [(64, SUM_MAX), (70, 7264), (74, 5399)])
def test_ipa_budgets(temp, mw):
    assert hikey_ipa().budget_mw(temp, SUM_MAX) == mw


def test_ipa_before_the_clamp_and_above_the_trip():
    assert hikey_ipa().budget_mw(70, 100_000) == 8997
    above = hikey_ipa()
    above.k_i = 0  # the vector is of the proportional term only
    assert above.budget_mw(76, SUM_MAX) == 4050


def test_ipa_sums_errors_above_the_trip_and_forgets_below_switch_on():
    ipa = hikey_ipa()
    budgets = [ipa.budget_mw(76, SUM_MAX) for _ in range(3)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] > budgets[2]
    assert ipa.budget_mw(70, SUM_MAX) < hikey_ipa().budget_mw(70, 8997)
    ipa.budget_mw(64, SUM_MAX)
    assert ipa.budget_mw(76, SUM_MAX) == budgets[0]
    with pytest.raises(DynlibError, match="expected it above"):
        PowerAllocator(75, 75, 4500)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5000)), min_size=1, max_size=4),
       st.floats(60, 90))  # fmt: skip
def test_grants_stay_within_budget_and_limits(pairs, temp):
    actors = [Actor(min(request, most), most) for request, most in pairs]
    budget = hikey_ipa().budget_mw(temp, sum(actor.max_mw for actor in actors))
    grants = hikey_ipa().grants_mw(temp, actors)
    assert all(0 <= g <= actor.max_mw for g, actor in zip(grants, actors, strict=True))
    assert sum(grants) <= budget + len(actors)


def test_surplus_goes_to_who_can_use_it():
    grants = hikey_ipa().grants_mw(74, [Actor(1000, 6284), Actor(980, 980)])
    assert grants == [4419, 980]  # 5399 shared 1000 : 980, the second capped


def test_a_grant_becomes_the_highest_clock_that_fits():
    big = HIKEY.unit("big")
    assert granted_mhz(big, 4 * 805, 4.0) == 1805
    assert granted_mhz(big, 4 * 803, 4.0) == 1421
    assert granted_mhz(big, 10, 4.0) == 903


def test_ipa_holds_the_temperature():
    """HiKey960 under full load: without control 75 C is far exceeded, with it the zone settles."""
    big, body, ipa = HIKEY.unit("big"), ThermalRC.of(HIKEY, tau_s=20), hikey_ipa()
    assert body.r_k_w * big.dynamic_mw(big.max_mhz, 4) / 1000 + 25 > 90
    mhz, temps = big.max_mhz, []
    for _ in range(3000):
        temps.append(body.step(big.dynamic_mw(mhz, 4), 0.1))
        actor = Actor(round(big.dynamic_mw(mhz, 4)), round(big.dynamic_mw(big.max_mhz, 4)))
        mhz = granted_mhz(big, ipa.grants_mw(temps[-1], [actor])[0], 4.0)
    assert max(temps[-1000:]) < 77
    assert min(temps[-1000:]) > 68
