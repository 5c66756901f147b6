"""Figures of training recipes and of what sharing weights costs."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from suite.plots.style import WIDE, panels_by, plain_log, series
from suite.record.figures import figure


@figure("recipe_ablation")
def recipe_ablation(table: pd.DataFrame) -> Figure:
    """Validation accuracy over MACs of the same sub-networks, one line per training recipe."""
    drawn, axes = plt.subplots(figsize=WIDE)
    sns.lineplot(
        table.sort_values("macs_m"), x="macs_m", y="accuracy_val_pct", hue="recipe",
        style="recipe", markers=True, dashes=False, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="work (MMACs)", ylabel="validation accuracy (%)")
    axes.set_title("the same sub-networks, trained by different recipes for the same epochs")
    sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return drawn


@figure("alone_gap")
def alone_gap(table: pd.DataFrame) -> Figure:
    """Test accuracy of sub-networks inside a super-network and of their twins trained alone."""
    drawn, by_recipe = panels_by(table, "recipe", sharey=True)
    for recipe, (panel, rows) in by_recipe.items():
        series(panel, rows.sort_values("macs_m"), "macs_m", {
            "supernet_pct": ("in the super-network", "o-"), "alone_pct": ("trained alone", "s-"),
            "distilled_alone_pct": ("trained alone by a teacher", "D-"),
        })  # fmt: skip
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
    """Accuracy of the shipped sub-networks on validation and test images over MACs."""
    drawn, axes = plt.subplots()
    series(axes, table, "macs_m", {
        "accuracy_val_pct": ("validation (used for choosing)", "s--"),
        "accuracy_test_pct": ("test (never used for choosing)", "o-"),
    })  # fmt: skip
    axes.set(xlabel="work (MMACs)", ylabel="accuracy (%)", xscale="log")
    plain_log(axes.xaxis)
    return drawn
