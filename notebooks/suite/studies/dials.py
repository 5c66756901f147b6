"""Turn the choices of a search space by hand and see what the sub-network is and costs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dynlib.pareto import pareto_mask
from dynlib.space import SearchSpace
from suite.errors import SuiteError
from suite.studies.panel import above_figure, widgets

FIGURE = "search_dials"
COSTS = {"latency_ms": "latency (ms)", "energy_mj": "energy (mJ)"}


def in_words(axis: str) -> str:
    """The name of a dial as it is shown.

    >>> in_words("width1"), in_words("resolution")
    ('width of stage 2', 'resolution (pixels)')
    """
    dimension, place = re.fullmatch(r"([a-z]+)(\d*)", axis).groups()
    return f"{dimension} of stage {int(place) + 1}" if place else f"{dimension} (pixels)"


@dataclass(frozen=True)
class Dials:
    """A dial for every axis of `space` on which there is a choice.

    `table` has a row per sub-network of the space: ``subnet, accuracy_val_pct, latency_ms,
    energy_mj, source``. `costs` says in words what these two are, such as of how many images.
    Raises `SuiteError` in `show` for a dial or a value that is not there.
    """

    space: SearchSpace
    table: pd.DataFrame
    costs: Mapping[str, str] = field(default_factory=lambda: COSTS)

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        """What each dial can be turned to."""
        return {axis: values for axis, values in self.space.axes() if len(values) > 1}

    def subnet(self, **values: int) -> str:
        """The sub-network at these values; dials left out are at their largest."""
        known = self.choices
        for name, value in values.items():
            if value not in known.get(name, ()):
                raise SuiteError(f"dial {name}: {value} is none of {known.get(name, list(known))}")
        genes = [
            choices.index(values[axis]) if axis in values else len(choices) - 1
            for axis, choices in self.space.axes()
        ]
        return str(self.space.decode(genes))

    def show(self, **values: int) -> pd.DataFrame:
        """The table of the figure `search_dials`: a row per sub-network and cost.

        ``subnet, cost, value, accuracy_val_pct, role, source``, where `role` is ``picked`` for the
        sub-network at `values`, ``better`` for the most accurate that costs no more, if that is
        another, ``front``, or ``space``.
        """
        picked = self.subnet(**values)
        parts = []
        for cost, words in self.costs.items():
            rows = self.table[["subnet", "accuracy_val_pct", "source"]].assign(
                cost=words, value=self.table[cost], role="space"
            )
            unbeaten = pareto_mask(np.stack([rows["value"], -rows["accuracy_val_pct"]], axis=1))
            rows.loc[unbeaten, "role"] = "front"
            mine = rows["subnet"] == picked
            affordable = rows[rows["value"] <= rows.loc[mine, "value"].iloc[0]]
            rows.loc[affordable["accuracy_val_pct"].idxmax(), "role"] = "better"
            rows.loc[mine, "role"] = "picked"
            parts.append(rows)
        return pd.concat(parts, ignore_index=True)

    def widget(self):
        """The dials above the figure, which is drawn again when one of them is turned."""
        look = {"style": {"description_width": "12em"}, "layout": {"width": "34em"}}
        dials = {
            axis: widgets().SelectionSlider(
                options=values, value=values[-1], description=in_words(axis),
                continuous_update=False, **look,
            )
            for axis, values in self.choices.items()
        }  # fmt: skip
        return above_figure(dials, FIGURE, self.show)
