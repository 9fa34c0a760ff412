import pytest

from lingshu_rl.demo.reward import ReportFields, demo_spec
from rewards.base import RewardInput
from rewards.compose import build

GOLD = "Modality: MRI. Plane: axial. Level: high. Width: 120 mm."


def value(text, gold=GOLD):
    return ReportFields().score(RewardInput(completion=f"<answer>{text}</answer>", gold=gold)).value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOLD, 1.0),
        ("width: 120 MM. level: high. plane: axial. modality: mri", 1.0),
        ("Modality: MRI. Plane: coronal. Level: high. Width: 120 mm.", 0.75),
        ("Modality: MRI.", 0.25),
        ("Modality: MRI. Plane: axial. Plane: coronal. Level: high. Width: 120 mm.", 0.75),
        (GOLD + " Organ: brain.", 0.8),
        ("MRI axial high 120 mm", 0.0),
        ("", 0.0),
    ],
)
def test_fields_are_counted(text, expected):
    assert value(text) == pytest.approx(expected)


def test_unusable_labels_are_named():
    assert value(GOLD, gold="normal scan") is None
    assert "Name: value" in ReportFields().check_gold(RewardInput("", gold="Plane: axial. Plane: coronal."))


def test_each_field_says_where_it_stands_and_what_it_earned():
    text = "<think> coronal MRI </think><answer> Level: high. Plane: Coronal. Modality: MRI. Organ: brain </answer>"
    result = build(demo_spec()).score(RewardInput(text, gold=GOLD, kind="report"))
    [fields] = {name.rpartition("/")[0] for name in result.spans}
    assert fields == "answer/report" and result.value == pytest.approx(2 / 5)
    found = {
        name.rpartition("/")[2]: [(text[s.start : s.end], s.points) for s in spans]
        for name, spans in result.spans.items()
    }
    whole, half = pytest.approx(1 / 5), pytest.approx(1 / 10)
    assert found == {
        "level": [("Level: high", whole)],
        "plane": [("coronal", 0.0), ("Plane: Coronal", 0.0)],
        "modality": [("MRI", half), ("Modality: MRI", half)],
        "organ": [("Organ: brain", 0.0)],
    }


def test_two_reports_that_differ_earn_nothing():
    text = f"<answer>{GOLD}</answer><answer>Modality: CT.</answer>"
    assert ReportFields().score(RewardInput(text, gold=GOLD)).value == 0.0


def test_the_demo_spec_routes_reports_here():
    reward = build(demo_spec())
    sample = RewardInput(f"<think> x </think><answer>{GOLD}</answer>", gold=GOLD, kind="report")
    result = reward.score(sample)
    assert result.value == 1.0 and result.components["format"] == 1.0  # one word of thought is the demo's format
