"""Figures of the network that grows: what increments add, and where they run."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from suite.plots.style import panels, panels_by, plain_log, series
from suite.record.figures import figure


@figure("grow_increments")
def grow_increments(table: pd.DataFrame) -> Figure:
    """Accuracy of the increments, and the confidence in the right class, relative to all."""
    drawn, axes = panels(2)
    looks = {"accuracy_val_pct": ("validation", "s--"), "accuracy_test_pct": ("test", "o-")}
    series(axes[0], table, "increments", looks)
    axes[0].set(ylabel="accuracy (%)")
    axes[1].bar(table["increments"], table["confidence_pct"], width=0.6)
    for count, value in zip(table["increments"], table["confidence_pct"], strict=True):
        axes[1].text(count, value + 1, f"{value:.0f}", ha="center")
    axes[1].set(ylabel="confidence in the right class\n(% of all increments')")
    for panel in axes:
        panel.set(xlabel="increments", xticks=table["increments"])
    return drawn


@figure("grow_points")
def grow_points(table: pd.DataFrame) -> Figure:
    """Energy over time of every unit, clock and number of increments; the front is filled."""
    drawn, by_board = panels_by(table, "board", figsize=(9.6, 4.4))
    most = table["increments"].max()
    for board, (panel, mine) in by_board.items():
        units = list(dict.fromkeys(mine["unit"]))
        for (unit, count), rows in mine.groupby(["unit", "increments"]):
            style = {"color": f"C{units.index(unit)}", "alpha": 0.25 + 0.75 * count / most}
            on_front = rows["on_front"].astype(bool)
            panel.plot(rows["latency_ms"], rows["added_mj"], lw=0.8, **style)
            for part, fill in ((rows[on_front], "full"), (rows[~on_front], "none")):
                panel.plot(
                    part["latency_ms"], part["added_mj"], "o", ms=2 + count, fillstyle=fill,
                    mew=0.6, **style,
                )  # fmt: skip
        handles = [Line2D([], [], color=f"C{i}", marker="o", label=u) for i, u in enumerate(units)]
        panel.legend(handles=handles, loc="best")
        panel.set(
            title=f"{board}, jobs of {mine['batch'].iloc[0]:.0f} images", xscale="log",
            yscale="log", xlabel="time of a job (ms)", ylabel="energy a job adds (mJ)",
        )  # fmt: skip
        plain_log(panel.xaxis)
        plain_log(panel.yaxis)
    sizes = [
        Line2D([], [], color="0.4", ls="", marker="o", ms=2 + n, alpha=0.25 + 0.75 * n / most,
               label=f"{n} increment{'s' * (n > 1)}")
        for n in range(1, most + 1)
    ]  # fmt: skip
    hollow = Line2D([], [], color="0.4", ls="", marker="o", fillstyle="none", label="dominated")
    drawn.legend(handles=[*sizes, hollow], loc="outside upper center", ncols=most + 1)
    return drawn


@figure("grow_budget")
def grow_budget(table: pd.DataFrame) -> Figure:
    """Least energy of a job, and its power, over the time that is allowed for it, by increments;
    both above idle, a mark where another clock or unit (its shape) takes over."""
    boards = list(dict.fromkeys(table["board"]))
    most = table["increments"].max()
    drawn, axes = plt.subplots(2, len(boards), figsize=(9.6, 5.0), sharex="col", squeeze=False)
    for column, board in zip(axes.T, boards, strict=True):
        mine = table[table["board"] == board]
        units = list(dict.fromkeys(mine["unit"]))
        for panel, value in zip(column, ("added_mj", "added_mw"), strict=True):
            colours = sns.color_palette("viridis_r", most)
            for (count, rows), colour in zip(mine.groupby("increments"), colours, strict=True):
                rows = rows.sort_values("latency_ms")
                panel.step(rows["latency_ms"], rows[value], where="post", lw=1, color=colour,
                           label=f"{count} increment{'s' * (count > 1)}")  # fmt: skip
                for unit, part in rows.groupby("unit"):
                    mark = "os^"[units.index(unit)]
                    panel.plot(part["latency_ms"], part[value], mark, ms=4, color=colour)
            panel.set(xscale="log", yscale="log")
            plain_log(panel.yaxis)
        marks = [Line2D([], [], color="0.4", ls="", marker=m, label=unit)
                 for m, unit in zip("os^", units, strict=False)]  # fmt: skip
        column[0].legend(handles=marks, loc="best")
        all_of_them = mine[mine["increments"] == most]["added_mj"]
        column[0].set_title(
            f"{board}: given time, {all_of_them.max() / all_of_them.min():.1f} times less energy"
        )
        column[1].set_xlabel("time allowed for a job (ms)")
        plain_log(column[1].xaxis)
    axes[0, 0].set_ylabel("least energy a job adds (mJ)")
    axes[1, 0].set_ylabel("power it adds (mW)")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=most)
    return drawn
