"""What a score must beat: the same questions without what they are about, and answers that look at nothing.

An engine control asks the model again (blank image, another question's image, no image); a constant one needs no model.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lingshu_rl.types import Prompt
from rewards.kinds import find_or_plain

SHUFFLE_SEED = 0

NORMAL_REPORT = (
    "The cardiac silhouette and mediastinum are within normal limits. The lungs are clear. There is no focal "
    "consolidation. There is no pleural effusion. There is no pneumothorax. The bones are unremarkable. No acute "
    "cardiopulmonary abnormality."
)


def blank(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every image becomes a grey one of its size."""
    return [replace(p, images=tuple(picture.blank() for picture in p.images)) for p in prompts]


def shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every question gets the images of another one of its own task, so that only what is seen changes."""
    by_task: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, p in enumerate(prompts):
        by_task[str(p.meta.get("task", p.kind)), len(p.images)].append(i)
    images = [p.images for p in prompts]
    for members in by_task.values():
        order = list(members)
        random.Random(SHUFFLE_SEED).shuffle(order)
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            images[here] = prompts[there].images
    return [replace(p, images=own) for p, own in zip(prompts, images, strict=True)]


def text_only(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same words without any image."""

    def bare(content: Any) -> Any:
        return content if isinstance(content, str) else [part for part in content if part["type"] != "image"]

    return [
        replace(p, images=(), messages=tuple({**m, "content": bare(m["content"])} for m in p.messages)) for p in prompts
    ]


def majority(prompts: Sequence[Prompt]) -> list[str]:
    """The label that is most frequent among the questions of a kind, given to all of them.

    It is taken from the test labels themselves, so it is the best that any constant answer of the kind can do.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for p in prompts:
        counts[p.kind][find_or_plain(p.kind).write(p.reward_input())[0]] += 1
    best = {kind: min(found, key=lambda a: (-found[a], a)) for kind, found in counts.items()}
    return [f"<answer>{best[p.kind]}</answer>" for p in prompts]


def normal_report(prompts: Sequence[Prompt]) -> list[str]:
    """One report of a normal chest radiograph for every study."""
    return [NORMAL_REPORT] * len(prompts)


ENGINE_CONTROLS: Mapping[str, Callable[[Sequence[Prompt]], list[Prompt]]] = {
    "blank": blank,
    "shuffled": shuffled,
    "text_only": text_only,
}
CONSTANT_CONTROLS: Mapping[str, Callable[[Sequence[Prompt]], list[str]]] = {
    "majority": majority,
    "normal_report": normal_report,
}
CONTROLS = (*ENGINE_CONTROLS, *CONSTANT_CONTROLS)


def suits(control: str, prompts: Sequence[Prompt]) -> bool:
    """Whether a control says anything about these questions: no blank image without images, no majority report."""
    if control in ENGINE_CONTROLS:
        return any(p.images for p in prompts)
    reports = bool(prompts) and all(p.kind == "report" for p in prompts)
    graded = bool(prompts) and all(p.kind != "rubric" for p in prompts)
    return reports if control == "normal_report" else graded and not reports
