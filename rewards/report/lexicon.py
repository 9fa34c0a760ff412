"""Packs are data: JSON files of findings, organs and cue words, compiled into one token trie.

A term is a small template: `a/b` are alternatives, a trailing `?` makes a token optional, so "pleural? effusion" is two
terms. Words of packs and of reports pass the same `stem`, so packs list one number and one spelling only.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from rewards.report.entity import ROOT_GROUP

PACK_FOLDER = Path(__file__).parent / "packs"
DEFAULT_PACKS = ("general", "chest_xray", "skeleton", "head_ct", "abdomen", "chest_ct")
TERMS = ""  # trie key of what ends at a node; no word is empty
PACK_KEYS = frozenset(
    {
        *("name about source licence needs irregular abbreviations sections answers cues sides".split()),
        *("severity", "change", "qualifiers", "normal", "abnormal", "abnormal_states", "states", "open_states"),
        *("open_suffixes", "not_findings", "grammar", "groups", "mains", "anatomy", "findings", "pairs"),
    }
)
PACK_LISTS = frozenset("needs normal abnormal abnormal_states open_states open_suffixes not_findings pairs".split())
PACK_TEXTS = frozenset(("name", "about", "source", "licence"))
NUMBER = (int, float)
FINDING_KEYS: Mapping[str, Any] = {
    "terms": list,
    "group": str,
    "weight": NUMBER,
    "sided": bool,
    "related": dict,
    "home": list,
    "grows": dict,
    "means": list,
    "evidence_of": list,
}
ANATOMY_KEYS: Mapping[str, Any] = {
    "terms": list,
    "group": (str, type(None)),
    "parent": (str, type(None)),
    "side": str,
    "same": str,
    "broad": bool,
    "inside": bool,
    "finding": str,
}
_WORDS = {list: "a list", dict: "a mapping", str: "a text", bool: "true or false", NUMBER: "a number"}
_PAIR = re.compile(r"\S+ \+ \S+ = \S+")

_SPINE = {"c": "c_spine", "t": "t_spine", "l": "l_spine", "s": "spine"}  # of a level such as "t12"
_PLURAL_KEPT = ("ss", "us", "is")
_ISE = re.compile(r"(?<!w)is(e|es|ed|ing|ation)$")  # not otherwise, likewise


@dataclass(frozen=True)
class Finding:
    """`weight`: what missing it costs, 1 for an ordinary one. `related`: how much of it another finding may stand for.

    `home`: groups in whose organs its bare word means this finding; elsewhere ("effusion of the testis") it is another.
    `grows`: the finding it is from so many millimetres on. `means`: the findings its word stands for
    ("hydropneumothorax"). `evidence_of`: findings that it shows, beside which it costs nothing (blunting beside an
    effusion).
    """

    id: str
    group: str = ""
    weight: float = 1.0
    sided: bool = True
    related: Mapping[str, float] = field(default_factory=dict)
    home: Sequence[str] = ()
    grows: Mapping[str, float] = field(default_factory=dict)
    means: Sequence[str] = ()
    evidence_of: Sequence[str] = ()


@dataclass(frozen=True)
class Anatomy:
    """`group`: the organ system for which a "normal" said of it speaks, None where it is only a place.

    `same`: the place that it names by another word. `inside`: a thing found in other organs (a lymph node), which then
    only say where it is. `finding`: the finding that its mere mention is.
    """

    id: str
    group: str | None = None
    parent: str | None = None
    side: str = ""
    same: str = ""
    broad: bool = False  # too wide to say where a finding is: "lung" beside "left base"
    inside: bool = False
    finding: str = ""


@dataclass(frozen=True, eq=False)
class Lexicon:
    """All packs in one. `trie` maps token -> node; node[TERMS] is a tuple of (kind, value)."""

    packs: tuple[str, ...]
    trie: dict[str, Any]
    findings: Mapping[str, Finding]
    anatomy: Mapping[str, Anatomy]
    groups: Mapping[str, str]  # group -> parent, "" is the root "any abnormality"
    chains: Mapping[str, tuple[str, ...]]  # group -> itself and all that hold it, "" last
    mains: Mapping[str, str]  # group -> the finding whose absence nearly says that the group is normal
    pairs: Mapping[tuple[str, str], str]  # (organ, state or finding) -> finding
    many_organs: frozenset[str]  # findings that pairs give to many organs, so that the organ still says where
    related: Mapping[tuple[str, str], float]  # both orders
    stem: Callable[[str], str]
    abbreviations: Mapping[str, str]
    headings: Mapping[str, str]  # phrase of stems -> skip, closing, findings or impression
    things: frozenset[str]  # organs that lie inside others
    organ_words: frozenset[str]  # single words that name an organ
    answers: tuple[tuple[str, tuple[str, ...]], ...]  # (yes | no | unsaid, the words for it)
    none_of: tuple[str, ...]  # what heads a list of denied findings
    grammar: Mapping[str, frozenset[str]]  # small word classes: prepositions, separators, predicates ...
    open_states: frozenset[str]
    open_suffixes: tuple[str, ...]
    not_findings: frozenset[str]
    abnormal_states: frozenset[str]

    def finding(self, id: str) -> Finding:
        """The finding of this id; one met by its suffix or by an organ's state alone weighs a little less."""
        return self.findings.get(id) or _unlisted(id)

    def organ(self, id: str) -> Anatomy:
        """The organ of this id; a vertebral level is one of its own."""
        return self.anatomy.get(id) or Anatomy(id)

    def bare_finding(self, word: str) -> str | None:
        """The finding that this word alone means."""
        return self._bare(word, "finding")

    def bare_organ(self, word: str) -> str | None:
        """The organ that this word alone names."""
        return self._bare(word, "anatomy")

    def _bare(self, word: str, wanted: str) -> str | None:
        ends = self.trie.get(word, {}).get(TERMS, ())
        return next((value for kind, value in ends if kind == wanted), None)

    def group_chain(self, group: str) -> tuple[str, ...]:
        """The group and all that hold it, the root "" last."""
        return self.chains.get(group, (group, ""))

    def place_group(self, place: str) -> str | None:
        """The organ system that a place, or the organ that holds it, belongs to; None for a mere direction."""
        for organ in self.place_chain(place.partition(" ")[0]):
            known = self.anatomy.get(organ)
            if known is not None and known.group:
                return known.group
        return None

    def place_chain(self, place: str) -> Iterator[str]:
        """The place and all that hold it."""
        seen = 0
        while place and seen < 8:
            yield place
            known = self.anatomy.get(place)
            place = (known.parent or "") if known else _SPINE.get(place[:1], "") if place[1:].isdigit() else ""
            seen += 1


@lru_cache(maxsize=512)
def _unlisted(id: str) -> Finding:
    return Finding(id, weight=0.8)


def _regular_stem(word: str) -> str:
    word = word.replace("ae", "e").replace("oe", "e")
    if "our" in word and len(word) > 5:
        word = word.replace("our", "or")
    word = _ISE.sub(r"iz\1", word)
    if len(word) > 3 and word.endswith("s") and not word.endswith(_PLURAL_KEPT):
        if word.endswith("ies") and len(word) > 4:
            return word[:-3] + "y"
        if word.endswith(("sses", "xes", "ches", "shes")):
            return word[:-2]
        return word[:-1]
    return word


def stem(word: str, irregular: Mapping[str, str]) -> str:
    """One form for singular and plural, British and American: the same for packs and for reports."""
    return _regular_stem(irregular.get(word, word))


def expand(template: str) -> Iterator[tuple[str, ...]]:
    """All terms of a template, as tuples of words: "pleural? effusion/fluid" gives four."""
    choices = []
    for token in template.split():
        options = token.rstrip("?").split("/")
        choices.append([*options, ""] if token.endswith("?") else options)
    for words in itertools.product(*choices):
        kept = tuple(word for word in words if word)
        if kept:
            yield kept


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".json") else PACK_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PACK_FOLDER.glob("*.json")))
        raise FileNotFoundError(f"report pack {name!r} not found; give a path ending in .json or one of: {known}")
    try:
        pack = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"report pack {path} is not valid JSON: {error}") from error
    if not isinstance(pack, dict):
        raise ValueError(f"report pack {path}: a pack is a mapping of its parts, not a {type(pack).__name__}")
    missing = [key for key in ("name", "source", "licence") if not pack.get(key)]
    unknown = sorted(set(pack) - PACK_KEYS)
    if missing or unknown:
        raise ValueError(f"report pack {path}: missing {missing or 'nothing'}, unknown keys {unknown or 'none'}")
    if wrong := [*_wrong_parts(pack)] or [*_wrong_entries(pack)]:
        raise ValueError(f"report pack {path}: " + "; ".join(wrong[:10]))
    return pack


def _wrong_parts(pack: Mapping[str, Any]) -> Iterator[str]:
    """Parts of another type than theirs, and what is no term."""
    for part, value in pack.items():
        wanted = str if part in PACK_TEXTS else list if part in PACK_LISTS else dict
        yield from _wrong_type(part, value, wanted)
    for rule in pack.get("pairs", ()):
        if not isinstance(rule, str) or not _PAIR.fullmatch(rule):
            yield f"pairs: {rule!r} is not written 'organ + state = finding'"


def _wrong_entries(pack: Mapping[str, Any]) -> Iterator[str]:
    for part, keys in (("findings", FINDING_KEYS), ("anatomy", ANATOMY_KEYS)):
        for id, entry in pack.get(part, {}).items():
            where = f"{part}.{id}"
            bad = sorted(set(entry) - keys.keys()) if isinstance(entry, dict) else [repr(entry)]
            if bad or not entry.get("terms"):
                yield f"{where} needs terms and knows {sorted(keys)}; found {bad}"
                continue
            for key, value in entry.items():
                yield from _wrong_type(f"{where}.{key}", value, keys[key])
            if isinstance(entry["terms"], list):
                yield from (
                    f"{where}: {t!r} is no term" for t in entry["terms"] if not isinstance(t, str) or not any(expand(t))
                )
            shares = [*entry["related"].values()] if isinstance(entry.get("related"), dict) else []
            shares += [entry["weight"]] if isinstance(entry.get("weight"), NUMBER) else []
            yield from (f"{where}: {n!r} is no weight or share" for n in shares if not isinstance(n, NUMBER) or n < 0)


def _wrong_type(where: str, value: Any, wanted: Any) -> Iterator[str]:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        yield f"{where} is {_WORDS.get(wanted, 'a text')}, not {value!r}"


def _with_needs(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The packs of these names, each once and after the packs it needs."""
    packs: dict[str, dict[str, Any]] = {}

    def add(name: str, asked_by: tuple[str, ...]) -> None:
        if name in asked_by:
            raise ValueError(f"report packs need each other in a circle: {' -> '.join((*asked_by, name))}")
        if name in packs:
            return
        pack = _read(name)
        for needed in pack.get("needs", ()):
            add(needed, (*asked_by, name))
        packs[name] = pack

    for name in names:
        add(name, ())
    return list(packs.values())


class _Builder:
    """Collects packs in order; what a later one says of a finding or an organ stands."""

    def __init__(self, packs: Sequence[Mapping[str, Any]]) -> None:
        self.packs = packs
        self.irregular: Mapping[str, str] = self.table("irregular")
        self.trie: dict[str, Any] = {}
        self.findings: dict[str, Finding] = {}
        self.anatomy: dict[str, Anatomy] = {}
        for pack in packs:
            self.add_vocabulary(pack)
            self.add_entries(pack, "anatomy", self.anatomy, Anatomy)
            self.add_entries(pack, "findings", self.findings, Finding)

    def table(self, key: str) -> dict[str, Any]:
        return {word: value for pack in self.packs for word, value in pack.get(key, {}).items()}

    def listed(self, key: str) -> frozenset[str]:
        return frozenset(word for pack in self.packs for word in pack.get(key, ()))

    def stems(self, words: Iterable[str]) -> frozenset[str]:
        return frozenset(stem(word, self.irregular) for word in words)

    def add(self, template: str, kind: str, value: Any, origin: str) -> None:
        for words in expand(template.lower()):
            node = self.trie
            for word in words:
                node = node.setdefault(stem(word, self.irregular), {})
            held: tuple[tuple[str, Any], ...] = node.get(TERMS, ())
            for old_kind, old_value in held:
                if old_kind == kind and old_value != value and kind in ("finding", "anatomy", "side"):
                    term = " ".join(words)
                    raise ValueError(f"report pack {origin}: term {term!r} means both {old_value!r} and {value!r}")
            if (kind, value) not in held:
                node[TERMS] = (*held, (kind, value))

    def add_vocabulary(self, pack: Mapping[str, Any]) -> None:
        """Cues, sides, grades, changes, states, qualifiers, and what says normal or abnormal."""
        meanings = [
            (*_meaning(kind, value), templates)
            for kind in ("cues", "sides", "severity", "change", "states")
            for value, templates in pack.get(kind, {}).items()
        ]
        for family, values in pack.get("qualifiers", {}).items():
            meanings += [("qualifier", (family, value), templates) for value, templates in values.items()]
        meanings += [(kind, "", pack.get(kind, ())) for kind in ("normal", "abnormal")]
        for kind, value, templates in meanings:
            for template in templates:
                self.add(template, kind, value, pack["name"])

    def add_entries(self, pack: Mapping[str, Any], part: str, known: dict[str, Any], make: Callable[..., Any]) -> None:
        """Findings or organs. An entry of terms alone extends one of an earlier pack."""
        for id, entry in pack.get(part, {}).items():
            if id not in known or entry.keys() != {"terms"}:
                known[id] = make(id, **{key: value for key, value in entry.items() if key != "terms"})
            for template in entry["terms"]:
                self.add(template, part.removesuffix("s"), id, pack["name"])

    def headings(self) -> dict[str, str]:
        phrases = (
            (phrase, role)
            for pack in self.packs
            for role, templates in pack.get("sections", {}).items()
            for template in templates
            for phrase in expand(template)
        )
        return {" ".join(stem(word, self.irregular) for word in phrase): role for phrase, role in phrases}

    def answers(self) -> dict[str, tuple[str, ...]]:
        forms: dict[str, tuple[str, ...]] = {}
        for pack in self.packs:
            for answer, words in pack.get("answers", {}).items():
                forms[answer] = (*forms.get(answer, ()), *words)
        return forms

    def grammar(self) -> dict[str, frozenset[str]]:
        roles = dict.fromkeys(role for pack in self.packs for role in pack.get("grammar", {}))
        return {r: self.stems(w for pack in self.packs for w in pack.get("grammar", {}).get(r, ())) for r in roles}

    def pairs(self) -> dict[tuple[str, str], str]:
        rules = (re.split(r" [+=] ", rule) for pack in self.packs for rule in pack.get("pairs", ()))
        return {(organ, head): finding for organ, head, finding in rules}

    def related(self) -> dict[tuple[str, str], float]:
        shares: dict[tuple[str, str], float] = {}
        for one in self.findings.values():
            for other, share in one.related.items():
                for both in ((one.id, other), (other, one.id)):
                    shares[both] = max(share, shares.get(both, 0.0))
        return shares

    def organ_words(self) -> frozenset[str]:
        return frozenset(
            word for word, node in self.trie.items() if any(kind == "anatomy" for kind, _ in node.get(TERMS, ()))
        )


@lru_cache(maxsize=8)
def load(names: tuple[str, ...] = DEFAULT_PACKS) -> Lexicon:
    """Read and compile packs and those they need, "general" always; later ones extend earlier ones.

    Raises FileNotFoundError for an unknown pack, ValueError for a broken one (naming the pack, the entry and the term).
    """
    build = _Builder(_with_needs(("general", *names)))
    answers = build.answers()
    none_of = answers.pop("none_of", ())
    groups, mains, pairs = build.table("groups"), build.table("mains"), build.pairs()
    _check(build.findings, build.anatomy, groups, mains, pairs, set(build.table("states")), names)
    return Lexicon(
        packs=names,
        trie=build.trie,
        findings=build.findings,
        anatomy=build.anatomy,
        groups=groups,
        chains={"": ("",), **{group: (*_holders(group, groups), "") for group in groups}},
        mains=mains,
        pairs=pairs,
        many_organs=frozenset(f for f, count in Counter(pairs.values()).items() if count >= 4),
        related=build.related(),
        stem=lru_cache(maxsize=32768)(partial(stem, irregular=build.irregular)),
        abbreviations=build.table("abbreviations"),
        headings=build.headings(),
        things=frozenset(organ.id for organ in build.anatomy.values() if organ.inside or organ.finding),
        organ_words=build.organ_words(),
        answers=tuple(answers.items()),
        none_of=tuple(" ".join(words) for template in none_of for words in expand(template)),
        grammar=build.grammar(),
        open_states=build.listed("open_states"),
        open_suffixes=tuple(sorted(build.listed("open_suffixes"))),
        not_findings=build.stems(build.listed("not_findings")),
        abnormal_states=build.stems(build.listed("abnormal_states")),
    )


def _holders(group: str, groups: Mapping[str, str]) -> list[str]:
    """The group and those that hold it, each once."""
    held: list[str] = []
    while group and group not in held:
        held.append(group)
        group = groups.get(group, "")
    return held


def _meaning(kind: str, value: str) -> tuple[str, Any]:
    if kind == "severity":
        return "severity", float(value)
    return {"cues": "cue", "sides": "side", "states": "state"}.get(kind, kind), value


def _check(
    findings: Mapping[str, Finding],
    anatomy: Mapping[str, Anatomy],
    groups: Mapping[str, str],
    mains: Mapping[str, str],
    pairs: Mapping[tuple[str, str], str],
    states: set[str],
    names: tuple[str, ...],
) -> None:
    wrong: list[str] = []
    known_groups = {"", *groups}
    wrong += [f"group {g}: unknown group {holder!r}" for g, holder in groups.items() if holder not in known_groups]
    wrong += [f"group {g}: it holds itself" for g, holder in groups.items() if g in _holders(holder, groups)]
    for finding in findings.values():
        if finding.group not in known_groups:
            wrong.append(f"finding {finding.id}: unknown group {finding.group!r}")
        named = (*finding.related, *finding.grows, *finding.means, *finding.evidence_of)
        wrong += [f"finding {finding.id}: unknown finding {o!r}" for o in named if o not in findings]
        wrong += [f"finding {finding.id}: unknown group {g!r}" for g in finding.home if g not in known_groups]
    for organ in anatomy.values():
        if organ.group is not None and organ.group not in known_groups:
            wrong.append(f"anatomy {organ.id}: unknown group {organ.group!r}")
        if organ.finding and organ.finding not in findings:
            wrong.append(f"anatomy {organ.id}: unknown finding {organ.finding!r}")
    wrong += [f"main {g} = {f}: define both" for g, f in mains.items() if g not in groups or f not in findings]
    for (place, head), result in pairs.items():
        unknown = [
            *([] if place in anatomy or place == ROOT_GROUP else [f"organ {place!r}"]),
            *([] if head in states or head in findings else [f"state or finding {head!r}"]),
            *([] if result in findings else [f"finding {result!r}"]),
        ]
        wrong += [f"pair {place} + {head} = {result}: unknown {one}" for one in unknown]
    if wrong:
        raise ValueError(f"report packs {', '.join(names)}: " + "; ".join(wrong[:10]))
