"""The body site of findings: organs and states become findings, and an organ names the general ones beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rewards.report.entity import ROOT_GROUP
from rewards.report.frame import Frame
from rewards.report.head import Head
from rewards.report.terms import Mention


def place_things(frame: Frame) -> None:
    """ "enlarged hilar and mediastinal lymph nodes": beside a thing that lies in organs, the organs only say where."""
    for thing in [organ for organ in frame.organs if organ.name in frame.lexicon.things]:
        reach = thing.begin
        for organ in sorted((o for o in frame.organs if o.end <= thing.begin), reverse=True):
            between = frame.words[organ.end : reach]
            if not all(w in frame.listing or frame.is_modifier(organ.end + i) for i, w in enumerate(between)):
                break
            frame.where.add(organ)
            reach = organ.begin
        end = thing.end
        for organ in sorted(o for o in frame.organs if o.begin >= thing.end):
            if any(v in range(end, organ.begin) for v in frame.verbs) or not (
                end > thing.end or frame.marks.says_where(end, organ.begin)
            ):
                break
            frame.where.add(organ)
            end = organ.end


def drop_attributes(frame: Frame) -> None:
    """ "size and density of the liver are normal", "density is decreased": a bare attribute is no finding."""
    grammar = frame.lexicon.grammar
    for head in list(frame.heads):
        if head.end - head.begin > 1 or frame.words[head.begin] not in grammar["attributes"]:
            continue
        later = min((n.begin for n in frame.normals if n.begin >= head.end), default=None)
        normal = later is not None and not any(head.end <= h.begin < later for h in frame.heads)
        near = frame.words[max(frame.lo, head.begin - 5) : min(frame.hi, head.end + 4)]
        if normal or not grammar["lessened"].isdisjoint(near):
            frame.heads.remove(head)


def share_noun(frame: Frame) -> None:
    """ "pleural or pericardial effusion": the adjective before "or" has the noun of the finding after it."""
    for head in list(frame.heads):
        noun = frame.lexicon.bare_finding(frame.words[head.end - 1])
        at = head.begin
        while noun and at - 2 >= frame.lo and frame.words[at - 1] in ("or", "and", ","):
            organ = next((o for o in frame.organs if o.end == at - 1), None)
            finding = frame.pair_for(organ.name, noun) if organ else None
            if organ is None or finding is None or finding == head.finding:
                break
            frame.heads.append(Head(organ.begin, organ.end, finding))
            frame.used.add(organ)
            at = organ.begin


def share_adjective(frame: Frame) -> None:
    """A bare state in a list has the organ that the finding beside it names: "pleural effusion and thickening",
    "tortuous, calcified aorta"."""
    for state in frame.states:
        for head in frame.heads:
            if head.end == state.begin - 1:
                joint, named = head.end, frame.words[head.begin]
            elif state.end == head.begin - 1:
                joint, named = state.end, frame.words[head.end - 1]
            else:
                continue
            organ = frame.lexicon.bare_organ(named)
            finding = frame.pair_for(organ, state.name) if organ else None
            if finding and finding != head.finding and frame.words[joint] in ("and", "or", ","):
                frame.heads.append(Head(state.begin, state.end, finding))
                break


_FAR = 14  # words or their worth in list borders: no organ farther away has the state
_BESIDE = 2.5
_GRADE_STATES = {"large": "enlarged", "huge": "enlarged", "small": "small"}  # said of an organ alone
_OF_IT = frozenset(("of", "the", "wall", "left", "right", "both"))
_SIZED = {"grown": "enlarged", "underfilled": "small"}
_NAMES = 5.0  # an organ this near names a general finding


def pair_states(frame: Frame) -> None:
    """ "the heart is enlarged": a state and the nearest organ that has a finding for it, whichever comes first."""
    for state in frame.states:
        if _is_attribute(frame, state.begin, state.end):
            continue
        options = _owners(frame, state)
        if options:
            _pair_nearest(frame, state, options)
        else:
            _pair_by_name(frame, state)


def _owners(frame: Frame, state: Mention) -> list[tuple[float, Mention, str]]:
    """(distance, organ, finding) of every organ near enough that has a finding for the state."""
    options = []
    for organ in frame.organs:
        if abs(organ.begin - state.begin) <= _FAR and organ not in frame.where:
            finding = frame.pair_for(organ.name, state.name) or frame.pair_for(organ.name, _as_size(frame, state))
            if finding:
                options.append((frame.gap(organ, state.begin, state.end), organ, finding))
    return options


def _as_size(frame: Frame, state: Mention) -> str:
    """ "the size of the liver is increased": the organ is enlarged."""
    before = frame.words[max(frame.lo, state.begin - 6) : state.begin]
    return _SIZED.get(state.name, "") if not frame.lexicon.grammar["sizes"].isdisjoint(before) else ""


def _pair_nearest(frame: Frame, state: Mention, options: list[tuple[float, Mention, str]]) -> None:
    """With the nearest organ, and with those listed before it: "the heart and mediastinum are enlarged"."""
    things = [option for option in options if option[1].name in frame.lexicon.things]
    cost, organ, finding = min(things or options)
    if cost > _FAR:
        return
    frame.add_pair(state.begin, state.end, finding, organ)
    for other_cost, other, other_finding in options:
        subjects = frame.is_list(other.end, organ.begin) and any(verb >= organ.end for verb in frame.verbs)
        if subjects and other_cost < _FAR and other_finding != finding:
            frame.add_pair(state.begin, state.end, other_finding, other)


def _pair_by_name(frame: Frame, state: Mention) -> None:
    """A state that any organ may have makes a finding of its own name: "thickened esophagus"."""
    if state.name not in frame.lexicon.open_states or any(h.begin == state.begin for h in frame.heads):
        return
    phrase = frame.seg(state.begin)
    near = [(frame.gap(o, state.begin, state.end), o) for o in frame.organs if frame.seg(o.begin) == phrase]
    if (
        near
        and (min(near)[0] <= _BESIDE or _is_of(frame, state, min(near)[1]))
        and not any(frame.seg(h.begin) == phrase for h in frame.heads)
    ):
        organ = min(near)[1]
        common = frame.lexicon.pairs.get((ROOT_GROUP, state.name))
        frame.add_pair(state.begin, state.end, common or f"{state.name} {organ.name}", organ, placed=bool(common))


def _is_of(frame: Frame, state: Mention, organ: Mention) -> bool:
    """ "thickened wall of the esophagus" """
    return organ.begin >= state.end and _OF_IT.issuperset(frame.words[state.end : organ.begin])


def _is_attribute(frame: Frame, begin: int, end: int) -> bool:
    """ "increased opacity": a word that is a change as well belongs to the finding right behind it."""
    if not any(m.begin == begin and m.kind == "change" for m in frame.modifiers):
        return False
    behind = [i for i in range(end, min(end + 3, frame.hi)) if any(h.begin == i for h in frame.heads)]
    return bool(behind) and frame.seg(behind[0]) == frame.seg(begin)


def pair_borderline(frame: Frame) -> None:
    """ "heart size is at the upper limit of normal", "the heart is large": a grade that says the state itframe."""
    if frame.heads:
        return
    for grade in frame.modifiers:
        begin, end, kind, value = grade.begin, grade.end, grade.kind, grade.value
        state = "enlarged" if value == 0.5 else _GRADE_STATES.get(frame.words[begin])
        if kind == "severity" and state:
            for organ in frame.organs:
                finding = frame.pair_for(organ.name, state)
                if finding:
                    frame.add_pair(begin, end, finding, organ)
                    if value != 0.5 and any(m.kind == "severity" and m.begin < begin for m in frame.modifiers):
                        frame.modifiers = [m for m in frame.modifiers if m.begin != begin]  # "slightly large"
                    frame.normals = [n for n in frame.normals if n.begin < end and n.begin < begin]
                    return


def specialise(frame: Frame) -> None:
    """ "edema" of the lungs is pulmonary edema: the organ in the same phrase names the general finding."""
    for head in list(frame.heads):
        general, home = head.finding, frame.lexicon.finding(head.finding).home
        if home and not frame.lexicon.organ_words.isdisjoint(frame.words[head.begin : head.end]):
            continue  # "pleural effusion" names its organ itself
        nearest = min(_namers(frame, head), default=None)
        if nearest is not None:
            _, organ, head.finding = nearest
            known = frame.known(organ)
            if known.parent is None and head.finding not in frame.lexicon.many_organs:
                frame.used.add(organ)
            _spread(frame, head, organ, general)
        elif home:
            _away(frame, head, home)


def _namers(frame: Frame, head: Head) -> Iterator[tuple[float, Mention, str]]:
    """(distance, organ, finding) of the organs in the phrase of a general finding that make another one of it."""
    for organ in frame.organs:
        if abs(organ.begin - head.begin) > 12 or frame.seg(organ.begin) != frame.seg(head.begin):
            continue
        finding = frame.pair_for(organ.name, head.finding)
        cost = frame.gap(organ, head.begin, head.end)
        if organ.begin >= head.end and frame.marks.says_where(head.end, organ.begin):
            cost = min(cost, _NAMES)  # "plaques are observed in the walls of the aorta"
        if finding and cost <= _NAMES:
            yield cost, organ, finding


def _spread(frame: Frame, head: Head, organ: Mention, general: str) -> None:
    """ "plaques in the aortic arch, the aorta and the coronary arteries": a list of organs makes one finding in
    each."""
    made = {head.finding}
    last = organ
    for other in (o for o in frame.organs if o.begin >= organ.end):
        if not frame.is_list(last.end, other.begin):
            break
        last = other
        finding = frame.pair_for(other.name, general)
        if finding and finding not in made:
            made.add(finding)
            frame.heads.append(head.but(finding=finding))
            frame.used.add(other)
    for other in reversed([o for o in frame.organs if o.end <= organ.begin]):
        finding = frame.pair_for(other.name, general)
        if not finding or finding in made or not frame.is_list(other.end, organ.begin):
            break
        made.add(finding)
        frame.heads.append(head.but(finding=finding))
        frame.used.add(other)


def _away(frame: Frame, head: Head, home: Sequence[str]) -> None:
    """ "density of the liver" is no lung opacity: a bare word said of an organ elsewhere is a finding of that organ."""
    for organ in frame.organs:
        if organ.end <= head.begin:
            near = all(frame.is_modifier(i) for i in range(organ.end, head.begin))
        else:
            between = frame.words[head.end : organ.begin]
            near = bool(between) and between[0] in ("in", "of", "within") and frame.listing.issuperset(between[1:])
        group = frame.known(organ).group
        if near and group and not any(h in frame.lexicon.group_chain(group) for h in home):
            head.finding = f"{head.finding} {organ.name}"
            frame.used.add(organ)
            return


def say_things(frame: Frame) -> None:
    """ "a lymph node is seen": a thing named without any state is a finding by its mention."""
    for organ in frame.organs:
        finding = frame.known(organ).finding if organ.name in frame.lexicon.things else ""
        if finding and organ not in frame.used and organ not in frame.where:
            frame.heads.append(Head(organ.begin, organ.end, finding))
            frame.used.add(organ)
