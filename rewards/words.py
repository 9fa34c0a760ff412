"""The word lists around a choice, compiled: connectives, negators, contrasts, verdicts, in many languages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

from rewards.text import Patterns, strip_markup, strip_quotes, table, unwrap_latex


@cache
def words() -> Patterns:
    return Patterns("choices")


@cache
def _conditional_hints(ascii_only: bool) -> tuple[str, ...]:
    """The letters that each word for a condition begins with."""
    entries = table("choices")["conditional"] + table("choices")["conditional_marks"]
    hints = {found.group(1).lower() for entry in entries if (found := _LITERAL.match(entry)) is not None}
    return tuple(hint for hint in sorted(hints) if hint.isascii() or not ascii_only)


_LITERAL = re.compile(r"(?:\(\?<![^()]*\))*([^\W\d_][\w' ]*)")
_HTML = re.compile(r"</?(?:b|i|u|em|strong|p|br|span|sub|sup|center|code|div|h[1-6])\s?/?>")
_STRAY_STOP = re.compile(r"(?<!\.\w)\.(?=[,;]\s(?:and )?not\b)")  # "B., not A"
_MOST_LEADS = 6


def may_be_conditional(text: str) -> bool:
    """A cheap test before the pattern `conditional`."""
    lowered = text.lower()
    return any(map(lowered.__contains__, _conditional_hints(text.isascii())))


def clean_phrase(phrase: str) -> str:
    """One line without LaTeX, markdown and enclosing quotes; line breaks become sentence breaks."""
    text = unwrap_latex(phrase)
    if "<" in text:
        text = _HTML.sub("", text)
    if "\n" in text:
        parts = (strip_markup(part).rstrip(".,; ") for part in text.split("\n"))
        text = ". ".join(part for part in parts if part.strip(".-_= "))
    text = " ".join(strip_quotes(strip_markup(text)).split())
    return _STRAY_STOP.sub("", text) if ".," in text or ".;" in text else text


def without_leads(text: str, named: Callable[[str], int]) -> Iterator[str]:
    """`text`, then `text` with one leading word or phrase less at a time ("the answer is probably option").

    named: where the answer ends that a text begins with. Such words announce nothing, but before a word for an answer
    ("the right answer is ...").
    """
    yield text
    for _ in range(_MOST_LEADS):
        lead = words().lead.match(text)
        if lead is None or lead.end() == 0:
            return
        end = named(text)
        if end >= len(lead.group().rstrip(" :,")) > 0 and words().option_word.match(text, end) is None:
            return
        text = text[lead.end() :]
        yield text


def _describing(text: str) -> int:
    """Where a describing word of a free answer ends ("right lung")."""
    described = words().describing.match(text)
    return described.end() if described is not None else 0


def strip_leads(text: str) -> str:
    """`text` without words that only announce an answer ("the answer is probably ...")."""
    *_, last = without_leads(text, _describing)
    return strip_quotes(last)
