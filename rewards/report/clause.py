"""One clause: organs and states become findings, and every side, place, grade and size goes to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from rewards.report.entity import ROOT_GROUP, Entity
from rewards.report.lexicon import Anatomy, Lexicon
from rewards.report.stance import Reach, reaches
from rewards.report.terms import Marks, Mention, Modifier


@dataclass
class Spot:
    """What one phrase of a list says of the finding they share ("moderate right and small left effusions")."""

    phrase: int
    sides: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Head:
    """A finding while its attributes are collected; positions are word indices."""

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
    levels: tuple[str, ...] = ()
    spots: list[Spot] = field(default_factory=list)
    sites: frozenset[str] = frozenset()


def read_clause(marks: Marks, subject: Mention | None, lexicon: Lexicon, lo: int, hi: int) -> list[Entity]:
    """The findings of words[lo:hi]. `subject`: the organ spoken of before, for a clause that names none."""
    words = marks.words
    inside = _Clause(marks, subject, lexicon, lo, hi)
    inside.place_things()
    inside.drop_attributes()
    inside.share_noun()
    inside.pair_states()
    inside.share_adjective()
    inside.pair_borderline()
    inside.specialise()
    reach = reaches(marks, lo, hi)
    inside.say_normal()
    inside.say_abnormal(reach)
    inside.say_things()
    heads = sorted(inside.heads, key=lambda h: (h.begin, h.end, h.finding))
    if not heads:
        return []
    inside.attach(heads, reach)
    either_or = _either_or(marks, heads)
    entities = []
    for head in heads:
        at = head.begin
        if any(span.holds(at) for span in reach.unasserted):
            continue
        no = any(span.holds(at) for span in reach.denied)
        if head.group:
            # A normal organ is an absent group; "not clear" makes it present.
            assertion = "absent" if (head in inside.normal_heads) != no else "present"
        elif no:
            assertion = "absent"
        elif any(span.holds(at) for span in reach.doubted) or head in either_or:
            assertion = "uncertain"
        else:
            assertion = "present"
        for part in _parts(head):
            entities += _as_said(entity_of(part, assertion, words, lexicon), lexicon)
    return entities


def _as_said(entity: Entity, lexicon: Lexicon) -> list[Entity]:
    """The finding by its size, or the findings that its word stands for; denied, the word speaks of the first."""
    if entity.group:
        return [entity]
    known = lexicon.finding(entity.finding)
    for grown, size in known.grows.items():
        if (entity.size_mm or 0.0) >= size:
            entity = replace(entity, finding=grown)
    parts = known.means or (entity.finding,)
    return [replace(entity, finding=part) for part in (parts[:1] if entity.assertion == "absent" else parts)]


def _parts(head: Head) -> list[Head]:
    """ "right upper and left lower lobe opacities" are two findings: each side keeps its own place and grade."""
    spots: list[Spot] = []
    for spot in sorted(head.spots, key=lambda spot: spot.phrase):
        named = set(spot.sides)
        if len(named) == 1 and named <= {"left", "right"}:
            spots.append(Spot(spot.phrase, spot.sides[:1], list(spot.places), list(spot.grades)))
        elif named or (not spots and spot.places):
            return [head]
        elif spots:
            spots[-1].places += spot.places
    if len({spot.sides[0] for spot in spots}) < 2:
        return [head]
    placed, graded = all(spot.places for spot in spots), all(spot.grades for spot in spots)
    if not placed and not graded:
        return [head]
    return [
        replace(
            head,
            side=(spot.sides[0],),
            places=tuple(spot.places) if placed else head.places,
            grades=tuple(spot.grades) if graded else head.grades,
        )
        for spot in spots
    ]


def _either_or(marks: Marks, heads: list[Head]) -> list[Head]:
    """Findings offered as alternatives: "atelectasis or pneumonia", with nothing but places and adjectives between.

    After "no change in" the "or" only lists.
    """
    words, apart = marks.words, marks.lexicon.grammar["apart"]
    unchanged = min(
        (m.begin for m in marks.modifiers if m.kind == "change" and words[m.begin] in ("no", "not", "without")),
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


class _Clause:
    """One clause while its findings are put together."""

    def __init__(self, marks: Marks, subject: Mention | None, lexicon: Lexicon, lo: int, hi: int) -> None:
        self.marks, self.words, self.lexicon, self.lo, self.hi = marks, marks.words, lexicon, lo, hi
        self.separators = lexicon.grammar["separators"]
        self.heads = [Head(m.begin, m.end, m.name) for m in marks.heads if lo <= m.begin < hi]
        self.organs = [o for o in marks.organs if lo <= o.begin < hi]
        self.states = [s for s in marks.states if lo <= s.begin < hi]
        self.normals = [s for s in marks.normals if lo <= s.begin < hi]
        self.abnormals = [s for s in marks.abnormals if lo <= s.begin < hi]
        self.modifiers = [m for m in marks.modifiers if lo <= m.begin < hi]
        if (
            subject
            and (self.states or self.normals)
            and not (self.organs or self.heads)
            and marks.words[lo] != "otherwise"
        ):
            self.organs = [Mention(lo, lo, subject.name)]
        self.verbs = [v for v in marks.verbs if lo <= v < hi]
        self.cue_starts = {c.begin: c.name for c in marks.cues if lo <= c.begin < hi}
        self.used: set[Mention] = set()  # organs that are part of a finding, so no place of it
        self.where: set[Mention] = set()  # organs that only say where a thing is
        self.listing = lexicon.grammar["listing"]
        self.normal_heads: list[Head] = []
        self.paired: list[Head] = []
        self.segment = [0] * (hi - lo + 1)
        current = 0
        for i in range(lo, hi):
            if self.words[i] in self.separators or i in self.cue_starts:
                current += 1
            self.segment[i - lo] = current
        self.segment[hi - lo] = current

    def known(self, organ: Mention) -> Anatomy:
        return self.lexicon.organ(organ.name)

    def place_things(self) -> None:
        """ "enlarged hilar and mediastinal lymph nodes": beside a thing that lies in organs, the organs only say where."""
        for thing in [organ for organ in self.organs if self.known(organ).inside]:
            reach = thing.begin
            for organ in sorted((o for o in self.organs if o.end <= thing.begin), reverse=True):
                between = self.words[organ.end : reach]
                if not all(w in self.listing or self.is_modifier(organ.end + i) for i, w in enumerate(between)):
                    break
                self.where.add(organ)
                reach = organ.begin
            end = thing.end
            for organ in sorted(o for o in self.organs if o.begin >= thing.end):
                between = self.words[end : organ.begin]
                if any(v in range(end, organ.begin) for v in self.verbs) or not (
                    end > thing.end or self.marks.says_where(end, organ.begin)
                ):
                    break
                if end > thing.end and not all(w in self.listing for w in between):
                    break
                self.where.add(organ)
                end = organ.end

    def is_modifier(self, i: int) -> bool:
        return any(m.begin <= i < m.end for m in self.modifiers)

    def drop_attributes(self) -> None:
        """ "size and density of the liver are normal", "density is decreased": a bare attribute is no finding."""
        grammar = self.lexicon.grammar
        for head in list(self.heads):
            if head.end - head.begin > 1 or self.words[head.begin] not in grammar["attributes"]:
                continue
            later = min((n.begin for n in self.normals if n.begin >= head.end), default=None)
            normal = later is not None and not any(head.end <= h.begin < later for h in self.heads)
            near = self.words[max(self.lo, head.begin - 5) : min(self.hi, head.end + 4)]
            if normal or not grammar["lessened"].isdisjoint(near):
                self.heads.remove(head)

    def share_noun(self) -> None:
        """ "pleural or pericardial effusion": the adjective before "or" has the noun of the finding after it."""
        for head in list(self.heads):
            noun = self.lexicon.bare_finding(self.words[head.end - 1])
            at = head.begin
            while noun and at - 2 >= self.lo and self.words[at - 1] in ("or", "and", ","):
                organ = next((o for o in self.organs if o.end == at - 1), None)
                finding = self.pair_for(organ.name, noun) if organ else None
                if organ is None or finding is None or finding == head.finding:
                    break
                self.heads.append(Head(organ.begin, organ.end, finding))
                self.used.add(organ)
                at = organ.begin

    def share_adjective(self) -> None:
        """ "pleural effusion and thickening": a bare state after "and" has the organ of the finding before it."""
        for mention in self.states:
            begin, end, state = mention.begin, mention.end, mention.name
            if self.words[begin - 1] not in ("and", "or", ","):
                continue
            for head in [h for h in self.heads if h.end == begin - 1]:
                organ = self.lexicon.bare_organ(self.words[head.begin])
                finding = organ and self.pair_for(organ, state)
                if finding and not any(h.begin == begin for h in self.heads):
                    self.heads.append(Head(begin, end, finding))

    def say_things(self) -> None:
        """ "a lymph node is seen": a thing named without any state is a finding by its mention."""
        for organ in self.organs:
            finding = self.known(organ).finding
            if finding and organ not in self.used and organ not in self.where:
                self.heads.append(Head(organ.begin, organ.end, finding))
                self.used.add(organ)

    def seg(self, i: int) -> int:
        return self.segment[min(max(i, self.lo), self.hi) - self.lo]

    def pair_for(self, organ: str, head: str) -> str | None:
        """The finding that this organ, or a place that holds it, makes of a state or of a general finding."""
        known = self.lexicon.anatomy.get(organ)
        for place in self.lexicon.place_chain((known.same if known else "") or organ):
            found = self.lexicon.pairs.get((place, head))
            if found:
                return found
        return None

    def gap(self, organ: Mention, begin: int, end: int) -> float:
        """How far an organ is from a state: words between, more across list borders and verbs the wrong way."""
        if organ.end <= begin:
            between = range(organ.end, begin)
            cost = 0.5
        else:
            between = range(end, organ.begin)
            cost = 6.0 if any(v in between for v in self.verbs) else 0.0
        return cost + len(between) + sum(3.0 for i in between if self.words[i] in self.separators)

    def pair_states(self) -> None:
        """ "the heart is enlarged": a state and the nearest organ that has a finding for it, whichever comes first."""
        for mention in self.states:
            begin, end, state = mention.begin, mention.end, mention.name
            if self.is_attribute(begin, end):
                continue
            options = []
            for organ in self.organs:
                if abs(organ.begin - begin) > 14 or organ in self.where:
                    continue
                finding = self.pair_for(organ.name, state)
                if finding:
                    options.append((self.gap(organ, begin, end), organ, finding))
            if options:
                things = [option for option in options if self.known(option[1]).inside]
                cost, organ, finding = min(things or options)
                if cost > 14:
                    continue
                self.add_pair(begin, end, finding, organ)
                for other_cost, other, other_finding in options:
                    subjects = other is not organ and other.end <= organ.begin and organ.end <= begin
                    if not subjects or other_cost >= 14 or other_finding == finding:
                        continue
                    if self.is_list(other.end, organ.begin) and any(v >= organ.end for v in self.verbs):
                        self.add_pair(begin, end, other_finding, other)
                continue
            same_mention = any(h.begin == begin for h in self.heads)
            if state in self.lexicon.open_states and not same_mention:
                near = [(self.gap(o, begin, end), o) for o in self.organs if self.seg(o.begin) == self.seg(begin)]
                if near and min(near)[0] <= 2.5 and not any(self.seg(h.begin) == self.seg(begin) for h in self.heads):
                    organ = min(near)[1]
                    self.add_pair(begin, end, f"{state} {organ.name}", organ)

    def is_attribute(self, begin: int, end: int) -> bool:
        """ "increased opacity": a word that is a change as well belongs to the finding right behind it."""
        if not any(m.begin == begin and m.kind == "change" for m in self.modifiers):
            return False
        behind = [i for i in range(end, min(end + 3, self.hi)) if any(h.begin == i for h in self.heads)]
        return bool(behind) and self.seg(behind[0]) == self.seg(begin)

    def is_list(self, lo: int, hi: int) -> bool:
        between = self.words[lo:hi]
        return bool(between) and all(w in (",", "and", "the", "or", "left", "right", "both") for w in between)

    def add_pair(self, begin: int, end: int, finding: str, organ: Mention) -> None:
        self.heads = [h for h in self.heads if h.begin != begin or h.group or h in self.paired]
        head = Head(begin, end, finding)
        self.heads.append(head)
        self.paired.append(head)
        self.used.add(organ)
        known = self.known(organ)
        head.side = (known.side,) if known.side else ()
        if known.parent is not None or (finding in self.lexicon.many_organs and not known.broad):
            head.places = (known.same or known.id,)
        self.modifiers = [m for m in self.modifiers if m.begin != begin or m.kind == "severity"]

    def pair_borderline(self) -> None:
        """ "heart size is at the upper limit of normal", "the heart is large": a grade that says the state itself."""
        if self.heads:
            return
        for grade in self.modifiers:
            begin, end, kind, value = grade.begin, grade.end, grade.kind, grade.value
            if kind == "severity" and (value == 0.5 or self.words[begin] in ("large", "huge")):
                for organ in self.organs:
                    finding = self.pair_for(organ.name, "enlarged")
                    if finding:
                        self.add_pair(begin, end, finding, organ)
                        if value != 0.5 and any(m.kind == "severity" and m.begin < begin for m in self.modifiers):
                            self.modifiers = [m for m in self.modifiers if m.begin != begin]  # "slightly large"
                        self.normals = [n for n in self.normals if n.begin < end and n.begin < begin]
                        return

    def specialise(self) -> None:
        """ "edema" of the lungs is pulmonary edema: the organ in the same phrase names the general finding."""
        for head in list(self.heads):
            general, home = head.finding, self.lexicon.finding(head.finding).home
            if home and not self.lexicon.organ_words.isdisjoint(self.words[head.begin : head.end]):
                continue  # "pleural effusion" names its organ itself
            best: tuple[float, str, Mention] | None = None
            for organ in self.organs:
                if abs(organ.begin - head.begin) > 12 or self.seg(organ.begin) != self.seg(head.begin):
                    continue
                finding = self.pair_for(organ.name, head.finding)
                if finding is None:
                    continue
                cost = self.gap(organ, head.begin, head.end)
                if organ.begin >= head.end and self.marks.says_where(head.end, organ.begin):
                    cost = min(cost, 5.0)  # "plaques are observed in the walls of the aorta"
                if cost <= 5 and (best is None or cost < best[0]):
                    best = (cost, finding, organ)
            if best is not None:
                head.finding = best[1]
                known = self.lexicon.anatomy.get(best[2].name)
                if known is not None and known.parent is None and best[1] not in self.lexicon.many_organs:
                    self.used.add(best[2])
                self.spread(head, best[2], general)
            elif home:
                self.away(head, home)

    def spread(self, head: Head, organ: Mention, general: str) -> None:
        """ "plaques in the aorta and the coronary arteries": a list of organs makes one finding in each."""
        for other in self.organs:
            a, b = sorted((organ, other))
            finding = self.pair_for(other.name, general)
            if a is b or finding in (None, head.finding) or not self.is_list(a.end, b.begin):
                continue
            self.heads.append(replace(head, finding=str(finding)))
            self.used.add(other)

    def away(self, head: Head, home: Sequence[str]) -> None:
        """ "density of the liver" is no lung opacity: a bare word said of an organ elsewhere is a finding of that organ."""
        for organ in self.organs:
            if organ.end <= head.begin:
                near = all(self.is_modifier(i) for i in range(organ.end, head.begin))
            else:
                between = self.words[head.end : organ.begin]
                near = bool(between) and between[0] in ("in", "of", "within") and self.listing.issuperset(between[1:])
            group = self.known(organ).group
            if near and group and not any(h in self.lexicon.group_chain(group) for h in home):
                head.finding = f"{head.finding} {organ.name}"
                self.used.add(organ)
                return

    def say_normal(self) -> None:
        """ "the heart and mediastinum are normal", "clear lungs": organs called normal are absent groups."""
        groups = [o for o in self.organs if self.known(o).group is not None and o not in self.where]
        borders = sorted(
            [s.begin for s in self.states] + [n.begin for n in self.normals] + [h.begin for h in self.heads]
        )
        for mention in self.normals:
            begin, end = mention.begin, mention.end
            following = [o for o in groups if o.begin >= end and o not in self.used]
            leading = [o for o in groups if o.end <= begin and o not in self.used]
            says_of = any(begin - 4 <= v < begin for v in self.verbs) and bool(leading)
            attributive = bool(following) and following[0].begin - end <= 4 and not says_of
            if attributive and leading and self.seg(following[0].begin) != self.seg(begin):
                attributive = False
            if attributive and any(h.begin < following[0].begin and h.begin >= end for h in self.heads):
                attributive = False
            if attributive:
                stop = min([b for b in borders if b > begin] + [v for v in self.verbs if v > begin] + [self.hi])
                chosen = [o for o in following if o.begin < stop]
            else:
                since = max([b for b in borders if b < begin], default=self.lo)
                chosen = [o for o in leading if o.begin >= since] or leading[-1:] or self.last_subject(groups, begin)
            for organ in chosen:
                self.add_group(begin, end, organ, normal=True)
            if not chosen and not self.organs and not self.heads and self.is_bare(begin, end):
                self.add_root(begin, end, normal=True)

    def last_subject(self, groups: list[Mention], begin: int) -> list[Mention]:
        """ "the lungs are hyperexpanded and clear": an organ that already has a state may have a second predicate."""
        last = [o for o in groups if o.end <= begin][-1:]
        return last if last and self.words[begin - 1] in ("and", "but", ",") else []

    def is_bare(self, begin: int, end: int) -> bool:
        """Whether "normal" stands for the whole study: "Normal." or "otherwise unremarkable" or "normal study"."""
        rest = [w for i, w in enumerate(self.words[self.lo : self.hi], self.lo) if not begin <= i < end]
        light = self.lexicon.grammar["study"]
        return light.issuperset(rest) and (len(rest) > 0 or self.hi - self.lo <= 3)

    def say_abnormal(self, reach: Reach) -> None:
        """ "no acute cardiopulmonary abnormality": general words for anything wrong, with the organs they speak of."""
        groups = [o for o in self.organs if self.known(o).group is not None and o not in self.where]
        for mention in self.abnormals:
            begin, end = mention.begin, mention.end
            if any(h.begin <= begin < h.end for h in self.heads):
                continue
            denial = next((span for span in reach.denied if span.holds(begin)), None)
            if denial is None:
                if self.words[begin] not in self.lexicon.abnormal_states or any(
                    self.seg(h.begin) == self.seg(begin) for h in self.heads
                ):
                    continue
                near = [o for o in groups if self.seg(o.begin) == self.seg(begin) and o not in self.used]
                for organ in near[:1]:
                    self.add_group(begin, end, organ, normal=False)
                continue
            if (
                end < self.hi
                and self.words[end] in self.lexicon.grammar["leads_on"]
                and any(h.begin >= end for h in self.heads)
            ):
                continue
            scope = [o for o in groups if denial.holds(o.begin) and o not in self.used]
            chosen = [o for o in scope if o.end <= begin and not any(o.end <= h.begin < begin for h in self.heads)]
            chosen = chosen or [o for o in scope if end <= o.begin <= end + 5]
            chosen = chosen or [o for o in groups if o.end <= denial.begin and o not in self.used]
            for organ in chosen:
                self.add_group(begin, end, organ, normal=False)
            if not chosen and not [o for o in self.organs if self.seg(o.begin) == self.seg(begin)]:
                self.add_root(begin, end, normal=False)

    def add_group(self, begin: int, end: int, organ: Mention, normal: bool) -> None:
        known = self.known(organ)
        head = Head(begin, end, known.group or ROOT_GROUP, group=True)
        head.side = (known.side,) if known.side else ()
        if known.id != known.group and not known.broad:
            head.places = (known.same or known.id,)
        # A side in the phrase of the organ limits what is called normal; the side of another organ does not.
        for m in self.modifiers:
            if m.kind == "side" and self.seg(m.begin) == self.seg(organ.begin):
                head.side = (*head.side, str(m.value))
            if (
                m.kind == "qualifier"
                and isinstance(m.value, tuple)
                and m.value[0] == "age"
                and self.seg(m.begin) == self.seg(begin)
            ):
                head.qualifiers = (m.value,)
        self.used.add(organ)
        self.heads.append(head)
        if normal:
            self.normal_heads.append(head)

    def add_root(self, begin: int, end: int, normal: bool) -> None:
        head = Head(begin, end, ROOT_GROUP, group=True)
        self.heads.append(head)
        if normal:
            self.normal_heads.append(head)

    def attach(self, heads: list[Head], reach: Reach) -> None:
        """Give every modifier and place to one finding: of its phrase, else the one before, else the one after."""
        own = [h for h in heads if not h.group]
        if not own:
            return
        by_segment: dict[int, list[Head]] = {}
        for head in own:
            by_segment.setdefault(self.seg(head.begin), []).append(head)
        segment_begin: dict[int, int] = {}
        for i in range(self.lo, self.hi):
            segment_begin.setdefault(self.seg(i), i)
        things = list(self.modifiers)
        things += [Modifier(o.begin, o.end, "place", o.name) for o in self.organs if o not in self.used]
        spoken_for = {self.seg(h.begin) for h in heads if h.group}
        # "large mass, 3 cm": what is said between the words of a term already belongs to the term.
        for thing in sorted(things, key=lambda t: (t.begin, t.end, t.kind, str(t.value))):
            begin = thing.begin
            segment = self.seg(begin)
            mine = by_segment.get(segment)
            if not mine and segment in spoken_for and thing.kind in ("side", "place"):
                continue  # "clear right lung and opacified left lung": the right belongs to what is clear
            if mine:
                before = [h for h in mine if h.begin <= begin]
                after = [h for h in mine if h.begin > begin]
                if not before:
                    head = after[0]
                elif not after:
                    head = before[-1]
                else:
                    where = self.marks.says_where(before[-1].end, begin) or thing.kind == "size"
                    head = before[-1] if where else after[0]
                late = head.begin < begin and self.marks.says_where(head.end, begin)
            else:
                before = [h for h in own if h.begin < begin]
                after = [h for h in own if h.begin > begin]
                border = self.words[segment_begin[segment]]
                if border == "," and before and thing.kind in ("size", "severity", "change", "qualifier"):
                    after = []
                head = self.choose(before, after, border, begin, segment_begin[segment])
                late = head.begin < begin
            # "without tension", "on the left, not on the right": what is denied of a finding is no part of it.
            if any(span.holds(begin) and not span.holds(head.begin) for span in reach.denied):
                continue
            give(head, thing, late, self.lexicon, segment)
        for head in own:
            self.specialise_by_place(head)
        self.share_late_side(own)
        self.share_cause(own)

    def specialise_by_place(self, head: Head) -> None:
        for place in head.places:
            finding = self.pair_for(place, head.finding)
            if finding is not None:
                head.finding = finding
                if finding not in self.lexicon.many_organs:
                    head.places = tuple(p for p in head.places if p != place)
                return

    def share_cause(self, own: list[Head]) -> None:
        """ "opacity in the left base, likely pneumonia": what a finding is taken for lies where the finding lies."""
        for a, b in pairwise(own):
            if (b.side or b.places) and (a.side or a.places):
                continue
            linked = any(
                role in ("link", "doubt_before", "doubt_either") and a.end <= begin < b.begin
                for begin, role in self.cue_starts.items()
            )
            between = self.words[a.end : b.begin]
            if (linked and "and" not in between) or tuple(between) == ("or",):
                where = b if b.side or b.places else a
                a.side = b.side = where.side
                a.places = b.places = where.places
                a.sites = b.sites = a.sites | b.sites

    def choose(self, before: list[Head], after: list[Head], border: str, at: int, segment_begin: int) -> Head:
        if not after:
            return before[-1]
        if not before:
            return after[0]
        if border == "with" or self.marks.says_where(segment_begin, at):
            return before[-1]
        said_where = self.marks.says_where(before[-1].end, segment_begin)
        return before[-1] if said_where else after[0]

    def share_late_side(self, own: list[Head]) -> None:
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


def give(head: Head, thing: Modifier, late: bool, lexicon: Lexicon | None = None, segment: int = -1) -> None:
    """Add a modifier or a place to a finding. `late`: it stands behind the finding, after a preposition."""
    kind, value = thing.kind, thing.value
    if kind == "side":
        head.side = (*head.side, str(value))
        _spot(head, segment).sides.append(str(value))
        head.own_side_late = head.own_side_late or late
    elif kind == "severity" and isinstance(value, float):
        head.grades = (*head.grades, value)
        _spot(head, segment).grades.append(value)
    elif kind == "change":
        head.changes = (*head.changes, str(value))
    elif kind == "size" and isinstance(value, float):
        head.sizes = (*head.sizes, value)
    elif kind == "qualifier" and isinstance(value, tuple):
        head.qualifiers = (*head.qualifiers, value)
    elif kind == "level":
        head.levels = (*head.levels, str(value))
    elif kind == "place" and lexicon is not None:
        organ = lexicon.anatomy.get(str(value))
        group = lexicon.place_group(str(value))
        head.sites |= {group} if group else frozenset()
        if organ is not None and organ.broad:
            return
        spot = _spot(head, segment)
        place = (organ.same or organ.id) if organ is not None else str(value)
        head.places = (*head.places, place)
        spot.places.append(place)
        if organ is not None and organ.side:
            head.side = (*head.side, organ.side)
            spot.sides.append(organ.side)


def _spot(head: Head, phrase: int) -> Spot:
    for spot in head.spots:
        if spot.phrase == phrase:
            return spot
    head.spots.append(Spot(phrase))
    return head.spots[-1]


def entity_of(head: Head, assertion: str, words: Sequence[str], lexicon: Lexicon | None = None) -> Entity:
    sides = set(head.side)
    side = "bilateral" if "bilateral" in sides or len(sides) > 1 else next(iter(sides), "")
    if lexicon is not None and not head.group and not lexicon.finding(head.finding).sided:
        side = ""
    qualifiers: dict[str, str] = {}
    for family, value in sorted(set(head.qualifiers)):
        qualifiers[family] = f"{qualifiers[family]}|{value}" if family in qualifiers else value
    changes = sorted(set(head.changes))
    places = set(head.places)
    if "rib" in head.finding or "rib" in places:
        places = (places - {"rib"}) | {f"rib {level}" for level in head.levels} if head.levels else places
    return Entity(
        finding=head.finding,
        assertion=assertion,
        side=side,
        places=tuple(sorted(places)),
        severity=(min(head.grades), max(head.grades)) if head.grades else None,
        change="|".join(changes),
        size_mm=max(head.sizes) if head.sizes else None,
        qualifiers=tuple(qualifiers.items()),
        group=head.group,
        sites=head.sites,
        text=" ".join(words[max(0, head.begin - 4) : head.end + 4]),
    )
