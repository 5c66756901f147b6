"""The panel: a pure function of its sliders, and sliders that redraw."""

import sys
from dataclasses import replace

import pandas as pd
import pytest
from runtime_cases import NOISY, NOISY_TABLES

from dynlib.runtime.case import Case
from dynlib.workload import App, Workload
from suite.errors import SuiteError
from suite.studies.panel import Panel, in_words

APPS = (App("a", "net", 100.0, period_ms=100.0, accuracy_floor_pct=75.0),
        App("b", "net", 100.0, period_ms=100.0))  # fmt: skip
PANEL = Panel(Case(Workload("case", 4.0, APPS), NOISY, NOISY_TABLES))


def after(table, what, name):
    """Values of the last second, when the manager has settled."""
    rows = table[(table["what"] == what) & (table["name"] == name) & (table["t_s"] >= 3.0)]
    return set(rows["value"])


def test_react_is_a_pure_function():
    table = PANEL.react(a_deadline_ms=60.0, stretch=1.2)
    pd.testing.assert_frame_equal(table, PANEL.react(a_deadline_ms=60.0, stretch=1.2))
    pd.testing.assert_frame_equal(
        PANEL.react(), PANEL.react(**{name: s.value for name, s in PANEL.sliders.items()})
    )
    assert set(table["what"]) == {
        "latency_ms", "deadline_ms", "accuracy_pct", "clock_mhz", "power_mw", "stretch"
    }  # fmt: skip
    before = table["t_s"] < 2.0
    pd.testing.assert_frame_equal(
        table[before & table["what"].eq("deadline_ms")].reset_index(drop=True),
        PANEL.react().query("t_s < 2 and what == 'deadline_ms'").reset_index(drop=True),
    )


def test_a_tighter_deadline_means_a_smaller_network_and_a_higher_floor_a_larger_one():
    easy, tight = PANEL.react(), PANEL.react(a_deadline_ms=15.0)
    assert after(easy, "accuracy_pct", "a") == {80.0}
    assert after(tight, "deadline_ms", "a") == {15.0}
    assert after(tight, "accuracy_pct", "a") == {70.0}  # below its floor rather than late
    assert max(after(tight, "latency_ms", "a")) < 15.0
    assert after(easy, "accuracy_pct", "b") == {70.0}
    assert after(PANEL.react(b_accuracy_floor_pct=78.0), "accuracy_pct", "b") == {80.0}


def test_a_competitor_raises_the_clock():
    tight = replace(PANEL, case=PANEL.case.under(replace(PANEL.case.workload, apps=APPS[:1])))
    alone, disturbed = tight.react(a_deadline_ms=50.0), tight.react(a_deadline_ms=50.0, stretch=2.0)
    assert max(after(disturbed, "clock_mhz", "gpu")) > max(after(alone, "clock_mhz", "gpu"))


def test_an_unknown_slider_is_named():
    with pytest.raises(SuiteError, match=r"\['c_deadline_ms'\]; there are a_deadline_ms, "):
        PANEL.react(c_deadline_ms=1.0)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(SuiteError, match="pip install ipywidgets"):
        PANEL.widget()


def test_moving_a_slider_draws_the_figure_again():
    pytest.importorskip("ipywidgets", reason="the panel's sliders are not tested: no ipywidgets")
    *sliders, image = PANEL.widget().children
    by_words = {slider.description: slider for slider in sliders}
    assert by_words.keys() == {in_words(name) for name in PANEL.sliders}
    assert all(name not in by_words for name in PANEL.sliders)
    deadline = by_words["a: deadline (ms)"]
    first = bytes(image.value)
    assert first.startswith(b"\x89PNG")
    deadline.value = 30.0
    second = bytes(image.value)
    assert second.startswith(b"\x89PNG")
    assert second != first
    deadline.value = PANEL.sliders["a_deadline_ms"].value
    assert bytes(image.value) == first
