"""The manager without one of its mechanisms."""

import inspect

import pandas as pd
import pytest

from suite.studies import mechanisms
from suite.studies.mechanisms import MECHANISMS, most_of_each, what_each_brings, without


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_is_taken_out_comes_back(name):
    change = MECHANISMS[name]
    if change is None:
        return
    where, attribute, instead = change
    before = inspect.getattr_static(where, attribute)
    with without(name):
        assert inspect.getattr_static(where, attribute) is instead
        assert instead is not before
    assert inspect.getattr_static(where, attribute) is before


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name != "all there"])
def test_the_manager_runs_without_any_one_of_them(name, monkeypatch):
    monkeypatch.setattr(mechanisms, "GROUPS", {"competitors": mechanisms.GROUPS["competitors"][:1]})
    (row,) = mechanisms.take_out("jetson-nano", name, [400])
    assert row["energy_per_frame_mj"] > 0
    assert 0 <= row["miss_pct"] < 30


def test_a_competitor_that_keeps_coming_needs_its_margins(monkeypatch):
    monkeypatch.setattr(mechanisms, "GROUPS", {"competitors": mechanisms.GROUPS["competitors"][:1]})
    runs = [
        row
        for name in ("all there", "margin for the shock under way")
        for row in mechanisms.take_out("jetson-nano", name, [400])
    ]
    (brought,) = what_each_brings(pd.DataFrame(runs)).to_dict("records")
    assert brought["miss_points"] > mechanisms.PAYS_POINTS


def test_a_mechanism_pays_where_it_is_needed_most():
    row = {"board": "b", "network_switches": 0, "energy_per_frame_mj": 10.0, "miss_pct": 1.0}
    runs = [
        row | {"without": "all there", "group": "x"},
        row | {"without": "all there", "group": "y"},
        row | {"without": "one", "group": "x", "energy_per_frame_mj": 10.2, "network_switches": 3},
        row | {"without": "one", "group": "y", "miss_pct": 1.05},
        row | {"without": "two", "group": "x", "energy_per_frame_mj": 9.0},
        row | {"without": "two", "group": "y", "miss_pct": 1.05},
    ]
    most = most_of_each(what_each_brings(pd.DataFrame(runs))).set_index("without")
    assert most["pays"].to_dict() == {"one": True, "two": False}
    assert most.loc["one", "where_energy"] == "x"
    assert most.loc["one", "where_missed"] == "y"
    assert most.loc["one", "energy_pct"] == pytest.approx(2.0)
    assert most["switches"].to_dict() == {"one": 3, "two": 0}
