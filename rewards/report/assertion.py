"""Which words of a clause are denied, doubted or not asserted at all: clause borders and the reach of cue words."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.report.terms import Marks

_NOUN_ENDS = ("ing", "ment", "ion", "ence", "ity", "sia")  # of states: "blunting", "enlargement"


def clause_starts(marks: Marks, lines: Sequence[int]) -> list[int]:
    """Word positions at which a new clause begins, 0 first.

    A clause ends at contrast words, at "except", and at a comma or "and" after which a new subject gets its own
    predicate ("no effusion and the heart is enlarged"), but not inside a list under one negation or one verb.
    """
    words, n, grammar = marks.words, len(marks.words), marks.lexicon.grammar
    starts = {0}
    for begin, end, role in marks.cues:
        if role == "break":
            starts.add(end)
        elif role == "except":
            starts.add(begin)
            comma = next((i for i in range(end, n) if words[i] == ","), n)
            starts.add(comma + 1)
    starts.update(i for i in range(1, n) if words[i] == "none" and words[i - 1] == ",")
    starts.update(i for i in range(1, n) if words[i] in grammar["asserting"] and words[i - 1] == "and")
    starts.update(i for i in range(1, n) if words[i] == "positive" and words[i - 1] == ",")
    joins = grammar["separators"] | grammar["prepositions"]
    for i in lines:
        if 0 < i < n and words[i] not in joins:
            ended = any(end == i for _, end, _ in marks.heads) or any(
                end == i for _, end in (*marks.normals, *marks.abnormals)
            )
            if ended:
                starts.add(i)
    starts.update(_new_subjects(marks, starts))
    return sorted(i for i in starts if i < n or i == 0)


def _new_subjects(marks: Marks, starts: set[int]) -> list[int]:
    words, n, grammar = marks.words, len(marks.words), marks.lexicon.grammar
    stops = [i for i in range(n) if words[i] in (",", "and")]
    if not stops:
        return []
    verb_at = [False] * (n + 1)
    for i in marks.verbs:
        verb_at[i] = True
    for begin, _, role in marks.cues:
        if role in ("negate_after", "doubt_after"):
            verb_at[begin] = True
    organ_at = {begin: end for begin, end, _ in marks.organs}
    organ_ends = set(organ_at.values())
    sides_at = {begin: end for begin, end, kind, _ in marks.modifiers if kind == "side"}
    head_at = [False] * (n + 1)
    for begin, _, _ in marks.heads:
        head_at[begin] = True
    said_at = [False] * (n + 1)
    normal_at = [False] * (n + 1)
    for begin, _ in marks.normals:
        said_at[begin] = normal_at[begin] = True
    for begin, end, _ in marks.states:
        said_at[begin] = not words[end - 1].endswith(_NOUN_ENDS)
    denied_at = [False] * (n + 1)
    for begin, _, role in marks.cues:
        if role == "negate_before":
            denied_at[begin] = True
    found: list[int] = []
    clause, verb, denied, said, head_since_verb = 0, -1, False, False, False
    begun = sorted(starts)
    at = 0
    for s in range(n):
        while at < len(begun) and begun[at] <= s:
            if begun[at] == s and s:
                clause, verb, denied, said, head_since_verb = s, -1, False, False, False
            at += 1
        if verb_at[s]:
            verb, head_since_verb, said = s, False, True
        if head_at[s]:
            head_since_verb = said = True
        if said_at[s]:
            said = True
        if denied_at[s]:
            denied = True
        if words[s] not in (",", "and") or (s and words[s - 1] == ","):
            continue
        new = s + 1
        while new < n and words[new] in (",", "and"):
            new += 1
        if new >= n or words[new] in ("or", "nor", "which", "that", "who"):
            continue
        # The next predicate, looked for up to the next comma and no further than a clause is long.
        next_verb, next_said, subject, list_goes_on = -1, False, False, False
        normal_said = False
        for i in range(new, min(n, new + 14)):
            if words[i] in (",", "with", "without", "or") or (i > new and i in starts):
                break
            if verb_at[i]:
                next_verb = i
                break
            if words[i] == "and":
                list_goes_on = True
            if said_at[i]:
                next_said = True
                normal_said = normal_said or normal_at[i]
            if head_at[i] or i in organ_at:
                subject = True
        perceived = next_verb >= 0 and next_verb + 1 < n and words[next_verb + 1] in grammar["perceived"]
        under_denial = denied and verb < 0
        organ = new if new in organ_at else sides_at.get(new, -1)
        split = False
        if (
            words[new] in grammar["subject_starts"]
            and next_verb >= 0
            and not (under_denial and perceived and words[new] != "there")
        ):
            split = True
        elif perceived and verb < 0 and s in organ_ends and not denied:
            split = False  # "enlarged hilar and mediastinal lymph nodes are seen"
        elif organ in organ_at and said and not head_at[organ] and (next_verb >= 0 or next_said):
            split = (next_verb >= 0 and not (under_denial and perceived)) or normal_said or (next_said and not denied)
        elif verb >= 0 and next_verb >= 0 and subject:
            split = not head_since_verb or not list_goes_on
        elif words[new] == "otherwise":
            split = True
        if split and new - clause > 1:
            found.append(new)
            clause, verb, denied, said, head_since_verb = new, -1, False, False, False
    return found


def reaches(
    marks: Marks, lo: int, hi: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """(denied, doubted, unasserted) word ranges of the clause words[lo:hi].

    Doubt inside a denial is part of it: "no evidence of possible pneumonia" denies.
    """
    words, grammar = marks.words, marks.lexicon.grammar
    denied: list[tuple[int, int]] = []
    doubted: list[tuple[int, int]] = []
    reopened: list[tuple[int, int]] = []
    unasserted: list[tuple[int, int]] = []
    cues = [cue for cue in marks.cues if lo <= cue[0] < hi]
    targets = sorted(
        [(b, e) for b, e, _ in marks.heads if lo <= b < hi]
        + [(b, e) for b, e, _ in marks.states if lo <= b < hi]
        + [(b, e) for b, e in (*marks.normals, *marks.abnormals) if lo <= b < hi]
    )
    for index, (begin, end, role) in enumerate(cues):
        before = [t for t in targets if t[1] <= begin]
        after = [t for t in targets if t[0] >= end]
        if role.endswith("_either"):
            passive = (begin > lo and words[begin - 1] in grammar["passive"]) or words[begin] in grammar["passive"]
            following = after and not any(words[i] in grammar["separators"] for i in range(end, after[0][0]))
            forward = words[end - 1] == "of" or (following and not (passive and before)) or not before
            role = role.replace("_either", "_next" if forward else "_after")
            if words[end - 1] == "of":
                role = role.replace("_next", "_before")
        if role == "negate_after" and not before:
            role = "negate_before"
        elif role == "negate_before" and end == hi and before:
            role = "negate_after"  # "pneumothorax: no"
        if role == "negate_before":
            denied.append((end, _forward(marks, cues[index + 1 :], end, hi, "with" if words[end - 1] == "of" else "")))
        elif role == "negate_next":
            denied.append((end, _next_head(words, after, hi)))
        elif role == "negate_after":
            denied.append((_backward(marks, denied, lo, begin), begin))
        elif role == "negate_last" and before:
            denied.append((before[-1][0], begin))  # "pneumothorax after chest tube removal"
        elif role == "doubt_before":
            doubted.append((end, _forward(marks, cues[index + 1 :], end, hi, "")))
        elif role == "doubt_next":
            doubted.append((end, _next_head(words, after, hi)))
        elif role == "doubt_after":
            reopened.append((_backward(marks, [], lo, begin), begin))
        elif role == "doubt_both":
            if before:
                doubted.append((before[-1][0], begin))
            if after:
                doubted.append((end, after[0][1]))
        elif role == "ignore_before":
            unasserted.append((end, hi))
        elif role == "ignore_after":
            unasserted.append((lo, begin))
    for begin, end in marks.normals:
        # "vascular engorgement appears within normal limits" denies the finding it is said of.
        verb = max((v for v in marks.verbs if lo <= v < begin), default=-1)
        if "limit" in words[begin:end] and any(e == verb for _, e, _ in (*marks.heads, *marks.states)):
            denied.append((max(b for b, e, _ in (*marks.heads, *marks.states) if e == verb), verb))
    doubted = [span for span in doubted if not any(a <= span[0] - 1 and span[1] <= b for a, b in denied)]
    for (
        lo_open,
        hi_open,
    ) in reopened:  # "without a lateral view, effusion cannot be excluded": the doubt has the last word
        denied = [part for a, b in denied for part in ((a, min(b, lo_open)), (max(a, hi_open), b)) if part[0] < part[1]]
    return denied, doubted + reopened, unasserted


def _forward(marks: Marks, later: Sequence[tuple[int, int, str]], begin: int, hi: int, stop_word: str) -> int:
    """Where a cue that acts on what follows stops acting."""
    words = marks.words
    for cue_begin, _, role in later:
        own_item = cue_begin > begin and words[cue_begin - 1] in (",", "and", "with", "a", "an", "there")
        if role in ("doubt_before", "doubt_either") and own_item:
            # "no effusion, possible atelectasis" starts anew; "no opacity suggestive of pneumonia" does not.
            hi = min(hi, cue_begin)
            break
        if role == "negate_before" and own_item:
            hi = min(hi, cue_begin)
            break
    first = True
    for i in range(begin, hi):
        word = words[i]
        if word == "with" and (
            stop_word == "with" or (i > begin and words[i - 1] in (",", "and")) or _item_asserts(marks, i + 1, hi)
        ):
            return i
        if word not in (",", "and"):
            continue
        if first and word == "and" and i > begin and words[i - 1] == ",":
            continue
        if _item_asserts(marks, i + 1, hi):
            return i
    return hi


def _item_asserts(marks: Marks, begin: int, hi: int) -> bool:
    """Whether the list item at `begin` tells of something seen: a small or measured finding, in a list without "or"."""
    words, grammar = marks.words, marks.lexicon.grammar
    end = begin
    while end < hi and words[end] not in (",", "and"):
        if words[end] in ("or", "nor"):
            return False
        end += 1
    if any(words[i] in ("or", "nor") for i in range(end, hi)):
        return False
    if not any(begin <= b < end for b, _, _ in marks.heads):
        return False
    graded = sided = measured = False
    new = words[begin] == "known"
    stated = end > begin and words[end - 1] in grammar["perceived"]
    for b, _, kind, value in marks.modifiers:
        if begin <= b < end:
            measured = measured or kind == "size"
            sided = sided or kind == "side"
            new = new or (kind == "change" and value in ("stable", "decreased", "increased"))
            graded = graded or kind == "severity"
            if kind == "severity" and isinstance(value, float) and value <= 2.5:
                measured = True
    return measured or new or ((graded or stated) and sided)


def _next_head(words: Sequence[str], after: Sequence[tuple[int, int]], hi: int) -> int:
    """The end of the next finding and of those joined to it by "or"."""
    if not after:
        return hi
    end = after[0][1]
    for begin, stop in after[1:]:
        between = words[end:begin]
        if "or" in between and "," not in between and "with" not in between:
            end = stop
        else:
            break
    return end


def _backward(marks: Marks, taken: Sequence[tuple[int, int]], lo: int, hi: int) -> int:
    """Where a cue that acts on what stands before it ("... is not seen") begins to act: at the start of its list."""
    words = marks.words
    begin = max([lo, *(end for _, end in taken if end <= hi)])
    if words[hi - 1] == ":":
        return begin  # "nodule, mass: none"
    for i in range(hi - 2, begin - 1, -1):
        if words[i] in ("with", "without"):
            return i + 1
        if words[i] == "," and _stands_alone(marks, begin, i):
            return i + 1
    return begin


def _stands_alone(marks: Marks, begin: int, end: int) -> bool:
    """Whether the list item before a comma is told of as seen: with a verb, an article, a place, a grade, a size or a change."""
    words = marks.words
    begin = max((i + 1 for i in range(begin, end) if words[i] == ","), default=begin)
    if any(words[i] in ("a", "an", "there", "known") or i in marks.verbs for i in range(begin, end)):
        return True
    if any(begin <= b < end and marks.says_where(begin, b) for b, _, _ in marks.organs):
        return True
    if not any(begin <= b < end for b, _, _ in (*marks.heads, *marks.states, *marks.organs)):
        return True
    return any(begin <= m[0] < end and m[2] in ("severity", "size", "change") for m in marks.modifiers)
