"""Every side, place, grade and size of a clause goes to one of its findings."""

from __future__ import annotations

from itertools import pairwise

from rewards.report.frame import Frame
from rewards.report.head import Head, give
from rewards.report.stance import Reach
from rewards.report.terms import Modifier


def attach(frame: Frame, heads: list[Head], reach: Reach) -> None:
    """Give every modifier and place to one finding: of its phrase, else the one before, else the one after."""
    own = [h for h in heads if not h.group]
    if not own:
        return
    things = list(frame.modifiers)
    things += [Modifier(o.begin, o.end, "place", o.name) for o in frame.organs if o not in frame.used]
    if not (things or any(head.side or head.places for head in own)):
        return
    spoken_for = {frame.seg(h.begin) for h in heads if h.group}
    phrases: dict[int, list[Head]] = {}
    for head in own:
        phrases.setdefault(frame.seg(head.begin), []).append(head)
    # "large mass, 3 cm": what is said between the words of a term already belongs to the term.
    if len(things) > 1:
        things.sort(key=lambda t: (t.begin, t.end, t.kind, str(t.value)))
    for thing in things:
        number = frame.seg(thing.begin)
        near = phrases.get(number)
        if not near and number in spoken_for and thing.kind in ("side", "place"):
            continue  # "clear right lung and opacified left lung": the right belongs to what is clear
        head, late = _within(frame, thing, near) if near else _across(frame, thing, number, own)
        # "without tension", "on the left, not on the right": what is denied of a finding is no part of it.
        if reach.denied and any(span.holds(thing.begin) and not span.holds(head.begin) for span in reach.denied):
            continue
        give(head, thing, late, frame.lexicon, number)
    for head in own:
        _specialise_by_place(frame, head)
    if len(own) > 1:
        _share_late_side(frame, own)
        _share_cause(frame, own)


def _within(frame: Frame, thing: Modifier, near: list[Head]) -> tuple[Head, bool]:
    """(the finding of its own phrase, whether it is said behind it)"""
    before = [h for h in near if h.begin <= thing.begin]
    after = [h for h in near if h.begin > thing.begin]
    if before and after:
        behind = thing.kind == "size" or frame.marks.says_where(before[-1].end, thing.begin)
        head = before[-1] if behind else after[0]
    else:
        head = before[-1] if before else after[0]
    return head, head.begin < thing.begin and frame.marks.says_where(head.end, thing.begin)


def _across(frame: Frame, thing: Modifier, phrase: int, own: list[Head]) -> tuple[Head, bool]:
    """(the finding of a phrase before or behind its own, whether it is one before)"""
    before = [h for h in own if h.begin < thing.begin]
    after = [h for h in own if h.begin > thing.begin]
    begin = frame.seg_begin(phrase)
    border = frame.words[begin]
    if border == "," and before and thing.kind in ("size", "severity", "change", "qualifier"):
        after = []
    head = _choose(frame, before, after, border, thing.begin, begin)
    return head, head.begin < thing.begin


def _specialise_by_place(frame: Frame, head: Head) -> None:
    for place in head.places:
        finding = frame.pair_for(place, head.finding)
        if finding is not None:
            head.finding = finding
            if finding not in frame.lexicon.many_organs:
                head.places = tuple(p for p in head.places if p != place)
            return


def _share_cause(frame: Frame, own: list[Head]) -> None:
    """ "opacity in the left base, likely pneumonia": what a finding is taken for lies where the finding lies."""
    for a, b in pairwise(own):
        if (b.side or b.places) and (a.side or a.places):
            continue
        linked = any(
            role in ("link", "doubt_before", "doubt_either") and a.end <= begin < b.begin
            for begin, role in frame.cue_starts.items()
        )
        between = frame.words[a.end : b.begin]
        if (linked and "and" not in between) or tuple(between) == ("or",):
            where = b if b.side or b.places else a
            a.side = b.side = where.side
            a.places = b.places = where.places
            a.sites = b.sites = a.sites | b.sites


def _choose(frame: Frame, before: list[Head], after: list[Head], border: str, at: int, segment_begin: int) -> Head:
    if not after:
        return before[-1]
    if not before:
        return after[0]
    if border == "with" or frame.marks.says_where(segment_begin, at):
        return before[-1]
    said_where = frame.marks.says_where(before[-1].end, segment_begin)
    return before[-1] if said_where else after[0]


def _share_late_side(frame: Frame, own: list[Head]) -> None:
    """ "effusion and atelectasis on the left": a side at the end of a list belongs to the whole list."""
    for last in range(len(own) - 1, 0, -1):
        if not (own[last].own_side_late and own[last].side):
            continue
        for i in range(last - 1, -1, -1):
            between = frame.words[own[i].end : own[i + 1].begin]
            joined = any(w in ("and", "or", ",") for w in between) and not any(
                w in ("with", "without", ":") for w in between
            )
            if own[i].side or not joined or len(between) > 5 or not frame.lexicon.finding(own[i].finding).sided:
                break
            own[i].side = own[last].side
