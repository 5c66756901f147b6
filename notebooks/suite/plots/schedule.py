"""Figures of the schedulers: who waits for whom, slowdown against misses, sweeps, batches."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.plots.style import panels, panels_by, plain_log
from suite.record.figures import figure

TITLES = {"attnn": "attention networks, 30 requests/s", "cnn": "convolutional networks, 3/s"}
_SWEEPS = {"slo": "deadline over mean time alone", "rate": "requests per second"}
_COLOURS = {
    "FCFS": "0.75", "SJF": "C9", "PREMA": "C2", "Planaria": "C4", "SDRM3": "C5", "oracle": "C7",
    "single": "0.75", "static": "C5", "adaptive": "C2", "lazy": "C0", "lazy, reclaims": "C9",
    "balanced": "C1", "knee": "C1", "strict": "C3", "fluid": "C1", "fluid, stackable": "C3",
    "Dysta": "C0", "Dysta naive": "C0", "ageing": "C1", "ladder": "C3", "ladder, overload": "C3",
}  # fmt: skip
_BELOW = ("oracle", "SJF", "balanced")  # whose labels have more room there
_OURS = ("balanced", "knee", "strict", "ageing", "ladder")


def _colour(name: str) -> str:
    return _COLOURS.get(name, "0.45")


@figure("schedule_gantt")
def schedule_gantt(table: pd.DataFrame) -> Figure:
    """One panel a scheduler; a line a request from its arrival to its deadline, its runs thick."""
    names = list(dict.fromkeys(table["scheduler"]))
    models = sorted(set(table["model"]))
    colours = dict(zip(models, sns.color_palette(n_colors=len(models)), strict=True))
    drawn, axes = plt.subplots(
        1, len(names), figsize=(9.6, 3.6), sharex=True, sharey=True, squeeze=False
    )
    for panel, name in zip(axes[0], names, strict=True):
        rows = table[table["scheduler"] == name]
        for request, parts in rows.groupby("request"):
            one = parts.iloc[0]
            end_ms = parts["end_ms"].max()
            panel.plot((one["arrival_ms"], end_ms), (request, request), color="0.8", lw=1, zorder=1)
            panel.plot(one["deadline_at_ms"], request, "|", color="0.2", ms=9, zorder=3)
            for part in parts.itertuples():
                panel.barh(request, part.end_ms - part.begin_ms, left=part.begin_ms, height=0.7,
                           color=colours[part.model], lw=0, zorder=2)  # fmt: skip
            if one["late"]:
                panel.plot(end_ms, request, "x", color="C3", ms=6, mew=1.6, zorder=4)
        each = rows.drop_duplicates("request")
        panel.set_title(f"{name}: mean slowdown {each['slowdown'].mean():.1f}, "
                        f"{int(each['late'].sum())} late", fontsize="medium")  # fmt: skip
        panel.set_xlabel("time (ms)")
        panel.set_xlim(0, table["end_ms"].max() * 1.02)
    axes[0][0].set_ylabel("request")
    last = table["request"].max()
    axes[0][0].set_ylim(last + 0.8, 0.2)
    axes[0][0].set_yticks([1, *range(5, last + 1, 5)])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[m], lw=0) for m in models]
    handles.append(plt.Line2D([], [], marker="|", color="0.2", lw=0, ms=9))
    handles.append(plt.Line2D([], [], marker="x", color="C3", lw=0, ms=6, mew=1.6))
    drawn.legend(handles, [*models, "deadline", "late"], loc="outside upper center",
                 ncols=len(models) + 2)  # fmt: skip
    return drawn


@figure("schedule_front")
def schedule_front(table: pd.DataFrame) -> Figure:
    """Mean slowdown over misses, both over Dysta's on the same requests, with 95 % intervals."""
    drawn, by = panels_by(table, "workload", figsize=(9.6, 4.4))
    for workload, (panel, rows) in by.items():
        for row in rows.itertuples():
            if row.role == "bound":
                line = panel.axhline if row.measure == "antt" else panel.axvline
                line(row.antt if row.measure == "antt" else row.violation, color="0.5", lw=0.9,
                     ls="--" if row.measure == "antt" else ":", zorder=0,
                     label=row.scheduler)  # fmt: skip
                continue
            spread = {
                "xerr": [[row.violation - row.violation_low], [row.violation_high - row.violation]],
                "yerr": [[row.antt - row.antt_low], [row.antt_high - row.antt]],
            }
            ours = row.role == "ours"
            panel.errorbar(row.violation, row.antt, **spread, fmt="*" if ours else "o",
                           ms=10 if ours else 5, color=_colour(row.scheduler),
                           elinewidth=0.8)  # fmt: skip
            below = row.scheduler in _BELOW
            left = row.scheduler == "balanced"
            at = (-5 if left else 5, -4 if below else 4)
            panel.annotate(row.scheduler, (row.violation, row.antt), xytext=at,
                           textcoords="offset points", fontsize="small",
                           va="top" if below else "bottom", ha="right" if left else "left",
                           color=_colour(row.scheduler))  # fmt: skip
        panel.plot(1, 1, "s", ms=7, color=_colour("Dysta"))
        panel.annotate("Dysta", (1, 1), xytext=(-5, 5), textcoords="offset points", va="bottom",
                       ha="right", fontsize="small", color=_colour("Dysta"))  # fmt: skip
        panel.set(xscale="log", yscale="log", title=TITLES[workload],
                  xlabel="late requests, over Dysta's")  # fmt: skip
        plain_log(panel.xaxis)
        plain_log(panel.yaxis)
        panel.margins(0.1)
    next(iter(by.values()))[0].set_ylabel("mean slowdown, over Dysta's")
    handles, labels = next(iter(by.values()))[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=2)
    return drawn


@figure("schedule_sweeps")
def schedule_sweeps(table: pd.DataFrame) -> Figure:
    """Misses over the deadline and over the rate, a line a scheduler."""
    drawn, axes = plt.subplots(2, 2, figsize=(9.6, 6.0), sharey=True)
    shown = table.assign(violation_pct=table["violation_pct"].clip(lower=0.01))
    for column, workload in enumerate(TITLES):
        for line, (x, label) in enumerate(_SWEEPS.items()):
            panel = axes[line][column]
            rows = shown[(shown["workload"] == workload) & (shown["sweep"] == x)]
            for name, mine in rows.groupby("scheduler", sort=False):
                ours = name in _OURS
                means = mine.groupby(x)["violation_pct"].mean()
                panel.plot(means.index, means, "*-" if ours else "o-", color=_colour(name),
                           lw=1.8 if ours else 1.0, ms=7 if ours else 4, label=name)  # fmt: skip
            panel.set(yscale="log", xlabel=label, ylim=(0.007, 130))
            if x == "slo":
                panel.set_xscale("log")
                plain_log(panel.xaxis)
            panel.set_xticks(sorted(set(rows[x])), minor=False)
            panel.set_xticks([], minor=True)
            plain_log(panel.yaxis)
            if not line:
                panel.set_title(TITLES[workload])
            if not column:
                panel.set_ylabel("late requests (%; 0.01: none)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=5)
    return drawn


@figure("schedule_overload")
def schedule_overload(table: pd.DataFrame) -> Figure:
    """Misses beyond capacity over the accuracy that is given up for them."""
    drawn, by = panels_by(table, "workload", figsize=(9.6, 3.6), sharey=True)
    titles = {"attnn": "attention networks, 40 requests/s", "cnn": "convolutional networks, 4/s"}
    for workload, (panel, rows) in by.items():
        shown = rows.assign(violation_pct=rows["violation_pct"].clip(lower=0.01))
        for name, mine in shown.groupby("scheduler", sort=False):
            ours = name in ("balanced", "knee") or name.startswith("ladder")
            colour = _colour(name)
            at = mine["drop_pp"].mean(), mine["violation_pct"].mean()
            panel.plot(*at, "*" if ours else "o", ms=10 if ours else 6, color=colour)
            down = -9 if name == "knee" else 3
            panel.annotate(name, at, xytext=(7, down), textcoords="offset points", fontsize="small",
                           color=colour)  # fmt: skip
        panel.set(yscale="log", title=titles[workload], xlabel="accuracy given up (points)")
        panel.set_xlim(-0.05, 0.75)
        plain_log(panel.yaxis)
    next(iter(by.values()))[0].set_ylabel("late requests (%)")
    return drawn


@figure("schedule_energy")
def schedule_energy(table: pd.DataFrame) -> Figure:
    """Energy over the optimum, misses and accuracy given up: a bar a policy, a dot a seed."""
    drawn, axes = panels(3, figsize=(9.6, 3.4))
    measures = (("over_optimum", "energy above idle, over the least"),
                ("violation_pct", "late requests (%)"),
                ("drop_pp", "accuracy given up (points)"))  # fmt: skip
    shown = table.assign(workload=table["workload"].map(
        {"attnn": "attention", "cnn": "convolutional"}
    ))  # fmt: skip
    palette = {"ours": "C3", "EdgeServing": "0.6"}
    for panel, (measure, label) in zip(axes, measures, strict=True):
        options = {"data": shown, "x": "workload", "y": measure, "hue": "policy", "ax": panel}
        sns.barplot(**options, palette=palette, errorbar=None, legend=measure == "over_optimum")
        sns.stripplot(**options, dodge=True, palette=dict.fromkeys(palette, "0.2"), size=3,
                      legend=False)  # fmt: skip
        panel.set(xlabel="", ylabel=label)
        if measure == "over_optimum":
            panel.axhline(1, color="0.3", lw=0.8, ls="--")
            handles, labels = panel.get_legend_handles_labels()
            panel.get_legend().remove()
    drawn.legend(handles, labels, loc="outside upper center", ncols=2)
    return drawn


@figure("fluid_batching")
def fluid_batching(table: pd.DataFrame) -> Figure:
    """Mean latency, tail and misses over the load, a line a way of batching."""
    drawn, axes = panels(3, figsize=(9.6, 3.8))
    measures = (("mean_ms", "mean latency (ms)"), ("p99_ms", "99th percentile (ms)"),
                ("violation_pct", "late requests (%)"))  # fmt: skip
    for panel, (measure, label) in zip(axes, measures, strict=True):
        for name, rows in table.groupby("batching", sort=False):
            means = rows.groupby("load")[measure].mean()
            if measure == "violation_pct":
                means = means.clip(lower=0.01)
            fluid = name.startswith("fluid")
            panel.plot(means.index, means, "o-", ms=4, lw=1.8 if fluid else 1.0,
                       color=_colour(name), label=name)  # fmt: skip
        panel.set(yscale="log", xlabel="load (of full depth, batch 8)", ylabel=label)
        panel.set_xticks(np.round(sorted(set(table["load"]))[::2], 1))
        plain_log(panel.yaxis)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=4)
    return drawn
