"""Figures of serving: what a prepared sub-network costs, per engine and against peers."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dynlib.report.figures import figure
from dynlib.report.plots.style import plain_log


@figure("serve_overhead")
def serve_overhead(table: pd.DataFrame) -> Figure:
    """Run time of prepared views over that of a static copy, per round, and the limits set."""
    drawn, axes = plt.subplots()
    sns.boxplot(table, x="ratio", y="subnet", color="C0", fliersize=2, width=0.6, ax=axes)
    for value, style in ((1, "-"), (1.03, "--"), (1.10, ":")):
        axes.axvline(value, color="0.3" if value == 1 else "C3", lw=0.8, ls=style)
    axes.set(ylabel="", xlabel="run time in the super-network / run time of the static copy")
    axes.set_title("dashed: limit of the median, dotted: of the worst")
    return drawn


@figure("serve_backends")
def serve_backends(table: pd.DataFrame) -> Figure:
    """Accuracy over latency of every engine and precision; their memory; their preparation."""
    drawn, axes = plt.subplots(1, 3, figsize=(10.8, 3.8), width_ratios=(2, 1, 1))
    sns.lineplot(
        table, x="latency_ms", y="accuracy_test_pct", hue="backend", style="precision",
        markers=True, markersize=7, lw=0.8, sort=False, ax=axes[0],
    )  # fmt: skip
    axes[0].set(xlabel="latency of one frame, CPU time (ms)", ylabel="test accuracy (%)")
    axes[0].set_xscale("log")
    plain_log(axes[0].xaxis)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].get_legend().remove()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    engines = table.assign(engine=table["backend"] + " " + table["precision"])
    for panel, column, label in (
        (axes[1], "memory_mb", "memory per point (MB)"),
        (axes[2], "prepare_s", "preparation per point,\nCPU time (s)"),
    ):
        sns.barplot(
            engines, y="engine", x=column, hue="backend", errorbar=None, legend=False, ax=panel
        )
        panel.set(xlabel=label, ylabel="")
    axes[2].set_yticklabels([])
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
