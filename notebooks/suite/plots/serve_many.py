"""Figure of several programs under the manager service."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from suite.record.figures import figure


@figure("serve_many_timeline")
def serve_many_timeline(table: pd.DataFrame) -> Figure:
    """Per program, sub-network and latency with deadline over time; grey: nobody manages it.

    Rows are frames, and events (`what` says which, `app` is empty).
    """
    frames, events = table[table["app"].notna()], table[table["app"].isna()]
    apps = list(dict.fromkeys(frames["app"]))
    drawn, axes = plt.subplots(
        2 * len(apps), 1, figsize=(9.6, 6.4), sharex=True, height_ratios=(1, 1.6) * len(apps)
    )
    for name, network, latency in zip(apps, axes[::2], axes[1::2], strict=True):
        mine = frames[frames["app"] == name].sort_values("t_s")
        _draw_networks(network, mine)
        network.set_title(name, loc="left", fontweight="bold")
        _draw_latency(latency, mine)
        for panel in (network, latency):
            _shade_alone(panel, mine)
    for number, (t_s, what) in enumerate(zip(events["t_s"], events["what"], strict=True), 1):
        for panel in axes:
            panel.axvline(t_s, color="0.2", lw=0.8, ls="--")
        label = f"{number}  {what.replace('_ms', ' (ms)')}"
        axes[0].annotate(
            str(number), (t_s, 1.02), xycoords=("data", "axes fraction"), ha="center",
            fontsize="small", fontweight="bold",
        )  # fmt: skip
        drawn.text(
            0.08 + 0.31 * ((number - 1) // 3), 0.995 - 0.028 * ((number - 1) % 3), label,
            fontsize="small", va="top",
        )  # fmt: skip
    axes[-1].set_xlabel("time (s)")
    axes[-1].margins(x=0.01)
    handles, labels = axes[1].get_legend_handles_labels()
    alone = plt.Rectangle((0, 0), 1, 1, color="0.88")
    drawn.legend(
        [*handles, alone], [*labels, "serves by itself"], loc="outside lower center", ncols=4,
        markerscale=2,
    )  # fmt: skip
    drawn.get_layout_engine().set(rect=(0, 0, 1, 0.9))
    return drawn


def _draw_networks(panel, mine: pd.DataFrame) -> None:
    served = mine[mine["level"].notna()]
    panel.plot(served["t_s"], served["level"], ".", ms=3, color="C2")
    levels = int(mine["levels"].max())
    panel.set_ylim(0.5, levels + 0.5)
    panel.set_yticks((1, levels), ("smallest", "largest"))
    panel.set_ylabel("network")


def _draw_latency(panel, mine: pd.DataFrame) -> None:
    high_ms = 1.6 * mine["deadline_ms"].max()
    late = mine["latency_ms"].isna() | (mine["latency_ms"] > mine["deadline_ms"])
    shown_ms = mine["latency_ms"].fillna(high_ms).clip(upper=high_ms)
    for rows, colour, label in ((~late, "C0", "in time"), (late, "C3", "late or dropped")):
        panel.plot(mine["t_s"][rows], shown_ms[rows], ".", ms=3, color=colour, label=label)
    panel.step(mine["t_s"], mine["deadline_ms"], where="post", color="0.2", lw=1, label="deadline")
    panel.set(ylabel="latency (ms)", ylim=(0, 1.05 * high_ms))


def _shade_alone(panel, mine: pd.DataFrame) -> None:
    """Spans in which nobody manages the program."""
    alone = (mine["managed"] == 0).to_numpy()
    t_s = mine["t_s"].to_numpy()
    edges = np.flatnonzero(np.diff(np.concatenate(([0], alone.astype(int), [0]))))
    for first, end in edges.reshape(-1, 2):
        panel.axvspan(t_s[first], t_s[min(end, len(t_s) - 1)], color="0.88", lw=0, zorder=0)
