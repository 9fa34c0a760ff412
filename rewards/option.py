"""OptionLetter: which of the given options a completion commits to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from rewards.answer import Answer, extract
from rewards.base import RewardInput, RewardResult
from rewards.choices import OptionSet, by_letter, option_set
from rewards.claims import PROSE, RETRACTS, Claim, Reader, Said, behind, claims_of, settle
from rewards.fuzzy import nearest_option
from rewards.phrases import PhraseReading, Phrases, chosen, conflict, nothing
from rewards.short import ShortAnswer
from rewards.statements import prepared, statements
from rewards.text import text_key
from rewards.words import clean_phrase
from rewards.yesno import read_yes_no


class OptionLetter(ShortAnswer):
    """1 when the completion commits to exactly the gold option (or set of options), else 0.

    gold: a letter, an option's text, or both ("B. Pneumonia"); with `meta["multi"]` a run or list of them, compared as
    a set. All places that commit to an answer must agree; letter and text must agree; nothing is guessed.
    fuzzy: also accept a misspelt option text inside a tag, box, JSON answer or after a cue (see `nearest_option`).
    read: "prose" reads all of a completion, "closed" only marked answers (see `rewards.claims.heard`).
    """

    name = "option"

    def __init__(self, fuzzy: bool = False, read: str = PROSE) -> None:
        super().__init__(read)
        self.fuzzy = fuzzy

    def label(self, sample: RewardInput) -> frozenset[str]:
        return _gold_letters(sample.gold, _texts(sample), bool(sample.meta.get("multi")))

    def said(self, answer: Answer, sample: RewardInput, label: frozenset[str]) -> Said:
        said = _choice(_texts(sample), bool(sample.meta.get("multi")), self.fuzzy).settled(answer)
        return Said(said.value, said.parsed, reason=f"read from {answer.channel}") if said.status == "ok" else said

    def judged(self, said: Said, label: frozenset[str]) -> RewardResult:
        right = said.value == label
        return RewardResult(
            float(right),
            parsed=said.parsed,
            reason=said.reason if right else f"{said.parsed} is not {''.join(sorted(label))}",
        )


def _nowhere(answer: Answer) -> tuple[list[Claim], ...]:
    return ()


class _Choice:
    """How answers are read against a set of options."""

    def __init__(self, options: OptionSet, multi: bool, fuzzy: bool) -> None:
        self.options = options
        self.phrases = Phrases(options, multi)
        self.fuzzy = fuzzy and not multi
        self.reader, self.inner = (
            Reader(read, _nowhere, self._beside, decides_beside=True, is_whole=self._is_whole)
            for read in (self._claim, self.phrases.read)
        )

    def settled(self, answer: Answer) -> Said:
        plain = prepared(answer, self.phrases) if answer.rest.strip() else answer
        said = settle(plain, self.reader)
        if said.status == "unparsed" and plain.rest != answer.rest and not answer.closed:
            return settle(answer, self.reader)
        return said

    def _is_whole(self, text: str) -> bool:
        return self.phrases.read(text).exact

    def _beside(self, answer: Answer) -> Iterator[Said]:
        found = list(statements(answer, self.phrases)) if answer.rest.strip() else []
        yield from (said for _, said in found)
        if found and not answer.candidates:
            last = claims_of(answer.rest[max(start for start, _ in found) :])[-1]
            if last.takes_back == RETRACTS and not last.text.strip(" .!"):  # "Sorry for so many words." takes nothing
                yield conflict("the answer is taken back", firm=True)
        if not answer.closed and not self.phrases.multi and len(self.options.mentions(answer.rest)) > 1:
            begin = min([start for start, _ in found] + [candidate.start for candidate in answer.candidates], default=0)
            for claim in behind(answer.rest[begin:]):
                rival = self.phrases.read(claim.text) if claim.takes_back != RETRACTS else nothing()
                if rival.value or rival.status == "conflict":
                    yield conflict(f"{rival.parsed} is offered after the answer", rival.parsed)

    def _claim(self, text: str) -> Said:
        """A phrase, or a sentence ("C is wrong, B is right"), which may take the phrase back ("B. No, it is C")."""
        reading = self.phrases.read(text)
        if reading.exact or reading.status == "conflict":
            return reading
        said = settle(extract(text), self.inner)
        if said.value or said.status == "conflict":
            return said
        word = read_yes_no(text) if self.options.yes_no and not reading.value else ""
        if word in self.options.keys:
            return chosen(self.options.keys[word])
        return (self._misspelt(text) if self.fuzzy else None) or reading

    def _misspelt(self, text: str) -> PhraseReading | None:
        letter = nearest_option(text_key(clean_phrase(text)), self.options.keys)
        return chosen(letter) if letter is not None else None


@lru_cache(maxsize=1024)
def _choice(options: tuple[str, ...], multi: bool, fuzzy: bool) -> _Choice:
    return _Choice(option_set(options), multi, fuzzy)


@lru_cache(maxsize=8192)
def _options_problem(options: tuple[str, ...]) -> str | None:
    if not 2 <= len(options) <= 26:
        return f"{len(options)} options; a choice needs 2 to 26"
    keys: dict[str, int] = {}
    for index, text in enumerate(options):
        if not isinstance(text, str) or not text.strip():
            return f"option {index + 1} is empty or no text: {text!r}"
        key = " ".join(text.casefold().split())
        if key in keys:
            return f"options {keys[key] + 1} and {index + 1} are the same: {text!r}"
        keys[key] = index
    return None


def _texts(sample: RewardInput) -> tuple[str, ...]:
    """The options in the order of their letters. Raises ValueError for what is no list of 2 to 26 different texts."""
    given: Any = sample.options
    if not isinstance(given, tuple | list):
        given = by_letter(given) if isinstance(given, Mapping) else given
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"options are a list of texts, or texts by letter, got {type(given).__name__} {given!r}")
    texts = tuple(given)
    if problem := _options_problem(texts):
        raise ValueError(problem)
    return texts


def gold_letters(sample: RewardInput) -> frozenset[str]:
    """The letters of a row's label, which may be written in every form that `OptionLetter` takes. Raises ValueError."""
    options, multi = _texts(sample), sample.meta.get("multi") is True
    try:
        return _gold_letters(sample.gold, options, multi)
    except ValueError:
        if not (multi and isinstance(sample.gold, str) and "," in sample.gold):
            raise
        return _gold_letters([part.strip() for part in sample.gold.split(",")], options, multi)


def _gold_letters(gold: Any, options: tuple[str, ...], multi: bool) -> frozenset[str]:
    """The gold as letters; ValueError says what is wrong with it."""
    if isinstance(gold, bool) or gold is None:
        raise ValueError(f"gold {gold!r} is neither a letter nor an option's text")
    if isinstance(gold, str | int | float):
        return _gold_text(str(gold), options, multi)
    if not multi:
        raise ValueError(f"gold {gold!r} is a list; set meta['multi'] for several right options")
    if not isinstance(gold, Iterable):
        raise ValueError(f"gold {gold!r} is neither a letter nor an option's text")
    parts = [_gold_text(str(item), options, multi=False) for item in gold]
    letters: frozenset[str] = frozenset().union(*parts)
    if not letters:
        raise ValueError("gold is empty")
    if len(letters) != len(parts):
        raise ValueError(f"gold {gold!r} names an option twice")
    return letters


@lru_cache(maxsize=8192)
def _one_gold(text: str, options: tuple[str, ...], multi: bool) -> frozenset[str] | str:
    if not text.strip():
        return "gold is empty"
    reading = Phrases(option_set(options), multi).read(text)
    if reading.exact:
        return frozenset(reading.value)
    if text_key(text) and len(text.strip()) == 1 and text.strip().isalpha() and reading.status != "conflict":
        return f"gold {text!r} is outside the {len(options)} options"
    return f"gold {text!r} is neither one letter nor the text of one option" + (
        f" ({reading.reason})" if reading.reason else ""
    )


def _gold_text(text: str, options: tuple[str, ...], multi: bool) -> frozenset[str]:
    letters = _one_gold(text, options, multi)
    if isinstance(letters, str):
        raise ValueError(letters)
    return letters
