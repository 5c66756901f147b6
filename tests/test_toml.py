from dataclasses import dataclass

import pytest

from dynlib.errors import WorkloadError
from dynlib.toml import Table, entries, read_toml


@dataclass
class Lamp:
    name: str
    watts: float
    sockets: int = 1
    dimmed: bool | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        if self.watts < 0:
            raise WorkloadError("a lamp that gives power")


def read(tmp_path, text: str) -> list[Lamp]:
    path = tmp_path / "lamps.toml"
    path.write_text(text)
    content, _ = read_toml(path, WorkloadError)
    top = Table(content, path, WorkloadError)
    lamps = [table.record(Lamp) for table in top.tables("lamp")]
    top.done()
    return lamps


def test_what_is_written_is_read(tmp_path):
    lamps = [Lamp("a\x7f\n", 3.0), Lamp("b", 4.5, 2, True, ("x", "y"))]
    text = "\n".join(line for lamp in lamps for line in ["[[lamp]]", *entries(lamp)])
    assert "sockets" in text
    assert text.count("sockets") == 1  # defaults are not written
    assert read(tmp_path, text) == lamps
    assert read(tmp_path, "") == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("watts = 3", r"lamp\[0\]\.name: missing; expected a text"),
        ("name = 'a'\nwatt = 3", r"\.watts: missing \(there is lamp\[0\]\.watt: did you mean"),
        (
            "name = 'a'\nwatts = 3\ndimmd = true",
            r"\.dimmd: unknown key \(did you mean 'dimmed'",
        ),
        ("name = 'a'\nwatts = inf", r"\.watts: inf; expected a finite number"),
        ("name = 'a'\nwatts = 3\nsockets = 1.5", r"\.sockets: 1\.5; expected a whole number"),
        ("name = 'a'\nwatts = 3\nsockets = true", r"\.sockets: True; expected"),
        ("name = 'a'\nwatts = 3\ndimmed = 1", r"\.dimmed: 1; expected true or false"),
        ("name = 'a'\nwatts = 3\ntags = ['x', 1]", r"\.tags: .* expected a list, each a text"),
        ("name = 'a'\nwatts = -3", r"lamp\[0\]: a lamp that gives power"),
        (f"name = 'a'\nwatts = {'9' * 400}", r"\.watts: 999.*expected a finite number"),
        (f"name = 'a'\nwatts = {'9' * 5000}", "not valid TOML"),
        (f"tags = {'[' * 100_000}", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(tmp_path, lines, message):
    with pytest.raises(WorkloadError, match=rf"^\S*lamps\.toml: .*{message}"):
        read(tmp_path, f"[[lamp]]\n{lines}\n")


def test_no_file_and_no_text_are_named(tmp_path):
    with pytest.raises(WorkloadError, match=r"gone\.toml: cannot be read: No such file"):
        read_toml(tmp_path / "gone.toml", WorkloadError)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(WorkloadError, match=r"bytes\.toml: not UTF-8"):
        read_toml(tmp_path / "bytes.toml", WorkloadError)
