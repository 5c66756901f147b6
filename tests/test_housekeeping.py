"""What the suite takes and covers, on a small repository of its own."""

import json
import shutil

import pytest

from dynlib.files import repo_root
from suite.errors import SuiteError
from suite.record.provenance import MANIFEST_FIELDS
from suite.studies import committed_runs, line_coverage, no_coverage, redraw_committed


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one committed figure."""
    root = tmp_path / "root"
    (root / "figures").mkdir(parents=True)
    shutil.copy(sorted((repo_root() / "figures").glob("*.csv"))[0], root / "figures")
    monkeypatch.setenv("DYNLIB_ROOT", str(root))
    return root


def test_committed_figures_are_drawn_elsewhere(root, tmp_path):
    before = sorted(root.rglob("*"))
    figures, seconds = redraw_committed(tmp_path / "drawn")
    assert figures == 1
    assert seconds > 0
    assert len(list((tmp_path / "drawn" / "figures").glob("*.png"))) == 1
    assert sorted(root.rglob("*")) == before


def test_a_redraw_that_fails_says_why(root, tmp_path):
    (root / "figures" / "nobody_draws_it.csv").write_text("a\n1\n")
    with pytest.raises(SuiteError, match="nobody_draws_it"):
        redraw_committed(tmp_path / "drawn")


def test_committed_runs_are_told_from_their_manifests(root):
    manifest = {key: {} for key in MANIFEST_FIELDS}
    for name, profile, seconds in (("00_a", "quick", 20.5), ("01_b", "full", 3000.0)):
        folder = root / "data" / "results" / name
        folder.mkdir(parents=True)
        told = {"notebook": name, "parameters": {"profile": profile}, "seconds": seconds}
        (folder / "manifest.json").write_text(json.dumps(manifest | told))
    runs = committed_runs().set_index("notebook")
    assert runs["profile"].to_dict() == {"00_a": "quick", "01_b": "full"}
    assert runs["seconds"].to_dict() == {"00_a": 20.5, "01_b": 3000.0}


@pytest.mark.skipif(no_coverage() != "", reason=no_coverage())
def test_lines_of_the_library_are_counted_of_tests_that_fail_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a notebook
    tests = tmp_path / "test_two.py"
    tests.write_text(
        "from dynlib.toml import is_number\n"
        "def test_holds(): assert is_number(1.0)\n"
        "def test_fails(): assert is_number('1')\n"
    )
    lines, result = line_coverage(tmp_path, [str(tests)])
    assert result.startswith("1 failed, 1 passed")
    assert all(file.startswith("dynlib/") for file in lines["file"])
    of = lines.set_index("file")
    assert 0 < of.loc["dynlib/toml.py", "covered"] < of.loc["dynlib/toml.py", "lines"]
    assert of.loc["dynlib/runtime/live.py", "covered"] == 0


@pytest.mark.skipif(no_coverage() != "", reason=no_coverage())
def test_a_run_without_tests_has_no_coverage(tmp_path):
    with pytest.raises(SuiteError, match="no_such_file"):
        line_coverage(tmp_path, [str(tmp_path / "no_such_file.py")])


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pytest-cov is not installed" in no_coverage()
