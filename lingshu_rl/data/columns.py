"""Columns of other people's records: paths into them, what a mapping makes of their values, and which records are
meant."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lingshu_rl.data.rows import RowError
from lingshu_rl.failures import LingshuError
from rewards.rows import plain

Record = Mapping[str, Any]
CHANGES = ("from", "as", "else", "base", "split", "names")


class MappingError(LingshuError, ValueError):
    """A mapping that says nothing sensible; the text names the key and what to write."""


def is_missing(value: Any) -> bool:
    """Tables fill what they do not have with None, nan or nothing."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def at_path(value: Any, path: str) -> Any:
    """What stands at "column", "column.key.0" or "column.*.key" (all of a list), or None. JSON in a cell is looked
    into."""
    if isinstance(value, dict) and path in value:
        return value[path]
    head, _, rest = path.partition(".")
    if isinstance(value, str) and value[:1] in "[{":
        value = literal(value)
    value = plain(value)
    if head == "*" and isinstance(value, list):
        return [at_path(item, rest) if rest else item for item in value]
    if isinstance(value, Mapping):
        found = value.get(head)
    elif isinstance(value, list) and re.fullmatch(r"-?\d+", head) and -len(value) <= int(head) < len(value):
        found = value[int(head)]
    else:
        return None
    return at_path(found, rest) if rest else found


def literal(text: str) -> Any:
    """A list or mapping written into a cell, as JSON or as Python prints it, or the text where it is neither."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text


Expression = Callable[[Record], Any]
_HOLE = re.compile(r"\{([^{}]+)\}")


def expression(given: Any, key: str) -> Expression:
    """What `map` says of a field: a path, paths between "|" of which the first that has something counts, a text with
    {path} in it, a list of those (their values together), or {from: one of these, as, else, base, split, names}: see
    `changed`.
    """
    if isinstance(given, str) and given.strip():
        return _first([_one(part.strip()) for part in given.split("|")])
    if isinstance(given, list) and given:
        return _together([expression(part, key) for part in given])
    if isinstance(given, Mapping) and "from" in given:
        if unknown := set(map(str, given)) - set(CHANGES):
            raise MappingError(f"{key}: unknown {min(unknown)!r}; beside `from` stand {', '.join(CHANGES[1:])}")
        return _changed(expression(given["from"], key), given)
    raise MappingError(
        f"{key}: {given!r} is neither a column, a list of columns, nor {{from: column, ...}}; constants belong under "
        "values"
    )


def _one(part: str) -> Expression:
    if not _HOLE.search(part):
        return lambda record: at_path(record, part)

    def filled(record: Record) -> Any:
        found = {path: at_path(record, path) for path in _HOLE.findall(part)}
        if any(map(is_missing, found.values())):
            return None
        return _HOLE.sub(lambda hole: as_text(found[hole[1]]), part)

    return filled


def as_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _first(parts: Sequence[Expression]) -> Expression:
    def found(record: Record) -> Any:
        return next((value for part in parts if not is_missing(value := part(record))), None)

    return parts[0] if len(parts) == 1 else found


def _together(parts: Sequence[Expression]) -> Expression:
    def found(record: Record) -> Any:
        values = [part(record) for part in parts]
        while values and is_missing(values[-1]):
            values.pop()
        return values or None

    return found


def _changed(source: Expression, change: Mapping[str, Any]) -> Expression:
    """as: what a value stands for, by the value; else: what any other does. split: the text's parts between these.
    base: from where an index counts.

    names: true for {name: truth} columns, of which the true ones' names are meant.
    """
    told = {_key(key): value for key, value in (change.get("as") or {}).items()}
    split = change.get("split")

    def found(record: Record) -> Any:
        value = plain(source(record))
        if is_missing(value):
            return None
        if split:
            value = [part.strip() for part in str(value).split(split) if part.strip()]
        if change.get("names"):
            value = [name for name, true in value.items() if true]
        return _looked_up(value, told, change.get("else")) if told else value

    return found


def _looked_up(value: Any, told: Mapping[str, Any], other: Any) -> Any:
    if isinstance(value, list):
        return [_looked_up(item, told, other) for item in value]
    if _key(value) not in told and other is not None:
        return other
    if _key(value) not in told:
        names = ", ".join(list(told)[:8]) + (", ..." if len(told) > 8 else "")
        raise RowError(f"{value!r} has no meaning: `as` names {names}; leave such records out with `where`")
    return told[_key(value)]


def _key(value: Any) -> str:
    """By what values are compared: 1, "1" and "1.0" are one."""
    text = str(value).strip()
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


# ---------------------------------------------------------------------------------------------------------- conditions

_CONDITION = re.compile(r"\s*(.+?)\s*(==|!=|>=|<=|>|<|\bnot in\b|\bin\b)\s*(.+?)\s*")
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: _key(a) == _key(b),
    "!=": lambda a, b: _key(a) != _key(b),
    "in": lambda a, b: _key(a) in map(_key, b),
    "not in": lambda a, b: _key(a) not in map(_key, b),
    ">": lambda a, b: float(a) > float(b),
    "<": lambda a, b: float(a) < float(b),
    ">=": lambda a, b: float(a) >= float(b),
    "<=": lambda a, b: float(a) <= float(b),
}


def condition(text: str) -> Callable[[Record], bool]:
    """Which records are meant: `q_lang == en and modality in [CT, MRI]`. Raises MappingError.

    A missing value is equal to nothing, and above and below nothing.
    """
    import yaml

    tests = []
    for part in re.split(r"\s+and\s+", text.strip()) if text.strip() else ():
        match = _CONDITION.fullmatch(part)
        value = yaml.safe_load(match[3]) if match else None
        if match is None or isinstance(value, list) != match[2].endswith("in"):
            raise MappingError(
                f"where: {part!r} is not COLUMN == VALUE (or !=, <, <=, >, >=) or COLUMN in [VALUE, ...]"
            )
        tests.append((match[1], match[2], value))

    def meant(record: Record) -> bool:
        return all(_holds(at_path(record, path), word, value) for path, word, value in tests)

    return meant


def _holds(found: Any, word: str, value: Any) -> bool:
    if is_missing(found):
        return word in ("!=", "not in")
    try:
        return _COMPARE[word](found, value)
    except ValueError:
        raise RowError(f"where: {found!r} {word} {value!r} compares no numbers") from None
