"""Two readings compared: one-to-one matching of findings, and what each match, miss and false statement is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.report.entity import ROOT_GROUP, Entity
from rewards.report.lexicon import Lexicon

NEGATIVE_WEIGHT = 0.25  # a pertinent negative beside an ordinary finding
NEGATIVE_CAP = 0.3  # all negatives together, beside the positives of an abnormal reference
FALSE_DENIED = 1.5  # a finding the reference rules out costs more than one it does not mention
OPPOSITE = 0.5  # subtracted for the opposite assertion
WRONG_SIDE = 0.75  # of the credit stays: radiologists mark a wrong side as one error of a finding that is there
OTHER_SYSTEM = 0.3
RISK = 1.3  # a device said to lie wrong is a finding to act on, whatever the device
LOWEST = 0.05  # of the scale is kept for the order among reports that earn nothing otherwise
ALIKE = 0.9  # related findings this close deny each other ("no bleed", "no intracranial hemorrhage")
MINOR_CAP = 0.6  # the same where all positives are light ones
NONE_FOUND = 0.4  # of the pay stays when a reference has only light positives and none of them was named
MAJOR = 0.5  # lighter findings (old fracture, degenerative change) do not make a reference abnormal


@dataclass(frozen=True)
class Outcome:
    """`rows`: one a finding, for people; `points` in finding weights, `share` of the value and below 0 what it cost,
    `sentences` of the completion that say so, as places in `Reading.sentences`."""

    value: float
    components: Mapping[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Side:
    """The positives of one report with what they have earned so far."""

    entities: list[Entity]
    weights: list[float]
    credit: list[float]
    partner: list[int]


@dataclass
class _Tally:
    """Sums of finding weights: earned of each report's positives, what each answers for, and what contradictions
    lose."""

    earned_gold: float
    earned_said: float
    asked: float
    stated: float
    lost: float = 0.0
    opposite: int = 0

    def lose(self, penalty: float) -> None:
        if penalty > 0.0:
            self.lost += penalty
            self.opposite += 1


def weight(entity: Entity, lexicon: Lexicon) -> float:
    """What a positive finding counts: less when old, tiny or only suspected."""
    value = 0.7 if entity.group else lexicon.finding(entity.finding).weight
    if dict(entity.qualifiers).get("age") == "chronic":
        value *= 0.5
    if entity.severity and entity.severity[1] <= 1.0:
        value *= 0.25 if _borderline(entity) else 0.85  # borderline is nearly normal
    if ("position", "bad") in entity.qualifiers:
        value = max(value, RISK)
    return value * (0.8 if entity.assertion == "uncertain" else 1.0)


def _borderline(entity: Entity) -> bool:
    return entity.severity is not None and entity.severity[1] <= 0.5


def _sides(side: str) -> frozenset[str]:
    return frozenset(("left", "right")) if side == "bilateral" else frozenset((side,)) if side else frozenset()


def opposite_sides(a: Entity, b: Entity) -> bool:
    return bool(a.side and b.side and not _sides(a.side) & _sides(b.side))


def _place_factor(a: Sequence[str], b: Sequence[str], lexicon: Lexicon) -> float:
    if not a and not b:
        return 1.0
    if not a or not b:
        return 0.88
    return (_places_found(a, b, lexicon) + _places_found(b, a, lexicon)) / 2


_KIN, _ELSEWHERE = 0.93, 0.3  # what a place is worth that holds the right one or is the next level, and any other place


def _levels_apart(a: str, b: str) -> float:
    """How many ribs or vertebrae two places are apart ("rib 6" and "rib 8": 2); infinite for other places."""
    (region, level), (other, other_level) = _level(a), _level(b)
    if region != other:
        return math.inf
    return abs(int(level) - int(other_level)) if level and other_level else 1


def _level(place: str) -> tuple[str, str]:
    region = place.rstrip("0123456789")
    return region.rstrip(), place[len(region) :]


def _places_found(wanted: Sequence[str], given: Sequence[str], lexicon: Lexicon) -> float:
    total = 0.0
    for place in wanted:
        if place in given:
            total += 1.0
            continue
        chain = set(lexicon.place_chain(place))
        kin = any(other in chain or place in set(lexicon.place_chain(other)) for other in given)
        total += _KIN if kin else max(_ELSEWHERE, *(_KIN - 0.1 * (_levels_apart(place, other) - 1) for other in given))
    return total / len(wanted)


def _share(a: object, b: object, missing: float, equal: bool, wrong: float) -> float:
    if not a and not b:
        return 1.0
    if not a or not b:
        return missing
    return 1.0 if equal else wrong


def agreement(a: Entity, b: Entity, lexicon: Lexicon) -> float:
    """How far two positive findings say the same, in [0, 1]; 0 for different findings."""
    value = _same_finding(a, b, lexicon)
    if not value:
        return 0.0
    if a.assertion != b.assertion:
        value *= 0.5
    value *= (
        _side_factor(a, b)
        * _system_factor(a, b, lexicon)
        * _place_factor(a.places, b.places, lexicon)
        * _grade_factor(a.severity, b.severity)
    )
    value *= _share(a.change, b.change, 0.93, a.change == b.change, 0.5) * _size_factor(a.size_mm, b.size_mm)
    ours, theirs = dict(a.qualifiers), dict(b.qualifiers)
    for family in {**ours, **theirs}:
        wrong = 0.85 if family in _MILD_QUALIFIERS else 0.5
        value *= _share(ours.get(family), theirs.get(family), 0.97, ours.get(family) == theirs.get(family), wrong)
    return value


_MILD_QUALIFIERS = ("extent", "number", "margin", "loculated")


def _same_finding(a: Entity, b: Entity, lexicon: Lexicon) -> float:
    """1 for one finding, less for a related one or for a finding of the organ system that the other speaks of."""
    if a.finding == b.finding:
        return 1.0
    if a.group or b.group:
        part, whole = (a, b) if b.group else (b, a)
        return 0.35 if not part.group and covers(whole, part.finding, lexicon) else 0.0
    return lexicon.related.get((a.finding, b.finding), 0.0)


def _side_factor(a: Entity, b: Entity) -> float:
    if a.side == b.side:
        return 1.0
    if opposite_sides(a, b):
        return WRONG_SIDE
    return 0.88 if not a.side or not b.side else 0.8


def _system_factor(a: Entity, b: Entity, lexicon: Lexicon) -> float:
    """Less for findings in organs that nothing but the body holds: a hemangioma of the liver and one of a vertebra."""
    tops = [{[*lexicon.group_chain(site)][-2] for site in entity.sites} for entity in (a, b)]
    return OTHER_SYSTEM if all(tops) and tops[0].isdisjoint(tops[1]) else 1.0


def _grade_factor(a: tuple[float, float] | None, b: tuple[float, float] | None) -> float:
    if not a or not b:
        return 0.92 if a or b else 1.0
    factor = max(0.35, 1.0 - 0.28 * max(abs(a[0] - b[0]), abs(a[1] - b[1])))
    if a != b:  # "mild to severe" meets every grade
        factor *= 0.5 ** sum(high - low > 1.2 for low, high in (a, b))
    return factor


def _size_factor(a: float | None, b: float | None) -> float:
    if not a or not b:
        return 0.9 if a or b else 1.0
    ratio = min(a, b) / max(a, b)
    if ratio >= 0.88 or (abs(a - b) <= 2.0 and ratio > 0.6):
        return 1.0
    return 0.8 if ratio >= 0.7 else 0.4


def covers(whole: Entity, finding: str, lexicon: Lexicon) -> bool:
    """Whether a statement on an organ system speaks of this finding (or of this smaller system)."""
    if whole.finding == ROOT_GROUP:
        return True
    known = lexicon.findings.get(finding)
    return whole.finding in lexicon.group_chain(known.group if known else finding)


def contradicts(absent: Entity, positive: Entity, lexicon: Lexicon) -> float:
    """How strongly a denial denies this very finding: 1 named, 0.5 by its organ system, 0 not at all.

    A limited denial ("no large effusion", "no right pneumothorax", "no acute fracture") only denies within its limit.
    """
    if absent.finding == positive.finding:
        strength = 1.0
    elif (
        absent.group
        and not positive.group
        and absent.finding != ROOT_GROUP
        and covers(absent, positive.finding, lexicon)
    ):
        strength = 0.5
    else:
        return 0.0
    one_sided = absent.side and not absent.group and not lexicon.finding(absent.finding).sided
    if opposite_sides(absent, positive) or _borderline(positive) or one_sided:
        return 0.0  # "borderline heart size" and "normal heart" say nearly the same
    if absent.places and positive.places and _place_factor(absent.places, positive.places, lexicon) < 0.5:
        return 0.0
    if absent.severity and (not positive.severity or positive.severity[1] < absent.severity[0]):
        return 0.0
    if absent.change and absent.change != positive.change:
        return 0.0
    theirs = dict(positive.qualifiers)
    for family, value in absent.qualifiers:
        if family == "extent":
            continue
        if theirs.get(family, value) != value:
            return 0.0
    return strength


class _Denials:
    """The absent findings of a report, by name."""

    def __init__(self, absents: Sequence[Entity], lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.groups = [absent for absent in absents if absent.group]
        self.named: dict[str, list[Entity]] = {}
        for absent in absents:
            if not absent.group:
                self.named.setdefault(absent.finding, []).append(absent)

    def strength(self, entity: Entity, groups: bool = True) -> float:
        """How strongly this report denies the finding: see `contradicts`."""
        found = [contradicts(absent, entity, self.lexicon) for absent in self.named.get(entity.finding, ())]
        if groups:
            found += [contradicts(absent, entity, self.lexicon) for absent in self.groups]
        return max(found, default=0.0)

    def sentences(self, entity: Entity) -> frozenset[int]:
        """Those that deny the finding."""
        deniers = [*self.named.get(entity.finding, ()), *self.groups]
        return frozenset().union(*(a.said for a in deniers if contradicts(a, entity, self.lexicon)))

    def deny_side(self, entity: Entity) -> bool:
        """Whether the finding is denied on its very side: "none on the left"."""
        return any(absent.side == entity.side for absent in self.named.get(entity.finding, ()))


def _key(entity: Entity) -> tuple[object, ...]:
    return (
        entity.finding,
        entity.assertion,
        entity.side,
        entity.places,
        entity.severity or (0.0, 0.0),
        entity.change,
        entity.size_mm or 0.0,
        entity.qualifiers,
    )


def _split_bilateral(ours: list[Entity], theirs: list[Entity]) -> list[tuple[Entity, float]]:
    """(entity, share of its weight): a bilateral finding is two halves where the other report names each side."""
    both = {e.finding for e in theirs if e.side == "left"} & {e.finding for e in theirs if e.side == "right"}
    out: list[tuple[Entity, float]] = []
    for entity in ours:
        if entity.side == "bilateral" and entity.finding in both:
            out += [(entity._replace(side="left"), 0.5), (entity._replace(side="right"), 0.5)]
        else:
            out.append((entity, 1.0))
    return out


def compare(gold: Sequence[Entity], said: Sequence[Entity], extra: Mapping[str, int], lexicon: Lexicon) -> Outcome:
    """Score what was said against the reference. The order of statements does not matter.

    `extra`: how often the completion repeats a finding more than a report does.
    """
    gold_positive, gold_absent = _by_assertion(gold)
    said_positive, said_absent = _by_assertion(said)
    gold_positive, gold_absent = _nearly_normal(
        gold_positive, gold_absent, said_positive, _Denials(said_absent, lexicon)
    )
    # A reference may deny in one breath what it describes in the next; its description stands.
    gold_denials = _Denials(gold_absent, lexicon)
    own_clash = {e.finding for e in gold_positive if gold_denials.strength(e) == 1.0}
    gold_absent = [a for a in gold_absent if not any(contradicts(a, p, lexicon) == 1.0 for p in gold_positive)]
    gold_denials, said_denials = _Denials(gold_absent, lexicon), _Denials(said_absent, lexicon)
    ours = _side(_split_bilateral(gold_positive, said_positive), lexicon)
    theirs = _side(_split_bilateral(said_positive, gold_positive), lexicon)
    clash = [
        e.assertion == "present" and e.finding not in own_clash and said_denials.strength(e, groups=False) == 1.0
        for e in theirs.entities
    ]
    # "atelectasis rather than pneumonia": what the reference rules out by name cannot stand for its opacity.
    ruled_out = [e.assertion == "present" and gold_denials.strength(e, groups=False) == 1.0 for e in theirs.entities]
    other_side = _OtherSide(gold_denials, said_denials)
    _pair_up(ours, theirs, clash, ruled_out, other_side, lexicon)
    tally = _Tally(
        earned_gold=sum(w * c for w, c in zip(ours.weights, ours.credit, strict=True)),
        earned_said=sum(w * c for w, c in zip(theirs.weights, theirs.credit, strict=True)),
        asked=_discounted(ours, theirs, lexicon),
        stated=_discounted(theirs, ours, lexicon),
    )
    tally.stated += sum(0.25 * count * lexicon.finding(finding).weight for finding, count in extra.items())
    rows = _judge_missed(ours, theirs, said_denials, tally) + _judge_said(ours, theirs, clash, gold_denials, tally)
    false = [e for e, partner in zip(theirs.entities, theirs.partner, strict=True) if partner < 0]
    firm = sum(w for e, w in zip(ours.entities, ours.weights, strict=True) if not _borderline(e))
    nearly_normal = [e._replace(assertion="absent", severity=None) for e in said_positive if _borderline(e)]
    total, earned, negative_rows = _negatives(gold_absent, [*said_absent, *nearly_normal], false, lexicon)
    value, precision, recall = _pay(tally, firm, any(w >= MAJOR for w in ours.weights), total, earned)
    rows += negative_rows
    unit = 2.0 / (tally.asked + tally.stated + 2.0 * total or 1.0)  # f1 is 2 earned / (asked + stated)
    for row in rows:
        row["share"] = round(max(-1.0, min(1.0, unit * row["share"])), 4)
    judged = len(ours.entities) + len(theirs.entities)
    components = {
        "precision": precision,
        "recall": recall,
        "f1": _f1(precision, recall),
        "negative_recall": earned / total if total else 0.0,
        "contradiction_rate": min(1.0, tally.opposite / judged) if judged else 0.0,
        "findings": float(len(theirs.entities)),
    }
    return Outcome(value, components, rows)


def _nearly_normal(
    positive: list[Entity], absent: list[Entity], stated: Sequence[Entity], said: _Denials
) -> tuple[list[Entity], list[Entity]]:
    """A borderline finding that the completion calls normal is a denial to agree with."""
    named = {e.finding for e in stated}
    borderline = [e for e in positive if _borderline(e) and e.finding not in named]
    normal = [e for e in borderline if said.strength(e._replace(severity=None))]
    if not normal:
        return positive, absent
    denied = [e._replace(assertion="absent", severity=None) for e in normal]
    return [e for e in positive if e not in normal], sorted([*absent, *denied], key=_key)


def _by_assertion(entities: Sequence[Entity]) -> tuple[list[Entity], list[Entity]]:
    positive = sorted((e for e in entities if e.assertion != "absent"), key=_key)
    return positive, sorted((e for e in entities if e.assertion == "absent"), key=_key)


def _judge_missed(ours: _Side, theirs: _Side, said: _Denials, tally: _Tally) -> list[dict[str, Any]]:
    """Rows of the reference's findings that found no partner; those denied cost."""
    rows = []
    for i, entity in enumerate(ours.entities):
        if ours.partner[i] >= 0:
            continue
        denial = said.strength(entity)
        penalty = OPPOSITE * ours.weights[i] * denial
        tally.lose(penalty)
        note = "denied" if denial else "missed"
        rows.append(_row(entity, "reference", note, "", -penalty, said.sentences(entity)))
    return rows


def _judge_said(
    ours: _Side, theirs: _Side, clash: Sequence[bool], gold: _Denials, tally: _Tally
) -> list[dict[str, Any]]:
    """Rows of the completion's findings; those the reference denies cost."""
    rows = []
    for j, entity in enumerate(theirs.entities):
        weight_, partner = theirs.weights[j], ""
        if theirs.partner[j] >= 0:
            partner = describe(ours.entities[theirs.partner[j]])
            points = -OPPOSITE * weight_ if clash[j] else weight_ * theirs.credit[j]
            wrong_side = opposite_sides(entity, ours.entities[theirs.partner[j]])
            note = "denied in the same report" if clash[j] else "wrong side" if wrong_side else "matched"
        else:
            denial = gold.strength(entity)
            tally.stated += (FALSE_DENIED - 1.0) * weight_ * denial
            points = -OPPOSITE * weight_ * denial
            note = "the reference denies it" if denial else "not in the reference"
        tally.lose(max(0.0, -points))
        # One that is only too many costs precision: half of what a right one earns.
        share = points or -0.5 * weight_
        rows.append(_row(entity, "completion", note, partner, points, entity.said, share))
    return rows


@dataclass(frozen=True)
class _OtherSide:
    """Whether two findings on opposite sides may still be one: not where either report denies the other's side."""

    gold: _Denials
    said: _Denials

    def forbids(self, ours: Entity, theirs: Entity) -> bool:
        if not opposite_sides(ours, theirs):
            return False
        return self.said.deny_side(ours) or self.gold.deny_side(theirs)


def _pay(
    tally: _Tally, positive_total: float, abnormal: bool, negative_total: float, negative_earned: float
) -> tuple[float, float, float]:
    """(pay, precision, recall), all in [0, 1]."""
    cap = positive_total * (NEGATIVE_CAP if abnormal else MINOR_CAP)
    if positive_total and negative_total > cap:
        negative_earned *= cap / negative_total
        negative_total = cap
    if not abnormal:
        # Normal reports differ in which normal organs they name: three quarters of them are enough.
        negative_earned = min(negative_earned / 0.75, negative_total)
    credit_gold = max(0.0, tally.earned_gold + negative_earned - tally.lost)
    credit_said = max(0.0, tally.earned_said + negative_earned - tally.lost)
    asked, stated = tally.asked + negative_total, tally.stated + negative_earned
    recall = min(1.0, credit_gold / asked) if asked else 0.0
    precision = min(1.0, credit_said / stated) if stated else 0.0
    value = _f1(precision, recall)
    if abnormal and tally.earned_gold <= tally.lost:
        # Nothing of what is wrong with the patient was found: a copied normal report is worth nothing.
        value = precision = recall = 0.0
    if tally.stated:
        # Lists of everything that could be wrong hit something: below one right in two the pay falls off.
        value *= min(1.0, 2.0 * precision)
    if positive_total and tally.earned_gold <= 0.0:
        value *= NONE_FOUND
    order = _order(tally, asked, stated, negative_earned)
    # Rounded, so that a sum of tenths that should be 1 is 1.
    return round((1.0 - LOWEST) * value + LOWEST * order, 9), round(precision, 9), round(recall, 9)


def _order(tally: _Tally, asked: float, stated: float, negatives: float) -> float:
    """How near a report is to the reference, in [0, 1], also where it earns nothing: 1 only if nothing is wrong with
    it."""
    earned = tally.earned_gold + tally.earned_said + 2.0 * negatives
    share = earned / (asked + stated + 2.0 * tally.lost) if asked + stated else 0.0
    wrong = max(0.0, tally.asked + tally.stated - tally.earned_gold - tally.earned_said) + 2.0 * tally.lost
    return 0.5 * min(1.0, share) + 0.5 * math.exp(-wrong)


def _f1(precision: float, recall: float) -> float:
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def _side(entities: list[tuple[Entity, float]], lexicon: Lexicon) -> _Side:
    return _Side(
        [e for e, _ in entities],
        [weight(e, lexicon) * share for e, share in entities],
        [0.0] * len(entities),
        [-1] * len(entities),
    )


def _pair_up(
    ours: _Side,
    theirs: _Side,
    clash: Sequence[bool],
    ruled_out: Sequence[bool],
    other_side: _OtherSide,
    lexicon: Lexicon,
) -> None:
    """Best pairs first, each finding once."""
    options = []
    for i, a in enumerate(ours.entities):
        for j, b in enumerate(theirs.entities):
            value = 0.0 if ruled_out[j] and a.finding != b.finding else agreement(a, b, lexicon)
            if value > 0.0 and not other_side.forbids(a, b):
                options.append((-value, i, j))
    for negated, i, j in sorted(options):
        if ours.partner[i] < 0 and theirs.partner[j] < 0:
            ours.partner[i], theirs.partner[j] = j, i
            ours.credit[i] = theirs.credit[j] = 0.0 if clash[j] else -negated


def _discounted(mine: _Side, other: _Side, lexicon: Lexicon) -> float:
    """The weight a report answers for. One unmatched finding that only names a matched one again in other words
    ("opacity ... consistent with pneumonia" beside "pneumonia") counts little, a second one counts in full."""
    total = 0.0
    spent: set[int] = set()
    for i, entity in enumerate(mine.entities):
        share = 1.0
        if mine.partner[i] < 0:
            for j, twin in enumerate(other.entities):
                if other.credit[j] <= 0.0:
                    continue
                if twin.finding in lexicon.finding(entity.finding).evidence_of:
                    share = 0.0
                    break
                if j in spent:
                    continue
                kin = lexicon.related.get((entity.finding, twin.finding), 0.0)
                if kin >= 0.4 and agreement(entity, twin, lexicon) >= 0.3 * kin:
                    share = 0.3
                    spent.add(j)
                    break
        total += share * mine.weights[i]
    return total


def _negatives(
    gold: Sequence[Entity], said: Sequence[Entity], false: Sequence[Entity], lexicon: Lexicon
) -> tuple[float, float, list[dict[str, Any]]]:
    """(weight of the reference's denials, weight of those the completion makes as well, rows)"""
    total = earned = 0.0
    rows = []
    for absent in gold:
        share, by, sentences = _negative_credit(absent, said, lexicon)
        if any(contradicts(absent, positive, lexicon) for positive in false):
            share, sentences = 0.0, frozenset()
        total += NEGATIVE_WEIGHT
        earned += NEGATIVE_WEIGHT * share
        points = NEGATIVE_WEIGHT * share
        rows.append(_row(absent, "reference", "agreed" if share else "not said", by, points, sentences))
    return total, earned, rows


def _negative_credit(absent: Entity, said: Sequence[Entity], lexicon: Lexicon) -> tuple[float, str, frozenset[int]]:
    """(share of a denial that is made as well, by which words, in which sentences)"""
    parts: dict[str, frozenset[int]] = {}
    for other in said:
        if opposite_sides(absent, other):
            continue
        narrower = bool((other.places and not absent.places) or (other.side and not absent.side))
        alike = other.finding == absent.finding or lexicon.related.get((other.finding, absent.finding), 0.0) >= ALIKE
        same = alike and other.group == absent.group
        if same or (other.group and covers(other, absent.finding, lexicon)):
            if not narrower:
                return 1.0, describe(other), other.said
            parts[describe(other)] = other.said
            continue
        if absent.group and covers(absent, other.finding, lexicon):
            parts[other.finding] = other.said
    whole = absent.group and lexicon.mains.get(absent.finding) in parts
    # An organ system is called normal piece by piece: three pieces are taken for the whole.
    share = 1.0 if whole else (0.0, 0.6, 0.8, 1.0)[min(len(parts), 3)]
    return share, ", ".join(sorted(parts)), frozenset().union(*parts.values())


def describe(entity: Entity) -> str:
    """One line for people."""
    name = f"any {entity.finding} abnormality" if entity.group and entity.finding != ROOT_GROUP else entity.finding
    if entity.group and entity.finding == ROOT_GROUP:
        name = "any abnormality"
    return " ".join(part for part in (entity.assertion, entity.side, *entity.places, name.replace("_", " ")) if part)


def _row(
    entity: Entity,
    source: str,
    verdict: str,
    partner: str,
    points: float,
    sentences: frozenset[int],
    share: float | None = None,
) -> dict[str, Any]:
    return {
        "finding": entity.finding if not entity.group else f"{entity.finding} (whole)",
        "assertion": entity.assertion,
        "side": entity.side,
        "location": ", ".join(entity.places),
        "severity": list(entity.severity) if entity.severity else None,
        "change": entity.change,
        "size_mm": entity.size_mm,
        "qualifiers": dict(entity.qualifiers),
        "source": source,
        "verdict": verdict,
        "matched": partner,
        "points": round(points, 4),
        "share": points if share is None else share,
        "sentences": sorted(sentences),
        "text": entity.text,
    }
