"""Rebuilds the embedded policy: tokenizer, look-up pretraining, seeing, then a short SFT on the demo's training rows.

    python -m lingshu_rl.demo.policy --out DIR            # about ten minutes on one core; writes a Hugging Face folder
    python -m lingshu_rl.demo.policy --out DIR --short    # a few steps of each stage, to see that it works

Everything is seeded; the figures of the shipped folder (`weights/`) stand in its README.md. The SFT ends where the form
of an answer is learnt and its facts are half learnt: the right answer is among a few samples of most questions, seldom
the first. That is the state from which verifiable rewards teach fastest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lingshu_rl.data.rows import instruction_text, row_to_prompt
from lingshu_rl.demo import lookup, seeing
from lingshu_rl.demo.build import build_demo
from lingshu_rl.demo.model import build_model, build_processor, build_tokenizer, save
from lingshu_rl.demo.questions import sft_text


@dataclass(frozen=True)
class Recipe:
    """Steps of each stage."""

    lookup_steps: int = 800
    seeing_steps: int = 600
    pool_draws: int = 8
    sft_steps: int = 140
    sft_batch: int = 32
    sft_lr: float = 1e-3
    seed: int = 0


SHORT = Recipe(lookup_steps=3, seeing_steps=3, pool_draws=1, sft_steps=3, sft_batch=8)


def training_rows() -> tuple[list[dict[str, Any]], Path]:
    folder = build_demo()
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()], folder


def rebuild(out: Path, recipe: Recipe) -> None:
    """All stages; writes `out`."""
    model, processor = build_base(recipe)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(model.to("cpu"), processor, folder / "base")
        shutil.copytree(fine_tune(folder / "base", folder / "sft", recipe), out, dirs_exist_ok=True)


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


def fine_tune(base: Path, work: Path, recipe: Recipe) -> Path:
    """One ordinary stage of `lingshu-rl sft` on the demo's training rows with their labels; the model's folder."""
    from lingshu_rl.sft.settings import SftConfig, StageConfig
    from lingshu_rl.sft.stages import run_sft

    stage = StageConfig(
        data=["demo:train"],
        instruction="short",
        target="think",
        lr=dict.fromkeys(("vision", "projector", "language"), recipe.sft_lr),
        trainer={
            "max_steps": recipe.sft_steps,
            "per_device_train_batch_size": recipe.sft_batch,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": min(20, recipe.sft_steps),
        },
    )
    return Path(run_sft(SftConfig(model=str(base), dir=str(work), seed=recipe.seed, stages={"sft": stage}))["model"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--short", action="store_true", help="a few steps of each stage")
    args = parser.parse_args()
    rebuild(args.out, SHORT if args.short else Recipe())


if __name__ == "__main__":
    main()
