"""Rebuilds the embedded policy: tokenizer, look-up pretraining, seeing, then SFT with TRL on a part of the demo's rows.

    python -m lingshu_rl.demo.policy --out DIR            # about 20 minutes on one core; writes a Hugging Face folder
    python -m lingshu_rl.demo.policy --out DIR --short    # a few steps of each stage, to see that it works

Everything is seeded; the figures of the shipped folder (`weights/`) stand in its README.md. The last stage
confuses the policy on purpose (careless.py): it answers in the format but is right less than half of the time, which
leaves RL its room.
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

from lingshu_rl.data.rows import INSTRUCTIONS, row_to_prompt
from lingshu_rl.demo import lookup, seeing
from lingshu_rl.demo.build import build_demo
from lingshu_rl.demo.careless import careless_text
from lingshu_rl.demo.model import build_model, build_processor, build_tokenizer, save
from lingshu_rl.demo.questions import sft_text


@dataclass(frozen=True)
class Recipe:
    """Steps of each stage. sft_rows: how many of the demo's training rows the two SFT stages see."""

    lookup_steps: int = 800
    seeing_steps: int = 600
    pool_draws: int = 8
    sft_rows: int = 1500
    sft_batch: int = 32
    sft_steps: int = 700
    sft_lr: float = 1e-3
    careless_steps: int = 80
    careless_lr: float = 5e-4
    careless_share: float = 0.6  # of the labels in the last stage that are off by a class
    seed: int = 0


SHORT = Recipe(lookup_steps=3, seeing_steps=3, pool_draws=1, sft_steps=2, careless_steps=1, sft_rows=32, sft_batch=8)


def demo_policy_dir() -> Path:
    """The shipped folder."""
    return Path(__file__).parent / "weights"


def training_rows() -> tuple[list[dict[str, Any]], Path]:
    folder = build_demo()
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()], folder


def rebuild(out: Path, recipe: Recipe) -> None:
    """All stages; writes `out`."""
    model, processor = build_base(recipe)
    rows, folder = training_rows()
    fine_tune(model.to("cpu"), processor, rows[: recipe.sft_rows], folder, recipe)
    save(model, processor, out)


def build_base(recipe: Recipe) -> tuple[Any, Any]:
    """(model, processor) before any question is answered: it finds options by their words and sees, but cannot speak."""
    rows, folder = training_rows()
    prompts = [row_to_prompt(row, base_dir=folder, instruction="short") for row in rows]
    texts = [f"{p.text}\nuser\nassistant\n{sft_text(row)}" for p, row in zip(prompts, rows, strict=True)]
    tokenizer = build_tokenizer(texts)
    processor = build_processor(tokenizer)
    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = lookup.Vocabulary.of(tokenizer, INSTRUCTIONS["short"]["option"])
    lookup.pretrain(model, vocabulary, steps=recipe.lookup_steps, seed=recipe.seed)
    pool = seeing.training_pool(recipe.pool_draws, recipe.seed + 77)
    seeing.pretrain(model, pool, steps=recipe.seeing_steps, seed=recipe.seed)
    return model, processor


def fine_tune(model: Any, processor: Any, rows: list[dict[str, Any]], folder: Path, recipe: Recipe) -> None:
    """Two stages with TRL's SFTTrainer, the loss on the completion alone: right labels, then a careless annotator's."""
    rng = random.Random(recipe.seed)
    ideal = [sft_text(row) for row in rows]
    careless = [careless_text(row, rng, recipe.careless_share) for row in rows]
    for texts, steps, lr in (
        (ideal, recipe.sft_steps, recipe.sft_lr),
        (careless, recipe.careless_steps, recipe.careless_lr),
    ):
        _sft(model, processor, rows, texts, folder, steps=steps, lr=lr, batch=recipe.sft_batch, seed=recipe.seed)


def _sft(
    model: Any,
    processor: Any,
    rows: list[dict[str, Any]],
    texts: list[str],
    folder: Path,
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> None:
    from datasets import Dataset
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    examples = []
    for row, text in zip(rows, texts, strict=True):
        prompt = row_to_prompt(row, base_dir=folder, instruction="short")
        with Image.open(str(prompt.images[0])) as image:
            pixels = image.convert("RGB")
        examples.append(
            {
                "prompt": [{"role": "user", "content": prompt.text}],
                "completion": [{"role": "assistant", "content": text}],
                "image": pixels,
            }
        )
    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            max_steps=steps,
            warmup_steps=min(20, steps),
            lr_scheduler_type="constant_with_warmup",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            completion_only_loss=True,
            max_length=None,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            seed=seed,
        )
        SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=processor
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--short", action="store_true", help="a few steps of each stage")
    args = parser.parse_args()
    rebuild(args.out, SHORT if args.short else Recipe())


if __name__ == "__main__":
    main()
