"""Figures of the board models: what they predict beside what was measured or published."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from suite.plots.style import WIDE, panels
from suite.record.figures import figure

_MARKS = [Line2D([], [], color="0.3", marker="o", ls="", ms=4, label="measured"),
          Line2D([], [], color="0.3", label="predicted, left out")]  # fmt: skip


@figure("profile_models")
def profile_models(table: pd.DataFrame) -> Figure:
    """Board power over the clock, and latency over concurrency; each prediction saw neither."""
    drawn, axes = panels(2)
    for i, (board, rows) in enumerate(table.groupby("board")):
        top_n, top_mhz = rows["concurrency"].max(), rows["freq_mhz"].max()
        for panel, chosen, x, y, scale in (
            (axes[0], rows[rows["concurrency"] == top_n], "freq_mhz", "power_mw", 1e3),
            (axes[1], rows[rows["freq_mhz"] == top_mhz], "concurrency", "latency_ms", 1),
        ):
            chosen = chosen.sort_values(x)
            fixed = f"{top_n:g} clients" if x == "freq_mhz" else f"{top_mhz:g} MHz"
            panel.plot(chosen[x], chosen[y] / scale, "o", color=f"C{i}", markersize=4)
            panel.plot(chosen[x], chosen[f"predicted_{y}"] / scale, color=f"C{i}",
                       label=f"{board}, {fixed}")  # fmt: skip
    axes[0].set(xlabel="GPU clock (MHz)", ylabel="board power (W)", ylim=(0, None))
    axes[1].set(xlabel="clients served at once", ylabel="latency of an answer (ms)", ylim=(0, None))
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in axes:
        handles = panel.get_legend_handles_labels()[0]
        panel.legend(handles=[*handles, *(_MARKS if panel is axes[0] else [])], loc="upper left")
    return drawn


@figure("profile_replay")
def profile_replay(table: pd.DataFrame) -> Figure:
    """Energy of runs that a board's model predicts, and the error of each by what was fitted."""
    drawn, axes = panels(2)
    names = {"nx0": "first Xavier NX", "nx1": "second Xavier NX"}
    for device, rows in table[table["method"] == "idle base"].groupby("device"):
        axes[0].plot(rows["predicted_j"], rows["measured_j"], "o", ms=3, alpha=0.6,
                     label=names[device])  # fmt: skip
    if table["measured_j"].isna().all():
        axes[0].text(0.1, 0.5, "the measured runs are not here", transform=axes[0].transAxes)
    else:
        limits = np.array([0.9, 1.05]) * [table["measured_j"].min(), table["measured_j"].max()]
        axes[0].plot(limits, limits, color="0.7", lw=1, zorder=0)
        axes[0].fill_between(limits, 0.9 * limits, 1.1 * limits, color="0.93", zorder=0,
                             label="within 10 %")  # fmt: skip
        axes[0].legend(loc="upper left")
        sns.stripplot(table, x="error_pct", y="method", hue="device", ax=axes[1], size=3,
                      alpha=0.6, legend=False, dodge=True)  # fmt: skip
    axes[0].set(xlabel="energy predicted (J)", ylabel="energy measured (J)")
    for side in (-10, 10):
        axes[1].axvline(side, color="0.7", lw=1, ls=":")
    axes[1].axvline(0, color="0.7", lw=1)
    axes[1].set(xlabel="error of a run's energy (%)", ylabel="fitted on a third of the runs")
    return drawn


@figure("profile_unseen")
def profile_unseen(table: pd.DataFrame) -> Figure:
    """Error of whole networks at each resolution predicted from the other resolutions' tables."""
    drawn, axes = plt.subplots()
    sns.lineplot(table, x="resolution", y="mape_pct", hue="unit", marker="o", ax=axes)
    axes.set(xlabel="input resolution left out of the tables (px)", ylim=(0, None),
             ylabel="mean error of a network's latency (%)")  # fmt: skip
    axes.legend(title=None)
    return drawn


@figure("profile_layer_table")
def profile_layer_table(table: pd.DataFrame) -> Figure:
    """Networks on this machine: CPU time over the sum of their layers, and corrected."""
    drawn, axes = plt.subplots()
    for column, label, style in (
        ("table_ms", "sum of the layers", "s"),
        ("predicted_ms", "corrected by the other networks", "o"),
    ):
        axes.plot(table[column], table["measured_ms"], style, label=label, markersize=5)
    limit = 1.05 * table[["table_ms", "predicted_ms", "measured_ms"]].max().max()
    axes.plot([0, limit], [0, limit], color="0.7", lw=1, zorder=0)
    axes.set(xlabel="predicted CPU time (ms)", ylabel="measured CPU time (ms)", xlim=(0, limit),
             ylim=(0, limit))  # fmt: skip
    axes.legend(loc="upper left")
    return drawn


@figure("profile_dynamic")
def profile_dynamic(table: pd.DataFrame) -> Figure:
    """Dynamic over static latency on five devices with half of the work skipped."""
    drawn, axes = plt.subplots(figsize=WIDE)
    sns.barplot(table, x="device", y="ratio", hue="skips", ax=axes, palette="viridis")
    axes.axhline(1, color="0.3", lw=1)
    axes.set(xlabel=None, ylabel="latency over that of the static network")
    sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), title="skips half of all")
    return drawn


@figure("profile_contention")
def profile_contention(table: pd.DataFrame) -> Figure:
    """Published cases of one application beside another: measured, and predicted by the others."""
    drawn, axes = plt.subplots()
    clocks = table["mhz"].map("{:g} MHz".format)
    rows = table.assign(label=table["unit"].str.upper() + "\n" + clocks + "\n" + table["case"])
    for column, label, mark in (
        ("measured_ms", "measured", "o"),
        ("predicted_ms", "predicted from the other cases", "x"),
    ):
        axes.plot(rows["label"], rows[column] / rows["alone_ms"], mark, label=label, ls="none")
    axes.axhline(1, color="0.7", lw=1, zorder=0)
    axes.set(ylabel="latency beside one application\nover latency alone", ylim=(0, None))
    axes.margins(x=0.1)
    axes.legend(loc="lower right")
    return drawn


@figure("profile_quota")
def profile_quota(table: pd.DataFrame) -> Figure:
    """CPU quota asked for against the CPU time a busy process got, with the error where it held."""
    drawn, axes = plt.subplots(figsize=(4.8, 3.8))
    limit = 1.2 * table["asked_pct"].max()
    axes.plot([0, limit], [0, limit], color="0.7", lw=1, zorder=0, label="as asked")
    axes.plot(table["asked_pct"], table["got_pct"], "o", label="measured", markersize=5)
    for row in table.dropna(subset="error_pct").itertuples():
        axes.annotate(f"off by {row.error_pct:.2f} %", (row.asked_pct, row.got_pct), (8, -8),
                      textcoords="offset points", va="top", fontsize="small")  # fmt: skip
    if table["got_pct"].isna().all():
        axes.text(0.65, 0.2, "no quota could be set here", transform=axes.transAxes, ha="center")
    axes.set(xlabel="quota asked for (% of one core)", ylabel="CPU time over wall time (%)",
             xlim=(0, 1.25 * limit), ylim=(0, limit))  # fmt: skip
    axes.legend(loc="upper left")
    return drawn
