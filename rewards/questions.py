"""What a question asks, and what a sentence that restates it says.

A sentence answers yes or no only where its subject and predicate are those of the question, word by word: with another
side, another number, a doubt, or a negation of something else it says nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from rewards.text import normalise
from rewards.wording import as_said, word_table

_LONGEST_SENTENCE = 300
_VERB = re.compile(
    r"\b(?:is|are|was|were|does|do|did|has|have|had|shows?|showed|demonstrates?|reveals?|contains?|appears?|seems?|looks?|remains?)"
    r"(?P<not> not\b|n['’]t\b)?",
    re.IGNORECASE,
)
_ASKS = re.compile(
    r"(?:^|[.:,>\n?])\s*(?:so |then )?(is|are|was|were|do|does|did|has|have|had|can)\s+([^?\n]{2,200})\?",
    re.IGNORECASE,
)
_PREPOSITION = re.compile(
    r"\b(?:in|on|of|at|within|to|for|from|under|below|above|behind|near|along|through|between|around|over|into|with)\b",
    re.IGNORECASE,
)
# Where the speaker looks, which both sides may leave out: "in this image", "based on the scan".
_ON_THE_IMAGE = re.compile(
    r",?\s*\b(?:based on|according to|in|on|from|within|of) (?:this|the|these|that|your|given) (?:[\w-]+ ){0,3}?"
    r"(?:images?|scans?|x-?rays?|x rays?|radiographs?|films?|pictures?|stud(?:y|ies)|ct|mri|views?|slices?|patient)\b,?",
    re.IGNORECASE,
)
_PICTURE = re.compile(
    r"\b(?:images?|scans?|x-?rays?|radiographs?|films?|pictures?|ct|mri|ultrasound|sonogram)\b", re.IGNORECASE
)
_WITHOUT = re.compile(r"\b(?:free of|negative for|(?:absence|lack) of)\b", re.IGNORECASE)
_ANSWER_WORD = re.compile(r"^\W*(?:yes|no)\s*,\s+", re.IGNORECASE)
_CLAUSE = re.compile(
    r"\s*(?:[;:()]|,\s*\b(?:indicating|suggesting|implying|reflecting)\b|,?\s*\b(?:but|however|although|though|while|whereas|which|because|since|so|therefore)\b)\s*",
    re.IGNORECASE,
)
_JOIN = re.compile(r",\s+(?:and\s+)?|\s+and\s+", re.IGNORECASE)
_PART = re.compile(r"[,.;]")
_QUALIFIES = re.compile(
    r"\w+(?:ly|ed|ing|wise)|and|under|above|below|behind|near|along|through|between|around|over|into|than|which|that|extending|due"
)
_MEMBER = re.compile(r"\s*,\s*(?:(?:or|and|nor)\s+)?|\s+(?:or|and|nor)\s+", re.IGNORECASE)
_ALTERNATIVE = re.compile(r"(?<!\w)or(?!\w)", re.IGNORECASE)


@cache
def role_words(name: str) -> frozenset[str]:
    """The keys of the words that play a role in a sentence (data/answers.json)."""
    return frozenset(as_said(" ".join(word_table()[name])))


def is_neutral(word: str) -> bool:
    """Whether a word (as a key) stands in any statement and says nothing by itself."""
    return word in role_words("neutral")


@dataclass(frozen=True)
class Question:
    """words: the words a sentence may share with the question. asked: those of a yes or no question in order, without
    neutral ones; () where it is no such question, or not known. head: how many of them stand before a preposition.
    turned: asked with "the fracture of the clavicle" as "the clavicle fracture". by_do: it asks with "does", so that an answer may have any verb ("The lesion enhances.").
    """

    words: frozenset[str] = frozenset()
    asked: tuple[str, ...] = ()
    head: int = 0
    turned: tuple[str, ...] = ()
    by_do: bool = False

    def explains(self, rest: Iterable[str]) -> bool:
        """Whether words beside an answer say nothing that the question does not."""
        return all(word in self.words or is_neutral(word) for word in rest)

    def verdict(self, sentence: str) -> str:
        """ "yes", "no", or "" where the sentence does not restate the question."""
        if not self.asked or len(sentence) > _LONGEST_SENTENCE or sentence.rstrip(" \"'*)").endswith("?"):
            return ""
        found = {said for clause in _clauses(sentence) if (said := self._of_clause(clause))}
        return found.pop() if len(found) == 1 else ""

    def _of_clause(self, clause: str) -> str:
        verb = _VERB.search(clause)
        left, right = (clause[: verb.start()], clause[verb.end() :]) if verb is not None else (clause, "")
        said = as_said(clause)
        if role_words("unsure").intersection(said):
            return ""
        negators = [word for word in said if word in role_words("denying")]
        is_denied = verb is not None and verb.group("not") is not None
        if is_denied and not negators:
            negators = ["not"]  # "isn't"
        if not negators:
            if verb is None and not self.by_do:
                return ""
            return "yes" if not _ALTERNATIVE.search(clause) and self._affirms(left, right) else ""
        if len(negators) > 1:
            return ""
        return "no" if self._denies(left, right, is_denied) else ""

    def _affirms(self, left: str, right: str) -> bool:
        subject, predicate = self._subject(left), _content(right)
        for size in self._subjects(subject):
            rest = self.asked[size:]
            if not rest:
                return _is_seen(right)
            if size:
                return _in_order(rest, predicate) and _ends_name(rest, right) and _only_degrees(predicate, rest[0])
            return self._exists(right)
        return False

    def _exists(self, right: str) -> bool:
        """Whether "there is ..." goes on with what is asked: its name, then its place, or one turned into the other."""
        name = _name(right)
        head = self.asked[: self.head]
        if _in_order(head, _content(name)) and _ends_name(head, name):
            return _in_order(self.asked, _content(right)) and _ends_name(self.asked, right)
        named = _content(name)
        return named[-1:] == list(head[-1:]) and _in_order(self.turned, _turned(right))

    def _denies(self, left: str, right: str, is_denied: bool) -> bool:
        subject = as_said(left)
        if is_denied or as_said(right)[:1] == ("no",):
            for size in self._subjects(self._subject(left)):
                if not self.asked[size:]:
                    return is_denied and _is_seen(right)
                return any(self._covers(member, size) for member in _MEMBER.split(right))
            return False
        if as_said(right) == ("absent",):
            return any(size == len(self.asked) for size in self._subjects(_content(left)))
        named = [word for word in subject if word not in role_words("neutral")]
        return (
            named[:1] == ["no"] and _is_seen(right) and any(self._covers(member, 0) for member in _MEMBER.split(left))
        )

    def _subject(self, left: str) -> list[str]:
        """What a sentence is about; of a picture, what the prompt tells of it says nothing ("the radiograph of the chest")."""
        told = self.words - frozenset(self.asked) if _PICTURE.search(left) else frozenset()
        return [word for word in _content(left) if word not in told]

    def _subjects(self, subject: Sequence[str]) -> list[int]:
        """How many of the asked words the subject of a sentence takes, where it takes the first ones and no other."""
        size = len(set(subject))
        return [size] if set(self.asked[:size]) == set(subject) else []

    def _covers(self, member: str, size: int) -> bool:
        """Whether denying `member` denies what is asked from word `size` on: it is as wide or wider."""
        head = set(self.asked[size : max(self.head, size + 1)])
        for asked, named in ((self.asked[size:], _content(member)), (self.turned, _turned(member))):
            named = [word for word in named if word not in role_words("denying")]
            if named and head <= set(named) and _in_order(named, asked):
                return True
        return False


def _clauses(sentence: str) -> list[str]:
    sentence = _WITHOUT.sub("without", _ON_THE_IMAGE.sub(" ", _ANSWER_WORD.sub("", sentence.strip())))
    found: list[str] = []
    for part in _CLAUSE.split(sentence):
        pieces = _JOIN.split(part)
        joints = _JOIN.findall(part)
        clause = pieces[0]
        for joint, piece in zip(joints, pieces[1:], strict=True):
            if _VERB.search(clause) and _VERB.search(piece):
                found.append(clause)
                clause = piece
            else:
                clause += joint + piece
        found.append(clause)
    return [clause.strip(" .!") for clause in found if clause.strip(" .!,")]


def _content(text: str) -> list[str]:
    return [word for word in as_said(text) if word not in role_words("neutral") or word in role_words("presenting")]


def _name(text: str) -> str:
    """A text up to its first preposition with something before it."""
    for found in _PREPOSITION.finditer(text):
        if _content(text[: found.start()]):
            return text[: found.start()]
    return text


def _only_degrees(predicate: Sequence[str], word: str) -> bool:
    before = predicate[: predicate.index(word)]
    return all(degree in role_words("degrees") or degree.endswith("ly") for degree in before)


def _turned(text: str) -> list[str]:
    before, of, after = text.partition(" of ")
    return _content(after) + _content(before) if of else _content(text)


def _in_order(words: Sequence[str], text: Sequence[str]) -> bool:
    rest = iter(text)
    return bool(words) and all(word in rest for word in words)


def _ends_name(words: Sequence[str], text: str) -> bool:
    """Whether the last of `words` is not the beginning of a longer name: "mass" in "mass effect"."""
    said = [word for part in _PART.split(text) for word in (*as_said(part), "")]
    at = -1
    for word in words:
        if word not in said[at + 1 :]:
            return False
        at = said.index(word, at + 1)
    after = said[at + 1]
    return (
        not after
        or after in role_words("neutral")
        or after in role_words("degrees")
        or _QUALIFIES.fullmatch(after) is not None
    )


def _is_seen(right: str) -> bool:
    """Whether what follows the verb only says that something is there."""
    said = [word for word in as_said(right) if not word.endswith("ly")]
    return (
        not said
        or said[0] in role_words("seen")
        or all(word in role_words("neutral") or word == "view" for word in said)
    )


@lru_cache(maxsize=4096)
def question_of(prompt: str) -> Question:
    """The question of a prompt, which may hold instructions beside it."""
    text = normalise(prompt[-4000:])
    if not text.strip():
        return Question()
    words = list(as_said(text))
    left_out: set[str] = set()
    for index, word in enumerate(words):
        if word == "or":  # "left or right?": either is an answer, not the question's own word
            left_out |= {*words[max(0, index - 2) : index], *words[index + 1 : index + 3]}
    shared = frozenset(words) - left_out - role_words("denying") - role_words("unsure")
    asks = _ASKS.findall(text)
    if (
        len(asks) != 1
        or _ALTERNATIVE.search(asks[0][1])
        or (role_words("denying") | role_words("unsure")).intersection(as_said(asks[0][1]))
    ):
        return Question(shared)
    body = _ON_THE_IMAGE.sub(" ", asks[0][1])
    return Question(
        shared,
        tuple(_content(body)),
        len(_content(_name(body))),
        tuple(_turned(body)),
        by_do=asks[0][0].lower() in ("do", "does", "did"),
    )
