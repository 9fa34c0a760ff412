"""A report to its findings: sentence by sentence, then mentions of one finding joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from rewards.report.clause import read_clause
from rewards.report.clauses import clause_starts
from rewards.report.entity import Entity, ReportReading
from rewards.report.head import Head, entity_of, give
from rewards.report.lexicon import Lexicon
from rewards.report.sentences import Sentence, read
from rewards.report.terms import find
from rewards.report.turned import turn

Found = tuple[int, tuple[int, ...], Entity]  # section, the sentences that say it, what they say

_MAX_ALIKE = 16  # differing mentions of one finding that a new one is compared with


def extract(text: str, lexicon: Lexicon) -> ReportReading:
    """Read a whole report. Never raises on any text; the work is bounded by `sentences.MAX_WORDS`."""
    parsed = read(text, lexicon)
    if parsed.too_long:
        return ReportReading((), sum(len(sentence.words) for sentence in parsed.sentences), too_long=True)
    found: list[Found] = []
    seen: dict[tuple[int, tuple[str, ...]], int] = {}
    total = repeated = 0
    for number, sentence in enumerate(parsed.sentences):
        words = sentence.words
        total += len(words)
        if len(set(words)) < len(words):
            repeated += sum(a.isalpha() for a, b in pairwise(words) if a == b)
        key = (sentence.section, words)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            repeated += len(words)
            if seen[key] > 2:
                continue
        _add(sentence, number, found, lexicon)
    entities_only, extra = _merge(found)
    share = min(1.0, repeated / total) if total else 0.0
    sentences = tuple(sentence.words for sentence in parsed.sentences)
    return ReportReading(entities_only, total, share, extra, parsed.too_long, sentences)


def _add(sentence: Sentence, number: int, found: list[Found], lexicon: Lexicon) -> None:
    """What a sentence says after those before it: "It is small." and "none on the right" speak of the finding
    before."""
    words = sentence.words
    if sentence.question and words[0] in lexicon.grammar["asks"]:
        return
    if words[0] in lexicon.grammar["pronouns"] and found:
        section, said, entity = found[-1]
        continued = _continued(words, lexicon, entity)
        if continued is not None:
            found[-1] = (section, (*said, number), continued)
            return
    entities = _read_sentence(words, sentence.lines, lexicon)
    if not entities and found and len(words) <= 9:
        other = _other_side(words, lexicon, found[-1][2])
        entities = (other,) if other is not None else ()
    for entity in entities:
        if sentence.question and entity.assertion == "present":
            entity = entity._replace(assertion="uncertain")
        found.append((sentence.section, (number,), entity))


@lru_cache(maxsize=16384)
def _read_sentence(words: tuple[str, ...], lines: tuple[int, ...], lexicon: Lexicon) -> tuple[Entity, ...]:
    """The findings of one sentence. Cached: reports share most of their sentences, the members of a group above all."""
    marks = find(words, lexicon)
    turn(marks)
    if not (marks.heads or marks.states or marks.normals or marks.abnormals or marks.modifiers or marks.organs):
        return ()
    starts = clause_starts(marks, lines)
    results: list[Entity] = []
    for lo, hi in zip(starts, [*starts[1:], len(words)], strict=True):
        subject = next((organ for organ in reversed(marks.organs) if organ.end <= lo), None) if lo else None
        entities = read_clause(marks, subject, lexicon, lo, hi)
        if not entities and results:
            other = _other_side(words[lo:hi], lexicon, results[-1])
            if other is not None:
                entities = [other]
            elif words[lo - 1] in lexicon.grammar["contrasts"]:
                results[-1] = _continued(words[lo:hi], lexicon, results[-1]) or results[-1]
        results += entities
    return tuple(results)


def _continued(words: Sequence[str], lexicon: Lexicon, last: Entity) -> Entity | None:
    """The finding before with what "It is small." adds, or None when the sentence has a subject of its own."""
    marks = find(words, lexicon)
    if marks.heads or marks.organs or not (marks.modifiers or marks.cues):
        return None
    head = Head(0, 0, last.finding, last.group)
    for mod in marks.modifiers:
        give(head, mod, False)
    more = entity_of(head, last.assertion, marks.words)
    denied = any(cue.name.startswith("negate") for cue in marks.cues)
    doubted = any(cue.name.startswith("doubt") for cue in marks.cues)
    assertion = "absent" if denied else "uncertain" if doubted and last.assertion == "present" else last.assertion
    return last._replace(
        assertion=assertion,
        side=more.side or last.side,
        severity=more.severity or last.severity,
        change=more.change or last.change,
        size_mm=more.size_mm or last.size_mm,
        qualifiers=tuple(sorted({**dict(last.qualifiers), **dict(more.qualifiers)}.items())),
    )


def _other_side(words: Sequence[str], lexicon: Lexicon, last: Entity) -> Entity | None:
    """ "no effusion on the right; moderate on the left": a phrase that only names a side repeats the finding."""
    if "left" not in words and "right" not in words:
        return None
    marks = find(words, lexicon)
    if last.group or marks.heads or marks.organs or marks.states or marks.normals or marks.abnormals:
        return None
    head = Head(0, 0, last.finding)
    for mod in marks.modifiers:
        if mod.value != ("number", "single"):
            give(head, mod, False)
    denied = any(cue.name.startswith("negate") for cue in marks.cues)
    if not (denied or head.grades or head.sizes or "one" in words):
        return None
    return entity_of(head, "absent" if denied else "present", words, lexicon)


def _merge(found: Iterable[Found]) -> tuple[tuple[Entity, ...], tuple[tuple[str, int], ...]]:
    """Join mentions of one finding that do not disagree; count those beyond two in one section."""
    kept: list[Entity] = []
    said: list[tuple[int, ...]] = []
    by_finding: dict[tuple[str, str], list[int]] = {}
    counts: dict[tuple[int, str, str, str], int] = {}
    for section, numbers, entity in found:
        count_key = (section, entity.finding, entity.assertion, entity.side)
        counts[count_key] = counts.get(count_key, 0) + 1
        slots = by_finding.setdefault((entity.finding, entity.assertion), [])
        for slot in slots[-_MAX_ALIKE:]:
            joined = _joined(kept[slot], entity)
            if joined is not None:
                kept[slot] = joined
                said[slot] += numbers
                break
        else:
            slots.append(len(kept))
            kept.append(entity)
            said.append(numbers)
    # A finding both stated and suspected is stated; the suspicion adds nothing.
    final = []
    for entity, sentences in zip(kept, said, strict=True):
        if entity.assertion == "uncertain":
            stated = by_finding.get((entity.finding, "present"), ())[-_MAX_ALIKE:]
            if any(_joined(kept[slot], entity._replace(assertion="present")) for slot in stated):
                continue
        final.append(entity._replace(said=frozenset(sentences)))
    extra: dict[str, int] = {}
    for (_, finding, assertion, _), count in counts.items():
        if count > 2 and assertion != "absent":
            extra[finding] = extra.get(finding, 0) + count - 2
    return tuple(final), tuple(sorted(extra.items()))


def _joined(a: Entity, b: Entity) -> Entity | None:
    """One entity for two mentions, or None when they differ in a way that makes them two findings."""
    if a.side and b.side and a.side != b.side:
        return None
    if a.assertion == "absent":
        # A denial with a limit ("no large effusion") says less than one without; the wider one stands.
        if (a.side, a.places, a.severity, a.qualifiers) == (b.side, b.places, b.severity, b.qualifiers):
            return a
        return None
    if a.places and b.places and not set(a.places) & set(b.places):
        return None
    if (
        a.severity
        and b.severity
        and (abs(a.severity[0] - b.severity[0]) > 0.5 or abs(a.severity[1] - b.severity[1]) > 0.5)
    ):
        return None
    if a.change and b.change and a.change != b.change:
        return None
    if a.size_mm and b.size_mm and abs(a.size_mm - b.size_mm) > 0.2 * max(a.size_mm, b.size_mm):
        return None
    qualifiers = dict(a.qualifiers)
    for family, value in b.qualifiers:
        if qualifiers.setdefault(family, value) != value:
            return None
    joined: dict[str, Any] = {
        "side": a.side or b.side,
        "places": tuple(sorted({*a.places, *b.places})),
        "severity": a.severity or b.severity,
        "change": a.change or b.change,
        "size_mm": a.size_mm or b.size_mm,
        "qualifiers": tuple(sorted(qualifiers.items())),
        "sites": a.sites | b.sites,
    }
    more = {name: value for name, value in joined.items() if value != getattr(a, name)}
    return a._replace(**more) if more else a
