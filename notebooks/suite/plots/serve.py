"""Figures of serving: one set of weights at many speeds, switching, engines and peers."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.plots.style import WIDE, panels, plain_decades, plain_log
from suite.record.figures import figure


@figure("serve_overhead")
def serve_overhead(table: pd.DataFrame) -> Figure:
    """Run time of prepared views over that of a static copy, per round."""
    drawn, axes = plt.subplots()
    sns.boxplot(table, x="ratio", y="subnet", color="C0", fliersize=2, width=0.6, ax=axes)
    axes.axvline(1, color="0.3", lw=0.8)
    axes.set(ylabel="", xlabel="run time in the super-network / run time of the static copy")
    medians = table.groupby("subnet")["ratio"].median()
    axes.set_title(
        f"views take {medians.median():.2f} times as long as a copy, at worst {medians.max():.2f}"
    )
    return drawn


@figure("serve_backends")
def serve_backends(table: pd.DataFrame) -> Figure:
    """Every engine and precision: latency and accuracy of its points, the darker the larger the
    network, and the memory and preparation that a point costs."""
    table = table.assign(engine=table["backend"] + " " + table["precision"])
    order = list(dict.fromkeys(table["engine"]))
    drawn, axes = plt.subplots(1, 4, figsize=(11.5, 4.0), sharey=True, width_ratios=(2, 1, 1, 1))
    sizes = table.groupby("macs_m")
    for panel, column, label in (
        (axes[0], "latency_ms", "latency of one frame,\nCPU time (ms)"),
        (axes[1], "accuracy_test_pct", "test accuracy (%)"),
    ):
        span = table.groupby("engine")[column].agg(["min", "max"]).loc[order]
        panel.hlines(range(len(order)), span["min"], span["max"], color="0.8", lw=2, zorder=0)
        for (macs_m, rows), colour in zip(
            sizes, sns.color_palette("viridis_r", len(sizes)), strict=True
        ):
            panel.scatter(rows[column], rows["engine"].map(order.index), color=colour, s=30,
                          label=f"{macs_m:.0f} MMACs")  # fmt: skip
        panel.set_xlabel(label)
    axes[0].set_xscale("log")
    plain_log(axes[0].xaxis)
    if "images" in table:  # not in tables of earlier versions
        share, count = table["accuracy_test_pct"].mean() / 100, table["images"].iloc[0]
        error_pct = 100 * (share * (1 - share) / count) ** 0.5
        axes[1].set_title(f"{count:.0f} images:\n± {error_pct:.1f} points", fontsize="small")
    for panel, column, label in (
        (axes[2], "memory_mb", "memory of a point (MB)"),
        (axes[3], "prepare_s", "preparation of a point,\nCPU time (s)"),
    ):
        panel.barh(range(len(order)), table.groupby("engine")[column].mean().loc[order], color="C0")
        panel.set_xlabel(label)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].invert_yaxis()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sizes))
    large = table[table["macs_m"] == table["macs_m"].max()].set_index("engine")
    fastest = large["latency_ms"].idxmin()
    speedup = large["latency_ms"].iloc[0] / large["latency_ms"].min()
    memory_mb = table.groupby("engine")["memory_mb"].mean()[fastest]
    drawn.suptitle(
        f"{fastest} serves the largest network {speedup:.1f} times as fast as {large.index[0]}, "
        f"for {memory_mb:.0f} MB a point",
        fontsize="medium",
    )
    return drawn


@figure("peer_times")
def peer_times(table: pd.DataFrame) -> Figure:
    """Time of each sub-network in once-for-all, in every engine here, and at the roof."""
    drawn, axes = plt.subplots(figsize=(10.8, 3.8))
    roof = table["engine"] == "roofline"
    sns.barplot(table[~roof], x="subnet", y="latency_ms", hue="engine", ax=axes)
    axes.plot(
        table.loc[roof, "subnet"], table.loc[roof, "latency_ms"], "k_", ms=38, mew=1.5,
        label="all MACs at the rate of\nthe best matrix product",
    )  # fmt: skip
    axes.set(xlabel="sub-network (kernel, expansion, depth)", ylabel="one image, CPU time (ms)")
    axes.set_title("the same sub-networks and outputs, float32, one thread")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=0.4)
    return drawn


@figure("quickstart_tradeoff")
def quickstart_tradeoff(table: pd.DataFrame) -> Figure:
    """One super-network: accuracy over work, and over latency on this machine."""
    drawn, axes = panels(2, sharey=True)
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
        table, x="frame", y="latency_ms", hue="subnet", palette="viridis", s=14, ax=axes, lw=0,
        hue_order=table.groupby("subnet")["latency_ms"].median().sort_values().index,
    )  # fmt: skip
    changes = table.index[table["subnet"] != table["subnet"].shift()][1:]
    for change in changes:
        axes.axvline(table["frame"][change], color="0.8", lw=0.8, zorder=0)
    axes.set(xlabel="frame", ylabel="latency (ms)", ylim=(0, None))
    axes.set_title("the sub-network changes every 40 frames, between two frames")
    sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return drawn


@figure("switch_times")
def switch_times(table: pd.DataFrame) -> Figure:
    """How long a switch takes, and the first frame after it against a later one."""
    drawn, axes = panels(2)
    switch = table[table["what"] == "switch"]
    sns.ecdfplot(switch, x="time_us", ax=axes[0])
    axes[0].set(xlabel="switch (µs)", ylabel="share of switches", xscale="log")
    plain_log(axes[0].xaxis)
    frames = table[table["what"] != "switch"]
    sns.ecdfplot(frames.assign(ms=frames["time_us"] / 1e3), x="ms", hue="what", ax=axes[1])
    axes[1].set(xlabel="frame latency (ms)", ylabel="share of frames", xscale="log")
    plain_log(axes[1].xaxis)
    sns.move_legend(axes[1], "upper left", title=None)
    return drawn


@figure("switch_costs")
def switch_costs(table: pd.DataFrame) -> Figure:
    """What it takes until the next frame can start, by what is done for it: timed here, a dot a
    time, and published for other machines (hollow)."""
    ways = list(dict.fromkeys(table["way"]))
    drawn, axes = plt.subplots(figsize=(8.6, 0.45 * len(ways) + 1.3))
    published = table["source"] == "published"
    for rows, colour, face in ((table[~published], "C0", "C0"), (table[published], "C3", "none")):
        axes.scatter(rows["time_ms"], rows["way"].map(ways.index), s=24, alpha=0.7, facecolors=face,
                     edgecolors=colour)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.set(xlabel="until the next frame can start (ms)", ylabel="")
    plain_decades(axes.xaxis)
    medians_ms = table.groupby("way")["time_ms"].median()
    rebound_us = 1000 * medians_ms.pop(ways[0])
    axes.set_title(
        f"medians: re-binding takes {rebound_us:.1f} µs, to copy or read weights at least "
        f"{medians_ms.min():.0f} ms"
    )
    return drawn


@figure("switch_overhead")
def switch_overhead(table: pd.DataFrame) -> Figure:
    """Run time of a sub-network in the super-network over that of its static copy, per round."""
    drawn, axes = plt.subplots(figsize=WIDE)
    sns.boxplot(table, x="ratio", y="subnet", hue="frame", fliersize=2, width=0.6, ax=axes)
    axes.legend(title=None)
    axes.axvline(1, color="0.3", lw=0.8)
    axes.set(ylabel="", xlabel="run time in the super-network / run time of the static copy")
    return drawn


@figure("bundle_costs")
def bundle_costs(table: pd.DataFrame) -> Figure:
    """Memory of a process with one point and with several; time of a frame over a plain session."""
    drawn, axes = panels(2, width_ratios=(3, 2))
    memory = table[table["what"] == "memory"]
    count = memory["points"].max()
    bars = sns.barplot(
        memory.assign(loaded=memory["points"].map(lambda n: f"{n:.0f} point{'s' * (n > 1)}")),
        y="mode", x="rss_mb", hue="loaded", palette=["C0", "C1"], ax=axes[0],
    )  # fmt: skip
    for group in bars.containers:
        axes[0].bar_label(group, fmt="%.0f", padding=3)
    floor_mb = memory["import_mb"].median()
    axes[0].axvline(floor_mb, color="0.3", lw=0.8, ls="--")
    axes[0].set(xlabel="resident memory of the process (MB)", ylabel="")
    axes[0].set_title(f"dashed: the runner imported, nothing loaded ({floor_mb:.0f} MB)")
    sns.move_legend(axes[0], "lower right", title=None)
    shared = memory[(memory["mode"] == "shared") & (memory["points"] == count)]["shared_pct"]
    times = table[table["what"] == "time"]
    sns.boxplot(times, y="mode", x="ratio", color="C0", fliersize=2, width=0.5, ax=axes[1])
    axes[1].axvline(1, color="0.3", lw=0.8)
    axes[1].set(xlabel="time of a frame / of a plain session", ylabel="")
    axes[1].set_title(f"shared: {shared.iloc[0]:.0f} % of the weights are another point's")
    return drawn
