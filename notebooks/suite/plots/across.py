"""Figures of training across machines: how long a step takes, and what compression costs."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from suite.plots.style import panels, panels_by, plain_log
from suite.record.figures import figure


@figure("across_links")
def across_links(table: pd.DataFrame) -> Figure:
    """Time of a step for each cut and compression, measured and by the formula."""
    drawn, by_rate = panels_by(table, "rate_mbit", figsize=(9.6, 4.0), sharey=True)
    slowest_last = table.groupby("case")["formula_s"].max().sort_values()
    names = list(slowest_last.index)
    for rate, (panel, mine) in by_rate.items():
        for place, (schedule, rows) in enumerate(mine.groupby("schedule")):
            at = np.array([names.index(name) for name in rows["case"]]) + 0.3 * place - 0.15
            panel.plot(rows["step_s"], at, "o", ms=6, label=f"{schedule}, measured")
            panel.plot(rows["formula_s"], at, "|", color="black", ms=8, mew=2,
                       label="formula" if place else None)  # fmt: skip
        panel.set(xscale="log", title=f"{rate:g} Mbit/s", xlabel="time of a step (s)")
        plain_log(panel.xaxis)
        panel.grid(axis="y", color="0.9")
    drawn.axes[0].set_yticks(range(len(names)), names)
    handles = panel.get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=3)
    return drawn


@figure("across_learning")
def across_learning(table: pd.DataFrame) -> Figure:
    """Loss against dense, and accuracy without compression, over the bytes that are left."""
    drawn, (left, right) = panels(2, figsize=(9.6, 4.0))
    dense = table[table["method"] == "dense"]
    for method, rows in table[table["method"] != "dense"].groupby("method", sort=False):
        mean = rows.groupby("share")[["gap_pct", "accuracy_test_pct"]].mean()
        for panel, column in ((left, "gap_pct"), (right, "accuracy_test_pct")):
            (line,) = panel.plot(100 * mean.index, mean[column], "o-", label=method)
            panel.plot(100 * rows["share"], rows[column], ".", color=line.get_color(), alpha=0.4)
    left.axhspan(left.get_ylim()[0], 2, color="0.93", zorder=0)
    left.axhline(0, color="black", lw=0.8)
    left.set(ylabel="final training loss over dense (%)")
    right.axhline(dense["accuracy_test_pct"].mean(), color="black", lw=0.8, label="dense")
    right.set(ylabel="test accuracy without compression (%)")
    for panel in (left, right):
        panel.set(xlabel="bytes over the slowest link (% of dense)", xscale="log")
        plain_log(panel.xaxis)
    right.legend(loc="lower right")
    return drawn
