"""Figure of what readers make of damaged files."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from suite.record.figures import figure

# Outcome -> what is said of it, and its colour.
OUTCOMES = {
    "taken": ("read all the same", "C0"),
    "refused": ("refused as declared", "0.8"),
    "undeclared": ("another error", "C3"),
    "hang": ("no end", "k"),
}


@figure("reader_outcomes")
def reader_outcomes(table: pd.DataFrame) -> Figure:
    """What each reader makes of mutated files, in % of its inputs, and the slowest of them."""
    table = table.sort_values("taken", ascending=False, key=lambda taken: taken / table["inputs"])
    drawn, axes = plt.subplots(figsize=(7.6, 0.27 * len(table) + 1.4))
    left = pd.Series(0.0, table.index)
    for outcome, (label, colour) in OUTCOMES.items():
        share_pct = 100 * table[outcome] / table["inputs"]
        axes.barh(table["reader"], share_pct, left=left, color=colour, height=0.7, label=label)
        left += share_pct
    for place, row in enumerate(table.itertuples()):
        slowest = (
            f"{row.slowest_ms:.3g} ms" if row.slowest_ms < 1e3 else f"{row.slowest_ms / 1e3:.1f} s"
        )
        text = f"{row.inputs:,} inputs, slowest {slowest}"
        axes.annotate(text, (101, place), va="center", fontsize="small", annotation_clip=False)
    wrong = int(table["undeclared"].sum() + table["hang"].sum())
    axes.set_title(f"{table['inputs'].sum():,} damaged files, {wrong} surprises")
    axes.set(xlabel="inputs (%)", xlim=(0, 100))
    axes.tick_params(axis="y", length=0)
    drawn.legend(loc="outside upper center", ncols=4)
    return drawn
