"""What an answer asserts: its places cut into claims, each with its stance, and one decision over all of them.

A claim counts when it is asserted: not asked, not under a condition, not somebody else's view, not doubted and not
taken back. What a claim says is read by the kind of question (a letter, a number, words); when two claims decide, they
agree. The words are data (data/stances.json).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from rewards.answer import Answer, Candidate, extract
from rewards.text import Folded, Patterns, blanked, sentence_spans, table
from rewards.words import clean_phrase, may_be_conditional, strip_leads, words

ASSERTED, ASKED, CONDITIONAL, DISOWNED, OPEN = "asserted", "asked", "conditional", "disowned", "open"
KEPT, RETRACTS, RECONSIDERS, DISPUTES, OFFERS = "", "retracts", "reconsiders", "disputes", "offers"

FIRM_WORDS = 6  # a longer text beside an answer is prose
_AHEAD = 300  # characters of the sentence before a cue
_MOST_CLAIMS = 100  # nobody answers this often; it also bounds the time
_SHORTEST_OPEN = 16  # characters in which a choice can be left open in so many words
_LONGEST_VERDICT = 200
_VERDICT_HINT = re.compile("answer|diagnosis|choice|solution|result|respuesta|réponse|risposta|Antwort|ответ|答")
_BEHIND = 2000  # characters after an answer in which it may be taken back


class Claim(NamedTuple):
    """What a place says in one go.

    stance: asserted | asked | conditional | disowned (another's view, or doubted) | open (undecided).
    takes_back: "retracts" when it takes back all that its place said before, "reconsiders" and "disputes" when it does
    so only by saying something else; "disputes" in a sentence of its own, and "offers", leave both standing.
    """

    text: str
    stance: str = ASSERTED
    takes_back: str = KEPT


@dataclass(slots=True)  # not frozen, which would cost more than most readings do
class Said:
    """What a kind reads in a claim.

    value: what is compared; None where nothing is said. status: why it cannot be read (`RewardResult.status`), or "ok".
    firm: it may veto another answer. denied: members of a value that the claim denies.
    """

    value: Any = None
    parsed: Any = None
    status: str = "ok"
    reason: str = ""
    firm: bool = True
    denied: frozenset[str] = frozenset()


NOTHING = Said()


# ---------------------------------------------------------------------------------------------------------- cue words


@cache
def stances() -> Patterns:
    return Patterns("stances")


_CLAUSE_BREAK = re.compile(
    r"[,;:—–]|[.!?]\s|\b(?:but|so|therefore|thus|hence|however|and|while|although|because|since|yet|then)\b",
    re.IGNORECASE,
)


_ANYTHING_BUT = re.compile(r"\b(?:any|every)thing (?:but|except)\b", re.IGNORECASE)
_RELATIVE = re.compile(r"[\s,]{0,3}\b(?:which|who)\s*$", re.IGNORECASE)  # what it adds has the stance of its noun


def is_disowned(ahead: str, denials: bool = True) -> bool:
    """Whether the clause that leads up to an answer denies it, doubts it or is not the speaker's ("some would say").

    denials: False where the kind reads "not" itself, as numbers do.
    """
    ahead = _ANYTHING_BUT.sub("unlikely", _RELATIVE.sub("", ahead[-_AHEAD:]))
    if not ahead or ahead.isspace():
        return False
    begin = 0
    for stop in _CLAUSE_BREAK.finditer(ahead):
        begin = stop.end()
    clause = stances().sure.sub(" ", ahead[begin:])
    return (stances().disowns if denials else stances().doubts).search(clause) is not None


def is_conditional(text: str) -> bool:
    return may_be_conditional(text) and words().conditional.search(text) is not None


_NOT_BUT = re.compile(r"^(?:it is |it['’]s )?not [^,;.]{1,60}?,? but (?:rather |it is |it['’]s )?(?=\w)", re.IGNORECASE)


def core(text: str) -> str:
    """A phrase without the words that only present it: "I would say X, most likely, rather than Y" is X."""
    return strip_leads(without_ends(clean_phrase(text)))


def without_ends(phrase: str) -> str:
    """A cleaned phrase without what is said about it: a reason, a verdict, what it is preferred to ("not Y but X")."""
    phrase = _NOT_BUT.sub("", phrase)
    roles = stances()
    for _ in range(3):
        shorter = phrase
        for end in (roles.reason, roles.behind_instead, roles.behind_hedge, roles.behind_verdict):
            shorter = _without(end, shorter)
        if shorter == phrase:
            break
        phrase = shorter
    return phrase


def _without(end: Folded, phrase: str) -> str:
    found = end.search(phrase)
    left = phrase[: found.start()].rstrip(" ,;") if found is not None else ""
    return left if left and left.lower() not in _NO_NAME else phrase


# -------------------------------------------------------------------------------------------------------------- claims


_NO_NAME = ("it", "this", "that", "the answer")  # "it is right" names a side


_DENIES = re.compile(r"\b(?:no|not|without|neither)\s+\w", re.IGNORECASE)


def claims_of(text: str, begun: bool = False) -> list[Claim]:
    """A text cut where it takes itself back; sentences that ask are left out. begun: it goes on with another one."""
    found: list[Claim] = []
    start, takes_back = 0, KEPT
    for mark in stances().takes_back.finditer(text):
        if mark.lastgroup != RETRACTS and mark.group().strip() == text.strip().lower():
            break  # "Actually" is what is said
        if mark.lastgroup == OFFERS and not begun and not text[: mark.start()].strip():
            continue  # "maybe pneumonia" offers nothing beside it
        if mark.lastgroup == OFFERS and _DENIES.search(text, start, mark.start()) is not None:
            continue  # "no effusion, mass, or fracture" is one list
        if mark.start() > start or takes_back:
            found.append(_claim(text[start : mark.start()], takes_back))
        start, takes_back = mark.end(), str(mark.lastgroup)
    found.append(_claim(text[start:], takes_back))
    return found


def sentence_claims(text: str) -> list[Claim]:
    """The claims of prose, sentence by sentence, each of which may name another answer than those before it."""
    found: list[Claim] = []
    for start, end in sentence_spans(text):
        offer = _offer(text[start:end].strip(_JOINTS), OFFERS) if found else None
        found += claims_of(text[start:end], begun=bool(found))
        found += [offer] if offer is not None else []
    return found


def _claim(text: str, takes_back: str) -> Claim:
    if "?" in text:
        told = [part for start, end in sentence_spans(text) if not asks(part := text[start:end])]
        if not told:
            return Claim(text, ASKED, takes_back)
        text = "\n".join(told)
    if is_conditional(text):
        return Claim(text, CONDITIONAL, takes_back)
    is_open = len(text) > _SHORTEST_OPEN and stances().undecided.search(text) is not None
    return Claim(text, OPEN if is_open else ASSERTED, takes_back)


def asks(sentence: str) -> bool:
    return "?" in sentence and sentence.rstrip(" .*_)\"'").endswith("?")


Raw = Callable[[Candidate, Answer], str]


def places(answer: Answer, candidates: Sequence[Candidate], kind: Reader) -> list[list[Claim]]:
    """The claims of each candidate: its own, then what takes it back behind it."""
    found: list[list[Claim]] = []
    ahead = [_stance_ahead(answer.rest, place) if place.channel == "cue" else ASSERTED for place in candidates]
    for index, (candidate, stance) in enumerate(zip(candidates, ahead, strict=True)):
        if stance != ASSERTED:
            found.append([Claim(candidate.text, stance)])
            continue
        following = next(
            (
                place.lead
                for place, stance in zip(candidates[index + 1 :], ahead[index + 1 :], strict=True)
                if stance == ASSERTED
            ),
            len(answer.rest),
        )
        text = kind.raw(candidate, answer)
        own = [Claim(text)] if kind.is_whole(text) else claims_of(text)
        after = answer.rest[candidate.end : min(following, candidate.end + _BEHIND)]
        taken = list(behind(after))
        if taken and fold(own, kind.read).value is not None:  # nothing cannot be taken back
            own += taken
        found.append(own)
    return found


def _stance_ahead(rest: str, cue: Candidate) -> str:
    """The stance that the sentence gives to its cue ("I doubt that the answer is", "if so, the answer is")."""
    ahead = rest[max(rest.rfind("\n", 0, cue.lead) + 1, cue.lead - _AHEAD) : cue.lead]
    ahead = ahead[max(ahead.rfind(stop) for stop in (". ", "! ", "? ", "。")) + 1 :]
    if not ahead.strip():
        return ASSERTED
    if is_conditional(ahead):
        return CONDITIONAL
    if stances().another.search(ahead) is not None:
        return DISOWNED
    return DISOWNED if is_disowned(ahead) or words().wrong_lead.search(ahead) is not None else ASSERTED


# Before a claim of its own; alone it is an answer.
_CONTRADICTS = re.compile(r"no,\s+", re.IGNORECASE)
# To another one beside its mark; a quote begins the next field of an object.
_GLUED = re.compile(r"\s*(?:[,;/&|+→=(-](?!\s*[\"'])|(?:and|plus|as well as)\b)", re.IGNORECASE)
_JOINTS = " \t\n,;:/&|+→=()>–—-"


def behind(text: str) -> Iterable[Claim]:
    """Sentences after an answer that take it back, or that name another and say little else.

    A second thought ("Actually, ...") and another answer beside it only dispute it.
    """
    if not text.strip():
        return
    for start, end in sentence_spans(text):
        sentence = text[start:end].strip(_JOINTS)
        if stances().takes_back.match(sentence) is not None:
            for claim in claims_of(sentence, begun=True):
                takes_back = OFFERS if claim.takes_back == DISPUTES else claim.takes_back
                offer = _offer(claim.text, takes_back, is_offered=takes_back == OFFERS)
                yield offer or claim._replace(takes_back=takes_back)
        elif (contradicts := _CONTRADICTS.match(sentence)) is not None:
            yield _claim(sentence[contradicts.end() :], OFFERS)
        elif (offer := _offer(sentence, OFFERS, start == 0 and _GLUED.match(text) is not None)) is not None:
            yield offer


def _offer(sentence: str, takes_back: str, is_offered: bool = False) -> Claim | None:
    """Another answer in a sentence that says little else: "But it might be D.", "D fits better.", "D, not A."."""
    begin = 0
    while (opener := stances().opener.match(sentence, begin)) is not None:
        is_offered = is_offered or opener["strong"] is not None
        begin = opener.end()
    end = stances().preferred.search(sentence, begin)
    rest = sentence[begin:]
    if end is not None:
        *_, rest = _CLAUSE_BREAK.split(sentence[begin : end.start()].rstrip(" ,;("))
    rest = rest.strip(" ?.!")
    if (
        not (is_offered or end is not None or stances().alternative.search(rest))
        or not rest
        or len(rest.split()) > FIRM_WORDS
        or is_conditional(rest)
    ):
        return None
    says_more = any(
        word in table("answers")["verbs"] for word in re.findall(r"\w+", rest.lower())
    )  # "In fact, the film is clear."
    return None if says_more or is_disowned(rest) else Claim(rest, ASSERTED, takes_back)


# ------------------------------------------------------------------------------------------------------------ channels

PROSE, CLOSED = "prose", "closed"


def checked_read(read: str) -> str:
    """How much of a completion a reward reads. Raises ValueError for an unknown word."""
    if read not in (PROSE, CLOSED):
        raise ValueError(
            f"unknown read {read!r}; use {PROSE} (all of a completion) or {CLOSED} (tag, box, JSON or nothing but the "
            "answer)"
        )
    return read


def heard(completion: str, read: str = PROSE, truncated: bool = False) -> Answer:
    """Where the answer of a completion stands. status: of `extract`, or "truncated".

    read: "prose" takes every channel; "closed" only a tag, a box, a JSON answer, or a line that is the whole
    completion.
    """
    answer = _standing(extract(completion))
    if truncated and not answer.closed:
        return Answer("truncated", reason="cut at the length limit before a closed answer")
    if read == PROSE or answer.status != "ok" or answer.closed:
        return answer
    if answer.channel == "bare" and "\n" not in answer.body:
        return extract(f"<answer>{answer.body}</answer>")
    return Answer("unparsed", reason="no tag, box or JSON answer, and more than an answer is said")


def _standing(answer: Answer) -> Answer:
    """The answer without all that stands before a sentence that only takes it back, where another is given behind."""
    if not answer.candidates or not answer.rest.strip():
        return answer
    end = withdrawn = 0
    for place in sorted((*answer.candidates, *answer.lower), key=lambda place: place.lead):
        if _takes_all_back(answer.rest[end : place.lead]):
            withdrawn = place.lead
        end = max(end, place.end)
    if not withdrawn:
        return answer
    kept = [place for place in (*answer.candidates, *answer.lower) if place.lead >= withdrawn]
    deciding = tuple(place for place in kept if place.channel == kept[0].channel)
    return replace(
        answer,
        channel=kept[0].channel,
        texts=tuple(place.text for place in deciding),
        candidates=deciding,
        lower=tuple(kept[len(deciding) :]),
        rest=blanked(answer.rest, [(0, withdrawn)]),
    )


def _takes_all_back(text: str) -> bool:
    """Whether one of the sentences that end here takes back what is before them and says nothing else."""
    ended = text[: max(map(text.rfind, ".!:\n")) + 1].strip()
    if not ended or stances().takes_back.search(ended) is None:
        return False
    last = [claims_of(ended[start:end], begun=True)[-1] for start, end in sentence_spans(ended)]
    return any(claim.takes_back == RETRACTS and not claim.text.strip(_JOINTS + ".!*") for claim in last)


def verdicts(answer: Answer) -> Iterable[list[Claim]]:
    """Sentences beside a marked answer that call something the answer: "7 mg is the correct answer."."""
    text = answer.rest
    if _VERDICT_HINT.search(text) is None:
        return
    for start, end in sentence_spans(text)[:_MOST_CLAIMS]:
        named = text[max(start, end - _LONGEST_VERDICT) : end].strip()
        verdict = stances().verdict.search(named)
        if verdict is not None and verdict.start() > 0 and not is_disowned(named):
            yield claims_of(core(named[: verdict.start()]))


# -------------------------------------------------------------------------------------------------------------- settle


@dataclass(slots=True)
class Reader:
    """How one kind of question reads an answer.

    read: a claim's text. bare: the places that decide in a completion without any mark. beside: places that may veto a
    marked answer; decides_beside: they decide where no cue says anything. raw: a candidate as it was written. is_whole:
    a text is one claim whatever words it holds, as the label itself is ("coronal plane?").
    """

    read: Callable[[str], Said]
    bare: Callable[[Answer], Sequence[Sequence[Claim]]]
    beside: Callable[[Answer], Iterable[Said]] = lambda answer: ()
    decides_beside: bool = False
    raw: Raw = lambda candidate, answer: candidate.text
    is_whole: Callable[[str], bool] = lambda text: False


def settle(answer: Answer, kind: Reader) -> Said:
    """What the answer says: its deciding places agree, and no lower one says something else."""
    if len(answer.candidates) + len(answer.lower) > _MOST_CLAIMS:
        return Said(status="conflict", reason="too many answers")
    read = _Memo(kind.read).__getitem__
    deciding = kind.bare(answer) if answer.channel == "bare" else places(answer, answer.candidates, kind)
    said = [fold(place, read) for place in deciding]
    for place, one in zip(deciding, said, strict=True):
        if one.status != "ok":
            return one
        if one.value is None and answer.closed:
            return Said(status="unparsed", reason=one.reason or _silence(place))
    lower = (*places(answer, answer.lower, kind), *(() if kind.decides_beside else verdicts(answer)))
    beside = [*kind.beside(answer), *(fold(place, read) for place in lower)]
    spoken = [one for one in said if one.value is not None]
    claims = [claim for place in deciding for claim in place]
    if kind.decides_beside and not spoken and not any(claim.takes_back for claim in claims):
        firm = [one for one in beside if _is_heard(one)]
        spoken = [one for one in firm if one.status == "ok"] or firm
    if not spoken:
        return Said(status="unparsed", reason=_silence(claims))
    return _agreed(spoken, [*said, *beside])


class _Memo(dict[str, Said]):
    """What was read of each text."""

    def __init__(self, read: Callable[[str], Said]) -> None:
        self.read = read

    def __missing__(self, text: str) -> Said:
        said = self[text] = self.read(text)
        return said


def _agreed(spoken: Sequence[Said], all_said: Sequence[Said]) -> Said:
    """The first of those that decide, where they agree and nothing that is heard contradicts it."""
    first = spoken[0]
    if first.status != "ok":
        return first
    if any(one.value != first.value for one in spoken):
        return Said(status="conflict", parsed=first.parsed, reason="different answers are given")
    other = next((one for one in all_said if _is_heard(one) and one.value != first.value), None)
    if other is not None:
        return Said(
            status="conflict", parsed=first.parsed, reason=f"beside it {other.parsed or other.reason!r} is said"
        )
    if any(one.denied & first.value for one in all_said if one.denied):
        return Said(status="conflict", parsed=first.parsed, reason="the same answer is given and denied")
    return first


def _is_heard(one: Said) -> bool:
    return one.firm and (one.value is not None or one.status == "conflict")


def fold(place: Sequence[Claim], read: Callable[[str], Said]) -> Said:
    """What is left of a place when each claim that takes something back has been heard."""
    held = NOTHING
    seen: set[Claim] = set()
    for claim in place:
        if claim in seen:
            continue
        seen.add(claim)
        if len(seen) > _MOST_CLAIMS:
            return Said(status="conflict", reason="too many statements")
        said = read(claim.text) if claim.stance == ASSERTED and claim.text.strip() else NOTHING
        speaks = said.status == "conflict" or (said.value is not None and said.firm)
        if claim.takes_back == RETRACTS or (claim.takes_back in (RECONSIDERS, DISPUTES) and speaks) or held == NOTHING:
            held = said
        elif speaks and claim.takes_back not in (RECONSIDERS, DISPUTES) and held.value != said.value:
            return Said(status="conflict", parsed=held.parsed, reason="different answers are given")
    return held


def _silence(claims: Sequence[Claim]) -> str:
    """Why claims say nothing."""
    if any(claim.takes_back for claim in claims):
        return "the answer is taken back"
    stance = next((claim.stance for claim in claims if claim.stance != ASSERTED), "")
    return f"the answer is {stance}" if stance else "no answer was found"
