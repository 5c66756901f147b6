"""Comparing with published points: the interpolation, the claims, the error bar."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import TableError
from dynlib.files import repo_root
from suite.papers.published import (
    OURS,
    RIVAL,
    SLACK,
    LinearFit,
    against_rival,
    interpolate,
    over_control,
    predicted_against_rival,
    read_published,
)

POINTS = pd.DataFrame({"latency_ms": [10.0, 20.0, 40.0], "accuracy_pct": [50.0, 60.0, 70.0]})


def shipped():
    return read_published(repo_root() / "data" / "jetson_xavier_nx" / "published_points.csv")


def test_interpolation_is_linear_between_neighbours_and_exact_on_points():
    for x, y in POINTS.to_numpy():
        assert interpolate(POINTS, "latency_ms", "accuracy_pct", x) == y
        assert interpolate(POINTS, "accuracy_pct", "latency_ms", y) == x
    assert interpolate(POINTS, "latency_ms", "accuracy_pct", 25) == pytest.approx(62.5)
    assert interpolate(POINTS.iloc[::-1], "accuracy_pct", "latency_ms", 65) == pytest.approx(30)


@given(st.floats(10, 40), st.floats(10, 40))
def test_interpolation_rises_with_the_front(one, two):
    low, high = (interpolate(POINTS, "latency_ms", "accuracy_pct", x) for x in sorted((one, two)))
    assert low <= high


def test_levels_are_not_interpolated_and_may_be_a_little_slower():
    def level(at, slack=SLACK):
        return interpolate(POINTS, "latency_ms", "accuracy_pct", at, slack=slack)

    assert level(39) == 70  # 40 is 2.6 % slower
    assert level(38) == 60
    assert level(39, slack=0.0) == 60
    with pytest.raises(TableError, match="no point with latency_ms <= 5"):
        level(5)


@pytest.mark.parametrize("at", [9.9, 40.1])
def test_nothing_is_extrapolated(at):
    with pytest.raises(TableError, match="outside of the points, 10 to 40"):
        interpolate(POINTS, "latency_ms", "accuracy_pct", at)


@pytest.mark.parametrize(("unit", "speedup", "gain"), [("gpu", 2.40, 5.15), ("cpu", 3.47, 3.79)])
def test_the_published_headlines_follow_from_the_published_points(unit, speedup, gain):
    points = shipped().query("unit == @unit")
    series = points.groupby("series")
    claim = against_rival(series.get_group(OURS), series.get_group(RIVAL), slack=SLACK)
    assert claim["speedup"] == pytest.approx(speedup, abs=0.02)
    assert claim["accuracy_gain_pp"] == pytest.approx(gain, abs=0.05)


def test_a_fit_through_a_line_has_no_residuals_and_needs_pairs():
    x = np.array([1.0, 2, 4, 5, 7])
    fit = LinearFit(x, 3 * x + 2)
    np.testing.assert_allclose(fit(x), 3 * x + 2)
    np.testing.assert_allclose(fit.residuals, 0, atol=1e-9)
    off = LinearFit(x, 3 * x + 2 + np.array([0, 0, 1.0, 0, 0]))
    assert off.residuals[2] == pytest.approx(1)  # what the other four, on the line, miss it by
    with pytest.raises(TableError, match="at least 4 pairs"):
        LinearFit(x[:3], x[:3])


def test_a_predicted_front_is_compared_with_its_error_bar():
    rival = pd.DataFrame({"latency_ms": [100.5, 160.0], "accuracy_pct": [60.0, 70.0],
                          "claim": ["accuracy", "speedup"]})  # fmt: skip
    sums, predicted = np.linspace(10, 60, 51), np.linspace(50, 100, 51)
    x = np.array([10.0, 20, 30, 40, 60])
    wobble = np.array([1.0, -1, 0.5, -1, 1])
    exact = predicted_against_rival(sums, predicted, rival, LinearFit(x, 2 * x), LinearFit(x, x))
    for key, want in (("speedup", 160 / 60), ("accuracy_gain_pp", 30)):  # 70 % at 2 * 30 ms
        assert exact[key] == pytest.approx((want,) * 3)
    loose = predicted_against_rival(
        sums, predicted, rival, LinearFit(x, 2 * x + wobble), LinearFit(x, x + wobble)
    )
    for value, low, high in loose.values():
        assert low < value < high


def test_a_front_is_nothing_over_itself_and_a_better_one_is_more():
    rival = pd.DataFrame({"latency_ms": [160.0, 60], "accuracy_pct": [80.0, 50],
                          "claim": ["speedup", "accuracy"]})  # fmt: skip
    front = pd.DataFrame({"latency_ms": np.linspace(10, 60, 51),
                          "accuracy_pct": np.linspace(50, 100, 51)})  # fmt: skip
    x = np.array([10.0, 20, 30, 40, 60])
    wobble = np.array([1.0, -1, 0.5, -1, 1])
    lines = LinearFit(x, 2 * x + wobble), LinearFit(x, x + wobble)
    for ends in over_control(front, front, rival, *lines).values():
        assert ends == (0, 0, 0)
    better = front.assign(accuracy_pct=front["accuracy_pct"] + 2)
    for value, low, high in over_control(better, front, rival, *lines).values():
        assert 0 < low <= value <= high


def test_malformed_points_are_named(tmp_path):
    table = shipped()
    path = tmp_path / "points.csv"
    table.drop(columns="claim").to_csv(path, index=False)
    with pytest.raises(TableError, match="claim"):
        read_published(path)
    table.assign(latency_ms=[-1.0, *table["latency_ms"][1:]]).to_csv(path, index=False)
    with pytest.raises(TableError, match="row 1: expected a latency above 0"):
        read_published(path)
    with pytest.raises(TableError, match="cannot read"):
        read_published(tmp_path / "none.csv")
