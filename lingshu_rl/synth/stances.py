"""Whether a text states a known fact, denies it or does not name it: read with the stances of the report reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rewards.report import DEFAULT_PACKS, Entity, Lexicon, extract, load
from rewards.report.lexicon import TERMS, Finding
from rewards.report.sentences import read

MARKS = frozenset(".;:,!?/|")
AGREE = {"present": ("present",), "absent": ("absent",), "uncertain": ("uncertain", "present")}
SMALL = frozenset(("the", "a", "an", "of", "in", "with", "and", "to"))
# What a text says of the picture itself ("CT", "abdomen") is denied by a word beside it, not by any "no" of the
# sentence.
_BEFORE = r"\b(?:no|not|neither|nor)\s+(?:an?\s+|the\s+|really\s+)?"
_AFTER = (
    r"\s+(?:is|are|was|were|has been|have been)\s+(?:absent|missing|(?:not|never)\s+(?:seen"
    r"|visible|shown|identified|present|included|imaged|visuali[sz]ed))\b"
)


def states(fact: str, text: str, about_picture: bool) -> bool | None:
    """True: said, and denied nowhere. False: denied, or doubted and never said. None: its words stand in no sentence.

    about_picture: the fact names how the picture was made or the region that it shows, not a finding in it.
    """
    if not _named(fact, text):
        return None
    if about_picture:
        return not re.search(rf"{_BEFORE}{re.escape(fact)}\b|\b{re.escape(fact)}{_AFTER}", text, re.IGNORECASE)
    lexicon, wanted = reading_of(fact)
    said = extract(text, lexicon).entities
    return all(_stands(one, [e for e in said if e.finding == one.finding]) for one in wanted)


def is_place(fact: str) -> bool:
    """Whether the fact is an organ or a region, and nothing more."""
    words = _words(fact, load(DEFAULT_PACKS))
    node: Any = load(DEFAULT_PACKS).trie
    for word in words:
        node = node.get(word, {})
    return any(kind == "anatomy" for kind, _ in node.get(TERMS, ()))


@lru_cache(maxsize=256)
def reading_of(fact: str) -> tuple[Lexicon, tuple[Entity, ...]]:
    """A lexicon that knows the fact, and what the fact states in it; a term that no pack has is taken for a finding."""
    known = load(DEFAULT_PACKS)
    found = tuple(entity for entity in extract(fact, known).entities if not entity.group)
    if found:
        return known, found
    words = _words(fact, known)
    trie = node = dict(known.trie)
    for word in words:
        node[word] = dict(node.get(word, {}))
        node = node[word]
    node[TERMS] = (("finding", fact),)
    taught = replace(known, trie=trie, findings={**known.findings, fact: Finding(fact)})
    return taught, (Entity(fact),)


def _stands(wanted: Entity, said: Sequence[Entity]) -> bool:
    """Whether what is said of a finding contains the wanted stance and nothing that opposes it at the same place."""
    here = [entity for entity in said if _together(wanted.side, entity.side)]
    stances = AGREE[wanted.assertion]
    agreeing = [entity for entity in here if entity.assertion in stances]
    opposing = "present" if wanted.assertion == "absent" else "absent"
    against = [e for e in here if e.assertion == opposing and not (e.severity or e.qualifiers)]
    return bool(agreeing) and not any(all(_same_place(a, b) for b in agreeing) for a in against)


def _same_place(a: Entity, b: Entity) -> bool:
    apart = a.places and b.places and not set(a.places) & set(b.places)
    return _together(a.side, b.side) and not apart


def _together(a: str, b: str) -> bool:
    return not a or not b or a == b or "bilateral" in (a, b)


def _named(fact: str, text: str) -> bool:
    """Whether one sentence has all words of the fact, in any order and number."""
    lexicon = load(DEFAULT_PACKS)
    wanted = set(_words(fact, lexicon)) - SMALL
    return any(wanted <= set(sentence.words) for sentence in read(text, lexicon).sentences)


def _words(text: str, lexicon: Lexicon) -> tuple[str, ...]:
    return tuple(w for sentence in read(text, lexicon).sentences for w in sentence.words if w not in MARKS)
