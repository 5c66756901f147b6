"""Move demands by hand and see the manager react, in simulation.

The first half of a run is the workload as it is; in its middle the demands become those of the
sliders, and a competitor comes that nobody announces.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import pandas as pd

from dynlib.manager.manager import Manager
from dynlib.runtime.case import Case
from dynlib.workload import Change, requirement_at
from suite.errors import SuiteError

FIGURE = "manage_two_panel"
_DEMANDS = ("deadline_ms", "period_ms", "accuracy_floor_pct")


class Slider(NamedTuple):
    """What one may be set to, and where it stands."""

    low: float
    high: float
    value: float


def in_words(name: str) -> str:
    """The name of a slider as it is shown, with its unit.

    >>> in_words("camera_deadline_ms"), in_words("stretch")
    ('camera: deadline (ms)', 'competitor: times slower')
    """
    if name == "stretch":
        return "competitor: times slower"
    demand = next(demand for demand in _DEMANDS if name.endswith(demand))
    words = demand.replace("_ms", " (ms)").replace("_pct", " (%)").replace("_", " ")
    return f"{name.removesuffix('_' + demand)}: {words}"


@dataclass(frozen=True)
class Panel:
    """The demands of a case, each with a slider.

    Raises `SuiteError` in `react` for an unknown slider, in `widget` without ipywidgets.
    """

    case: Case
    seed: int = 0

    @property
    def changed_s(self) -> float:
        """When the sliders' values begin to hold."""
        return self.case.workload.horizon_s / 2

    @cached_property
    def sliders(self) -> Mapping[str, Slider]:
        """`<app>_deadline_ms`, `<app>_period_ms` and `<app>_accuracy_floor_pct` of every app; and
        `stretch`, so many times slower a competitor makes the first app's fastest unit."""
        found = {}
        for app in self.case.workload.apps:
            table = self.case.tables[app.model]
            needs = requirement_at(self.case.workload.timeline(app), 1000 * self.changed_s)
            accuracies = [point.accuracy_val_pct for point in table.points.values()]
            fastest_ms = table.smallest.latency_ms[-1]
            for key, value in zip(_DEMANDS, needs, strict=True):
                low, high = (fastest_ms, 2 * max(value, fastest_ms))
                if key == "accuracy_floor_pct":
                    low, high = min(value, *accuracies), max(value, *accuracies)
                found[f"{app.name}_{key}"] = Slider(low, high, value)
        return found | {"stretch": Slider(1.0, 4.0, 1.0)}

    def react(self, **values: float) -> pd.DataFrame:
        """What the manager makes of it, as `timeline` shows it: a pure function of `values`, slider
        -> value; those left out stay where they are. The table of the figure `manage_two_panel`."""
        if unknown := values.keys() - self.sliders.keys():
            raise SuiteError(f"no sliders {sorted(unknown)}; there are {', '.join(self.sliders)}")
        now = {name: slider.value for name, slider in self.sliders.items()} | values
        unit = self.case.tables[self.case.workload.apps[0].model].main_unit
        changes = [
            Change(self.changed_s, app.name, **{key: now[f"{app.name}_{key}"] for key in _DEMANDS})
            for app in self.case.workload.apps
        ]
        changes.append(Change(self.changed_s, unit=unit, stretch=now["stretch"], announced=False))
        before = self.case.workload
        case = self.case.under(replace(before, changes=(*before.changes, *changes)))
        manager = Manager(case.board, case.tables)
        done = case.simulate(manager, self.seed)
        shown = done.timeline()
        shown = shown[(shown["what"] != "clock_mhz") | (shown["name"] == unit)]
        return shown.assign(
            policy=manager.name, changed_s=self.changed_s, source=done.log.header["source"]
        )

    def widget(self):
        """The sliders above the figure, which is drawn again when one of them has moved."""
        ipywidgets = widgets()
        look = {"style": {"description_width": "14em"}, "layout": {"width": "40em"}}
        sliders = {
            name: ipywidgets.FloatSlider(
                value, min=low, max=high, step=(high - low) / 100, description=in_words(name),
                continuous_update=False, readout_format=".2f", **look,
            )
            for name, (low, high, value) in self.sliders.items()
        }  # fmt: skip
        return above_figure(sliders, FIGURE, self.react)


def widgets() -> ModuleType:
    """ipywidgets; raises `SuiteError` where it is not installed."""
    try:
        import ipywidgets
    except ImportError as error:
        raise SuiteError("the sliders need ipywidgets: pip install ipywidgets") from error
    return ipywidgets


def above_figure(sliders: Mapping, figure: str, table: Callable[..., pd.DataFrame]):
    """The sliders above a figure of what `table` makes of their values, passed by name."""
    from suite.record.figures import save

    ipywidgets = widgets()
    image = ipywidgets.Image(format="png")

    def redraw(_=None):
        rows = table(**{name: slider.value for name, slider in sliders.items()})
        with tempfile.TemporaryDirectory() as folder:
            image.value = save(figure, rows, folder, profile="full").path.read_bytes()

    for slider in sliders.values():
        slider.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*sliders.values(), image])
