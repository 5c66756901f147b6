"""Figures of a user's own model."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from suite.record.figures import figure


@figure("own_model_tradeoff")
def own_model_tradeoff(table: pd.DataFrame) -> Figure:
    """Test accuracy over measured latency of sub-networks of a pretrained model: with the weights
    it came with, and trained together; dashed: a half and a third of its latency."""
    drawn, axes = plt.subplots()
    table = table.sort_values("latency_ms")
    minutes = table["minutes"].iloc[0]
    spent = f"{minutes:.0f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"
    for column, label, look in (
        ("accuracy_before_pct", "with the weights it came with", "s--"),
        ("accuracy_test_pct", f"after {spent} of fine-tuning", "o-"),
    ):
        axes.plot(table["latency_ms"], table[column], look, label=label, markersize=5)
    full_ms, full_pct = table[["latency_ms", "accuracy_test_pct"]].iloc[-1]
    for share, name in ((1 / 2, "half"), (1 / 3, "a third")):
        axes.axvline(share * full_ms, color="0.6", lw=0.8, ls="--", zorder=0)
        axes.annotate(
            name, (share * full_ms, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom"
        )
    fast = table[table["latency_ms"] <= full_ms / 2]
    title = "No size takes half of the time"
    if len(fast):
        best_pct = fast.loc[fast["accuracy_val_pct"].idxmax(), "accuracy_test_pct"]
        title = f"In half of the time {best_pct:.1f} % instead of {full_pct:.1f} %"
    axes.set_title(title, pad=18)
    axes.set(xlabel="latency of one photo (ms)", ylabel="test accuracy (%)", xlim=(0, None))
    axes.legend(loc="lower right")
    return drawn
