"""Calibrated power and latency: of invented networks, and on the measured Jetsons."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import runtime_cases
from hypothesis import given
from hypothesis import strategies as st

from dynlib.boards.board import Opp
from dynlib.boards.calibration import (
    ClockModel,
    calibrate,
    cross_validate,
    fit_model,
    fit_samples,
    mape,
    pick_samples,
)
from dynlib.boards.file import list_boards, read_board, save_board
from dynlib.errors import BoardError, ProfileError
from dynlib.machine.bind import load_board
from dynlib.manager import Manager
from dynlib.runtime.case import Case

CLOCKS = np.linspace(100, 1000, 10)
TRUTH = ClockModel(1000.0, (5.0, 15.0), (2.0, 14.0), 4000.0, 5.0, 2.0, 30.0, 0.8, 0.5)


def samples(model=TRUTH, clocks=CLOCKS, queues=range(1, 11), noise=0.0):
    f, n = (a.ravel() for a in np.meshgrid(clocks, np.array(queues, float)))
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "freq_mhz": f, "concurrency": n,
        "power_mw": model.power_mw(f, n) * rng.normal(1, noise, len(f)),
        "latency_ms": model.latency_ms(f, n) * rng.normal(1, noise, len(f)),
    })  # fmt: skip


def test_a_known_model_is_found_again():
    found = fit_model(samples())
    f, n = samples()["freq_mhz"], samples()["concurrency"]
    assert found.latency_ms(f, n) == pytest.approx(TRUTH.latency_ms(f, n), rel=1e-6)
    assert found.power_mw(f, n) == pytest.approx(TRUTH.power_mw(f, n), rel=1e-3)
    assert found.static_mw == pytest.approx(TRUTH.static_mw, rel=0.01)


def test_alone_and_in_a_queue():
    assert TRUTH.latency_ms(1000.0, 1) == 36
    assert TRUTH.latency_ms(1000.0, 2) == 72
    assert TRUTH.latency_ms(1000.0, 5) == 2 * 20 + 5 * 16
    assert TRUTH.latency_ms(500.0, 1) == 5 + 30 + 2 + 28


def test_static_power_rises_with_temperature():
    warm = ClockModel(**{**vars(TRUTH), "static_slope_per_c": 0.01})
    assert warm.power_mw(500) == warm.power_mw(500, temp_c=40) == TRUTH.power_mw(500, temp_c=80)
    assert warm.power_mw(500, temp_c=60) - warm.power_mw(500) == pytest.approx(0.2 * 4000)
    board = load_board("jetson-nano")
    hot = board.power_mw({}, {}, temp_c=60) - board.power_mw({}, {})
    assert hot == pytest.approx(20 * board.static_slope_per_c * board.static_mw)
    assert board.static_slope_status == "estimated"
    assert board.power_mw({}, {}, temp_c=board.reference_c) == board.power_mw({}, {})


@given(st.sampled_from(CLOCKS), st.sampled_from(CLOCKS), st.integers(1, 20), st.integers(1, 20))
def test_more_clock_is_faster_and_costs_more(f, g, n, m):
    (f, g), (n, m) = sorted((f, g)), sorted((n, m))
    assert TRUTH.latency_ms(f, n) >= TRUTH.latency_ms(g, n) - 1e-9
    assert TRUTH.latency_ms(f, n) <= TRUTH.latency_ms(f, m) + 1e-9
    assert TRUTH.power_mw(f, n) <= TRUTH.power_mw(g, n) + 1e-9


def test_each_row_is_judged_once_by_a_fit_that_saw_neither_its_clock_nor_its_queue(monkeypatch):
    import dynlib.boards.calibration as power

    table, seen = samples(noise=0.02), []
    monkeypatch.setattr(power, "fit_model", lambda rows: seen.append(rows) or fit_model(rows))
    judged = cross_validate(table, budget=50)
    assert list(judged.index) == list(table.index)
    assert len(seen) == 9
    assert max(map(len, seen)) <= 50
    assert judged["fitted_on"].max() <= 50
    clocks, queues = (np.unique(table[c]) for c in ("freq_mhz", "concurrency"))
    for (a, b), rows in zip(np.ndindex(3, 3), seen, strict=True):
        assert not set(rows["freq_mhz"]) & set(clocks[a::3])
        assert not set(rows["concurrency"]) & set(queues[b::3])


def test_an_error_bar_of_the_size_of_the_noise():
    calibration = fit_samples(samples(noise=0.02))
    assert calibration.n <= 50
    assert 0.5 < calibration.power_mape_pct < 4
    assert 0.5 < calibration.latency_mape_pct < 4


def test_one_concurrency_is_enough_for_a_model_of_clocks():
    calibration = fit_samples(samples(clocks=np.linspace(100, 1000, 15), queues=[1]))
    assert calibration.model.latency_ms(550.0) == pytest.approx(TRUTH.latency_ms(550.0), rel=0.02)


@pytest.mark.parametrize("draw", range(12))
def test_samples_at_random_are_all_used(draw):
    table = samples(queues=range(1, 19), noise=0.02)
    for count in (50, 12):
        calibration = fit_samples(table.sample(count, random_state=draw))
        assert calibration.n == count
        f, n = table["freq_mhz"], table["concurrency"]
        power = calibration.model.power_mw(f, n) / TRUTH.power_mw(f, n)
        latency = calibration.model.latency_ms(f, n) / TRUTH.latency_ms(f, n)
        bound = 0.05 if count == 50 else 0.25
        assert abs(power - 1).mean() < bound
        assert abs(latency - 1).mean() < bound
    part = table.sample(100, random_state=draw)
    assert 40 <= len(pick_samples(part, 50)) <= 50


def test_what_samples_cannot_tell_is_nothing_and_is_named():
    assert fit_samples(samples()).undetermined == ()
    alone = fit_samples(samples(clocks=np.linspace(100, 1000, 15), queues=[1]))
    assert alone.undetermined == ("image_ms", "overhead_ms", "busy_mw_mhz")
    assert alone.model.overhead_ms == (0.0, 0.0)
    assert alone.model.busy_mw_mhz == 0.0
    assert alone.model.image_ms == pytest.approx((7.0, 29.0), rel=1e-6)
    # In a queue of one length, nobody knows what an empty one would draw.
    busy = fit_samples(samples(clocks=np.linspace(100, 1000, 15), queues=[4]))
    assert busy.undetermined == ("image_ms", "overhead_ms", "idle_mw_mhz", "busy_mw_mhz")
    assert busy.power_mape_pct < 1


def test_samples_on_a_cross_are_judged_as_far_as_others_are_left():
    table = samples(queues=range(1, 6), noise=0.02)
    cross = table[(table["concurrency"] == 1) | (table["freq_mhz"] == CLOCKS[0])]
    judged = cross_validate(cross)
    assert 0 < len(judged) < len(cross)
    assert np.isfinite(judged["predicted_power_mw"]).all()
    assert fit_samples(cross).power_mape_pct > 0


def test_a_budget_keeps_all_clocks_and_both_ends_of_the_queues():
    chosen = pick_samples(samples(queues=range(1, 19)), 50)
    assert len(chosen) <= 50
    assert set(chosen["freq_mhz"]) == set(CLOCKS)
    assert {1, 18} <= set(chosen["concurrency"])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.drop(columns="power_mw"), "lack the columns.*power_mw"),
        (lambda t: t.assign(power_mw=0.0), "above 0"),
        (lambda t: t.assign(latency_ms=np.nan), "finite"),
        (lambda t: t.head(5), "at least 12"),
        (lambda t: t.assign(freq_mhz=500.0), "4 or more"),
    ],
)
def test_unfit_samples_are_refused(change, expected):
    with pytest.raises(ProfileError, match=expected):
        fit_samples(change(samples()))


@pytest.mark.parametrize("name", ["jetson-xavier-nx", "jetson-nano"])
def test_the_measured_jetsons(data_root, name):
    from suite.studies.fit_boards import read_samples

    table = read_samples(data_root / "boards" / "measured_power_jetson.csv", name)
    judged = cross_validate(table, 50)
    assert judged["fitted_on"].max() <= 50
    assert len(judged) == len(table)
    assert mape(judged, "power_mw") <= 3
    assert mape(judged, "latency_ms") <= 4
    # PowerTrain: 6 % and 15 % from 50 samples.
    draws = [table.sample(50, random_state=draw) for draw in range(12)]
    for chosen in (table, *draws):
        calibration = fit_samples(chosen)
        assert calibration.power_mape_pct < 6
        assert calibration.latency_mape_pct < 15
        assert calibration.undetermined == ()
        f, n = table["freq_mhz"], table["concurrency"]
        found = table.assign(predicted_power_mw=calibration.model.power_mw(f, n),
                             predicted_latency_ms=calibration.model.latency_ms(f, n))  # fmt: skip
        assert mape(found, "power_mw") <= 3
        assert mape(found, "latency_ms") <= 4


MODELLED = [name for name in list_boards() if load_board(name).static_mw is not None]


def grid(board, shares=(0.0, 0.5, 1.0)):
    """Power of a board while one unit works at each clock and load, the others idle."""
    rows = [
        (unit.name, mhz, share * unit.cores,
         board.power_mw({unit.name: mhz}, {unit.name: share * unit.cores}))
        for unit in board.units
        for mhz in unit.freqs
        for share in shares
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["unit", "freq_mhz", "busy", "power_mw"])


def blank(board, volts=False):
    """The board without what a calibration finds."""
    units = []
    for unit in board.units:
        opps = unit.opps if volts else tuple(Opp(mhz, 0.0) for mhz in unit.freqs)
        status = "published" if volts else "estimated"
        units.append(replace(
            unit, c_uw_mhz_v2=None, idle_fraction=0.0, opps=opps, voltage_status=status
        ))  # fmt: skip
    return replace(board, static_mw=None, units=tuple(units))


def relative_error(board, rows):
    predicted = [
        board.power_mw({row.unit: row.freq_mhz}, {row.unit: row.busy}) for row in rows.itertuples()
    ]
    return np.abs(np.array(predicted) / rows["power_mw"] - 1)


@pytest.mark.parametrize("name", MODELLED)
def test_a_board_is_found_again_from_its_own_power(name):
    truth = load_board(name)
    rows = grid(truth)
    found = calibrate(rows, blank(truth, volts=True))
    assert relative_error(found, rows).max() < 1e-6
    assert found.static_mw == pytest.approx(truth.static_mw, abs=20, rel=1e-6)
    for one, other in zip(found.units, truth.units, strict=True):
        assert one.c_uw_mhz_v2 == pytest.approx(other.c_uw_mhz_v2, rel=1e-6)
        assert one.idle_fraction == pytest.approx(other.idle_fraction, abs=1e-6)
    # Voltages that nobody published become a floor and a line, which they are about.
    assert relative_error(calibrate(rows, blank(truth)), rows).mean() < 0.025


def test_a_calibrated_board_is_saved_loaded_and_used(tmp_path):
    """Of half of a grid, with noise; judged on the other half."""
    truth = load_board("jetson-xavier-nx")
    rows = grid(truth)
    seen = rows.iloc[::2]
    rng = np.random.default_rng(0)
    noisy = seen.assign(power_mw=seen["power_mw"] * rng.normal(1, 0.03, len(seen)))
    found = calibrate(noisy, blank(truth))
    again = read_board(save_board(found, tmp_path / "mine.toml"))
    assert again == found
    assert again.notes[-1].startswith("carmel0, carmel1, carmel2, gpu calibrated on 135 samples")
    assert relative_error(again, rows.drop(seen.index)).mean() < 0.02
    assert again.source(["gpu"]) == truth.source(["gpu"])


def test_clients_of_one_network_calibrate_a_gpu():
    """Neither a board nor how busy the GPU was is given: both follow from the samples."""
    board = calibrate(samples())
    assert [unit.name for unit in board.units] == ["gpu"]
    assert board.gpu.freqs == tuple(CLOCKS)
    f, n = samples()["freq_mhz"], samples()["concurrency"]
    busy = TRUTH.busy(f, n)
    predicted = [board.power_mw({"gpu": mhz}, {"gpu": b}) for mhz, b in zip(f, busy, strict=True)]
    assert np.abs(predicted / samples()["power_mw"] - 1).mean() < 0.02
    assert board.gpu.memory_share == pytest.approx(7 / 36)  # 5 + 2 of 36 ms
    assert TRUTH.busy(1000.0, 1) == pytest.approx(16 / 36)


def test_a_board_of_samples_alone_is_saved_loaded_and_managed(tmp_path):
    board = read_board(save_board(calibrate(samples()), tmp_path / "mine.toml"))
    points = runtime_cases.tables(board)
    case = Case(runtime_cases.periodic(accuracy_floor_pct=75.0), board, points)
    run = case.simulate(Manager(board, points), seed=1)
    summary = run.summary()
    assert (summary["accuracy_mean_pct"], summary["deadline_miss_pct"]) == (80.0, 0.0)
    mean_mw = run.energy_mj / case.workload.horizon_s
    assert board.power_mw({}, {}) < mean_mw < board.power_mw({"gpu": 1000}, {"gpu": 1})


def test_of_a_unit_that_others_were_not_measured_with_only_that_one_changes():
    nano = load_board("jetson-nano")
    rows = grid(nano).query("unit == 'gpu'").drop(columns="unit")
    found = calibrate(rows, nano)
    assert found.unit("cpu") == nano.unit("cpu")
    assert found.static_mw == pytest.approx(nano.static_mw)
    with pytest.raises(BoardError, match="cpu: no power model"):
        calibrate(rows, blank(nano))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"power_mw": np.nan}, "finite"),
        ({"power_mw": 0.0}, "above 0"),
        ({"busy": -0.1}, "at least 0"),
        ({"busy": 1.0}, "at 1 loads"),
        ({"busy": [0.0, 2.0] * 6}, "busy = 2"),
        ({"freq_mhz": 2000.0}, "outside 0..1109.25"),
        ({"unit": "npu"}, "no unit 'npu'"),
        ({"power_mw": 1.0}, "below the"),
    ],
)
def test_samples_that_cannot_carry_a_board_are_refused(change, words):
    board = load_board("jetson-orin-nano" if "power_mw" in change else "jetson-xavier-nx")
    rows = pd.DataFrame({"unit": "gpu", "freq_mhz": 306.0, "busy": [0.0, 1.0] * 6,
                         "power_mw": 5000.0})  # fmt: skip
    with pytest.raises((ProfileError, BoardError), match=words):
        calibrate(rows.assign(**change), board)
    with pytest.raises(ProfileError, match="lack the columns"):
        calibrate(rows.drop(columns="freq_mhz"), board)


def latencies(share, clocks=(500.0, 1000.0, 2000.0), fixed=8.0, stalls=0):
    """Answers at three clocks of one network, `share` of whose time at the highest is fixed."""
    rows = [("cpu", mhz, fixed * (share + (1 - share) * clocks[-1] / mhz)) for mhz in clocks] * 3
    rows += [("cpu", mhz, 900.0) for mhz in clocks] * stalls
    return pd.DataFrame(rows, columns=["unit", "freq_mhz", "latency_ms"])


def unpowered():
    board = blank(load_board("jetson-nano"))
    cpu = replace(board.units[0], name="cpu", opps=tuple(Opp(f, 0.0) for f in (500, 1000, 2000)))
    return replace(board, units=(cpu,), modes=())


@given(st.floats(0, 1))
def test_latencies_alone_tell_the_share_that_no_clock_changes(share):
    found = calibrate(latencies(share, stalls=1), unpowered())
    (unit,) = found.units
    assert unit.memory_share == pytest.approx(share, abs=1e-9)
    assert (unit.memory_share_status, found.static_mw, unit.c_uw_mhz_v2) == ("fitted", None, None)
    assert unit.clock_scale(500.0) == pytest.approx(share + (1 - share) * 4)
    assert "memory_share of cpu from 12 latencies" in found.notes[-1]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latency_ms": 0.0}, "above 0"),
        ({"latency_ms": np.nan}, "finite"),
        ({"freq_mhz": 1000.0}, "samples at one clock"),
        ({"unit": "npu"}, "no unit 'npu'"),
    ],
)
def test_latencies_that_tell_nothing_are_refused(change, words):
    with pytest.raises((ProfileError, BoardError), match=words):
        calibrate(latencies(0.5).assign(**change), unpowered())
    with pytest.raises(ProfileError, match="without power_mw lack the columns"):
        calibrate(latencies(0.5).drop(columns="latency_ms"), unpowered())
