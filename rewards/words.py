"""The word lists around a choice, compiled: connectives, negators, contrasts, verdicts, in many languages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources

from rewards.text import Folded, normalise, strip_markup, strip_quotes, unwrap_latex


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

        option = alternatives("option_words", "option_marks")
        self.lead = Folded(
            rf"\s*(?:(?:{alternatives('leads', 'lead_marks')}|{alternatives('text_cues')})[\s:,]*"
            rf"|(?:(?<!\w)(?:a|o|la|el|le|die|der|the|na|l['’])\s*)?{option}(?:\s?(?:is|no\.?|number|ist|est|es|é|è|là"
            rf"|adalah|ni)(?!\w))?\s*[:=]?\s*)"
        )
        self.describing = Folded(rf"\s*{alternatives('describing')}")
        self.option_word = Folded(rf"\s+{option}")
        self.join_word = re.compile(
            rf"\s*(?:(?P<or>{alternatives('ors', 'or_marks')})|{alternatives('joins', 'join_marks')}|[&/+|])\s*"
        )
        self.negator = Folded(rf"\W{{0,3}}{alternatives('negators', 'negator_marks')}")
        self.only = Folded(r"\s*(?:only|just|merely|nur|solo|seulement|sure|certain|clear)\b")
        self.negated_after = Folded("|".join(table["negated_after"]))
        self.contrast = Folded(alternatives("contrasts", "contrast_marks"))
        self.instead_of = Folded(rf"\s*[,;(—–-]?\s*{alternatives('instead_of', 'instead_of_marks')}")
        self.because = Folded(rf"\s*{alternatives('because')}")
        self.verb = Folded(rf"\s*{alternatives('verbs')}")
        self.closer = re.compile(rf"\s*(?:{'|'.join(sorted(table['closers'], key=len, reverse=True))})")
        self.closers_only = re.compile(
            rf"(?:\s*(?:{'|'.join(sorted(table['closers'], key=len, reverse=True))}))*[\s.!。]*"
        )
        self.wrong_lead = Folded(
            rf"{alternatives('wrong_lead')}\s+(?:\w+\s+)?$|(?:{'|'.join(table['wrong_lead_marks'])})的?\s?$"
        )
        self.conditional_hints = tuple(
            sorted({_literal(entry) for entry in table["conditional"] + table["conditional_marks"]})
        )
        self.conditional_ascii_hints = tuple(hint for hint in self.conditional_hints if hint.isascii())
        self.conditional = Folded(alternatives("conditional", "conditional_marks"))
        self.soft_cue = Folded(rf"{alternatives('soft_cues')}[\s,:*]*")
        self.text_cue = Folded(rf"{alternatives('text_cues')}[\s:*]+")
        self.ascii_predicate = Folded("|".join(table["predicates"]))
        self.predicate = Folded("|".join(table["predicates"] + table["predicate_marks"]))
        self.open_end = re.compile(rf"{alternatives('open_ends', 'open_end_marks')}\W{{0,6}}$")
        self.second_thought = Folded(rf"\W{{0,4}}{alternatives('second_thoughts')}")
        self.hedge = Folded(
            rf"{alternatives('besides', 'beside_marks')}(?:\s+{alternatives('beside_fillers')}){{0,4}}\s*(?=\S)"
        )
        self.also_true = Folded(rf"\s*{alternatives('also_true', 'also_true_marks')}")
        self.hedged_end = Folded(rf"[\s,(–—-]*{alternatives('hedged_ends')}[\s).!]*")
        self.denied_later = re.compile(rf"[^,;.、，。]{{0,40}}?(?:{'|'.join(table['denied_later'])})")
        self.denied_start = re.compile("|".join(table["denied_starts"]))
        self.reason_behind = Folded(rf"\s+{alternatives('reasons_behind')}")
        self.of_sentence = Folded(alternatives("of_sentence"))
        self.negated = Folded(rf"{alternatives('negated')}|n't\b|(?<!no )(?<!without )\bdoubt")
        self.negated_cue = Folded(
            rf"(?:{alternatives('negated_cues')}|n't)\s+(?:\w+\s+){{0,2}}$|{alternatives('unwise')} to\s+$"
        )
        self.same_kind = Folded(rf"{alternatives('same_kind')}\s+$")
        self.copula = Folded(rf"{alternatives('copulas')}(?: {alternatives('copula_adverbs')})?\s+")
        # Another letter beside the chosen one, and the words that explain it away ("B, since C would show air").
        self.rival_letter = re.compile(
            rf"(?:[,;:(→>–—-]\s*|\b(?:{'|'.join(table['rival_leads'])}) )\(?(?!A [a-z]|I\b)([A-Z])\)?(?![\w'’-])"
        )
        self.explained_away = Folded(rf"{alternatives('explained_away')}|n['’]t\b")
        self.not_excluded = Folded(alternatives("not_excluded"))
        self.bad_verdict = Folded(rf"[\s,:;.()—–-]*{alternatives('bad_verdicts')}")


@cache
def words() -> Words:
    return Words()


_HTML = re.compile(r"</?(?:b|i|u|em|strong|p|br|span|sub|sup|center|code|div|h[1-6])\s?/?>")
_STRAY_STOP = re.compile(r"(?<!\.\w)\.(?=[,;]\s(?:and )?not\b)")  # "B., not A"
_MOST_LEADS = 6


def may_be_conditional(text: str) -> bool:
    """A cheap test before `Words.conditional`."""
    lowered = text.lower()
    for hint in words().conditional_ascii_hints if text.isascii() else words().conditional_hints:
        if hint in lowered:
            return True
    return False


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
