"""The two pictures of the guide: boxes and arrows, for pages that run no script.

``python -m suite.record.diagrams`` writes them beside the notebooks again.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dynlib.files import atomic_write, repo_root

Boxes = Mapping[str, tuple[float, float, str]]
Arrows = Sequence[tuple[str, str, str]]
HALF_WIDTH, HALF_HEIGHT = 0.41, 0.3  # of a box, where columns and rows are 1 apart

# name: (column, row, text); (from, to, text).
WORKFLOW: tuple[Boxes, Arrows] = (
    {
        "images": (0, 0, "images"),
        "train": (1, 0, "train the\nsuper-network"),
        "profile": (2, 0, "profile it\non the board"),
        "search": (3, 0, "search the\nPareto front"),
        "board": (2, 1, "board file:\nclocks, power, sensors"),
        "points": (3, 1, "operating points\n(CSV)"),
        "workload": (2, 2, "workload:\ndeadlines, floors"),
        "manage": (3, 2, "manage network\nand clocks"),
        "log": (3, 3, "decision log\n(JSON lines)"),
        "figures": (2, 3, "metrics, tables,\nfigures"),
    },
    [
        ("images", "train", ""), ("train", "profile", ""), ("profile", "search", ""),
        ("board", "profile", ""), ("search", "points", ""), ("points", "manage", "online"),
        ("workload", "manage", ""), ("manage", "log", ""), ("log", "figures", ""),
    ],
)  # fmt: skip
TWO_LEVELS: tuple[Boxes, Arrows] = (
    {
        "change": (0, 0, "demand, limit or\nslowdown changed"),
        "upper": (1, 0, "upper level: network, unit,\nhighest clock:\nleast power, in time"),
        "frame": (0, 1, "a frame arrives,\nstarts or is late"),
        "lower": (1, 1, "lower level: clock now:\nthe lowest that is in\ntime for all frames"),
        "learnt": (2, 0, "learnt slowdown\nand its spread"),
        "machine": (2, 1, "board or\nsimulation"),
    },
    [
        ("change", "upper", ""), ("upper", "lower", "points"), ("frame", "lower", ""),
        ("lower", "machine", ""), ("machine", "learnt", "latencies"), ("learnt", "upper", ""),
    ],
)  # fmt: skip
DIAGRAMS = {"workflow": WORKFLOW, "two_levels": TWO_LEVELS}


def draw_boxes(boxes: Boxes, arrows: Arrows) -> Figure:
    """Boxes on a grid and the arrows between neighbours in a row or a column."""
    columns = max(x for x, _, _ in boxes.values()) + 1
    rows = max(y for _, y, _ in boxes.values()) + 1
    drawn = plt.figure(figsize=(2.3 * columns, 1.15 * rows))
    axes = drawn.add_axes((0, 0, 1, 1), xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.axis("off")
    for x, y, text in boxes.values():
        corner = (x - HALF_WIDTH, y - HALF_HEIGHT)
        size = (2 * HALF_WIDTH, 2 * HALF_HEIGHT)
        axes.add_patch(Rectangle(corner, *size, facecolor="#eef4fa", edgecolor="#35689a"))
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    for tail, head, text in arrows:
        (x0, y0, _), (x1, y1, _) = boxes[tail], boxes[head]
        right, down = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        start = (x0 + right * HALF_WIDTH, y0 + down * HALF_HEIGHT)
        end = (x1 - right * HALF_WIDTH, y1 - down * HALF_HEIGHT)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3"})
        middle = ((start[0] + end[0]) / 2 + 0.04, (start[1] + end[1]) / 2)
        axes.text(*middle, text, fontsize=8, color="0.3", va="center")
    return drawn


def svg(name: str) -> bytes:
    """Diagram `name` as SVG, the same bytes every time."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dynlib"}):
        drawn = draw_boxes(*DIAGRAMS[name])
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(drawn)
    return buffer.getvalue()


def write_diagrams(folder: Path) -> None:
    """Write every diagram into `folder`."""
    for name in DIAGRAMS:
        atomic_write(folder / f"{name}.svg", svg(name))


if __name__ == "__main__":
    write_diagrams(repo_root() / "notebooks")
