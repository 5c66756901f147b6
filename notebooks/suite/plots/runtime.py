"""Figures of the manager: how it decides, what it saves, how far from the optimum it is."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.plots.style import panels
from suite.record.figures import figure

_POLICIES = {
    "linux": "Linux default", "manager": "manager",
    "accuracy": "manager, for accuracy", "latency": "manager, for latency",
}  # fmt: skip
_SERIES = {
    "temp_c": "temperature (°C)\nflat: trips",
    "latency_ms": "latency (ms)\nline: deadline",
    "accuracy_pct": "accuracy (%)",
    "clock_mhz": "mean\nclock (MHz)",
    "power_mw": "mean board\npower (W)",
}
_LIMITS = {"temp_c": "trip_c", "latency_ms": "deadline_ms", "clock_mhz": "cap_mhz"}


_GOALS = {
    "energy": "manager, for energy", "balanced": "manager, balanced",
    "latency": "manager, for latency", "best static": "best fixed setting",
}  # fmt: skip
_FLOORS = {"asked": "accuracy as asked for", "equal": "accuracy of the Linux default"}


@figure("manage_one_levels")
def manage_one_levels(table: pd.DataFrame) -> Figure:
    """Left, the choice of the upper level among all networks and clocks; right, what the lower
    level makes of it frame by frame."""
    drawn, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), width_ratios=(1, 1.3))
    upper = table[table["panel"] == "upper"]
    groups = (("misses deadline or floor", "0.8", 12), ("feasible", "C0", 16), ("chosen", "C3", 90))
    for kind, colour, size in groups:
        rows = upper[upper["kind"] == kind]
        marker = "*" if kind == "chosen" else "o"
        axes[0].scatter(rows["x"], rows["y"], s=size, color=colour, marker=marker, label=kind)
    axes[0].axvline(1, color="0.3", lw=0.8, ls="--")
    axes[0].set(xlabel="planned time / deadline", ylabel="mean power above idle (mW)",
                title="upper level: network and clock", xlim=(0, 2))  # fmt: skip
    axes[0].legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    lower = table[table["panel"] == "lower"]
    clock = lower[lower["kind"] == "clock"]
    axes[1].step(clock["x"], clock["y"], where="post", color="C0", lw=1.2, label="clock")
    for _, row in lower[lower["kind"] == "frame"].iterrows():
        axes[1].axvspan(row["x"], row["y"], color="C2", alpha=0.2, lw=0)
    for x in lower.loc[lower["kind"] == "deadline", "x"]:
        axes[1].axvline(x, color="C3", lw=0.8, ls=":")
    axes[1].plot([], [], color="C2", alpha=0.3, lw=6, label="a frame runs")
    axes[1].plot([], [], color="C3", ls=":", label="its deadline")
    axes[1].set(xlabel="time (s)", ylabel="clock (MHz)", title="lower level: frame by frame")
    axes[1].margins(x=0)
    axes[1].set_ylim(0, 1.25 * clock["y"].max())
    axes[1].legend(loc="upper center", ncols=3, frameon=True, framealpha=1, edgecolor="none")
    return drawn


@figure("manage_one_optimum")
@figure("manage_two_optimum")
def manage_optimum(table: pd.DataFrame) -> Figure:
    """Energy over that of the clairvoyant optimum, whole board and above idle, means over seeds;
    dashes: the least without foreknowledge, where it is known."""
    drawn, axes = panels(2)
    table = table.assign(board=table["board"] + "\n" + table["points"] + " points")
    table = table.groupby(["board", "scenario"], sort=False).mean(numeric_only=True).reset_index()
    for panel, (column, label, bar) in zip(axes, (
        ("energy_over_oracle", "board energy", 1.05),
        ("above_idle_over_oracle", "energy above idle", 1.15),
    ), strict=True):  # fmt: skip
        sns.stripplot(
            table, x="scenario", y=column, hue="board", dodge=True, jitter=False, size=4, ax=panel
        )
        if column.startswith("above") and table["above_idle_least"].notna().any():
            sns.stripplot(table, x="scenario", y="above_idle_least", hue="board", dodge=True,
                          jitter=False, size=9, marker="_", linewidth=1.2, legend=False,
                          ax=panel)  # fmt: skip
        panel.axhline(1, color="0.3", lw=0.8)
        panel.axhline(bar, color="C3", lw=0.8, ls="--")
        panel.set(xlabel="", ylabel=f"{label} / optimum's")
        handles, labels = panel.get_legend_handles_labels()
        panel.get_legend().remove()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn


@figure("manage_one_knobs")
@figure("manage_two_knobs")
def manage_knobs(table: pd.DataFrame) -> Figure:
    """Energy per on-time frame of every rival over that of the Linux default."""
    table = table.replace({"policy": {"linux": "Linux default"}})
    order = list(dict.fromkeys(table["policy"]))
    drawn, axes = plt.subplots(figsize=(7.2, 0.32 * len(order) + 1.2))
    sns.barplot(table, y="policy", x="energy_over_linux", hue="scenario", order=order,
                errorbar=None, ax=axes)  # fmt: skip
    axes.axvline(1, color="0.3", lw=0.8)
    axes.set(ylabel="", xlabel="board energy per on-time frame / Linux default's")
    sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), title=None)
    for patch, missed in zip(axes.containers, table.groupby("scenario", sort=False), strict=False):
        by_policy = missed[1].set_index("policy")["deadline_miss_pct"].groupby(level=0).mean()
        labels = [f" {by_policy.get(p, 0):.0f} % missed" if by_policy.get(p, 0) > 1 else ""
                  for p in order]  # fmt: skip
        axes.bar_label(patch, labels=labels, fontsize="x-small", color="C3")
    return drawn


@figure("manage_one_timeline")
@figure("manage_two_timeline")
@figure("manage_one_heat")
def manage_timeline(table: pd.DataFrame) -> Figure:
    """One column per policy; of temperature with its trips, latency with its deadline, accuracy,
    clock with its cap, and power over time, those that the table has; grey: a competitor."""
    policies = [p for p in _POLICIES if p in set(table["policy"])]
    series = {what: label for what, label in _SERIES.items() if what in set(table["what"])}
    drawn, axes = plt.subplots(
        len(series), len(policies), figsize=(9.6, 1.6 * len(series)), sharex=True, sharey="row",
        squeeze=False,
    )  # fmt: skip
    for column, policy in enumerate(policies):
        mine = table[table["policy"] == policy]
        for panel, (what, label) in zip(axes[:, column], series.items(), strict=True):
            rows = mine[mine["what"] == what]
            by_frame = what in ("latency_ms", "accuracy_pct")
            steps = {"drawstyle": "default" if what == "temp_c" else "steps-post"}
            style = {"ls": "", "marker": ".", "ms": 3} if by_frame else steps
            names = sorted(set(table.loc[table["what"] == what, "name"]))
            for name, part in rows.groupby("name"):
                values = part["value"] / (1e3 if what == "power_mw" else 1)
                colour = f"C{names.index(name)}"
                panel.plot(part["t_s"], values, **style, color=colour, lw=1, label=name)
            for _, part in mine[mine["what"] == "stretch"].groupby("name"):
                ends = [*part["t_s"].iloc[1:], mine["t_s"].max()]
                for start, end, stretch in zip(part["t_s"], ends, part["value"], strict=True):
                    if stretch > 1:
                        panel.axvspan(start, end, color="0.92", lw=0, zorder=0)
            limits = mine[mine["what"] == _LIMITS.get(what)]
            for name, part in limits.groupby("name"):
                capped = f"{name}, cap" if what == "clock_mhz" else None
                panel.plot(part["t_s"], part["value"], color="C3", lw=1, drawstyle="steps-post",
                           label=capped)  # fmt: skip
            if what == "clock_mhz" and len(names) > 1:
                panel.set_ylim(0)
                panel.legend(loc="lower left", ncols=2)
            if what == "latency_ms":
                panel.set_ylim(0, 1.3 * limits["value"].max())
            if column == 0:
                panel.set_ylabel(label)
        axes[0, column].set_title(_POLICIES[policy])
        axes[-1, column].set_xlabel("time (s)")
        sums = mine[mine["what"] == "summary"].set_index("name")["value"]
        if len(sums):
            p95_ms, missed_pct = sums["latency_p95_ms"], sums["deadline_miss_pct"]
            costs = f"p95 {p95_ms:.0f} ms, {missed_pct:.1f} % missed"
            accuracy = f"mean accuracy {sums['accuracy_mean_pct']:.1f} %"
            axes[0, column].set_title(f"{_POLICIES[policy]}\n{costs}\n{accuracy}")
    if table.loc[table["what"] == "latency_ms", "name"].nunique() > 1:
        shown = axes[[*series].index("latency_ms"), 0]
        handles, labels = shown.get_legend_handles_labels()
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
                panel.set_ylim(0)
            handles, labels = panel.get_legend_handles_labels()
            panel.get_legend().remove()
        row[1].set_title(f"{source} operating points")
    axes[-1, 1].set_xlabel("whisker: standard deviation over seeds")
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(order))
    return drawn


@figure("manage_two_ladder")
def manage_two_ladder(table: pd.DataFrame) -> Figure:
    """On which reading of "energy saved" a published reduction is reached."""
    drawn, axes = plt.subplots(figsize=(7.2, 2.8))
    gap = [table["reduction_pct"] - table["low"], table["high"] - table["reduction_pct"]]
    axes.barh(table["rung"], table["reduction_pct"], xerr=gap, color="C0", height=0.6)
    for i, (value, high) in enumerate(zip(table["reduction_pct"], table["high"], strict=True)):
        axes.text(max(value, high) + 1.5, i, f"{value:.0f} %", va="center")
    published = table["published_pct"].iloc[0]
    axes.axvline(published, color="C3", ls="--", lw=1)
    axes.text(published, -0.75, f"published: {published:.0f} %", color="C3", ha="center")
    axes.set(xlabel="saved against the Linux default (%)", ylabel="", xlim=(0, 108))
    axes.invert_yaxis()
    return drawn


@figure("manage_one_equal")
@figure("manage_two_equal")
def manage_equal(table: pd.DataFrame) -> Figure:
    """What the manager saves at the baseline's accuracy, and what that costs: a small dot per seed,
    the mean large; a row per baseline. Dashed: published."""
    columns = {"energy_reduction_pct": "energy saved (%)",
               "p95_ratio": "p95 latency / baseline's",
               "accuracy_points": "accuracy over baseline's\n(points)",
               "miss_pct": "missed frames (%)\nline: baseline's"}  # fmt: skip
    names = [name for name in dict.fromkeys(table["scenario"]) if name != "published"]
    baselines = list(dict.fromkeys(table["baseline"]))
    goals = {goal: name for goal, name in _GOALS.items() if goal in set(table["policy"])}
    height = (0.32 * len(names) + 0.9) * len(baselines)
    drawn, axes = plt.subplots(len(baselines), len(columns), sharey=True, sharex="col",
                               figsize=(9.6, height), squeeze=False)  # fmt: skip
    for row, baseline in zip(axes, baselines, strict=True):
        rows = table[table["baseline"] == baseline]
        published = rows[rows["scenario"] == "published"]
        rows = rows[rows["scenario"] != "published"]
        for panel, (column, label) in zip(row, columns.items(), strict=True):
            panel.axvline(column == "p95_ratio", color="0.3", lw=0.8, zorder=0)
            for i, (goal, name) in enumerate(goals.items()):
                mine = rows[rows["policy"] == goal]
                shift = 0.2 * (i - (len(goals) - 1) / 2)
                panel.scatter(mine[column], mine["scenario"].map(names.index) + shift, s=7,
                              color=f"C{i}", alpha=0.4, lw=0)  # fmt: skip
                means = mine.groupby("scenario")[column].mean()
                panel.scatter(means, means.index.map(names.index) + shift, s=22, color=f"C{i}",
                              marker="osD^"[i], label=name)  # fmt: skip
            values = published.set_index("policy").get(column, pd.Series(dtype=float)).dropna()
            for who, value in values.items():
                panel.axvline(value, color="0.3", lw=1, ls="--", zorder=0)
                right = value == values.max()
                panel.annotate(f"{who}: {value:g}", (value, -1.0), (3 if right else -3, 0),
                               ha="left" if right else "right", va="top", fontsize="x-small",
                               textcoords="offset points")  # fmt: skip
            if column == "miss_pct":
                base = rows.groupby("scenario")["baseline_miss_pct"].mean()
                panel.scatter(base, base.index.map(names.index), s=200, marker="|", color="0.3")
            panel.set_xlabel(label if baseline == baselines[-1] else "")
            panel.grid(axis="y", lw=0.4)
        row[0].set_ylabel(f"against\n{_POLICIES.get(baseline, baseline)}")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.4, -1.1)
    _, ratio, points, missed = axes[0]
    ratio.set_xscale("log")
    low = 0.8 * table["p95_ratio"].min()
    ticks = [tick for tick in (0.1, 0.5, 1, 2, 4) if tick > low]
    ratio.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ratio.minorticks_off()
    points.set_xlim(-1, 1)
    missed.set_xscale("symlog", linthresh=1)
    missed.set_xticks([0, 1, 10], ["0", "1", "10"])
    missed.set_xlim(-0.15, max(10, 1.3 * table["miss_pct"].max()))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn


@figure("manage_one_sensitivity")
@figure("manage_two_sensitivity")
def manage_sensitivity(table: pd.DataFrame) -> Figure:
    """The saving on boards whose coefficients were drawn apart: a dot per draw, a line over 95 %
    of them, and in how many something is saved."""
    table = table.replace({"floor": _FLOORS})
    floors, scenarios = table["floor"].unique(), list(table["scenario"].unique())
    drawn, axes = plt.subplots(figsize=(1.1 * len(scenarios) + 2.6, 3.6))
    rng = np.random.default_rng(0)
    for i, floor in enumerate(floors):
        for j, name in enumerate(scenarios):
            mine = table[(table["floor"] == floor) & (table["scenario"] == name)]
            saved = mine["energy_reduction_pct"]
            if saved.empty:
                continue
            x = j + (i - (len(floors) - 1) / 2) * 0.4
            axes.scatter(x + rng.uniform(-0.08, 0.08, len(saved)), saved, s=9, color=f"C{i}",
                         alpha=0.6, lw=0, label=floor)  # fmt: skip
            axes.vlines(x, *saved.quantile((0.025, 0.975)), color=f"C{i}", lw=1)
            share = f"{(saved > 0).sum()}/{len(saved)}"
            axes.annotate(share, (x, saved.max()), (0, 4), textcoords="offset points",
                          ha="center", fontsize="x-small", color=f"C{i}")  # fmt: skip
    axes.axhline(0, color="0.3", lw=0.8)
    axes.set_xticks(range(len(scenarios)), scenarios)
    axes.set(
        ylabel="energy saved against\nthe Linux default (%)",
        xlabel="a dot: a board with all coefficients drawn anew; above: how many save energy",
    )
    axes.set_ylim(min(0, axes.get_ylim()[0]), 1.12 * table["energy_reduction_pct"].max())
    if len(floors) > 1:
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        drawn.legend(once.values(), once, loc="outside upper center", ncols=2, markerscale=2)
    return drawn
