"""A misspelt option text, matched only inside the closed set of options and only when it cannot be another one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rewards.text import table

SIDES = frozenset(table("answers")["sides"])
_NEGATORS = frozenset(table("answers")["negators"])
_DIGITS = re.compile(r"\d+(?:\.\d+)?|[+<>=%-]|\b[ivx]+\b")


def nearest_option(said: str, keys: Mapping[str, str]) -> str | None:
    """The letter of the option that `said` misspells, or None. `keys`: text key -> letter; `said` is a text key too.

    Needs at most one slip (a letter more, less, changed or swapped), two from 20 letters on; a rapidfuzz ratio that is
    10 points above the runner-up's; the same first letter; and the same digits, signs, sides, negators and opposing
    prefixes (hypo-/hyper-, intra-/inter- ...) in both texts. Two slips in a short name make another disease
    (hypokalemia, hypocalcemia).
    """
    from rapidfuzz import fuzz  # only here: `import rewards` stays light
    from rapidfuzz.distance import OSA

    if not 5 <= len(said) <= 200:
        return None
    ranked = sorted(((fuzz.ratio(said, key), letter, key) for key, letter in keys.items()), reverse=True)
    if not ranked:
        return None
    best, letter, key = ranked[0]
    runner_up = max((ratio for ratio, other, _ in ranked if other != letter), default=0.0)
    slips = 1 if len(key) < 20 else 2
    if best - runner_up < 10 or said[0] != key[0] or OSA.distance(said, key, score_cutoff=slips) > slips:
        return None
    return letter if _guarded(said) == _guarded(key) else None


def negators(text: str) -> list[str]:
    """The words of a text key that deny."""
    return sorted(token for token in text.split() if token in _NEGATORS)


def _guarded(text: str) -> tuple[list[str], list[str], list[str], list[str]]:
    tokens = text.split()
    return (
        sorted(_DIGITS.findall(text)),
        sorted(token for token in tokens if token in SIDES),
        negators(text),
        sorted(prefix for token in tokens for prefix in table("answers")["prefixes"] if token.startswith(prefix)),
    )
