"""Cues that do not deny what follows: the way of the study, a change that is denied, an earlier study."""

from __future__ import annotations

from collections.abc import Callable

from rewards.report.terms import Marks, Mention, Modifier

_NEAR = 6  # words between a cue and what makes it mean something else
_CHANGES = ("increased", "decreased")


def turn(marks: Marks) -> None:
    """Take such cues out of a sentence's marks; some are the change of a finding instead."""
    denials = [cue for cue in marks.cues if cue.name.startswith("negate")]
    for cue, change in [(cue, change) for cue in denials if (change := _turned(marks, cue))]:
        marks.cues.remove(cue)
        marks.modifiers = [m for m in marks.modifiers if not change.begin <= m.begin < change.end]
        marks.modifiers += [change] if change.value else []


def _turned(marks: Marks, cue: Mention) -> Modifier | None:
    for rule in RULES:
        change = rule(marks, cue)
        if change is not None:
            return change
    return None


def _way_of_the_study(marks: Marks, cue: Mention) -> Modifier | None:
    """ "without oral or intravenous contrast": how it was done, not what was found."""
    if marks.lexicon.grammar["technique"].isdisjoint(marks.words[cue.end : cue.end + _NEAR]):
        return None
    named = (*marks.heads, *marks.states, *marks.abnormals)
    for i in range(cue.end, min(cue.end + _NEAR, len(marks.words))):
        if marks.words[i] in marks.lexicon.grammar["technique"]:
            return Modifier(cue.begin, i, "change", "")
        if marks.words[i] == "," or any(mention.begin == i for mention in named):
            return None
    return None


def _unchanged(marks: Marks, cue: Mention) -> Modifier | None:
    """ "neither the emphysema nor the nodule has changed": the change is denied, the findings are there."""
    words, apart = marks.words, marks.lexicon.grammar["apart"]
    for verb in marks.verbs:
        if verb > cue.end and words[verb] in ("has", "have", "had") and apart.isdisjoint(words[cue.end : verb]):
            changed = any(m.begin == verb + 1 and m.kind == "change" and m.value in _CHANGES for m in marks.modifiers)
            if changed or words[verb + 1 : verb + 2] == ("changed",):
                return Modifier(verb, verb + 2, "change", "stable")
    return None


def _not_there_before(marks: Marks, cue: Mention) -> Modifier | None:
    """ "not seen on the prior study": it is new."""
    words, earlier = marks.words, marks.lexicon.grammar["earlier"]
    if cue.name != "negate_after":
        return None
    at = cue.end
    while at < len(words) and words[at] in ("on", "in", "at", "the", "a", "any", "study", "exam", "scan"):
        at += 1
    if at == len(words) or words[at] not in earlier:
        return None
    return Modifier(cue.begin, at + 1, "change", "new")


RULES: tuple[Callable[[Marks, Mention], Modifier | None], ...] = (_way_of_the_study, _unchanged, _not_there_before)
