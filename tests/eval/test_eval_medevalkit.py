"""What MedEvalKit got wrong, by its own code and users, each as a test of this kit (and of the graders it shares)."""

import asyncio
import json

import pytest
from eval_samples import SAMPLES, chat_server, perfect, write_json
from test_eval_benchmarks import evaluate

from lingshu_rl.eval.benchmarks import BENCHMARKS
from lingshu_rl.eval.controls import NORMAL_REPORT
from lingshu_rl.eval.judge import JudgeSettings
from lingshu_rl.eval.loading import load_benchmark
from lingshu_rl.eval.metrics import report_metrics
from lingshu_rl.eval.rescore import render, rescore
from lingshu_rl.eval.runner import Settings, run_evaluation
from lingshu_rl.eval.stats import mean_ci, paired_gain
from lingshu_rl.progress import Progress
from rewards import OptionLetter, ReportEntities, RewardInput, YesNo


@pytest.mark.parametrize("name", ["slake", "path_vqa", "vqa_rad"])
@pytest.mark.parametrize("verdict", [True, False])
def test_a_score_with_a_judge_never_exceeds_100_nor_loses_the_closed_answers(name, verdict, tmp_path):
    """SLAKE came to 160 % and PathVQA to 40 % for perfect answers once the judge was on: it recounted what was counted."""
    SAMPLES[name](tmp_path, name)
    prompts = load_benchmark(BENCHMARKS[name], tmp_path).prompts
    write_json(tmp_path / "o.jsonl", [{"id": p.id, "completion": perfect(p)} for p in prompts])
    with chat_server(lambda body: json.dumps({"same": verdict})) as url:
        settings = Settings(str(tmp_path / "o.jsonl"), (BENCHMARKS[name],), tmp_path / "run", data=str(tmp_path), controls=(), judge=JudgeSettings(url))  # fmt: skip
        scores = asyncio.run(run_evaluation(settings, Progress(quiet=True)))["benchmarks"][name]
    assert scores["accuracy"] == 1.0 and scores["n"] == len(prompts)
    assert scores["judge"]["accuracy"] == float(verdict)
    assert scores["judge"]["n"] == sum(p.kind == "open" for p in prompts)


CORRECT = ["B", "b", "(B)", "B.", "B) heparin", "The answer is B.", "Answer: B", "**Answer:** B", "heparin", "Heparin.", "The correct option is (B).",
           "<think>Not A, since aspirin is no anticoagulant.</think><answer>B</answer>", "Final answer: B. heparin", "\\boxed{B}", "Option B is correct."]  # fmt: skip
NO_ANSWER = ["", "I do not know.", "It depends on the patient.", "A or B", "Aspirin or heparin", "The image shows a chest radiograph.", "A, B, C and D are all possible.",
             "None of these can be told from the image.", "Please provide the image.", "heparin? warfarin?", "Let us consider each option in turn."]  # fmt: skip
OPTIONS = ("aspirin", "heparin", "warfarin", "insulin")


@pytest.mark.parametrize("text", CORRECT)
def test_correctly_phrased_letters_are_read(text):
    """Its parser accepted 71.8 % of them."""
    assert OptionLetter().score(RewardInput(text, gold="B", options=OPTIONS)).value == 1.0


@pytest.mark.parametrize("text", NO_ANSWER)
@pytest.mark.parametrize("gold", "ABCD")
def test_a_text_without_an_answer_is_credited_with_none(text, gold):
    """Its fallback took the most similar option: a quarter of such texts were right by chance."""
    assert OptionLetter().score(RewardInput(text, gold=gold, options=OPTIONS)).value == 0.0


@pytest.mark.parametrize("text", ["A nodule is seen.", "nodular", "It is noted that the heart is large.", "Unknown", "abnormal", "yesterday's film"])  # fmt: skip
@pytest.mark.parametrize("gold", ["yes", "no"])
def test_yes_and_no_are_words_and_not_parts_of_words(text, gold):
    """It asked whether "no" was somewhere in the text: "nodule" was a no."""
    result = YesNo().score(RewardInput(text, gold=gold))
    assert result.value == 0.0 and result.status == "unparsed"


@pytest.mark.parametrize("name", ["slake", "vqa_rad", "medmcqa", "medcalc", "iu_xray"])
def test_an_empty_answer_ends_nothing(name, tmp_path):
    """One empty answer ended the whole benchmark."""
    first = []
    scores = evaluate(name, tmp_path, lambda p: perfect(p) if first or first.append(p.id) else "")
    assert scores["n"] == scores["asked"] and scores["unread"] == 1
    assert scores["accuracy"] == pytest.approx(1 - 1 / scores["n"])


def test_the_constant_normal_report_is_a_control_and_does_not_beat_a_real_report(shared_data):
    """A constant report beat Lingshu-7B and 32B on IU X-ray by ROUGE-L.

    The real report here is the radiologists' own impression against their whole report. ROUGE-L prefers the constant one.
    """
    import csv

    with (shared_data / "data" / "openi_reports" / "indiana_reports.csv").open(encoding="utf-8") as lines:
        rows = [r for r in csv.DictReader(lines) if r["findings"] and r["impression"]][:150]
    references = [f"{r['findings']}\n{r['impression']}" for r in rows]
    real, constant = [r["impression"] for r in rows], [NORMAL_REPORT] * len(rows)

    def headline(reports):
        return [ReportEntities().score(RewardInput(a, gold=b, kind="report")).value for a, b in zip(reports, references, strict=True)]  # fmt: skip

    by_real, by_constant = headline(real), headline(constant)
    assert mean_ci(by_real)["accuracy"] > mean_ci(by_constant)["accuracy"] + 0.1
    assert paired_gain(by_constant, by_real)["ci95"][0] > 0
    labels = [report_metrics(references, reports, ["labels"])["label_f1_macro"] for reports in (real, constant)]
    assert labels[0] > 5 * labels[1]
    pytest.importorskip("rouge_score")
    rouge = [report_metrics(references, reports, ["rouge_l"])["rouge_l"] for reports in (real, constant)]
    assert rouge[1] > rouge[0], "ROUGE-L was fooled by the constant report when this was written"


def test_a_model_that_gives_the_normal_report_is_marked(tmp_path):
    scores = evaluate("iu_xray", tmp_path, lambda p: NORMAL_REPORT)
    assert scores["not_beaten"] == ["normal_report"] and scores["controls"]["normal_report"]["above"]["points"] == 0
    table = (tmp_path / "run" / "table.md").read_text()
    assert "normal report" in table and "†" in table and "(control)" in table


@pytest.mark.parametrize("name", ["mmlu_med", "iu_xray", "mmmu_medical", "supergpqa_medicine", "healthbench"])
def test_the_benchmarks_that_did_not_run_there_run_here(name, tmp_path):
    """MMLU and Radrestruct lacked a file, MMMU's test split has no answers, a missing comma hid SuperGPQA and HealthBench."""
    assert evaluate(name, tmp_path, perfect)["accuracy"] == 1.0


def test_labels_of_an_unpublished_split_are_not_scored(tmp_path):
    from eval_samples import write_parquet

    SAMPLES["mmmu_medical"](tmp_path, "mmmu_medical")
    row = {"id": "test_1", "question": "?", "options": "['a', 'b']", "answer": "?", "question_type": "multiple-choice"}
    write_parquet(tmp_path / "mmmu_medical" / "Pharmacy" / "validation-00000-of-00001.parquet", [row])
    found = load_benchmark(BENCHMARKS["mmmu_medical"], tmp_path)
    assert len(found.prompts) == 2 and "its answer is not published" in [reason for _, reason in found.excluded]


def test_what_a_score_depends_on_is_stored(tmp_path):
    """Its users could not reproduce its scores: no seed, prompt, judge or commit was kept."""
    evaluate("slake", tmp_path, perfect)
    stored = json.loads((tmp_path / "run" / "slake" / "provenance.json").read_text())
    assert {"seed", "prompt", "prompt_hash", "model_hash", "data_hash", "max_tokens", "temperature", "engine"} <= set(stored["inputs"])  # fmt: skip
    assert {"grader", "commit", "versions", "judge"} <= set(stored)


def test_its_stored_outputs_are_graded_again(tmp_path):
    rows = [
        {"question": "Is there a fracture?", "answer": "no", "response": "A nodule is seen.", "correct": True},
        {"question": "Is there a fracture?", "answer": "Yes", "response": "<answer>yes</answer>", "correct": False},
        {"question": "Which plane?", "answer": "axial", "response": "", "correct": False},
        {"question": "Which drug?", "choices": ["A. aspirin", "B. heparin"], "answer": "B", "response": "I cannot say.", "correct": True},
    ]  # fmt: skip
    write_json(tmp_path / "results.json", rows)
    found = rescore(tmp_path / "results.json")
    assert found["finish_unknown"] == 4 and "do not say" in render(found)
    assert found["form"] == "medevalkit" and found["all"]["accuracy"] == 0.25 and found["before"] == 0.5
    assert found["newly_wrong"] == ["1", "4"] and found["newly_right"] == ["2"]


def test_outputs_with_letter_labels_and_no_options_are_graded_as_letters(tmp_path):
    asked = "Which finding?\nA. Edema\nB. Mass\nC. Nodule"
    rows = [
        {
            "question": asked,
            "ground_truth": "B",
            "output": "The answer is B. Mass",
            "is_correct": False,
            "finish_reason": "stop",
        },
        {
            "question": asked,
            "ground_truth": "B",
            "output": "The answer is B. Edema",
            "is_correct": True,
            "finish_reason": "stop",
        },
        {
            "question": "See the image.",
            "ground_truth": "(B)",
            "output": "B. Something",
            "is_correct": True,
            "truncated": False,
        },
        {
            "question": "See the image.",
            "ground_truth": "B",
            "output": "A fracture is seen.",
            "is_correct": False,
            "truncated": False,
        },
        {
            "question": "See the image.",
            "ground_truth": "B",
            "output": "The answer is B",
            "is_correct": True,
            "finish_reason": "length",
        },
        {
            "question": "Which organ?",
            "ground_truth": "liver",
            "output": "liver",
            "is_correct": True,
            "stop_reason": "end_turn",
        },
    ]
    (tmp_path / "o.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = rescore(tmp_path / "o.jsonl")
    stored = [json.loads(line) for line in (tmp_path / "o.rescored.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["value"]) for row in stored] == [
        ("option", 1.0),
        ("option", 0.0),
        ("option", 1.0),
        ("option", 0.0),
        ("option", 0.0),
        ("open", 1.0),
    ]
    assert (
        stored[4]["status"] == "truncated" and found["before"] == pytest.approx(4 / 6) and found["finish_unknown"] == 0
    )
