import json
import math
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dynlib.errors import DynlibError
from dynlib.files import atomic_write, repo_root, sha256
from dynlib.source import Source, weakest
from suite.errors import SuiteError
from suite.record import figures
from suite.record.metrics import Metrics, compare_metrics, read_metrics
from suite.record.provenance import start, stored_in

PARAMS = {"profile": "quick", "seed": 3, "board": "auto"}
WELL = {"unit": "ms", "source": "measured", "what": "a number"}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def line(monkeypatch):
    """A registered figure that draws a line; the registry forgets it afterwards."""
    monkeypatch.setattr(figures, "_drawings", dict(figures._drawings))

    @figures.figure("line")
    def draw(table: pd.DataFrame) -> Figure:
        drawn = Figure()
        axes = drawn.subplots()
        axes.plot(table["x"], table["y"])
        axes.set_xlabel("latency (ms)")
        return drawn


def table(**columns) -> pd.DataFrame:
    return pd.DataFrame({"x": [1, 2, 3], "y": [0.1, 1 / 3, 1e-9], "source": "measured"} | columns)


# Metrics


def test_metrics_are_written_as_the_contract_says(tmp_path):
    metrics = Metrics(tmp_path / "metrics.json", "full")
    metrics.add("a_ms", np.float32(1.5), n=20, low=1.0, high=np.int64(2), tolerance=0.1, **WELL)
    metrics.add("b_ms", None, why="no sensor", **WELL)
    metrics.write()
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["a_ms"] == {
        "value": 1.5, "unit": "ms", "source": "measured", "profile": "full", "n": 20, "low": 1.0,
        "high": 2, "tolerance": 0.1, "what": "a number",
    }  # fmt: skip
    assert written["b_ms"]["value"] is None
    assert read_metrics(tmp_path / "metrics.json") == written == metrics.as_dict()


@pytest.mark.parametrize(
    ("key", "value", "fields", "message"),
    [
        ("a_ms", math.nan, {}, "value must be a finite number, got nan"),
        ("a_ms", math.inf, {}, "value must be a finite number"),
        ("a_ms", True, {}, "value must be a finite number"),
        ("a_ms", "1", {}, "value must be a finite number"),
        ("a_ms", None, {}, "needs `why`"),
        ("A ms", 1.0, {}, "a key is lower-case"),
        ("a_ms", 1.0, {"source": "guessed"}, "unknown source 'guessed'"),
        ("a_ms", 1.0, {"unit": ""}, "unit must be"),
        ("a_ms", 1.0, {"low": 2.0, "high": 1.0}, "above high"),
        ("a_ms", 1.0, {"low": math.nan}, "low must be a finite"),
        ("a_ms", 1.0, {"tolerance": -0.1}, "tolerance must be >= 0"),
        ("twice_ms", 1.0, {}, "added twice"),
    ],
)
def test_malformed_metrics_are_refused(tmp_path, key, value, fields, message):
    metrics = Metrics(tmp_path / "metrics.json")
    metrics.add("twice_ms", 1.0, **WELL)
    with pytest.raises(SuiteError, match=message):
        metrics.add(key, value, **(WELL | fields))
    assert len(metrics) == 1


def test_fields_may_be_null(tmp_path):
    path = tmp_path / "metrics.json"
    entry = {"value": 1.0, "unit": "1", "source": "measured", "profile": "quick", "what": "it"}
    nulls = dict.fromkeys(("low", "high", "tolerance", "n"))
    path.write_text(json.dumps({"a": entry | nulls}))
    assert read_metrics(path)["a"]["value"] == 1.0
    path.write_text(json.dumps({"a": entry | nulls | {"tolerance": -1}}))
    with pytest.raises(SuiteError, match="tolerance"):
        read_metrics(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"value": 1}}', None])
def test_unreadable_metrics_name_the_file(tmp_path, text):
    path = tmp_path / "metrics.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SuiteError, match=r"metrics\.json"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("old", "new", "tolerance", "verdict"),
    [
        (1.0, 1.1, 0.1, "same"),
        (1.0, 1.11, 0.1, "moved"),
        (-1.0, -0.85, 0.1, "moved"),
        (0.0, 0.05, 0.1, "same"),
        (0.0, 0.2, 0.1, "moved"),
        (1.0, 9.0, None, "not compared"),
        (None, None, 0.1, "same"),
        (None, 1.0, None, "moved"),
        (1.0, None, None, "moved"),
    ],
)
def test_compare_at_each_metrics_own_tolerance(old, new, tolerance, verdict):
    (change,) = compare_metrics(
        {"a": {"value": old, "tolerance": tolerance}}, {"a": {"value": new}}
    )
    assert (change.verdict, change.is_bad) == (verdict, verdict == "moved")
    # What a clock entered is told as it is, and fails nothing.
    (timed,) = compare_metrics(
        {"a": {"value": old, "tolerance": tolerance, "source": "measured"}}, {"a": {"value": new}}
    )
    assert (timed.verdict, timed.is_bad) == (verdict.replace("moved", "drifted"), False)


def test_compare_names_what_is_missing_and_new():
    gone, came = compare_metrics({"a": {"value": 1.0}}, {"b": {"value": 1.0}})
    assert (gone.verdict, gone.is_bad, came.verdict, came.is_bad) == ("missing", True, "new", False)


@given(st.lists(st.sampled_from(list(Source)), min_size=1))
def test_a_mix_takes_the_weakest_source(sources):
    order = list(Source)
    assert all(order.index(s) <= order.index(weakest(*sources)) for s in sources)
    assert weakest(*sources) in sources


# Files


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "deep" / "file", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_folders_hash_knows_names_and_content(tmp_path):
    atomic_write(tmp_path / "a" / "x", "1")
    first = sha256(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert sha256(tmp_path / "a") != first


# Runs


def test_a_run_writes_metrics_and_manifest(root, line):
    (root / "data" / "results" / "00_first").mkdir(parents=True)
    (root / "data" / "results" / "00_first" / "t.csv").write_text("committed")
    run = start("01_second", PARAMS)
    assert run.dir == root / "runs" / "quick" / "01_second"
    assert run.input("00_first/t.csv").read_text() == "committed"
    (run.state / "checkpoint").write_text("half done")
    run.output("out.csv").write_text("1")
    run.draw("line", table())
    run.metrics.add("a_ms", 1.0, **WELL)
    assert start("01_second", PARAMS).state.joinpath("checkpoint").exists()
    run.finish()
    assert not list(run.out_dir.glob(".state/*"))
    manifest = json.loads((run.dir / "manifest.json").read_text())
    assert manifest["parameters"] == PARAMS
    assert manifest["seed"] == 3
    assert manifest["git"] is None
    assert list(manifest["inputs"]) == ["data/results/00_first/t.csv"]
    assert set(manifest["outputs"]) == {
        "01_second/metrics.json", "01_second/out.csv",
        "figures/line.csv", "figures/line.png", "figures/line.pdf",
    }  # fmt: skip
    assert manifest["outputs"]["01_second/out.csv"] == sha256(run.dir / "out.csv")
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["machine"]["cores"] >= 1


def test_an_own_output_comes_before_the_committed_one(root):
    for folder in ("data/results", "runs/quick"):
        atomic_write(root / folder / "00_first" / "t.csv", folder)
    assert start("01_second", PARAMS).input("00_first/t.csv").read_text() == "runs/quick"


def test_a_missing_input_names_its_maker():
    with pytest.raises(SuiteError, match="run the notebook 00_first first"):
        start("01_second", PARAMS).input("00_first/none.csv")


def test_an_announced_output_must_be_written():
    run = start("01_second", PARAMS)
    run.output("never.csv")
    with pytest.raises(SuiteError, match=r"never wrote never\.csv"):
        run.finish()
    assert not (run.dir / "manifest.json").exists()


@pytest.mark.parametrize("params", [{}, {"profile": "quick"}, {"profile": "huge", "seed": 0}])
def test_a_run_needs_a_profile_and_a_seed(params):
    with pytest.raises(DynlibError, match=r"profile|seed"):
        start("01_second", params)


def test_git_state_knows_commit_and_changes(root):
    def git(*arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)

    git("init")
    assert start("01_x", PARAMS)._git is None  # nothing committed
    (root / "code.py").write_text("1")
    (root / ".gitignore").write_text("runs\n")
    git("add", ".")
    assert stored_in(root / "code.py").endswith("of commit unknown")  # nothing committed
    git("commit", "-m", "first")
    first = git("log", "-1", "--format=%h").stdout.decode().strip()
    assert start("01_x", PARAMS)._git["dirty"] is False
    atomic_write(root / "data" / "results" / "01_x" / "metrics.json", "{}")
    assert start("01_x", PARAMS)._git["dirty"] is False  # promoting is no change of code
    assert stored_in(root / "code.py") == f"{sha256(root / 'code.py')[:8]} of commit {first}"
    (root / "code.py").write_text("2")
    state = start("01_x", PARAMS)._git
    assert state["dirty"] is True
    assert len(state["commit"]) == 40


def test_the_root_is_the_repository(monkeypatch):
    monkeypatch.delenv("DYNLIB_ROOT")
    assert (repo_root() / "dynlib" / "__init__.py").exists()


# Figures


def test_chance_in_a_figure_is_the_same_each_time_and_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_drawings", dict(figures._drawings))

    @figures.figure("scattered")
    def draw(table: pd.DataFrame) -> Figure:
        """Some dots."""
        drawn = Figure()
        drawn.subplots().plot(np.random.rand(5), "o")  # noqa: NPY002
        return drawn

    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand(2)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    pictures = []
    for number in expected:
        picture = figures.save("scattered", table(), tmp_path, profile="full")
        pictures.append(picture.path.read_bytes())
        assert np.random.rand() == number  # noqa: NPY002
    assert pictures[0] == pictures[1]


def test_a_figure_drawn_again_is_the_same(tmp_path, line):
    picture = figures.save("line", table(name="None"), tmp_path, profile="quick")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"line.csv", "line.png", "line.pdf"}
    assert picture._repr_png_() == (first["line.png"], {"alt": figures.caption("line")})
    assert b"None,quick" in first["line.csv"]
    assert figures.redraw(tmp_path) == ["line"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize(("profile", "marked"), [("quick", True), ("full", False)])
def test_figures_say_their_source_and_a_quick_profile(tmp_path, line, monkeypatch, profile, marked):
    texts = []
    monkeypatch.setattr(
        figures, "_label", lambda drawn, t: (label(drawn, t), texts.extend(drawn.texts))
    )
    mixed = table(source=["simulated", "measured", "measured"])
    figures.save("line", mixed, tmp_path, profile=profile)
    (text,) = (t.get_text() for t in texts)
    assert "source: measured, simulated" in text
    assert ("quick" in text) is marked


label = figures._label


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("lime", {}, "did you mean line"),
        ("line", {"source": None}, "needs a full column 'source'"),
        ("line", {"source": "guessed"}, "unknown source 'guessed'"),
    ],
)
def test_unfit_figures_are_refused(tmp_path, line, name, columns, message):
    with pytest.raises(DynlibError, match=message):
        figures.save(name, table(**columns), tmp_path, profile="quick")
    assert not list(tmp_path.iterdir())


def test_a_figure_is_registered_once(line):
    with pytest.raises(DynlibError, match="registered twice"):
        figures.figure("line")(lambda table: Figure())


def test_a_metric_in_a_sentence(tmp_path):
    metrics = Metrics(tmp_path / "metrics.json")
    metrics.add("gain", 1.6578, unit="1", source="exact", what="a gain", low=1.621, high=1.67)
    metrics.add("plain", 12345.6, unit="1", source="exact", what="a number")
    metrics.add("unknown", None, unit="1", source="exact", what="a number", why="not measured")
    assert metrics.text("gain") == "1.66 [1.62, 1.67]"
    assert metrics.text("plain") == "12,346"
    assert metrics.text("unknown") == "unknown (not measured)"
