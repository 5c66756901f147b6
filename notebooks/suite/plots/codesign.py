"""Figures of co-design: backbone, exits and clocks searched together."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.plots.style import WIDE, draw_front, panels_by, plain_log
from suite.record.figures import figure


@figure("codesign_front")
def codesign_front(table: pd.DataFrame) -> Figure:
    """Fronts of the searches with equal numbers of look-ups, one thin line a seed."""
    drawn, by_board = panels_by(table, "board", sharey=True)
    for board, (panel, mine) in by_board.items():
        for i, (search, rows) in enumerate(mine.groupby("search", sort=False)):
            panel.plot([], [], color=f"C{i}", label=search)
            for _, run in rows.groupby("seed"):
                draw_front(
                    panel, run, "energy_mj", "accuracy_val_pct", color=f"C{i}", lw=0.9, alpha=0.7
                )
        panel.set(xlabel="board energy of an image (mJ)", xscale="log", title=board)
        plain_log(panel.xaxis)
    drawn.axes[0].set_ylabel("validation accuracy (%)")
    drawn.axes[-1].legend(loc="lower right")
    return drawn


@figure("codesign_gap")
def codesign_gap(table: pd.DataFrame) -> Figure:
    """How far the inner search is from the exhaustive optimum after so many look-ups; a line is the
    mean of the seeds, its band reaches from the best to the worst."""
    drawn, axes = plt.subplots(figsize=WIDE)
    sns.lineplot(
        table, x="evaluations", y="gap_pct", hue="backbone", style="board", errorbar=("pi", 100),
        ax=axes,
    )  # fmt: skip
    axes.set(xscale="log", xlabel="points looked up", ylabel="below the exhaustive optimum (%)")
    worst = table.groupby("evaluations")["gap_pct"].max()
    near = worst.index[worst < 1]
    if len(near):
        axes.set_title(f"after {near[0]} look-ups every seed is within 1 % of the optimum")
    plain_log(axes.xaxis)
    sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5))
    return drawn


_KNOBS = {"exits": "exits", "gpu": "GPU clock", "cpu": "CPU clock", "memory": "memory clock",
          "all": "all four"}  # fmt: skip


@figure("codesign_split")
def codesign_split(table: pd.DataFrame) -> Figure:
    """Energy that each knob saves; whisker: 95 % of boards with every coefficient drawn anew."""
    drawn, axes = plt.subplots(figsize=(7.2, 3.8))
    ours = table[table["knob"].isin(_KNOBS)]
    boards = list(dict.fromkeys(ours["board"]))
    width = 0.8 / len(boards)
    for i, board in enumerate(boards):
        rows = ours[ours["board"] == board].set_index("knob").loc[list(_KNOBS)]
        at = [j + (i - (len(boards) - 1) / 2) * width for j in range(len(rows))]
        gap = [rows["gain_pct"] - rows["low"], rows["high"] - rows["gain_pct"]]
        axes.bar(at, rows["gain_pct"], width, yerr=gap, capsize=3, color=f"C{i}", label=board)
        for x, (value, high) in zip(at, rows[["gain_pct", "high"]].to_numpy(), strict=True):
            axes.text(x, high + 1, f"{value:.1f}", ha="center", fontsize="small")
    published = table[table["knob"] == "published"]
    for value in published["gain_pct"]:
        axes.axhline(value, color="C3", ls="--", lw=1)
        axes.text(-0.4, value + 1, f"published, other networks: up to {value:.0f} %", color="C3")
    axes.set_xticks(range(len(_KNOBS)), _KNOBS.values())
    axes.set(ylabel="energy saved (%)")
    axes.set_title("whisker: 95 % of boards with every coefficient drawn anew")
    axes.legend(loc="center left")
    return drawn


@figure("codesign_exits")
def codesign_exits(table: pd.DataFrame) -> Figure:
    """Where images leave, by how sure the whole backbone is of them; and how much of the last
    one's accuracy an exit has, over the way to it, here and as HADAS publishes it (CIFAR-100)."""
    drawn, axes = plt.subplots(1, 2, figsize=WIDE, width_ratios=(2, 1))
    use = table[table["what"] == "leave"].pivot_table("value", "group", "position", sort=False)
    colors = sns.color_palette("viridis", use.shape[1])
    use.plot.barh(stacked=True, ax=axes[0], color=colors, legend=False, width=0.75)
    axes[0].set(
        xlabel="images that leave behind block (%)", ylabel="the backbone is", xlim=(0, 100)
    )
    axes[0].invert_yaxis()
    handles = axes[0].get_legend_handles_labels()
    drawn.legend(
        *handles, loc="outside upper center", ncols=use.shape[1],
        title="exit used, behind block (from 0)",
    )  # fmt: skip
    curves = table[table["what"].isin(["accuracy", "published"])]
    for (what, name), rows in curves.groupby(["what", "group"], sort=False):
        rows = rows.sort_values("position")
        way_pct = 100 * (rows["position"] + 1) / (rows["position"].max() + 1)
        share_pct = 100 * rows["value"] / rows["value"].iloc[-1]
        ours = what == "accuracy"
        mark = {"A0": "s", "A3": "^"}.get(name, "D")
        look = {"marker": "o"} if ours else {"color": "C1", "marker": mark, "ms": 3, "lw": 0.8}
        axes[1].plot(way_pct, share_pct, **look, label="here" if ours else f"HADAS: {name}")
    axes[1].set(xlabel="blocks before the exit (%)", ylabel="accuracy / the last one's (%)")
    axes[1].legend(loc="lower right")
    return drawn
