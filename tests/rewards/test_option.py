import json
import time
from collections import Counter
from pathlib import Path

import pytest

from rewards import OptionLetter, RewardInput

OWN = Path(__file__).with_name("cases_option.jsonl")
SHARED = Path(__file__).parents[3] / "shared" / "cases" / "option.jsonl"
FILMS = ("Cardiomegaly", "Pleural effusion", "Rib fracture", "Normal chest")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score(completion, gold="B", options=FILMS, reward=None, **kwargs):
    return (reward or OptionLetter()).score(RewardInput(completion, gold, options, **kwargs))


def graded(row):
    meta = {"multi": True} if row.get("multi") else {}
    return score(row["output"], row["gold"], tuple(row["options"]), meta=meta)


def misread(path):
    return [
        f"{row['id']} {row['output'][:80]!r}: want {row['expected_letter']}, got {result.parsed} ({result.reason})"
        for row in rows(path)
        if not row.get("policy_dependent")
        and (result := graded(row))
        and (result.value, result.parsed) != (row["expected_reward"], row["expected_letter"])
    ]


def test_own_cases():
    assert len(rows(OWN)) >= 150
    assert misread(OWN) == []


def test_own_cases_cover_every_category():
    counts = Counter(row["category"] for row in rows(OWN))
    assert len(counts) == 16
    assert min(counts.values()) >= 10


@pytest.mark.skipif(not SHARED.exists(), reason="the shared cases are not here")
def test_shared_cases():
    assert len(misread(SHARED)) <= 1
    assert [row["id"] for row in rows(SHARED) if graded(row).value and not row["expected_reward"]] == []


@pytest.mark.parametrize(
    "gold", ["B", "b", "(B)", "B.", "Pleural effusion", "pleural effusion.", "B. Pleural effusion"]
)
def test_gold_may_be_the_letter_or_the_text(gold):
    assert OptionLetter().check_gold(RewardInput("", gold, FILMS)) is None
    assert score("<answer>B</answer>", gold).value == 1.0
    assert score("<answer>C</answer>", gold).value == 0.0


@pytest.mark.parametrize(
    ("gold", "options", "named"),
    [
        ("E", FILMS, "outside"),
        ("Pneumonia", FILMS, "neither"),
        ("", FILMS, "empty"),
        (None, FILMS, "neither"),
        (True, ("Yes", "No"), "neither"),
        ("A, B", FILMS, "neither"),
        (["A", "B"], FILMS, "multi"),
        ("A. Pleural effusion", FILMS, "neither"),
        ("A", (), "0 options"),
        ("A", ("CT",), "1 options"),
        ("A", ("CT", "CT "), "the same"),
        ("A", ("CT", " "), "empty"),
        ("A", ("B", "A"), "both a letter and the text"),
    ],
)
def test_unusable_gold_is_named_and_masked(gold, options, named):
    sample = RewardInput("<answer>A</answer>", gold, options)
    assert named in OptionLetter().check_gold(sample)
    result = OptionLetter().score(sample)
    assert (result.value, result.status) == (None, "gold_invalid")
    assert named in result.reason


def test_a_numeric_gold_means_the_text():
    assert score("<answer>D</answer>", 4, ("2", "3", "1", "4")).value == 1.0


@pytest.mark.parametrize("gold", ["BD", "DB", "B, D", ["B", "D"], ["Pleural effusion", "D"], {"B", "D"}])
def test_multi_gold_is_a_set(gold):
    sample = RewardInput("<answer>D and B</answer>", gold, FILMS, meta={"multi": True})
    assert OptionLetter().check_gold(sample) is None
    result = OptionLetter().score(sample)
    assert (result.value, result.parsed) == (1.0, "BD")


def test_multi_gold_that_repeats_or_is_empty_is_named():
    assert "twice" in OptionLetter().check_gold(RewardInput("", ["B", "B"], FILMS, meta={"multi": True}))
    assert "empty" in OptionLetter().check_gold(RewardInput("", [], FILMS, meta={"multi": True}))


@pytest.mark.parametrize(
    ("completion", "status", "value"),
    [
        ("The answer is B", "truncated", 0.0),
        ("<think>The answer is", "truncated", 0.0),
        ("<answer>B", "truncated", 0.0),
        ("B", "truncated", 0.0),
        ("<answer>B</answer> and here is wh", "ok", 1.0),
        ("\\boxed{B}", "ok", 1.0),
    ],
)
def test_a_cut_completion_counts_only_with_a_closed_answer(completion, status, value):
    result = score(completion, truncated=True)
    assert (result.status, result.value) == (status, value)


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("", "unparsed"),
        ("I cannot tell.", "unparsed"),
        ("<answer>Z</answer>", "unparsed"),
        ("<answer>B or C</answer>", "conflict"),
        ("<answer>B</answer><answer>C</answer>", "conflict"),
        ("<answer>B. Cardiomegaly</answer>", "conflict"),
        ("The answer is B. " * 500, "conflict"),
    ],
)
def test_no_clear_answer_is_worth_nothing_and_is_not_masked(completion, status):
    result = score(completion)
    assert (result.status, result.value) == (status, 0.0)
    assert result.reason


def test_more_than_ten_options():
    options = tuple(f"Finding number {n}" for n in range(1, 27))
    assert score("<answer>Z</answer>", "Z", options).value == 1.0
    assert score("The answer is K.", "K", options).value == 1.0


HYPO = ("Hypokalemia", "Hyperkalemia", "Hyponatremia", "Normal")
SIDES = ("Left pneumothorax", "Right pneumothorax", "Pleural effusion", "No pleural effusion")


@pytest.mark.parametrize(
    ("said", "options", "letter"),
    [
        ("Pnuemonia", ("Embolism", "Pneumonia", "Fracture"), "B"),
        ("Sarcoidosys", ("Sarcoidosis", "Silicosis", "Tuberculosis"), "A"),
        ("Hypercalemia", HYPO, "B"),
        ("Hypocalcemia", HYPO, None),
        ("Lefd pneumothorax", SIDES, None),
        ("Plural effusion", ("Pneumothorax", "Pleural effusion"), "B"),
        ("Plural effusion", SIDES, None),
        ("Hypocalcaemia", ("Hypokalemia", "Normal"), None),
        ("Pneumothorax", SIDES, None),
        ("Grade 2", ("Grade 1", "Grade 3", "Normal"), None),
        ("Lung", ("Lungs", "Liver"), None),
    ],
)
def test_fuzzy_text_is_off_unless_asked_for_and_guarded(said, options, letter):
    completion = f"<answer>{said}</answer>"
    assert score(completion, "A", options).parsed is None
    assert score(completion, "A", options, OptionLetter(fuzzy=True)).parsed == letter


def test_speed():
    samples = [
        RewardInput(row["output"], row["gold"], tuple(row["options"]), meta={"multi": True} if row.get("multi") else {})
        for row in rows(OWN)
        if len(row["output"]) < 600
    ]
    reward = OptionLetter()
    reward.score_batch(samples)
    best = min(_cpu_seconds(lambda: reward.score_batch(samples)) for _ in range(3))
    # 8-10,000 a second alone on the core; the bound leaves room for a busy machine.
    assert len(samples) / best > 1_500


@pytest.mark.parametrize(
    "unit",
    [
        "<answer>B</answer>",
        "The answer is B. ",
        "B. ",
        "B, ",
        "B and ",
        "A. x\n",
        "B\n",
        "Pleural effusion, ",
        "not B but ",
        "B is correct, ",
        "so B ",
        "if B then C. ",
        "答案是B",
        "Answer: B\n",
        "Cardiomegaly Pleural effusion Rib fracture Normal chest ",
    ],
)
@pytest.mark.parametrize("multi", [False, True])
def test_hostile_text_is_read_in_linear_time(unit, multi):
    text = unit * (20_000 // len(unit))
    for completion in (text, f"<answer>{text}</answer>", f"The answer is {text}"):
        sample = RewardInput(completion, "B", FILMS, meta={"multi": multi})
        best = min(_cpu_seconds(lambda sample=sample: OptionLetter().score(sample)) for _ in range(2))
        assert best < 0.25, f"{best:.3f} s for 20,000 characters of {unit!r}"


def _cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.parametrize(
    "options", [{"A": "CT", "B": "MRI"}, {"b": "MRI", "a": "CT"}, {"A": "CT", "B": "MRI", "C": None}]
)
def test_options_may_be_given_by_letter(options):
    for completion, gold, value in (
        ("<answer>MRI</answer>", "B", 1.0),
        ("<answer>B</answer>", "MRI", 1.0),
        ("A", "B", 0.0),
    ):
        assert OptionLetter().score(RewardInput(completion, gold, options)).value == value


@pytest.mark.parametrize("options", [{"A": "CT", "C": "MRI"}, {0: "CT", 1: "MRI"}, "CT", 5, None])
def test_options_that_are_no_list_of_texts_are_named(options):
    result = OptionLetter().score(RewardInput("<answer>A</answer>", "A", options))
    assert result.status == "gold_invalid" and "options" in result.reason
    assert "options" in OptionLetter().check_gold(RewardInput("", "A", options))
