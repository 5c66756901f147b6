"""Strict TOML: what is missing, left over or of the wrong kind is an error that names file and key.

A file becomes dataclasses: their annotations say what a key may be, their defaults which may be
left out. Everything that is wrong with a file is one error, of one line each.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from dynlib.errors import DynlibError
from dynlib.files import read_plain, shown

if sys.version_info >= (3, 11):
    import tomllib
else:  # what tomllib was before
    import tomli as tomllib

LARGEST_TOML = 2**23  # bytes
# A dotted key costs the square of its parts, or more.
_PART = rb"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*"""
_LONG_KEY = re.compile(rb"(?<![\w-])" + _PART + rb"(?:\.[ \t]*" + _PART + rb"){32}")
NEEDED = object()  # the default of a key that has none
Check = Callable[[Any], bool]


def is_number(value: object) -> bool:
    """Whether this is an integer or a float that a float can hold; NaN and infinity are none."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def is_whole(value: object) -> bool:
    """Whether this is an integer that a float can hold."""
    return is_number(value) and isinstance(value, int)


def is_a(kind: type) -> Check:
    """The check that a value is of this kind."""
    return lambda value: isinstance(value, kind)


def list_of(fits: Check) -> Check:
    """The check that a value is a list of which every item fits."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


# What a key may hold by the annotation of its field: in words, and as a check.
_KINDS: dict[Any, tuple[str, Check]] = {
    str: ("a text", is_a(str)),
    bool: ("true or false", is_a(bool)),
    int: ("a whole number", is_whole),
    float: ("a finite number", is_number),
}


class Table:
    """A table of a file, emptied key by key; whatever is wrong with a key raises `error`.

    What is read by `attempt` raises only when the table is `done`, together with all else that is
    wrong with it.

    Args:
        file: for the messages, as is `where`: the path of the table in the file.
    """

    def __init__(self, values: Mapping, file: str | Path, error: type[DynlibError], where=""):
        self.left = dict(values)
        self.seen = []
        self.hinted: set[str] = set()  # keys that the message about another one named
        self.problems: list[str] = []
        self.file = file
        self.error = error
        self.where = where

    def path(self, key: str) -> str:
        """The key as the whole file knows it, such as ``app[0].deadline_ms``."""
        parts = [self.where, key]
        return ".".join(part for part in parts if part)

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise the error of this key, or of the whole table for the key ""."""
        parts = [str(self.file), self.path(key), problem]
        message = ": ".join(part for part in parts if part)
        raise self.error(message)

    def attempt(self, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What `read` returns; None if it fails, with the problem kept until `done`."""
        try:
            return read(*args, **options)
        except self.error as error:
            self.problems.append(str(error))
            return None

    def take(self, key: str, expected: str, fits: Check, default: Any = NEEDED) -> Any:
        """The value of a key if it fits, which `expected` says in words; else its default."""
        self.seen.append(key)
        if key in self.left:
            value = self.left.pop(key)
            if not fits(value):
                self.fail(key, f"{shown(value)}; expected {expected}")
            return value
        if default is NEEDED:
            hint = ""
            for close in get_close_matches(key, self.left, n=1):
                hint = f" (there is {self.path(close)}: did you mean {key}?)"
                self.hinted.add(close)
            self.fail(key, f"missing{hint}; expected {expected}")
        return default

    def kind(self, key: str, hint: Any) -> tuple[str, Check]:
        """What a key with this annotation may hold: in words, and as a check."""
        origin = get_origin(hint)
        if origin is Literal:
            choices = get_args(hint)
            return f"one of {', '.join(choices)}", choices.__contains__
        if origin is tuple:
            item = get_args(hint)[0]
            words, fits = self.kind(key, item)
            return f"a list, each {words}", list_of(fits)
        return _KINDS[hint]

    def read(self, key: str, hint: Any, default: Any = NEEDED) -> Any:
        """The value of a key with this annotation; whole numbers pass for floats."""
        expected, fits = self.kind(key, hint)
        value = self.take(key, expected, fits, default)
        if hint is float and value is not None:
            return float(value)
        if hint == tuple[float, ...]:
            return tuple(map(float, value))
        return tuple(value) if get_origin(hint) is tuple else value

    def table(self, key: str, default: Any = NEEDED) -> "Table | None":
        """A table ``[key]``."""
        values = self.take(key, f"a table [{key}]", is_a(dict), default)
        if values is None:
            return None
        return self._inner(values, key)

    def tables(self, key: str) -> list["Table"]:
        """The tables ``[[key]]``, of which there may be none."""
        values = self.take(key, "", is_a(object), [])
        if not list_of(is_a(dict))(values):
            self.fail(key, f"expected tables [[{key}]]")
        inner = []
        for i, item in enumerate(values):
            inner.append(self._inner(item, f"{key}[{i}]"))
        return inner

    def records(self, key: str, read: Callable[..., Any], *args: Any) -> tuple:
        """What `read` makes of each of the tables ``[[key]]``, by `attempt`."""
        tables = self.attempt(self.tables, key) or []
        return tuple([self.attempt(read, table, *args) for table in tables])

    def _inner(self, values: Mapping, key: str) -> "Table":
        where = self.path(key)
        return type(self)(values, self.file, self.error, where)

    def values(
        self, cls: type, names: Iterable[str], needed: Iterable[str] = (), **defaults
    ) -> dict[str, Any]:
        """The fields `names` of a dataclass, each as its annotation says, by `attempt`.

        A field without a default is needed, unless it may be None; so are those in `needed`.
        `defaults` go before those of the class.
        """
        hints = get_type_hints(cls)
        of_class = {field.name: field.default for field in fields(cls)}
        found = {}
        for name in names:
            hint = hints[name]
            default = defaults.get(name, of_class[name])
            if default is MISSING:
                default = NEEDED
            if NoneType in get_args(hint):  # of `float | None`
                hint, _ = get_args(hint)
                if default is NEEDED:
                    default = None
            if name in needed:
                default = NEEDED
            found[name] = self.attempt(self.read, name, hint, default)
        return found

    def record(
        self, cls: type, given: Mapping | None = None, needed: Iterable[str] = (), **defaults
    ) -> Any:
        """A dataclass from the rest of this table; its fields `given` were read before.

        See `values`. What the class itself refuses, a line each, are errors of this table.
        """
        given = given or {}
        names = [f.name for f in fields(cls) if f.init and f.name not in given]
        found = self.values(cls, names, needed, **defaults)
        self.done()
        try:
            return cls(**given, **found)
        except self.error as error:
            for line in str(error).splitlines():
                self.attempt(self.fail, "", line)
        return self.done()

    def done(self) -> None:
        """Refuse what nobody has read, and raise the error of all problems."""
        for key in self.left:
            if key in self.hinted:
                continue
            hint = ""
            for close in get_close_matches(key, self.seen, n=1):
                hint = f" (did you mean {close!r}?)"
            known = ", ".join(sorted(self.seen))
            self.attempt(self.fail, key, f"unknown key{hint}; expected only {known}")
        if self.problems:
            raise self.error("\n".join(self.problems))


def read_toml(file: str | Path, error: type[DynlibError]) -> tuple[dict[str, Any], str]:
    """The content of a TOML file and the SHA-256 of its bytes; raises `error` for other files."""
    try:
        raw = read_plain(file, LARGEST_TOML)
        if _LONG_KEY.search(raw):
            raise ValueError("a key of more than 32 parts")
        content = tomllib.loads(raw.decode())
        digest = hashlib.sha256(raw).hexdigest()
        return content, digest
    except OSError as problem:
        raise error(f"{file}: cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{file}: not UTF-8 text; expected a TOML file") from problem
    except (ValueError, RecursionError) as problem:  # a number of 5000 digits; [[[[[...
        raise error(f"{file}: not valid TOML: {problem}") from problem


def as_toml(value: Any) -> str:
    """A text, number, truth or (nested) list of these as TOML writes it.

    For these JSON is TOML; only DEL may not stand in a TOML string.
    """
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")


def entries(item: Any, names: Iterable[str] | None = None) -> list[str]:
    """Lines of TOML: the fields of a dataclass that have not their default value."""
    defaults = {field.name: field.default for field in fields(item)}
    lines = []
    for name in names or defaults:
        value = getattr(item, name)
        if value != defaults[name]:
            lines.append(f"{name} = {as_toml(value)}")
    return lines
