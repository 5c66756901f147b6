"""Figures of a user's own board."""

import pandas as pd
from matplotlib.figure import Figure

from suite.plots.live import timeline
from suite.plots.style import panels_by
from suite.record.figures import figure

_LOOKS = {
    "answers": {"marker": ".", "ls": "", "color": "0.7", "markersize": 4},
    "median of the answers": {"marker": "o", "ls": "", "color": "C0"},
    "the twin": {"marker": "o", "ls": "", "color": "C0", "markersize": 4},
    "predicted from the other clocks": {"marker": "x", "ls": "", "color": "C3", "markersize": 8},
    "predicted": {"ls": "-", "color": "C3", "lw": 1},
    "all work over the clock": {"ls": "--", "color": "0.4", "lw": 1},
}


@figure("own_board_models")
def own_board_models(table: pd.DataFrame) -> Figure:
    """What a calibration makes of few measurements: of this machine's latency at clocks that were
    left out, and of the GPU power of a virtual board at clocks and loads that were not measured."""
    drawn, found = panels_by(table, "panel", squeeze=False)
    for title, (axes, rows) in found.items():
        for (series, line), mine in rows.groupby(["series", "line"], sort=False):
            mine = mine.sort_values("freq_mhz")
            label = series if line == rows[rows["series"] == series]["line"].iloc[0] else None
            axes.plot(mine["freq_mhz"], mine["value"], label=label, **_LOOKS[series])
        axes.set(title=title, xlabel="clock (MHz)", ylabel=rows["label"].iloc[0])
        axes.set_ylim(bottom=0)
        axes.margins(x=0.05)
        axes.legend()
    return drawn


@figure("own_board_managed")
def own_board_managed(table: pd.DataFrame) -> Figure:
    """One column per policy: latency with its deadline, the network that answered, and the share of
    the full clock that is allowed, over time."""
    drawn, axes, found = timeline(table, (2, 1.2, 0.8), 3.0, (5, 4))
    for policy, ((top, _, clock), mine) in found.items():
        clock.step(mine["arrival_s"], mine["allowed_pct"], where="post", color="0.3", lw=1)
        clock.fill_between(mine["arrival_s"], mine["allowed_pct"], step="post", color="0.9", lw=0)
        clock.margins(x=0)
        top.set_title(f"{policy}: {100 * mine['on_time'].mean():.0f} % of the frames in time")
    axes[2, 0].set(ylabel="clock\nallowed (%)", ylim=(0, 105))
    return drawn
