"""What came out is said in words whose numbers are metrics; here without running a notebook."""

import ast
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.errors import SuiteError
from suite.record.metrics import Metrics, read_metrics
from suite.record.provenance import start
from suite.record.sentences import fields, numbers, say, short
from suite.run.notebooks import source

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAVED = {"value": 12.34, "unit": "%", "low": -1.0, "high": 26.2, "n": 8000}
WORSE = {"value": -0.5, "unit": "pp"}
METRICS = {
    "saved": SAVED, "worse": WORSE, "ratio": {"value": 1.5, "unit": "1"},
    "unknown": {"value": None, "unit": "ms", "what": "time of a board", "why": "no board here"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("It saves {saved}.", "It saves 12.3 % [-1, 26.2]."),
        ("{saved:plain}, {saved:low} to {saved:high}", "12.3 %, -1 % to 26.2 %"),
        ("{worse:plain} is {worse:size} {worse:0 less|more}", "-0.5 points is 0.5 points less"),
        ("{saved:0 less|as much|more} of {saved:n}", "as much of 8,000"),
        ("{saved:0 less|more}", "more"),
        ("{ratio} times as fast, {ratio:1 slower|as fast|faster}", "1.5 times as fast, faster"),
        ("{ratio:1.5 below|there}", "there"),
        ("No number.", "No number."),
        ("It takes {saved}, on a board {unknown:size}.",
         "Not measured here: time of a board (no board here)."),
    ],
)  # fmt: skip
def test_a_sentence(sentence, said):
    assert say(sentence, METRICS) == said


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("It saves {sved}.", "no metric 'sved' was added yet, .* 'It saves {sved}.'"),
        ("It saves {ratio:low}.", "metric 'ratio' cannot be said as 'low', .* 'It saves"),
        ("{ratio:n}", "cannot be said as 'n'"),
        ("{saved:.3f}", "cannot be said as '.3f'"),
        ("{saved:zero less|more}", "cannot be said as 'zero less|more'"),
        ("{saved:0 a|b|c|d}", "cannot be said"),
        ("It saves {saved", "in the text 'It saves {saved'"),
    ],
)
def test_what_cannot_be_said_names_key_and_text(sentence, message):
    with pytest.raises(SuiteError, match=message):
        say(sentence, METRICS)


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_words_follow_the_number(value, width):
    entry = {"value": value, "unit": "1", "low": value - width, "high": value + width}
    two, three = (say("{x:0 %s}" % words, {"x": entry}) for words in ("a|c", "a|b|c"))  # noqa: UP031
    assert (two == "a") == (value < 0)
    assert (three == "b") == (entry["low"] <= 0 <= entry["high"])
    assert three in ("b", two)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (999.6, "1,000"),
        (2160, "2,160"),
        (90.75, "90.8"),
        (-3e-8, "-3e-08"),
    ],
)
def test_three_digits(value, said):
    assert short(value) == said


def test_a_run_counts_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    run = start("01_x", {"profile": "quick", "seed": 0})
    run.metrics.add("saved_pct", 2.5, unit="%", source="exact", what="a saving")
    said = run.says("It saves {saved_pct}, {saved_pct:0 so not|so}.", "{saved_pct:size} it is.")
    assert said.data == "**What came out.** It saves 2.5 %, so. 2.5 % it is."
    run.finish()
    assert read_metrics(run.dir / "metrics.json")["text_numbers_checked"]["value"] == 2
    with pytest.raises(SuiteError, match="other_pct"):
        Metrics(tmp_path / "m.json").says("{other_pct}")


# The suite's own notebooks


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def code(cell: dict) -> str:
    return source(cell) if cell["cell_type"] == "code" else ""


def sentences(text: str) -> list[str]:
    """The sentences of the calls of `says` in a cell; they have to be plain strings."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "says":
            found += [ast.literal_eval(sentence) for sentence in node.args]
    return found


def said(path: Path) -> list[str]:
    return [sentence for cell in cells(path) for sentence in sentences(code(cell))]


def sections(path: Path) -> dict[str, list[dict]]:
    """Heading -> code cells; what stands before the first heading is without one."""
    found, heading = {"": []}, ""
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            for line in source(cell).splitlines():
                if line.startswith("## "):
                    heading = line.removeprefix("## ")
                    found[heading] = []
        else:
            found[heading].append(cell)
    return found


def is_metrics(cell: dict) -> bool:
    return "metrics" in cell["metadata"].get("tags", ())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_section_with_results_says_what_came_out(path):
    parts = sections(path)
    if "What came out" in parts:  # one for all
        parts = {"What came out": parts["What came out"]}
    for heading, part in parts.items():
        texts = [code(cell) for cell in part]
        shows = r"run\.draw\(|\badd(_found)?\(" if heading else r"run\.draw\("
        results = re.search(shows, "\n".join(texts))
        told = [text for cell, text in zip(part, texts, strict=True) if not is_metrics(cell)]
        told = [text for text in told if "run.finish()" not in text]
        if results or heading == "What came out":
            last = told[-1] if told else ""
            assert "run.says(" in last or "**What came out.**" in last, f"{heading}: {last}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_number_is_typed_by_hand(path):
    """But in names, such as S1 or p95, in code and addresses, and in what is “quoted”."""
    for sentence in said(path):
        kept = r"\{[^}]*\}|`[^`]*`|\[[^]]*\]\([^)]*\)|“[^”]*”|[A-Za-z]+-?\d+"
        bare = re.sub(kept, "", sentence)
        assert not re.search(r"\d", bare), sentence


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_sentences_can_be_said_of_the_committed_metrics(path):
    """A metric that no promoted run has yet is passed over once: until that run is promoted."""
    committed = ROOT / "data" / "results" / path.stem / "metrics.json"
    metrics = read_metrics(committed) if committed.exists() else {}
    promoted = metrics.get("text_numbers_checked")
    for sentence in said(path):
        if promoted or all(key in metrics for key, _ in fields(sentence)):
            assert "{" not in say(sentence, metrics)
    if promoted and "metrics.text" not in "\n".join(map(code, cells(path))):
        assert promoted["value"] == sum(len(numbers(sentence)) for sentence in said(path))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_cells_that_only_write_metrics_are_tagged_and_collapsed(path):
    for cell in cells(path):
        hidden = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        assert is_metrics(cell) == hidden, code(cell)
        if is_metrics(cell):
            assert "run.draw(" not in code(cell)
