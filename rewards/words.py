"""The word lists around a choice, compiled: connectives, negators, contrasts, verdicts, in many languages."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources

from rewards.text import normalise


def _literal(pattern: str) -> str:
    """The letters that every match of a word-list entry begins with, in lower case."""
    found = re.match(r"[^\W\d_][\w' ]*", re.sub(r"^(?:\(\?<![^()]*\))+", "", pattern))
    if found is None:
        raise ValueError(f"the entry {pattern!r} of data/choices.json must begin with letters")
    return found.group().lower()


class Words:
    """The compiled word lists of data/choices.json."""

    def __init__(self) -> None:
        source = resources.files("rewards") / "data" / "choices.json"
        table: dict[str, list[str]] = json.loads(normalise(source.read_text(encoding="utf-8")))

        def alternatives(words: str, marks: str = "") -> str:
            plain = sorted(table[words], key=len, reverse=True)
            parts = [rf"(?<!\w)(?:{'|'.join(plain)})(?!\w)"] if plain else []
            if marks:
                parts.append("|".join(sorted(table[marks], key=len, reverse=True)))
            return "(?:" + "|".join(parts) + ")"

        flags = re.IGNORECASE
        option = alternatives("option_words", "option_marks")
        self.lead = re.compile(
            rf"\s*(?:(?:{alternatives('leads', 'lead_marks')}|{alternatives('text_cues')})[\s:,]*"
            rf"|(?:(?<!\w)(?:a|o|la|el|le|die|der|the|na|l['’])\s*)?{option}(?:\s?(?:is|no\.?|number|ist|est|es|é|è|là|adalah|ni)(?!\w))?\s*[:=]?\s*)",
            flags,
        )
        self.describing = re.compile(rf"\s*{alternatives('describing')}", flags)
        self.option_word = re.compile(rf"\s+{option}", flags)
        self.join_word = re.compile(
            rf"\s*(?:(?P<or>{alternatives('ors', 'or_marks')})|{alternatives('joins', 'join_marks')}|[&/+|])\s*"
        )
        self.negator = re.compile(rf"\W{{0,3}}{alternatives('negators', 'negator_marks')}", flags)
        self.only = re.compile(r"\s*(?:only|just|merely|nur|solo|seulement|sure|certain|clear)\b", flags)
        self.negated_after = re.compile("|".join(table["negated_after"]), flags)
        self.contrast = re.compile(alternatives("contrasts", "contrast_marks"), flags)
        self.instead_of = re.compile(rf"\s*[,;(—–-]?\s*{alternatives('instead_of', 'instead_of_marks')}", flags)
        self.because = re.compile(rf"\s*{alternatives('because')}", flags)
        self.verb = re.compile(rf"\s*{alternatives('verbs')}", flags)
        self.closer = re.compile(rf"\s*(?:{'|'.join(sorted(table['closers'], key=len, reverse=True))})")
        self.closers_only = re.compile(
            rf"(?:\s*(?:{'|'.join(sorted(table['closers'], key=len, reverse=True))}))*[\s.!。]*"
        )
        self.wrong_lead = re.compile(
            rf"{alternatives('wrong_lead')}\s+(?:\w+\s+)?$|(?:{'|'.join(table['wrong_lead_marks'])})的?\s?$", flags
        )
        self.conditional_hints = tuple(
            sorted({_literal(entry) for entry in table["conditional"] + table["conditional_marks"]})
        )
        self.conditional_ascii_hints = tuple(hint for hint in self.conditional_hints if hint.isascii())
        self.conditional = re.compile(alternatives("conditional", "conditional_marks"), flags)
        self.soft_cue = re.compile(rf"{alternatives('soft_cues')}[\s,:*]*", flags)
        self.text_cue = re.compile(rf"{alternatives('text_cues')}[\s:*]+", flags)
        self.ascii_predicate = re.compile("|".join(table["predicates"]), flags)
        self.predicate = re.compile("|".join(table["predicates"] + table["predicate_marks"]), flags)
        self.bad_verdict = re.compile(rf"[\s,:;.()—–-]*{alternatives('bad_verdicts')}", flags)


@cache
def words() -> Words:
    return Words()
