"""Pretraining of the vision tower: every image token tells what its image shows, by a linear head for each task.

Through the language model a tower of this size needs many epochs to see a shape; with the answer one linear step away it
takes minutes. The images are further slices and crops of the training regions, never of held-out ones; the heads are
thrown away.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from lingshu_rl.demo import brain, questions, studies

SHIFT = 5  # pixels an image is moved at most: as far as a person may lie off centre


@dataclass(frozen=True)
class Pool:
    """Questions on images of the training regions beyond the demo's own."""

    rows: tuple[Mapping[str, Any], ...]
    pixels: Mapping[str, np.ndarray]  # by the path in a row's `images`


def training_pool(times: int, seed: int) -> Pool:
    """`times` as many training questions as the demo has, each on one of as many times its images."""
    splits = {"train": times, "validation": 0, "test": 0}
    images = [
        *brain.slices(np.random.default_rng([seed, 1]), {s: n * brain.COUNTS["train"] for s, n in splits.items()}),
        *studies.crops(np.random.default_rng([seed, 2]), splits),
    ]
    rows = questions.make_rows(images, "train", np.random.default_rng([seed, 3]), times)
    return Pool(tuple(rows), {f"images/{image.name}.png": image.pixels for image in images})


def facts(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what is told, its value): the field of a report, else the task (for yes/no with its question)."""
    if row["kind"] == "report":
        for sentence in row["answer"].rstrip(".").split(". "):
            name, value = sentence.split(": ")
            yield name, value
    else:
        task = row["meta"]["task"]
        yield f"{task}: {row['question']}" if row["kind"] == "yesno" else task, row["meta"]["think"]


def pretrain(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    pool: Pool,
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 1.5e-3,
) -> float:
    """Train the vision tower in place; returns the share of right answers over the last 20 batches."""
    rng = random.Random(seed)
    tower = model.model.visual
    for parameter in tower.parameters():
        if parameter.ndim >= 2:  # 0.02 would leave the first layer's output near zero at this width
            torch.nn.init.normal_(parameter, std=float(np.prod(parameter.shape[1:])) ** -0.5)
    told = [(row["images"][0], name, value) for row in pool.rows for name, value in facts(row)]
    classes: dict[str, list[str]] = defaultdict(list)
    for _, name, value in told:
        if value not in classes[name]:
            classes[name].append(value)
    heads = {name: torch.nn.Linear(tower.config.out_hidden_size, len(found)) for name, found in classes.items()}
    weights = [*tower.parameters(), *(p for head in heads.values() for p in head.parameters())]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    right: list[float] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 20, 1.5 * (1 - (step - 1) / steps))
        drawn = rng.sample(told, batch)
        features_BTH = see(model, processor, [shifted(pool.pixels[image], rng) for image, _, _ in drawn])
        loss = torch.zeros(())
        hits = 0
        for features_TH, (_, name, value) in zip(features_BTH, drawn, strict=True):
            logits = heads[name](features_TH)
            wanted = classes[name].index(value)
            loss = loss + F.cross_entropy(logits, torch.full((len(logits),), wanted)) / batch
            hits += int(logits.mean(0).argmax()) == wanted
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right.append(hits / batch)
        if step % 50 == 0:
            print(f"seeing step {step}/{steps}: {sum(right[-20:]) / 20:.3f} of answers right", flush=True)
    return sum(right[-20:]) / len(right[-20:])


def see(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, images: Sequence[np.ndarray]
) -> torch.Tensor:
    """(images, image tokens, hidden): the vision tower's output."""
    pictures = [Image.fromarray(pixels).convert("RGB") for pixels in images]
    inputs = processor.image_processor(images=pictures, return_tensors="pt")
    out = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return out.pooler_output.view(len(images), -1, out.pooler_output.shape[-1])


def shifted(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    return np.roll(pixels, (rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)), (0, 1))
