"""The notebooks as the suite sees them: their order, parameters, and what they promise."""

import ast
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import SuiteError
from suite.record.metrics import PROFILES

NAME = re.compile(r"\d\d(_[a-z0-9]+)+")
EXPECTED = ("profile", "seed", "board", "dataset", "data_dir", "out_dir")
PROMISES = ("reads", "writes", "figures", "minutes")
# Cells that papermill adds; without them cells count as they do in the notebook.
ADDED = {"injected-parameters", "papermill-error-cell-tag"}
ALWAYS_WRITTEN = ("metrics.json", "manifest.json")

# A budget is what a notebook takes on the reference machine; a slow one gets this much more.
CELL_FACTOR, TOTAL_FACTOR, GRACE_S = 3.0, 4.0, 60.0


@dataclass(frozen=True)
class Notebook:
    """One notebook: what its cell tagged ``parameters`` and its ``dynlib`` metadata say.

    Attributes:
        parameters: name -> default.
        reads: inputs, as "other_notebook/file" or as a path in the repository.
        writes: outputs, as "this_notebook/file".
        figures: names of figures, without suffix.
        minutes: budget of each profile.
    """

    path: Path
    title: str
    parameters: dict[str, Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    figures: tuple[str, ...]
    minutes: dict[str, float]

    @property
    def name(self) -> str:
        """The file's name without suffix, such as ``03_search_pareto``."""
        return self.path.stem

    def limits_s(self, profile: str) -> tuple[float, float]:
        """The longest that one cell, and that the whole notebook, may take."""
        budget_s = 60 * self.minutes[profile]
        return GRACE_S + CELL_FACTOR * budget_s, GRACE_S + TOTAL_FACTOR * budget_s

    def check_parameters(self, names: Iterable[str]) -> None:
        """Raises `SuiteError` for a name that is no parameter of this notebook."""
        for name in names:
            if name not in self.parameters:
                close = difflib.get_close_matches(name, self.parameters, n=3)
                known = "did you mean" if close else "its parameters are"
                raise SuiteError(
                    f"{self.name}: unknown parameter {name!r}; {known} "
                    f"{', '.join(close or self.parameters)}"
                )


def read_notebook(path: Path) -> Notebook:
    """Read one notebook; raises `SuiteError` for anything the contract asks for and it lacks."""
    name = path.stem
    if not NAME.fullmatch(name):
        raise SuiteError(f"{path.name}: a notebook is called NN_verb_object.ipynb")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells, metadata = content["cells"], content["metadata"]
    except (ValueError, KeyError, TypeError) as error:
        raise SuiteError(f"{name}: not a notebook: {error!r}") from None
    promises = metadata.get("dynlib")
    if not isinstance(promises, dict) or set(promises) != set(PROMISES):
        raise SuiteError(f"{name}: metadata `dynlib` must have exactly {', '.join(PROMISES)}")
    return Notebook(
        path,
        _title(cells) or name,
        _parameters(name, cells),
        *(_texts(name, promises, key) for key in ("reads", "writes", "figures")),
        _minutes(name, promises["minutes"]),
    )


def source(cell: dict) -> str:
    """A cell's text, which the format stores as one string or as lines."""
    return "".join(cell["source"])


def code_of(path: Path) -> list[str]:
    """The code cells of a notebook file, but for those that papermill adds."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    own = (cell for cell in cells if ADDED.isdisjoint(cell["metadata"].get("tags", ())))
    return [source(cell) for cell in own if cell["cell_type"] == "code"]


def _title(cells: Sequence[dict]) -> str:
    text = source(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
    return next((line.lstrip("# ").strip() for line in text.splitlines() if line.strip()), "")


def _parameters(name: str, cells: Sequence[dict]) -> dict[str, Any]:
    """The defaults, read as Python so that each is seen to be a flat scalar."""
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    if len(tagged) != 1:
        raise SuiteError(f"{name}: needs one cell tagged `parameters`, has {len(tagged)}")
    defaults: dict[str, Any] = {}
    try:
        for statement in ast.parse(source(tagged[0])).body:
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                raise ValueError(ast.unparse(statement))
            value = ast.literal_eval(statement.value)
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(ast.unparse(statement))
            defaults[ast.unparse(statement.targets[0])] = value
    except (ValueError, SyntaxError) as error:
        raise SuiteError(
            f"{name}: its parameters cell may only hold lines like `seed = 0`, not: {error}"
        ) from None
    if missing := [key for key in EXPECTED if key not in defaults]:
        raise SuiteError(f"{name}: its parameters cell lacks {', '.join(missing)}")
    return defaults


def _texts(name: str, promises: dict, key: str) -> tuple[str, ...]:
    texts = promises[key]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise SuiteError(f"{name}: metadata dynlib.{key} must be a list of texts")
    return tuple(texts)


def _minutes(name: str, minutes: Any) -> dict[str, float]:
    each = minutes if isinstance(minutes, dict) else dict.fromkeys(PROFILES, minutes)
    numbers = [v for v in each.values() if isinstance(v, int | float) and v > 0]
    if set(each) != set(PROFILES) or len(numbers) != len(PROFILES):
        raise SuiteError(
            f"{name}: metadata dynlib.minutes must be a positive number, or one for each of "
            f"{', '.join(PROFILES)}"
        )
    return each


def discover(folder: Path) -> list[Notebook]:
    """All notebooks of `folder` in reading order.

    Raises `SuiteError` if there is none, two have one number, or one reads or writes what the
    contract does not let it.
    """
    notebooks = [read_notebook(path) for path in sorted(folder.glob("*.ipynb"))]
    if not notebooks:
        raise SuiteError(f"no notebooks in {folder}")
    written: set[str] = set()
    drawn: dict[str, str] = {}
    numbers: dict[str, str] = {}
    for notebook in notebooks:
        name = notebook.name
        if (twin := numbers.setdefault(name[:2], name)) != name:
            raise SuiteError(f"{name}: has the same number as {twin}")
        for path in notebook.reads:
            if NAME.fullmatch(path.split("/")[0]) and path not in written:
                raise SuiteError(f"{name}: reads {path}, which no earlier notebook writes")
        for path in notebook.writes:
            if not path.startswith(f"{name}/") or ".." in path:
                raise SuiteError(f"{name}: may write only below {name}/, not {path}")
        for figure in notebook.figures:
            if (twin := drawn.setdefault(figure, name)) != name:
                raise SuiteError(f"{name}: draws figure {figure!r}, which {twin} draws")
        written.update(notebook.writes, (f"{name}/{file}" for file in ALWAYS_WRITTEN))
    return notebooks


def select(notebooks: Sequence[Notebook], only: str | None, first: str | None) -> list[Notebook]:
    """Those called `only`, or from `first` on; each a number or a name. Raises `SuiteError`."""

    def find(wanted: str) -> int:
        number = wanted.zfill(2) if wanted.isdigit() else None
        for index, notebook in enumerate(notebooks):
            if notebook.name == wanted or notebook.name[:2] == number:
                return index
        names = ", ".join(notebook.name for notebook in notebooks)
        raise SuiteError(f"no notebook {wanted!r}; there are {names}")

    if only is not None:
        return [notebooks[find(only)]]
    return list(notebooks[find(first) :] if first is not None else notebooks)
