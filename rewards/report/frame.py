"""What the steps of reading a clause share: its mentions, its phrases, and the findings made so far."""

from __future__ import annotations

from itertools import accumulate

from rewards.report.head import Head
from rewards.report.lexicon import Anatomy, Lexicon
from rewards.report.terms import Marks, Mention


class Frame:
    """One clause, words[lo:hi], while its findings are put together."""

    def __init__(self, marks: Marks, subject: Mention | None, lexicon: Lexicon, lo: int, hi: int) -> None:
        self.marks, self.words, self.lexicon, self.lo, self.hi = marks, marks.words, lexicon, lo, hi
        self.separators, self.listing = lexicon.grammar["separators"], lexicon.grammar["listing"]
        own = marks.part(lo, hi)
        self.heads = [Head(*mention) for mention in own.heads]
        self.organs, self.states, self.modifiers = own.organs, own.states, own.modifiers
        self.normals, self.abnormals, self.verbs = own.normals, own.abnormals, own.verbs
        if (
            subject
            and (self.states or self.normals)
            and not (self.organs or self.heads)
            and marks.words[lo] != "otherwise"
        ):
            self.organs = [Mention(lo, lo, subject.name)]
        self.cue_starts = {cue.begin: cue.name for cue in own.cues}
        self.used: set[Mention] = set()  # organs that are part of a finding, so no place of it
        self.where: set[Mention] = set()  # organs that only say where a thing is
        self.normal_heads: list[Head] = []
        self.paired: list[Head] = []
        self.segment: list[int] = []  # of each word the number of its phrase; empty where all are one
        if self.cue_starts or not self.separators.isdisjoint(self.words[lo:hi]):
            borders = [*map(self.separators.__contains__, self.words[lo:hi]), False]
            for begin in self.cue_starts:
                borders[begin - lo] = True
            self.segment = list(accumulate(borders))

    def known(self, organ: Mention) -> Anatomy:
        return self.lexicon.organ(organ.name)

    def is_modifier(self, i: int) -> bool:
        return any(m.begin <= i < m.end for m in self.modifiers)

    def seg(self, i: int) -> int:
        return self.segment[(i if i < self.hi else self.hi) - self.lo if i > self.lo else 0] if self.segment else 0

    def seg_begin(self, number: int) -> int:
        """The first word of a phrase: the border itself but for the first one."""
        return self.lo + (self.segment.index(number) if self.segment else 0)

    def pair_for(self, organ: str, head: str) -> str | None:
        """The finding that this organ, or a place that holds it, makes of a state or of a general finding."""
        for place in self.lexicon.place_chain(self.lexicon.organ(organ).same or organ):
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

    def is_list(self, lo: int, hi: int) -> bool:
        between = self.words[lo:hi]
        return bool(between) and all(w in (",", "and", "the", "or", "left", "right", "both") for w in between)

    def add_pair(self, begin: int, end: int, finding: str, organ: Mention, placed: bool = False) -> None:
        """words[begin:end] is a finding of this organ. `placed`: whatever the organ, it says where."""
        self.heads = [h for h in self.heads if h.begin != begin or h.group or h in self.paired]
        head = Head(begin, end, finding)
        self.heads.append(head)
        self.paired.append(head)
        self.used.add(organ)
        known = self.known(organ)
        head.side = (known.side,) if known.side else ()
        if placed or known.parent is not None or (finding in self.lexicon.many_organs and not known.broad):
            head.places = (known.same or known.id,)
        self.modifiers = [m for m in self.modifiers if m.begin != begin or m.kind == "severity"]
