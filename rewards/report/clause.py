"""One clause in steps: heads, body site, stance, whole organs, attributes; then the findings it states."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from rewards.report.attributes import attach
from rewards.report.entity import Entity
from rewards.report.frame import Frame
from rewards.report.head import Head, entity_of, parts
from rewards.report.lexicon import Lexicon
from rewards.report.sites import (
    drop_attributes,
    pair_borderline,
    pair_states,
    place_things,
    say_things,
    share_adjective,
    share_noun,
    specialise,
)
from rewards.report.stance import NOTHING, Reach, holds, reaches
from rewards.report.systems import say_abnormal, say_normal
from rewards.report.terms import Marks, Mention

# In this order: each step leaves the frame to the next.
SITE_STEPS: tuple[Callable[[Frame], None], ...] = (
    place_things,
    share_noun,
    pair_states,
    share_adjective,
    pair_borderline,
    specialise,
)


def read_clause(marks: Marks, subject: Mention | None, lexicon: Lexicon, lo: int, hi: int) -> list[Entity]:
    """The findings of words[lo:hi]. `subject`: the organ spoken of before, for a clause that names none."""
    words = marks.words
    frame = Frame(marks, subject, lexicon, lo, hi)
    drop_attributes(frame)
    if frame.organs or frame.states:
        for step in SITE_STEPS:
            step(frame)
    reach = reaches(marks, lo, hi)
    if frame.normals:
        say_normal(frame)
    if frame.abnormals:
        say_abnormal(frame, reach)
    if frame.organs:
        say_things(frame)
    heads = sorted(frame.heads, key=_order) if len(frame.heads) > 1 else frame.heads
    if not heads:
        return []
    attach(frame, heads, reach)
    either_or = _either_or(marks, heads) if "or" in words else []
    entities: list[Entity] = []
    for head in heads:
        if reach is not NOTHING and holds(reach.unasserted, head.begin):
            continue
        assertion = _assertion(head, frame, reach, doubted=head in either_or)
        for part in parts(head):
            entities += _as_said(entity_of(part, assertion, words, lexicon), lexicon)
    return entities


def _order(head: Head) -> tuple[int, int, str]:
    return head.begin, head.end, head.finding


def _assertion(head: Head, frame: Frame, reach: Reach, doubted: bool) -> str:
    denied = bool(reach.denied) and holds(reach.denied, head.begin)
    if head.group:
        # A normal organ is an absent group; "not clear" makes it present.
        return "absent" if (head in frame.normal_heads) != denied else "present"
    if denied:
        return "absent"
    return "uncertain" if doubted or holds(reach.doubted, head.begin) else "present"


def _as_said(entity: Entity, lexicon: Lexicon) -> list[Entity]:
    """The finding by its size, or the findings that its word stands for; denied, the word speaks of the first."""
    known = lexicon.findings.get(entity.finding)
    if known is None:
        return [entity]
    for grown, size in known.grows.items():
        if (entity.size_mm or 0.0) >= size:
            entity = entity._replace(finding=grown)
    meant = known.means[:1] if entity.assertion == "absent" else known.means
    return [entity._replace(finding=part) for part in meant] if meant else [entity]


def _either_or(marks: Marks, heads: list[Head]) -> list[Head]:
    """Findings offered as alternatives: "atelectasis or pneumonia", with nothing but places and adjectives between.

    After "no change in" and before "have not changed" the "or" only lists.
    """
    words, apart = marks.words, marks.lexicon.grammar["apart"]
    unchanged = min(
        (
            m.begin if m.begin - 1 not in marks.verbs else 0
            for m in marks.modifiers
            if m.kind == "change" and words[m.begin] in ("no", "not", "without", "neither")
        ),
        default=-1,
    )
    found = []
    for a, b in pairwise(heads):
        between = words[a.end : b.begin]
        if a.group or b.group or "or" not in between or not apart.isdisjoint(between) or 0 <= unchanged < b.begin:
            continue
        if not any(a.end <= v < b.begin for v in marks.verbs) and not any(w[0].isdigit() for w in between):
            found += [a, b]
    return found
