"""What the figures have in common."""

import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDE = (9.6, 3.8)


def plain_log(axis) -> None:
    """Label a logarithmic axis with numbers that read like numbers."""
    formatter = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def front(axes, table: pd.DataFrame, x: str, y: str, **style) -> None:
    """Draw a Pareto front as the staircase it is."""
    rows = table.sort_values(x)
    axes.plot(rows[x], rows[y], drawstyle="steps-post", **style)
