"""The dials: a pure function of their values, and dials that redraw."""

import pandas as pd
import pytest

from dynlib.space import SearchSpace
from suite.errors import SuiteError
from suite.studies.dials import Dials, in_words

SPACE = SearchSpace((16, 32), ((1,), (1, 2)), ((8, 16), (8,)))
# More work is slower and more accurate, but for one network that is slow for nothing.
ROWS = [(str(config), 60.0 + 2 * place, 1.0 + place, 5.0 + place)
        for place, config in enumerate(SPACE)]  # fmt: skip
TABLE = pd.DataFrame(ROWS, columns=["subnet", "accuracy_val_pct", "latency_ms", "energy_mj"])
TABLE["source"] = "estimated"
BAD = str(SPACE.decode([1, 0, 0, 1, 0]))
TABLE.loc[TABLE["subnet"] == BAD, "accuracy_val_pct"] = 50.0
TABLE = TABLE.sample(frac=1, random_state=0, ignore_index=True)  # in no order
DIALS = Dials(SPACE, TABLE)


def named(table, role):
    return sorted(set(table.loc[table["role"] == role, "subnet"]))


def test_only_axes_with_a_choice_have_a_dial():
    assert DIALS.choices == {"resolution": (16, 32), "depth1": (1, 2), "width0": (8, 16)}
    assert in_words("depth1") == "depth of stage 2"


def test_what_is_not_turned_is_at_its_largest():
    assert DIALS.subnet() == str(SPACE.largest)
    assert DIALS.subnet(resolution=16, depth1=1, width0=8) == str(SPACE.smallest)


def test_a_network_on_the_front_has_nothing_better_and_a_bad_one_has():
    best = DIALS.show()
    assert named(best, "picked") == [str(SPACE.largest)]
    assert named(best, "better") == []
    bad = DIALS.show(resolution=32, depth1=1, width0=16)
    assert named(bad, "picked") == [BAD]
    (better,) = named(bad, "better")
    rows = TABLE.set_index("subnet")
    assert rows.loc[better, "latency_ms"] <= rows.loc[BAD, "latency_ms"]
    cheaper = rows[rows["latency_ms"] <= rows.loc[BAD, "latency_ms"]]
    assert rows.loc[better, "accuracy_val_pct"] == cheaper["accuracy_val_pct"].max()
    assert set(named(bad, "front")) == set(TABLE["subnet"]) - {BAD, better}
    assert len(bad) == 2 * SPACE.size  # latency and energy


@pytest.mark.parametrize("values", [{"resolution": 24}, {"width1": 8}, {"size": 1}])
def test_a_dial_or_value_that_is_not_there_is_named(values):
    (name,) = values
    with pytest.raises(SuiteError, match=f"dial {name}: {values[name]} is none of "):
        DIALS.show(**values)


def test_turning_a_dial_draws_the_figure_again():
    pytest.importorskip("ipywidgets", reason="the dials are not tested: no ipywidgets")
    *dials, image = DIALS.widget().children
    first = bytes(image.value)
    assert first.startswith(b"\x89PNG")
    dials[0].value = 16
    second = bytes(image.value)
    assert second != first
    dials[0].value = 32
    assert bytes(image.value) == first


def test_costs_are_called_what_one_says():
    said = {"latency_ms": "latency of 4 images (ms)", "energy_mj": "energy of 4 images (mJ)"}
    assert set(Dials(SPACE, TABLE, said).show()["cost"]) == set(said.values())
