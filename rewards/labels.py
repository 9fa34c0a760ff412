"""Sets of labels, in the shapes that people and models write them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from rewards.answer import Answer
from rewards.base import RewardInput, RewardResult
from rewards.claims import FIRM_WORDS, PROSE, Reader, Said, claims_of, core, is_disowned, settle, stances
from rewards.open_answers import SEPARATOR, texts_of
from rewards.questions import is_neutral, role_words
from rewards.short import ShortAnswer
from rewards.text import strip_markup, strip_quotes, table, text_key, unwrap_latex
from rewards.wording import answer_key, as_said

NOTHING_FOUND = "no finding"  # what an empty set of labels says

_MOST_LABELS = 300
_NUMBERED = re.compile(r"^\(?\d{1,2}[.):]\s+")
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_KEYED = re.compile(r"^(?P<label>.*\w[)\]]?)\s*(?:[:=]|\s[-–—]\s)\s*(?P<value>-?\w+(?: \w+)?)$")
_PREFIX = re.compile(
    r"^(?:the )?(?:(?:predicted|final|correct|positive) )?(?:labels?|findings?|diagnos[ie]s|answers?|class(?:es)?"
    r"|conditions?|abnormalit(?:y|ies)"
    r"|impressions?)(?: (?:is|are|include))?\s*(?::|(?<=is)|(?<=are)|(?<=include))\s*(?=\S)",
    re.IGNORECASE,
)
_BRACKET = re.compile(r"\s*\(([^()]{1,80})\)\s*$")


class LabelSet(ShortAnswer):
    """F1 between the named labels and the gold labels, in which a wrong label costs part of a right one.

    value = 2 r / (named + gold) with r = max(0, right - wrong_cost x wrong): naming every label does not pay.
    gold: a list of labels, or a text that separates them by commas, semicolons, pipes or line breaks; an empty list and
    ["No Finding"] both mean that no label applies, which the completion has to say ("none", "normal", []).
    Read: lists in lines, commas, pipes or numbers, keyed lists ("edema: 1"), JSON lists and objects.
    components: precision, recall and F1 of the row, without the cost of wrong labels.
    `meta["synonyms"]` maps a label to other names. A label that is denied ("no effusion", "effusion: 0") is not named.
    read: "prose" reads all of a completion, "closed" only marked answers (see `rewards.claims.heard`).
    """

    name = "labels"

    def __init__(self, wrong_cost: float = 0.5, read: str = PROSE) -> None:
        if not 0 <= wrong_cost <= 10:
            raise ValueError(f"wrong_cost must be in [0, 10], got {wrong_cost}")
        super().__init__(read)
        self.wrong_cost = wrong_cost

    def label(self, sample: RewardInput) -> _Known:
        labels = _label_texts(sample.gold)
        if labels is None:
            raise ValueError(f"gold {sample.gold!r} is no list of labels")
        if not all(map(answer_key, labels)):
            raise ValueError(f"gold {sample.gold!r} holds an empty label")
        known = _known_to(sample)
        if len(known.gold) != max(1, len(labels)):
            raise ValueError(f"gold {sample.gold!r} names a label twice")
        said = _read_labels(", ".join(labels) or "none", known)
        if said.value != known.gold:
            raise ValueError(
                f"gold {sample.gold!r} cannot be earned: written out it reads as {said.parsed or said.reason!r}"
            )
        return known

    def said(self, answer: Answer, sample: RewardInput, label: _Known) -> Said:
        return settle(
            answer, Reader(lambda text: _read_labels(text, label), bare=lambda answer: [claims_of(answer.body)])
        )

    def judged(self, said: Said, label: _Known) -> RewardResult:
        named, gold = said.value, label.gold
        hits, wrong = len(named & gold), len(named - gold)
        return RewardResult(
            2 * max(0.0, hits - self.wrong_cost * wrong) / (len(named) + len(gold)),
            parsed=said.parsed,
            reason=f"{hits} right, {wrong} wrong, {len(gold - named)} missed",
            components={
                "label_precision": hits / len(named),
                "label_recall": hits / len(gold),
                "label_f1": 2 * hits / (len(named) + len(gold)),
            },
        )


def label_scores(answers: Iterable[tuple[Any, Iterable[str]]]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of each label over many answers, and n, how often it is right; most frequent first.

    answers: the label of a row as its data gives it, and what was read (`RewardResult.parsed`; nothing for an unread
    answer, which misses all). A label that is never named has precision 0.
    """
    right, named, wanted = Counter[str](), Counter[str](), Counter[str]()
    for label, read in answers:
        gold = _known(tuple(_label_texts(label) or ()), ()).gold
        said = set(read)
        wanted.update(gold)
        named.update(said)
        right.update(gold & said)
    return {
        key: {
            "n": n,
            "precision": right[key] / max(1, named[key]),
            "recall": right[key] / max(1, n),
            "f1": 2 * right[key] / (named[key] + n),
        }
        for key, n in sorted(((key, wanted[key]) for key in wanted | named), key=lambda item: (-item[1], item[0]))
    }


@dataclass(frozen=True)
class _Known:
    """gold: the keys of the right labels. aliases: from the key of a synonym to that of its label. whole: finds labels
    that hold a separator themselves ("Mass and nodule").
    """

    gold: frozenset[str]
    aliases: Mapping[str, str]
    whole: re.Pattern[str] | None

    def label_of(self, key: str) -> str | None:
        """The label that a key names, or None for a text that is no known label."""
        key = self.aliases.get(key, key)
        return key if key in self.gold else None


def _known_to(sample: RewardInput) -> _Known:
    synonyms = sample.meta.get("synonyms") or {}
    names = tuple((str(label), tuple(texts_of(values))) for label, values in synonyms.items())
    return _known(tuple(_label_texts(sample.gold) or ()), names)


@lru_cache(maxsize=8192)
def _known(labels: tuple[str, ...], synonyms: tuple[tuple[str, tuple[str, ...]], ...]) -> _Known:
    aliases = {answer_key(name): answer_key(label) for label, names in synonyms for name in names}
    keys = {NOTHING_FOUND if _says_nothing(label) else answer_key(label) for label in labels}
    texts = [*labels, *(name for _, names in synonyms for name in names)]
    joint = sorted((text for text in texts if len(SEPARATOR.split(text)) > 1), key=len, reverse=True)
    whole = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in joint), re.IGNORECASE) if joint else None
    return _Known(frozenset(aliases.get(key, key) for key in keys) or frozenset({NOTHING_FOUND}), aliases, whole)


def _label_texts(gold: Any) -> list[str] | None:
    if isinstance(gold, str):
        return [part.strip() for part in re.split(r"[,;|\n]", gold) if part.strip()] or None
    if isinstance(gold, Iterable) and not isinstance(gold, Mapping):
        labels = list(gold)
        return labels if all(isinstance(label, str) for label in labels) else None
    return None


def _says_nothing(text: str) -> bool:
    return text_key(text) in table("answers")["nothing"]


def _read_labels(text: str, known: _Known) -> Said:
    """The keys of the named labels; {NOTHING_FOUND} where the text says that there is none."""
    items = list(_items(text, known))
    if len(items) > _MOST_LABELS:
        return Said(status="conflict", reason="too many labels are named")
    if any(stances().alternative.search(item) and known.label_of(answer_key(item)) is None for item in items):
        return Said(status="conflict", reason="alternatives are offered")
    named: set[str] = set()
    denied: set[str] = set()
    for item in items:
        label, is_denied = _label(item, known)
        if label:
            (denied if is_denied else named).add(label)
    alone = NOTHING_FOUND in named and len(named) > 1 and NOTHING_FOUND not in known.gold
    if named & denied or alone:
        return Said(status="conflict", reason="a label is both named and denied")
    if not named and not denied and text.strip("[]{} \t\n"):
        return Said()
    found = frozenset(named) or frozenset({NOTHING_FOUND})
    parsed = tuple(sorted(found - {NOTHING_FOUND} or found))
    return Said(found, parsed, firm=all(len(label.split()) <= FIRM_WORDS for label in found))


def _items(text: str, known: _Known) -> Iterator[str]:
    """The members of a list, one by one."""
    text = _FENCE.sub("", text).strip()
    if text[:1] in "[{" and (value := _json(text)) is not None:
        yield from _json_items(value)
        return
    body = "\n".join(strip_markup(line) for line in unwrap_latex(text).split("\n"))
    reason = stances().reason.search(body)
    body = strip_quotes(body[: reason.start()] if reason is not None else body).strip("[]{} \t\n")
    position = 0
    for label in known.whole.finditer(body) if known.whole is not None else ():
        yield from SEPARATOR.split(body[position : label.start()])
        yield label.group()
        position = label.end()
    yield from SEPARATOR.split(body[position:])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_items(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, Mapping) and depth < 4:
        for key, inner in value.items():
            if isinstance(inner, list | Mapping):
                yield from _json_items(inner, depth + 1)
            elif isinstance(inner, str) and _PREFIX.match(f"{key}: x"):
                yield from SEPARATOR.split(inner)
            else:
                yield f"{key}: {inner}"
    elif isinstance(value, list) and depth < 4:
        for inner in value:
            yield from _json_items(inner, depth + 1)
    elif isinstance(value, str):
        yield value


@cache
def _values() -> Mapping[str, bool]:
    """What stands behind a keyed label: whether it applies."""
    listed = table("answers")
    positive = [*listed["yes"], *listed["present"], "1", "1.0", "positive", "detected", "found"]
    negative = [*listed["no"], *listed["absent"], "0", "0.0", "negative", "not detected", "not found", "ruled out"]
    return dict.fromkeys(positive, True) | dict.fromkeys(negative, False)


def _label(item: str, known: _Known, depth: int = 0) -> tuple[str, bool]:
    """(key of the label that an item names, whether it is denied); ("", False) for no label."""
    item = _PREFIX.sub("", _NUMBERED.sub("", strip_quotes(strip_quotes(item).strip(" .'\""))))
    if (label := known.label_of(answer_key(item))) is not None:
        return label, False
    keyed = _KEYED.match(item) if depth < 2 else None
    if keyed is not None and (applies := _values().get(keyed["value"].lower())) is not None:
        return _label(keyed["label"], known, depth + 1)[0], not applies
    bracket = _BRACKET.search(item) if depth < 2 else None
    if bracket is not None:
        label, is_denied = _label(item[: bracket.start()], known, depth + 1)
        if (applies := _values().get(bracket.group(1).strip().lower())) is not None:
            return label, not applies
        inner = answer_key(bracket.group(1))
        if not _is_negated(inner) and not role_words("unsure").intersection(inner.split()):
            return label, is_denied
    item = core(item)
    if _says_nothing(item):
        return NOTHING_FOUND, False
    said = words = list(as_said(item))
    words = _without_neutral(words)
    if words is not said and is_disowned(item, denials=False):
        return "", False
    is_denied = len(words) > 1 and words[-1] in ("absent", "not")
    key = answer_key(" ".join(_without_neutral(words[:-1]) if is_denied else words))
    if (negator := _is_negated(key)) and known.label_of(key) is None:
        key, is_denied = key.removeprefix(f"{negator} "), not is_denied
    return known.aliases.get(key, key), is_denied


def _without_neutral(words: list[str]) -> list[str]:
    """Words without those of any statement around them; the last one is kept."""
    while len(words) > 1 and is_neutral(words[0]):
        words = words[1:]
    while len(words) > 1 and is_neutral(words[-1]):
        words = words[:-1]
    return words


def _is_negated(key: str) -> str:
    return next((word for word in table("answers")["negated"] if key.startswith(f"{word} ")), "")
