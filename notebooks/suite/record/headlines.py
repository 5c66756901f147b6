"""The README's table of headlines: what was published beside the committed metric.

``python -m suite.record.headlines`` writes it again; promoting results does so by itself.
"""

from pathlib import Path

import pandas as pd

from dynlib.files import atomic_write, repo_root
from suite.errors import SuiteError
from suite.record.metrics import read_metrics

BEGIN, END = "<!-- headlines: written by --promote -->\n", "<!-- end of headlines -->\n"
HEADER = """\
| system | what | published | here | label | profile | notebook |
|---|---|---|---|---|---|---|
"""
COLUMNS = ["system", "arxiv", "what", "published", "notebook", "key"]


def headlines(root: Path) -> str:
    """The table in Markdown: a row for each of ``data/headlines.csv``, its value from
    ``data/results``. Raises `SuiteError` for a malformed list or metrics.

    What no promoted run has yet says so, so that a new headline can be listed before its run.
    """
    path = root / "data" / "headlines.csv"
    listed = pd.read_csv(path, keep_default_na=False)
    if list(listed.columns) != COLUMNS:
        raise SuiteError(f"{path}: has columns {list(listed.columns)}, expected {COLUMNS}")
    rows = []
    for row in listed.itertuples():
        metrics = root / "data" / "results" / row.notebook / "metrics.json"
        entry = read_metrics(metrics).get(row.key) if metrics.exists() else None
        if entry is None:
            entry = {"value": None, "source": "", "profile": ""}
        arxiv = f"https://arxiv.org/abs/{row.arxiv}"
        system = f"[{row.system}]({arxiv})" if row.arxiv else row.system
        notebook = f"[{row.notebook[:2]}](notebooks/{row.notebook}.ipynb)"
        cells = [system, row.what, row.published, _shown(entry), entry["source"], entry["profile"]]
        rows.append(f"| {' | '.join([*cells, notebook])} |\n")
    return HEADER + "".join(rows)


def _shown(entry: dict) -> str:
    """Such as ``25.9 % [21.0, 30.1]``."""
    if entry["value"] is None:
        return "unknown" if "why" in entry else "not promoted yet"
    ends = [entry.get("low"), entry.get("high")]
    interval = "" if None in ends else " [{}, {}]".format(*map(_number, ends))
    unit = {"1": "x", "%": " %", "pp": " points"}.get(entry["unit"], f" {entry['unit']}")
    return f"**{_number(entry['value'])}{unit}**{interval}"


def _number(value: float) -> str:
    # Not the e-notation of ``.3g``: 6290, not 6.29e+03.
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_headlines(root: Path) -> None:
    """Put the table between its marks in the README. Raises `SuiteError` where they are not."""
    readme = root / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SuiteError(f"{readme}: lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    atomic_write(readme, before + begin + headlines(root) + end + after)


if __name__ == "__main__":
    write_headlines(repo_root())
