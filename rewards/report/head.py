"""A finding while its attributes are collected, and the entity it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from rewards.report.entity import Entity
from rewards.report.lexicon import Lexicon
from rewards.report.terms import Modifier


@dataclass
class Spot:
    """What one phrase of a list says of the finding they share ("moderate right and small left effusions")."""

    phrase: int
    sides: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)


class Head:
    """A finding while its attributes are collected; positions are word indices. Most findings have few attributes, so
    only those given are set."""

    side: tuple[str, ...] = ()
    own_side_late: bool = False  # the side came after a preposition: "... on the left"
    places: tuple[str, ...] = ()
    grades: tuple[float, ...] = ()
    changes: tuple[str, ...] = ()
    sizes: tuple[float, ...] = ()
    qualifiers: tuple[tuple[str, str], ...] = ()
    levels: tuple[str, ...] = ()
    spots: tuple[Spot, ...] = ()
    sites: frozenset[str] = frozenset()

    def __init__(self, begin: int, end: int, finding: str, group: bool = False) -> None:
        self.begin, self.end, self.finding, self.group = begin, end, finding, group

    def but(self, **changes: Any) -> Head:
        """The same with these attributes."""
        other = copy(self)
        vars(other).update(changes)
        return other


def parts(head: Head) -> list[Head]:
    """ "right upper and left lower lobe opacities" are two findings: each side keeps its own place and grade."""
    if len(head.spots) < 2:
        return [head]
    spots: list[Spot] = []
    for spot in sorted(head.spots, key=lambda spot: spot.phrase):
        named = set(spot.sides)
        if len(named) == 1 and named <= {"left", "right"}:
            spots.append(Spot(spot.phrase, spot.sides[:1], list(spot.places), list(spot.grades)))
    if len({spot.sides[0] for spot in spots}) < 2:
        return [head]
    placed, graded = all(spot.places for spot in spots), all(spot.grades for spot in spots)
    if not placed and not graded:
        return [head]
    return [
        head.but(
            side=(spot.sides[0],),
            places=tuple(spot.places) if placed else head.places,
            grades=tuple(spot.grades) if graded else head.grades,
        )
        for spot in spots
    ]


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
    spot = Spot(phrase)
    head.spots = (*head.spots, spot)
    return spot


def entity_of(head: Head, assertion: str, words: Sequence[str], lexicon: Lexicon | None = None) -> Entity:
    side = ""
    if head.side:
        side = head.side[0] if len(set(head.side)) == 1 else "bilateral"
        unsided = lexicon is not None and not head.group and not lexicon.finding(head.finding).sided
        if unsided and assertion != "absent":
            side = ""  # "no emphysema on the left" still denies one side only
    places = head.places
    if places or head.levels:
        places = _numbered(head)
    return Entity(
        head.finding,
        assertion,
        side,
        places,
        (min(head.grades), max(head.grades)) if head.grades else None,
        "|".join(sorted(set(head.changes))),
        max(head.sizes) if head.sizes else None,
        _joined(head.qualifiers) if head.qualifiers else (),
        head.group,
        " ".join(words[max(0, head.begin - 4) : head.end + 4]),
        head.sites,
    )


def _numbered(head: Head) -> tuple[str, ...]:
    """The places of a finding; a level beside a rib is that of the rib."""
    places = set(head.places)
    if head.levels and ("rib" in head.finding or "rib" in places):
        places = (places - {"rib"}) | {f"rib {level}" for level in head.levels}
    return tuple(sorted(places))


def _joined(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Each family once, its values joined."""
    qualifiers: dict[str, str] = {}
    for family, value in sorted(set(pairs)):
        qualifiers[family] = f"{qualifiers[family]}|{value}" if family in qualifiers else value
    return tuple(qualifiers.items())
