"""Figures of training recipes and of what sharing weights costs."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from suite.plots.style import panels_by, plain_log, series
from suite.record.figures import figure


@figure("recipe_ablation")
def recipe_ablation(table: pd.DataFrame) -> Figure:
    """Accuracy of the same sub-networks under each recipe, over their mean under all recipes from
    the same start; dots: one a seed, the darker, the larger the sub-network; bar: mean; line: from
    the lowest to the highest seed."""
    common = table.groupby(["subnet", "seed"])["accuracy_val_pct"].transform("mean")
    table = table.assign(gain_pp=table["accuracy_val_pct"] - common)
    means = table.groupby("recipe")["gain_pp"].mean().sort_values()
    height = {recipe: i for i, recipe in enumerate(means.index)}
    drawn, axes = plt.subplots(figsize=(7.2, 3.8))
    axes.barh(range(len(means)), means, color="0.88", height=0.7)
    by_seed = table.groupby(["recipe", "seed"])["gain_pp"].mean().unstack().loc[means.index]
    axes.hlines(range(len(means)), by_seed.min(axis=1), by_seed.max(axis=1), color="0.6", lw=5)
    dots = axes.scatter(
        table["gain_pp"], table["recipe"].map(height), c=table["macs_m"], cmap="viridis_r", s=28,
        zorder=3,
    )  # fmt: skip
    axes.axvline(0, color="0.3", lw=0.8)
    axes.set_yticks(range(len(means)), means.index)
    axes.set_xlabel("validation accuracy over the mean of all recipes (points)")
    best, second = means.index[-1], means.index[-2]
    leads = by_seed.loc[best] - by_seed.loc[second]
    axes.set_title(
        f"{best} leads {second} by {leads.mean():.1f} points after the same epochs,\n"
        f"and with {(leads > 0).sum()} of {len(leads)} seeds"
    )
    drawn.colorbar(dots, ax=axes, label="work of the sub-network (MMACs)")
    return drawn


@figure("alone_gap")
def alone_gap(table: pd.DataFrame) -> Figure:
    """Test accuracy of sub-networks inside a super-network and of their twins trained alone: a
    line through the means, a dot a seed."""
    drawn, by_recipe = panels_by(table, "recipe", sharey=True)
    looks = {
        "supernet_pct": ("in the super-network", "o-"), "alone_pct": ("trained alone", "s-"),
        "distilled_alone_pct": ("trained alone by a teacher", "D-"),
    }  # fmt: skip
    for recipe, (panel, rows) in by_recipe.items():
        series(panel, rows.groupby("macs_m")[list(looks)].mean().reset_index(), "macs_m", looks)
        for place, column in enumerate(looks):
            panel.plot(rows["macs_m"], rows[column], ".", color=f"C{place}", markersize=3)
        panel.set(xlabel="work (MMACs)", ylabel="test accuracy (%)", title=recipe)
    return drawn


@figure("training_curve")
def training_curve(table: pd.DataFrame) -> Figure:
    """Validation accuracy of the two ends of the space over training, one panel per run."""
    drawn, by_run = panels_by(table, "run", sharey=True)
    for run, (panel, rows) in by_run.items():
        sns.lineplot(
            rows, x="epoch", y="accuracy_val_pct", hue="sub-network", marker="o", ax=panel,
            markersize=4,
        )  # fmt: skip
        panel.set(xlabel="epoch", ylabel="validation accuracy (%)", title=run)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn


@figure("supernet_accuracy")
def supernet_accuracy(table: pd.DataFrame) -> Figure:
    """Accuracy of the shipped sub-networks on validation and test images over MACs, and of
    static networks."""
    drawn, axes = plt.subplots()
    by_net = dict(list(table.groupby("net")))
    series(axes, by_net.pop("super-network"), "macs_m", {
        "accuracy_val_pct": ("validation (used for choosing)", "s--"),
        "accuracy_test_pct": ("test (never used for choosing)", "o-"),
    })  # fmt: skip
    for (name, rows), look in zip(sorted(by_net.items()), ("C2D", "C3^"), strict=False):
        axes.plot(rows["macs_m"], rows["accuracy_test_pct"], look, ls="", label=f"{name}, test")
    axes.legend(loc="lower right")
    axes.set(xlabel="work (MMACs)", ylabel="accuracy (%)", xscale="log")
    plain_log(axes.xaxis)
    return drawn
