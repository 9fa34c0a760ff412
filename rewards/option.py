"""OptionLetter: which of the given options a completion commits to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from rewards.answer import Answer, extract
from rewards.base import Reward, RewardInput, RewardResult
from rewards.choices import OptionSet, option_set
from rewards.claims import PROSE, Said, checked_read, claims_of, fold, heard, retractions, stances
from rewards.fuzzy import nearest_option
from rewards.phrases import CHOSEN, CONFLICT, EXCLUDED, NOTHING, Reading, clean_phrase, read_phrase
from rewards.rivals import rivals_after
from rewards.statements import FLOOD, Statement, agree, denied_letters, find_statements, open_ended
from rewards.text import text_key
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
        status, letters, reason = self._decide(answer, options, multi)
        if status != "ok":
            return RewardResult(0.0, status, reason=reason)
        parsed = "".join(sorted(letters))
        right = letters == gold
        return RewardResult(
            float(right), parsed=parsed, reason=reason if right else f"{parsed} is not {''.join(sorted(gold))}"
        )

    def _decide(self, answer: Answer, options: OptionSet, multi: bool) -> tuple[str, frozenset[str], str]:
        nobody: frozenset[str] = frozenset()
        if answer.status != "ok":
            return answer.status, nobody, answer.reason
        readings: list[Reading] = []
        if answer.closed:
            for text in dict.fromkeys(answer.texts):
                reading = self._closed(text, options, multi)
                if reading.kind != CHOSEN:
                    status = "conflict" if reading.kind == CONFLICT else "unparsed"
                    return status, nobody, reading.reason or f"the {answer.channel} holds no option"
                readings.append(reading)
            for text in dict.fromkeys(item.text for item in answer.lower if item.channel != "cue"):
                lower = self._closed(text, options, multi)
                if lower.kind == CHOSEN:
                    readings.append(lower)
        statements = find_statements(answer, options, multi)
        if FLOOD in statements:
            return "conflict", nobody, FLOOD.reading.reason
        if not answer.closed:
            if self.fuzzy and not multi and not statements and answer.channel == "cue":
                found = (_misspelt(text, options) for text in answer.texts)
                statements = [Statement(reading, "cue", 0) for reading in found if reading is not None]
            for channel in ("cue", "bare", "text"):
                if any(s.channel == channel and s.reading.kind == CONFLICT for s in statements):
                    return "conflict", nobody, "several options are offered"
                if any(s.channel == channel and s.reading.kind == CHOSEN for s in statements):
                    break
            else:
                return "unparsed", nobody, "no commitment to an option was found"
        sets = {reading.letters for reading in readings} | agree(statements) | open_ended(statements)
        if len(sets) == 1 and denied_letters(statements) & min(sets):
            return "conflict", nobody, "the same option is chosen and denied"
        if len(sets) != 1:
            shown = ", ".join(sorted("".join(sorted(letters)) for letters in sets))
            return "conflict", nobody, f"different answers: {shown}"
        for instead in retractions(_behind(answer)):
            other = read_phrase(instead, options, multi)
            if not instead or (other.kind == CHOSEN and other.exact and other.letters not in sets):
                return "conflict", nobody, "the answer is taken back"
        if not answer.closed and not multi:
            tail = answer.rest[min(statement.start for statement in statements) :]
            if rivals := rivals_after(tail) & set(options.letters) - min(sets):
                return "conflict", nobody, f"{', '.join(sorted(rivals))} is offered after the answer"
        channel = answer.channel if answer.closed else statements[0].channel
        return "ok", sets.pop(), f"read from {channel}"

    def _closed(self, text: str, options: OptionSet, multi: bool) -> Reading:
        """What is left of a closed answer when each claim that takes something back has been heard."""
        claims = claims_of(text) if stances().takes_back.search(text) is not None else []
        if not any(claim.takes_back for claim in claims):
            return self._claim(text, options, multi)
        readings: dict[str, Reading] = {}

        def read(claim: str) -> Said:
            reading = readings[claim] = self._claim(claim, options, multi)
            return Said(reading.letters or None, claim, reason=reading.reason)

        said = fold(claims, read)
        if said.status != "ok":
            return Reading(CONFLICT, reason=said.reason)
        return readings.get(said.parsed, Reading(NOTHING, reason="the answer is taken back"))

    def _claim(self, text: str, options: OptionSet, multi: bool) -> Reading:
        reading = read_phrase(text, options, multi)
        if reading.kind == CHOSEN and not reading.exact:
            if options.is_conditional(text):
                return Reading(CONFLICT, reason="the answer is conditional")
            # A reason may take the answer back ("B. No, the answer is C").
            if agree(find_statements(extract(text), options, multi)) - {reading.letters}:
                return Reading(CONFLICT, reason="the answer and its reason disagree")
        if reading.kind in (NOTHING, EXCLUDED):
            # A sentence rather than a phrase ("C is wrong, B is right").
            statements = find_statements(extract(text), options, multi)
            sets = agree(statements)
            if len(sets) > 1 or any(s.reading.kind == CONFLICT for s in statements):
                return Reading(CONFLICT, reason="several options are offered")
            if sets:
                return Reading(CHOSEN, sets.pop())
        if reading.kind == NOTHING and options.yes_no and (word := read_yes_no(text)) in options.keys:
            return Reading(CHOSEN, frozenset(options.keys[word]))
        if reading.kind != CHOSEN and self.fuzzy and not multi:
            return _misspelt(text, options) or reading
        return reading


def _behind(answer: Answer) -> str:
    """What follows the last answer of the deciding channel; a cue's text goes on behind "B."."""
    if not answer.candidates:
        return ""
    last = answer.candidates[-1]
    if answer.closed:
        return answer.rest[last.end :]
    return answer.rest[last.start :].partition(". ")[2]


def _misspelt(text: str, options: OptionSet) -> Reading | None:
    letter = nearest_option(text_key(clean_phrase(text)), options.keys)
    return Reading(CHOSEN, frozenset(letter)) if letter is not None else None


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
    prepared = option_set(options)
    if not text.strip():
        return "gold is empty"
    reading = read_phrase(text, prepared, multi)
    if reading.kind == CHOSEN and reading.exact:
        return reading.letters
    if text_key(text) and len(text.strip()) == 1 and text.strip().isalpha() and reading.kind != CONFLICT:
        return f"gold {text!r} is outside the {len(options)} options"
    return f"gold {text!r} is neither one letter nor the text of one option" + (
        f" ({reading.reason})" if reading.reason else ""
    )


def _gold_text(text: str, options: OptionSet, multi: bool) -> frozenset[str]:
    letters = _one_gold(text, options.texts, multi)
    if isinstance(letters, str):
        raise ValueError(letters)
    return letters
