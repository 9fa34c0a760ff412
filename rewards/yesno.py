"""Yes or no: the word, a phrase that means it, or a sentence that restates the question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from rewards.answer import Answer
from rewards.base import RewardInput, RewardResult
from rewards.claims import (
    NOTHING,
    Claim,
    Reader,
    Said,
    asks,
    fold,
    is_conditional,
    is_disowned,
    sentence_claims,
    settle,
    stances,
    verdicts,
    without_ends,
)
from rewards.questions import Question, question_of
from rewards.short import ShortAnswer
from rewards.text import key_of_normalised, sentence_spans, strip_markup, table, text_key
from rewards.wording import as_said
from rewards.words import clean_phrase, strip_leads, words

_LONGEST_PHRASE = 80
_LONGEST_PROSE = 4000  # characters in which sentences are read against the question
_LABEL = re.compile(r"^(?:option )?\(?[A-E][).:]{1,2}\s+", re.IGNORECASE)  # of an option: "(B) No"
_AHEAD = 120  # characters before an answer word


# A yes or no counts where a clause begins or after a word that leads up to it, and only where its clause then ends or
# goes on with a subject: "no" before a noun is a determiner.
_TOKEN = re.compile(r"[^\s.,;:!?()\[\]{}\"'*<>/|。、，؛،।=→—–-]+")
_BEFORE = re.compile(
    r"(?:^|[.;:!?,\n(>→—–/]|\s-|(?:\b(?:and|or|but|is|are|be|say|answer|so|thus|therefore|hence|definitely|probably"
    r"|clearly|likely)|['’]s)"
    r"(?: a(?: clear| definite)?)?)[\s\"'*]*$",
    re.IGNORECASE,
)
_OR_ELSE = re.compile(r"[\s\"')*,]*(?:or|oder|ou|или|/)\s*(?!so\b)", re.IGNORECASE)
_ELSE = re.compile(r"(\w+)[\s\"')*,]*(?:or|and|oder|ou|или|/)[\s\"']*$")
_AFTER = re.compile(
    r"[\s\"')*]*(?:$|[.,;:!?—–。、，।/]|\s-\s|\n|(?:and|or|but|because|since|there|it|the|this|that|i|we|as)\b)",
    re.IGNORECASE,
)


@cache
def _yes_no_words() -> tuple[dict[str, str], dict[str, str]]:
    """(single words, whole phrases)."""
    listed = table("answers")
    single = {key_of_normalised(word): value for value in ("yes", "no") for word in listed[value]}
    return single, single | dict.fromkeys(listed["present"], "yes") | dict.fromkeys(listed["absent"], "no")


def read_yes_no(text: str) -> str:
    """ "yes", "no", "" when neither is said, "both" when both are. `text` went through `normalise`.

    "no" counts as the answer word only, never as a determiner ("no fracture is seen" says "" here: what it means
    depends on the question) and never inside another word.
    """
    single, phrases = _yes_no_words()
    if len(text) <= _LONGEST_PHRASE:
        phrase = _LABEL.sub("", clean_phrase(text))
        for plain in _plainer(phrase):
            if (said := phrases.get(key_of_normalised(plain))) is not None:
                return said
        if not phrase.isascii():
            for word, value in single.items():
                if phrase.startswith(word) and words().closers_only.fullmatch(phrase, len(word)):
                    return value
    found: set[str] = set()
    for start, end in sentence_spans(text := stances().sure.sub(" ", strip_markup(text))):
        if not asks(text[start:end]) and not is_conditional(text[start:end]):
            found |= _said_in(text, start, end)
    if len(found) == 2:
        return "both"
    return found.pop() if found else ""


def _plainer(phrase: str) -> Iterator[str]:
    """A phrase, then without what announces it, then without what is said about it."""
    yield phrase
    yield strip_leads(phrase)
    if (shorter := without_ends(phrase)) != phrase:
        yield strip_leads(shorter)


def _said_in(text: str, start: int, end: int) -> set[str]:
    """The answer words of a sentence, but those of somebody else. A word with an alternative says both."""
    single, _ = _yes_no_words()
    said: set[str] = set()
    for match in _TOKEN.finditer(text, start, end):
        word = single.get(match.group().casefold())
        if word is None or (word in said and _OR_ELSE.match(text, match.end(), end) is None):
            continue
        if not _AFTER.match(text, match.end(), end):
            continue
        if not _BEFORE.search(text[max(start, match.start() - 24) : match.start()]):
            continue
        ahead = text[max(start, match.start() - _AHEAD) : match.start()]
        is_open = _OR_ELSE.match(text, match.end(), end) or (
            (other := _ELSE.search(ahead)) and other.group(1) in single
        )
        named = {"yes", "no"} if is_open else {word}
        if not named <= said and not is_disowned(ahead) and not stances().another.search(ahead):
            said |= named
    return said


_YES_NO = {
    "yes": Said("yes", "yes"),
    "no": Said("no", "no"),
    "": NOTHING,
    "both": Said(status="conflict", reason="both yes and no are said"),
}


def _read(text: str, question: Question) -> Said:
    """The word, or what a sentence says to the question; they must agree."""
    said = {word} if (word := read_yes_no(text)) else set()
    if question.asked and " " in text and len(text) <= _LONGEST_PROSE:
        sentences = [text[start:end] for start, end in sentence_spans(text)]
        said |= {verdict for sentence in sentences if (verdict := _restated(sentence, question))}
        if word == "yes" and any(question.may_deny(stances().sure.sub(" ", sentence)) for sentence in sentences):
            said.add("no")
    return _YES_NO["both" if len(said) > 1 else said.pop() if said else ""]


def _restated(sentence: str, question: Question) -> str:
    verdict = question.verdict(strip_markup(sentence))
    doubt = (
        stances().doubts.search(sentence) if verdict else None
    )  # but "not clear" is no doubt about what is asked to be clear
    return verdict if doubt is None or set(as_said(doubt.group())) & set(question.asked) else ""


def _prose(answer: Answer) -> tuple[list[Claim], ...]:
    return (sentence_claims(answer.rest.strip()),)


class YesNo(ShortAnswer):
    """1 when the completion answers yes or no as the gold does, else 0.

    The answer is the word, or a sentence that restates the question of the prompt ("The heart is enlarged."); where the
    prompt holds no single yes or no question, only the word counts.

    gold: a bool or a word for yes or no in any of the package's languages ("Yes.", "true", "아니요").
    read: "prose" reads all of a completion, "closed" only marked answers (see `rewards.claims.heard`).
    """

    name = "yesno"

    def label(self, sample: RewardInput) -> str:
        gold = yes_no_gold(sample.gold)
        if not gold:
            raise ValueError(
                f"gold {sample.gold!r} is neither yes nor no; for more answers give options and use OptionLetter"
            )
        return gold

    def said(self, answer: Answer, sample: RewardInput, label: str) -> Said:
        question = question_of(sample.prompt)

        def read(text: str) -> Said:
            return _read(text, question)

        def beside(answer: Answer) -> list[Said]:
            prose = () if answer.channel == "bare" else _prose(answer)
            return [fold(place, read) for place in (*prose, *verdicts(answer))]

        said = settle(answer, Reader(read, bare=_prose, beside=beside, decides_beside=True))
        if said.status == "unparsed" and not question.asked:
            return replace(said, reason=f"{said.reason}; the prompt holds no yes or no question")
        return said

    def judged(self, said: Said, label: str) -> RewardResult:
        right = said.value == label
        return RewardResult(float(right), parsed=said.value, reason="" if right else f"{said.value} is not {label}")


def yes_no_gold(gold: Any) -> str:
    if isinstance(gold, bool):
        return "yes" if gold else "no"
    return _yes_no_words()[0].get(text_key(gold), "") if isinstance(gold, str) else ""
