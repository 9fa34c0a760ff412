"""Report metrics beside the headline score (ReportEntities): words in common, findings, the 14 CheXpert labels.

Word overlap comes from kept libraries: rouge-score (ROUGE-L), sacrebleu (BLEU), pycocoevalcap (CIDEr, and METEOR 1.5,
which needs Java). They are the optional extra `lingshu-rl[eval]`. Model-based metrics come from RadEval and need its
weights on this machine.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lingshu_rl.eval.benchmarks import EvalError
from rewards.judge import reply_text
from rewards.report import ReportLabels

NO_FINDING = "No Finding"
LABELS = ReportLabels("chexpert_14").names


@lru_cache(maxsize=8192)
def chexpert_labels(report: str) -> frozenset[str]:
    """The labels that a report states, said to be present or possible. A report without any finding says nothing."""
    return frozenset(label for label, said in ReportLabels("chexpert_14").read(report).items() if said != "absent")


def label_f1(references: Sequence[str], reports: Sequence[str]) -> dict[str, Any]:
    """Micro and macro F1 over the 14 labels. macro: over the labels that some reference has."""
    counts = {label: [0, 0, 0] for label in LABELS}  # true positives, false positives, misses
    for reference, report in zip(references, reports, strict=True):
        wanted, said = chexpert_labels(reference), chexpert_labels(report)
        for label in wanted | said:
            counts[label][0 if label in wanted & said else 1 if label in said else 2] += 1

    def f1(hit: int, false: int, missed: int) -> float:
        return 2 * hit / (2 * hit + false + missed) if hit else 0.0

    by_label = {label: f1(*c) for label, c in counts.items() if c[0] + c[2]}
    totals = [sum(c[i] for c in counts.values()) for i in range(3)]
    macro = sum(by_label.values()) / len(by_label) if by_label else None
    return {"label_f1_micro": f1(*totals), "label_f1_macro": macro, "label_f1": by_label}


def rouge_l(references: Sequence[str], reports: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure, stemmed (rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(references, reports, strict=True)]
    return float(sum(scores) / len(scores))


def bleu(references: Sequence[str], reports: Sequence[str]) -> float:
    """Corpus BLEU-4 in [0, 1], lower case (sacrebleu, its own tokeniser)."""
    from sacrebleu.metrics import BLEU

    return float(BLEU(lowercase=True).corpus_score(list(reports), [list(references)]).score / 100)


def _captions(texts: Sequence[str]) -> dict[int, list[str]]:
    return {i: [" ".join(re.findall(r"\w+", text.lower()))] for i, text in enumerate(texts)}


def cider(references: Sequence[str], reports: Sequence[str]) -> float:
    """CIDEr-D (pycocoevalcap), 0 to 10; its document frequencies come from these references."""
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(_captions(references), _captions(reports))[0])


def meteor(references: Sequence[str], reports: Sequence[str]) -> float:
    """METEOR 1.5 in [0, 1] (pycocoevalcap's copy of the authors' Java program)."""
    if shutil.which("java") is None:
        raise EvalError("METEOR needs a Java runtime (`java`), which this machine has not")
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return float(scorer.compute_score(_captions(references), _captions(reports))[0])
    finally:
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()


@dataclass(frozen=True)
class Model:
    """A model-based metric of RadEval. name: RadEval's; result: prefix of its result's key; weights: Hub ids."""

    name: str
    result: str
    weights: tuple[str, ...]


MODELS: Mapping[str, Model] = {
    "ratescore": Model("ratescore", "ratescore", ("Angelakeke/RaTE-NER-Deberta", "FremyCompany/BioLORD-2023-C")),
    "radgraph": Model("radgraph", "radgraph", ("StanfordAIMI/RRG_scorers",)),
    "chexbert": Model("f1chexbert", "f1chexbert", ("StanfordAIMI/RRG_scorers", "bert-base-uncased")),
    "green": Model("green", "green", ("StanfordAIMI/GREEN-radllama2-7b",)),
    "radcliq": Model("radcliq", "radcliq", ("StanfordAIMI/RRG_scorers", "distilroberta-base")),
}
WORDS: Mapping[str, tuple[Callable[[Sequence[str], Sequence[str]], float], str]] = {
    "rouge_l": (rouge_l, "rouge_score"),
    "bleu": (bleu, "sacrebleu"),
    "cider": (cider, "pycocoevalcap"),
    "meteor": (meteor, "pycocoevalcap"),
}
RULES = ("labels",)
METRICS = (*WORDS, *RULES, *MODELS)
DEFAULT = ("rouge_l", "bleu", "cider", "meteor", "labels")


def missing(metric: str) -> str:
    """Why a metric cannot be computed here, or "". A model-based one names the weight that is not there."""
    from importlib.util import find_spec

    if metric in MODELS:
        absent = [w for w in MODELS[metric].weights if not _cached(w)]
        if absent:
            return f"{metric} needs the weights {', '.join(absent)}, which are not in this machine's Hugging Face cache"
        return "" if find_spec("radeval") else f"{metric} needs the package radeval (pip install radeval)"
    if metric in WORDS and find_spec(WORDS[metric][1]) is None:
        return f"{metric} needs {WORDS[metric][1]}: pip install 'lingshu-rl[eval]'"
    if metric == "meteor" and shutil.which("java") is None:
        return "meteor needs a Java runtime (`java`)"
    return ""


def _cached(repository: str) -> bool:
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def report_metrics(references: Sequence[str], completions: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
    """The asked metrics of completions against reference reports. An empty report scores 0 by every one of them.

    Raises EvalError for a metric that cannot be computed here; ask `missing` first where that may happen.
    """
    reports = [reply_text(c) for c in completions]
    if not references:
        return {}
    out: dict[str, Any] = {}
    for metric in asked:
        if reason := missing(metric):
            raise EvalError(reason)
        if metric == "labels":
            out |= label_f1(references, reports)
        elif metric in WORDS:
            out[metric] = WORDS[metric][0](references, reports) if any(reports) else 0.0
        else:
            out[metric] = _by_model(MODELS[metric], references, reports)
    return out


def _by_model(model: Model, references: Sequence[str], reports: Sequence[str]) -> float:
    """One number by RadEval 2. Written against its documented interface; its weights were never on a machine of
    ours."""
    from radeval import RadEval

    found = RadEval(metrics=[model.name], show_progress=False)(refs=list(references), hyps=list(reports))
    numbers = {k: v for k, v in found.items() if k.startswith(model.result) and isinstance(v, int | float)}
    if not numbers:
        raise EvalError(f"RadEval gave no {model.result} among {', '.join(found)}; its version may not fit")
    return float(next(iter(numbers.values())))


def choose_metrics(names: str) -> tuple[str, ...]:
    """The metrics of "rouge_l,labels", or the default ones that can be computed here for "auto"; EvalError names why
    not."""
    if names == "auto":
        return tuple(m for m in DEFAULT if not missing(m))
    chosen = tuple(part.strip() for part in names.split(",") if part.strip())
    for name in chosen:
        if name not in METRICS:
            raise EvalError(f"unknown report metric {name!r}; there are {', '.join(METRICS)}")
        if reason := missing(name):
            raise EvalError(reason)
    return chosen
