"""Short free answers. An answer is the whole claim, or the claim without the words of its question; never a part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rewards.answer import Answer
from rewards.base import RewardInput, RewardResult
from rewards.claims import (
    FIRM_WORDS,
    Claim,
    Reader,
    Said,
    is_disowned,
    sentence_claims,
    settle,
    stances,
    without_ends,
)
from rewards.questions import Question, question_of, role_words, sets_apart
from rewards.short import ShortAnswer
from rewards.text import lines, normalise
from rewards.wording import abbreviates, answer_key, as_said, synonyms_of
from rewards.words import clean_phrase, strip_leads

SEPARATOR = re.compile(
    r"\s*(?:[,;/&+|\n、，؛،]|(?<!\w)(?:and|und|et|y|e|as well as|plus|with)(?!\w)|和|및|와|과|と|و)\s*", re.IGNORECASE
)
_SAME_THING = re.compile(r"\s*/\s*|\s+[-–—=]\s+|\s+also known as\s+|,?\s+(?:i\.e\.|aka),?\s+", re.IGNORECASE)
_FURTHER = re.compile(
    r"(?:(?:it|this|that) (?:may|might|could|can) be )?(?:(\w{3,}(?:al|ic|ous|ive|ar|ary))"
    r"|(?:due|secondary|related) to .+|\w+ed by .+)"
)
_LONGEST_ANSWER = 500  # characters; what is cut off could not match anyway
_PARENTHESIS = re.compile(r"\s*\(([^()]{1,80})\)\s*")


class OpenAnswer(ShortAnswer):
    """1 when a short free answer is the gold answer in other clothes, else 0.

    gold: a text, or a list of texts that are all right. `meta["synonyms"]` adds more: a list, or a mapping from an
    answer to its synonyms. Ignored: case, punctuation, articles, plural, spelling, accents, hyphens, the order of a
    list, and the words of a sentence that its question has too ("The organ shown is the liver."). Everything else
    counts, so a side, a negation, a digit or one word more or less makes another answer. A list with "or", or with one
    member too many, is another answer as well.
    read: "prose" reads all of a completion, "closed" only marked answers (see `rewards.claims.heard`).
    """

    name = "open"

    def label(self, sample: RewardInput) -> _Accepted:
        golds = texts_of(sample.gold)
        if not golds:
            raise ValueError(f"gold {sample.gold!r} is no text and no list of texts")
        if not all(map(answer_key, golds)):
            raise ValueError(f"gold {sample.gold!r} holds an answer without a letter or digit")
        return _accepted(sample)

    def is_certain(self, sample: RewardInput, result: RewardResult) -> bool:
        """Other words than the label's may mean the same; a hedge or a cut answer does not."""
        return super().is_certain(sample, result) and (result.value == 1.0 or result.status != "ok")

    def said(self, answer: Answer, sample: RewardInput, label: _Accepted) -> Said:
        question = question_of(sample.prompt)
        reader = Reader(
            lambda text: _read(text, label, question), bare=lambda answer: _only_line(answer, label), is_whole=label.has
        )
        return settle(answer, reader)

    def judged(self, said: Said, label: _Accepted) -> RewardResult:
        right = said.value is True
        return RewardResult(
            float(right), parsed=said.parsed, reason="" if right else f"{said.parsed[:80]!r} is not {label.first!r}"
        )


def _only_line(answer: Answer, accepted: _Accepted) -> list[list[Claim]]:
    body = lines(answer.body)
    if len(body) != 1:
        return []
    return [[Claim(body[0])] if accepted.has(body[0]) else sentence_claims(body[0])]


def _read(text: str, accepted: _Accepted, question: Question) -> Said:
    """True for one of the accepted answers, else the key of the other one."""
    text = text[:_LONGEST_ANSWER]
    parsed = clean_phrase(text)
    if _match(parsed, accepted) or _in_sentence(parsed, accepted, question):
        return Said(True, parsed)
    key = answer_key(parsed)
    firm = len(text.split()) <= FIRM_WORDS and not _adds(key, accepted)
    return Said(key, parsed, firm=firm) if key else Said()


def _adds(key: str, accepted: _Accepted) -> bool:
    """Whether a sentence only doubts a further property of what the label names: "It may be viral." behind "pneumonia",
    but not behind "bacterial pneumonia"."""
    further = _FURTHER.fullmatch(key)
    if further is None or further.group(1) in role_words("whole") | role_words("no"):
        return False
    return further.group(1) is None or not any(_FURTHER.fullmatch(word) for name in accepted.words for word in name)


def texts_of(gold: Any) -> list[str]:
    if isinstance(gold, bool) or gold is None:
        return []
    if isinstance(gold, str | int | float):
        return [str(gold)] if str(gold).strip() else []
    if isinstance(gold, Iterable) and not isinstance(gold, Mapping):
        golds = list(gold)
        return golds if all(isinstance(item, str) and item.strip() for item in golds) else []
    return []


@dataclass(frozen=True)
class _Accepted:
    """Every right answer: as keys, as keys without spaces, as sorted lists of keys, and as words, longest first.

    asks: one of them ends with a question mark. first: the one to show.
    """

    first: str
    keys: frozenset[str]
    squashed: frozenset[str]
    lists: frozenset[tuple[str, ...]]
    words: tuple[tuple[str, ...], ...]
    asks: bool

    def has(self, text: str) -> bool:
        """Whether a text is one of them word by word, though it may ask or hold an "or" as they do."""
        return answer_key(text) in self.keys and (self.asks or not text.rstrip().endswith("?"))


def _accepted(sample: RewardInput) -> _Accepted:
    golds = texts_of(sample.gold)
    synonyms = sample.meta.get("synonyms", ())
    if isinstance(synonyms, Mapping):
        by_key = {answer_key(str(name)): texts_of(values) for name, values in synonyms.items()}
        extra = [text for gold in golds for text in by_key.get(answer_key(gold), ())]
    else:
        extra = texts_of(synonyms)
    return _accept((*golds, *extra))


@lru_cache(maxsize=8192)
def _accept(texts: tuple[str, ...]) -> _Accepted:
    """An abbreviation given in brackets in the label is a right answer too."""
    forms = [form for text in texts for form in _forms(text)]
    keys = frozenset(answer_key(form) for form in forms) - {""}
    words = {tuple(key.split()) for key in keys} | {as_said(form) for form in forms}
    words |= {tuple(name.split()) for key in keys for name in synonyms_of(key)}
    said = sorted(words | {turned for name in words if (turned := _turned(name))} - {()}, key=len, reverse=True)
    return _Accepted(
        texts[0],
        keys,
        frozenset(map(_squashed, keys)),
        frozenset(_parts(normalise(form)) for form in forms),
        tuple(said),
        any(text.rstrip().endswith("?") for text in texts),
    )


def _turned(name: tuple[str, ...]) -> tuple[str, ...]:
    """ "head of pancreas" for "pancreas head" and the other way; () for other names."""
    if len(name) == 2:
        return name[1], "of", name[0]
    return (name[2], name[0]) if len(name) == 3 and name[1] == "of" else ()


def _forms(text: str) -> list[str]:
    inner = _PARENTHESIS.search(text)
    if inner is None:
        return [text]
    outer = _PARENTHESIS.sub(" ", text).strip()
    forms = [text, outer]
    if abbreviates(inner.group(1), outer) or abbreviates(outer, inner.group(1)):
        forms.append(inner.group(1))
    return forms


def _match(phrase: str, accepted: _Accepted) -> bool:
    """Whether a cleaned phrase is one of the accepted answers, wholly."""
    if _same(phrase, accepted):
        return True
    bare = without_ends(phrase)
    return any(_same(form, accepted) for form in (bare, strip_leads(bare)) if form)


def _in_sentence(phrase: str, accepted: _Accepted, question: Question) -> bool:
    """Whether a sentence says an accepted answer and beside it only words of its question and of any statement."""
    plain = _PARENTHESIS.sub(_without_short, without_ends(phrase))
    if stances().alternative.search(plain) or is_disowned(plain) or stances().doubts.search(plain):
        return False
    return any(_holds(as_said(form), accepted, question) for form in {plain, question.without_image(plain)})


def _without_short(bracket: re.Match[str]) -> str:
    """Nothing for the short form of the words before it: "magnetic resonance imaging (MRI)"."""
    short = bracket.group(1)
    before = bracket.string[: bracket.start()].split()[-len(short) :]
    return " " if abbreviates(short, " ".join(before)) else bracket.group()


def _holds(said: tuple[str, ...], accepted: _Accepted, question: Question) -> bool:
    for answer in accepted.words:
        size = len(answer)
        for start in range(len(said) - size + 1):
            if said[start : start + size] != answer or not question.explains(said[:start] + said[start + size :]):
                continue
            if start == 0 or not sets_apart(said[start - 1]):
                return True  # but "the left kidney" is more than "kidney"
    return False


def _same(text: str, accepted: _Accepted) -> bool:
    key = answer_key(text)
    if key in accepted.keys or _squashed(key) in accepted.squashed:
        return True
    bracket = _PARENTHESIS.search(text)
    if bracket is not None:
        outer = _PARENTHESIS.sub(" ", text).strip()
        inner = bracket.group(1)
        named_twice = answer_key(inner) in accepted.keys or abbreviates(inner, outer) or abbreviates(outer, inner)
        return named_twice and answer_key(outer) in accepted.keys
    names = _SAME_THING.split(text)
    if len(names) > 1 and all(answer_key(name) in accepted.keys for name in names):
        return True
    parts = _parts(text)
    return len(parts) > 1 and parts in accepted.lists


def _squashed(key: str) -> str:
    """ "X ray" and "Xray": a key without spaces, unless digits would run together."""
    return key if re.search(r"\d \d", key) else key.replace(" ", "")


def _parts(text: str) -> tuple[str, ...]:
    """The members of a list, sorted."""
    return tuple(sorted(key for part in SEPARATOR.split(text) if (key := answer_key(part))))
