"""The manager without one of its mechanisms."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.record.figures import figure

_TICKS = (-10, -1, -0.1, 0, 0.1, 1, 10, 100)


@figure("mechanisms")
def mechanisms(table: pd.DataFrame) -> Figure:
    """By how much each group of cases is worse without a mechanism; named: the worst of each."""
    order = list(dict.fromkeys(table["without"]))
    drawn, axes = plt.subplots(1, 2, sharey=True, figsize=(11.5, 0.42 * len(order) + 1.6))
    for panel, column, label, least, linear in (
        (axes[0], "energy_pct", "more energy per on-time frame (%)", 1.0, 1),
        (axes[1], "miss_points", "more frames missed (points)", 0.1, 0.1),
    ):
        sns.stripplot(table, y="without", x=column, hue="board", order=order, jitter=False,
                      size=5, alpha=0.7, ax=panel)  # fmt: skip
        panel.set_xscale("symlog", linthresh=linear)
        panel.axvspan(-least, least, color="0.94", zorder=0)
        for place, name in enumerate(order):
            some = table[table["without"] == name]
            most = some.loc[some[column].idxmax()]
            if most[column] > least:
                panel.annotate(most["group"], (most[column], place), xytext=(6, 0), size=7,
                               textcoords="offset points", va="center")  # fmt: skip
        low, high = panel.get_xlim()
        panel.set(xlabel=label, ylabel="without ...", xlim=(low, high * 200))
        ticks = [tick for tick in _TICKS if low <= tick <= high and not 0 < abs(tick) < linear]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.grid(axis="y", color="0.92", lw=0.6)
        handles, labels = panel.get_legend_handles_labels()
        panel.get_legend().remove()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn
