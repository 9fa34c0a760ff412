"""Rebuilds the embedded policy: tokenizer, look-up pretraining, seeing, then a short SFT with TRL on the demo's rows.

    python -m lingshu_rl.demo.policy --out DIR            # about 15 minutes on two cores; writes a Hugging Face folder
    python -m lingshu_rl.demo.policy --out DIR --short    # a few steps of each stage, to see that it works

Everything is seeded; the figures of the shipped folder (`weights/`) stand in its README.md. The last stage is stopped
early on purpose: the policy answers in the format but is right only about half of the time, which leaves RL its room.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lingshu_rl.data.rows import INSTRUCTIONS, row_to_prompt
from lingshu_rl.demo import lookup, seeing
from lingshu_rl.demo.build import build_demo
from lingshu_rl.demo.model import build_model, build_processor, build_tokenizer, save
from lingshu_rl.demo.questions import sft_text


@dataclass(frozen=True)
class Recipe:
    """Steps of each stage. sft_rows: how many of the demo's training rows the last stage sees."""

    lookup_steps: int = 800
    seeing_steps: int = 600
    pool_times: int = 6
    sft_steps: int = 200
    sft_rows: int = 1000
    sft_batch: int = 32
    sft_lr: float = 1e-3
    seed: int = 0


SHORT = Recipe(lookup_steps=3, seeing_steps=3, pool_times=1, sft_steps=2, sft_rows=32, sft_batch=8)


def demo_policy_dir() -> Path:
    """The shipped folder."""
    return Path(__file__).parent / "weights"


def training_rows() -> tuple[list[dict[str, Any]], Path]:
    folder = build_demo()
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()], folder


def rebuild(out: Path, recipe: Recipe) -> None:
    """All stages; writes `out`."""
    torch.manual_seed(recipe.seed)
    rows, folder = training_rows()
    prompts = [row_to_prompt(row, base_dir=folder, instruction="short") for row in rows]
    texts = [f"{p.text}\nuser\nassistant\n{sft_text(row)}" for p, row in zip(prompts, rows, strict=True)]
    tokenizer = build_tokenizer(texts)
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    vocabulary = lookup.Vocabulary.of(tokenizer, INSTRUCTIONS["short"]["option"])
    lookup.pretrain(model, vocabulary, steps=recipe.lookup_steps, seed=recipe.seed)
    pool = seeing.training_pool(recipe.pool_times, recipe.seed + 77)
    seeing.pretrain(model, processor, pool, steps=recipe.seeing_steps, seed=recipe.seed)
    fine_tune(model, processor, rows[: recipe.sft_rows], folder, recipe)
    save(model, processor, out)


def fine_tune(model: Any, processor: Any, rows: list[dict[str, Any]], folder: Path, recipe: Recipe) -> None:
    """TRL's SFTTrainer on ideal completions; the loss is on the completion alone."""
    from datasets import Dataset
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    examples = []
    for row in rows:
        prompt = row_to_prompt(row, base_dir=folder, instruction="short")
        with Image.open(str(prompt.images[0])) as image:
            pixels = image.convert("RGB")
        examples.append(
            {
                "prompt": [{"role": "user", "content": prompt.text}],
                "completion": [{"role": "assistant", "content": sft_text(row)}],
                "image": pixels,
            }
        )
    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=recipe.sft_batch,
            learning_rate=recipe.sft_lr,
            max_steps=recipe.sft_steps,
            warmup_steps=min(20, recipe.sft_steps),
            lr_scheduler_type="constant_with_warmup",
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
    parser.add_argument("--short", action="store_true", help="a few steps of each stage")
    args = parser.parse_args()
    rebuild(args.out, SHORT if args.short else Recipe())


if __name__ == "__main__":
    main()
