"""Sets of labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rewards.answer import extract
from rewards.base import Reward, RewardInput, RewardResult
from rewards.claims import Reader, Said, claims_of, core, settle, stances
from rewards.open_answers import ALTERNATIVE, FIRM_WORDS, SEPARATOR, texts_of
from rewards.text import strip_markup, strip_quotes, text_key, unwrap_latex
from rewards.wording import answer_key, word_table

_MOST_LABELS = 300


class LabelSet(Reward):
    """F1 between the named labels and the gold labels, in which a wrong label costs part of a right one.

    value = 2 r / (named + gold) with r = max(0, right - wrong_cost x wrong): naming every label does not pay.
    gold: a list of labels, or a text that separates them by commas, semicolons or line breaks; an empty list means that
    no label applies, which the completion has to say ("none", "no finding", []).
    `meta["synonyms"]` maps a label to other names. A label that is denied ("no effusion") is not named.
    """

    name = "labels"

    def __init__(self, wrong_cost: float = 0.5) -> None:
        if not 0 <= wrong_cost <= 10:
            raise ValueError(f"wrong_cost must be in [0, 10], got {wrong_cost}")
        self.wrong_cost = wrong_cost

    def check_gold(self, sample: RewardInput) -> str | None:
        labels = _label_texts(sample.gold)
        if labels is None:
            return f"gold {sample.gold!r} is no list of labels"
        keys = [answer_key(label) for label in labels]
        if not all(keys):
            return f"gold {sample.gold!r} holds an empty label"
        if len(set(keys)) != len(keys):
            return f"gold {sample.gold!r} names a label twice"
        return None

    def score(self, sample: RewardInput) -> RewardResult:
        problem = self.check_gold(sample)
        if problem is not None:
            return RewardResult(None, "gold_invalid", reason=problem)
        aliases = _aliases(sample.meta.get("synonyms") or {})
        gold = {aliases.get(key, key) for key in map(answer_key, _label_texts(sample.gold) or ())}
        answer = extract(sample.completion)
        if sample.truncated and not answer.closed:
            return RewardResult(0.0, "truncated", reason="cut at the length limit before a closed answer")
        if answer.status != "ok":
            return RewardResult(0.0, "unparsed", reason=answer.reason)
        said = settle(
            answer, Reader(lambda text: _read_labels(text, aliases), bare=lambda answer: [claims_of(answer.body)])
        )
        if said.status != "ok":
            return RewardResult(0.0, said.status, reason=said.reason)
        named = said.value
        if not named and not gold:
            return RewardResult(1.0, parsed=())
        wrong = len(named - gold)
        right = max(0.0, len(named & gold) - self.wrong_cost * wrong)
        return RewardResult(
            2 * right / (len(named) + len(gold)),
            parsed=said.parsed,
            reason=f"{len(named & gold)} right, {wrong} wrong, {len(gold - named)} missed",
        )


def _read_labels(text: str, aliases: Mapping[str, str]) -> Said:
    named = _named_labels(text, aliases)
    if isinstance(named, str):
        return Said(status="conflict", reason=named)
    if named is None:
        return Said()
    return Said(named, tuple(sorted(named)), firm=all(len(label.split()) <= FIRM_WORDS for label in named))


def _without_reason(text: str) -> str:
    reason = stances().reason.search(text)
    return text[: reason.start()] if reason is not None else text


def _label_texts(gold: Any) -> list[str] | None:
    if isinstance(gold, str):
        return [part.strip() for part in re.split(r"[,;\n]", gold) if part.strip()] or None
    if isinstance(gold, Iterable) and not isinstance(gold, Mapping):
        labels = list(gold)
        return labels if all(isinstance(label, str) for label in labels) else None
    return None


def _aliases(synonyms: Mapping[str, Any]) -> dict[str, str]:
    return {answer_key(name): answer_key(label) for label, names in synonyms.items() for name in texts_of(names)}


def _named_labels(text: str, aliases: Mapping[str, str]) -> frozenset[str] | str | None:
    """The labels that a text names; a reason when it contradicts itself; None when it says nothing."""
    table = word_table()
    items = _without_reason("\n".join(strip_markup(line) for line in unwrap_latex(text).split("\n")))
    items = strip_quotes(items).strip("[]{} \t\n")
    if ALTERNATIVE.search(items):
        return "alternatives are offered"
    named: set[str] = set()
    denied: set[str] = set()
    nothing = False
    parts = SEPARATOR.split(items)
    if len(parts) > _MOST_LABELS:
        return "too many labels are named"
    for part in parts:
        item = core(strip_quotes(part).strip(" .'\""))
        key = answer_key(item)
        if not key:
            continue
        if text_key(item) in table["nothing"]:
            nothing = True
            continue
        negator = next((word for word in table["negated"] if key.startswith(f"{word} ")), None)
        kept = key.removeprefix(f"{negator} ") if negator else key
        (denied if negator else named).add(aliases.get(kept, kept))
    if named & denied or (named and nothing):
        return "a label is both named and denied"
    if not named and not denied and not nothing and text.strip("[]{} \t\n"):
        return None
    return frozenset(named)
