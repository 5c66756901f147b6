"""The figure of the panel on which demands are moved by hand."""

import pandas as pd
from matplotlib.figure import Figure

from suite.plots.runtime import manage_timeline
from suite.record.figures import figure


@figure("manage_two_panel")
def manage_two_panel(table: pd.DataFrame) -> Figure:
    """The manager over time, with a line where the demands changed."""
    drawn = manage_timeline(table)
    for axes in drawn.axes:
        axes.axvline(table["changed_s"].iloc[0], color="0.4", lw=0.8, ls=":")
    return drawn
