"""Sentences to findings: term matching, organ + state pairs, and which side, place, grade and size belongs to which finding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from rewards.report.assertion import SEPARATORS, Marks, clause_starts, reaches, starts_with_preposition
from rewards.report.lexicon import TERMS, Lexicon
from rewards.report.sentences import read

ROOT_GROUP = "any"
_MAX_ALIKE = 16  # differing mentions of one finding that a new one is compared with
_LEVEL = re.compile(r"[ctls]\d{1,2}$")
_ORDINAL = re.compile(r"(\d{1,2})(?:st|nd|rd|th)$")
_UNITS = {"mm": 1.0, "cm": 10.0, "millimeter": 1.0, "centimeter": 10.0, "cms": 10.0, "mms": 1.0}
_ORDINAL_WORDS = {
    w: i + 1
    for i, w in enumerate(["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"])
}
_ASKS = frozenset(
    (
        "is",
        "are",
        "does",
        "do",
        "can",
        "could",
        "what",
        "which",
        "where",
        "how",
        "should",
        "was",
        "describe",
        "has",
        "why",
    )
)
_PRONOUNS = frozenset(("it", "this", "these", "they", "which", "that"))
_LIGHT_NOUN_GOES_ON = frozenset(
    (
        "of",
        "to",
        "suggest",
        "suspiciou",
        "suspicious",
        "concerning",
        "consistent",
        "that",
        "compatible",
        "suggestive",
        "suggesting",
        "worrisome",
        "typical",
        "for",
    )
)


@dataclass(frozen=True)
class Entity:
    """One finding as a report states it.

    `group`: the finding is a whole organ system ("the lungs are clear" denies the group lung). `severity`: lowest and
    highest grade said, 0.5 borderline to 4 massive. `size_mm`: the largest measure given. `qualifiers`: sorted pairs.
    """

    finding: str
    assertion: str = "present"  # present | uncertain | absent
    side: str = ""  # left | right | bilateral
    places: tuple[str, ...] = ()
    severity: tuple[float, float] | None = None
    change: str = ""
    size_mm: float | None = None
    qualifiers: tuple[tuple[str, str], ...] = ()
    group: bool = False
    text: str = ""


@dataclass(frozen=True)
class Reading:
    """What a report says. `repeated`: share of its words that only repeat. `extra`: mentions beyond two of one finding."""

    entities: tuple[Entity, ...]
    words: int
    repeated: float = 0.0
    extra: tuple[tuple[str, int], ...] = ()
    too_long: bool = False


@dataclass
class _Head:
    begin: int
    end: int
    finding: str
    group: bool = False
    side: tuple[str, ...] = ()
    own_side_late: bool = False  # the side came after a preposition: "... on the left"
    places: tuple[str, ...] = ()
    grades: tuple[float, ...] = ()
    changes: tuple[str, ...] = ()
    sizes: tuple[float, ...] = ()
    qualifiers: tuple[tuple[str, str], ...] = ()


def extract(text: str, lexicon: Lexicon) -> Reading:
    """Read a whole report. Never raises on any text; the work is bounded by `sentences.MAX_WORDS`."""
    parsed = read(text, lexicon)
    found: list[tuple[int, Entity]] = []
    seen: dict[tuple[int, tuple[str, ...]], int] = {}
    total = repeated = 0
    for sentence in parsed.sentences:
        words = sentence.words
        total += len(words)
        repeated += sum(1 for a, b in zip(words, words[1:], strict=False) if a == b and a.isalpha())
        key = (sentence.section, words)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            repeated += len(words)
            if seen[key] > 2:
                continue
        if sentence.question and words[0] in _ASKS:
            continue
        if words[0] in _PRONOUNS and found:
            continued = _continued(words, lexicon, found[-1][1])
            if continued is not None:
                found[-1] = (found[-1][0], continued)
                continue
        for entity in _read_sentence(words, sentence.lines, lexicon):
            if sentence.question and entity.assertion == "present":
                entity = replace(entity, assertion="uncertain")
            found.append((sentence.section, entity))
    entities_only, extra = _merge(found)
    share = min(1.0, repeated / total) if total else 0.0
    return Reading(entities_only, total, share, extra, parsed.too_long)


def _find(words: Sequence[str], lexicon: Lexicon) -> Marks:
    """All terms, longest first from the left; numbers with units, vertebral levels and open-ended disease words besides."""
    marks = Marks(words)
    root, n, i = lexicon.trie, len(words), 0
    predicates = lexicon.predicates
    while i < n:
        word = words[i]
        node = root.get(word)
        best, meanings = 0, ()
        j = i + 1
        while node is not None:
            ends = node.get(TERMS)
            if ends:
                best, meanings = j, ends
            if j >= n:
                break
            node = node.get(words[j])
            j += 1
        if not best:
            if word in predicates:
                marks.verbs.append(i)
            else:
                _other_word(marks, i, word, lexicon)
            i += 1
            continue
        for kind, value in meanings:
            if kind == "finding":
                marks.heads.append((i, best, value))
                _inner_sides(marks, i, best)
            elif kind == "anatomy":
                marks.organs.append((i, best, value))
                if not value.startswith(("left_", "right_")):
                    _inner_sides(marks, i, best)
            elif kind == "state":
                marks.states.append((i, best, value))
            elif kind == "cue":
                marks.cues.append((i, best, value))
            elif kind == "normal":
                marks.normals.append((i, best))
            elif kind == "abnormal":
                marks.abnormals.append((i, best))
            else:
                marks.modifiers.append((i, best, kind, value))
        i = best
    return marks


def _inner_sides(marks: Marks, begin: int, end: int) -> None:
    """A side inside a longer term ("air in the right pleural space") still is a side."""
    if end - begin > 2:
        for i in range(begin, end):
            if marks.words[i] in ("left", "right"):
                marks.modifiers.append((i, i + 1, "side", marks.words[i]))


def _other_word(marks: Marks, i: int, word: str, lexicon: Lexicon) -> None:
    words = marks.words
    if word[0].isdigit() or word[0] == ".":
        ordinal = _ORDINAL.match(word)
        if ordinal:
            marks.modifiers.append((i, i + 1, "level", ordinal[1]))
            return
        for j in range(i + 1, min(i + 5, len(words))):
            scale = _UNITS.get(words[j])
            if scale is not None:
                marks.modifiers.append((i, i + 1, "size", float(word) * scale))
                return
            if words[j] not in ("x", "by", "to", ",") and not words[j][0].isdigit():
                return
    elif word in _ORDINAL_WORDS:
        marks.modifiers.append((i, i + 1, "level", str(_ORDINAL_WORDS[word])))
    elif _LEVEL.match(word):
        marks.organs.append((i, i + 1, word))
    elif len(word) > 6 and word.endswith(lexicon.open_suffixes) and word not in lexicon.not_findings and word.isascii():
        marks.heads.append((i, i + 1, word))


@lru_cache(maxsize=16384)
def _read_sentence(words: tuple[str, ...], lines: tuple[int, ...], lexicon: Lexicon) -> tuple[Entity, ...]:
    """The findings of one sentence. Cached: reports are made of few sentences, and the members of a group share them."""
    marks = _find(words, lexicon)
    if not (marks.heads or marks.states or marks.normals or marks.abnormals or marks.modifiers):
        return ()
    organs = [organ for organ in marks.organs if not _only_says_where(organ, marks)]
    starts = clause_starts(marks, lines)
    results: list[Entity] = []
    for lo, hi in zip(starts, [*starts[1:], len(words)], strict=True):
        results += _read_clause(marks, organs, lexicon, lo, hi)
    return tuple(results)


def _only_says_where(organ: tuple[int, int, str], marks: Marks) -> bool:
    """ "structures of the thorax": the organ after "of" only places the organ before it."""
    begin, words = organ[0], marks.words
    at = begin - 1
    while at > 0 and words[at] in ("the", "left", "right"):
        at -= 1
    return at > 0 and words[at] == "of" and any(end == at for _, end, _ in marks.organs)


def _continued(words: Sequence[str], lexicon: Lexicon, last: Entity) -> Entity | None:
    """The finding before with what "It is small." adds, or None when the sentence has a subject of its own."""
    marks = _find(words, lexicon)
    if marks.heads or marks.organs or not (marks.modifiers or marks.cues):
        return None
    head = _Head(0, 0, last.finding, last.group)
    for mod in marks.modifiers:
        _give(head, mod, False)
    more = _entity(head, last.assertion, marks.words)
    denied = any(role.startswith("negate") for _, _, role in marks.cues)
    doubted = any(role.startswith("doubt") for _, _, role in marks.cues)
    assertion = "absent" if denied else "uncertain" if doubted and last.assertion == "present" else last.assertion
    return replace(
        last,
        assertion=assertion,
        side=more.side or last.side,
        severity=more.severity or last.severity,
        change=more.change or last.change,
        size_mm=more.size_mm or last.size_mm,
        qualifiers=tuple(sorted({**dict(last.qualifiers), **dict(more.qualifiers)}.items())),
    )


def _read_clause(marks: Marks, organs: list[tuple[int, int, str]], lexicon: Lexicon, lo: int, hi: int) -> list[Entity]:
    words = marks.words
    inside = _Clause(marks, organs, lexicon, lo, hi)
    inside.pair_states()
    inside.pair_borderline()
    inside.specialise()
    denied, doubted, unasserted = reaches(marks, lo, hi)
    inside.say_normal(denied)
    inside.say_abnormal(denied)
    heads = sorted(inside.heads, key=lambda h: (h.begin, h.end, h.finding))
    if not heads:
        return []
    inside.attach(heads)
    either_or = _either_or(words, heads)
    entities = []
    for head in heads:
        at = head.begin
        if any(a <= at < b for a, b in unasserted):
            continue
        no = any(a <= at < b for a, b in denied)
        if head.group:
            # A normal organ is an absent group; "not clear" makes it present.
            assertion = "absent" if (head in inside.normal_heads) != no else "present"
        elif no:
            assertion = "absent"
        elif any(a <= at < b for a, b in doubted) or head in either_or:
            assertion = "uncertain"
        else:
            assertion = "present"
        entities.append(_entity(head, assertion, words, lexicon))
    return entities


def _either_or(words: Sequence[str], heads: list[_Head]) -> list[_Head]:
    """Findings offered as alternatives: "atelectasis or pneumonia"."""
    found = []
    for a, b in zip(heads, heads[1:], strict=False):
        if not (a.group or b.group) and "or" in words[a.end : b.begin] and "," not in words[a.end : b.begin]:
            found += [a, b]
    return found


class _Clause:
    """One clause while its findings are put together."""

    def __init__(self, marks: Marks, organs: list[tuple[int, int, str]], lexicon: Lexicon, lo: int, hi: int) -> None:
        self.words, self.lexicon, self.lo, self.hi = marks.words, lexicon, lo, hi
        self.heads = [_Head(b, e, f) for b, e, f in marks.heads if lo <= b < hi]
        self.organs = [o for o in organs if lo <= o[0] < hi]
        self.states = [s for s in marks.states if lo <= s[0] < hi]
        self.normals = [s for s in marks.normals if lo <= s[0] < hi]
        self.abnormals = [s for s in marks.abnormals if lo <= s[0] < hi]
        self.modifiers = [m for m in marks.modifiers if lo <= m[0] < hi]
        self.verbs = [v for v in marks.verbs if lo <= v < hi]
        self.cue_starts = {c[0]: c[1] for c in marks.cues if lo <= c[0] < hi}
        self.used: set[tuple[int, int, str]] = set()  # organs that are part of a finding, so no place of it
        self.normal_heads: list[_Head] = []
        self.segment = [0] * (hi - lo + 1)
        current = 0
        for i in range(lo, hi):
            if self.words[i] in SEPARATORS or i in self.cue_starts:
                current += 1
            self.segment[i - lo] = current
        self.segment[hi - lo] = current

    def seg(self, i: int) -> int:
        return self.segment[min(max(i, self.lo), self.hi) - self.lo]

    def pair_for(self, organ: str, head: str) -> str | None:
        for place in self.lexicon.place_chain(
            self.lexicon.anatomy[organ].same or organ if organ in self.lexicon.anatomy else organ
        ):
            found = self.lexicon.pairs.get((place, head))
            if found:
                return found
        return None

    def gap(self, organ: tuple[int, int, str], begin: int, end: int) -> float:
        """How far an organ is from a state: words between, more across list borders and verbs the wrong way."""
        if organ[1] <= begin:
            between = range(organ[1], begin)
            cost = 0.5
        else:
            between = range(end, organ[0])
            cost = 6.0 if any(v in between for v in self.verbs) else 0.0
        return cost + len(between) + sum(3.0 for i in between if self.words[i] in SEPARATORS)

    def pair_states(self) -> None:
        near_states = self.states[:60]
        for begin, end, state in near_states:
            options = []
            for organ in self.organs:
                if abs(organ[0] - begin) > 14:
                    continue
                finding = self.pair_for(organ[2], state)
                if finding:
                    options.append((self.gap(organ, begin, end), organ, finding))
            if options:
                cost, organ, finding = min(options)
                if cost > 14:
                    continue
                self.add_pair(begin, end, finding, [organ])
                for other_cost, other, other_finding in options:
                    if (
                        other is not organ
                        and other[1] <= begin
                        and organ[1] <= begin
                        and other_cost < 14
                        and other_finding != finding
                    ):
                        if self.is_list(other[1], organ[0]) and any(v >= organ[1] for v in self.verbs):
                            self.add_pair(begin, end, other_finding, [other])
                continue
            same_mention = any(h.begin == begin for h in self.heads)
            if state in self.lexicon.open_states and not same_mention:
                near = [(self.gap(o, begin, end), o) for o in self.organs if self.seg(o[0]) == self.seg(begin)]
                if near and min(near)[0] <= 2.5 and not any(self.seg(h.begin) == self.seg(begin) for h in self.heads):
                    organ = min(near)[1]
                    self.add_pair(begin, end, f"{state} {organ[2]}", [organ])

    def is_list(self, lo: int, hi: int) -> bool:
        between = self.words[lo:hi]
        return bool(between) and all(w in (",", "and", "the", "or", "left", "right", "both") for w in between)

    def add_pair(self, begin: int, end: int, finding: str, organs: list[tuple[int, int, str]]) -> None:
        self.heads = [h for h in self.heads if h.begin != begin or h.finding == finding]
        self.heads.append(_Head(begin, end, finding))
        self.used.update(organs)
        organ = self.lexicon.anatomy.get(organs[0][2])
        if organ is not None and organ.side:
            self.heads[-1].side = (organ.side,)
        if organ is None or organ.parent is not None:
            self.heads[-1].places = (organ.same or organ.id if organ else organs[0][2],)
        self.modifiers = [m for m in self.modifiers if m[0] != begin or m[2] == "severity"]

    def pair_borderline(self) -> None:
        """ "heart size is at the upper limit of normal": a grade that says the state without naming it."""
        if self.heads:
            return
        for begin, end, kind, value in self.modifiers:
            if kind == "severity" and value == 0.5:
                for organ in self.organs:
                    finding = self.pair_for(organ[2], "enlarged")
                    if finding:
                        self.add_pair(begin, end, finding, [organ])
                        self.normals = [n for n in self.normals if n[0] < end and n[0] < begin]
                        return

    def specialise(self) -> None:
        """ "edema" of the lungs is pulmonary edema: the organ in the same phrase names the general finding."""
        for head in self.heads:
            best: tuple[float, str, tuple[int, int, str]] | None = None
            for organ in self.organs:
                if abs(organ[0] - head.begin) > 8 or self.seg(organ[0]) != self.seg(head.begin):
                    continue
                finding = self.pair_for(organ[2], head.finding)
                if finding is None:
                    continue
                cost = self.gap(organ, head.begin, head.end)
                if cost <= 5 and (best is None or cost < best[0]):
                    best = (cost, finding, organ)
            if best is not None:
                head.finding = best[1]
                known = self.lexicon.anatomy.get(best[2][2])
                if known is not None and known.parent is None:
                    self.used.add(best[2])

    def say_normal(self, denied: list[tuple[int, int]]) -> None:
        groups = [
            o for o in self.organs if o[2] in self.lexicon.anatomy and self.lexicon.anatomy[o[2]].group is not None
        ]
        borders = sorted([s[0] for s in self.states] + [n[0] for n in self.normals] + [h.begin for h in self.heads])
        for begin, end in self.normals[:60]:
            following = [o for o in groups if o[0] >= end and o not in self.used]
            leading = [o for o in groups if o[1] <= begin and o not in self.used]
            says_of = any(begin - 4 <= v < begin for v in self.verbs) and bool(leading)
            attributive = bool(following) and following[0][0] - end <= 4 and not says_of
            if attributive and leading and self.seg(following[0][0]) != self.seg(begin):
                attributive = False
            if attributive and any(h.begin < following[0][0] and h.begin >= end for h in self.heads):
                attributive = False
            if attributive:
                stop = min([b for b in borders if b > begin] + [v for v in self.verbs if v > begin] + [self.hi])
                chosen = [o for o in following if o[0] < stop]
            else:
                since = max([b for b in borders if b < begin], default=self.lo)
                chosen = [o for o in leading if o[0] >= since] or leading[-1:]
            for organ in chosen:
                self.add_group(begin, end, organ, normal=True)
            if not chosen and not self.organs and not self.heads and self.is_bare(begin, end):
                self.add_root(begin, end, normal=True)

    def is_bare(self, begin: int, end: int) -> bool:
        """Whether "normal" stands for the whole study: "Normal." or "otherwise unremarkable" or "normal study"."""
        rest = [w for i, w in enumerate(self.words[self.lo : self.hi], self.lo) if not begin <= i < end]
        light = (
            "otherwise",
            "study",
            "exam",
            "examination",
            "is",
            "the",
            "radiograph",
            "film",
            "x",
            "ray",
            "xray",
            "a",
            "an",
            "scan",
            "ct",
            "mri",
            "completely",
            "entirely",
            "this",
            "image",
            "report",
            "grossly",
            "view",
            "for",
            "age",
        )
        return all(w in light for w in rest) and (len(rest) > 0 or self.hi - self.lo <= 3)

    def say_abnormal(self, denied: list[tuple[int, int]]) -> None:
        """ "no acute cardiopulmonary abnormality": the general words for anything wrong, with the organs they speak of."""
        known = self.lexicon.anatomy
        groups = [o for o in self.organs if o[2] in known and known[o[2]].group is not None]
        for begin, end in self.abnormals[:60]:
            if any(h.begin <= begin < h.end for h in self.heads):
                continue
            reach = next(((a, b) for a, b in denied if a <= begin < b), None)
            if reach is None:
                if self.words[begin] not in self.lexicon.abnormal_states or any(
                    self.seg(h.begin) == self.seg(begin) for h in self.heads
                ):
                    continue
                near = [o for o in groups if self.seg(o[0]) == self.seg(begin) and o not in self.used]
                for organ in near[:1]:
                    self.add_group(begin, end, organ, normal=False)
                continue
            if end < self.hi and self.words[end] in _LIGHT_NOUN_GOES_ON and any(h.begin >= end for h in self.heads):
                continue
            scope = [o for o in groups if reach[0] <= o[0] < reach[1] and o not in self.used]
            chosen = [o for o in scope if o[1] <= begin and not any(o[1] <= h.begin < begin for h in self.heads)]
            chosen = chosen or [o for o in scope if end <= o[0] <= end + 5]
            chosen = chosen or [o for o in groups if o[1] <= reach[0] and o not in self.used]
            for organ in chosen:
                self.add_group(begin, end, organ, normal=False)
            if not chosen and not [o for o in self.organs if self.seg(o[0]) == self.seg(begin)]:
                self.add_root(begin, end, normal=False)

    def add_group(self, begin: int, end: int, organ: tuple[int, int, str], normal: bool) -> None:
        known = self.lexicon.anatomy[organ[2]]
        head = _Head(begin, end, known.group or ROOT_GROUP, group=True)
        head.side = (known.side,) if known.side else ()
        if known.parent is not None:
            head.places = (known.same or known.id,)
        # A side in the phrase of the organ limits what is called normal; the side of another organ does not.
        for m in self.modifiers:
            if m[2] == "side" and self.seg(m[0]) == self.seg(organ[0]):
                head.side = (*head.side, str(m[3]))
            if (
                m[2] == "qualifier"
                and isinstance(m[3], tuple)
                and m[3][0] == "age"
                and self.seg(m[0]) == self.seg(begin)
            ):
                head.qualifiers = (m[3],)
        self.used.add(organ)
        self.heads.append(head)
        if normal:
            self.normal_heads.append(head)

    def add_root(self, begin: int, end: int, normal: bool) -> None:
        head = _Head(begin, end, ROOT_GROUP, group=True)
        self.heads.append(head)
        if normal:
            self.normal_heads.append(head)

    def attach(self, heads: list[_Head]) -> None:
        """Give every modifier and place to one finding: that of its phrase, else the one before, else the one after."""
        own = [h for h in heads if not h.group]
        if not own:
            return
        by_segment: dict[int, list[_Head]] = {}
        for head in own:
            by_segment.setdefault(self.seg(head.begin), []).append(head)
        segment_begin: dict[int, int] = {}
        for i in range(self.lo, self.hi):
            segment_begin.setdefault(self.seg(i), i)
        things: list[tuple[int, int, str, object]] = list(self.modifiers)
        things += [(b, e, "place", o) for b, e, o in self.organs if (b, e, o) not in self.used]
        # "large mass, 3 cm": what is said between the words of a term already belongs to the term.
        for thing in sorted(things, key=lambda t: (t[0], t[1], t[2], str(t[3]))):
            begin = thing[0]
            segment = self.seg(begin)
            mine = by_segment.get(segment)
            if mine:
                before = [h for h in mine if h.begin <= begin]
                after = [h for h in mine if h.begin > begin]
                if not before:
                    head = after[0]
                elif not after:
                    head = before[-1]
                else:
                    where = starts_with_preposition(self.words, before[-1].end, begin) or thing[2] == "size"
                    head = before[-1] if where else after[0]
                late = head.begin < begin and starts_with_preposition(self.words, head.end, begin)
            else:
                before = [h for h in own if h.begin < begin]
                after = [h for h in own if h.begin > begin]
                border = self.words[segment_begin[segment]]
                if border == "," and before and thing[2] in ("size", "severity", "change", "qualifier"):
                    after = []
                head = self.choose(before, after, border, begin, segment_begin[segment])
                late = head.begin < begin
            _give(head, thing, late, self.lexicon)
        self.share_late_side(own)
        self.share_cause(own)

    def share_cause(self, own: list[_Head]) -> None:
        """ "opacity in the left base, likely pneumonia": what a finding is taken for lies where the finding lies."""
        for a, b in zip(own, own[1:], strict=False):
            if b.side or b.places:
                continue
            linked = any(
                role in ("link", "doubt_before", "doubt_either") and a.end <= begin < b.begin
                for begin, role in self.cue_starts.items()
            )
            if linked and "and" not in self.words[a.end : b.begin]:
                b.side, b.places = a.side, a.places

    def choose(self, before: list[_Head], after: list[_Head], border: str, at: int, segment_begin: int) -> _Head:
        if not after:
            return before[-1]
        if not before:
            return after[0]
        if border == "with" or starts_with_preposition(self.words, segment_begin, at):
            return before[-1]
        said_where = starts_with_preposition(self.words, before[-1].end, segment_begin)
        return before[-1] if said_where else after[0]

    def share_late_side(self, own: list[_Head]) -> None:
        """ "effusion and atelectasis on the left": a side at the end of a list belongs to the whole list."""
        for last in range(len(own) - 1, 0, -1):
            if not (own[last].own_side_late and own[last].side):
                continue
            for i in range(last - 1, -1, -1):
                between = self.words[own[i].end : own[i + 1].begin]
                joined = any(w in ("and", "or", ",") for w in between) and not any(
                    w in ("with", "without", ":") for w in between
                )
                if own[i].side or not joined or len(between) > 5 or not self.lexicon.finding(own[i].finding).sided:
                    break
                own[i].side = own[last].side


def _give(head: _Head, thing: tuple[int, int, str, object], late: bool, lexicon: Lexicon | None = None) -> None:
    kind, value = thing[2], thing[3]
    if kind == "side":
        head.side = (*head.side, str(value))
        head.own_side_late = head.own_side_late or late
    elif kind == "severity" and isinstance(value, float):
        head.grades = (*head.grades, value)
    elif kind == "change":
        head.changes = (*head.changes, str(value))
    elif kind == "size" and isinstance(value, float):
        head.sizes = (*head.sizes, value)
    elif kind == "qualifier" and isinstance(value, tuple):
        head.qualifiers = (*head.qualifiers, value)
    elif kind == "level":
        if "rib" in head.finding or "rib" in head.places:
            head.places = (*head.places, f"rib {value}")
    elif kind == "place" and lexicon is not None:
        organ = lexicon.anatomy.get(str(value))
        if organ is None:
            head.places = (*head.places, str(value))
        else:
            head.places = (*head.places, organ.same or organ.id)
            if organ.side:
                head.side = (*head.side, organ.side)


def _entity(head: _Head, assertion: str, words: Sequence[str], lexicon: Lexicon | None = None) -> Entity:
    sides = set(head.side)
    side = "bilateral" if "bilateral" in sides or len(sides) > 1 else next(iter(sides), "")
    if lexicon is not None and not head.group and not lexicon.finding(head.finding).sided:
        side = ""
    qualifiers: dict[str, str] = {}
    for family, value in sorted(set(head.qualifiers)):
        qualifiers[family] = f"{qualifiers[family]}|{value}" if family in qualifiers else value
    changes = sorted(set(head.changes))
    return Entity(
        finding=head.finding,
        assertion=assertion,
        side=side,
        places=tuple(sorted(set(head.places))),
        severity=(min(head.grades), max(head.grades)) if head.grades else None,
        change="|".join(changes),
        size_mm=max(head.sizes) if head.sizes else None,
        qualifiers=tuple(qualifiers.items()),
        group=head.group,
        text=" ".join(words[max(0, head.begin - 4) : head.end + 4]),
    )


def _merge(found: Iterable[tuple[int, Entity]]) -> tuple[tuple[Entity, ...], tuple[tuple[str, int], ...]]:
    """Join mentions of one finding that do not disagree; count those beyond two in one section."""
    kept: list[Entity] = []
    by_finding: dict[tuple[str, str], list[int]] = {}
    counts: dict[tuple[int, str, str, str], int] = {}
    for section, entity in found:
        count_key = (section, entity.finding, entity.assertion, entity.side)
        counts[count_key] = counts.get(count_key, 0) + 1
        slots = by_finding.setdefault((entity.finding, entity.assertion), [])
        for slot in slots[-_MAX_ALIKE:]:
            joined = _joined(kept[slot], entity)
            if joined is not None:
                kept[slot] = joined
                break
        else:
            slots.append(len(kept))
            kept.append(entity)
    # A finding both stated and suspected is stated; the suspicion adds nothing.
    final = []
    for entity in kept:
        if entity.assertion == "uncertain":
            stated = by_finding.get((entity.finding, "present"), ())[-_MAX_ALIKE:]
            if any(_joined(kept[slot], replace(entity, assertion="present")) for slot in stated):
                continue
        final.append(entity)
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
    return replace(
        a,
        side=a.side or b.side,
        places=tuple(sorted({*a.places, *b.places})),
        severity=a.severity or b.severity,
        change=a.change or b.change,
        size_mm=a.size_mm or b.size_mm,
        qualifiers=tuple(sorted(qualifiers.items())),
    )
