"""What the figures have in common."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDE = (9.6, 3.8)


def plain_log(axis) -> None:
    """Label a logarithmic axis with numbers that read like numbers."""
    formatter = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def plain_decades(axis) -> None:
    """The same for an axis over so many decades that powers of ten are enough."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def panels(count: int, **options) -> tuple[Figure, list]:
    """A wide figure with `count` axes beside each other."""
    drawn, axes = plt.subplots(1, count, **{"figsize": WIDE, "squeeze": False} | options)
    return drawn, list(axes[0])


def panels_by(table: pd.DataFrame, column: str, **options) -> tuple[Figure, dict]:
    """One panel beside the other for each value of a column: value -> (axes, its rows)."""
    names = list(dict.fromkeys(table[column]))
    drawn, axes = panels(len(names), **options)
    return drawn, {
        name: (panel, table[table[column] == name])
        for name, panel in zip(names, axes, strict=True)
    }  # fmt: skip


def series(axes, table: pd.DataFrame, x: str, looks: Mapping[str, tuple[str, str]]) -> None:
    """Draw columns of a table over `x`, each with its (label, format)."""
    for column, (label, look) in looks.items():
        axes.plot(table[x], table[column], look, label=label, markersize=5)
    axes.legend(loc="best")


def draw_front(axes, table: pd.DataFrame, x: str, y: str, **style) -> None:
    """Draw a Pareto front as the staircase it is."""
    rows = table.sort_values(x)
    axes.plot(rows[x], rows[y], drawstyle="steps-post", **style)
