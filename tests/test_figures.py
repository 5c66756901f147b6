"""Every committed figure draws itself again from its own table, without torch."""

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import suite.plots  # noqa: F401  before a test of others has a registry of its own
from suite.record import figures
from suite.run.notebooks import discover

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "figures").glob("*.csv"))
NAMES = [table.stem for table in TABLES]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few pixels: what a figure says is looked at here, not how sharp it is."""
    monkeypatch.setattr(figures, "DPI", 40)
    yield
    plt.close("all")


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_draws_from_its_table(name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_label", lambda figure, table: drawn.append(figure))
    shutil.copy(ROOT / "figures" / f"{name}.csv", tmp_path)
    with matplotlib.rc_context():
        picture = figures.draw_again(tmp_path / f"{name}.csv")
    width, height = struct.unpack(">II", picture._repr_png_()[0][16:24])
    assert min(width, height) > 50
    for axes in drawn[0].axes:
        marks = [*axes.lines, *axes.collections, *axes.patches, *axes.images, *axes.texts]
        assert not axes.axison or marks, "an empty panel"
        assert axes.get_xlim()[0] != axes.get_xlim()[1]
    words = " ".join(text.get_text() for text in drawn[0].findobj(matplotlib.text.Text))
    assert not re.search(r"\b(nan|None|NaT)\b", words), words
    assert not re.findall(r"\b[a-z]+(?:_[a-z]+)*_(?:pct|ms|mj|mw|mhz)\b", words), "names of columns"


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_has_a_caption_and_its_pictures(name):
    caption = figures.caption(name)
    assert caption != name
    assert caption.endswith(".")
    table = pd.read_csv(ROOT / "figures" / f"{name}.csv")
    assert {"source", "profile"} <= set(table.columns)
    for suffix in (".png", ".pdf"):
        assert (ROOT / "figures" / f"{name}{suffix}").stat().st_size > 1000


def test_every_declared_figure_can_be_drawn_and_every_committed_one_is_declared():
    declared = {name for notebook in discover(ROOT / "notebooks") for name in notebook.figures}
    for name in declared:
        assert callable(figures.drawing(name))
    assert set(NAMES) <= declared


def test_drawing_imports_no_torch():
    code = "import sys, suite.plots; assert 'torch' not in sys.modules, 'torch'"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'notebooks'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_rivals_differ_in_lightness_too():
    """CIELAB L* of the first five colours, all of which show on white paper."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in figures.PALETTE[:5]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16
    assert np.diff(np.sort(lightness)).min() > 8
    assert lightness.max() < 80
