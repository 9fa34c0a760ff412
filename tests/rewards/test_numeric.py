"""NumericUnits: own cases, the shared ones where they are, label errors, channels, and real labels."""

import csv
import json
import sys
import time
from pathlib import Path

import pytest

from rewards.base import RewardInput
from rewards.dates import find_dates
from rewards.numbers import clean, match_number, spell_digits
from rewards.numeric import NumericUnits

HERE = Path(__file__).parent
ROWS = [json.loads(line) for line in (HERE / "cases_numeric.jsonl").read_text(encoding="utf-8").splitlines()]
REWARD = NumericUnits()


def sample(row):
    meta = {
        "kind": row["gold_kind"],
        "tolerance": row["tolerance"],
        "unit": row["gold_unit"],
        "analyte": row["analyte"],
    }
    meta["unit_policy"] = row.get("unit_policy")
    return RewardInput(
        row["output"], row["gold"], meta={key: value for key, value in meta.items() if value is not None}
    )


def pay(completion, gold, unit=None, *, truncated=False, **meta):
    if unit is not None:
        meta["unit"] = unit
    return REWARD.score(RewardInput(completion, gold, truncated=truncated, meta=meta))


def answered(text, gold, unit=None, **meta):
    return pay(f"<answer>{text}</answer>", gold, unit, **meta)


def test_there_are_enough_own_cases():
    assert len({row["id"] for row in ROWS}) == len(ROWS) >= 150


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_own_case(row):
    result = REWARD.score(sample(row))
    assert result.value == row["expected_reward"], f"{row['output'][:80]!r} for {row['gold']!r}: {result}"


def test_shared_cases(shared_data):
    path = shared_data / "cases" / "numeric.jsonl"
    if not path.is_file():
        pytest.skip("no shared cases")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    firm = [row for row in rows if not row["policy_dependent"]]
    values = {row["id"]: REWARD.score(sample(row)).value for row in rows}
    wrong = [row["id"] for row in firm if values[row["id"]] != row["expected_reward"]]
    false_payments = [row["id"] for row in firm if values[row["id"]] != 0.0 and row["expected_reward"] == 0.0]
    assert false_payments == []
    assert len(wrong) <= 1, wrong


def test_real_medcalc_labels_earn_one_on_themselves(shared_data):
    path = shared_data / "data" / "medcalc" / "medcalc_corrected_half.csv"
    if not path.is_file():
        pytest.skip("no MedCalc rows")
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    refused = set()
    for row in rows:
        gold = row["Ground Truth Answer"]
        meta = {}
        if "/" not in gold:
            meta["tolerance"] = {"lower": float(row["Lower Limit"]), "upper": float(row["Upper Limit"])}
        if REWARD.check_gold(RewardInput("", gold, meta=meta)) is not None:
            refused.add(gold)
            continue
        for template in ("<answer>{}</answer>", "\\boxed{{{}}}", "The answer is {}.", "{}"):
            result = pay(template.format(gold), gold, **meta)
            assert result.value == 1.0, (template, gold, result)
    assert refused == {"N/A"}


@pytest.mark.parametrize(
    "gold, meta, told",
    [
        (None, {}, "no number"),
        (True, {}, "no number"),
        (float("nan"), {}, "finite"),
        ("N/A", {}, "no single quantity"),
        ("5 or 6 mg", {}, "several"),
        ("12/15", {}, "set meta 'kind'"),
        ([5, 10], {}, "kind"),
        ([5], {"kind": "range"}, "two numbers"),
        ([10, 5], {"kind": "range"}, "down to"),
        (5, {"kind": "range"}, "single number"),
        (5, {"kind": "scaler"}, "scalar"),
        (5, {"unit": "mgg/dL"}, "unknown unit"),
        (5, {"unit": 7}, "unit must be"),
        ("5 mg", {"unit": "mL"}, "dimension"),
        ("5 zorks", {}, "unknown unit"),
        (5, {"unit_policy": "strict"}, "require"),
        (5, {"analyte": 3}, "analyte"),
        (5, {"tolerance": 0.01}, "mapping"),
        (5, {"tolerance": {}}, "rel, abs"),
        (5, {"tolerance": {"relative": 0.1}}, "rel, abs"),
        (5, {"tolerance": {"rel": -1}}, "negative"),
        (5, {"tolerance": {"exact": True, "rel": 0.1}}, "alone"),
        (5, {"tolerance": {"lower": 6, "upper": 7}}, "outside its own limits"),
        (5, {"tolerance": {"lower": 7, "upper": 3}}, "above the upper"),
        ([5, 10], {"kind": "range", "tolerance": {"lower": 3}}, "limits"),
        (5, {"kind": "duration"}, "unit of time"),
        (5, {"kind": "temperature", "unit": "mg"}, "°C"),
        (5, {"kind": "score", "unit": "mg"}, "no unit"),
        ("15/12", {"kind": "score"}, "impossible"),
        ("1:0", {"kind": "ratio"}, "end in 0"),
        ("2024-02-30", {"kind": "date"}, "2024-04-23"),
        ("April 2024", {"kind": "date"}, "2024-04-23"),
        ("x +", {"kind": "symbolic"}, "cannot be read"),
        (5, {"kind": "symbolic"}, "expression as text"),
    ],
)
def test_unusable_labels_are_named_and_masked(gold, meta, told):
    row = RewardInput("<answer>5</answer>", gold, meta=meta)
    assert told in (REWARD.check_gold(row) or "")
    result = REWARD.score(row)
    assert (result.value, result.status) == (None, "gold_invalid")


def test_a_label_with_its_own_unit_needs_no_other():
    assert REWARD.check_gold(RewardInput("", "5 mg")) is None
    assert answered("0.005 g", "5 mg").value == 1.0
    assert answered("5 mL", "5 mg").value == 0.0
    assert answered("0.005 g", "5 mg", "µg").value == 1.0


@pytest.mark.parametrize(
    "gold, answer",
    [("3 weeks 2 days", "23 days"), (">=65 years", "65 years or older"), ("5-10 mg", "5 to 10 mg"),
     ("1:320", "1/320"), ("04/23/2024", "April 23, 2024"), ("37.5 °C", "99.5 °F")],
)  # fmt: skip
def test_the_kind_of_a_text_label_is_inferred(gold, answer):
    assert answered(answer, gold).value == 1.0


def test_statuses():
    assert pay("no idea", 5, "mg").status == "unparsed"
    assert pay("<answer>5 mg</answer><answer>6 mg</answer>", 5, "mg").status == "conflict"
    assert pay("<answer>5 or 6 mg</answer>", 5, "mg").status == "conflict"
    assert pay("<answer>6 mg</answer>", 5, "mg").status == "ok"
    assert pay("<answer>9 + 9</answer>", 18, "1").status == "unparsed"
    assert pay("the dose is 5", 5, "mg", truncated=True).status == "truncated"
    assert pay("<answer>5 mg</answer> and so", 5, "mg", truncated=True).value == 1.0


def test_parsed_is_in_the_unit_of_the_label():
    assert answered("0.006 g", 5, "mg").parsed == pytest.approx(6.0)
    assert answered("16/10 kPa", [120, 75], "mmHg", kind="pair").parsed == pytest.approx((120.0, 75.0), rel=1e-3)
    assert answered("April 23, 2024", "2024-04-23", kind="date").parsed == "2024-04-23"


@pytest.mark.parametrize("mark", ["\\boxed{%s} %s", "$\\boxed{%s}\\ \\text{%s}$", "<answer>%s</answer> %s."])
def test_a_unit_behind_the_mark_counts(mark):
    assert pay(mark % ("5", "mg"), 5, "mg", unit_policy="require").value == 1.0
    assert pay(mark % ("5", "g"), 5, "mg").value == 0.0


def test_defaults_of_the_reward():
    strict = NumericUnits(tolerance={"exact": True}, unit_policy="require")
    row = RewardInput("<answer>5.01 mg</answer>", 5, meta={"unit": "mg"})
    assert REWARD.score(row).value == 1.0 and strict.score(row).value == 0.0
    row = RewardInput("<answer>5</answer>", 5, meta={"unit": "mg"})
    assert REWARD.score(row).value == 1.0 and strict.score(row).value == 0.0
    with pytest.raises(ValueError, match="unit_policy"):
        NumericUnits(unit_policy="lenient")
    with pytest.raises(ValueError, match="rel, abs"):
        NumericUnits(tolerance={"percent": 1})


def test_a_long_text_without_a_mark_is_no_answer():
    assert pay("The dose is 5 mg.", 5, "mg").value == 1.0
    assert pay("step\n" * 60 + "The dose is 5 mg.", 5, "mg").value == 0.0


@pytest.mark.parametrize(
    "text",
    ["For a body surface of 1.8 m2, the dose is 5 mg.", "The dose is 5 mg for a body surface of 1.8 m2.",
     "The dose is 5 mg every 8 hours for 7 days.", "The surface is 1.8 m2, so the dose is 5 mg."],
)  # fmt: skip
def test_premises_of_another_dimension_are_no_answers(text):
    assert answered(text, 5, "mg").value == 1.0
    assert answered(text.replace("m2", "mg"), 5, "mg").value == 0.0 or "m2" not in text


@pytest.mark.parametrize(
    "text, value",
    [("1.2×10⁹", 1.2e9), ("1.2e9", 1.2e9), ("1.2 x 10^9", 1.2e9), ("1.2*10**9", 1.2e9), ("1.2 × 10^{9}", 1.2e9),
     ("1.2E+09", 1.2e9), ("1.2 billion", 1.2e9), ("12,34,567", 1234567), ("1.234,5", 1234.5), ("1 234,5", 1234.5),
     ("1'234.5", 1234.5), ("2 1/2", 2.5), ("٣٫٥", 3.5), ("10^-3", 1e-3), ("1.5 crore", 1.5e7), (".5", 0.5)],
)  # fmt: skip
def test_number_spellings(text, value):
    assert match_number(clean(text), 0).value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["1,200.5.3", "1,2,3", "1_000", "1e999999", "10^99999999999", "1e-400", "9" * 400, "1.2.3"]
)
def test_malformed_numbers(text):
    assert match_number(clean(text), 0) is None


def test_number_words():
    assert spell_digits("three weeks and two days") == "3 weeks and 2 days"
    assert spell_digits("one hundred and twenty-five thousand") == "125000"
    assert spell_digits("five six") == "five six"


def test_dates_without_a_known_order():
    assert find_dates("03/04/2024") is None
    assert find_dates("03/04/2024", "dmy")[0].isoformat() == "2024-04-03"
    assert find_dates("13/04/2024", "mdy")[0].isoformat() == "2024-04-13"
    assert find_dates("02/30/2024") is None and find_dates("no date") is None and find_dates("soon") == ()


FRAGMENTS = ["1", "12 ", "1,234", "5 mg", "5/", "5-", "(", "^", "10^9", "x10^", "1 234 ", "mg/dL", "2 1/", "\\frac{", "{",
             "\\text{", "$", "**", "<", "<sup>", "e5", ".", ",", "'", '"', "5'", "°", "three ", "hundred and ", "2024-",
             "April ", "at least ", "(normal ", "٣", "²", "a", "\n", "<answer>5</answer>", "\\boxed{5}", "± ", "kg·"]  # fmt: skip


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_no_text_of_20_kb_takes_long(fragment):
    body = (fragment * 20_000)[:20_000]
    rows = [
        RewardInput(template % body, gold, meta={"kind": kind, **meta})
        for template in ("%s", "<answer>%s</answer>")
        for gold, kind, meta in ((5, "scalar", {"unit": "mg"}), ("2024-04-23", "date", {}), ("x+1", "symbolic", {}))
    ]
    rows += [RewardInput(f"<answer>{body[:1900]}</answer>", 5, meta={"unit": "mg"})]
    REWARD.score(rows[0])
    for row in rows:
        times = []
        for _ in range(3):
            start = time.process_time()
            REWARD.score(row)
            times.append(time.process_time() - start)
        assert min(times) < 0.5, (fragment, row.meta, min(times))


def test_hostile_text_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def watch(event, arguments):
        if active and event.split(".")[0] in ("open", "subprocess", "os", "socket", "exec", "compile", "import"):
            seen.append((event, arguments))

    active = False
    sys.addaudithook(watch)
    texts = ["__import__('os').system('touch pwned')", "open('pwned','w').write('1')#\\pi", "5 if exec('1') else 5",
             "eval('5')", "5;import os", "{{5}}", "${5}", "5`touch pwned`"]  # fmt: skip
    for text in texts:
        answered(text, 5, "mg")  # warm: tables are read once
    active = True
    for text in texts:
        answered(text, 5, "mg")
        pay(f"\\boxed{{{text}}}", 5, "mg")
    active = False
    assert seen == [] and list(tmp_path.iterdir()) == []
