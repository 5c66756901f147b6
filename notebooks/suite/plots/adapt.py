"""Figures of networks that adapt to their input."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from suite.plots.style import WIDE, panels, panels_by, plain_log
from suite.record.figures import figure

_LOOKS = {
    "static sub-networks": ("0.35", "s"),
    "cascade": ("C0", "o"),
    "cascade, shared weights": ("C9", "o"),
    "exits": ("C1", "^"),
    "joint exits": ("C2", "v"),
    "width gate": ("C3", "D"),
}


@figure("adapt_front")
def adapt_front(table: pd.DataFrame) -> Figure:
    """Accuracy over measured time of an image, one panel a batch size, all methods on one axis."""
    drawn, by_batch = panels_by(table, "batch", sharey=True)
    for batch, (panel, mine) in by_batch.items():
        for method, (color, marker) in _LOOKS.items():
            rows = mine[mine["method"] == method].sort_values("latency_ms")
            panel.plot(
                rows["latency_ms"], rows["accuracy_test_pct"], color=color, marker=marker,
                markersize=4.5, lw=1.1, label=method,
            )  # fmt: skip
        chosen = mine[mine["chosen"]]
        panel.scatter(
            chosen["latency_ms"], chosen["accuracy_test_pct"], s=110, facecolors="none",
            edgecolors="0.1", lw=1, label="chosen on validation images", zorder=5,
        )  # fmt: skip
        several = "one image at a time" if batch == 1 else f"{batch} images at a time"
        panel.set(xlabel="measured time of an image (ms, one thread)", title=several)
        panel.set(xscale="log")
        plain_log(panel.xaxis)
    drawn.axes[0].set_ylabel("test accuracy (%)")
    handles = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=3, fontsize="small")
    return drawn


@figure("adapt_time")
def adapt_time(table: pd.DataFrame) -> Figure:
    """Work and time of each method, as shares of the largest network's."""
    drawn, axes = plt.subplots(figsize=WIDE)
    methods = list(dict.fromkeys(table["method"]))
    measures = list(dict.fromkeys(table["measure"]))
    colors = ["0.4", *(f"C{i}" for i in range(len(measures) - 1))]
    mine = table.groupby("method")["share"]
    below = mine.cumcount() - (mine.transform("size") - 1) / 2  # around the method's line
    heights = table["method"].map(methods.index) + 0.12 * below
    for measure, color in zip(measures, colors, strict=True):
        rows = table["measure"] == measure
        axes.plot(table["share"][rows], heights[rows], "o", color=color, label=measure)
    axes.axvline(1, color="0.3", lw=0.8, ls="--")
    axes.set_yticks(range(len(methods)), methods)
    axes.grid(color="0.9")
    axes.set(xlabel="share of the largest network's", xlim=(0, None))
    axes.set_ylim(len(methods) - 0.5, -0.5)  # the first on top
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


@figure("adapt_difficulty")
def adapt_difficulty(table: pd.DataFrame) -> Figure:
    """Work spent on the images of each decile of known difficulty."""
    drawn, axes = plt.subplots(figsize=(6.4, 3.4))
    bars = axes.bar(table["decile"], table["share"], color="C0")
    axes.bar_label(bars, fmt="%.2f", fontsize="small")
    axes.set_xticks(table["decile"])
    axes.set(
        xlabel="decile of difficulty, easiest first",
        ylabel="mean work of an image\n(share of the largest network's)",
    )
    return drawn


@figure("adapt_images")
def adapt_images(table: pd.DataFrame) -> Figure:
    """Images that the first network answers surest, and those it is least sure of."""
    groups = list(dict.fromkeys(table["group"]))
    count = table["place"].max() + 1
    drawn, axes = plt.subplots(len(groups), count, figsize=(9.6, 2.7))
    for axis, row in zip(axes.flat, table.itertuples(), strict=True):
        axis.imshow(Image.open(io.BytesIO(base64.b64decode(row.image))))
        color = "0.2" if row.answer == row.label else "C3"
        axis.set_title(f"{row.answer}", fontsize="x-small", color=color)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    for line, group in zip(axes, groups, strict=True):
        line[0].set_ylabel(group, fontsize="small")
    return drawn


@figure("adapt_knob")
def adapt_knob(table: pd.DataFrame) -> Figure:
    """What the manager serves with while the time for a frame changes."""
    drawn, axes = plt.subplots(2, 1, figsize=(7.6, 4.0), sharex=True, height_ratios=(1, 1.4))
    axes[0].step(table["t_s"], table["period_ms"], where="post", color="0.35")
    axes[0].set_ylabel("a frame every (ms)")
    order = table.sort_values("accuracy_val_pct")["point"]
    points = list(dict.fromkeys([*order]))
    levels = table["point"].map(points.index)
    axes[1].step(table["t_s"], levels, where="post", color="C0")
    axes[1].set_yticks(range(len(points)), points)
    axes[1].set(xlabel="time (s)", ylim=(-0.4, len(points) - 0.6))
    return drawn


@figure("adapt_parts")
def adapt_parts(table: pd.DataFrame) -> Figure:
    """Time of ResNet-50's stages of which half runs, over that of the whole stage."""
    drawn, (left, right) = panels(2, sharey=True, width_ratios=(1.5, 1))
    counted = table[table["counted"]]
    stages = list(dict.fromkeys(counted["pixels"]))
    modes = list(dict.fromkeys(counted["mode"]))
    width = 0.8 / len(modes)
    for number, mode in enumerate(modes):
        ratios = counted[counted["mode"] == mode].set_index("pixels")["ratio"].reindex(stages)
        at = np.arange(len(stages)) + (number - (len(modes) - 1) / 2) * width
        bars = left.bar(at, ratios, 0.92 * width, color=f"C{number}", label=mode)
        left.bar_label(bars, fmt="%.2f", fontsize="x-small", padding=1)
    left.set_xticks(range(len(stages)), [f"{pixels} px" for pixels in stages])
    left.set(xlabel="maps of the stage", ylabel="time over the whole stage's")
    left.legend(loc="upper left", ncols=2, fontsize="small")
    left.set_ylim(0, 1.25 * max(1, table["ratio"].max()))
    spatial = table[table["mode"] == "spatial"]
    for number, (pixels, rows) in enumerate(spatial.groupby("pixels", sort=False)):
        rows = rows.sort_values("size")
        right.plot(rows["size"], rows["ratio"], f"C{number + 4}o-", label=f"{pixels} px")
    right.set(xscale="log", xlabel="side S of a patch (pixels)")
    plain_log(right.xaxis)
    right.legend(fontsize="small", title="half of all patches")
    for panel in (left, right):
        panel.axhline(1, color="0.3", lw=0.8, ls="--")
    return drawn


@figure("decide_gate")
def decide_gate(table: pd.DataFrame) -> Figure:
    """Accuracy lost over work: gates, exits, the cascade, frozen and trained; a line a seed."""
    drawn, axes = plt.subplots(figsize=WIDE)
    looks = {"gate": ("C3", "D"), "exits": ("C1", "^"), "cascade": ("C0", "o")}
    for (kind, _), rows in table.groupby(["kind", "seed"], sort=False):
        color, marker = looks[kind.split(",")[0]]
        rows = rows.sort_values("macs_ratio")
        style = {"frozen": ":", "slices": "-.", "cascade": "-", "trained": "-", "anew": "--"}[
            kind.split(", ")[-1]
        ]
        axes.plot(rows["macs_ratio"], -rows["drop_pp"], color=color, marker=marker, ls=style,
                  markersize=4, lw=1, label=kind, mfc="none" if style == ":" else None)  # fmt: skip
    axes.axhline(0, color="0.7", lw=0.8, zorder=0)
    axes.axhline(-0.3, color="0.7", lw=0.8, ls=":", zorder=0)
    axes.set(xlabel="work (share of the largest network's)",
             ylabel="test accuracy against\nthe largest network (points)",
             title="dotted: 0.3 points lost")  # fmt: skip
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


@figure("decide_masks")
def decide_masks(table: pd.DataFrame) -> Figure:
    """Accuracy over measured time: what maskers skip, and static networks that lack it always."""
    drawn, by_set = panels_by(table, "dataset")
    for name, (panel, rows) in by_set.items():
        control = rows[rows["kind"] == "control"]
        for family, color, said in (("depth", "0.35", "blocks taken away"),
                                    ("width", "0.65", "channels taken away")):  # fmt: skip
            static = pd.concat([control, rows[rows["kind"].str.startswith(family)]])
            static = static.sort_values("latency_ms")
            panel.plot(static["latency_ms"], static["accuracy_test_pct"], "s-", color=color,
                       markersize=4, lw=1, label=f"static, {said}")  # fmt: skip
        for mode, look in (("layer", "C0o"), ("channel", "C1^")):
            mine = rows[rows["kind"] == mode]
            panel.plot(mine["latency_ms"], mine["accuracy_test_pct"], look, ls="", markersize=8,
                       label=f"maskers, {mode}")  # fmt: skip
        panel.plot(control["latency_ms"], control["accuracy_test_pct"], "kx", ls="", markersize=8,
                   label="control, all runs")  # fmt: skip
        panel.set(xlabel="measured time of an image (ms, one thread)", title=name)
    drawn.axes[0].set_ylabel("test accuracy (%)")
    handles = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=3, fontsize="small")
    return drawn


@figure("decide_work")
def decide_work(table: pd.DataFrame) -> Figure:
    """What share of the work images take: were all alike, the network would be a static one."""
    drawn, by_set = panels_by(table, "dataset", sharey=True)
    for name, (panel, rows) in by_set.items():
        for mode, color in (("layer", "C0"), ("channel", "C1")):
            work = rows.loc[rows["mode"] == mode, "work"]
            if work.empty:
                continue
            panel.hist(work, bins=25, range=(0, 1), color=color, alpha=0.6, density=True,
                       label=f"{mode}: {work.mean():.2f} ± {work.std():.2f}")  # fmt: skip
        panel.set(xlabel="work of an image (share of the dense network's)", title=name)
        if panel.has_data():
            panel.legend(title="mean ± spread")
    drawn.axes[0].set_ylabel("images (density)")
    return drawn


@figure("decide_vit")
def decide_vit(table: pd.DataFrame) -> Figure:
    """Accuracy over work of a transformer's routes, and of what chooses among them."""
    drawn, axes = plt.subplots()
    looks = {"route": ("0.5", "s", "-"), "gate": ("C3", "D", ""), "cascade": ("C0", "o", ""),
             "exit": ("C1", "^", "")}  # fmt: skip
    names = {
        "route": "a route for all images",
        "gate": "gate, one dot a seed",
        "cascade": "cascade, smallest to largest",
        "exit": "exit behind the first block",
    }
    for method, (color, marker, style) in looks.items():
        rows = table[table["method"] == method].sort_values("macs_m")
        axes.plot(rows["macs_m"], rows["accuracy_pct"], color=color, marker=marker, ls=style,
                  label=names[method])  # fmt: skip
    axes.set(xlabel="mean work of an image (MMACs)", ylabel="test accuracy (%)")
    axes.legend(loc="lower right")
    return drawn
