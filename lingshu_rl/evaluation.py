"""Held-out accuracy of the policy by the training rewards: with the image, with a blank one, with another question's one."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lingshu_rl.eval.stats import mean_ci
from lingshu_rl.model import blank_image
from lingshu_rl.run import Run
from lingshu_rl.runfolder import image_name
from lingshu_rl.types import Prompt

EVAL_SEED = 0
Rows = list[dict[str, Any]]


async def evaluate(run: Run, name: str, controls: Sequence[str] = ()) -> dict[str, Rows]:
    """Answer the test questions greedily and grade them; returns and stores rows by condition ("image", "blank", ...)."""
    assert run.rollout is not None
    prompts = run.test[: run.config.eval.limit or None]
    conditions = {"image": prompts, **{c: CONTROLS[c](prompts) for c in controls}}
    total = sum(map(len, conditions.values()))
    run.progress.start(f"evaluating {name}", total)
    results = {}
    for condition, asked in conditions.items():
        answered = await asyncio.gather(*(_answer(run, prompt) for prompt in asked))
        graded = await run.rewards.grade([rollout.reward_input() for rollout in answered])
        rows = [
            {
                "id": p.id,
                "kind": p.kind,
                "task": str(p.meta.get("task", "")),
                "modality": str(p.meta.get("modality", "")),
                "image": image_name(p.images),
                "question": p.text,
                "options": list(p.options),
                "gold": p.gold,
                "completion": rollout.text,
                "value": result.value,
                "status": result.status,
                "parsed": result.parsed,
                "reason": result.reason,
            }
            for p, rollout, result in zip(prompts, answered, graded, strict=True)
        ]
        run.folder.write_eval(name if condition == "image" else f"{name}_{condition}", rows)
        results[condition] = rows
    run.progress.stop()
    for condition, rows in results.items():
        score = mean_ci([row["value"] for row in rows], [row["image"] for row in rows])
        if condition == "image" and score["n"]:
            run.accuracy = score["accuracy"]
        low, high = score["ci95"]
        told = f"{score['accuracy']:.3f}" if score["n"] else "unknown (no answer could be judged)"
        run.progress.say(
            f"{name}, {condition}: accuracy {told} (95 % interval {low:.3f} to {high:.3f}, n={score['n']})"
        )
    return results


async def _answer(run: Run, prompt: Prompt) -> Any:
    assert run.rollout is not None
    (rollout,) = await run.rollout.sample(prompt, 1, EVAL_SEED, temperature=0.0)
    run.progress.advance()
    return rollout


def blank(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(p, images=tuple(blank_image(image) for image in p.images)) for p in prompts]


def shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every question gets the images of another one of its own task, so that only what is seen changes."""
    by_task: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, p in enumerate(prompts):
        by_task[str(p.meta.get("task", p.kind)), len(p.images)].append(i)
    images = [p.images for p in prompts]
    for members in by_task.values():
        order = list(members)
        random.Random(EVAL_SEED).shuffle(order)
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            images[here] = prompts[there].images
    return [replace(p, images=own) for p, own in zip(prompts, images, strict=True)]


CONTROLS = {"blank": blank, "shuffled": shuffled}
