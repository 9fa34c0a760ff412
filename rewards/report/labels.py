"""Labels of a named scheme for a report: CheXpert-14, CT-RATE-18, NIH-14. Schemes are data: JSON files in
`schemes/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rewards.report.entity import Entity, ReportReading
from rewards.report.extract import extract
from rewards.report.lexicon import DEFAULT_PACKS, Lexicon, load
from rewards.report.match import covers

SCHEME_FOLDER = Path(__file__).parent / "schemes"
SCHEME_KEYS = frozenset(("name", "about", "source", "licence", "labels", "nothing", "not_blocking"))
LABEL_KEYS = frozenset(("findings", "groups", "site", "unless"))
PRESENT, UNCERTAIN, ABSENT = "present", "uncertain", "absent"
_STRONGEST = (PRESENT, UNCERTAIN, ABSENT)


@dataclass(frozen=True)
class Label:
    """What makes a label: any of `findings` or of the findings in `groups`.

    `site`: groups of organs; a finding placed only in other organs does not count. `unless`: qualifiers that rule it
    out.
    """

    name: str
    findings: frozenset[str]
    site: tuple[str, ...] = ()
    unless: Mapping[str, str] | None = None

    def counts(self, entity: Entity, lexicon: Lexicon) -> bool:
        if entity.group or entity.finding not in self.findings:
            return False
        said = dict(entity.qualifiers)
        if any(said.get(family) == value for family, value in (self.unless or {}).items()):
            return False
        return not (self.site and entity.sites) or any(
            s in lexicon.group_chain(group) for group in entity.sites for s in self.site
        )


@dataclass(frozen=True)
class Scheme:
    """`nothing`: the label of a report without any finding; findings of the groups `not_blocking` leave it in place."""

    name: str
    labels: tuple[Label, ...]
    nothing: str = ""
    not_blocking: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*(label.name for label in self.labels), *([self.nothing] if self.nothing else []))


@lru_cache(maxsize=8)
def load_scheme(name: str, packs: tuple[str, ...]) -> Scheme:
    """A scheme that ships with the library, or a JSON file of one's own.

    Raises FileNotFoundError for an unknown one, ValueError for a broken one (naming the file and the label).
    """
    path = Path(name) if name.endswith(".json") else SCHEME_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SCHEME_FOLDER.glob("*.json")))
        raise FileNotFoundError(f"label scheme {name!r} not found; give a path ending in .json or one of: {known}")
    data = json.loads(path.read_text(encoding="utf-8"))
    lexicon = load(packs)
    if set(data) - SCHEME_KEYS or not data.get("labels"):
        raise ValueError(f"label scheme {path}: needs labels and knows the keys {sorted(SCHEME_KEYS)}")
    labels = []
    for label, entry in data["labels"].items():
        unknown = [f for f in entry.get("findings", ()) if f not in lexicon.findings]
        unknown += [g for g in (*entry.get("groups", ()), *entry.get("site", ())) if g not in lexicon.groups]
        if unknown or set(entry) - LABEL_KEYS:
            raise ValueError(
                f"label scheme {path}: {label}: unknown {unknown or sorted(set(entry) - LABEL_KEYS)}; "
                f"it needs findings and groups of the packs {', '.join(packs)}"
            )
        groups = set(entry.get("groups", ()))
        members = {f.id for f in lexicon.findings.values() if groups & set(lexicon.group_chain(f.group))}
        labels.append(
            Label(
                label, frozenset(entry.get("findings", ())) | members, tuple(entry.get("site", ())), entry.get("unless")
            )
        )
    return Scheme(data["name"], tuple(labels), data.get("nothing", ""), tuple(data.get("not_blocking", ())))


class ReportLabels:
    """The labels of a report in a named scheme ("chexpert_14", "ct_rate_18", "nih_14" or a JSON file).

    `read(text)` gives each label that the report speaks of as present, uncertain or absent; one it does not mention is
    left out. A report in which no statement is recognised has no labels at all.
    """

    def __init__(self, scheme: str = "chexpert_14", packs: Sequence[str] = DEFAULT_PACKS) -> None:
        self.lexicon = load(tuple(packs))
        self.scheme = load_scheme(scheme, tuple(packs))

    @property
    def names(self) -> tuple[str, ...]:
        return self.scheme.names

    def read(self, text: str) -> dict[str, str]:
        return self.of(extract(text, self.lexicon))

    def of(self, reading: ReportReading) -> dict[str, str]:
        """The labels of a report that was read before."""
        found: dict[str, str] = {}
        for label in self.scheme.labels:
            stances = {e.assertion for e in reading.entities if label.counts(e, self.lexicon)}
            if not stances and any(self._denies(e, label) for e in reading.entities):
                stances = {ABSENT}
            if stances:
                found[label.name] = min(stances, key=_STRONGEST.index)
        if self.scheme.nothing and reading.entities:
            found[self.scheme.nothing] = ABSENT if any(map(self._blocks, reading.entities)) else PRESENT
        return found

    def _denies(self, entity: Entity, label: Label) -> bool:
        if not entity.group or entity.assertion != ABSENT:
            return False
        return all(covers(entity, finding, self.lexicon) for finding in label.findings)

    def _blocks(self, entity: Entity) -> bool:
        if entity.assertion == ABSENT or entity.group:
            return False
        chain = set(self.lexicon.group_chain(self.lexicon.finding(entity.finding).group))
        return not chain & set(self.scheme.not_blocking)
