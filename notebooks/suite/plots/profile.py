"""Figures of what the sub-networks cost: on this machine and on a board."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.plots.style import panels_by, plain_log
from suite.record.figures import figure


@figure("profile_host")
def profile_host(table: pd.DataFrame) -> Figure:
    """Measured latency over work on this machine: median, and up to the 95th percentile."""
    drawn, axes = plt.subplots()
    for i, (threads, rows) in enumerate(table.groupby("threads")):
        rows = rows.sort_values("macs_m")
        gap = rows["latency_p95_ms"] - rows["latency_ms"]
        axes.errorbar(
            rows["macs_m"], rows["latency_ms"], [np.zeros(len(rows)), gap], fmt="o-", capsize=3,
            color=f"C{i}", markersize=4, label=f"{threads:.0f} thread{'s' * (threads > 1)}",
        )  # fmt: skip
    axes.set(xlabel="work (MMACs)", ylabel="latency, batch 1 (ms); whisker to p95", ylim=(0, None))
    axes.legend()
    return drawn


@figure("profile_board")
def profile_board(table: pd.DataFrame) -> Figure:
    """Energy over latency of every clock, one line per sub-network, one panel per unit."""
    work = table.sort_values("macs_m", kind="stable")["macs_m"].map("{:.1f}".format)
    drawn, by_unit = panels_by(table.assign(MMACs=work).loc[work.index], "unit")
    last = drawn.axes[-1]
    for unit, (panel, rows) in by_unit.items():
        sns.lineplot(
            rows, x="latency_ms", y="energy_mj", hue="MMACs", palette="viridis", sort=False,
            marker="o", markersize=4, ax=panel, legend="full" if panel is last else False,
        )  # fmt: skip
        batch = rows["batch"].iloc[0]
        panel.set(
            xlabel=f"latency of a batch of {batch:.0f} (ms)", xscale="log",
            ylabel="board energy of a batch (mJ)", yscale="log", title=f"{unit}, all clocks",
        )  # fmt: skip
        plain_log(panel.xaxis)
        plain_log(panel.yaxis)
    sns.move_legend(last, "center left", bbox_to_anchor=(1, 0.5))
    return drawn
