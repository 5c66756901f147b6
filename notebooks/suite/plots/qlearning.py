"""Figure of the rival that learns: how energy and misses fall over its episodes of training."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from suite.plots.style import plain_log
from suite.record.figures import figure

_GOVERNORS = {"linux": ("Linux default", "C1"), "schedutil": ("schedutil", "C2")}


@figure("manage_one_qlearning")
def manage_one_qlearning(table: pd.DataFrame) -> Figure:
    """One column per scenario; board energy per on-time frame above, missed frames below.

    Rows without an episode are the governors that the agent is compared with.
    """
    names = list(dict.fromkeys(table["scenario"]))
    drawn, axes = plt.subplots(
        2, len(names), figsize=(9.6, 4.6), sharex="col", sharey="row", squeeze=False
    )
    for column, name in enumerate(names):
        mine = table[table["scenario"] == name]
        learning = mine.dropna(subset="episode").sort_values("episode")
        for panel, what in zip(axes[:, column], ("energy_per_frame_mj", "miss_pct"), strict=True):
            panel.plot(learning["episode"], learning[what], color="C0", alpha=0.35, lw=0.8,
                       label="Q-learning, an episode")  # fmt: skip
            smooth = learning[what].rolling(9, center=True, min_periods=1).median()
            panel.plot(learning["episode"], smooth, color="C0", label="median of nine")
            for policy, (label, colour) in _GOVERNORS.items():
                for value in mine.loc[mine["policy"] == policy, what]:
                    panel.axhline(value, color=colour, ls="--", lw=1, label=label)
        axes[0, column].set_title(name)
    axes[0, 0].set(yscale="log", ylabel="board energy per\non-time frame (mJ)")
    plain_log(axes[0, 0].yaxis)
    axes[1, 0].set_yscale("symlog", linthresh=1)
    axes[1, 0].set(ylim=(-0.1, 100), yticks=(0, 1, 10, 100), yticklabels=("0", "1", "10", "100"),
                   ylabel="missed frames (%)")  # fmt: skip
    drawn.supxlabel("episode of 60 s", fontsize="medium")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn
