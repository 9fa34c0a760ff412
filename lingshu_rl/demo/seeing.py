"""Pretraining of the vision tower: every image token tells what its image shows, by a linear head for each task.

Through the language model a tower of this size needs many epochs to see a shape; with the answer one linear step away
it takes minutes. The images are further slices and crops of the training regions, never of held-out ones; the heads are
thrown away.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from lingshu_rl.demo import brain, questions, studies
from lingshu_rl.demo.build import held_out_hashes
from lingshu_rl.demo.images import apart
from lingshu_rl.demo.model import IMAGE_SIDE, MERGE, PATCH

SHIFT = 5  # pixels an image is moved at most: as far as a person may lie off centre
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # the image processor's


@dataclass(frozen=True)
class SeenPicture:
    """An image of the training regions beyond the demo's own. told: what it shows, {"plane": "axial", ...}."""

    pixels: np.ndarray
    told: Mapping[str, str]


def training_pool(draws: int, seed: int) -> list[SeenPicture]:
    """`draws` times as many images as the demo's training questions use; one that several questions use is there as
    often.

    Images that resemble a held-out one (images.APART_BITS) are left out. Uses all cores.
    """
    held_out = held_out_hashes()
    with ProcessPoolExecutor(min(draws, os.cpu_count() or 1), get_context("spawn")) as workers:
        parts = workers.map(_draw, [1000 * seed + n for n in range(draws)], [held_out] * draws)
        return [picture for part in parts for picture in part]


def _draw(seed: int, held_out: np.ndarray) -> list[SeenPicture]:
    once = {"train": 1, "validation": 0, "test": 0}
    drawn = [
        *brain.slices(np.random.default_rng([seed, 1]), {s: n * brain.COUNTS["train"] for s, n in once.items()}),
        *studies.crops(np.random.default_rng([seed, 2]), once),
    ]
    kept = {f"images/{image.name}.png": image for image in drawn if apart(image.pixels, held_out)}
    rows = questions.make_rows(list(kept.values()), "train", np.random.default_rng([seed, 3]))
    asked = (kept[row["images"][0]] for row in rows)
    return [SeenPicture(image.pixels, told(image.facts)) for image in asked]


def told(facts: Mapping[str, Any]) -> dict[str, str]:
    """What every task and report field would say of an image."""
    found: dict[str, str] = {}
    for task in questions.TASKS:
        for case in task.cases(facts):
            if task.kind == "report":
                found |= dict(sentence.split(": ") for sentence in case.answer.rstrip(".").split(". "))
            else:
                found[task.name] = case.think or case.answer
    return found


def pretrain(
    model: Qwen2_5_VLForConditionalGeneration,
    pool: Sequence[SeenPicture],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 1.5e-3,
) -> float:
    """Train the vision tower in place, on the model's device; returns the share of right answers over the last 20
    batches."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tower, device = model.model.visual, model.device
    for parameter in tower.parameters():
        if parameter.ndim >= 2:  # 0.02 would leave the first layer's output near zero at this width
            torch.nn.init.normal_(parameter, std=float(np.prod(parameter.shape[1:])) ** -0.5)
    # One linear head over all (name, value) pairs; where one name is asked, its values alone compete.
    values = {pair: n for n, pair in enumerate(dict.fromkeys(pair for p in pool for pair in p.told.items()))}
    names = {name: n for n, name in enumerate(dict.fromkeys(name for name, _ in values))}
    name_V = torch.tensor([names[name] for name, _ in values], device=device)
    head = torch.nn.Linear(tower.config.out_hidden_size, len(values)).to(device)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *head.parameters()], lr=lr, betas=(0.9, 0.98), weight_decay=0.02
    )
    right: list[float] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 20, 1.5 * (1 - (step - 1) / steps))
        drawn = rng.sample(pool, batch)
        pixels_BHWC = torch.stack([shifted(torch.from_numpy(rgb(picture.pixels)), rng) for picture in drawn]).to(device)
        # Q questions over the B images of the batch, each with its name and the value it wants.
        asked = [(b, name, value) for b, picture in enumerate(drawn) for name, value in picture.told.items()]
        image_Q = torch.tensor([b for b, _, _ in asked], device=device)
        name_Q = torch.tensor([names[name] for _, name, _ in asked], device=device)
        wanted_Q = torch.tensor([values[name, value] for _, name, value in asked], device=device)
        logits_QTV = head(see(model, pixels_BHWC))[image_Q].masked_fill((name_V != name_Q[:, None])[:, None], -1e9)
        loss = F.cross_entropy(logits_QTV.flatten(0, 1), wanted_Q.repeat_interleave(logits_QTV.shape[1]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right.append((logits_QTV.detach().mean(1).argmax(-1) == wanted_Q).float().mean().item())
        if step % 50 == 0 or step == steps:
            print(f"seeing step {step}/{steps}: {fmean(right[-20:]):.3f} of answers right", flush=True)
    return fmean(right[-20:])


def see(model: Qwen2_5_VLForConditionalGeneration, images_BHWC: torch.Tensor) -> torch.Tensor:
    """(images, image tokens, hidden): the vision tower's output for uint8 images of the demo's size."""
    count = len(images_BHWC)
    side = IMAGE_SIDE // PATCH
    grid = torch.tensor([[1, side, side]] * count, device=images_BHWC.device)
    out = model.model.visual(patches(images_BHWC), grid_thw=grid).pooler_output
    flat = torch.cat(list(out)) if isinstance(out, list | tuple) else out
    return flat.view(count, -1, flat.shape[-1])


def patches(images_BHWC: torch.Tensor) -> torch.Tensor:
    """(images * patches, values): what the image processor makes of uint8 images of the demo's size, on any device."""
    mean, deviation = (torch.tensor(x, device=images_BHWC.device) for x in (MEAN, DEVIATION))
    x = ((images_BHWC.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
    count, side = len(x), IMAGE_SIDE // PATCH // MERGE
    x = x.reshape(count, 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    twice = x.unsqueeze(6).expand(*x.shape[:6], 2, PATCH, PATCH)  # a still image is two equal frames
    return twice.reshape(count * (IMAGE_SIDE // PATCH) ** 2, -1)


def rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels


def shifted(picture: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return torch.roll(picture, (rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)), (0, 1))
