"""Figures of the manager: how it decides, how far from the optimum it is, what each knob brings."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dynlib.report.figures import figure
from dynlib.report.plots.style import WIDE


@figure("manage_one_levels")
def manage_one_levels(table: pd.DataFrame) -> Figure:
    """Left, the choice of the upper level among all networks and clocks; right, what the lower
    level makes of it frame by frame."""
    drawn, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), width_ratios=(1, 1.3))
    upper = table[table["panel"] == "upper"]
    groups = (("misses deadline or floor", "0.8", 12), ("feasible", "C0", 16), ("chosen", "C3", 90))
    for kind, colour, size in groups:
        rows = upper[upper["kind"] == kind]
        marker = "*" if kind == "chosen" else "o"
        axes[0].scatter(rows["x"], rows["y"], s=size, color=colour, marker=marker, label=kind)
    axes[0].axvline(1, color="0.3", lw=0.8, ls="--")
    axes[0].set(xlabel="planned time / deadline", ylabel="mean power above idle (mW)",
                title="upper level: network and clock", xlim=(0, 2))  # fmt: skip
    axes[0].legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
    lower = table[table["panel"] == "lower"]
    clock = lower[lower["kind"] == "clock"]
    axes[1].step(clock["x"], clock["y"], where="post", color="C0", lw=1.2, label="clock")
    for _, row in lower[lower["kind"] == "frame"].iterrows():
        axes[1].axvspan(row["x"], row["y"], color="C2", alpha=0.2, lw=0)
    for x in lower.loc[lower["kind"] == "deadline", "x"]:
        axes[1].axvline(x, color="C3", lw=0.8, ls=":")
    axes[1].plot([], [], color="C2", alpha=0.3, lw=6, label="a frame runs")
    axes[1].plot([], [], color="C3", ls=":", label="its deadline")
    axes[1].set(xlabel="time (s)", ylabel="clock (MHz)", title="lower level: frame by frame")
    axes[1].margins(x=0)
    axes[1].set_ylim(0, 1.25 * clock["y"].max())
    axes[1].legend(loc="upper center", ncols=3, frameon=True, framealpha=1, edgecolor="none")
    return drawn


@figure("manage_one_optimum")
@figure("manage_two_optimum")
def manage_optimum(table: pd.DataFrame) -> Figure:
    """Energy over that of the clairvoyant optimum, whole board and above idle."""
    drawn, axes = plt.subplots(1, 2, figsize=WIDE)
    table = table.assign(board=table["board"] + "\n" + table["points"] + " points")
    for panel, (column, label, bar) in zip(axes, (
        ("energy_over_oracle", "board energy", 1.05),
        ("above_idle_over_oracle", "energy above idle", 1.15),
    ), strict=True):  # fmt: skip
        sns.stripplot(table, x="scenario", y=column, hue="board", dodge=True, size=4, ax=panel)
        panel.axhline(1, color="0.3", lw=0.8)
        panel.axhline(bar, color="C3", lw=0.8, ls="--")
        panel.set(xlabel="", ylabel=f"{label} / optimum's")
        handles, labels = panel.get_legend_handles_labels()
        panel.get_legend().remove()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn


@figure("manage_one_knobs")
@figure("manage_two_knobs")
def manage_knobs(table: pd.DataFrame) -> Figure:
    """Energy per on-time frame of every rival over that of the Linux default."""
    table = table.replace({"policy": {"linux": "Linux default"}})
    order = list(dict.fromkeys(table["policy"]))
    drawn, axes = plt.subplots(figsize=(7.2, 0.32 * len(order) + 1.2))
    sns.barplot(table, y="policy", x="energy_over_linux", hue="scenario", order=order,
                errorbar=None, ax=axes)  # fmt: skip
    axes.axvline(1, color="0.3", lw=0.8)
    axes.set(ylabel="", xlabel="board energy per on-time frame / Linux default's")
    sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), title=None)
    for patch, missed in zip(axes.containers, table.groupby("scenario", sort=False), strict=False):
        by_policy = missed[1].set_index("policy")["deadline_miss_pct"].groupby(level=0).mean()
        labels = [f" {by_policy.get(p, 0):.0f} % missed" if by_policy.get(p, 0) > 1 else ""
                  for p in order]  # fmt: skip
        axes.bar_label(patch, labels=labels, fontsize="x-small", color="C3")
    return drawn
