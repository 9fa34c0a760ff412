"""What a question asks, and what a sentence that restates it says.

A sentence answers yes or no only where it says the words of the question and beside them nothing but narrower words:
with another side, another number, a doubt, or a negation of something else it says nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache

from rewards.fuzzy import SIDES
from rewards.text import normalise, table
from rewards.wording import as_said

_LONGEST_SENTENCE = 300
_ASKS = re.compile(
    r"(?:^|[.:,>\n?])\s*(?:so |then )?(is/are|is|are|was|were|do|does|did|has|have|had|can|should"
    r"|will)\s+([^?\n]{2,200})\?",
    re.IGNORECASE,
)
_SHORT_FOR_IS_THERE = re.compile(
    r"^\s*(?:is any|(?:do you |can you )?(?:notice|appreciate)(?: any)?|any|evidence of)(?= [^?\n]{2,200}\?)",
    re.IGNORECASE | re.MULTILINE,
)
_ASKS_WITHOUT_MARK = re.compile(
    r"^\s*(is|are|was|were|does|has|have|had|can)\s+([^?.\n]{2,200})\s*$", re.IGNORECASE | re.MULTILINE
)
_PREPOSITION = re.compile(
    r"\b(?:in|on|of|at|within|to|for|from|under|below|above|behind|near|along|through|between|around|over|into|with)\b",
    re.IGNORECASE,
)
# Two halves around one of these may change places: "fracture of the rib", "rib fracture".
_OF_A_PLACE = re.compile(r"\b(?:in|on|of|at|within)\b", re.IGNORECASE)
# Where the speaker looks, which both sides may leave out: "in this image", "based on the scan".
_ON_THE_IMAGE = re.compile(
    r",?\s*\b(?:based on|according to|in|on|from|within|of) (?:this|the|these|that|your|given) (?:[\w-]+ ){0,3}?"
    r"(?:images?|scans?|x-?rays?|x rays?|radiographs?|films?|pictures?|stud(?:y|ies)|ct|mri|views?|slices?"
    r"|patient(?!['’]))\b"
    r"(?: of (?:the )?(?:head|brain|skull|neck|chest"
    r"|thorax|abdomen|pelvis|spine|body)\b)?,?",
    re.IGNORECASE,
)
_PICTURE = re.compile(
    r"\b(?:images?|scans?|x-?rays?|radiographs?|films?|pictures?|ct|mri|ultrasound|sonogram)\b", re.IGNORECASE
)
# "This chest X-ray" before what it shows.
_PICTURE_SHOWS = re.compile(
    r"^(?:(?:the|this|that|an?|your) )?((?:[\w-]+ ){0,3}?)(?:images?|scans?|x-?rays?|x rays?|radiographs?|films?|ct"
    r"|mri|ultrasound|sonogram)"
    r"(?: (?:scan|image|above|below|provided|given))?(?= (?:do|show|demonstrat|reveal|depict|display|illustrat|exhibit"
    r"|indicat|confirm|contain|ha[sd]|is|was))",
    re.IGNORECASE,
)
_SIDE_LETTER = re.compile(r"\b(?:L|R)\b")
# In small letters.
_SPELT_OUT = tuple(
    (re.compile(said), plain)
    for said, plain in (
        (r"\([^()]*\)", " "),
        (r"\bi(?:['’]m| am) looking at\b", "this is"),
        (r"\b(?:i|we|you) (?:can |do )?(?:\w+ly )?(?:see|observe|identify|notice|note)\b", "there is"),
        (r"\b(gall|hyper|hypo|mid|hemi|pneumo) (?=\w{3})", r"\1"),
        (r"\b(?:any|some)thing\b", "there"),
        (r"\bnothing\b", "not there"),
        (
            r"\bneither ([^.;]{1,60}?) nor (?=[^.;]{1,60}? (?:is|are|was|were) (?:seen|present|visible|identified|noted"
            r"|evident|observed|detected|found)\b)",
            r"no \1 or ",
        ),
        (r",?\s+(?:rather than|instead of|as opposed to)\b", ", not"),
        (r"(?<=\w) ones?(?=\W*$)", ""),
        (r"\b(?:on|in|at) both sides\b", "bilateral"),
        (r"\bat this level\b", ""),
        (r"\bsize (is|are|was|were) within normal limits\b", r"\1 unenlarged"),
        (r"\b(?:of )?normal(?: in |[ -])sized?\b|\bwithin normal size limits\b", "unenlarged"),
        (r"\b(?:free of|negative for|(?:absence|lack) of)\b", "without"),
        (r"n['’]t\b", " not"),
        (r"\bi['’]m\b", "i am"),
        (r"\b(there|it|that)['’]s\b", r"\1 is"),
        (r",\s*(?:also |commonly )?(?:known|referred to) as [^,.;]{1,60},", " "),
        (r"\bother than\b", "except"),
        (r"\bin view\b", "visible"),
        (r"\bcan (?:\w+ly )?be (?=seen|identified|noted|observed|found|detected|visuali[sz]ed)", "is "),
        # What the image is, not that it shows something.
        (
            r"^((?:this|it|the (?:image|picture|study|scan|film))(?: (?:is|was)(?: not)?(?: an?)?| an?) "
            r"(?:[\w-]+ ){0,2}?)"
            r"(?:x[- ]?ray|radiograph|plain film)\b",
            r"\1plainfilm",
        ),
    )
)
_ANSWER_WORD = re.compile(r"^\W*(?:yes|no)\s*,\s+", re.IGNORECASE)
_CLAUSE = re.compile(
    r"\s*(?:[;:]|,\s*(?=not\b)|,?\s*\b(?:such as|including|namely|for example)\b"
    r"|,\s*\b(?:indicating|suggesting|implying|reflecting|with(?! the exception))\b|,\s*as\b(?! well)"
    r"|,?\s*\b(?:but|however"
    r"|although|though|while|whereas|which|because|since|so|therefore)\b)\s*",
    re.IGNORECASE,
)
_JOIN = re.compile(r",\s+(?:and\s+)?|\s+and\s+", re.IGNORECASE)
_QUALIFIES = re.compile(
    r"\w+(?:ly|ed|ing|wise)|relative|compared|and|under|above|below|behind|near|along|through|between|around|over|into"
    r"|which|that|due|images?|ct|mri|ultrasound"
)
_MEMBER = re.compile(r"\s*,\s*(?:(?:or|and|nor)\s+)?|\s+(?:or|and|nor)\s+", re.IGNORECASE)
_OF = re.compile(r"(\w+) of (?:(?:the|an?) )?(\w+)(?= (?:is|are|was|were|appears?|looks?)\b)")
_TWO_SUBJECTS = re.compile(
    r"((?:[\w-]+ ){1,4}?)and ((?:[\w-]+ ){1,4}?)(?=(?:is|are|was|were|appears?|looks?) )", re.IGNORECASE
)
_ALTERNATIVE = re.compile(r"(?<!\w)or(?!\w)", re.IGNORECASE)
_PRONOUN = re.compile(r"(?:this|that|it|these|those)\b(?! \w+ (?:is|are|was|were)\b)", re.IGNORECASE)
_NEGATIVE = re.compile(r"\bnon[- ]?(?=\w{4})|\bfree of\b", re.IGNORECASE)
_JOINT = re.compile(r"\b(?:and|or|than|by|to|from|for)\b", re.IGNORECASE)
_THERE = re.compile(r"(?:there|any)\b", re.IGNORECASE)
_ENDING = re.compile(r"(?<=\w{4})(?:ifi(?:ed|cation)|at(?:ed|ion)|e?ment|osity|ous|ity|ing|ed|ion|e)$")
_MEANS = re.compile(
    r"^.{3,120}?\b(?:indicat\w+|suggest\w*|confirm\w*|represents?|(?:consistent|compatible) with|suggestive of) "
    r"(?:that |the presence of )?",
    re.IGNORECASE,
)
_TURNS = re.compile(
    r"\b(?:but|however|although|though|yet)\b,?(?: \w+){0,3},? (?:in (?:reality|fact|truth)|actually|really)\b",
    re.IGNORECASE,
)
_DENIES_IT = re.compile(
    r"(?:^|.*\W)(?:it|this|that|they|these|those|there)(?: really| actually)?"
    r" (?:is|are|was|were|do|does|did|has|have)(?:n['’]t| not| none)(?: really| actually| so| true| the case)?\W*",
    re.IGNORECASE | re.DOTALL,
)
_OPPOSITE = re.compile(r"(?:ab|un|non|in|im|a)(?=\w{5})")


@cache
def role_words(name: str) -> frozenset[str]:
    """The keys of the words that play a role in a sentence (data/answers.json)."""
    return frozenset(as_said(" ".join(table("answers")[name])))


def is_neutral(word: str) -> bool:
    """Whether a word (as a key) stands in any statement and says nothing by itself."""
    return word in role_words("neutral")


@dataclass(frozen=True)
class Question:
    """words: the words a sentence may share with the question. asked: those of a yes or no question in order, without
    neutral ones; () where it is no such question, or not known. head: those before a preposition. orders: the orders in
    which a sentence may say them ("fracture of the clavicle", "clavicle fracture"). exists: it asks whether something
    is there, so that a narrower thing is a yes. by_do: it asks with "does", so that an answer may have any verb ("The
    lesion enhances."). roots: from the root of an asked word to the word. plain: from the word without "ab" or "un".
    unsure: words that leave a sentence open. negative: it asks for what is not so ("non-enlarged"), and the other words
    are of what would be so.
    """

    words: frozenset[str] = frozenset()
    asked: tuple[str, ...] = ()
    head: frozenset[str] = frozenset()
    orders: tuple[tuple[str, ...], ...] = ()
    exists: bool = False
    by_do: bool = False
    roots: Mapping[str, str] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()
    negative: bool = False

    @cached_property
    def shared(self) -> frozenset[str]:
        """The roots of its words."""
        return frozenset(map(_root, self.words))

    def explains(self, rest: Iterable[str]) -> bool:
        """Whether words beside an answer say nothing that the question does not."""
        return all(is_neutral(word) or self.leads_to_it(word) for word in rest)

    def leads_to_it(self, word: str) -> bool:
        """Whether a word of a sentence is one of the question, perhaps in another form ("described": describe)."""
        return word in self.words or _root(word) in self.shared

    def without_image(self, sentence: str) -> str:
        """A sentence without the image in which it sees what it says."""
        sentence = _ON_THE_IMAGE.sub(_without_place, sentence)
        picture = _PICTURE_SHOWS.match(sentence)
        return sentence if picture is None or self._is_another(picture.group(1)) else sentence[picture.end() :]

    def verdict(self, sentence: str) -> str:
        """ "yes", "no", or "" where the sentence does not restate the question."""
        if not self.asked or len(sentence) > _LONGEST_SENTENCE or sentence.rstrip(" \"'*)").endswith("?"):
            return ""
        denied = _DENIES_IT.fullmatch(sentence) is not None
        sentence = _spelt_out(_ANSWER_WORD.sub("", sentence.strip()))
        if not denied and not any(self._plain(word) in self.asked for word in self._words(sentence)):
            return ""
        clauses = [form for clause in _clauses(sentence) for form in _forms(clause)]
        found = {said for clause in clauses if (said := self._of_clause(clause))}
        if self.negative:
            found = {"no" if said == "yes" else "yes" for said in found}
        found |= {"no"} if denied else set()
        return found.pop() if len(found) == 1 and not _TURNS.search(sentence) else ""

    def may_deny(self, sentence: str) -> bool:
        """Whether a sentence names all that is asked, some of it behind a denying word, and cannot be read."""
        said = [self._plain(word) for word in self._words(_spelt_out(sentence))]
        first = next((at for at, word in enumerate(said) if word in role_words("denying")), len(said))
        behind = not set(self.asked).isdisjoint(said[first:])
        return behind and set(self.asked) <= set(said) and not self.verdict(sentence)

    def _of_clause(self, clause: str) -> str:
        picture = _PICTURE_SHOWS.match(clause)
        if picture is not None and not self._is_another(picture.group(1)):
            clause = f"it {clause[picture.end() :]}"
        told = self.words.difference(self.asked) if _PICTURE.search(clause) else frozenset()
        said = [word for word in self._words(clause) if word not in told or is_neutral(word)]
        turned = [self._plain(word) for word in said]
        both = any(plain != word and plain in said for word, plain in zip(said, turned, strict=True))
        if both or said[-1:] == ["only"] or not self.unsure.isdisjoint(said):
            return ""
        negators = [word for word in said if word in role_words("denying")]
        if turned != said or not negators:
            return ("yes" if turned == said else "no") if not negators and self._is_affirmed(clause, turned) else ""
        return "no" if len(negators) == 1 and self._denies(clause, negators[0], told) else ""

    def _words(self, text: str) -> list[str]:
        """The words of a text; those of the question in its own form ("the clavicle is fractured": fracture)."""
        return [self.roots.get(_root(word), word) for word in as_said(text)]

    def _is_another(self, text: str) -> bool:
        """Whether a text names a side or a number that the prompt does not, or what is asked for."""
        said = set(as_said(text))
        return not said.isdisjoint(self.asked) or any(map(sets_apart, said - self.words))

    def _plain(self, word: str) -> str:
        """The asked word of which a word is the opposite (abnormal, normal), else the word."""
        return self.plain.get(word) or self.plain.get(_OPPOSITE.sub("", word, count=1), word)

    def _is_affirmed(self, clause: str, said: Sequence[str]) -> bool:
        """Whether a clause affirms what is asked, or says that a finding means it ("free air suggests ...")."""
        if self._affirms(clause, said):
            return True
        means = _MEANS.match(clause) if self.exists else None
        return means is not None and self._affirms(clause, ["is", *self._words(clause[means.end() :])])

    def _affirms(self, clause: str, said: Sequence[str]) -> bool:
        """Whether a clause says all that is asked, in one of its orders, and beside it only what narrows it."""
        verb = next((at for at, word in enumerate(said) if word in role_words("verbs")), -1)
        last = _end_of(self.asked, said)
        named = tuple(word for word in said[: last + 1] if word in self.asked)
        if last < 0 or "or" in said[: last + 2] or named not in self.orders or not (self.by_do or verb >= 0):
            return False
        if "by" in said[:last] and "by" not in self.words:
            return False  # what causes is not what is caused
        if verb > last:  # "An enlarged heart is seen", but not "A skull fracture is an emergency"
            is_thing = self.exists or named != self.asked
            told = [word for word in said[verb:] if not is_neutral(word) or word in role_words("seen")]
            if not is_thing or not role_words("seen").issuperset(told[:1]):
                return False
        return all(self._narrows(said, at) for at in range(last)) and _may_end(said[last + 1 :])

    def _narrows(self, said: Sequence[str], at: int) -> bool:
        """Whether a word among those that are asked is neutral, one of them, a degree, or describes the next of
        them."""
        word = said[at]
        if word in self.asked or is_neutral(word) or _is_degree(word):
            return True
        following = next(other for other in said[at + 1 :] if other in self.asked or is_neutral(other))
        if self.exists:
            return following in self.asked or (following == "of" and at > 0 and "in" in said[:at])
        is_whole = not role_words("whole").isdisjoint(self.asked)
        return following in self.asked and not (is_whole or sets_apart(word) or word in role_words("parts"))

    def _denies(self, clause: str, negator: str, told: frozenset[str]) -> bool:
        """Whether a clause denies what is asked, or something wider, perhaps as one of a list."""
        members = [
            [word for word in self._words(part) if word not in told or is_neutral(word)]
            for part in ([clause] if {"and", "or"} & set(self.asked) else _MEMBER.split(clause))
        ]
        first = next((index for index, member in enumerate(members) if negator in member), -1)
        if first < 0:
            return False  # a "nor" between two members
        cut = members[first].index(negator)
        subject, members[first] = self._subject(members[first][:cut]), members[first][cut + 1 :]
        place = _content(clause[found.end() :]) if first + 1 < len(members) and (found := _last_place(clause)) else []
        for member in members[first:]:
            named = [*subject, *(word for word in member if self._counts(word))]
            named += [word for word in place if word not in named]
            if self.head <= set(named) and any(_in_order(named, order) for order in self.orders):
                return True
        return False

    def _counts(self, word: str) -> bool:
        """Whether a word of what is denied narrows it: "no obvious mass" is no mass."""
        return word in self.asked or not (is_neutral(word) or word in role_words("plain"))

    def _subject(self, said: Sequence[str]) -> list[str]:
        """The words of a subject that count: of a definite one not those that narrow it ("the abdominal aorta")."""
        last = max((at for at, word in enumerate(said) if word in self.asked), default=-1)

        def counts(at: int) -> bool:
            return said[at] in self.asked or self.exists or at > last or not self._narrows(said, at)

        named = [word for at, word in enumerate(said) if counts(at) and self._counts(word)]
        return [word for word in named if word in self.asked or word not in role_words("whole")]  # "intact without ..."


def _may_end(rest: Sequence[str]) -> bool:
    """Whether words behind the last of those that are asked leave it what it is: they begin no longer name."""
    return (
        not rest
        or rest[0] == "bilateral"
        or is_neutral(rest[0])
        or _is_degree(rest[0])
        or _QUALIFIES.fullmatch(rest[0]) is not None
    )


def _root(word: str) -> str:
    return _ENDING.sub("", word)


def sets_apart(word: str) -> bool:
    """Whether a word names a side or a number, with which another thing is meant."""
    return word in SIDES or word.isdigit()


def _is_degree(word: str) -> bool:
    return word in role_words("degrees") or word.endswith("ly")


def _end_of(words: Sequence[str], said: Sequence[str]) -> int:
    """Where the last of `words` stands, each as often as it is there; -1 where one is missing."""
    left = list(words)
    for at, word in enumerate(said):
        if word in left:
            left.remove(word)
            if not left:
                return at
    return -1


def _last_place(clause: str) -> re.Match[str] | None:
    *_, last = [None, *_PREPOSITION.finditer(clause)]
    return last


def _without_place(place: re.Match[str]) -> str:
    """Nothing for the image, unless it is one of a side or another one: "in the right lung CT", "in the prior film"."""
    return " " if (SIDES | role_words("unsure")).isdisjoint(as_said(place.group())) else place.group()


def _spelt_out(text: str) -> str:
    text = _SIDE_LETTER.sub(lambda letter: "left" if letter.group() == "L" else "right", text).lower()
    for said, plain in _SPELT_OUT:
        text = said.sub(plain, text)
    return text


def _clauses(sentence: str) -> list[str]:
    sentence = _ON_THE_IMAGE.sub(_without_place, sentence)
    found: list[str] = []
    for part in _CLAUSE.split(sentence):
        pieces = _JOIN.split(part)
        joints = _JOIN.findall(part)
        clause = pieces[0]
        for joint, piece in zip(joints, pieces[1:], strict=True):
            if _has_verb(clause) and _has_verb(piece):
                found.append(clause)
                clause = _with_subject(piece, clause)
            else:
                clause += joint + piece
        found.append(clause)
    return [clause.strip(" .!") for clause in found if clause.strip(" .!,")]


def _with_subject(clause: str, former: str) -> str:
    """A clause that begins with its verb has the subject of the one before it."""
    if not _has_verb(clause.split(maxsplit=1)[0]):
        return clause
    words = former.split()
    verb = next(at for at, word in enumerate(words) if _has_verb(word))
    return " ".join([*words[:verb], clause])


def _forms(clause: str) -> Iterator[str]:
    """A clause, "the head of the pancreas" as "pancreas head", and each of two subjects alone."""
    yield clause
    if (turned := _OF.sub(r"\2 \1", clause, count=1)) != clause:
        yield turned
    pair = _TWO_SUBJECTS.match(clause)
    if pair is not None and _PREPOSITION.search(pair.group()) is None:
        yield from (subject + clause[pair.end() :] for subject in pair.groups())


def _has_verb(text: str) -> bool:
    return not role_words("verbs").isdisjoint(as_said(text))


def _content(text: str) -> list[str]:
    return [word for word in as_said(text) if not is_neutral(word) or word in role_words("presenting")]


def _name(text: str) -> str:
    """A text up to its first preposition with something before it."""
    for found in _PREPOSITION.finditer(text):
        if _content(text[: found.start()]):
            return text[: found.start()]
    return text


def _in_order(words: Sequence[str], text: Sequence[str]) -> bool:
    rest = iter(text)
    return bool(words) and all(word in rest for word in words)


def _orders(body: str) -> tuple[tuple[str, ...], ...]:
    """The orders of what is asked: its own, the halves around a preposition turned, or the last word first."""
    asked = tuple(_content(body))
    if _JOINT.search(body) or _PRONOUN.match(body) or len(asked) < 2:
        return (asked,)
    place = _OF_A_PLACE.search(body, len(_name(body)))
    if place is not None:
        return asked, (*_content(body[place.end() :]), *_content(body[: place.start()]))
    return asked, (asked[-1], *asked[:-1])


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
    text = _SHORT_FOR_IS_THERE.sub("is there any", text)
    asks = _ASKS.findall(text) or _ASKS_WITHOUT_MARK.findall(text)
    if len(asks) != 1:
        return Question(shared)
    negative = _NEGATIVE.search(asks[0][1])
    by_do = asks[0][0].lower() in ("do", "does", "did", "can")
    body = _spelt_out(_NEGATIVE.sub("", _ON_THE_IMAGE.sub(" ", asks[0][1]))).strip()
    is_either = _ALTERNATIVE.search(body) and not _THERE.match(body)
    if is_either or role_words("denying").intersection(as_said(body)):
        return Question(shared)
    asked = tuple(_content(body))
    is_there = _THERE.match(body) or role_words("seen").intersection(as_said(body)) or _shows(body, by_do)
    roots = {_root(word): word for word in asked} if len(asked) > 1 else {}
    plain = {_OPPOSITE.sub("", word, count=1): word for word in asked}
    for group in table("answers")["opposites"] if not is_there else ():
        plain |= {other: word for word in group if word in asked for other in group if other != word}
    head = frozenset(_content(_name(body)))
    unsure = role_words("unsure").difference(as_said(" ".join(asks[0])))  # "can" answers "can"
    return Question(
        shared, asked, head, _orders(body), bool(is_there), by_do, roots, plain, unsure, negative is not None
    )


def _shows(body: str, by_do: bool) -> bool:
    """Whether a question with "does" asks what something shows or has."""
    return by_do and not (role_words("verbs") - role_words("copulas")).isdisjoint(as_said(body))
