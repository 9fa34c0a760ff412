"""A reward of your own, from the class to a training spec: pay a located finding by the overlap of its box.

It shows in a hundred lines how a kind is made. For work there are the kinds `box`, `points` and `mask` (rewards/grounding): sets,
labels, scales, what models write.

    python recipes/custom_reward.py

In a run it is named by its import path; modules are found on PYTHONPATH and in the working folder:
    PYTHONPATH=recipes accelerate launch recipes/grpo_medvqa.py --config my.yaml
with, in my.yaml, the SPEC below under `rewards: {spec: ...}`, or with rows of the kind BOX.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from rewards.answer import extract
from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import build
from rewards.executor import Executor
from rewards.kinds import Kind
from rewards.preflight import check

NUMBER = r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*"
WRITTEN = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")

Box = tuple[float, float, float, float]


class BoxIoU(Reward):
    """Overlap (intersection over union) of the answer's box with the label's, both [x1, y1, x2, y2] in pixels.

    least: an overlap below this pays nothing, so that a box over the whole image is no way to earn.
    """

    name = "box_iou"

    def __init__(self, least: float = 0.5) -> None:
        if not 0 <= least < 1:
            raise ValueError(f"least must be in [0, 1), got {least}")
        self.least = least

    def score(self, sample: RewardInput) -> RewardResult:
        answer = extract(sample.completion)
        if answer.status != "ok":
            return RewardResult(0.0, "unparsed", reason=answer.reason)
        boxes = {read_box(text) for text in answer.texts}
        if len(boxes) > 1:
            return RewardResult(0.0, "conflict", reason=f"{len(boxes)} different answers")
        said = boxes.pop()
        if said is None:
            return RewardResult(0.0, "unparsed", reason="the answer is not one box [x1, y1, x2, y2]")
        overlap = iou(said, tuple(sample.gold))
        value = overlap if overlap >= self.least else 0.0
        reason = "" if overlap == 1 else f"the boxes overlap by {overlap:.2f}"
        return RewardResult(value, parsed=said, reason=reason, components={"overlap": overlap})

    def check_gold(self, sample: RewardInput) -> str | None:
        if read_box(str(list(sample.gold))) is None:
            return "the label is not a box [x1, y1, x2, y2] with x1 < x2 and y1 < y2"
        return None


def read_box(text: str) -> Box | None:
    """The box that is the whole text; None for anything else, such as two boxes."""
    found = WRITTEN.fullmatch(text.strip())
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


# Rows of an own kind name it by its import path, {"kind": "custom_reward:BOX", "answer": [40, 60, 80, 100], ...}, and need
# no spec: the record says what the prompt asks for, who judges, and which answers must earn nothing.
BOX = Kind(
    "box",
    {"class": "custom_reward:BoxIoU", "args": {"least": 0.3}},
    {"short": "Answer: box.", "full": "the box as [x1, y1, x2, y2] in pixels"},
    write=lambda sample: [str(list(sample.gold))],
    undeserving=lambda sample, label: {"the whole image": "[0, 0, 99999, 99999]"},
    draw=lambda row: [{"text": f"said {row['parsed']}, label {row['gold']}", "verdict": "", "points": row["value"]}],
)

SPEC: dict[str, Any] = {
    "parts": {
        # Boxes come in rows of kind "open"; multiple-choice rows of the same data keep their own reward.
        "answer": {
            "route": {"open": {"class": "custom_reward:BoxIoU", "args": {"least": 0.3}}, "option": "OptionLetter"}
        },
        # Right answers outside of the think-answer form lose a tenth; wrong ones earn nothing in any form.
        "format": {"class": "ThinkAnswerFormat", "multiply": 0.1},
    }
}

QUESTION = "Where is the nodule? Give its box."
GOLD = [40, 60, 80, 100]
OPTIONS = ("CT", "MRI", "ultrasound")
ROWS = [
    RewardInput("<think>Round, in the left lung.</think><answer>[40, 60, 80, 100]</answer>", GOLD, kind="open"),
    RewardInput("<think>A bit lower.</think><answer>[42, 66, 82, 104]</answer>", GOLD, kind="open"),
    RewardInput("<answer>[42, 66, 82, 104]</answer>", GOLD, kind="open"),
    RewardInput("<think>It may be anywhere.</think><answer>[0, 0, 512, 512]</answer>", GOLD, kind="open"),
    RewardInput("<think>One of the two.</think><answer>[40, 60, 80, 100] or [1, 1, 9, 9]</answer>", GOLD, kind="open"),
    RewardInput("<think>Sulci are bright.</think><answer>B</answer>", "B", options=OPTIONS, kind="option"),
    RewardInput("<think>Sulci are bright.</think><answer>A</answer>", "B", options=OPTIONS, kind="option"),
]  # fmt: skip
LABELS = [
    RewardInput("", [40, 60, 80, 100], prompt=QUESTION, kind="open"),
    RewardInput("", [200, 210, 260, 250], prompt=QUESTION, kind="open"),
    RewardInput("", [5, 300, 65, 380], prompt=QUESTION, kind="open"),
    RewardInput("", [300, 20, 280, 90], prompt=QUESTION, kind="open"),  # x1 > x2: the pre-flight names this row
]


def main() -> int:
    reward = build(SPEC)
    print(f"{'value':>6}  {'answer':>6}  {'format':>6}  {'status':9}  completion")
    with Executor(reward) as executor:
        for sample, result in zip(ROWS, executor.score(ROWS), strict=True):
            parts = [f"{result.components[name]:6.2f}" for name in ("answer", "format")]
            print(f"{result.value:6.2f}  {'  '.join(parts)}  {result.status:9}  {sample.completion}")
            if result.reason:
                print(f"{'':35}{result.reason}")
    print("\nThe labels, before training (one is wrong on purpose):")
    print(check(LABELS, reward).text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
