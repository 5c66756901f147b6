"""Figures of the spine: from the first sub-network to two managed models."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dynlib.report.figures import figure
from dynlib.report.plots.style import WIDE, front, plain_log


@figure("quickstart_tradeoff")
def quickstart_tradeoff(table: pd.DataFrame) -> Figure:
    """One super-network: accuracy over work, and over latency on this machine."""
    drawn, axes = plt.subplots(1, 2, figsize=WIDE, sharey=True)
    for panel, x, label in zip(
        axes, ("macs_m", "latency_ms"), ("work (MMACs)", "latency of one frame (ms)"), strict=True
    ):
        panel.plot(table[x], table["accuracy_test_pct"], "o-", color="C0")
        panel.set(xlabel=label, xscale="log")
        plain_log(panel.xaxis)
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
    axes.set_title("the sub-network changes every 40 frames, between two frames")
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
    plain_log(axes.xaxis)
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
        rows = table[table["unit"] == unit].assign(MMACs=lambda t: t["macs_m"].round(1))
        sns.lineplot(
            rows, x="latency_ms", y="energy_mj", hue="MMACs", palette="viridis", sort=False,
            marker="o", markersize=4, ax=panel, legend="full" if panel is axes[0][-1] else False,
        )  # fmt: skip
        batch = rows["batch"].iloc[0]
        panel.set(
            xlabel=f"latency of a batch of {batch:.0f} (ms)", xscale="log",
            ylabel="board energy of a batch (mJ)", yscale="log", title=f"{unit}, all clocks",
        )  # fmt: skip
        plain_log(panel.xaxis)
        plain_log(panel.yaxis)
    sns.move_legend(axes[0][-1], "center left", bbox_to_anchor=(1, 0.5))
    return drawn


@figure("search_front")
def searchfront(table: pd.DataFrame) -> Figure:
    """Every trial and the front, one panel per pair of objectives."""
    costs = list(dict.fromkeys(table["cost"]))
    drawn, axes = plt.subplots(1, len(costs), figsize=WIDE, sharey=True, squeeze=False)
    for panel, cost in zip(axes[0], costs, strict=True):
        rows = table[table["cost"] == cost]
        panel.scatter(rows["value"], rows["accuracy_val_pct"], s=10, color="0.7", label="trial")
        best = rows[rows["on_front"]]
        front(panel, best, "value", "accuracy_val_pct", color="C0", lw=1)
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
    plain_log(axes[0].xaxis)
    frames = table[table["what"] != "switch"]
    sns.ecdfplot(frames.assign(ms=frames["time_us"] / 1e3), x="ms", hue="what", ax=axes[1])
    axes[1].set(xlabel="frame latency (ms)", ylabel="share of frames", xscale="log")
    plain_log(axes[1].xaxis)
    sns.move_legend(axes[1], "upper left", title=None)
    return drawn


@figure("switch_overhead")
def switch_overhead(table: pd.DataFrame) -> Figure:
    """Run time of a sub-network in the super-network over that of its static copy, per round."""
    drawn, axes = plt.subplots(figsize=WIDE)
    sns.boxplot(table, x="ratio", y="subnet", hue="frame", fliersize=2, width=0.6, ax=axes)
    axes.axvline(1, color="0.3", lw=0.8)
    axes.axvline(1.05, color="C3", lw=0.8, ls="--")
    axes.set(ylabel="", xlabel="run time in the super-network / run time of the static copy")
    return drawn


_POLICIES = {
    "linux": "Linux default", "manager": "manager",
    "accuracy": "manager, for accuracy", "latency": "manager, for latency",
}  # fmt: skip
_SERIES = {
    "latency_ms": "latency (ms)",
    "accuracy_pct": "accuracy (%)",
    "clock_mhz": "highest GPU\nclock (MHz)",
    "power_mw": "mean board\npower (W)",
}


@figure("manage_one_timeline")
@figure("manage_two_timeline")
def manage_timeline(table: pd.DataFrame) -> Figure:
    """One column per policy; latency with its deadline, accuracy, clock and power over time."""
    policies = [p for p in _POLICIES if p in set(table["policy"])]
    drawn, axes = plt.subplots(
        len(_SERIES), len(policies), figsize=(9.6, 6.4), sharex=True, sharey="row", squeeze=False
    )
    for column, policy in enumerate(policies):
        mine = table[table["policy"] == policy]
        for panel, (what, label) in zip(axes[:, column], _SERIES.items(), strict=True):
            rows = mine[mine["what"] == what]
            by_frame = what in ("latency_ms", "accuracy_pct")
            style = {"ls": "", "marker": ".", "ms": 3} if by_frame else {"drawstyle": "steps-post"}
            for i, (name, part) in enumerate(rows.groupby("name")):
                values = part["value"] / (1e3 if what == "power_mw" else 1)
                panel.plot(part["t_s"], values, **style, color=f"C{i}", lw=1, label=name)
            if column == 0:
                panel.set_ylabel(label)
        deadlines = mine[mine["what"] == "deadline_ms"]
        for _, part in deadlines.groupby("name"):
            axes[0, column].plot(
                part["t_s"], part["value"], color="C3", lw=1, drawstyle="steps-post"
            )
        axes[0, column].set_ylim(0, 1.3 * deadlines["value"].max())
        axes[0, column].set_title(_POLICIES[policy])
        axes[-1, column].set_xlabel("time (s)")
    if table.loc[table["what"] == "latency_ms", "name"].nunique() > 1:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        names = [f"application {label}" for label in labels]
        drawn.legend(handles, names, loc="outside upper center", ncols=len(names), markerscale=3)
    return drawn


@figure("manage_one_energy")
@figure("manage_two_energy")
def manage_energy(table: pd.DataFrame) -> Figure:
    """Energy per on-time frame, accuracy and misses of every policy, one group per scenario."""
    names = {"energy_per_frame_mj": "board energy per\non-time frame (mJ)",
             "accuracy_mean_pct": "mean accuracy (%)",
             "deadline_miss_pct": "missed frames (%)"}  # fmt: skip
    points = list(dict.fromkeys(table["points"]))
    drawn, axes = plt.subplots(
        len(points), len(names), figsize=(9.6, 2.8 * len(points)), squeeze=False
    )
    table = table.replace({"policy": _POLICIES})
    order = [p for p in _POLICIES.values() if p in set(table["policy"])]
    for row, source in zip(axes, points, strict=True):
        mine = table[table["points"] == source]
        for panel, (column, label) in zip(row, names.items(), strict=True):
            sns.barplot(
                mine, x="scenario", y=column, hue="policy", hue_order=order, errorbar="sd",
                err_kws={"lw": 1}, ax=panel,
            )  # fmt: skip
            panel.set(xlabel="", ylabel=label)
            if column == "accuracy_mean_pct":
                low, high = mine[column].min(), mine[column].max()
                panel.set_ylim(low - 0.3 * (high - low) - 0.2, high + 0.1 * (high - low) + 0.1)
            if column == "deadline_miss_pct":
                panel.axhline(1, color="C3", lw=0.8, ls="--")
            handles, labels = panel.get_legend_handles_labels()
            panel.get_legend().remove()
        row[1].set_title(f"{source} operating points")
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(order))
    return drawn


@figure("manage_two_ladder")
def manage_two_ladder(table: pd.DataFrame) -> Figure:
    """On which reading of "energy saved" a published reduction is reached."""
    drawn, axes = plt.subplots(figsize=(7.2, 2.8))
    gap = [table["reduction_pct"] - table["low"], table["high"] - table["reduction_pct"]]
    axes.barh(table["rung"], table["reduction_pct"], xerr=gap, color="C0", height=0.6)
    for i, value in enumerate(table["reduction_pct"]):
        axes.text(value + 1.5, i, f"{value:.0f} %", va="center")
    published = table["published_pct"].iloc[0]
    axes.axvline(published, color="C3", ls="--", lw=1)
    axes.text(published, -0.75, f"published: {published:.0f} %", color="C3", ha="center")
    axes.set(xlabel="saved against the Linux default (%)", ylabel="", xlim=(0, 100))
    axes.invert_yaxis()
    return drawn


@figure("manage_two_sensitivity")
def manage_two_sensitivity(table: pd.DataFrame) -> Figure:
    """The saving if every guessed coefficient of the board were 30 % lower or higher."""
    drawn, axes = plt.subplots(figsize=(5.2, 3.2))
    for i, (scenario, rows) in enumerate(table.groupby("scenario")):
        rows = rows.sort_values("factor")
        gap = [rows["energy_reduction_pct"] - rows["energy_reduction_pct_low"],
               rows["energy_reduction_pct_high"] - rows["energy_reduction_pct"]]  # fmt: skip
        axes.errorbar(
            100 * (rows["factor"] - 1), rows["energy_reduction_pct"], gap, fmt="o-", capsize=3,
            color=f"C{i}", label=scenario,
        )  # fmt: skip
    axes.set(xlabel="change of every guessed coefficient (%)", ylabel="energy saved (%)")
    axes.set_ylim(0, None)
    axes.legend()
    return drawn
