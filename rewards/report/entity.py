"""One finding as a report states it, and all findings of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ROOT_GROUP = "any"


class Entity(NamedTuple):
    """One finding as a report states it.

    `group`: the finding is a whole organ system ("the lungs are clear" denies the group lung). `severity`: lowest and
    highest grade said, 0.5 borderline to 4 massive. `size_mm`: the largest measure given. `qualifiers`: sorted pairs.
    `said`: the sentences that state it, as places in `ReportReading.sentences`.
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
    sites: frozenset[str] = frozenset()  # organ systems of all places said, wide ones too
    said: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ReportReading:
    """What a report says. `repeated`: share of words that only repeat. `extra`: mentions of a finding beyond two.

    `sentences`: the words of each, as stems.
    """

    entities: tuple[Entity, ...]
    words: int
    repeated: float = 0.0
    extra: tuple[tuple[str, int], ...] = ()
    too_long: bool = False
    sentences: tuple[tuple[str, ...], ...] = ()
