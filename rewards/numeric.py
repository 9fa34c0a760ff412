"""NumericUnits: numbers with units, ranges, bounds, pairs, ratios, scores, dates, durations and temperatures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.analytes import bridges, convert_analyte
from rewards.answer import Answer, Candidate
from rewards.base import RewardInput, RewardResult
from rewards.claims import (
    NOTHING,
    PROSE,
    Claim,
    Reader,
    Said,
    claims_of,
    fold,
    is_disowned,
    sentence_claims,
    settle,
)
from rewards.dates import find_dates
from rewards.numeric_label import DEFAULT_TOLERANCE, UNIT_POLICIES, Label, read_label
from rewards.quantity import Quantity
from rewards.reading import MAX_LENGTH, read, unit_behind
from rewards.short import ShortAnswer
from rewards.symbolic import equivalence, lift_superscripts
from rewards.text import lines, strip_markup
from rewards.units import Unit, convert

_PRESSURE = (("length", -1), ("mass", 1), ("time", -2))
_ANGLE = (("angle", 1),)
_CLOSING = re.compile(r"\}|</[^<>\n]{1,20}>")
_NAMED_VALUE = re.compile(r"(?!the\b|approximately\b|about\b)[A-Za-z][A-Za-z ()-]{2,40}\s?[=:]\s")
_DIGIT = re.compile(r"\d")
_ALONE = re.compile(
    r"[-−+]?\s?\d+(?:[.,]\d+)*(?:\s?[^\s\d.,:()][^\s.,:()]{0,15}\.?)?"
)  # a number, perhaps with its unit
_UNIT_BEHIND = 60
_BARE_LINES = 40


class NumericUnits(ShortAnswer):
    """1 when every place that answers gives the label's quantity within its tolerance, else 0.

    gold: a number, a text with a unit ("5 mg", ">=65 years", "1:320", "3 weeks 2 days") or a list of two for range,
    interval and pair. meta: unit, tolerance, kind, analyte and unit_policy; see `rewards.numeric_label`.
    tolerance: used where a row has none; kinds that are counted (score, ratio, inequality, date) are then exact.
    unit_policy: "require" a written unit, take the label's where none is written ("assume_if_missing"), or compare
    numbers only ("ignore"). A written unit of another dimension is wrong under the first two. Without a unit in the
    row, numbers are compared as they stand.
    read: "prose" reads all of a completion, "closed" only marked answers (see `rewards.claims.heard`).
    """

    name = "numeric"

    def __init__(
        self,
        tolerance: Mapping[str, Any] = DEFAULT_TOLERANCE,
        unit_policy: str = "assume_if_missing",
        read: str = PROSE,
    ) -> None:
        super().__init__(read)
        if unit_policy not in UNIT_POLICIES:
            raise ValueError(f"unknown unit_policy {unit_policy!r}; use one of {', '.join(UNIT_POLICIES)}")
        read_label(1.0, {"tolerance": tolerance}, DEFAULT_TOLERANCE, unit_policy)
        self.tolerance = dict(tolerance)
        self.unit_policy = unit_policy

    def label(self, sample: RewardInput) -> Label:
        return read_label(sample.gold, sample.meta, self.tolerance, self.unit_policy)

    def written(self, completion: str, label: Label) -> str:
        return lift_superscripts(completion) if label.kind == "symbolic" else completion

    def said(self, answer: Answer, sample: RewardInput, label: Label) -> Said:
        if answer.channel == "bare" and (len(answer.body) > 2 * MAX_LENGTH or answer.body.count("\n") > _BARE_LINES):
            return Said(status="unparsed", reason="a long text without a marked answer")

        def read(text: str) -> Said:
            return _said(text, label)

        said = settle(answer, Reader(read, _last_line, lambda answer: _beside(answer, read), raw=_raw))
        if said.reason or said.status != "ok":
            return said
        return Said(said.value, said.parsed, reason=f"read from {answer.channel}")

    def judged(self, said: Said, label: Label) -> RewardResult:
        return RewardResult(float(said.value), "ok", said.parsed, said.reason)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """right: whether the quantity is the label's. is_silent: the text holds no number at all."""

    right: bool
    parsed: Any = None
    reason: str = ""
    status: str = "ok"
    is_silent: bool = False


def _is_of_another(candidate: Candidate, answer: Answer) -> bool:
    """ "Result: ideal weight = 61 kg." on the way to the answer gives another quantity a value."""
    cue = answer.body[candidate.lead : candidate.start].lower()
    return "answer" not in cue and _NAMED_VALUE.match(candidate.text) is not None


def _last_line(answer: Answer) -> list[list[Claim]]:
    return [sentence_claims(answer.texts[0])]


def _beside(answer: Answer, read: Callable[[str], Said]) -> list[Said]:
    """Lines that may veto: without a mark all but the last one, else the first or last one that is a quantity."""
    body = lines(answer.rest)
    if answer.channel == "bare":
        return [fold(claims_of(line), read) for line in body[:-1]]
    return [read(line) for line in {*body[:1], *body[-1:]} if _ALONE.fullmatch(strip_markup(line))]


def _said(text: str, label: Label) -> Said:
    """Whether a claim gives the label's quantity. What has no value of the label's kind vetoes nothing."""
    if is_disowned(text[: _first_digit(text)], denials=False):
        return NOTHING
    verdict = _judge_text(text, label)
    if verdict.status == "unparsed" and verdict.is_silent:
        return Said(reason=verdict.reason)
    value = verdict.right if verdict.status == "ok" else None
    return Said(value, verdict.parsed, verdict.status, verdict.reason, firm=verdict.right or verdict.parsed is not None)


def _first_digit(text: str) -> int:
    digit = _DIGIT.search(text)
    return len(text) if digit is None else digit.start()


def _raw(candidate: Candidate, answer: Answer) -> str:
    """The candidate as written: markdown stripping would turn 2*3 into 23 and "- 5" into "5"."""
    written = answer.body[candidate.start : candidate.end].strip()
    if candidate.channel == "cue":
        is_working = answer.closed and candidate.end < answer.candidates[-1].start and _is_of_another(candidate, answer)
        return "" if is_working else written
    if candidate.channel == "json":
        return written if written.startswith("[") else candidate.text.replace(". ", " ")
    behind = _CLOSING.match(answer.body, candidate.end)
    if behind is not None and (unit := unit_behind(answer.body[behind.end() : behind.end() + _UNIT_BEHIND])):
        return f"{candidate.text} {unit}"
    return candidate.text


def _judge_text(text: str, label: Label) -> _Verdict:
    if label.kind == "symbolic":
        result = equivalence(text, label.text)
        return _Verdict(result.value == 1.0, result.parsed, result.reason, result.status)
    if label.kind == "date":
        return _judge_date(text, label)
    reading = read(text)
    if not reading.items:
        return _Verdict(False, reason=reading.problem, status="unparsed", is_silent=reading.problem == "no number")
    items = _labelled_pair(reading.text, reading.items) if label.kind == "pair" else reading.items
    judged = [_judge(item, label) for item in items]
    right = [verdict.right for verdict in judged]
    if all(right) or len(judged) == 1:
        return judged[0]
    return _Verdict(False, judged[0].parsed, "several different quantities", "conflict")


def _judge_date(text: str, label: Label) -> _Verdict:
    dates = find_dates(text, label.date_order)
    if not dates:
        return _Verdict(False, reason="no single possible date", status="unparsed", is_silent=dates is not None)
    if len(set(dates)) > 1:
        return _Verdict(False, dates[0].isoformat(), "several dates", "conflict")
    right = dates[0] == label.date
    return _Verdict(right, dates[0].isoformat(), "" if right else f"{dates[0]} is not {label.date}")


def _judge(item: Quantity, label: Label) -> _Verdict:
    """One quantity against the label. parsed: its value or values in the label's unit, None when it has none there."""
    item = _as_kind(item, label.kind)
    if item.form not in _FORMS[label.kind]:
        return _Verdict(False, reason=f"a {item.form} where a {label.kind} is asked")
    values, reason = _in_unit(item, label)
    if not values:
        return _Verdict(False, reason=reason)
    parsed: Any = values[0] if len(values) == 1 else values
    right = _COMPARE.get(label.kind, _same_number)(values, item, label)
    return _Verdict(right, parsed, "" if right else f"{_show(values)} is not {_show(label.values)}")


def _as_kind(item: Quantity, kind: str) -> Quantity:
    """Readings that only the asked kind allows: 1/4 as a number, "1 to 320" as a ratio, 1:30 h as a time."""
    first = item.values[0]
    if item.form == "over" and item.sign == "/" and kind in ("scalar", "interval"):
        second = item.values[1]
        is_pressure = item.unit is not None and item.unit.dims == _PRESSURE
        if not is_pressure and _is_fraction(first, second):
            return Quantity("number", (first / second,), item.unit, foreign=item.foreign)
    if item.form == "range" and item.sign == "to" and kind == "ratio":
        return Quantity("ratio", item.values, item.unit, foreign=item.foreign)
    if item.form == "ratio" and kind == "duration" and item.unit is not None and item.unit.factor == 3600.0:
        minutes = item.values[1]
        if 0 <= minutes < 60 and minutes == int(minutes) and first == int(first):
            return Quantity("number", (first + minutes / 60,), item.unit)
    return item


def _is_fraction(above: float, below: float) -> bool:
    """3/8 and 7/3 are numbers; 120/80 is a pair and 140/7 an unfinished division."""
    if above != int(above) or below != int(below) or above < 0 or below <= 0:
        return False
    return above < below or (below <= 12 and math.gcd(int(above), int(below)) == 1)


_FORMS = {
    "scalar": ("number",),
    "temperature": ("number",),
    "temperature_delta": ("number",),
    "duration": ("number",),
    "interval": ("number", "range", "list"),
    "range": ("range", "list"),
    "pair": ("over", "list"),
    "inequality": ("bound",),
    "ratio": ("ratio", "over", "number"),
    "score": ("number", "over", "of"),
}


def _in_unit(item: Quantity, label: Label) -> tuple[tuple[float, ...], str]:
    """The values in the label's unit, or () and the reason."""
    target, source = label.unit, item.unit
    if label.policy == "ignore":
        return item.values, ""
    if label.kind == "score":
        is_plain = source is None or source.is_plain
        return (item.values, "") if is_plain else ((), "a unit on a score")
    if target is None:
        return item.values, ""
    if source is not None and source.dims == _ANGLE and target.dims == (("temperature", 1),):
        source = None  # "37°" leaves the scale open
    if item.foreign and not (source is None and target.is_plain):
        return (), "an unknown unit"
    if source is None:
        if label.policy == "require" and not target.is_plain:
            return (), "the unit is missing"
        if item.power and item.power == target.power:  # "7.2 x 10^9" for a label in 10^9/L
            return tuple(value / 10.0**item.power for value in item.values), ""
        return item.values, ""
    converted = [_convert(value, source, target, label) for value in item.values]
    values = tuple(value for value in converted if value is not None and math.isfinite(value))
    return (values, "") if len(values) == len(converted) else ((), "the unit has another dimension")


def _convert(value: float, source: Unit, target: Unit, label: Label) -> float | None:
    if label.analyte and (source.dims != target.dims or bridges(source, target, label.analyte)):
        return convert_analyte(value, source, target, label.analyte)
    return convert(value, source, target, difference=label.is_difference)


def _same_number(values: tuple[float, ...], item: Quantity, label: Label) -> bool:
    return label.tolerance.allows(values[0], label.values[0])


def _same_each(values: tuple[float, ...], item: Quantity, label: Label) -> bool:
    return all(label.tolerance.allows(value, gold) for value, gold in zip(values, label.values, strict=True))


def _inside(values: tuple[float, ...], item: Quantity, label: Label) -> bool:
    if len(values) == 2:
        return _same_each(values, item, label)
    low, high = label.values
    slack = 1e-9 * max(abs(low), abs(high))
    return low - slack <= values[0] <= high + slack


def _same_bound(values: tuple[float, ...], item: Quantity, label: Label) -> bool:
    return item.sign == label.sign and label.tolerance.allows(values[0], label.values[0])


def _same_ratio(values: tuple[float, ...], item: Quantity, label: Label) -> bool:
    if values[-1] == 0 and len(values) == 2:
        return False
    if len(label.values) == 2 and len(values) == 1:
        return False  # a label of two numbers (1:320) asks for both
    gold = label.values[0] / label.values[1] if len(label.values) == 2 else label.values[0]
    value = values[0] / values[1] if len(values) == 2 else values[0]
    return math.isfinite(value) and label.tolerance.allows(value, gold)


def _same_score(values: tuple[float, ...], item: Quantity, label: Label) -> bool:
    if len(values) == 2 and (not values[0] <= values[1] or (len(label.values) == 2 and values[1] != label.values[1])):
        return False
    return label.tolerance.allows(values[0], label.values[0])


_COMPARE = {
    "range": _same_each,
    "pair": _same_each,
    "interval": _inside,
    "inequality": _same_bound,
    "ratio": _same_ratio,
    "score": _same_score,
}


def _labelled_pair(text: str, items: tuple[Quantity, ...]) -> tuple[Quantity, ...]:
    """ "systolic 120, diastolic 80 mmHg" as one pair, in the order of the names."""
    lowered = text.lower()
    systolic, diastolic = lowered.find("systolic"), lowered.find("diastolic")
    if len(items) != 2 or systolic < 0 or diastolic < 0 or any(item.form != "number" for item in items):
        return items
    first, second = items if systolic < diastolic else items[::-1]
    unit = first.unit or second.unit
    if (first.unit or unit) != (second.unit or unit):
        return items
    return (Quantity("over", first.values + second.values, unit, foreign=first.foreign or second.foreign),)


def _show(values: tuple[float, ...]) -> str:
    return " and ".join(f"{value:.6g}" for value in values)
