"""OptionLetter: which of the given options a completion commits to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rewards.answer import Answer, extract
from rewards.base import Reward, RewardInput, RewardResult
from rewards.choices import OptionSet, option_set
from rewards.claims import PROSE, Reader, Said, checked_read, heard, settle
from rewards.fuzzy import nearest_option
from rewards.phrases import Phrases, Reading, chosen
from rewards.rivals import rivals_after
from rewards.statements import prepared, statements
from rewards.text import text_key
from rewards.words import clean_phrase
from rewards.yesno import read_yes_no


class OptionLetter(Reward):
    """1 when the completion commits to exactly the gold option (or set of options), else 0.

    gold: a letter, an option's text, or both ("B. Pneumonia"); with `meta["multi"]` a run or list of them, compared as
    a set. All places that commit to an answer must agree; letter and text must agree; nothing is guessed.
    fuzzy: also accept a misspelt option text inside a tag, box, JSON answer or after a cue (see `nearest_option`).
    read: "prose" reads all of a completion, "closed" only marked answers (see `rewards.claims.heard`).
    """

    name = "option"

    def __init__(self, fuzzy: bool = False, read: str = PROSE) -> None:
        self.fuzzy = fuzzy
        self.read = checked_read(read)

    def check_gold(self, sample: RewardInput) -> str | None:
        problem = _options_problem(tuple(sample.options))
        if problem is not None:
            return problem
        try:
            _gold_letters(sample.gold, option_set(tuple(sample.options)), bool(sample.meta.get("multi")))
        except ValueError as error:
            return str(error)
        return None

    def score(self, sample: RewardInput) -> RewardResult:
        raw = tuple(sample.options)
        problem = _options_problem(raw)
        if problem is not None:
            return RewardResult(None, "gold_invalid", reason=problem)
        options = option_set(raw)
        multi = bool(sample.meta.get("multi"))
        try:
            gold = _gold_letters(sample.gold, options, multi)
        except ValueError as error:
            return RewardResult(None, "gold_invalid", reason=str(error))

        answer = heard(sample, self.read)
        if answer.status != "ok":
            return RewardResult(0.0, answer.status, reason=answer.reason)
        said = _Choice(options, multi, self.fuzzy).settled(answer)
        if said.status != "ok":
            return RewardResult(0.0, said.status, reason=said.reason)
        right = said.value == gold
        reason = f"read from {answer.channel}" if right else f"{said.parsed} is not {''.join(sorted(gold))}"
        return RewardResult(float(right), parsed=said.parsed, reason=reason)


class _Choice:
    """How answers are read against a set of options."""

    def __init__(self, options: OptionSet, multi: bool, fuzzy: bool) -> None:
        self.options = options
        self.phrases = Phrases(options, multi)
        self.fuzzy = fuzzy and not multi
        inner = Reader(
            self.phrases.read, bare=lambda answer: (), beside=self._beside, decides_beside=True, is_whole=self._is_whole
        )
        self.reader, self.inner = replace(inner, read=self._claim), inner

    def settled(self, answer: Answer) -> Said:
        plain = prepared(answer, self.phrases)
        said = settle(plain, self.reader)
        if said.status == "unparsed" and plain.rest != answer.rest and not answer.closed:
            return settle(answer, self.reader)
        return said

    def _is_whole(self, text: str) -> bool:
        return self.phrases.read(text).exact

    def _beside(self, answer: Answer) -> Iterator[Said]:
        found = list(statements(answer, self.phrases))
        yield from (said for _, said in found)
        if not answer.closed and not self.phrases.multi:
            begin = min([start for start, _ in found] + [candidate.start for candidate in answer.candidates], default=0)
            for letter in rivals_after(answer.rest[begin:]) & set(self.options.letters):
                yield Said(frozenset(letter), letter, "conflict", f"{letter} is offered after the answer")

    def _claim(self, text: str) -> Said:
        """A phrase, or a sentence ("C is wrong, B is right"), which may take the phrase before it back ("B. No, it is C")."""
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

    def _misspelt(self, text: str) -> Reading | None:
        letter = nearest_option(text_key(clean_phrase(text)), self.options.keys)
        return chosen(letter) if letter is not None else None


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


def gold_letters(sample: RewardInput) -> frozenset[str]:
    """The letters of a row's label, which may be written in every form that `OptionLetter` takes. Raises ValueError."""
    if problem := _options_problem(tuple(sample.options)):
        raise ValueError(problem)
    options, multi = option_set(tuple(sample.options)), sample.meta.get("multi") is True
    try:
        return _gold_letters(sample.gold, options, multi)
    except ValueError:
        if not (multi and isinstance(sample.gold, str) and "," in sample.gold):
            raise
        return _gold_letters([part.strip() for part in sample.gold.split(",")], options, multi)


def _gold_letters(gold: Any, options: OptionSet, multi: bool) -> frozenset[str]:
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


def _gold_text(text: str, options: OptionSet, multi: bool) -> frozenset[str]:
    letters = _one_gold(text, options.texts, multi)
    if isinstance(letters, str):
        raise ValueError(letters)
    return letters
