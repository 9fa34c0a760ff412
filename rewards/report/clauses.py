"""Where the clauses of a sentence begin: at contrast words, exceptions, and where a new subject gets its own
predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rewards.report.terms import Marks

_NOUN_ENDS = ("ing", "ment", "ion", "ence", "ity", "sia")  # of states: "blunting", "enlargement"
_LOOK_AHEAD = 14  # words; a clause's own predicate is not further away
_BORDERS = frozenset((",", "and"))
_GOES_ON = ("or", "nor", "which", "that", "who")  # after a comma: still the clause before it


def clause_starts(marks: Marks, lines: Sequence[int]) -> list[int]:
    """Word positions at which a new clause begins, 0 first. `lines`: positions where a new line of the text began."""
    words = marks.words
    starts = {0}
    if marks.cues:
        starts.update(_contrasts(marks))
    if lines:
        starts.update(_finished_lines(marks, lines))
    if not _BORDERS.isdisjoint(words):
        borders = [i for i, word in enumerate(words) if word in _BORDERS]
        starts.update(_statements(marks, borders))
        starts.update(_new_subjects(marks, starts, borders))
    return sorted(i for i in starts if i < len(words)) if len(starts) > 1 else [0]


def _contrasts(marks: Marks) -> Iterator[int]:
    """After "but"; at "except" and after the comma that ends the exception."""
    words = marks.words
    for cue in marks.cues:
        if cue.name == "break":
            yield cue.end
        elif cue.name == "except":
            yield cue.begin
            yield next((i for i in range(cue.end, len(words)) if words[i] == ","), len(words)) + 1


def _statements(marks: Marks, borders: Sequence[int]) -> Iterator[int]:
    """ "... and positive for", "... and shows", "..., none": words that begin a statement of their own."""
    for i in borders:
        own = ("none", "positive") if marks.words[i] == "," else marks.lexicon.grammar["asserting"]
        if i + 1 < len(marks.words) and marks.words[i + 1] in own:
            yield i + 1


def _finished_lines(marks: Marks, lines: Sequence[int]) -> Iterator[int]:
    """A line that ends with a finding or a "normal" is finished, unless the next one begins with a joining word."""
    grammar = marks.lexicon.grammar
    joins = grammar["separators"] | grammar["prepositions"]
    ends = {mention.end for mention in (*marks.heads, *marks.normals, *marks.abnormals)}
    return (i for i in lines if 0 < i < len(marks.words) and marks.words[i] not in joins and i in ends)


class _Roles(NamedTuple):
    """What the words at these positions do."""

    verbs: set[int]
    heads: set[int]
    said: set[int]  # states and "normal": predicates, not nouns
    normal: set[int]
    denials: set[int]
    organs: dict[int, int]  # begin -> end
    sides: dict[int, int]
    organ_ends: set[int]


def _roles(marks: Marks) -> _Roles:
    normal = {mention.begin for mention in marks.normals}
    states = {state.begin for state in marks.states if not marks.words[state.end - 1].endswith(_NOUN_ENDS)}
    predicates = {cue.begin for cue in marks.cues if cue.name in ("negate_after", "doubt_after")}
    organs = {organ.begin: organ.end for organ in marks.organs}
    return _Roles(
        verbs={*marks.verbs, *predicates},
        heads={head.begin for head in marks.heads},
        said=normal | states,
        normal=normal,
        denials={cue.begin for cue in marks.cues if cue.name == "negate_before"},
        organs=organs,
        sides={m.begin: m.end for m in marks.modifiers if m.kind == "side"},
        organ_ends=set(organs.values()),
    )


@dataclass
class _Behind:
    """What the clause has said up to a border."""

    begin: int = 0
    verb: bool = False
    denied: bool = False
    said: bool = False
    head_since_verb: bool = False

    def take(self, i: int, roles: _Roles) -> None:
        if i in roles.verbs:
            self.verb, self.head_since_verb, self.said = True, False, True
        if i in roles.heads:
            self.head_since_verb = self.said = True
        self.said = self.said or i in roles.said
        self.denied = self.denied or i in roles.denials


@dataclass
class _Ahead:
    """What follows a border at `begin`, up to the next comma or predicate. `border`: the comma or "and" itself."""

    border: int
    begin: int
    verb: bool = False
    perceived: bool = False  # "... are seen": a predicate that a whole list may share
    said: bool = False
    normal: bool = False
    subject: bool = False
    list_goes_on: bool = False


def _look_ahead(marks: Marks, roles: _Roles, starts: set[int], border: int) -> _Ahead | None:
    words, count = marks.words, len(marks.words)
    begin = border + 1
    while begin < count and words[begin] in _BORDERS:
        begin += 1
    if begin >= count or words[begin] in _GOES_ON:
        return None
    ahead = _Ahead(border, begin)
    for i in range(begin, min(count, begin + _LOOK_AHEAD)):
        if words[i] in (",", "with", "without", "or") or (i > begin and i in starts):
            break
        if i in roles.verbs:
            ahead.verb = True
            ahead.perceived = i + 1 < count and words[i + 1] in marks.lexicon.grammar["perceived"]
            break
        ahead.list_goes_on = ahead.list_goes_on or words[i] == "and"
        ahead.said = ahead.said or i in roles.said
        ahead.normal = ahead.normal or i in roles.normal
        ahead.subject = ahead.subject or i in roles.heads or i in roles.organs
    return ahead


def _opens_with_article(marks: Marks, roles: _Roles, behind: _Behind, ahead: _Ahead) -> bool | None:
    """ "..., the heart is enlarged"; under a denial, "no effusion, the heart ... is seen" may still be its list."""
    word = marks.words[ahead.begin]
    listed = behind.denied and not behind.verb and ahead.perceived and word != "there"
    return True if word in marks.lexicon.grammar["subject_starts"] and ahead.verb and not listed else None


def _shares_a_noun(marks: Marks, roles: _Roles, behind: _Behind, ahead: _Ahead) -> bool | None:
    """ "enlarged hilar and mediastinal lymph nodes are seen": adjectives of one noun."""
    whole = ahead.perceived and not behind.verb and not behind.denied
    return False if whole and ahead.border in roles.organ_ends else None


def _organ_has_a_predicate(marks: Marks, roles: _Roles, behind: _Behind, ahead: _Ahead) -> bool | None:
    """ "no effusion and heart size is normal", "lungs clear, heart normal"."""
    organ = ahead.begin if ahead.begin in roles.organs else roles.sides.get(ahead.begin, -1)
    if organ not in roles.organs or organ in roles.heads or not behind.said or not (ahead.verb or ahead.said):
        return None
    own_verb = ahead.verb and not (behind.denied and not behind.verb and ahead.perceived)
    after = roles.organs[organ]
    enlarged = after in roles.said and marks.words[after].endswith("ed")  # "no effusion, heart enlarged"
    return own_verb or ahead.normal or enlarged or (ahead.said and not behind.denied)


def _second_verb(marks: Marks, roles: _Roles, behind: _Behind, ahead: _Ahead) -> bool | None:
    """ "no pneumothorax is identified and effusion is small", but not "effusion is seen and nodules and masses are"."""
    if not (behind.verb and ahead.verb and ahead.subject):
        return None
    return not behind.head_since_verb or not ahead.list_goes_on


def _otherwise(marks: Marks, roles: _Roles, behind: _Behind, ahead: _Ahead) -> bool | None:
    return marks.words[ahead.begin] == "otherwise" or None


_Rule = Callable[[Marks, _Roles, _Behind, _Ahead], "bool | None"]
# The first rule that has an opinion decides whether a new clause begins behind a comma or "and".
_RULES: tuple[_Rule, ...] = (_opens_with_article, _shares_a_noun, _organ_has_a_predicate, _second_verb, _otherwise)


def _new_subjects(marks: Marks, starts: set[int], borders: Sequence[int]) -> list[int]:
    words = marks.words
    roles = _roles(marks)
    found: list[int] = []
    behind = _Behind()
    for i, word in enumerate(words[: borders[-1] + 1]):
        behind.take(i, roles)
        if word not in _BORDERS or (i and words[i - 1] == ","):
            continue
        ahead = _look_ahead(marks, roles, starts, i)
        if ahead is None or ahead.begin - behind.begin <= 1:
            continue
        verdicts = (rule(marks, roles, behind, ahead) for rule in _RULES)
        if next((verdict for verdict in verdicts if verdict is not None), False):
            found.append(ahead.begin)
            behind = _Behind(ahead.begin)
    return found
