"""Calendar dates in text, without guessing: 30 February, a bare year and 03/04/2024 of unknown order are no date."""

from __future__ import annotations

import datetime
import re

from rewards.numbers import clean
from rewards.text import table

_MONTHS = {name: number for number, names in enumerate(table("numbers")["months"], start=1) for name in names}
_MONTH = "|".join(sorted(_MONTHS, key=len, reverse=True))
_NAMED = rf"(?P<name>{_MONTH})\b"
_END = r"(?![\d/-]|[.,]\d)"
_PATTERNS = (
    re.compile(
        r"(?<![\d.,/-])(?P<y>\d{4})(?P<mark>[-/.])(?P<m>\d{1,2})(?P=mark)(?P<d>\d{1,2})(?:[T ]00:00(?::00)?Z?)?" + _END
    ),
    re.compile(r"(?<![\d.,/-])(?P<a>\d{1,2})(?P<mark>[-/.])(?P<b>\d{1,2})(?P=mark)(?P<y>\d{4}|\d{2})" + _END),
    re.compile(
        rf"(?<!\d)(?P<d>\d{{1,2}})(?:st|nd|rd|th|er|º|\.)?[ -](?:of |de )?{_NAMED}[.,]?[ -](?:of |de |del )?"
        r"(?P<y>\d{4})(?![\d-])",
        re.I,
    ),
    re.compile(rf"\b{_NAMED}\.?[ -](?P<d>\d{{1,2}})(?:st|nd|rd|th)?,?[ -](?P<y>\d{{4}})(?![\d-])", re.I),
    re.compile(rf"(?<!\d)(?P<y>\d{{4}})[ ,-]+{_NAMED}[ -](?P<d>\d{{1,2}})(?:st|nd|rd|th)?(?!\d)", re.I),
    re.compile(r"(?<!\d)(?P<y>\d{4}) ?[年년] ?(?P<m>\d{1,2}) ?[月월] ?(?P<d>\d{1,2}) ?[日号號일]"),
    re.compile(r"(?<![\d.,/-])(?P<y>(?:19|20)\d\d)(?P<m>\d\d)(?P<d>\d\d)" + _END),
)
_DENIAL = re.compile(r"\b(?:not|never|no|cannot|incorrect|wrong|false|rather than|instead of)\b|n't\b", re.I)
MAX_LENGTH = 500


def find_dates(text: str, order: str = "") -> tuple[datetime.date, ...] | None:
    """All dates of a short text. Empty: none; None: digits are left over, a date is impossible, denied or ambiguous.

    order: how 03/04/2024 is to be read, "mdy" or "dmy"; "" reads it only where both readings agree or one is
    impossible. With full stops the day comes first (03.04.2024).
    """
    if len(text) > MAX_LENGTH:
        return None
    cleaned = clean(text)
    if _DENIAL.search(cleaned):
        return None
    found: list[datetime.date] = []
    for pattern in _PATTERNS:
        for match in pattern.finditer(cleaned):
            date = _date(match.groupdict(), order)
            if date is None:
                return None
            found.append(date)
        cleaned = pattern.sub(" ", cleaned)
    if any(character.isdigit() for character in cleaned):
        return None
    return tuple(found)


def slash_order(text: str) -> str:
    """How a label itself writes its date: "mdy" for 04/23/2024 and 03/04/2024, "dmy" for 23/04/2024, "" otherwise."""
    match = _PATTERNS[1].search(clean(text))
    if match is None or match["mark"] == ".":
        return ""
    return "dmy" if int(match["a"]) > 12 else "mdy"


def _date(parts: dict[str, str | None], order: str) -> datetime.date | None:
    year = int(parts["y"] or 0)
    if len(parts["y"] or "") == 2:
        year += 2000 if year < 69 else 1900  # the POSIX pivot
    if parts.get("a") is not None:
        first, second = int(parts["a"] or 0), int(parts["b"] or 0)
        if parts["mark"] == ".":
            order = "dmy"
        month_first, day_first = _valid(year, first, second), _valid(year, second, first)
        if month_first is None or day_first is None or month_first == day_first:
            return month_first or day_first
        return {"mdy": month_first, "dmy": day_first}.get(order)
    name = parts.get("name")
    month = _MONTHS[name.lower()] if name else int(parts["m"] or 0)
    return _valid(year, month, int(parts["d"] or 0))


def _valid(year: int, month: int, day: int) -> datetime.date | None:
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None
