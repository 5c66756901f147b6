"""The numbers a notebook reports, each with its unit, its source and how far it may move."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlib.files import MALFORMED, atomic_write, read_plain
from dynlib.source import Source
from dynlib.toml import is_number
from suite.errors import SuiteError
from suite.record.sentences import interval, numbers, say, short

PROFILES = ("quick", "full")
FIELDS = ("value", "unit", "source", "profile", "n", "low", "high", "tolerance", "what", "why")
LARGEST_JSON = 2**24  # bytes
_KEY = re.compile(r"[a-z][a-z0-9_]*")


class Metrics:
    """Collects a run's metrics; `write` puts them into `path` as ``metrics.json`` wants them."""

    def __init__(self, path: str | Path, profile: str = "quick"):
        """Raises `SuiteError` when `profile` is neither quick nor full."""
        if profile not in PROFILES:
            raise SuiteError(f"unknown profile {profile!r}; expected one of {PROFILES}")
        self.path = Path(path)
        self.profile = profile
        self.numbers_said = 0  # in texts
        self._entries: dict[str, dict[str, Any]] = {}

    def add(
        self,
        key: str,
        value: float | None,
        *,
        unit: str,
        source: str,
        what: str,
        n: int | None = None,
        low: float | None = None,
        high: float | None = None,
        tolerance: float | None = None,
        why: str | None = None,
    ) -> None:
        """Add one number.

        Args:
            key: lower-case name that ends in its unit, such as ``latency_ms``.
            value: the number; None if it is not known, and then `why` says why.
            unit: as shown to a reader, "1" for a ratio.
            source: a `Source`, the weakest of all that went in.
            what: one line for a reader.
            n: how many samples or seeds are behind it.
            low: lower end of its interval.
            high: upper end of its interval.
            tolerance: relative change that still counts as the same result; None: any.
            why: why there is no value.

        Raises `SuiteError` for a key given twice, NaN, infinity, and whatever is malformed.
        """
        if key in self._entries:
            raise SuiteError(f"metric {key!r} was added twice")
        entry = {
            "value": value, "unit": unit, "source": str(source), "profile": self.profile,
            "n": n, "low": low, "high": high, "tolerance": tolerance, "what": what, "why": why,
        }  # fmt: skip
        entry = {k: _plain(v) for k, v in entry.items() if v is not None or k == "value"}
        check_metrics({key: entry}, self.path)
        self._entries[key] = entry

    def __len__(self) -> int:
        return len(self._entries)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """A copy of what was added, as it will be written."""
        return {key: dict(entry) for key, entry in self._entries.items()}

    def text(self, key: str) -> str:
        """A metric as a sentence has it: three digits, and its interval where there is one.

        >>> metrics.text("speedup")  # doctest: +SKIP
        '1.66 [1.62, 1.67]'
        """
        self.numbers_said += 1
        entry = self.as_dict()[key]
        if entry["value"] is None:
            return f"unknown ({entry['why']})"
        return short(entry["value"]) + interval(entry)

    def says(self, *sentences: str) -> str:
        """The sentences with these metrics in them, as `suite.record.sentences` has it."""
        said = [say(sentence, self._entries) for sentence in sentences]
        self.numbers_said += sum(len(numbers(sentence)) for sentence in sentences)
        return " ".join(said)

    def write(self) -> Path:
        """Write the file in one step and return its path."""
        return atomic_write(self.path, json.dumps(self._entries, indent=2) + "\n")


def _plain(value: Any) -> Any:
    """numpy scalars as Python's own, which json knows."""
    return value.item() if hasattr(value, "item") else value


def check_metrics(metrics: Any, name: str | Path) -> dict[str, dict[str, Any]]:
    """Return `metrics` if they keep the contract; raises `SuiteError` naming `name` and key."""
    if not isinstance(metrics, dict):
        raise SuiteError(f"{name}: expected an object of metrics, got {type(metrics).__name__}")
    for key, entry in metrics.items():
        where = f"{name}: metric {key!r}"
        if not isinstance(entry, dict):
            raise SuiteError(f"{where}: expected an object, got {type(entry).__name__}")
        if not _KEY.fullmatch(key):
            raise SuiteError(f"{where}: a key is lower-case letters, digits and underscores")
        if unknown := sorted(set(entry) - set(FIELDS)):
            raise SuiteError(f"{where}: unknown fields {unknown}; expected {FIELDS}")
        if missing := {"value", "unit", "source", "profile", "what"} - set(entry):
            raise SuiteError(f"{where}: lacks {sorted(missing)}")
        for field in ("unit", "what", "why"):
            if field in entry and (not isinstance(entry[field], str) or not entry[field].strip()):
                raise SuiteError(f"{where}: {field} must be a text that is not empty")
        for field in ("value", "low", "high", "tolerance", "n"):
            number = entry.get(field)
            if number is not None and not _is_finite(number):
                raise SuiteError(f"{where}: {field} must be a finite number, got {number!r}")
        if entry["value"] is None and "why" not in entry:
            raise SuiteError(f"{where}: without a value it needs `why`")
        known = {field: number for field, number in entry.items() if number is not None}
        if not known.get("low", -math.inf) <= known.get("high", math.inf):
            raise SuiteError(f"{where}: low {entry['low']} is above high {entry['high']}")
        if known.get("tolerance", 0) < 0 or known.get("n", 1) < 1:
            raise SuiteError(f"{where}: tolerance must be >= 0 and n >= 1")
        if entry["profile"] not in PROFILES:
            raise SuiteError(f"{where}: profile must be one of {PROFILES}")
        if entry["source"] not in list(Source):
            raise SuiteError(
                f"{where}: unknown source {entry['source']!r}; expected one of {', '.join(Source)}"
            )
    return metrics


def _is_finite(value: Any) -> bool:
    return is_number(value)


def read_metrics(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read and check a ``metrics.json``; raises `SuiteError` naming the file and the key."""
    try:
        return check_metrics(json.loads(read_plain(path, LARGEST_JSON)), path)
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such file; run the notebook that writes it") from None
    except (OSError, *MALFORMED) as error:
        raise SuiteError(f"{path}: not JSON: {error}") from None


@dataclass(frozen=True)
class MetricChange:
    """One metric, before and after.

    `verdict` is same, moved, drifted, missing, new or not compared. What moved and is `measured`
    has drifted: a clock entered it, and this is another hour or machine. That is no failure.
    """

    key: str
    old: float | None
    new: float | None
    tolerance: float | None
    verdict: str

    @property
    def is_bad(self) -> bool:
        """Whether a comparison must fail because of it."""
        return self.verdict in ("moved", "missing")


def compare_metrics(old: Mapping[str, Mapping], new: Mapping[str, Mapping]) -> list[MetricChange]:
    """Compare two runs' metrics, each at the tolerance that `old` states, relative to its value.

    A metric that was null must stay null, and one that was not must not become it. Where the old
    value is 0 the tolerance is taken as absolute.
    """
    return [_change(key, old.get(key), new.get(key)) for key in _union(old, new)]


def _union(old: Iterable[str], new: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*old, *new]))


def _change(key: str, old: Mapping | None, new: Mapping | None) -> MetricChange:
    if old is None:
        return MetricChange(key, None, new["value"], None, "new")
    tolerance = old.get("tolerance")
    if new is None:
        return MetricChange(key, old["value"], None, tolerance, "missing")
    before, after = old["value"], new["value"]
    moved = "drifted" if old.get("source") == Source.MEASURED else "moved"
    if before is None or after is None:
        verdict = "same" if before is after else moved
    elif tolerance is None:
        verdict = "not compared"
    else:
        # The last digit of a product is no reason to call a number moved.
        bound = tolerance * (abs(before) or 1.0) * (1 + 1e-9)
        verdict = "same" if abs(after - before) <= bound else moved
    return MetricChange(key, before, after, tolerance, verdict)
