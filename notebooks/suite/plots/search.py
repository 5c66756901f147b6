"""Figures of the searches: fronts, hypervolumes, the networks found, and the predictor."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from suite.plots.style import WIDE, draw_front, panels, panels_by, plain_log
from suite.record.figures import figure


@figure("jetson_front")
def jetson_front(table: pd.DataFrame) -> Figure:
    """Fronts of all seeds with the published search's points, and the gain at its constraints."""
    drawn, axes = plt.subplots(1, 2, figsize=WIDE, width_ratios=(3, 2))
    points, gains = (table[table["what"] == what] for what in ("point", "gain"))
    for i, (search, rows) in enumerate(points.groupby("search", sort=False)):
        color = f"C{i}"
        axes[0].plot([], [], "o-" if i else "s", color=color, label=search, markersize=4)
        for _, mine in rows.groupby("seed"):
            if i:
                draw_front(
                    axes[0], mine, "latency_ms", "accuracy_pct", color=color, lw=0.8, alpha=0.7
                )
            else:
                axes[0].plot(mine["latency_ms"], mine["accuracy_pct"], "s", color=color, ms=4)
    axes[0].set(xlabel="sum of the latency table (ms)", ylabel="predicted accuracy (%)")
    axes[0].set_xlim(points["latency_ms"].min() - 1, points["latency_ms"].max() + 1)
    axes[0].legend(loc="lower right")
    if gains.empty:
        axes[1].text(0.5, 0.5, "the published tables are not here", ha="center", va="center")
        axes[1].set_axis_off()
        return drawn
    sns.stripplot(
        gains, x="latency_ms", y="accuracy_pct", native_scale=True, color="C1", jitter=False,
        ax=axes[1],
    )  # fmt: skip
    axes[1].axhline(0, color="C0", lw=1)
    axes[1].set(xlabel="latency constraint (ms)", ylabel="gain over the published search (points)")
    axes[1].set_title("one dot a seed")
    return drawn


@figure("jetson_hypervolume")
def jetson_hypervolume(table: pd.DataFrame) -> Figure:
    """Hypervolume of each search over the seconds that it has spent."""
    drawn, axes = plt.subplots()
    sns.lineplot(
        table, x="seconds", y="hypervolume", hue="search", style="search", units="seed",
        estimator=None, markers=True, dashes=False, lw=1, markersize=5, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="seconds of search (published: wall time, here: process time)", xscale="log")
    axes.set_ylabel("hypervolume, share of the best")
    plain_log(axes.xaxis)
    sns.move_legend(axes, "center left", title=None)
    return drawn


_PARTS = {"depth": "blocks", "kernel": "mean kernel (px)", "expand": "mean expansion"}


@figure("jetson_patterns")
def jetson_patterns(table: pd.DataFrame) -> Figure:
    """What the networks along each unit's front look like, from the fastest to the slowest: mean of
    the five stages, in tenths of the front."""
    table = table.assign(place_pct=100 * table.groupby("unit")["latency_ms"].rank(pct=True))
    table["place_pct"] = (table["place_pct"] // 10.001) * 10 + 5
    drawn, axes = panels(len(_PARTS), figsize=(9.6, 3.6))
    looks = {"gpu": ("C2", "o-"), "cpu": ("#333333", "s--")}  # apart in lightness too
    for panel, (part, label) in zip(axes, _PARTS.items(), strict=True):
        rows = table[table["part"] == part]
        for unit, mine in rows.groupby("unit", sort=False):
            colour, look = looks[unit]
            means = mine.groupby("place_pct")["value"].mean()
            panel.plot(means, look, color=colour, ms=4, label=f"front of the {unit.upper()}")
        by_unit = rows.groupby("unit")["value"].mean()
        panel.set(
            xlabel="place on the front (%),\nfastest to slowest", ylabel=f"{label}, mean of stages",
            title=f"GPU {by_unit['gpu']:.1f}, CPU {by_unit['cpu']:.1f}", xlim=(0, 100),
        )  # fmt: skip
    axes[0].legend()
    depth, kernel, expand = (
        table[table["part"] == part].groupby("unit")["value"].mean() for part in _PARTS
    )
    drawn.suptitle(
        f"networks for the CPU are {'deeper' if depth['cpu'] > depth['gpu'] else 'shallower'}, "
        f"with {'smaller' if kernel['cpu'] < kernel['gpu'] else 'larger'} kernels, and "
        f"{'narrower' if expand['cpu'] < expand['gpu'] else 'wider'} than those for the GPU",
        fontsize="medium",
    )
    return drawn


@figure("jetson_families")
def jetson_families(table: pd.DataFrame) -> Figure:
    """Each unit's own front, and the other unit's family run on it."""
    drawn, by_unit = panels_by(table, "unit", sharey=True)
    for unit, (panel, mine) in by_unit.items():
        for i, (family, rows) in enumerate(mine.groupby("family")):
            draw_front(panel, rows, "latency_ms", "accuracy_pct", color=f"C{i}", lw=1.2,
                  label=f"found for the {family.upper()}")  # fmt: skip
        panel.set(xlabel=f"sum of the {unit.upper()}'s latency table (ms)", title=unit.upper())
        panel.legend(loc="lower right")
    drawn.axes[0].set_ylabel("predicted accuracy (%)")
    return drawn


@figure("jetson_operations")
def jetson_operations(table: pd.DataFrame) -> Figure:
    """Published levels of Dynamic-OFA and of AutoSlim: accuracy over multiply-accumulates."""
    drawn, axes = plt.subplots()
    series = table.groupby("series", sort=False)
    for (name, rows), look in zip(series, ("o-", "s--"), strict=True):
        axes.plot(rows["macs_m"], rows["accuracy_pct"], look, ms=4, lw=1,
                  label=f"{name}, {len(rows)} levels")  # fmt: skip
    (_, levels), (rival, rows) = series
    best = rows.loc[rows["accuracy_pct"].idxmax()]
    equal_m = np.interp(best["accuracy_pct"], levels["accuracy_pct"], levels["macs_m"])
    axes.set(
        xlabel="multiply-accumulates as published (millions)", ylabel="top-1 accuracy (%)",
        xlim=(0, None),
        title=f"as accurate as {rival} with {100 * (1 - equal_m / best['macs_m']):.0f} % less work",
    )  # fmt: skip
    axes.legend(loc="lower right")
    return drawn


@figure("jetson_board")
def jetson_board(table: pd.DataFrame) -> Figure:
    """Every published series on the board, and the front found here mapped to board time; its band
    is the largest leave-one-out error of the mapping."""
    names = list(dict.fromkeys(table["series"]))
    drawn, by_unit = panels_by(table, "unit")
    for unit, (panel, mine) in by_unit.items():
        for i, name in enumerate(names):
            rows = mine[mine["series"] == name].sort_values("latency_ms")
            found = rows["low"].notna().any()
            look = {"color": "black", "lw": 2} if found else {"marker": "o", "lw": 0.8, "ms": 3}
            if found:
                # Solid between the published levels that the lines were fitted to.
                panel.plot(rows["latency_ms"], rows["accuracy_pct"], color="black", lw=1, ls=":",
                           label="beyond the levels known")  # fmt: skip
                known = rows["extrapolated"].astype(float) == 0
                rows = rows.assign(accuracy_pct=rows["accuracy_pct"].where(known))
            panel.plot(rows["latency_ms"], rows["accuracy_pct"], **{"color": f"C{i}"} | look,
                       label=name)  # fmt: skip
            if found:
                panel.fill_between(
                    rows["latency_ms"], rows["low"], rows["high"], color="black", alpha=0.15, lw=0
                )
        panel.set(xlabel="latency on the board (ms)", ylabel="top-1 accuracy (%)", xscale="log")
        panel.set_title(unit.upper())
        plain_log(panel.xaxis)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right center")
    return drawn


@figure("search_predictor")
def search_predictor(table: pd.DataFrame) -> Figure:
    """Predicted against measured accuracy of sub-networks that the predictor has not seen."""
    drawn, axes = plt.subplots(figsize=(4.8, 4.2))
    drawn_points = axes.scatter(
        table["predicted_pct"], table["accuracy_val_pct"], c=table["macs_m"], s=14, cmap="viridis"
    )
    axes.errorbar(
        table["predicted_pct"], table["accuracy_val_pct"], table["noise_pct"], fmt="none",
        ecolor="0.8", lw=0.6, zorder=0,
    )  # fmt: skip
    ends = table["predicted_pct"].min(), table["predicted_pct"].max()
    axes.plot(ends, ends, color="0.4", lw=0.8)
    axes.set(xlabel="predicted accuracy (%)", ylabel="measured accuracy (%), ± one standard error")
    drawn.colorbar(drawn_points, label="work (MMACs)")
    return drawn


@figure("search_front")
def searchfront(table: pd.DataFrame) -> Figure:
    """Every trial and the front, one panel per pair of objectives."""
    drawn, by_cost = panels_by(table, "cost", sharey=True)
    for cost, (panel, rows) in by_cost.items():
        panel.scatter(rows["value"], rows["accuracy_val_pct"], s=10, color="0.7", label="trial")
        best = rows[rows["on_front"]]
        draw_front(panel, best, "value", "accuracy_val_pct", color="C0", lw=1)
        panel.scatter(best["value"], best["accuracy_val_pct"], s=22, color="C0", label="front")
        panel.set(xlabel=cost, ylabel="validation accuracy (%)")
    drawn.axes[0].legend(loc="lower right")
    return drawn


@figure("search_dials")
def search_dials(table: pd.DataFrame) -> Figure:
    """Every sub-network, the front, the one that was picked, and what would be better for it."""
    drawn, by_cost = panels_by(table, "cost", sharey=True)
    for cost, (panel, rows) in by_cost.items():
        by_role = dict(list(rows.groupby("role")))
        (mine,) = by_role["picked"].itertuples()
        best = rows[rows["role"].ne("space")].sort_values("value")
        best = best[best["accuracy_val_pct"] >= best["accuracy_val_pct"].cummax()]
        panel.scatter(rows["value"], rows["accuracy_val_pct"], s=4, color="0.8", label="all")
        draw_front(panel, best, "value", "accuracy_val_pct", color="C0", lw=1, label="front")
        panel.scatter(mine.value, mine.accuracy_val_pct, s=60, color="C1", label="picked", zorder=3)
        said = f"picked: {mine.accuracy_val_pct:.1f} % for {mine.value:.3g}"
        for other in by_role.get("better", rows[:0]).itertuples():
            more = other.accuracy_val_pct - mine.accuracy_val_pct
            panel.scatter(
                other.value, other.accuracy_val_pct, s=60, marker="D", color="C0", zorder=3,
                label="most accurate for no more",
            )  # fmt: skip
            said += f"\n{other.subnet}: {more:+.1f} points for {other.value:.3g}"
        panel.set(xlabel=cost, ylabel="validation accuracy (%)", title=said)
    drawn.axes[0].legend(loc="lower right")
    return drawn


@figure("search_hypervolume")
def search_hypervolume(table: pd.DataFrame) -> Figure:
    """Hypervolume over trials: mean over seeds, and the band of one standard error."""
    drawn, axes = plt.subplots()
    sns.lineplot(
        table.assign(trial=table["trial"] + 1), x="trial", y="hypervolume", hue="sampler",
        style="sampler", errorbar="se", ax=axes,
    )  # fmt: skip
    seeds = table["seed"].nunique()
    axes.set(xlabel="trials", ylabel="hypervolume, share of the best")
    axes.set_title(f"mean of {seeds} seeds, band: standard error")
    return drawn
