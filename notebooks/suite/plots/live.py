"""Figures of the live runs: frame by frame, and policy by policy."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from suite.plots.style import panels
from suite.record.figures import figure


@figure("live_timeline")
def live_timeline(table: pd.DataFrame) -> Figure:
    """One column per policy; latency with its deadline, sub-network and load over time."""
    policies = list(dict.fromkeys(table["policy"]))
    drawn, axes = plt.subplots(
        3, len(policies), figsize=(9.6, 5.2), sharex=True, sharey="row", squeeze=False,
        height_ratios=(2, 1.3, 0.8),
    )  # fmt: skip
    high_ms = 2.5 * table["deadline_ms"].max()
    for column, policy in zip(axes.T, policies, strict=True):
        mine = table[table["policy"] == policy]
        t_s, late = mine["arrival_s"], ~mine["on_time"].astype(bool)
        shown_ms = mine["latency_ms"].fillna(high_ms).clip(upper=high_ms)
        for rows, colour, label in ((~late, "C0", "in time"), (late, "C3", "late or dropped")):
            column[0].plot(t_s[rows], shown_ms[rows], ".", ms=3, color=colour, label=label)
        column[0].step(t_s, mine["deadline_ms"], color="0.3", lw=0.8, label="deadline")
        column[1].plot(t_s, mine["network"], ".", ms=3, color="C2")
        column[2].fill_between(t_s, mine["workers"], step="post", color="0.8", lw=0)
        column[0].set_title(f"{policy}: {100 * late.mean():.1f} % missed")
        column[2].set_xlabel("time (s)")
        column[2].margins(x=0)
    axes[0, 0].set(ylabel="latency (ms)", ylim=(0, 1.05 * high_ms))
    axes[1, 0].set(
        ylabel="sub-network\n(largest on top)", ylim=(0.5, table["networks"].max() + 0.5)
    )
    axes[1, 0].set_yticks(range(1, int(table["networks"].max()) + 1))
    axes[2, 0].set(ylabel="processes\nof the load", ylim=(0, None))
    axes[2, 0].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3, markerscale=3)
    return drawn


@figure("live_networks")
def live_networks(table: pd.DataFrame) -> Figure:
    """Accuracy over misses, of the manager and of every fixed network."""
    drawn, axes = panels(2, sharex=True)
    managed = table["policy"] == "manager"
    for panel, (column, label) in zip(axes, (
        ("accuracy_pct", "right, of all answers (%)"),
        ("right_in_time_pct", "right and in time, of all images (%)"),
    ), strict=True):  # fmt: skip
        fixed = table[~managed]
        panel.plot(fixed["miss_pct"], fixed[column], "o-", lw=0.8, label="fixed network")
        panel.plot(table.loc[managed, "miss_pct"], table.loc[managed, column], "*", ms=12,
                   color="C3", label="manager")  # fmt: skip
        for i, row in enumerate(fixed.to_dict("records")):
            down = {"va": "top", "xytext": (4, -4)} if i % 2 else {"va": "bottom", "xytext": (4, 4)}
            panel.annotate(row["policy"].replace("fixed_", "number "),
                           (row["miss_pct"], row[column]), **down,
                           textcoords="offset points", fontsize="small")  # fmt: skip
        panel.axvline(2, color="0.3", lw=0.8, ls="--", label="2 % missed")
        panel.margins(0.12)
        panel.set(xlabel="missed frames (%)", ylabel=label)
    axes[0].legend(loc="lower right")
    return drawn
