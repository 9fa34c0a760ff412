"""The miniature plan's starting point: a network that can look words up and see, but has never tied one to the other.

    python -m lingshu_rl.demo.base --out DIR

Writes DIR/model (look-up pretraining of the language model, then the vision tower by itself) and DIR/texts.jsonl (the
training questions without their images, from which a first text-only stage learns how questions are answered).
Large models come with both; this is what stands in for downloading one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lingshu_rl.data.rows import INSTRUCTIONS, row_to_prompt
from lingshu_rl.demo import lookup, seeing
from lingshu_rl.demo.build import build_demo
from lingshu_rl.demo.model import build_model, build_processor, build_tokenizer, save
from lingshu_rl.demo.questions import sft_text
from lingshu_rl.runfolder import write_text


def build_base(out: Path, *, lookup_steps: int, seeing_steps: int, pool_times: int, seed: int) -> None:
    """pool_times: images for the vision tower as a multiple of the demo's own."""
    torch.manual_seed(seed)
    folder = build_demo()
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    prompts = [row_to_prompt(row, base_dir=folder, instruction="short") for row in rows]
    tokenizer = build_tokenizer(
        f"{p.text}\nuser\nassistant\n{sft_text(row)}" for p, row in zip(prompts, rows, strict=True)
    )
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    vocabulary = lookup.Vocabulary.of(tokenizer, INSTRUCTIONS["short"]["option"])
    lookup.pretrain(model, vocabulary, steps=lookup_steps, seed=seed)
    seeing.pretrain(model, processor, seeing.training_pool(pool_times, seed + 77), steps=seeing_steps, seed=seed)
    save(model, processor, out / "model")
    write_text(out / "texts.jsonl", "".join(json.dumps({**row, "images": []}) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lookup-steps", type=int, default=800)
    parser.add_argument("--seeing-steps", type=int, default=600)
    parser.add_argument("--pool-times", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build_base(args.out, lookup_steps=args.lookup_steps, seeing_steps=args.seeing_steps, pool_times=args.pool_times, seed=args.seed)  # fmt: skip


if __name__ == "__main__":
    main()
