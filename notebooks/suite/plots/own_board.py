"""Figures of a user's own board."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

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
    policies = list(dict.fromkeys(table["policy"]))
    drawn, axes = plt.subplots(
        3, len(policies), figsize=(9.6, 5.2), sharex=True, sharey="row", squeeze=False,
        height_ratios=(2, 1.2, 0.8),
    )  # fmt: skip
    high_ms = 3 * table["deadline_ms"].max()
    networks = int(table["networks"].max())
    for column, policy in zip(axes.T, policies, strict=True):
        mine = table[table["policy"] == policy]
        t_s, late = mine["arrival_s"], ~mine["on_time"].astype(bool)
        shown_ms = mine["latency_ms"].fillna(high_ms).clip(upper=high_ms)
        for rows, colour, label in ((~late, "C0", "in time"), (late, "C3", "late or dropped")):
            column[0].plot(t_s[rows], shown_ms[rows], ".", ms=5, color=colour, label=label)
        column[0].step(t_s, mine["deadline_ms"], color="0.3", lw=0.8, label="deadline")
        column[1].plot(t_s, mine["network"], ".", ms=4, color="C2")
        column[2].step(t_s, mine["allowed_pct"], where="post", color="0.3", lw=1)
        column[2].fill_between(t_s, mine["allowed_pct"], step="post", color="0.9", lw=0)
        column[0].set_title(f"{policy}: {100 * (~late).mean():.0f} % of the frames in time")
        column[2].set_xlabel("time (s)")
        column[2].margins(x=0)
    axes[0, 0].set(ylabel="latency (ms)", ylim=(0, 1.05 * high_ms))
    axes[1, 0].set(ylabel="network\n(largest on top)", ylim=(0.5, networks + 0.5))
    axes[1, 0].set_yticks(range(1, networks + 1))
    axes[2, 0].set(ylabel="clock\nallowed (%)", ylim=(0, 105))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3, markerscale=2)
    return drawn
