"""Short closed answers: yes or no, a short free text, a set of labels. Containment is never a match."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from rewards.answer import Answer, extract
from rewards.base import Reward, RewardInput, RewardResult
from rewards.claims import (
    Claim,
    Reader,
    Said,
    asks,
    claims_of,
    core,
    is_conditional,
    is_disowned,
    sentence_claims,
    settle,
    stances,
    without_ends,
)
from rewards.phrases import clean_phrase, strip_leads
from rewards.text import (
    key_of_normalised,
    lines,
    normalise,
    sentence_spans,
    strip_markup,
    strip_quotes,
    text_key,
    unwrap_latex,
)
from rewards.words import words

_ALTERNATIVE = re.compile(r"(?<!\w)(?:or|oder|ou|либо|или)(?!\w)|或|또는|または|أو", re.IGNORECASE)
_SEPARATOR = re.compile(
    r"\s*(?:[,;/&+\n、，؛،]|(?<!\w)(?:and|und|et|y|e|as well as|plus|with)(?!\w)|和|및|와|과|と|و)\s*", re.IGNORECASE
)
_MOST_LABELS = 300
_LONGEST_PHRASE = 200
_AHEAD = 120  # characters before an answer word
_FIRM_WORDS = 6  # a longer text beside an answer is prose
_LONGEST_ANSWER = 500  # characters; what is cut off could not match anyway
_PARENTHESIS = re.compile(r"\s*\(([^()]{1,80})\)\s*")
_STATEMENT = re.compile(
    r"(?:(?:it|this|that|there|the \w+(?: \w+)?) (?:is|are|shows?|represents?|depicts?)"
    r"|(?:the )?(?:diagnosis|answer)(?: is|:))"
    r"(?: (?:most likely|likely|probably|a case of|consistent with))?\s+",
    re.IGNORECASE,
)


@cache
def _table() -> dict[str, Any]:
    source = resources.files("rewards") / "data" / "answers.json"
    table: dict[str, Any] = json.loads(normalise(source.read_text(encoding="utf-8")))
    return table


# --------------------------------------------------------------------------------------------------------- yes or no


# A yes or no counts where a clause begins or after a word that leads up to it, and only where its clause then ends or
# goes on with a subject: "no" before a noun is a determiner.
_TOKEN = re.compile(r"[^\s.,;:!?()\[\]{}\"'*<>/|。、，؛،।=→—–-]+")
_BEFORE = re.compile(
    r"(?:^|[.;:!?,\n(>→—–/]|\s-|\b(?:and|or|but|is|are|be|say|answer|so|thus|therefore|hence|definitely|probably|clearly|likely)"
    r"(?: a(?: clear| definite)?)?)[\s\"'*]*$",
    re.IGNORECASE,
)
_OR_ELSE = re.compile(r"[\s\"')*,]*(?:or|oder|ou|или|/)\s*(?!so\b)", re.IGNORECASE)
_AFTER = re.compile(
    r"[\s\"')*]*(?:$|[.,;:!?—–。、，।/]|\s-\s|\n|(?:and|or|but|because|since|there|it|the|this|that|i|we|as)\b)",
    re.IGNORECASE,
)


@cache
def _yes_no_words() -> tuple[dict[str, str], dict[str, str]]:
    """(single words, whole phrases)."""
    table = _table()
    single = {key_of_normalised(word): value for value in ("yes", "no") for word in table[value]}
    return single, single | dict.fromkeys(table["present"], "yes") | dict.fromkeys(table["absent"], "no")


def read_yes_no(text: str) -> str:
    """ "yes", "no", "" when neither is said, "both" when both are. `text` went through `normalise`.

    "no" counts as the answer word only, never as a determiner ("no fracture is seen" says "" here: what it means
    depends on the question) and never inside another word.
    """
    single, phrases = _yes_no_words()
    if len(text) <= _LONGEST_PHRASE:
        phrase = clean_phrase(text)
        if phrase.endswith("?"):
            return ""
        for candidate in (phrase, strip_leads(phrase), core(phrase)):
            if (said := phrases.get(key_of_normalised(candidate))) is not None:
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


def _said_in(text: str, start: int, end: int) -> set[str]:
    """The answer words of a sentence, but those of somebody else. A word with an alternative says both."""
    single, _ = _yes_no_words()
    said: set[str] = set()
    for match in _TOKEN.finditer(text, start, end):
        word = single.get(match.group().casefold())
        if word is None or not _AFTER.match(text, match.end(), end):
            continue
        if not _BEFORE.search(text[max(start, match.start() - 24) : match.start()]):
            continue
        if len(said) == 2 or is_disowned(text[max(start, match.start() - _AHEAD) : match.start()]):
            continue
        said |= {"yes", "no"} if _OR_ELSE.match(text, match.end(), end) else {word}
    return said


_YES_NO = {
    "yes": Said("yes", "yes"),
    "no": Said("no", "no"),
    "": Said(),
    "both": Said(status="conflict", reason="both yes and no are said"),
}


_YES_NO_READER = Reader(
    lambda text: _YES_NO[read_yes_no(text)],
    bare=lambda answer: (sentence_claims(answer.rest.strip()),),
    beside=lambda answer: () if answer.channel == "bare" else (sentence_claims(answer.rest.strip()),),
    decides_beside=True,
)


class YesNo(Reward):
    """1 when the completion answers yes or no as the gold does, else 0.

    gold: a bool or a word for yes or no in any of the package's languages ("Yes.", "true", "아니요").
    """

    name = "yesno"

    def check_gold(self, sample: RewardInput) -> str | None:
        if yes_no_gold(sample.gold):
            return None
        return f"gold {sample.gold!r} is neither yes nor no; for more answers give options and use OptionLetter"

    def score(self, sample: RewardInput) -> RewardResult:
        gold = yes_no_gold(sample.gold)
        if not gold:
            return RewardResult(None, "gold_invalid", reason=self.check_gold(sample) or "")
        answer = extract(sample.completion)
        if sample.truncated and not answer.closed:
            return RewardResult(0.0, "truncated", reason="cut at the length limit before a closed answer")
        if answer.status != "ok":
            return RewardResult(0.0, "unparsed", reason=answer.reason)
        said = settle(answer, _YES_NO_READER)
        if said.status != "ok":
            return RewardResult(0.0, said.status, reason=said.reason)
        right = said.value == gold
        return RewardResult(float(right), parsed=said.value, reason="" if right else f"{said.value} is not {gold}")


def yes_no_gold(gold: Any) -> str:
    if isinstance(gold, bool):
        return "yes" if gold else "no"
    return _yes_no_words()[0].get(text_key(gold), "") if isinstance(gold, str) else ""


# ------------------------------------------------------------------------------------------------------- open answers


@lru_cache(maxsize=16384)
def answer_key(text: str) -> str:
    """`text_key` that also ignores articles, plural endings, British spelling and number words up to twelve."""
    table = _table()
    tokens = [token for token in text_key(text).split() if token not in ("a", "an", "the")]
    return " ".join(_singular(_spelt(table["numbers"].get(token, token)), table["plurals"]) for token in tokens)


def _spelt(token: str) -> str:
    for british, american in _table()["spelling"]:
        if british in token:
            token = token.replace(british, american)
    return token


def _singular(token: str, plurals: Mapping[str, str]) -> str:
    if token in plurals:
        return plurals[token]
    if len(token) < 4 or not token.endswith("s") or token.endswith(("ss", "us", "is", "as", "os")):
        return token
    if token.endswith("ies") and len(token) > 4:
        return token[:-3] + "y"
    if token.endswith(("ches", "shes", "xes", "sses")):
        return token[:-2]
    return token[:-1]


class OpenAnswer(Reward):
    """1 when a short free answer is the gold answer in other clothes, else 0.

    gold: a text, or a list of texts that are all right. `meta["synonyms"]` adds more: a list, or a mapping from an
    answer to its synonyms. Ignored: case, punctuation, articles, plural, British spelling, hyphens, the order of a
    list. Everything else counts, so a side, a negation, a digit or one word more or less makes another answer.
    A list with "or", or with one member too many, is another answer as well.
    """

    name = "open"

    def check_gold(self, sample: RewardInput) -> str | None:
        golds = _texts(sample.gold)
        if not golds:
            return f"gold {sample.gold!r} is no text and no list of texts"
        if any(not answer_key(gold) for gold in golds):
            return f"gold {sample.gold!r} holds an answer without a letter or digit"
        return None

    def score(self, sample: RewardInput) -> RewardResult:
        problem = self.check_gold(sample)
        if problem is not None:
            return RewardResult(None, "gold_invalid", reason=problem)
        accepted = _accepted(sample)
        answer = extract(sample.completion)
        if sample.truncated and not answer.closed:
            return RewardResult(0.0, "truncated", reason="cut at the length limit before a closed answer")
        if answer.status != "ok":
            return RewardResult(0.0, "unparsed", reason=answer.reason)
        said = settle(answer, Reader(lambda text: _read_open(text, accepted), bare=_only_line))
        if said.status != "ok":
            return RewardResult(0.0, said.status, parsed=said.parsed, reason=said.reason)
        right = said.value is True
        reason = "" if right else f"{said.parsed[:80]!r} is not {_texts(sample.gold)[0]!r}"
        return RewardResult(float(right), parsed=said.parsed, reason=reason)


def _only_line(answer: Answer) -> list[list[Claim]]:
    body = lines(answer.body)
    return [claims_of(body[0])] if len(body) == 1 else []


def _read_open(text: str, accepted: _Accepted) -> Said:
    """True for one of the accepted answers, else the key of the other one."""
    text = text[:_LONGEST_ANSWER]
    parsed = clean_phrase(text)
    if _match(text, accepted):
        return Said(True, parsed)
    key = answer_key(parsed)
    return Said(key, parsed, firm=len(text.split()) <= _FIRM_WORDS) if key else Said()


def _texts(gold: Any) -> list[str]:
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
    """Every right answer: as keys, as keys without spaces, and as sorted lists of keys."""

    keys: frozenset[str]
    squashed: frozenset[str]
    lists: frozenset[tuple[str, ...]]


def _accepted(sample: RewardInput) -> _Accepted:
    golds = _texts(sample.gold)
    synonyms = sample.meta.get("synonyms", ())
    if isinstance(synonyms, Mapping):
        by_key = {answer_key(str(name)): _texts(values) for name, values in synonyms.items()}
        extra = [text for gold in golds for text in by_key.get(answer_key(gold), ())]
    else:
        extra = _texts(synonyms)
    return _accept((*golds, *extra))


@lru_cache(maxsize=8192)
def _accept(texts: tuple[str, ...]) -> _Accepted:
    """An abbreviation given in brackets in the label is a right answer too."""
    forms = [form for text in texts for form in _forms(text)]
    keys = frozenset(answer_key(form) for form in forms) - {""}
    return _Accepted(keys, frozenset(map(_squashed, keys)), frozenset(_parts(normalise(form)) for form in forms))


def _forms(text: str) -> list[str]:
    inner = _PARENTHESIS.search(text)
    if inner is None:
        return [text]
    outer = _PARENTHESIS.sub(" ", text).strip()
    forms = [text, outer]
    if _abbreviates(inner.group(1), outer) or _abbreviates(outer, inner.group(1)):
        forms.append(inner.group(1))
    return forms


def _abbreviates(short: str, long: str) -> bool:
    letters = re.sub(r"[^a-z0-9]", "", short.lower())
    initials = "".join(word[0] for word in re.findall(r"[a-z0-9]+", long.lower()) if word not in ("of", "the", "and"))
    return len(letters) > 1 and letters == initials


def _match(text: str, accepted: _Accepted) -> bool:
    """Whether a candidate text is one of the accepted answers, wholly."""
    phrase = clean_phrase(text)
    if _same(phrase, accepted):
        return True
    bare = without_ends(phrase)
    statement = _STATEMENT.match(bare)
    forms = (bare, strip_leads(bare), bare[statement.end() :] if statement is not None else "")
    return any(_same(form, accepted) for form in forms if form)


def _same(text: str, accepted: _Accepted) -> bool:
    key = answer_key(text)
    if key in accepted.keys or _squashed(key) in accepted.squashed:
        return True
    bracket = _PARENTHESIS.search(text)
    if bracket is not None:
        outer = _PARENTHESIS.sub(" ", text).strip()
        inner = bracket.group(1)
        named_twice = answer_key(inner) in accepted.keys or _abbreviates(inner, outer) or _abbreviates(outer, inner)
        return named_twice and answer_key(outer) in accepted.keys
    parts = _parts(text)
    return len(parts) > 1 and parts in accepted.lists


def _squashed(key: str) -> str:
    """ "X ray" and "Xray": a key without spaces, unless digits would run together."""
    return key if re.search(r"\d \d", key) else key.replace(" ", "")


def _parts(text: str) -> tuple[str, ...]:
    """The members of a list, sorted. A text with "or" offers alternatives and is no list."""
    if _ALTERNATIVE.search(text):
        return (answer_key(text),)
    return tuple(sorted(key for part in _SEPARATOR.split(text) if (key := answer_key(part))))


# --------------------------------------------------------------------------------------------------------- label sets


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
    return Said(named, tuple(sorted(named)), firm=all(len(label.split()) <= _FIRM_WORDS for label in named))


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
    return {answer_key(name): answer_key(label) for label, names in synonyms.items() for name in _texts(names)}


def _named_labels(text: str, aliases: Mapping[str, str]) -> frozenset[str] | str | None:
    """The labels that a text names; a reason when it contradicts itself; None when it says nothing."""
    table = _table()
    items = _without_reason("\n".join(strip_markup(line) for line in unwrap_latex(text).split("\n")))
    items = strip_quotes(items).strip("[]{} \t\n")
    if _ALTERNATIVE.search(items):
        return "alternatives are offered"
    named: set[str] = set()
    denied: set[str] = set()
    nothing = False
    parts = _SEPARATOR.split(items)
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
