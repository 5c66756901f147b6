"""What came out, in words: sentences whose numbers are metrics of the run, so that none goes stale.

In braces stands the key of a metric, and after a colon how it is said:

    {saved_pct}                      value, unit and interval: 26 % [25.8, 26.1]
    {saved_pct:plain}                without the interval: 26 %
    {saved_pct:size}                 without the sign either, beside a word that says it
    {saved_pct:low} {saved_pct:high} an end of the interval: 25.8 %
    {saved_pct:n}                    how many samples are behind it: 20
    {saved_pct:0 more|less}          the first words below 0, else the second: less
    {saved_pct:0 more|as much|less}  the middle ones where the interval holds 0
"""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from suite.errors import SuiteError

UNITS = {"1": "", "1/s": " per second", "pp": " points", "s/s": " s", "us": " µs"}


def fields(sentence: str) -> list[tuple[str, str]]:
    """(key, how it is said) of every metric in a sentence; raises `SuiteError` if malformed."""
    return [(key, how) for _, key, how in _parts(sentence) if key is not None]


def numbers(sentence: str) -> list[str]:
    """The key of every number that the sentence shows; words alone are none."""
    return [key for key, how in fields(sentence) if "|" not in how]


def say(sentence: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The sentence with its metrics in it; where one of them is unknown, which and why instead.

    Raises `SuiteError` naming key and sentence for a metric that is not there, and for a way to say
    it that does not exist.

    >>> saved = {"value": -2.04, "unit": "%"}
    >>> say("It takes {saved:size} {saved:0 less|more}.", {"saved": saved})
    'It takes 2.04 % less.'
    """
    for key, _ in fields(sentence):
        if key not in metrics:
            raise SuiteError(f"no metric {key!r} was added yet, and a text has it: {sentence!r}")
        if metrics[key]["value"] is None:
            return f"Not measured here: {metrics[key]['what']} ({metrics[key]['why']})."
    said = ""
    for text, key, how in _parts(sentence):
        said += text
        if key is not None:
            try:
                said += _said(metrics[key], how)
            except (KeyError, ValueError):
                wrong = f"metric {key!r} cannot be said as {how!r}"
                raise SuiteError(f"{wrong}, and a text has it so: {sentence!r}") from None
    return said


def _parts(sentence: str) -> list[tuple[str, str | None, str]]:
    """(text, key or None, how) from left to right."""
    try:
        parsed = list(Formatter().parse(sentence))
    except ValueError as error:
        raise SuiteError(f"{error} in the text {sentence!r}") from None
    return [(text, key, how or "") for text, key, how, _ in parsed]


def _said(entry: Mapping[str, Any], how: str) -> str:
    if "|" in how:
        return _words(entry, how)
    if how == "n":
        return f"{entry['n']:,}"
    number = {
        "": entry["value"], "plain": entry["value"], "size": abs(entry["value"]),
        "low": entry.get("low"), "high": entry.get("high"),
    }[how]  # fmt: skip
    if number is None:
        raise KeyError(how)
    unit = UNITS.get(entry["unit"], f" {entry['unit']}")
    return short(number) + unit + (interval(entry) if how == "" else "")


def _words(entry: Mapping[str, Any], how: str) -> str:
    """The one of the words, `0 below|above` or `0 below|neither|above`, that holds."""
    at, _, words = how.partition(" ")
    below, *neither, above = words.split("|")
    value, threshold = entry["value"], float(at)
    low, high = (entry.get(end, value) if neither else value for end in ("low", "high"))
    if high < threshold:
        return below
    if low > threshold or not neither:
        return above
    (between,) = neither
    return between


def interval(entry: Mapping[str, Any]) -> str:
    """Such as `` [25.8, 26.1]``; empty where there is none."""
    return f" [{short(entry['low'])}, {short(entry['high'])}]" if "low" in entry else ""


def short(value: float) -> str:
    """Three digits, or all of those before the point: 0.123, 26, 2,160."""
    # Zero is added because a number may round to minus zero.
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value + 0.0:.3g}"
