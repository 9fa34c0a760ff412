"""Answers beside a name: "Effusion: no", table rows, (+), [x], JSON booleans, all brought to "effusion : no ." """

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from rewards.report.lexicon import Lexicon

_YES, _NO = "xX✓✔✅☑+", "✗✘❌☐-"
_BOX_FIRST = re.compile(
    rf"^([ \t]*(?:[-*•][ \t]+)?)(?:[\[(]([{_YES} ]?)[\])]|([✓✔✅☑✗✘❌☐☒]))[ \t]*(?=\w)([^\n]*)$", re.MULTILINE
)
_BOX_LAST = re.compile(rf"(?<=[\w*_\"]) ?[ \t]*(?:\[[ \t]*([{_YES}]?)[ \t]*\]|\([ \t]*([+-])[ \t]*\)|([✓✔✅☑✗✘❌☐☒]))")
_BOX = re.compile(r"\[|\([ \t]*[+-]|[✓✔✅☑✗✘❌☐☒]")
_SIGN_LIST = re.compile(r"(?<=\w)[ \t]+([+-])(?=[ \t]*(?:[/,;\n]|$))")
_LABEL_END = re.compile(r"[\w\"')*][ \t]{0,3}$")
_MORE = re.compile(r"[ \t]*[,|][ \t]*(?=\w)([^\n;.|]*)")
_HINT = re.compile(r"[:=|?\[(+→✓✔✅☑✗✘❌☐☒]")
_HINTS = ("..", "- ", "-\n", "-/", "-,", "– ", "— ", "yes", "Yes", "YES")


@dataclass(frozen=True)
class _Patterns:
    """`beside`: an answer after a separator or in brackets. `bare`: a plain yes or no. `none_of`: what heads a list."""

    beside: re.Pattern[str]
    bare: re.Pattern[str]
    none_of: re.Pattern[str]


@lru_cache(maxsize=8)
def _patterns(answers: tuple[tuple[str, tuple[str, ...]], ...], none_of: tuple[str, ...]) -> _Patterns:
    lists = dict(answers)
    words = sorted((w for listed in lists.values() for w in listed), key=lambda w: (-len(w), w))
    answer = "|".join(map(re.escape, words))
    bare = "|".join(re.escape(listed[0]) for listed in lists.values())
    ends = r"(?=[\"']?[ \t]*(?:[,;.|}\]]|\n|$))"
    apart = r"(?:[:=|?→]|->|=>|\.{2,}|[-–—]+(?=[ \t]))"
    begins = "".join(
        sorted({re.escape(listed[0][0]) for listed in lists.values()})
    )  # a look at one sign rules most out
    beside = rf"{apart}[ \t]*[\"'*]*({answer})(?![\w/]){ends}[\"']?[*]*"
    return _Patterns(
        re.compile(rf"(?=[:=|?→.(–—-])(?:{beside}|\([ \t]*({answer})[ \t]*\))", re.IGNORECASE),
        re.compile(rf"(?=[{begins}])\b({bare})(?=[ \t]*(?:[,;.]|\n|$))", re.IGNORECASE),
        re.compile(
            rf"(?:^|(?<=[.\n;]))([ \t*_-]*)(?:{'|'.join(map(re.escape, none_of)) or '(?!)'})[*_]*[ \t]*:([^\n.]*)",
            re.IGNORECASE,
        ),
    )


def spell_out(text: str, lexicon: Lexicon) -> str:
    """The text with every such answer as a sentence of its own; text without any comes back as it is."""
    if not lexicon.answers or not _hinted(text):
        return text
    patterns = _patterns(lexicon.answers, lexicon.none_of)
    meaning = {word: value for value, words in lexicon.answers for word in words}
    text = _BOX_FIRST.sub(lambda m: f"{m[1]}{m[4]}: {_ticked(m[2] or m[3] or '')}.", text)
    if _BOX.search(text):
        text = _BOX_LAST.sub(lambda m: f": {_ticked(m[1] or m[2] or m[3] or '')}.", text)
    if len(_SIGN_LIST.findall(text)) > 1:  # "nodule - / effusion +"
        text = _SIGN_LIST.sub(lambda m: f": {_ticked(m[1])}.", text)
    if ":" in text:
        text = patterns.none_of.sub(lambda m: f"{m[1]}No {m[2].replace(';', ',')}", text)

    def sentence(match: re.Match[str]) -> str:
        if not _LABEL_END.search(match.string[max(0, match.start() - 4) : match.start()]):
            return match[0]  # nothing that it could be the answer to
        value = meaning[next(group for group in match.groups() if group).lower()]
        more = _MORE.match(match.string, match.end())
        if value == "yes" and more and not _hinted(more[1]) and not patterns.bare.search(more[1] + "\n"):
            return ": "  # "Effusion: yes, small": what follows describes it
        return {"yes": ": yes. ", "no": ": no. "}.get(value, ": not assessed. ")

    return patterns.bare.sub(sentence, patterns.beside.sub(sentence, text))


def _hinted(text: str) -> bool:
    """Whether anything in it looks like an answer beside a name; most reports have nothing."""
    return _HINT.search(text) is not None or any(hint in text for hint in _HINTS)


def _ticked(mark: str) -> str:
    return "yes" if mark and mark in _YES + "☒" else "no"
