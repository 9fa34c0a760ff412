"""Rebuilds the embedded policy: tokenizer, look-up pretraining, seeing, then SFT with TRL on a part of the demo's rows.

    python -m lingshu_rl.demo.policy --out DIR                   # about 20 minutes on one core; a Hugging Face folder
    python -m lingshu_rl.demo.policy --out DIR --recipe apart    # another start, without a wrong label
    python -m lingshu_rl.demo.policy --out DIR --recipe short    # a few steps of each stage, to see that it works

Everything is seeded; the figures of the shipped folder (`weights/`) stand in its README.md. Its last stage confuses the
policy on purpose (careless.py): it answers in the format but is right less than half of the time, which leaves RL its
room. `apart` teaches two things apart, with right labels: to say in plain words what an image shows, and to answer in
the asked form without an image. A short last stage shows both together on a few rows; the rest is left to RL.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lingshu_rl.data.rows import instruction_text, row_to_prompt
from lingshu_rl.demo import lookup, seeing
from lingshu_rl.demo.build import build_demo
from lingshu_rl.demo.careless import careless_text
from lingshu_rl.demo.model import build_model, build_processor, build_tokenizer, save
from lingshu_rl.demo.questions import plain_text, sft_text


@dataclass(frozen=True)
class Stage:
    """SFT on the first `rows` of the demo's training rows.

    careless: share of their labels that are off by a class. described: share of examples that say in plain words what
    the image shows, the others answer in the asked form without it; None for images and the asked form together.
    schedule: of transformers.
    """

    rows: int
    steps: int
    lr: float
    careless: float = 0.0
    described: float | None = None
    schedule: str = "constant_with_warmup"


@dataclass(frozen=True)
class Recipe:
    """Steps of each stage. The SFT stages never see the last quarter of the demo's training rows."""

    lookup_steps: int = 800
    seeing_steps: int = 600
    pool_draws: int = 8
    sft: tuple[Stage, ...] = (Stage(1000, 300, 1e-3), Stage(1500, 400, 4e-4), Stage(1500, 120, 5e-4, careless=0.65))
    sft_batch: int = 32
    seed: int = 0


RECIPES = {
    "shipped": Recipe(),
    "apart": Recipe(
        lookup_steps=500,
        seeing_steps=400,
        sft=(
            Stage(1500, 400, 8e-4, described=0.75, schedule="cosine"),
            Stage(1500, 500, 6e-4, described=0.7, schedule="cosine"),
            Stage(200, 40, 3e-4),
        ),
    ),
    "short": Recipe(
        lookup_steps=3,
        seeing_steps=3,
        pool_draws=1,
        sft=(Stage(32, 2, 1e-3), Stage(32, 1, 1e-3, described=0.5), Stage(32, 1, 5e-4, careless=0.65)),
        sft_batch=8,
    ),
}


def training_rows() -> tuple[list[dict[str, Any]], Path]:
    folder = build_demo()
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()], folder


def rebuild(out: Path, recipe: Recipe) -> None:
    """All stages; writes `out`."""
    model, processor = build_base(recipe)
    model.to("cpu")
    rows, folder = training_rows()
    for stage in recipe.sft:
        fine_tune(model, processor, rows[: stage.rows], folder, stage, recipe)
    save(model, processor, out)


def build_base(recipe: Recipe) -> tuple[Any, Any]:
    """(model, processor) before any question is answered: it finds options by their words and sees, but cannot
    speak."""
    rows, folder = training_rows()
    prompts = [row_to_prompt(row, base_dir=folder, instruction="short") for row in rows]
    texts = [f"{p.text}\nuser\nassistant\n{sft_text(row)}" for p, row in zip(prompts, rows, strict=True)]
    tokenizer = build_tokenizer(texts)
    processor = build_processor(tokenizer)
    torch.manual_seed(recipe.seed)
    model: Any = build_model(tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = lookup.Vocabulary.of(tokenizer, instruction_text("short", "option"))
    lookup.pretrain(model, vocabulary, steps=recipe.lookup_steps, seed=recipe.seed)
    pool = seeing.training_pool(recipe.pool_draws, recipe.seed + 77)
    seeing.pretrain(model, pool, steps=recipe.seeing_steps, seed=recipe.seed)
    return model, processor


def _example(row: dict[str, Any], folder: Path, answer: str, instruction: str = "short") -> dict[str, Any]:
    prompt = row_to_prompt(row, base_dir=folder, instruction=instruction)
    return {
        "prompt": [{"role": "user", "content": prompt.text}],
        "completion": [{"role": "assistant", "content": answer}],
        "image": prompt.images[0].pixels(),
    }


def _described(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The question without a word on the form of its answer, answered in plain words."""
    return _example(row, folder, plain_text(row), instruction="")


def _unseen(row: dict[str, Any], folder: Path, rng: random.Random) -> dict[str, Any]:
    """The question and its answer in the asked form, with a grey picture in place of its own."""
    example = _example(row, folder, sft_text(row))
    return {**example, "image": Image.new("RGB", example["image"].size, (rng.randrange(256),) * 3)}


def fine_tune(
    model: Any, processor: Any, rows: list[dict[str, Any]], folder: Path, stage: Stage, recipe: Recipe
) -> None:
    """One stage with TRL's SFTTrainer, the loss on the completion alone."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rng = random.Random(recipe.seed)
    if stage.described is None:
        examples = [_example(row, folder, careless_text(row, rng, stage.careless)) for row in rows]
    else:
        drawn = (rng.choice(rows) for _ in range(stage.steps * recipe.sft_batch))
        examples = [
            _described(row, folder) if rng.random() < stage.described else _unseen(row, folder, rng) for row in drawn
        ]
    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=recipe.sft_batch,
            learning_rate=stage.lr,
            max_steps=stage.steps,
            warmup_steps=min(20, stage.steps),
            lr_scheduler_type=stage.schedule,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            completion_only_loss=True,
            max_length=None,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            seed=recipe.seed,
        )
        SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=processor
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="shipped")
    args = parser.parse_args()
    rebuild(args.out, RECIPES[args.recipe])


if __name__ == "__main__":
    main()
