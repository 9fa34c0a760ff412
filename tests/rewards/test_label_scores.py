"""Scores of each label over many sets of labels, from the reward to the table of an evaluation."""

import pytest

from lingshu_rl.eval.runner import _labels
from lingshu_rl.eval.tables import label_table
from rewards import RewardInput, build
from rewards.labels import label_scores

ANSWERS = [
    (["Edema", "Fracture"], "edema, fracture"),
    (["Edema"], "edema, mass"),
    ("Edema; Mass", "fracture"),
    ([], "no finding"),
    (["Mass"], "I cannot say?"),
]


def rows():
    reward = build({"route": {"finding": "LabelSet", "option": "OptionLetter"}})
    given = [RewardInput(f"<answer>{said}</answer>", gold, kind="finding") for gold, said in ANSWERS]
    given.append(RewardInput("<answer>A</answer>", "A", ("CT", "MRI"), kind="option"))
    for sample, result in zip(given, reward.score_batch(given), strict=True):
        yield {
            "kind": sample.kind,
            "gold": sample.gold,
            "parsed": result.parsed,
            "value": result.value,
            "components": result.components,
        }


def test_each_label_has_its_precision_recall_and_f1():
    found = _labels(list(rows()))
    assert found == label_scores((row["gold"], row["parsed"] or ()) for row in rows() if row["kind"] == "finding")
    assert list(found) == ["edema", "mass", "fracture", "no finding"]
    assert found["edema"] == {"n": 3, "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8)}
    assert found["mass"] == {"n": 2, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert found["fracture"] == {"n": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert found["no finding"]["f1"] == 1.0


def test_a_row_has_them_without_the_cost_of_wrong_labels():
    result = build("LabelSet").score(RewardInput("<answer>edema, mass</answer>", ["Edema"]))
    assert result.components == {"label_precision": 0.5, "label_recall": 1.0, "label_f1": pytest.approx(2 / 3)}


def test_the_table_shows_them_and_is_empty_without_any():
    cells = label_table({"benchmarks": {"chest": {"labels": _labels(list(rows()))}, "other": {}}})
    assert cells[0] == ["benchmark", "label", "n", "precision", "recall", "F1"]
    assert cells[1] == ["chest", "edema", "3", "1.000", "0.667", "0.800"]
    assert label_table({"benchmarks": {"other": {}}}) == []
    assert _labels([row for row in rows() if row["kind"] == "option"]) == {}
