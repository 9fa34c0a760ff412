"""Words of a sentence to marked terms: findings, organs, states, modifiers and cues."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from rewards.report.lexicon import TERMS, Lexicon

_ORDINAL = re.compile(r"(\d{1,2})(?:st|nd|rd|th)$")
_UNITS = {"mm": 1.0, "cm": 10.0, "millimeter": 1.0, "centimeter": 10.0, "cms": 10.0, "mms": 1.0}
_LEVEL = re.compile(r"[ctls]\d{1,2}$")
_ORDINAL_WORDS = {
    word: str(i)
    for i, word in enumerate(
        tuple("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()),
        start=1,
    )
}


class Mention(NamedTuple):
    """words[begin:end] is a term: `name` is its finding, organ, state or cue role; "" for normal and abnormal."""

    begin: int
    end: int
    name: str = ""


class Modifier(NamedTuple):
    """words[begin:end] is an attribute. `kind`: side, severity, change, qualifier, level, size (mm) or place."""

    begin: int
    end: int
    kind: str
    value: object


class Marks:
    """The mentions of one sentence by kind; positions are word indices, ends exclusive."""

    def __init__(self, words: Sequence[str], lexicon: Lexicon) -> None:
        self.words, self.lexicon = words, lexicon
        self.heads: list[Mention] = []  # findings
        self.organs: list[Mention] = []
        self.states: list[Mention] = []
        self.normals: list[Mention] = []
        self.abnormals: list[Mention] = []
        self.modifiers: list[Modifier] = []
        self.cues: list[Mention] = []
        self.verbs: list[int] = []

    def part(self, lo: int, hi: int) -> Marks:
        """What begins in words[lo:hi], of the same words."""
        if lo == 0 and hi == len(self.words):
            return self
        part = Marks(self.words, self.lexicon)
        for kind in ("heads", "organs", "states", "normals", "abnormals", "modifiers", "cues"):
            setattr(part, kind, [mention for mention in getattr(self, kind) if lo <= mention.begin < hi])
        part.verbs = [verb for verb in self.verbs if lo <= verb < hi]
        return part

    def says_where(self, lo: int, hi: int) -> bool:
        """Whether a preposition stands in words[lo:hi]: what follows it places the finding before it."""
        return not self.lexicon.grammar["prepositions"].isdisjoint(self.words[lo:hi])


def find(words: Sequence[str], lexicon: Lexicon) -> Marks:
    """All terms, longest first from the left; besides them sizes, vertebral levels and words that end like a
    disease."""
    marks = Marks(words, lexicon)
    lists = {"finding": marks.heads, "anatomy": marks.organs, "state": marks.states, "cue": marks.cues}
    lists |= {"normal": marks.normals, "abnormal": marks.abnormals}
    trie, ahead = lexicon.trie, (*words, None)
    end = 0
    for i, word in enumerate(words):
        if i < end:
            continue
        node = trie.get(word)
        meanings: tuple[tuple[str, Any], ...] = ()
        end = behind = i + 1
        while node is not None:
            longer = node.get(TERMS)
            if longer:
                meanings, end = longer, behind
            node = node.get(ahead[behind])
            behind += 1
        for kind, value in meanings:
            if kind in lists:
                lists[kind].append(Mention(i, end, value))
                if end - i > 2:
                    _inner_sides(marks, i, end, kind, value)
            else:
                marks.modifiers.append(Modifier(i, end, kind, value))
        if not meanings and (sort := _sort_of(word, lexicon)):
            _mark_word(marks, i, word, sort)
    if len(marks.organs) > 1 or "of" in words:
        vague = {
            _held_by(organ, marks) or _measured(organ, marks) for organ in marks.organs
        }  # and None, which no organ is
        marks.organs = [organ for organ in marks.organs if organ not in vague]
    return marks


def _elided(words: Sequence[str], i: int, root: Mapping[str, Any]) -> str | None:
    """The place that "upper" is in "upper and right lower lobe": the last word of a later term is shared."""
    node = root.get(words[i])
    if node is None or i + 3 >= len(words) or words[i + 1] not in ("and", "or", ",", "to"):
        return None
    for j in range(i + 2, min(i + 6, len(words))):
        ends = node.get(words[j], {}).get(TERMS, ())
        if ends:
            return next((value for kind, value in ends if kind == "anatomy"), None)
    return None


def _inner_sides(marks: Marks, begin: int, end: int, kind: str, name: str) -> None:
    """A side inside a longer term ("air in the right pleural space") still is a side."""
    if kind == "finding" or (kind == "anatomy" and not name.startswith(("left_", "right_"))):
        for i in range(begin, end):
            if marks.words[i] in ("left", "right"):
                marks.modifiers.append(Modifier(i, i + 1, "side", marks.words[i]))


@lru_cache(maxsize=32768)
def _sort_of(word: str, lexicon: Lexicon) -> str:
    """Of a word that ends no term: verb, number, level, disease, begin (of a term) or ""."""
    if word in lexicon.grammar["predicates"]:
        return "verb"
    if word[0].isdigit() or word[0] == "." or word in _ORDINAL_WORDS:
        return "number"
    if _LEVEL.match(word):
        return "level"
    if len(word) > 6 and word.endswith(lexicon.open_suffixes) and word not in lexicon.not_findings and word.isascii():
        return "disease"
    return "begin" if word in lexicon.trie else ""


def _mark_word(marks: Marks, i: int, word: str, sort: str) -> None:
    """A word that is no term, by its sort (see `_sort_of`)."""
    if sort == "verb":
        marks.verbs.append(i)
    elif whole := _elided(marks.words, i, marks.lexicon.trie):
        marks.organs.append(Mention(i, i + 1, whole))
    elif sort == "number":
        _mark_number(marks, i, word)
    elif sort == "level":
        marks.organs.append(Mention(i, i + 1, word))
    elif sort == "disease":
        marks.heads.append(Mention(i, i + 1, word))


def _mark_number(marks: Marks, i: int, word: str) -> None:
    ordinal = _ORDINAL.match(word)
    if ordinal or word in _ORDINAL_WORDS:
        marks.modifiers.append(Modifier(i, i + 1, "level", ordinal[1] if ordinal else _ORDINAL_WORDS[word]))
        return
    words = marks.words
    for j in range(i + 1, min(i + 5, len(words))):
        scale = _UNITS.get(words[j])
        if scale is not None:
            marks.modifiers.append(Modifier(i, i + 1, "size", float(word) * scale * _bound(marks, i)))
            return
        if words[j] not in ("x", "by", "to", ",") and not words[j][0].isdigit():
            return


def _measured(organ: Mention, marks: Marks) -> Mention | None:
    """A bare "volume" beside another organ is what is measured of that one: "prostate volume"."""
    words = marks.words
    if organ.end - organ.begin > 1 or words[organ.begin] not in marks.lexicon.grammar["sizes"]:
        return None
    beside = any(o.end == organ.begin for o in marks.organs) or words[organ.end : organ.end + 1] == ("of",)
    return organ if beside else None


def _bound(marks: Marks, i: int) -> float:
    """ "shorter than 10 mm" is a little less than 10 mm; the comparison is no change."""
    at = i - 2 if i > 1 and marks.words[i - 1] == "than" else i - 1
    if at < 0 or marks.words[at] not in marks.lexicon.grammar["under"]:
        return 1.0
    marks.modifiers = [m for m in marks.modifiers if m.begin != at]
    return 0.95


def _held_by(organ: Mention, marks: Marks) -> Mention | None:
    """Which of two organs joined by "of" says nothing of its own.

    "the structures of the thorax": the second, which is too wide; "the right lobe of the thyroid": the first.
    """
    at, words = organ.begin - 1, marks.words
    while at > 0 and words[at] in ("the", "left", "right", "both"):
        at -= 1
    if at <= 0 or words[at] != "of":
        return None
    before = next((other for other in marks.organs if other.end == at), None)
    if before is None or _measured(before, marks):
        return None
    wide = [marks.lexicon.organ(o.name).broad for o in (before, organ)]
    return before if wide == [True, False] else organ
