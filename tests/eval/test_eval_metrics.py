"""Report metrics: kept libraries, the 14 labels by rule, and model-based ones refused by the weight that is missing."""

import shutil

import pytest
from eval_samples import ILL, NORMAL

from lingshu_rl.eval import metrics
from lingshu_rl.eval.benchmarks import EvalError
from lingshu_rl.eval.metrics import (
    NO_FINDING,
    chexpert_labels,
    choose_metrics,
    label_f1,
    missing,
    report_metrics,
)
from rewards.judge import reply_text

WORDS = ["rouge_l", "bleu", "cider"]
OTHER = "Endotracheal tube above the carina. Right apical pneumothorax."


def test_labels_follow_assertion():
    assert chexpert_labels(NORMAL) == {NO_FINDING}
    assert {"Pleural Effusion", "Cardiomegaly", "Consolidation"} <= chexpert_labels(ILL)
    assert "Pneumothorax" not in chexpert_labels(ILL) and NO_FINDING not in chexpert_labels(ILL)
    assert chexpert_labels(OTHER) == {"Support Devices", "Pneumothorax"}
    assert chexpert_labels("Pacemaker in place. No effusion.") == {"Support Devices", NO_FINDING}
    assert chexpert_labels("") == chexpert_labels("Thank you.") == frozenset()


def test_label_f1_counts_what_is_said_and_what_is_missed():
    found = label_f1([ILL, NORMAL, OTHER], [ILL, NORMAL, OTHER])
    assert found["label_f1_micro"] == found["label_f1_macro"] == 1.0
    constant = label_f1([ILL, NORMAL, OTHER], [NORMAL] * 3)
    assert constant["label_f1_macro"] < 0.2 and constant["label_f1"][NO_FINDING] == pytest.approx(0.5)
    assert label_f1([ILL], [""])["label_f1_micro"] == 0.0


@pytest.mark.parametrize("metric", WORDS)
def test_word_metrics_come_from_libraries(metric):
    pytest.importorskip("rouge_score")
    references = [ILL, NORMAL, OTHER]
    perfect = report_metrics(references, references, [metric])[metric]
    mixed = report_metrics(references, references[::-1], [metric])[metric]
    assert perfect == pytest.approx(10.0 if metric == "cider" else 1.0) and 0 <= mixed < perfect
    assert report_metrics(references, ["", "", ""], [metric])[metric] == 0.0
    assert report_metrics(references, [f"<think>x</think><answer>{r}</answer>" for r in references], [metric])[metric] == pytest.approx(perfect)  # fmt: skip


@pytest.mark.slow
def test_meteor_runs_where_java_is():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no Java here")
    found = report_metrics([ILL, NORMAL], [ILL, OTHER], ["meteor"])["meteor"]
    assert 0.3 < found < 0.9


def test_meteor_without_java_is_refused(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    with pytest.raises(EvalError, match="Java"):
        choose_metrics("meteor")
    assert "meteor" not in choose_metrics("auto") and "labels" in choose_metrics("auto")


@pytest.mark.parametrize("metric,weight", [("ratescore", "RaTE-NER"), ("radgraph", "RRG_scorers"), ("chexbert", "bert-base"), ("green", "GREEN-radllama2"), ("radcliq", "distilroberta")])  # fmt: skip
def test_a_model_based_metric_is_refused_with_the_missing_weights_name(metric, weight, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EvalError, match=weight):
        choose_metrics(f"rouge_l,{metric}" if not missing("rouge_l") else metric)
    with pytest.raises(EvalError, match=weight):
        report_metrics([ILL], [ILL], [metric])


def test_a_model_based_metric_with_its_weights_asks_radeval(monkeypatch, tmp_path):
    import sys
    import types

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for weight in metrics.MODELS["ratescore"].weights:
        (tmp_path / f"models--{weight.replace('/', '--')}" / "snapshots" / "abc").mkdir(parents=True)
    asked = {}

    class RadEval:
        def __init__(self, metrics, show_progress):
            asked["metrics"] = metrics

        def __call__(self, refs, hyps):
            asked.update(refs=refs, hyps=hyps)
            return {"ratescore": 0.625}

    fake = types.ModuleType("radeval")
    fake.RadEval, fake.__spec__ = RadEval, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "radeval", fake)
    assert report_metrics([ILL], [NORMAL], ["ratescore"]) == {"ratescore": 0.625}
    assert asked == {"metrics": ["ratescore"], "refs": [ILL], "hyps": [NORMAL]}


def test_unknown_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(EvalError, match="unknown report metric 'rogue'"):
        choose_metrics("rogue")
    monkeypatch.setitem(metrics.WORDS, "bleu", (metrics.bleu, "no_such_package"))
    with pytest.raises(EvalError, match=r"bleu needs no_such_package: pip install 'lingshu-rl\[eval\]'"):
        choose_metrics("bleu")


def test_the_report_is_what_the_answer_holds():
    assert reply_text("<think>hm</think><answer>Clear lungs.</answer>") == "Clear lungs."
    assert reply_text(NORMAL) == NORMAL and reply_text("") == ""
