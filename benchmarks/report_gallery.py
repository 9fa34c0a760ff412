"""Eight pairs of reports: what word overlap, label F1 and the report reward pay for the better and the worse text.

The texts are invented. Output: the Markdown of docs/report_gallery.md's table on standard output.

    python benchmarks/report_gallery.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# A script's folder comes first on the path, where benchmarks/rewards.py would hide the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from lingshu_rl.eval.metrics import bleu, label_f1, rouge_l  # noqa: E402
from rewards.base import RewardInput  # noqa: E402
from rewards.report import ReportEntities  # noqa: E402


@dataclass(frozen=True)
class Pair:
    """`why`: what a radiologist sees between the better and the worse text."""

    title: str
    reference: str
    better: str
    worse: str
    why: str


PAIRS = (
    Pair(
        "One word turns it round",
        "There is no pneumothorax. There is a small left pleural effusion.",
        "Small effusion on the left. No pneumothorax.",
        "There is a pneumothorax. There is no left pleural effusion.",
        "Both statements are the opposite, almost all words are the same.",
    ),
    Pair(
        "The side",
        "Large right pneumothorax with collapse of the right lung.",
        "Right-sided pneumothorax, large, right lung collapsed.",
        "Large left pneumothorax with collapse of the left lung.",
        "The drain would go into the healthy side. A wrong side costs part of the credit, since the finding is there.",
    ),
    Pair(
        "The copied normal report",
        "The heart is normal in size. The lungs are clear. There is a 2 cm nodule in the left upper lobe. No effusion.",
        "2 cm left upper lobe nodule.",
        "The heart is normal in size. The lungs are clear. No effusion. No pneumothorax.",
        "The only thing that matters is missing; agreement on normal organs is not paid instead.",
    ),
    Pair(
        "The list of everything",
        "Right lower lobe consolidation.",
        "Consolidation at the right base.",
        "Right lower lobe consolidation. Left effusion. Pneumothorax. Edema. Cardiomegaly. Nodule. Fracture. Emphysema.",
        "Naming every disease hits something; each invention counts against it.",
    ),
    Pair(
        "The history is not a finding",
        "No pneumonia. Heart size is normal.",
        "HISTORY: Pneumonia, treated. FINDINGS: No pneumonia. Normal heart.",
        "Pneumonia. The heart is enlarged.",
        "What was asked or known before is left out; what was found is read.",
    ),
    Pair(
        "Denial after a list",
        "No pleural effusion, consolidation or pneumothorax.",
        "Pleural effusion/consolidation/pneumothorax: not seen.",
        "Pleural effusion, consolidation and pneumothorax are seen.",
        "The denial reaches all three.",
    ),
    Pair(
        "Another word for it",
        "The cardiac silhouette is enlarged. Pulmonary vascular congestion.",
        "Cardiomegaly with congestion of the lung vessels.",
        "The cardiac silhouette is normal. Pulmonary vascularity is normal.",
        "No word in common, the same meaning; and the reverse.",
    ),
    Pair(
        "How large",
        "Massive left pleural effusion with mediastinal shift to the right.",
        "Very large left effusion; the mediastinum is shifted to the right.",
        "Tiny left pleural effusion without mediastinal shift to the right.",
        "The grade decides whether somebody is called at night.",
    ),
)


def main() -> None:
    reward = ReportEntities()
    measures = {
        "ROUGE-L": lambda reference, text: rouge_l([reference], [text]),
        "BLEU": lambda reference, text: bleu([reference], [text]),
        "label F1": lambda reference, text: label_f1([reference], [text])["label_f1_micro"],
        "this reward": lambda reference, text: float(reward.score(RewardInput(text, reference)).value or 0.0),
    }
    print("| pair | | " + " | ".join(measures) + " |\n|---|---|" + "--:|" * len(measures))
    for number, pair in enumerate(PAIRS, start=1):
        for label, text in (("better", pair.better), ("worse", pair.worse)):
            values = " | ".join(f"{measure(pair.reference, text):.2f}" for measure in measures.values())
            print(f"| {f'{number}. {pair.title}' if label == 'better' else ''} | {label} | {values} |")
    for number, pair in enumerate(PAIRS, start=1):
        print(f"\n**{number}. {pair.title}.** {pair.why}\n")
        print(f"* reference: {pair.reference}\n* better: {pair.better}\n* worse: {pair.worse}")


if __name__ == "__main__":
    main()
