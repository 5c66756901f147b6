"""Figures of what the sub-networks cost: on this machine and on a board."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.plots.style import panels_by, plain_log
from suite.record.figures import figure


@figure("profile_host")
def profile_host(table: pd.DataFrame) -> Figure:
    """Measured latency over work on this machine: median, and up to the 95th percentile; dashed:
    in proportion to the work of the largest."""
    drawn, axes = plt.subplots()
    for i, (threads, rows) in enumerate(table.groupby("threads")):
        rows = rows.sort_values("macs_m")
        colour = ("C0", "#8fc7e8")[i % 2]  # one hue: the same networks; lighter: more threads
        x, median_ms, p95_ms = rows["macs_m"], rows["latency_ms"], rows["latency_p95_ms"]
        axes.vlines(x, median_ms, p95_ms, color=colour, lw=1)
        axes.plot(x, p95_ms, "_", ms=6, color=colour)
        label = f"{threads:.0f} thread{'s' * (threads > 1)}"
        axes.plot(x, median_ms, "o", ms=5, color=colour, label=label)
    alone = table[table["threads"] == table["threads"].min()].sort_values("macs_m")
    small, large = alone.iloc[0], alone.iloc[-1]
    line = np.array([0.0, large["macs_m"]])
    axes.plot(line, line * large["latency_ms"] / large["macs_m"], "--", color="0.5", lw=1,
              label="in proportion to work")  # fmt: skip
    work = large["macs_m"] / small["macs_m"]
    time = large["latency_ms"] / small["latency_ms"]
    axes.set(
        xlabel="work (MMACs)", ylabel="latency of one image (ms); line: to p95", xlim=(0, None),
        ylim=(0, None), title=f"{work:.1f} times the work takes {time:.1f} times as long",
    )  # fmt: skip
    axes.legend()
    return drawn


@figure("profile_board")
def profile_board(table: pd.DataFrame) -> Figure:
    """Energy over latency of a batch at every clock, of the smallest, a middle and the largest
    sub-network; star: the clock of least energy; hollow and dashed: a unit whose rates are guessed.
    """
    sizes = np.sort(table["macs_m"].unique())
    shown = sizes[[0, len(sizes) // 2, -1]]
    drawn, by_unit = panels_by(table, "unit")
    for unit, (panel, rows) in by_unit.items():
        clock = "gpu_mhz" if rows["gpu_mhz"].notna().all() else "cpu_mhz"
        guessed = (rows["source"] == "estimated").all()
        look = {"ls": "--", "fillstyle": "none"} if guessed else {}
        for macs_m, colour in zip(shown, sns.color_palette("viridis_r", 3), strict=True):
            mine = rows[rows["macs_m"] == macs_m].sort_values(clock)
            panel.plot(mine["latency_ms"], mine["energy_mj"], marker="o", ms=3, lw=1, color=colour,
                       label=f"{macs_m:.0f} MMACs", **look)  # fmt: skip
            least = mine.loc[mine["energy_mj"].idxmin()]
            panel.plot(least["latency_ms"], least["energy_mj"], "*", ms=12, color=colour,
                       mec="0.2", mew=0.6)  # fmt: skip
        saved_pct = 100 * (1 - least["energy_mj"] / mine["energy_mj"].iloc[-1])
        for end, text in ((mine.iloc[0], "lowest"), (mine.iloc[-1], "highest")):
            panel.annotate(
                f"{text},\n{end[clock]:.0f} MHz", (end["latency_ms"], end["energy_mj"]),
                xytext=(0, 8), textcoords="offset points", fontsize="x-small", ha="center",
            )  # fmt: skip
        name = unit.upper() if unit == "gpu" else f"CPU ({unit})"
        name += ", estimated" if guessed else ""
        panel.set(
            xlabel=f"latency of a batch of {mine['batch'].iloc[0]:.0f} images (ms)", xscale="log",
            ylabel="board energy of a batch (mJ)", yscale="log",
            title=f"{name}: the largest is cheapest at {least[clock]:.0f} MHz,\n"
            f"{saved_pct:.1f} % below the highest clock",
        )  # fmt: skip
        panel.margins(x=0.12, y=0.15)
        plain_log(panel.xaxis)
        plain_log(panel.yaxis)
    drawn.axes[0].legend(loc="upper left")
    return drawn
