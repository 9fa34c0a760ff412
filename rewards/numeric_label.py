"""Labels of numeric questions: what is asked, in which unit, how exactly. An unusable one is a LabelError, not a 0."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rewards.dates import find_dates, slash_order
from rewards.numbers import clean
from rewards.quantity import Quantity
from rewards.reading import read
from rewards.symbolic import parse
from rewards.units import ONE, Unit, convert, parse_unit

KINDS = tuple(
    "scalar range interval inequality pair ratio score date duration temperature temperature_delta symbolic".split()
)
UNIT_POLICIES = ("require", "assume_if_missing", "ignore")
DEFAULT_TOLERANCE = {"rel": 0.01}
EXACT_KINDS = ("inequality", "ratio", "score", "date")
_TWO_VALUES = ("range", "interval", "pair")
_KIND_OF_FORM = {"number": "scalar", "range": "range", "bound": "inequality", "ratio": "ratio"}
_FORMS = {
    "range": ("range", "list"),
    "interval": ("range", "list"),
    "pair": ("over", "list"),
    "inequality": ("bound",),
    "ratio": ("ratio", "over", "number"),
    "score": ("number", "over", "of"),
}
_DIFFERENCE = re.compile(r"^(?:delta|Δ|∆)\s*")
_SLACK = 1e-9  # for values that differ only by the rounding of a unit factor


class LabelError(ValueError):
    """Why a label cannot be judged, and what to write instead."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an answer may lie from the label, in the label's unit. rel and abs: either is enough; edges count."""

    rel: float = 0.0
    abs: float = 0.0
    lower: float | None = None
    upper: float | None = None

    def allows(self, value: float, gold: float) -> bool:
        slack = _SLACK * abs(gold)
        if self.lower is not None or self.upper is not None:
            above = self.lower is None or value >= self.lower - max(slack, _SLACK * abs(self.lower))
            below = self.upper is None or value <= self.upper + max(slack, _SLACK * abs(self.upper))
            return above and below
        return abs(value - gold) <= max(self.rel * abs(gold), self.abs) + slack


@dataclass(frozen=True, slots=True)
class Label:
    """values: one number, or two for range, interval, pair, ratio and "12 of 15"; in `unit`, None if none is known."""

    kind: str
    values: tuple[float, ...] = ()
    unit: Unit | None = None
    tolerance: Tolerance = Tolerance()
    policy: str = "assume_if_missing"
    analyte: str = ""
    sign: str = ""
    date: datetime.date | None = None
    date_order: str = ""
    text: str = ""

    @property
    def is_difference(self) -> bool:
        return self.kind == "temperature_delta"


def read_label(gold: Any, meta: Mapping[str, Any], tolerance: Mapping[str, Any], policy: str) -> Label:
    """The label of a row. tolerance and policy: what holds where `meta` says nothing. Raises LabelError."""
    kind = meta.get("kind") or ""
    if kind not in ("", *KINDS):
        raise LabelError(f"unknown kind {kind!r} in meta; use one of {', '.join(KINDS)}")
    policy = meta.get("unit_policy") or policy
    if policy not in UNIT_POLICIES:
        raise LabelError(f"unknown unit_policy {policy!r}; use one of {', '.join(UNIT_POLICIES)}")
    analyte = meta.get("analyte") or ""
    if not isinstance(analyte, str):
        raise LabelError(f"analyte must be a name, got {analyte!r}")
    if kind == "symbolic":
        if not isinstance(gold, str) or not gold.strip():
            raise LabelError(f"a symbolic label must be an expression as text, got {gold!r}")
        try:
            parse(gold)
        except ValueError as error:
            raise LabelError(f"the symbolic label {gold!r} cannot be read: {error}") from None
        return Label("symbolic", text=gold)
    unit, is_difference = _unit(meta.get("unit"))
    if is_difference and kind in ("", "scalar", "temperature"):
        kind = "temperature_delta"
    if isinstance(gold, datetime.date):
        gold = gold.isoformat()[:10]
    if kind == "date":
        return _date_label(gold)
    label = _quantity_label(gold, kind, unit)
    if label.kind == "date":
        return label
    bounds = _tolerance(meta.get("tolerance"), label, tolerance)
    label = replace(label, policy=policy, analyte=analyte, tolerance=bounds)
    _check(label)
    return label


def _unit(raw: Any) -> tuple[Unit | None, bool]:
    """The unit of the row (None when it names none) and whether it is a temperature difference ("delta°C")."""
    if raw is None or raw == "":
        return None, False
    if raw == 1:
        return ONE, False
    if not isinstance(raw, str):
        raise LabelError(f"unit must be a text such as 'mg/dL', got {raw!r}")
    bare = _DIFFERENCE.sub("", raw.strip())
    unit = parse_unit(clean(bare))
    if unit is None:
        raise LabelError(f"unknown unit {raw!r}; write it as in data/units.tsv (mg/dL, 10^9/L, mmHg, %), '1' for none")
    return unit, bare != raw.strip()


def _quantity_label(gold: Any, kind: str, unit: Unit | None) -> Label:
    if isinstance(gold, str):
        return _text_label(gold, kind, unit)
    if isinstance(gold, list | tuple):
        if kind not in (*_TWO_VALUES, "ratio"):
            raise LabelError(f"a list is a label for {', '.join(_TWO_VALUES)} or ratio; set meta 'kind' ({gold!r})")
        if len(gold) != 2:
            raise LabelError(f"a {kind} label needs two numbers, got {gold!r}")
        return Label(kind, (_number(gold[0]), _number(gold[1])), unit)
    if kind in (*_TWO_VALUES, "inequality"):
        raise LabelError(f"a {kind} label cannot be the single number {gold!r}")
    return Label(kind or "scalar", (_number(gold),), unit)


def _number(gold: Any) -> float:
    if isinstance(gold, bool) or gold is None:
        raise LabelError(f"{gold!r} is no number")
    try:
        value = float(gold)
    except (TypeError, ValueError, OverflowError):
        raise LabelError(f"{gold!r} is no number") from None
    if not math.isfinite(value):
        raise LabelError(f"{gold!r} is not finite")
    return value


def _text_label(gold: str, kind: str, unit: Unit | None) -> Label:
    reading = read(gold)
    if (
        not reading.items
        and not kind
        and (dates := find_dates(gold, slash_order(gold))) is not None
        and len(dates) == 1
    ):
        return _date_label(gold)
    if len(reading.items) != 1:
        raise LabelError(f"the label {gold!r} is no single quantity ({reading.problem or 'several are named'})")
    item = reading.items[0]
    if item.foreign:
        raise LabelError(f"the label {gold!r} names an unknown unit")
    if not kind:
        if item.form not in _KIND_OF_FORM:
            raise LabelError(f"the label {gold!r} can be read in several ways; set meta 'kind' (pair, score, ratio)")
        kind = _KIND_OF_FORM[item.form]
    if item.form not in _FORMS.get(kind, ("number",)) and not (kind == "scalar" and _proper(item)):
        raise LabelError(f"the label {gold!r} is no {kind}")
    values = item.values
    if kind == "scalar" and item.form == "over":
        values = (values[0] / values[1],)
    if item.unit is not None and unit is not None and item.unit != unit:
        converted = [convert(value, item.unit, unit, difference=kind == "temperature_delta") for value in values]
        if any(value is None for value in converted):
            raise LabelError(f"the label {gold!r} and its unit do not have the same dimension")
        values = tuple(value for value in converted if value is not None)
    return Label(kind, values, unit if unit is not None else item.unit, sign=item.sign)


def _proper(item: Quantity) -> bool:
    return item.form == "over" and item.sign == "/" and 0 < item.values[0] < item.values[1]


def _date_label(gold: Any) -> Label:
    order = slash_order(gold) if isinstance(gold, str) else ""
    dates = find_dates(gold, order) if isinstance(gold, str) else None
    if dates is None or len(dates) != 1:
        raise LabelError(f"the date label {gold!r} is no single possible date; write it as 2024-04-23")
    return Label("date", date=dates[0], date_order=order)


def _tolerance(raw: Any, label: Label, default: Mapping[str, Any]) -> Tolerance:
    is_default = raw is None
    if is_default:
        raw = {"exact": True} if label.kind in EXACT_KINDS else default
    if not isinstance(raw, Mapping):
        raise LabelError(f"tolerance must be a mapping such as {{'rel': 0.05}}, got {raw!r}")
    given = {key: value for key, value in raw.items() if value is not None and value is not False}
    if not given or given.keys() - {"rel", "abs", "lower", "upper", "exact"}:
        raise LabelError(f"tolerance takes rel, abs, lower and upper, or exact; got {dict(raw)!r}")
    if "exact" in given:
        if len(given) > 1 or given["exact"] is not True:
            raise LabelError(f"tolerance 'exact' is true and stands alone; got {dict(raw)!r}")
        return Tolerance()
    numbers = {key: _number(value) for key, value in given.items()}
    if numbers.keys() & {"lower", "upper"}:
        lower, upper = numbers.get("lower"), numbers.get("upper")
        if len(label.values) != 1 or numbers.keys() & {"rel", "abs"}:
            raise LabelError("limits (lower, upper) stand alone and belong to a label of one number")
        if lower is not None and upper is not None and lower > upper:
            raise LabelError(f"the lower limit {lower:g} is above the upper limit {upper:g}")
        tolerance = Tolerance(lower=lower, upper=upper)
        if not tolerance.allows(label.values[0], label.values[0]):
            raise LabelError(f"the label {label.values[0]:g} lies outside its own limits {lower} to {upper}")
        return tolerance
    if any(value < 0 for value in numbers.values()):
        raise LabelError(f"a tolerance cannot be negative: {dict(raw)!r}")
    return Tolerance(numbers.get("rel", 0.0), numbers.get("abs", 0.0))


def _check(label: Label) -> None:
    first, last = label.values[0], label.values[-1]
    dims = label.unit.dims if label.unit is not None else None
    if label.kind in ("range", "interval") and first > last:
        raise LabelError(f"the {label.kind} label runs from {first:g} down to {last:g}")
    if label.kind == "duration" and dims != (("time", 1),):
        raise LabelError(
            "a duration label needs a unit of time (unit 'd', 'h', ... or a label such as '3 weeks 2 days')"
        )
    if label.kind in ("temperature", "temperature_delta") and dims != (("temperature", 1),):
        raise LabelError(f"a {label.kind} label needs the unit °C, °F or K")
    if label.kind == "score" and label.unit is not None and not label.unit.is_plain:
        raise LabelError("a score label has no unit; leave it out or write 'score'")
    if label.kind == "ratio" and len(label.values) == 2 and last == 0:
        raise LabelError("a ratio label cannot end in 0")
    if label.kind == "score" and len(label.values) == 2 and first > last:
        raise LabelError(f"a score of {first:g} out of {last:g} is impossible")
