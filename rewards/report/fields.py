"""Answers beside a name: "Effusion: no", table rows, (+), [x], JSON booleans, all brought to "effusion : no ." """

from __future__ import annotations

import re
from functools import lru_cache

from rewards.report.lexicon import Lexicon

_BOX_FIRST = re.compile(r"^([ \t]*(?:[-*•][ \t]+)?)[\[(]([xX✓✔ ]?)[\])][ \t]*([^\n]*)$", re.MULTILINE)
_BOX_LAST = re.compile(r"(?<=[\w*_\"]) ?[ \t]*(?:\[[ \t]*([xX✓✔]?)[ \t]*\]|\([ \t]*([+-])[ \t]*\))")
_MORE = re.compile(r"[ \t]*[,|][ \t]*(?=\w)([^\n;.|]*)")
_HINT = re.compile(r"[:=|?\[(]|\byes\b|[-–—]\s", re.IGNORECASE)


@lru_cache(maxsize=8)
def _patterns(answers: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    words = sorted((w for _, listed in answers for w in listed), key=lambda w: (-len(w), w))
    bare = "|".join(re.escape(listed[0]) for _, listed in answers)
    answer = "|".join(map(re.escape, words))
    ends = r"(?=[\"']?[ \t]*(?:[,;.|}\]]|\n|$))"
    separated = rf"(?<=[\w\"')*])[ \t]*(?:[:=|?]|[ \t][-–—]+[ \t])[ \t]*[\"'*]*({answer})(?![\w/]){ends}[\"']?[*]*"
    return (
        re.compile(separated, re.IGNORECASE),
        re.compile(rf"(?<=\w)[ \t]+({bare})(?=[ \t]*(?:[,;.]|\n|$))", re.IGNORECASE),
    )


def spell_out(text: str, lexicon: Lexicon) -> str:
    """The text with every such answer as a sentence of its own; text without any comes back as it is."""
    if not lexicon.answers or not _HINT.search(text):
        return text
    separated, bare = _patterns(lexicon.answers)
    meaning = {word: value for value, words in lexicon.answers for word in words}
    text = _BOX_FIRST.sub(lambda m: f"{m[1]}{m[3]}: {_ticked(m[2])}.", text)
    text = _BOX_LAST.sub(lambda m: f": {_ticked(m[1] or (m[2] or '').replace('-', ''))}.", text)

    def sentence(match: re.Match[str]) -> str:
        value = meaning[match[1].lower()]
        more = _MORE.match(match.string, match.end())
        if value == "yes" and more and not _HINT.search(more[1]) and not bare.search(more[1] + "\n"):
            return ": "  # "Effusion: yes, small": what follows describes it
        return {"yes": ": yes. ", "no": ": no. "}.get(value, ": not assessed. ")

    return bare.sub(sentence, separated.sub(sentence, text))


def _ticked(mark: str) -> str:
    return "yes" if mark.strip() else "no"
