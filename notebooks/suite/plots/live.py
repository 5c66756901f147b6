"""Figures of the live runs: frame by frame, and policy by policy."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from suite.plots.style import panels, panels_by
from suite.record.figures import figure

_LEAST_PP = -8.0  # what is further below is drawn at the edge


def timeline(
    table: pd.DataFrame, heights: tuple[float, ...], room: float, sizes: tuple[int, int]
) -> tuple[Figure, np.ndarray, dict[str, tuple[np.ndarray, pd.DataFrame]]]:
    """A column per policy: latency with its deadline, the network that answered, and a third panel
    that is left to the caller.

    `heights` are those of the three; `room` is how many deadlines the first one shows; `sizes` are
    those of its dots and of the second one's. Returns figure, all axes, and by policy its axes and
    rows.
    """
    policies = list(dict.fromkeys(table["policy"]))
    drawn, axes = plt.subplots(
        3, len(policies), figsize=(9.6, 5.2), sharex=True, sharey="row", squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    high_ms = room * table["deadline_ms"].max()
    networks = int(table["networks"].max())
    found = {}
    for column, policy in zip(axes.T, policies, strict=True):
        mine = table[table["policy"] == policy]
        t_s, late = mine["arrival_s"], ~mine["on_time"].astype(bool)
        shown_ms = mine["latency_ms"].fillna(high_ms).clip(upper=high_ms)
        for rows, colour, label in ((~late, "C0", "in time"), (late, "C3", "late or dropped")):
            column[0].plot(t_s[rows], shown_ms[rows], ".", ms=sizes[0], color=colour, label=label)
        column[0].step(t_s, mine["deadline_ms"], color="0.3", lw=0.8, label="deadline")
        column[1].plot(t_s, mine["network"], ".", ms=sizes[1], color="C2")
        column[2].set_xlabel("time (s)")
        found[policy] = column, mine
    axes[0, 0].set(ylabel="latency (ms)", ylim=(0, 1.05 * high_ms))
    axes[1, 0].set(ylabel="sub-network\n(largest on top)", ylim=(0.5, networks + 0.5))
    axes[1, 0].set_yticks(range(1, networks + 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3, markerscale=3)
    return drawn, axes, found


@figure("live_timeline")
def live_timeline(table: pd.DataFrame) -> Figure:
    """One column per policy; latency with its deadline, sub-network and load over time."""
    drawn, axes, found = timeline(table, (2, 1.3, 0.8), 2.5, (3, 3))
    for policy, ((top, _, load), mine) in found.items():
        load.fill_between(mine["arrival_s"], mine["workers"], step="post", color="0.8", lw=0)
        load.margins(x=0)
        top.set_title(f"{policy}: {100 * (1 - mine['on_time'].mean()):.1f} % missed")
    axes[2, 0].set(ylabel="processes\nof the load", ylim=(0, None))
    axes[2, 0].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    return drawn


@figure("live_networks")
def live_networks(table: pd.DataFrame) -> Figure:
    """By number of apps: what each policy gains over the best fixed network, and what it misses."""
    drawn, found = panels_by(table, "apps", sharex=True, sharey=True)
    for apps, (panel, rows) in found.items():
        for height, row in enumerate(rows.to_dict("records")):
            look = {"manager": ("*", "C3", 11), "oracle": ("D", "C2", 6)}
            marker, colour, size = look.get(row["policy"], ("o", "C0", 6))
            missed = f"{row['missed_pct']:.1f} % missed"
            at_pp = max(row["gain_pp"], _LEAST_PP)
            if at_pp > row["gain_pp"]:  # so far below that it would take all the room
                marker, missed = "<", f"{row['gain_pp']:.0f} points, {missed}"
            else:
                reach = [[at_pp - row["low"]], [row["high"] - at_pp]]
                panel.errorbar(at_pp, height, xerr=reach, color=colour, capsize=3, lw=1)
            panel.plot(at_pp, height, marker, ms=size, color=colour)
            panel.annotate(missed, (at_pp, height), xytext=(0, 8), textcoords="offset points",
                           ha="center" if marker != "<" else "left", fontsize="x-small",
                           color="0.35")  # fmt: skip
        panel.axvline(0, color="0.3", lw=0.8, ls="--")
        panel.set_yticks(range(len(rows)), _named(rows["policy"]))
        panel.margins(x=0.12, y=0.15)
        gain = rows.set_index("policy")["gain_pp"]
        panel.set(
            xlabel="right and in time,\nover the best fixed network (points)",
            title=f"{apps}: the manager gains {gain['manager']:.1f} points,\n"
            f"the oracle {gain['oracle']:.1f}",
        )
    axes = next(iter(found.values()))[0]
    axes.invert_yaxis()
    return drawn


def _named(policies: pd.Series) -> list[str]:
    """Fixed networks are numbered by size; their ends by what they are."""
    last = policies.str.startswith("fixed").sum()
    words = {"fixed 1": "smallest network", f"fixed {last}": "largest network"}
    return [words.get(name, name.replace("fixed", "network")) for name in policies]


@figure("live_duty")
def live_duty(table: pd.DataFrame) -> Figure:
    """What a duty clock does to one network: latency, frames in time, and CPU time."""
    drawn, axes = panels(3, sharex=True)
    for panel, (column, label) in zip(axes, (
        ("latency_ms", "median latency (ms)"),
        ("on_time_pct", "frames in time (%)"),
        ("cpu_s", "CPU time of a run (s)"),
    ), strict=True):  # fmt: skip
        panel.plot(table["share_pct"], table[column], ".", color="0.6")
        panel.plot(table.groupby("share_pct")[column].mean(), "o-", color="C0")
        panel.set(xlabel="duty clock (% of full speed)", ylabel=label)
        panel.set_ylim(bottom=0)
    return drawn
