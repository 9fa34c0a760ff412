"""What an answer asserts: its places cut into claims, each with its stance, and one decision over all of them.

A claim counts when it is asserted: not asked, not under a condition, not somebody else's view, not doubted and not taken
back. What a claim says is read by the kind of question (a letter, a number, words); when two claims decide, they agree.
The words are data (data/stances.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from rewards.answer import Answer, Candidate
from rewards.choices import may_be_conditional
from rewards.phrases import clean_phrase, strip_leads
from rewards.text import normalise, sentence_spans
from rewards.words import words

ASSERTED, ASKED, CONDITIONAL, DISOWNED = "asserted", "asked", "conditional", "disowned"
KEPT, RETRACTS, RECONSIDERS = "", "retracts", "reconsiders"

_AHEAD = 300  # characters of the sentence before a cue
_BEHIND = 2000  # characters after an answer in which it may be taken back


@dataclass(frozen=True, slots=True)
class Claim:
    """What a place says in one go.

    stance: asserted | asked | conditional | disowned (another's view, or doubted). takes_back: "retracts" when it takes
    back all that its place said before, "reconsiders" when it does so only by saying something else.
    """

    text: str
    stance: str = ASSERTED
    takes_back: str = KEPT


@dataclass(frozen=True, slots=True)
class Said:
    """What a kind reads in a claim.

    value: what is compared; None where nothing is said. status: why it cannot be read (`RewardResult.status`), or "ok".
    firm: it may veto another answer.
    """

    value: Any = None
    parsed: Any = None
    status: str = "ok"
    reason: str = ""
    firm: bool = True


NOTHING = Said()


# ---------------------------------------------------------------------------------------------------------- cue words


class _Stances:
    """The roles of data/stances.json, compiled over all languages."""

    def __init__(self) -> None:
        source = resources.files("rewards") / "data" / "stances.json"
        table: dict[str, Any] = json.loads(normalise(source.read_text(encoding="utf-8")))

        def role(name: str) -> str:
            entries = sorted((entry for words in table[name].values() for entry in words), key=len, reverse=True)
            spaced = [entry for entry in entries if not _glued(entry)]
            glued = [entry for entry in entries if _glued(entry)]
            return "(?:" + "|".join([rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)", *glued]) + ")"

        flags = re.IGNORECASE
        says = rf"{role('others')} (?:\w+ ){{0,3}}{role('says')}"
        self.sure = re.compile(role("sure"), flags)
        self.doubts = re.compile(rf"{role('doubts')}|{says}", flags)
        self.disowns = re.compile(rf"{role('doubts')}|{role('denies')}|n['’]t\b|{says}", flags)
        start = r"(?:^|(?<=[.,;:!?)(—–\n-])\s*|(?<=[.,;:!?)(—–\n-] )|(?<=[。！？，、])|(?<=\bbut )|(?<=\band ))[\s\"'(*_-]*"
        self.takes_back = re.compile(
            rf"{start}(?:(?P<retracts>{role('retracts')})|(?P<reconsiders>{role('reconsiders')}))[\s,:.!…—–-]*", flags
        )
        self.ends = tuple(
            re.compile(pattern, flags)
            for pattern in (
                rf"[\s,;(—–-]+{role('reasons')}.*$",
                rf"(?:\s*[,;(—–-]\s*|\s+){role('instead')}\s[^,;.]{{1,60}}[).!\s]*$",
                rf"(?:\s*[,(—–-]\s*|\s+){role('hedges')}[\s).!]*$",
                rf"\s*{role('verdicts')}[\s).!]*$",
            )
        )
        self.alternative = re.compile(role("alternatives"), flags)


def _glued(entry: str) -> bool:
    """Whether an entry is of a script that is written without spaces."""
    return re.search("[\u0600-\u06ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]", entry) is not None


@cache
def stances() -> _Stances:
    return _Stances()


_CLAUSE_BREAK = re.compile(
    r"[,;:—–]|\b(?:but|so|therefore|thus|hence|however|and|while|although|because|since|yet|then)\b", re.IGNORECASE
)


def is_disowned(ahead: str, denials: bool = True) -> bool:
    """Whether the clause that leads up to an answer denies it, doubts it or is not the speaker's ("some would say").

    denials: False where the kind reads "not" itself, as numbers do.
    """
    if not ahead or ahead.isspace():
        return False
    begin = 0
    for stop in _CLAUSE_BREAK.finditer(ahead):
        begin = stop.end()
    clause = stances().sure.sub(" ", ahead[begin:])
    return (stances().disowns if denials else stances().doubts).search(clause) is not None


def is_conditional(text: str) -> bool:
    return may_be_conditional(text) and words().conditional.search(text) is not None


def core(text: str) -> str:
    """A phrase without the words that only present it: "I would say X, most likely, rather than Y" is X."""
    phrase = strip_leads(clean_phrase(text))
    for _ in range(3):
        shorter = phrase
        for end in stances().ends:
            shorter = _without(end, shorter)
        if shorter == phrase:
            break
        phrase = strip_leads(shorter)
    return phrase


def _without(end: re.Pattern[str], phrase: str) -> str:
    found = end.search(phrase)
    return phrase[: found.start()].rstrip(" ,;") if found is not None and found.start() > 0 else phrase


# -------------------------------------------------------------------------------------------------------------- claims


def claims_of(text: str) -> list[Claim]:
    """A text cut where it takes itself back; sentences that ask are left out."""
    found: list[Claim] = []
    start, takes_back = 0, KEPT
    for mark in stances().takes_back.finditer(text):
        if mark.start() > start or takes_back:
            found.append(_claim(text[start : mark.start()], takes_back))
        start, takes_back = mark.end(), str(mark.lastgroup)
    found.append(_claim(text[start:], takes_back))
    return found


def _claim(text: str, takes_back: str) -> Claim:
    if "?" in text or "？" in text:
        told = [text[start:end] for start, end in sentence_spans(text) if not text[start:end].rstrip(" *_)\"'").endswith(("?", "？"))]
        if not told:
            return Claim(text, ASKED, takes_back)
        text = " ".join(told)
    return Claim(text, CONDITIONAL if is_conditional(text) else ASSERTED, takes_back)


Raw = Callable[[Candidate, Answer], str]


def places(answer: Answer, candidates: Sequence[Candidate], raw: Raw) -> list[list[Claim]]:
    """The claims of each candidate: its own, then what takes it back behind it."""
    found: list[list[Claim]] = []
    for index, candidate in enumerate(candidates):
        if candidate.channel == "cue" and (stance := _stance_ahead(answer.rest, candidate)) != ASSERTED:
            found.append([Claim(candidate.text, stance)])
            continue
        following = candidates[index + 1].lead if index + 1 < len(candidates) else len(answer.rest)
        behind = answer.rest[candidate.end : max(candidate.end, min(following, candidate.end + _BEHIND))]
        found.append([*claims_of(raw(candidate, answer)), *_behind(behind)])
    return found


def _stance_ahead(rest: str, cue: Candidate) -> str:
    """The stance that the sentence gives to its cue ("I doubt that the answer is", "if so, the answer is")."""
    ahead = rest[max(rest.rfind("\n", 0, cue.lead) + 1, cue.lead - _AHEAD) : cue.lead]
    ahead = ahead[max(ahead.rfind(stop) for stop in (". ", "! ", "? ", "。")) + 1 :]
    if not ahead.strip():
        return ASSERTED
    if is_conditional(ahead):
        return CONDITIONAL
    return DISOWNED if is_disowned(ahead) or words().wrong_lead.search(ahead) is not None else ASSERTED


def _behind(text: str) -> Iterable[Claim]:
    """Sentences after an answer that begin by taking it back."""
    if not text.strip():
        return
    for start, end in sentence_spans(text):
        sentence = text[start:end].strip()
        mark = stances().takes_back.match(sentence)
        if mark is not None and mark.end() > 0:
            yield _claim(sentence[mark.end() :], str(mark.lastgroup))


# -------------------------------------------------------------------------------------------------------------- settle


@dataclass(frozen=True)
class Kind:
    """How one kind of question reads an answer.

    read: a claim's text. bare: the texts that decide in a completion without any mark, each with the claims it may be
    taken back by. beside: texts that may veto a marked answer, and that decide where no cue says anything. raw: a
    candidate as it was written.
    """

    read: Callable[[str], Said]
    bare: Callable[[Answer], Sequence[str]]
    beside: Callable[[Answer], Sequence[str]] = lambda answer: ()
    raw: Raw = lambda candidate, answer: candidate.text
    decides_beside: bool = False


def settle(answer: Answer, kind: Kind) -> Said:
    """What the answer says: its deciding places agree, and no lower one says something else."""
    if answer.channel == "bare":
        deciding = [claims_of(text) for text in kind.bare(answer)]
    else:
        deciding = places(answer, answer.candidates, kind.raw)
    beside = [claims_of(text) for text in kind.beside(answer)]
    said: list[Said] = []
    for place in deciding:
        found = _fold(place, kind.read)
        if found.value is None and (answer.closed or found.status == "conflict"):
            return found if found.status != "ok" else Said(status="unparsed", reason=_silence(place, answer))
        if found.value is not None or found.status != "ok":
            said.append(found)
    lower = [_fold(place, kind.read) for place in (*places(answer, answer.lower, kind.raw), *beside)]
    firm = [found for found in lower if found.firm and (found.value is not None or found.status == "conflict")]
    spoken = [found for found in said if found.value is not None]
    if not spoken and kind.decides_beside:
        spoken = [found for found in firm if found.value is not None]
    if not spoken:
        return next(iter(said), Said(status="unparsed", reason=_silence(deciding[0] if deciding else [], answer)))
    first = spoken[0]
    if any(found.value != first.value for found in spoken):
        return Said(status="conflict", parsed=first.parsed, reason=f"the {answer.channel} answers disagree")
    other = next((found for found in firm if found.value != first.value), None)
    if other is not None:
        shown = other.reason or f"{str(other.parsed)[:40]!r}"
        return Said(status="conflict", parsed=first.parsed, reason=f"another place says otherwise: {shown}")
    return first


def _fold(place: Sequence[Claim], read: Callable[[str], Said]) -> Said:
    """What is left of a place when each claim that takes back has been heard."""
    held = NOTHING
    for claim in place:
        said = read(claim.text) if claim.stance == ASSERTED and claim.text.strip() else NOTHING
        if claim.takes_back == RETRACTS:
            held = said
        elif said.value is None and said.status != "conflict":
            held = said if held.value is None and held.status == "ok" else held
        elif claim.takes_back == RECONSIDERS or held.value is None:
            held = said
        elif held.value != said.value:
            return Said(status="conflict", parsed=held.parsed, reason="different answers are given")
    return held


def _silence(place: Sequence[Claim], answer: Answer) -> str:
    if len(place) > 1:
        return "the answer is taken back"
    stance = place[0].stance if place else ASSERTED
    return "no answer was found" if stance == ASSERTED else f"the answer is {stance}"
