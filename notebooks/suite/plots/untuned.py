"""Figures of workloads that nobody tuned the manager for."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from suite.plots.style import plain_log
from suite.record.figures import figure

_NAMES = {"manager": "manager", "just in time": "just in time", "linux": "Linux default"}


def _misses_and_energy(table: pd.DataFrame, rows: str) -> Figure:
    """Misses and energy over the Linux default's of every policy, a line per workload."""
    drawn, axes = plt.subplots(1, 2, sharey=True, figsize=(9.6, 0.36 * table[rows].nunique() + 1.4))
    table = table.replace({"policy": _NAMES})
    for panel, column, label in (
        (axes[0], "miss_pct", "missed frames (%)"),
        (axes[1], "energy_over_linux", "board energy per on-time frame / Linux default's"),
    ):
        sns.stripplot(table, y=rows, x=column, hue="policy", hue_order=[*_NAMES.values()],
                      jitter=False, dodge=True, size=6, ax=panel)  # fmt: skip
        panel.set(xlabel=label, ylabel="")
        panel.grid(axis="y", color="0.9", lw=0.6)
        handles, labels = panel.get_legend_handles_labels()
        panel.get_legend().remove()
    axes[1].axvline(1, color="0.3", lw=0.8)
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn


@figure("manage_one_untuned")
def manage_one_untuned(table: pd.DataFrame) -> Figure:
    """Misses and energy where tables, periods or neighbours are not what was said."""
    drawn = _misses_and_energy(table, "case")
    drawn.axes[0].axvline(1, color="C3", lw=0.8, ls="--")
    return drawn


@figure("manage_two_life")
def manage_two_life(table: pd.DataFrame) -> Figure:
    """Misses (logarithmic above 1 %) and energy on the workloads from life."""
    drawn = _misses_and_energy(table.replace({"workload": {"_": " "}}, regex=True), "workload")
    drawn.axes[0].set_xscale("symlog", linthresh=1)
    drawn.axes[0].set_xlim(left=-0.1)
    drawn.axes[0].set_xticks([0, 1, 2, 5, 10, 20], [0, 1, 2, 5, 10, 20])
    return drawn


@figure("manage_one_same_frames")
def manage_one_same_frames(table: pd.DataFrame) -> Figure:
    """Board energy over the optimum's for the same frames, by board and scenario."""
    drawn, axes = plt.subplots(figsize=(9.6, 3.4))
    sns.stripplot(table, x="scenario", y="energy_over_same_frames", hue="board", jitter=False,
                  dodge=True, size=5, ax=axes)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(0.99, None)
    plain_log(axes.yaxis)
    low, high = axes.get_ylim()
    ticks = [t for t in (1, 1.05, 1.1, 1.25, 1.5, 2, 2.5, 3) if low <= t <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.axhline(1, color="0.3", lw=0.8)
    axes.set(xlabel="", ylabel="board energy / optimum's\nfor the same frames")
    over_pct = 100 * (table["energy_over_same_frames"] - 1)
    near_pct = 100 * (over_pct <= 5).mean()
    drawn.suptitle(
        f"within 5 % of the optimum in {near_pct:.0f} % of the cases, "
        f"{over_pct.max():.0f} % above it in the worst",
        fontsize="medium",
    )
    sns.move_legend(axes, "upper center", bbox_to_anchor=(0.45, 1.15), ncols=5, title=None)
    return drawn


@figure("manage_two_random")
def manage_two_random(table: pd.DataFrame) -> Figure:
    """Every random workload by what the manager takes and misses over `JustInTime`; the box is
    where it counts as no worse."""
    drawn, axes = plt.subplots(figsize=(7.2, 4.2))
    energy_pct, points = table["much_energy_pct"].iloc[0], table["much_missed"].iloc[0]
    low_x, low_y = table["energy_pct"].min() - 2, table["miss_points"].min() - 2
    box = Rectangle((low_x, low_y), energy_pct - low_x, points - low_y, color="0.94", zorder=0)
    axes.add_patch(box)
    for worse, colour, label in ((False, "C0", "no worse"), (True, "C3", "worse")):
        rows = table[table["is_worse"].astype(bool) == worse]
        axes.scatter(rows["energy_pct"], rows["miss_points"], s=16, color=colour, alpha=0.7,
                     label=f"{label} ({len(rows)})", lw=0)  # fmt: skip
    axes.axhline(0, color="0.6", lw=0.6)
    axes.axvline(0, color="0.6", lw=0.6)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xscale("symlog", linthresh=1)
    for axis, least in ((axes.xaxis, low_x), (axes.yaxis, low_y)):
        ticks = [t for t in (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10) if t >= least]
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(plt.NullLocator())
    axes.set_xlim(low_x, max(energy_pct, table["energy_pct"].max()) * 1.3)
    axes.set_ylim(low_y, max(points, table["miss_points"].max()) * 1.3)
    axes.set(xlabel="energy per on-time frame over that of the simple rule (%)",
             ylabel="missed frames more than it (points)")  # fmt: skip
    axes.legend(loc="upper left")
    return drawn
