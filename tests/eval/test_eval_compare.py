"""Comparing two evaluations, and grading other tools' outputs again."""

import json

import numpy as np
import pytest
from eval_samples import write_json
from scipy import stats

from lingshu_rl.cli import main
from lingshu_rl.eval.benchmarks import EvalError
from lingshu_rl.eval.compare import compare, mcnemar, paired_p, sign_flip
from lingshu_rl.eval.rescore import plain, rescore


def write_run(folder, **benchmarks):
    for name, values in benchmarks.items():
        rows = [{"condition": c, "id": str(i), "value": v, "image": ""} for c in ("main", "blank") for i, v in enumerate(values)]  # fmt: skip
        write_json(folder / name / "results.jsonl", rows)
    return folder


@pytest.mark.parametrize("gained,lost", [(0, 0), (5, 0), (10, 2), (3, 9), (7, 7), (40, 20)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    wanted = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(wanted)


def test_whole_images_are_flipped_where_questions_share_one():
    before, after = [0.0] * 40, [1.0] * 10 + [0.0] * 30
    alone, test = paired_p(before, after, [""] * 40)
    assert test == "exact McNemar" and alone < 0.01
    together, test = paired_p(before, after, ["one"] * 10 + [f"i{i}" for i in range(30)])
    assert test == "sign flips by image" and together == 1.0  # ten answers about one image are one observation
    assert paired_p([0.2, 0.4], [0.3, 0.1], ["a", "b"])[1] == "sign flips by image"


def test_sign_flips_agree_with_an_exact_count():
    differences = np.array([3.0, 2.0, 1.0, 1.0])
    exact = np.mean([abs(sum(d if bit else -d for d, bit in zip(differences, np.binary_repr(k, 4), strict=True) for bit in [int(bit)])) >= 7 for k in range(16)])  # fmt: skip
    assert sign_flip(differences, ["", "", "", ""]) == pytest.approx(exact, abs=0.02)
    assert sign_flip(np.zeros(5), [""] * 5) == 1.0


def test_two_runs_are_compared_question_by_question(tmp_path, capsys):
    one = write_run(tmp_path / "one", slake=[0.0] * 30 + [1.0] * 30, vqa_rad=[1.0, 0.0, None, 1.0], only=[1.0])
    two = write_run(tmp_path / "two", slake=[1.0] * 25 + [0.0] * 5 + [1.0] * 30, vqa_rad=[1.0, 0.0, 1.0])
    result = compare(one, two)
    slake, rad = result["benchmarks"]["slake"], result["benchmarks"]["vqa_rad"]
    assert slake["difference"]["points"] == pytest.approx(100 * 25 / 60) and slake["p"] < 1e-6
    assert slake["p_holm"] == pytest.approx(2 * slake["p"]) and rad["p"] == 1.0
    assert rad["difference"]["n"] == 2 and rad["difference"]["not_judged"] == 1 and rad["only_in_one"] == 1
    assert any("only is only in" in w for w in result["warnings"]) and any("1 questions" in w for w in result["warnings"])  # fmt: skip
    assert main(["eval", "compare", str(one), str(two)]) == 0
    shown = capsys.readouterr().out
    assert "slake" in shown and "<0.001" in shown and "exact McNemar" in shown and "note: " in shown
    for form, mark in (("markdown", "|---|"), ("html", "<table>"), ("latex", r"\begin{tabular}"), ("json", '"p_holm"')):
        target = tmp_path / form
        assert main(["eval", "compare", str(one), str(two), "--format", form, "--out", str(target)]) == 0
        assert mark in target.read_text()


def test_a_difference_in_how_it_was_measured_is_said(tmp_path):
    folders = [write_run(tmp_path / name, slake=[1.0, 0.0]) for name in ("one", "two")]
    for folder, prompt in zip(folders, ("aa", "bb"), strict=True):
        provenance = {"inputs": {"prompt_hash": prompt, "data_hash": "d", "seed": 1}, "grader": prompt}
        (folder / "slake" / "provenance.json").write_text(json.dumps(provenance))
    warnings = compare(*folders)["warnings"]
    assert any("prompt_hash: 'aa' -> 'bb'" in w for w in warnings) and any("grader" in w for w in warnings)


def test_training_runs_and_files_of_rows_are_compared_too(tmp_path):
    for name, value in (("one", 0.0), ("two", 1.0)):
        write_json(tmp_path / name / "eval" / "after.jsonl", [{"id": str(i), "value": value, "image": ""} for i in range(9)])  # fmt: skip
    assert compare(tmp_path / "one", tmp_path / "two")["benchmarks"]["held_out"]["difference"]["points"] == 100
    file = tmp_path / "one" / "eval" / "after.jsonl"
    assert compare(file, file)["benchmarks"]["after"]["p"] == 1.0


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    one = write_run(tmp_path / "one", slake=[1.0])
    (tmp_path / "empty").mkdir()
    assert main(["eval", "compare", str(one), str(tmp_path / "empty")]) == 2
    assert "holds no finished evaluation" in capsys.readouterr().err
    with pytest.raises(EvalError, match="share no benchmark"):
        compare(one, write_run(tmp_path / "two", vqa_rad=[1.0]))
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "value": 1}\nnot json\n')
    with pytest.raises(EvalError, match=r"bad\.jsonl, line 2"):
        compare(tmp_path / "bad.jsonl", one)


def test_lmms_eval_samples_are_graded_again(tmp_path, capsys):
    rows = [
        {"doc_id": 0, "doc": {"question": "Which?", "options": ["CT", "MRI"]}, "target": "B", "resps": [["The answer is B"]], "exact_match": 0.0},
        {"doc_id": 1, "doc": {"question": "Is it?"}, "target": "yes", "resps": [["No."]], "filtered_resps": ["no"], "exact_match": 0.0},
        {"doc_id": 2, "doc": {"question": "Where?"}, "target": "left lung", "resps": [["<answer>the left lung</answer>"]]},
    ]  # fmt: skip
    write_json(tmp_path / "samples.jsonl", rows)
    found = rescore(tmp_path / "samples.jsonl")
    assert found["form"] == "lmms-eval" and found["all"]["accuracy"] == pytest.approx(2 / 3) and found["compared"] == 2
    assert found["newly_right"] == ["0"] and set(found["by_kind"]) == {"option", "yesno", "open"}
    assert main(["eval", "rescore", str(tmp_path / "samples.jsonl"), "--out", str(tmp_path / "graded.jsonl")]) == 0
    assert "lmms-eval outputs, graded again" in capsys.readouterr().out
    graded = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text().splitlines()]
    assert [r["value"] for r in graded] == [1.0, 0.0, 1.0] and compare(tmp_path / "graded.jsonl", tmp_path / "graded.jsonl")  # fmt: skip


def test_plain_rows_of_every_kind(tmp_path):
    rows = [
        {"id": "n", "question": "BP?", "answer": 120, "unit": "mmHg", "kind": "numeric", "output": "120 mmHg"},
        {"id": "m", "question": "Which?", "options": {"A": "x", "B": "y", "C": "z"}, "answer": "A,C", "prediction": "A, C"},
        {"id": "t", "question": "Which?", "option_A": "x", "option_B": "y", "answer": "y", "completion": "B"},
        {"id": "i", "question": "Which?", "choices": ["x", "y"], "answer": 1, "completion": "A"},
        {"id": "r", "findings": "There is a left pleural effusion.", "impression": "", "completion": "Left pleural effusion."},
        {"id": "bad", "question": "Which?", "options": ["x", "y"], "answer": "q", "completion": "A"},
        {"id": "none", "question": "Which?", "answer": "q"},
    ]  # fmt: skip
    write_json(tmp_path / "plain.jsonl", rows)
    found = rescore(tmp_path / "plain.jsonl")
    values = {r["id"]: r["value"] for r in map(json.loads, (tmp_path / "plain.rescored.jsonl").read_text().splitlines())}  # fmt: skip
    assert values == {"n": 1.0, "m": 1.0, "t": 1.0, "i": 0.0, "r": 1.0}
    assert len(found["unusable"]) == 2 and "row 7: has no output" in found["unusable"][1]


def test_files_of_another_form_are_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text('[{"x": 1}]')
    assert main(["eval", "rescore", str(tmp_path / "a.json")]) == 2
    assert "hold none of completion" in capsys.readouterr().err
    (tmp_path / "b.json").write_text("[1, 2]")
    with pytest.raises(EvalError, match="a record is a JSON object, this one a int"):
        rescore(tmp_path / "b.json")
    with pytest.raises(EvalError, match="--kind: unknown kind 'tetx'"):
        rescore(tmp_path / "a.json", "tetx")
    assert plain("plain", {"answer": "x", "completion": None, "question": "q"}, 4, None)["completion"] == ""
