"""Which words of a clause are denied, doubted or not asserted at all: the reach of cue words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rewards.report.terms import Marks, Mention

_LISTED = (",", "and", "plus")
_OWN_ITEM = (",", "and", "with", "a", "an", "there")  # before a cue that starts a list item of its own
_ARTICLES = ("a", "an", "there", "known")  # what they introduce is told of as seen
_SEEN_CHANGES = ("stable", "decreased", "increased")
_SMALL = 2.5  # grade; "no pneumothorax, small effusion" tells of the effusion


class WordSpan(NamedTuple):
    """words[begin:end]"""

    begin: int
    end: int

    def holds(self, i: int) -> bool:
        return self.begin <= i < self.end


def holds(spans: Sequence[WordSpan], i: int) -> bool:
    return any(begin <= i < end for begin, end in spans)


class Reach(NamedTuple):
    """Word ranges of a clause. Doubt inside a denial is part of it: "no evidence of possible pneumonia" denies."""

    denied: tuple[WordSpan, ...] = ()
    doubted: tuple[WordSpan, ...] = ()
    unasserted: tuple[WordSpan, ...] = ()


NOTHING = Reach()


@dataclass
class _Clause:
    """words[lo:hi] while its cues are read. `reopened`: doubt said after a denial ("... cannot be excluded")."""

    marks: Marks
    lo: int
    hi: int
    cues: list[Mention]
    targets: list[WordSpan]  # findings, states and general words that a cue can act on
    denied: list[WordSpan]
    doubted: list[WordSpan]
    reopened: list[WordSpan]
    unasserted: list[WordSpan]


class _Cue(NamedTuple):
    begin: int
    end: int
    role: str
    before: Sequence[WordSpan]
    after: Sequence[WordSpan]
    later: Sequence[Mention]  # the cues behind this one


def reaches(marks: Marks, lo: int, hi: int) -> Reach:
    """What the cues of the clause words[lo:hi] deny, doubt and leave unasserted."""
    cues = marks.part(lo, hi).cues
    if not cues and not marks.normals:
        return NOTHING
    clause = _Clause(marks, lo, hi, cues, [], [], [], [], [])
    if cues:
        targets = (*marks.heads, *marks.states, *marks.normals, *marks.abnormals)
        clause.targets = sorted([WordSpan(t[0], t[1]) for t in targets if lo <= t[0] < hi])
    for number, cue in enumerate(clause.cues):
        before = [t for t in clause.targets if t.end <= cue.begin]
        after = [t for t in clause.targets if t.begin >= cue.end]
        read = _Cue(cue.begin, cue.end, cue.name, before, after, clause.cues[number + 1 :])
        _act(clause, read, _direction(clause, read))
    _within_limits(clause)
    return _settle(clause) if clause.denied or clause.doubted or clause.reopened or clause.unasserted else NOTHING


def _direction(clause: _Clause, cue: _Cue) -> str:
    """The role of a cue that acts either way, or whose usual side has nothing to act on."""
    words, grammar, role = clause.marks.words, clause.marks.lexicon.grammar, cue.role
    if role.endswith("_either"):
        of = words[cue.end - 1] == "of"
        passive = words[cue.begin] in grammar["passive"]
        passive = passive or (cue.begin > clause.lo and words[cue.begin - 1] in grammar["passive"])
        joined = cue.after and grammar["separators"].isdisjoint(words[cue.end : cue.after[0].begin])
        forward = of or not cue.before or (joined and not passive)
        role = role.replace("_either", "_before" if forward and of else "_next" if forward else "_after")
    if role == "negate_after" and not cue.before:
        return "negate_before"
    if role == "negate_before" and cue.end == clause.hi and cue.before:
        return "negate_after"  # "pneumothorax: no"
    return role


def _act(clause: _Clause, cue: _Cue, role: str) -> None:
    """Mark what a cue acts on. A role is an act and a direction: negate_before stands before what it denies."""
    act, _, direction = role.partition("_")
    if act == "ignore":
        whole = {"before": WordSpan(cue.end, clause.hi), "after": WordSpan(clause.lo, cue.begin)}
        clause.unasserted.append(whole[direction])
        return
    spans = DIRECTIONS.get(direction)
    if act not in ("negate", "doubt") or spans is None:
        return
    chosen = clause.denied if act == "negate" else clause.reopened if direction == "after" else clause.doubted
    chosen += spans(clause, cue, act)


def _all_behind(clause: _Clause, cue: _Cue, act: str) -> list[WordSpan]:
    return [WordSpan(cue.end, _forward(clause, cue, act))]


def _next_behind(clause: _Clause, cue: _Cue, act: str) -> list[WordSpan]:
    """The next finding and those joined to it by "or"."""
    if not cue.after:
        return [WordSpan(cue.end, clause.hi)]
    end = cue.after[0].end
    for target in cue.after[1:]:
        between = clause.marks.words[end : target.begin]
        if "or" not in between or "," in between or "with" in between:
            break
        end = target.end
    return [WordSpan(cue.end, end)]


def _all_before(clause: _Clause, cue: _Cue, act: str) -> list[WordSpan]:
    """A doubt is that of the last item: "cavity, tuberculosis suspected" tells of the cavity."""
    begin = _backward(clause, cue.begin)
    words = clause.marks.words
    comma = max((i for i in range(begin, cue.begin) if words[i] == ","), default=-1)
    if act == "doubt" and comma >= 0 and {"and", "or"}.isdisjoint(words[comma : cue.begin]):
        begin = comma + 1 if any(t.begin > comma for t in cue.before) else begin
    return [WordSpan(begin, cue.begin)]


def _last_before(clause: _Clause, cue: _Cue, act: str) -> list[WordSpan]:
    """ "pneumothorax after chest tube removal": the tube alone."""
    return [WordSpan(cue.before[-1].begin, cue.begin)] if cue.before else []


def _neighbours(clause: _Clause, cue: _Cue, act: str) -> list[WordSpan]:
    """ "atelectasis versus pneumonia" """
    return [*_last_before(clause, cue, act), *(WordSpan(cue.end, target.end) for target in cue.after[:1])]


# What a cue acts on, by the second half of its role.
DIRECTIONS: dict[str, Callable[[_Clause, _Cue, str], list[WordSpan]]] = {
    "before": _all_behind,
    "next": _next_behind,
    "after": _all_before,
    "last": _last_before,
    "both": _neighbours,
}


def _within_limits(clause: _Clause) -> None:
    """ "vascular engorgement appears within normal limits" denies the finding it is said of."""
    marks = clause.marks
    for normal in marks.normals:
        if "limit" not in marks.words[normal.begin : normal.end]:
            continue
        verb = max((v for v in marks.verbs if clause.lo <= v < normal.begin), default=-1)
        said_of = [t.begin for t in (*marks.heads, *marks.states) if t.end == verb]
        if said_of:
            clause.denied.append(WordSpan(max(said_of), verb))


def _settle(clause: _Clause) -> Reach:
    doubted = [d for d in clause.doubted if not any(n.begin < d.begin and d.end <= n.end for n in clause.denied)]
    doubted = [d for d in doubted if not any(n.begin == d.begin - 1 and d.end <= n.end for n in clause.denied)]
    denied = clause.denied
    for last in clause.reopened:  # "without a lateral view, effusion cannot be excluded": the doubt has the last word
        parts = (
            part
            for n in denied
            for part in (WordSpan(n.begin, min(n.end, last.begin)), WordSpan(max(n.begin, last.end), n.end))
        )
        denied = [part for part in parts if part.begin < part.end]
    return Reach(tuple(denied), (*doubted, *clause.reopened), tuple(clause.unasserted))


def _forward(clause: _Clause, cue: _Cue, act: str) -> int:
    """Where a cue that acts on what follows stops acting."""
    words, hi = clause.marks.words, clause.hi
    for later in cue.later:
        # "no effusion, possible atelectasis" starts anew; "no opacity suggestive of pneumonia" does not.
        own_item = later.begin > cue.end and words[later.begin - 1] in _OWN_ITEM
        if own_item and later.name in ("doubt_before", "doubt_either", "negate_before"):
            hi = later.begin
            break
    ends_at_with = act == "negate" and words[cue.end - 1] == "of"
    for i in range(cue.end, hi):
        after_comma = i > cue.end and words[i - 1] == ","
        if words[i] == "with" and (ends_at_with or after_comma or (i > cue.end and words[i - 1] == "and")):
            return i
        if words[i] == "and" and after_comma:
            continue
        if words[i] in ("with", *_LISTED) and i + 1 < hi and _item_asserts(clause.marks, i + 1, hi):
            return i
    return hi


def _item_asserts(marks: Marks, begin: int, hi: int) -> bool:
    """Whether the list item at `begin` tells of something seen, in a list without "or": a small or measured finding, or
    an organ called normal ("no effusion, normal heart").
    """
    words = marks.words
    end = next((i for i in range(begin, hi) if words[i] in _LISTED), hi)
    if any(word in ("or", "nor") for word in words[begin:hi]):
        return False
    organs = any(begin <= organ.begin < end for organ in marks.organs)
    if organs and not any(begin <= m.begin < end for m in (*marks.heads, *marks.states, *marks.abnormals)):
        return any(normal.begin == begin for normal in marks.normals)
    own = [m for m in marks.modifiers if begin <= m.begin < end]
    kinds = {m.kind for m in own}
    small = any(m.kind == "severity" and isinstance(m.value, float) and m.value <= _SMALL for m in own)
    known = "known" in words[begin : begin + 1] or any(m.kind == "change" and m.value in _SEEN_CHANGES for m in own)
    stated = words[end - 1] in marks.lexicon.grammar["perceived"] or "severity" in kinds
    return small or known or "size" in kinds or (stated and "side" in kinds)


def _backward(clause: _Clause, hi: int) -> int:
    """Where a cue that acts on what stands before it ("... is not seen") begins to act: at the start of its list."""
    words = clause.marks.words
    if words[hi - 1] == ":":
        return clause.lo  # "nodule, mass: none"
    for i in range(hi - 2, clause.lo - 1, -1):
        if words[i] in ("with", "without") or (words[i] == "," and _stands_alone(clause.marks, clause.lo, i)):
            return i + 1
    return clause.lo


def _stands_alone(marks: Marks, begin: int, end: int) -> bool:
    """Whether the list item before a comma is told of as seen: with a verb, an article, a place, a grade or a
    change."""
    words = marks.words
    begin = max((i + 1 for i in range(begin, end) if words[i] == ","), default=begin)
    if any(words[i] in _ARTICLES or i in marks.verbs for i in range(begin, end)):
        return True
    if any(begin <= organ.begin < end and marks.says_where(begin, organ.begin) for organ in marks.organs):
        return True
    if not any(begin <= m.begin < end for m in (*marks.heads, *marks.states, *marks.organs)):
        return True
    return any(begin <= m.begin < end and m.kind in ("severity", "size", "change") for m in marks.modifiers)
