"""Whole organ systems: what "normal" and "no abnormality" are said of."""

from __future__ import annotations

from rewards.report.entity import ROOT_GROUP
from rewards.report.frame import Frame
from rewards.report.head import Head
from rewards.report.stance import Reach
from rewards.report.terms import Mention


def say_normal(frame: Frame) -> None:
    """ "the heart and mediastinum are normal", "clear lungs": organs called normal are absent groups."""
    groups = [o for o in frame.organs if frame.known(o).group is not None and o not in frame.where]
    borders = [mention.begin for mention in (*frame.states, *frame.normals)] + [head.begin for head in frame.heads]
    for mention in frame.normals:
        begin, end = mention.begin, mention.end
        following = [o for o in groups if o.begin >= end and o not in frame.used]
        leading = [o for o in groups if o.end <= begin and o not in frame.used]
        says_of = any(begin - 4 <= v < begin for v in frame.verbs) and bool(leading)
        attributive = bool(following) and following[0].begin - end <= 4 and not says_of
        if attributive and leading and frame.seg(following[0].begin) != frame.seg(begin):
            attributive = False
        if attributive:
            stop = min([b for b in borders if b > begin] + [v for v in frame.verbs if v > begin] + [frame.hi])
            chosen = [o for o in following if o.begin < stop]
        else:
            since = max([b for b in borders if b < begin], default=frame.lo)
            chosen = [o for o in leading if o.begin >= since] or leading[-1:] or _last_subject(frame, groups, begin)
        for organ in chosen:
            _add_group(frame, begin, end, organ, normal=True)
        if not chosen and not frame.organs and not frame.heads and _is_bare(frame, begin, end):
            _add_root(frame, begin, end, normal=True)


def _last_subject(frame: Frame, groups: list[Mention], begin: int) -> list[Mention]:
    """ "the lungs are hyperexpanded and clear": an organ that already has a state may have a second predicate."""
    last = [o for o in groups if o.end <= begin][-1:]
    return last if last and frame.words[begin - 1] in ("and", "but", ",") else []


def _is_bare(frame: Frame, begin: int, end: int) -> bool:
    """Whether "normal" stands for the whole study: "Normal." or "otherwise unremarkable" or "normal study"."""
    rest = [w for i, w in enumerate(frame.words[frame.lo : frame.hi], frame.lo) if not begin <= i < end]
    light = frame.lexicon.grammar["study"]
    return light.issuperset(rest) and (len(rest) > 0 or frame.hi - frame.lo <= 3)


def say_abnormal(frame: Frame, reach: Reach) -> None:
    """ "no acute cardiopulmonary abnormality": general words for anything wrong, with the organs they speak of."""
    groups = [o for o in frame.organs if frame.known(o).group is not None and o not in frame.where]
    for mention in frame.abnormals:
        begin, end = mention.begin, mention.end
        denial = next((span for span in reach.denied if span.holds(begin)), None)
        if denial is None:
            if frame.words[begin] not in frame.lexicon.abnormal_states or any(
                frame.seg(h.begin) == frame.seg(begin) for h in frame.heads
            ):
                continue
            near = [o for o in groups if frame.seg(o.begin) == frame.seg(begin) and o not in frame.used]
            for organ in near[:1]:
                _add_group(frame, begin, end, organ, normal=False)
            continue
        if (
            end < frame.hi
            and frame.words[end] in frame.lexicon.grammar["leads_on"]
            and any(h.begin >= end for h in frame.heads)
        ):
            continue
        scope = [o for o in groups if denial.holds(o.begin) and o not in frame.used]
        chosen = [o for o in scope if o.end <= begin and not any(o.end <= h.begin < begin for h in frame.heads)]
        chosen = chosen or [o for o in scope if end <= o.begin <= end + 5]
        chosen = chosen or [o for o in groups if o.end <= denial.begin and o not in frame.used]
        for organ in chosen:
            _add_group(frame, begin, end, organ, normal=False)
        if not chosen and not [o for o in frame.organs if frame.seg(o.begin) == frame.seg(begin)]:
            _add_root(frame, begin, end, normal=False)


def _add_group(frame: Frame, begin: int, end: int, organ: Mention, normal: bool) -> None:
    known = frame.known(organ)
    head = Head(begin, end, known.group or ROOT_GROUP, group=True)
    head.side = (known.side,) if known.side else ()
    if known.id != known.group and not known.broad:
        head.places = (known.same or known.id,)
    # A side in the phrase of the organ limits what is called normal; the side of another organ does not.
    for m in frame.modifiers:
        if m.kind == "side" and frame.seg(m.begin) == frame.seg(organ.begin):
            head.side = (*head.side, str(m.value))
        if (
            m.kind == "qualifier"
            and isinstance(m.value, tuple)
            and m.value[0] == "age"
            and frame.seg(m.begin) == frame.seg(begin)
        ):
            head.qualifiers = (m.value,)
    frame.used.add(organ)
    frame.heads.append(head)
    if normal:
        frame.normal_heads.append(head)


def _add_root(frame: Frame, begin: int, end: int, normal: bool) -> None:
    head = Head(begin, end, ROOT_GROUP, group=True)
    frame.heads.append(head)
    if normal:
        frame.normal_heads.append(head)
