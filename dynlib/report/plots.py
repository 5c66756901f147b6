"""The suite's figures: each a pure function of a tidy table, registered under its name."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dynlib.report.figures import figure

WIDE = (9.6, 3.8)


def _front(axes, table: pd.DataFrame, x: str, y: str, **style) -> None:
    rows = table.sort_values(x)
    axes.plot(rows[x], rows[y], drawstyle="steps-post", **style)


@figure("quickstart_tradeoff")
def quickstart_tradeoff(table: pd.DataFrame) -> Figure:
    """One super-network: accuracy over work, and over latency on this machine."""
    drawn, axes = plt.subplots(1, 2, figsize=WIDE, sharey=True)
    for panel, x, label in zip(
        axes, ("macs_m", "latency_ms"), ("work (MMACs)", "latency of one frame (ms)"), strict=True
    ):
        panel.plot(table[x], table["accuracy_test_pct"], "o-", color="C0")
        panel.set(xlabel=label, xscale="log")
    axes[0].set(ylabel="test accuracy (%)")
    static = table["params_m"].sum()
    shared = table["params_m"].max()
    axes[1].set_title(f"{len(table)} networks: {shared:.1f} M weights instead of {static:.1f} M")
    axes[0].set_title("every point is the same set of weights")
    return drawn


@figure("quickstart_frames")
def quickstart_frames(table: pd.DataFrame) -> Figure:
    """A stream of frames: latency of each, coloured by the sub-network that served it."""
    drawn, axes = plt.subplots(figsize=WIDE)
    sns.scatterplot(
        table, x="frame", y="latency_ms", hue="subnet", palette="viridis", s=14, ax=axes, lw=0
    )
    changes = table.index[table["subnet"] != table["subnet"].shift()][1:]
    for change in changes:
        axes.axvline(table["frame"][change], color="0.8", lw=0.8, zorder=0)
    axes.set(xlabel="frame", ylabel="latency (ms)", ylim=(0, None))
    axes.set_title("switching between two frames: no gap, no slow first frame")
    sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return drawn


@figure("training_curve")
def training_curve(table: pd.DataFrame) -> Figure:
    """Validation accuracy of the two ends of the space over training, one panel per run."""
    runs = list(dict.fromkeys(table["run"]))
    drawn, axes = plt.subplots(1, len(runs), figsize=WIDE, sharey=True, squeeze=False)
    for panel, run in zip(axes[0], runs, strict=True):
        rows = table[table["run"] == run]
        sns.lineplot(
            rows, x="epoch", y="accuracy_val_pct", hue="sub-network", marker="o", ax=panel,
            markersize=4,
        )  # fmt: skip
        panel.set(xlabel="epoch", ylabel="validation accuracy (%)", title=run)
    return drawn


@figure("supernet_accuracy")
def supernet_accuracy(table: pd.DataFrame) -> Figure:
    """Accuracy of the shipped sub-networks on validation and test images over MACs."""
    drawn, axes = plt.subplots()
    for column, label, style in (
        ("accuracy_val_pct", "validation (used for choosing)", "s--"),
        ("accuracy_test_pct", "test (never used for choosing)", "o-"),
    ):
        axes.plot(table["macs_m"], table[column], style, label=label, markersize=5)
    axes.set(xlabel="work (MMACs)", ylabel="accuracy (%)", xscale="log")
    axes.set_xticks(t := [10, 20, 40, 80], map(str, t))
    axes.legend(loc="lower right")
    return drawn


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
    units = list(dict.fromkeys(table["unit"]))
    drawn, axes = plt.subplots(1, len(units), figsize=WIDE, squeeze=False)
    for panel, unit in zip(axes[0], units, strict=True):
        rows = table[table["unit"] == unit]
        sns.lineplot(
            rows, x="latency_ms", y="energy_mj", hue="macs_m", palette="viridis", sort=False,
            marker="o", markersize=4, ax=panel, legend=panel is axes[0][-1],
        )  # fmt: skip
        batch = rows["batch"].iloc[0]
        panel.set(
            xlabel=f"latency of a batch of {batch:.0f} (ms)", xscale="log",
            ylabel="board energy of a batch (mJ)", yscale="log", title=f"{unit}, all clocks",
        )  # fmt: skip
    axes[0][-1].legend(title="MMACs", fontsize="small")
    return drawn


@figure("search_front")
def search_front(table: pd.DataFrame) -> Figure:
    """Every trial and the front, one panel per pair of objectives."""
    costs = list(dict.fromkeys(table["cost"]))
    drawn, axes = plt.subplots(1, len(costs), figsize=WIDE, sharey=True, squeeze=False)
    for panel, cost in zip(axes[0], costs, strict=True):
        rows = table[table["cost"] == cost]
        panel.scatter(rows["value"], rows["accuracy_val_pct"], s=10, color="0.7", label="trial")
        best = rows[rows["on_front"]]
        _front(panel, best, "value", "accuracy_val_pct", color="C0", lw=1)
        panel.scatter(best["value"], best["accuracy_val_pct"], s=22, color="C0", label="front")
        panel.set(xlabel=cost, ylabel="validation accuracy (%)")
    axes[0][0].legend(loc="lower right")
    return drawn


@figure("search_hypervolume")
def search_hypervolume(table: pd.DataFrame) -> Figure:
    """Hypervolume over trials: mean over seeds, and the band of one standard error."""
    drawn, axes = plt.subplots()
    sns.lineplot(
        table, x="trial", y="hypervolume", hue="sampler", style="sampler", errorbar="se", ax=axes
    )
    seeds = table["seed"].nunique()
    axes.set(xlabel="trials", ylabel="hypervolume, share of the best")
    axes.set_title(f"mean of {seeds} seeds, band: standard error")
    return drawn


@figure("switch_times")
def switch_times(table: pd.DataFrame) -> Figure:
    """How long a switch takes, and the first frame after it against a later one."""
    drawn, axes = plt.subplots(1, 2, figsize=WIDE)
    switch = table[table["what"] == "switch"]
    sns.ecdfplot(switch, x="time_us", ax=axes[0])
    axes[0].set(xlabel="switch (us)", ylabel="share of switches", xscale="log")
    frames = table[table["what"] != "switch"]
    sns.ecdfplot(frames.assign(ms=frames["time_us"] / 1e3), x="ms", hue="what", ax=axes[1])
    axes[1].set(xlabel="frame latency (ms)", ylabel="share of frames", xscale="log")
    return drawn


@figure("switch_overhead")
def switch_overhead(table: pd.DataFrame) -> Figure:
    """Run time of a sub-network in the super-network over that of its static copy, per round."""
    drawn, axes = plt.subplots(figsize=WIDE)
    sns.boxplot(table, x="subnet", y="ratio", color="C0", fliersize=2, width=0.5, ax=axes)
    axes.axhline(1, color="0.3", lw=0.8)
    axes.axhline(1.05, color="C3", lw=0.8, ls="--")
    axes.set(xlabel="", ylabel="prepared / static copy")
    axes.tick_params(axis="x", labelrotation=20)
    return drawn
