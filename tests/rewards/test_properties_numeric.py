"""Properties of NumericUnits that must hold for any text."""

import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rewards.base import RewardInput
from rewards.numeric import NumericUnits
from rewards.reading import read
from rewards.units import convert, parse_unit

REWARD = NumericUnits()
KINDS = [
    (5, {"unit": "mg"}),
    (0.25, {"unit": "1"}),
    (25, {"unit": "%"}),
    ([5, 10], {"unit": "mg", "kind": "range"}),
    ([5, 10], {"unit": "mg", "kind": "interval"}),
    ([120, 80], {"unit": "mmHg", "kind": "pair"}),
    (">=65", {"unit": "year", "kind": "inequality"}),
    ("1:320", {"kind": "ratio"}),
    (3, {"kind": "score"}),
    ("2024-04-23", {"kind": "date"}),
    (23, {"unit": "d", "kind": "duration"}),
    (37.0, {"unit": "°C", "kind": "temperature", "tolerance": {"abs": 0.05}}),
]
PIECES = st.sampled_from(
    ["5", "mg", " ", "-", "/", "5 mg", "10", ".", ",", "=", "(", ")", "not ", "or ", "%", "10^9", "×", "e9", "½", "²", "<",
     "≥", "±", ":", "<answer>", "</answer>", "\\boxed{", "}", "The answer is ", "\n", "2024-04-23", "weeks", "°F", "in",
     "'", '"', "$", "\\frac{", "{", "*", "**", "three", "٣", "１", "毫克", "\u202e", "\x00", "to ", "per ", "1,234", "mm Hg"]
)  # fmt: skip
TEXTS = st.text(max_size=120) | st.lists(PIECES, max_size=25).map("".join)
TEMPLATES = st.sampled_from(
    ["<answer>{}</answer>", "\\boxed{{{}}}", "The answer is {}.", '{{"answer": "{}"}}', "The dose is {}.", "{}"]
)
VALUES = st.floats(0.001, 1e6).map(lambda value: float(f"{value:.4g}"))


def score(text, gold, meta):
    return REWARD.score(RewardInput(text, gold, meta=meta))


@settings(deadline=None)
@given(TEXTS, st.sampled_from(KINDS))
def test_never_raises_and_is_the_same_twice(text, label):
    gold, meta = label
    first = score(text, gold, meta)
    assert first.value in (0.0, 1.0)
    assert first == score(text, gold, meta)


@settings(deadline=None)
@given(TEXTS, st.sampled_from(KINDS))
def test_a_text_as_label_is_refused_or_used(text, label):
    meta = label[1]
    problem = REWARD.check_gold(RewardInput("", text, meta=meta))
    result = score("<answer>5</answer>", text, meta)
    assert (result.value is None) == (problem is not None)


@settings(deadline=None)
@given(TEXTS)
def test_reading_never_raises(text):
    reading = read(text)
    assert bool(reading.items) != bool(reading.problem)
    assert all(math.isfinite(value) for item in reading.items for value in item.values)


@settings(deadline=None)
@given(VALUES, VALUES, TEMPLATES, TEMPLATES, st.sampled_from([" ", "\n", " or ", ", "]))
@example(5.0, 6.0, "{}", "{}", "\n")
@example(5.0, 6.0, "The dose is {}.", "The dose is {}.", " ")
def test_a_second_answer_never_raises_the_pay(one, other, first, second, joint):
    assume(abs(one - other) > 0.02 * max(one, other))
    text = first.format(f"{one:g} mg")
    more = text + joint + second.format(f"{other:g} mg")
    # A mark decides over unmarked words before it, so that only the right answer may be followed by a marked one.
    for gold in (one, other) if first == second else (one,):
        meta = {"unit": "mg"}
        assert score(more, gold, meta).value <= score(text, gold, meta).value


@settings(deadline=None)
@example([2.0, 1.0], "/")
@example([3.0, 4.0], "/")
@given(
    st.lists(VALUES, min_size=2, max_size=12), st.sampled_from([", ", " ", " or ", "; ", "/", "-", " and ", "\n", "|"])
)
def test_enumerations_never_pay(values, joint):
    assume(max(values) > 1.03 * min(values))
    text = joint.join(f"{value:g} mg" for value in values)
    for gold in values:
        assert score(f"<answer>{text}</answer>", gold, {"unit": "mg"}).value == 0.0
        assert score(text, gold, {"unit": "mg"}).value == 0.0


@settings(deadline=None)
@given(
    VALUES,
    st.sampled_from([("mg", "g"), ("mmHg", "kPa"), ("mg/dL", "g/L"), ("cm", "in"), ("mcg/kg/min", "mg/kg/h"), ("h", "d"),
                     ("10^9/L", "/µL"), ("mL/min", "L/h"), ("mIU/L", "IU/L"), ("lb", "kg")]),
    TEMPLATES,
)  # fmt: skip
def test_the_same_quantity_in_another_unit_is_paid(value, units, template):
    here, there = units
    other = convert(value, parse_unit(here), parse_unit(there))
    assert score(template.format(f"{other:.6g} {there}"), value, {"unit": here}).value == 1.0
    assert score(template.format(f"{other * 1.02:.6g} {there}"), value, {"unit": here}).value == 0.0


@settings(deadline=None)
@given(VALUES, st.sampled_from(["mmol", "mL", "mmHg", "mg/kg", "mg/L", "%", "IU", "s", "zorks"]), TEMPLATES)
def test_another_dimension_is_never_paid(value, unit, template):
    assert score(template.format(f"{value:g} {unit}"), value, {"unit": "mg"}).value == 0.0


@settings(deadline=None)
@given(VALUES, st.sampled_from([100.0, 0.01, 1000.0, 0.001, -1.0]))
def test_no_free_factor(value, factor):
    for unit in ("%", "1", "mg"):
        assert score(f"<answer>{value * factor:g}</answer>", value, {"unit": unit}).value == 0.0


@settings(deadline=None)
@given(st.integers(0, 10**7))
def test_locales_agree(number):
    grouped = f"{number:,}"
    for text in (grouped, grouped.replace(",", " "), grouped.replace(",", "'"), grouped.replace(",", "\u202f")):
        assert score(f"<answer>{text} mg</answer>", number, {"unit": "mg", "tolerance": {"exact": True}}).value == 1.0


@pytest.mark.parametrize("gold, meta", KINDS, ids=lambda value: str(value)[:40])
def test_a_label_earns_one_on_itself(gold, meta):
    joint = {"range": " to ", "interval": " to ", "pair": "/"}.get(meta.get("kind", ""), "")
    text = joint.join(f"{value:g}" for value in gold) if isinstance(gold, list) else str(gold)
    assert score(f"<answer>{text}</answer>", gold, meta).value == 1.0
