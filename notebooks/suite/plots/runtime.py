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
_RIVALS = {
    "linux": "Linux default", "reactive": "Dynamic-OFA's loop", "best static": "best fixed setting",
    "clocks only": "manager, clocks alone", "network only": "manager, network alone",
    "placement only": "manager, placement alone",
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
    short dashes: the least without foreknowledge, where it is known."""
    drawn, axes = panels(2)
    table = table.assign(board=table["board"] + "\n" + table["points"] + " points")
    table = table.groupby(["board", "scenario"], sort=False).mean(numeric_only=True).reset_index()
    for panel, (column, label) in zip(axes, (
        ("energy_over_oracle", "board energy"),
        ("above_idle_over_oracle", "energy above idle"),
    ), strict=True):  # fmt: skip
        sns.stripplot(
            table, x="scenario", y=column, hue="board", dodge=True, jitter=False, size=4, ax=panel
        )
        if column.startswith("above") and table["above_idle_least"].notna().any():
            sns.stripplot(table, x="scenario", y="above_idle_least", hue="board", dodge=True,
                          jitter=False, size=9, marker="_", linewidth=1.2, legend=False,
                          ax=panel)  # fmt: skip
        panel.axhline(1, color="0.3", lw=0.8)
        over_pct = 100 * (table[column] - 1)
        panel.set(
            xlabel="", ylabel=f"{label} / optimum's",
            title=f"{over_pct.mean():.0f} % above the optimum in the mean, "
            f"{over_pct.max():.0f} % at worst",
        )  # fmt: skip
        handles, labels = panel.get_legend_handles_labels()
        panel.get_legend().remove()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn


@figure("manage_one_knobs")
@figure("manage_two_knobs")
def manage_knobs(table: pd.DataFrame) -> Figure:
    """Energy per on-time frame of every rival over that of the Linux default, and what it misses: a
    dot per scenario."""
    saved_pct = 100 * (1 - table.groupby("policy")["energy_over_linux"].mean())
    alone_pct = saved_pct[[policy for policy in saved_pct.index if policy.endswith(" only")]]
    table = table.replace({"policy": _RIVALS})
    order = list(dict.fromkeys(table["policy"]))
    columns = {"energy_over_linux": "board energy per on-time frame / Linux default's",
               "deadline_miss_pct": "missed frames (%)\ndashed: 1 %"}  # fmt: skip
    means = table.groupby(["policy", "scenario"], sort=False)[[*columns]].mean().reset_index()
    drawn, axes = plt.subplots(1, 2, figsize=(9.6, 0.36 * len(order) + 1.4), sharey=True)
    for panel, (column, label) in zip(axes, columns.items(), strict=True):
        sns.stripplot(means, y="policy", x=column, hue="scenario", order=order, dodge=True,
                      jitter=False, palette="viridis", size=4, legend=panel is axes[1],
                      ax=panel)  # fmt: skip
        panel.set(xlabel=label, ylabel="")
        panel.grid(axis="y", lw=0.4)
    axes[0].axvline(1, color="0.3", lw=0.8)
    axes[1].axvline(1, color="C3", lw=0.8, ls="--")  # what a baseline may miss
    axes[1].set_xscale("symlog", linthresh=1)
    axes[1].set_xlim(left=-0.1)
    axes[1].xaxis.set_major_formatter("{x:g}")
    sns.move_legend(axes[1], "center left", bbox_to_anchor=(1, 0.5), title=None)
    drawn.suptitle(f"all knobs together save {saved_pct['manager']:.0f} %, "
                   f"the best of them alone {alone_pct.max():.0f} %")  # fmt: skip
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
        missed_pct, mean_w = _missed_and_power(mine)
        costs = f"{missed_pct:.1f} % missed, {mean_w:.1f} W"
        axes[0, column].set_title(f"{_POLICIES[policy]}\n{costs}")
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


def _missed_and_power(rows: pd.DataFrame) -> tuple[float, float]:
    """Of one policy's timeline: the frames dropped or late (%), and the mean power (W)."""
    frames = rows[rows["what"].isin(["latency_ms", "deadline_ms"])]
    frames = frames.pivot_table("value", ["name", "t_s"], "what")
    in_time = frames["latency_ms"] <= frames["deadline_ms"]  # a dropped frame has no latency
    return 100 * (1 - in_time.mean()), rows.loc[rows["what"] == "power_mw", "value"].mean() / 1e3


@figure("manage_one_trace")
def manage_one_trace(table: pd.DataFrame) -> Figure:
    """The trace of Dynamic-OFA's figure 7: latency with the limit, and accuracy, as published and
    of two policies here; grey: a competitor is on the GPU."""
    policies = list(dict.fromkeys(table["policy"]))
    drawn, axes = plt.subplots(2, len(policies), figsize=(9.6, 4.2), sharex=True, sharey="row",
                               height_ratios=(2, 1))  # fmt: skip
    for (latency, accuracy), policy in zip(axes.T, policies, strict=True):
        mine = table[table["policy"] == policy]
        levels, frames = mine[mine["end_s"].notna()], mine[mine["end_s"].isna()]
        for level in levels.itertuples():
            latency.fill_between([level.t_s, level.end_s], level.latency_ms, level.high_ms,
                                 color="C0", lw=0, alpha=0.7)  # fmt: skip
            accuracy.hlines(level.accuracy_pct, level.t_s, level.end_s, color="C0", lw=3)
        late = frames["latency_ms"] > frames["deadline_ms"]
        for rows, colour in ((frames[~late], "C0"), (frames[late], "C3")):
            latency.plot(rows["t_s"], rows["latency_ms"], ".", ms=4, color=colour)
        accuracy.plot(frames["t_s"], frames["accuracy_pct"], ".", ms=4, color="C0")
        latency.axhline(mine["deadline_ms"].iloc[0], color="C3", lw=1)
        for panel in (latency, accuracy):
            panel.axvspan(2.5, 10, color="0.93", lw=0, zorder=0)
        again_s = mine["recovery_s"].iloc[0]
        latency.set_title(f"{policy}:\nin time again after {again_s:.1f} s")
        accuracy.set_xlabel("time (s)")
    axes[0, 0].set(ylabel="latency (ms)\nline: 60 ms allowed", xlim=(0, 10))
    axes[1, 0].set_ylabel("top-1 (%)")
    return drawn


@figure("manage_one_energy")
@figure("manage_two_energy")
def manage_energy(table: pd.DataFrame) -> Figure:
    """What every policy takes, delivers and misses: a small dot per seed, the mean large; a row per
    set of operating points."""
    columns = {"energy_per_frame_mj": "board energy per\non-time frame (mJ)",
               "accuracy_mean_pct": "mean accuracy (%)",
               "latency_p95_ms": "p95 latency (ms)",
               "deadline_miss_pct": "missed frames (%)\ndashed: 1 %"}  # fmt: skip
    points = list(dict.fromkeys(table["points"]))
    names = {of: list(dict.fromkeys(table.loc[table["points"] == of, "scenario"])) for of in points}
    heights = [len(names[of]) for of in points]
    drawn, axes = plt.subplots(
        len(points), len(columns), figsize=(9.6, 0.55 * sum(heights) + 0.7 * len(points) + 0.6),
        sharey="row", squeeze=False, height_ratios=heights,
    )  # fmt: skip
    shown = {policy: name for policy, name in _POLICIES.items() if policy in set(table["policy"])}
    for row, of in zip(axes, points, strict=True):
        mine = table[table["points"] == of]
        for panel, (column, label) in zip(row, columns.items(), strict=True):
            _seeds_and_means(panel, mine, column, names[of], shown)
            panel.set_xlabel(label if of == points[-1] else "")
            panel.grid(axis="y", lw=0.4)
        energy, *_, missed = row
        energy.margins(x=0.15)  # lest the largest marker is cut
        energy.set_xlim(0)
        missed.axvline(1, color="0.3", lw=0.8, ls="--")
        missed.set_xlim(left=-0.05)
        energy.set_yticks(range(len(names[of])), names[of])
        energy.set_ylim(len(names[of]) - 0.4, -0.6)
        energy.set_ylabel(f"{of}\noperating points")
    drawn.suptitle(_saved_for(table[table["points"] == points[0]]), fontsize="medium")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=len(labels))
    return drawn


def _saved_for(table: pd.DataFrame) -> str:
    """What the manager saves and gives up against the Linux default, over scenarios, in words."""
    means = table.groupby(["policy", "scenario"]).mean(numeric_only=True)
    linux, manager = means.loc["linux"], means.loc["manager"]
    saved_pct = 100 * (1 - manager["energy_per_frame_mj"] / linux["energy_per_frame_mj"])
    lost = linux["accuracy_mean_pct"] - manager["accuracy_mean_pct"]
    return (
        f"for least energy the manager saves {saved_pct.min():.0f} to {saved_pct.max():.0f} % and "
        f"gives up {max(lost.min(), 0):.1f} to {lost.max():.1f} points of accuracy"
    )


def _seeds_and_means(panel, table: pd.DataFrame, column: str, scenarios, policies) -> None:
    """A line per scenario and a marker per policy (key -> name): seeds small, their mean large."""
    for i, (policy, name) in enumerate(policies.items()):
        mine = table[table["policy"] == policy]
        shift = 0.2 * (i - (len(policies) - 1) / 2)
        seeds_y = mine["scenario"].map(scenarios.index) + shift
        panel.scatter(mine[column], seeds_y, s=7, color=f"C{i}", alpha=0.4, lw=0)
        means = mine.groupby("scenario")[column].mean()
        means_y = means.index.map(scenarios.index) + shift
        panel.scatter(means, means_y, s=22, color=f"C{i}", marker="osD^"[i], label=name)


@figure("manage_two_ladder")
def manage_two_ladder(table: pd.DataFrame) -> Figure:
    """On which reading of "energy saved" a published reduction is reached."""
    drawn, axes = plt.subplots(figsize=(7.2, 2.8))
    gap = [table["reduction_pct"] - table["low"], table["high"] - table["reduction_pct"]]
    axes.barh(table["rung"], table["reduction_pct"], xerr=gap, color="C0", height=0.6)
    for i, (value, low) in enumerate(zip(table["reduction_pct"], table["low"], strict=True)):
        label = f"{value:.0f} %"
        axes.text(min(value, low) - 1.5, i, label, color="white", ha="right", va="center")
    published = table["published_pct"].iloc[0]
    axes.axvline(published, color="C3", ls="--", lw=1)
    axes.text(published + 1.5, 0, f"published\n{published:.0f} %", color="C3", va="center")
    axes.set(xlabel="saved against the Linux default (%)", ylabel="", xlim=(0, 108))
    most_pct = table["reduction_pct"].max()
    verdict = "reached" if most_pct >= published else "not reached"
    axes.set_title(f"up to {most_pct:.0f} %; the published {published:.0f} % is {verdict}")
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
            _seeds_and_means(panel, rows, column, names, goals)
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
    against, goal = baselines[0], next(iter(goals))
    mine = table[(table["baseline"] == against) & (table["policy"] == goal)]
    means = mine.groupby("scenario")[["energy_reduction_pct", "p95_ratio"]].mean()
    slower = means["p95_ratio"]
    drawn.suptitle(
        f"{goals[goal]}: {means['energy_reduction_pct'].mean():.0f} % saved against the "
        f"{_POLICIES.get(against, against)} in the mean, at {slower.min():.1f} to "
        f"{slower.max():.1f} times its p95",
        fontsize="medium",
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=len(labels))
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
