"""Dates, record numbers, telephone numbers, addresses and names taken out of a text; measurements stay.

A lab range ("0.55-4.78"), a confidence interval or a list of virus types looks much like a date, so a run of numbers is
read as a whole: one separator, a day and a month that exist, and for a year of two digits nothing beside it that
measures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_MONTH_NAMES = """
january february march april may june july august september october november december
januar februar märz maerz mai juni juli oktober dezember
janvier février fevrier mars avril juin juillet août aout septembre octobre novembre décembre
enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre
gennaio febbraio aprile maggio giugno luglio settembre ottobre dicembre
jan feb mar apr jun jul aug sep sept oct nov dec
"""
_MONTH = rf"(?:{'|'.join(sorted(_MONTH_NAMES.split(), key=len, reverse=True))})\.?"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th|\.|er)?"
_YEAR = r"(?:19|20)\d\d"
_NAMED_DATES = re.compile(
    rf"(?<![\w.]){_DAY}(?:\s+(?:of|de|d[iu])?\s*|[-/.]){_MONTH}(?:,?\s*(?:of\s|de\s|del\s)?\s*|[-/.]){_YEAR}(?!\d)"
    rf"|(?<![\w.]){_DAY}[-/]{_MONTH}[-/]\d\d(?!\d)"
    rf"|(?<![\w.]){_DAY}\s?{_MONTH}\s?{_YEAR}(?!\d)"
    rf"|\b{_MONTH}[\s-]+{_DAY}(?:,|-|\s)\s*(?:of\s)?{_YEAR}(?!\d)"
    rf"|(?<![\w.]){_YEAR}[-/. ]{_MONTH}[-/. ]{_DAY}(?!\d)",
    re.IGNORECASE,
)
_RUN = re.compile(r"(?<![\w,])\d+(?:[-–/.]\d+)+(?!\w*[-–/.]?\d)(?!,\d)")
_COMPACT = re.compile(rf"(?<![\w.-]){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?![\d-]|\.\d)")
# What stands beside three numbers that are no date.
_MEASURED = re.compile(
    r"\s*(?:%|°|(?:mm|cm|m|kg|g|mg|ng|pg|µg|ug|ml|l|dl|mmol|iu|u|h|s|min)\b|mmhg|years?|months?|weeks?|days?|hours?"
    r"|points?|per\b)",
    re.IGNORECASE,
)
_COUNTED = re.compile(
    r"\b(?:hpv|(?:sero|geno|sub)?types?|strains?|ratios?|bp|pressures?|grades?|scores?|stages?|class(?:es)?|doses?"
    r"|groups?"
    r"|days?|weeks?|months?|years?|ranges?|normal|ci|interval|sizes?|version|section)\W*(?:of\W*)?$",
    re.IGNORECASE,
)

_RECORD = (
    r"(?:MRN|SSN|PID|NHS(?:\s+(?:no|number))?|(?:patient|pat|hospital|chart|medical\s+record|insurance"
    r"|social\s+security)\s*"
    r"(?:id|no|number|nr)|record\s+(?:no|number)|acc(?:ession)?\.?(?:\s+(?:no|number))?)"
)
_RECORDS = re.compile(rf"\b{_RECORD}(?!\w)[\s:#.=]*(?=[A-Z-]*\d)[A-Z0-9-]+(?:\s\d+)*", re.IGNORECASE)
_PUBLIC = re.compile(
    r"(?:genbank|strain|pmid|isbn|issn|doi|database\w*)\W+(?:under\W+)?(?:the\W+)?(?:\w+\W+)?$", re.IGNORECASE
)
_LONG_NUMBERS = re.compile(r"(?<![\w.-])\d{7,}(?![\w-]|\.\d)")
_AMOUNT = re.compile(r"\d+0{4,}$")
_SOCIAL = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_PHONES = re.compile(
    r"(?<![\w.+(-])(?:\(\d{2,5}\)[ -]?\d{3,4}[ -]?\d{3,4}|\d{3}-\d{3}-\d{4}|0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,5})(?![\w-]"
    r"|\.\d)"
    r"|\+\d{1,3}[ -]?(?:\(\d+\)[ -]?)?\d{1,4}(?:[ -]?\d{2,4}){2,4}(?![\w-]|\.\d)",
)
_CALLED = re.compile(
    r"\b(tel(?:ephone)?|phone|fax|pager|mobile|cell|call(?:ed)?|contact)\b(\s*(?:no|number)?\.?:?\s*(?:at\s|on\s)?)"
    r"[+(]?\d[\d ()/-]{5,}\d",
    re.IGNORECASE,
)
_MAILS = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,4}")
_NAME = r"[A-ZÀ-Þ][\w'’-]+"
_TITLED = re.compile(rf"\b((?:Dr|Prof|Mr|Mrs|Ms)\.?|Doctor|Professor)(?:\s+(?:med|[A-Z])\.)*\s+{_NAME}(?:\s+{_NAME})?")
_NAMED = re.compile(
    rf"\b((?i:patient(?:'s)?\s+name"
    rf"|name\s+of\s+(?:the\s+)?patient)\s*[:=]?\s*(?:is\s+)?){_NAME}(?:[,^]?\s*{_NAME}){{0,2}}"
)


PLACEHOLDER = re.compile(r"\[(?:date|number|phone|address|name|removed)\]")


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with known secrets, dates, record numbers, telephone numbers, addresses and titled names replaced."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "[removed]", text, flags=re.IGNORECASE)
    for rule, put in _RULES:
        text = rule.sub(put, text)
    return text


def _date_or_run(match: re.Match[str]) -> str:
    """[date] for a run of numbers that is a date or a period between two, else the run."""
    numbers = re.split(r"[-–/.]", match[0])
    marks = re.findall(r"[-–/.]", match[0])
    before, after = match.string[: match.start()], match.string[match.end() :]
    if len(numbers) == 6 and marks[2] in "-–" and _exists(numbers[:3], marks[:2]) and _exists(numbers[3:], marks[3:]):
        return f"[date]{marks[2]}[date]"
    if len(numbers) != 3 or not _exists(numbers, marks):
        return match[0]
    if any(len(number) == 4 for number in numbers):
        return "[date]"
    written = marks[0] == "/" or all(len(number) == 2 for number in numbers)
    measured = _MEASURED.match(after) or _COUNTED.search(before[-40:])
    return "[date]" if written and not measured else match[0]


def _exists(numbers: list[str], marks: list[str]) -> bool:
    """Whether three numbers between equal marks are a day of the calendar, in any of the usual orders."""
    if marks[0] != marks[1]:
        return False
    if len(numbers[0]) == 4:
        year, a, b = numbers
    else:
        a, b, year = numbers
    short = len(year) == 2 and len(a) <= 2
    if not (short or re.fullmatch(_YEAR, year)) or len(a) > 2 or len(b) > 2:
        return False
    low, high = sorted((int(a), int(b)))
    return 1 <= low <= 12 and high <= 31


def _long_number(match: re.Match[str]) -> str:
    """A number of seven digits and more names somebody, unless it counts something or is a public one."""
    public = _PUBLIC.search(match.string[max(0, match.start() - 60) : match.start()])
    return match[0] if public or _AMOUNT.match(match[0]) else "[number]"


def _record(match: re.Match[str]) -> str:
    public = _PUBLIC.search(match.string[max(0, match.start() - 60) : match.start()])
    return match[0] if public else "[number]"


_RULES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_MAILS, "[address]"),
    (_NAMED_DATES, "[date]"),
    (_CALLED, r"\1\2[phone]"),
    (_RECORDS, _record),
    (_SOCIAL, "[number]"),
    (_PHONES, "[phone]"),
    (_RUN, _date_or_run),
    (_COMPACT, "[date]"),
    (_LONG_NUMBERS, _long_number),
    (_TITLED, r"\1 [name]"),
    (_NAMED, r"\1[name]"),
)
