"""Figures as pure functions of tidy tables, so that any of them can be drawn again without a run.

A drawing function is registered with `@figure("name")`, takes the table and returns a matplotlib
figure. `save` writes the table first and draws from the file it wrote, so that what `redraw` makes
later is the same picture.
"""

import contextlib
import difflib
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dynlib.files import atomic_write
from dynlib.source import Source
from suite.errors import SuiteError
from suite.record.metrics import PROFILES

DPI = 150
# For colour-blind eyes, and for print without colour: the first five differ in lightness too
# (CIELAB L* of 30, 67, 57, 45 and 77). C3 marks limits and what failed.
PALETTE = (
    "#00468b", "#de8f05", "#029e73", "#b8470c", "#f2a0cd",
    "#ca9161", "#949494", "#56b4e9", "#0173b2", "#4d4d4d",
)  # fmt: skip

_drawings: dict[str, Callable[[pd.DataFrame], Figure]] = {}


def figure(name: str) -> Callable:
    """Register a function ``draw(table: pd.DataFrame) -> Figure`` under `name`.

    Raises `SuiteError` if the name is taken.
    """

    def register(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
        if name in _drawings:
            raise SuiteError(f"figure {name!r} is registered twice")
        _drawings[name] = draw
        return draw

    return register


def drawing(name: str) -> Callable[[pd.DataFrame], Figure]:
    """The function that draws figure `name`; raises `SuiteError` listing close matches."""
    import suite.plots  # noqa: F401  registers the suite's own; they import this module

    if name not in _drawings:
        close = difflib.get_close_matches(name, _drawings, n=3) or sorted(_drawings)
        raise SuiteError(f"no figure {name!r} is registered; did you mean {', '.join(close)}?")
    return _drawings[name]


def caption(name: str) -> str:
    """What figure `name` shows, as its drawing function's docstring says it, in one line."""
    said = (drawing(name).__doc__ or name).split("\n\n")[0]
    return " ".join(said.replace("`", "").split())


def set_style() -> None:
    """The look of every figure: seaborn's paper context, ticks, and `PALETTE`."""
    sns.set_theme(context="paper", style="ticks", palette=PALETTE)
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.8),
            "figure.constrained_layout.use": True,
            "savefig.dpi": DPI,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "pdf.fonttype": 42,  # text stays text
            "svg.hashsalt": "dynlib",
        }
    )


class Picture:
    """A figure that was saved; shows itself as the last value of a notebook cell."""

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return f"Picture({self.path.name})"

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        """Its caption is the alternative text, for those who do not see it."""
        return self.path.read_bytes(), {"alt": caption(self.path.stem)}


def save(name: str, table: pd.DataFrame, folder: str | Path, *, profile: str) -> Picture:
    """Write `table` as ``name.csv`` and draw it as ``name.png`` and ``name.pdf`` beside it.

    The table must be tidy, not empty, and have a column ``source`` (see `Source`), which the figure
    shows; a column ``profile`` is added. Raises `SuiteError` if it is unfit, and `SuiteError`
    for an unknown source.
    """
    drawing(name)
    if profile not in PROFILES:
        raise SuiteError(f"figure {name!r}: profile must be one of {PROFILES}, got {profile!r}")
    table = table.assign(profile=profile)
    _check(name, table)
    csv = Path(folder) / f"{name}.csv"
    # Not the platform's line ending: the same run must give the same bytes.
    atomic_write(csv, table.to_csv(index=False, lineterminator="\n"))
    return draw_again(csv)


def draw_again(csv: str | Path) -> Picture:
    """Draw the figure whose table is `csv`; the file's name says which. Raises `SuiteError`."""
    csv = Path(csv)
    name = csv.stem
    draw = drawing(name)
    # Only an empty field is missing: "None" and "NA" may well be names.
    table = pd.read_csv(csv, keep_default_na=False, na_values=[""])
    _check(name, table)
    with plt.rc_context(), _same_chance():
        set_style()
        drawn = draw(table)
        try:
            _label(drawn, table)
            for suffix, metadata in (
                (".png", {"Software": None}),
                (".pdf", {"Creator": None, "Producer": None, "CreationDate": None}),
            ):
                buffer = io.BytesIO()
                drawn.savefig(buffer, format=suffix[1:], metadata=metadata, bbox_inches="tight")
                atomic_write(csv.with_suffix(suffix), buffer.getvalue())
        finally:
            plt.close(drawn)
    return Picture(csv.with_suffix(".png"))


@contextlib.contextmanager
def _same_chance():
    """Let numpy's common generator begin anew: seaborn's jitter and bootstraps draw from it."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def redraw(folder: str | Path) -> list[str]:
    """Draw every figure of `folder` again from its table; returns their names.

    Raises `SuiteError` for a table that no figure is registered for.
    """
    from suite.studies.parallel import in_parallel

    tables = sorted(Path(folder).glob("*.csv"))
    in_parallel(_draw_again, [(csv,) for csv in tables])
    return [csv.stem for csv in tables]


def _draw_again(csv: Path) -> list[dict]:
    draw_again(csv)
    return []


def _check(name: str, table: pd.DataFrame) -> None:
    if table.empty:
        raise SuiteError(f"figure {name!r}: its table has no rows")
    for column in ("source", "profile"):
        if column not in table or table[column].isna().any():
            raise SuiteError(f"figure {name!r}: its table needs a full column {column!r}")
    for source in table["source"].unique():
        Source(source)


def _label(drawn: Figure, table: pd.DataFrame) -> None:
    """Say on the figure what its numbers are, and that a quick run's are not the final ones."""
    present = set(table["source"])
    text = "source: " + ", ".join(source for source in Source if source in present)
    if "quick" in set(table["profile"]):
        text += "  ·  quick profile"
    # Below the canvas, where no layout puts anything; saving with a tight box brings it in.
    drawn.text(0.99, -0.01, text, ha="right", va="top", fontsize="x-small", color="0.45")
