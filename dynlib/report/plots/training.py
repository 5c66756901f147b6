"""Figures of training recipes and of what sharing weights costs."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dynlib.report.figures import figure
from dynlib.report.plots.style import WIDE


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
    """Test accuracy of sub-networks inside the super-network and of their twins trained alone."""
    kinds = {
        "supernet_pct": "in the super-network", "alone_pct": "trained alone",
        "distilled_alone_pct": "trained alone by a teacher",
    }  # fmt: skip
    drawn, axes = plt.subplots(figsize=WIDE)
    rows = table.sort_values("macs_m")
    for (column, label), marker in zip(kinds.items(), "osD", strict=True):
        axes.plot(rows["macs_m"], rows[column], marker=marker, label=label)
    axes.set(xlabel="work (MMACs)", ylabel="test accuracy (%)")
    axes.set_title(f"{len(rows)} networks: one set of weights against one training each")
    axes.legend()
    return drawn
