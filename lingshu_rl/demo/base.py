"""The miniature plan's starting point: a network that finds words and sees, but has never tied one to the other.

    python -m lingshu_rl.demo.base --out DIR

DIR/model            the embedded policy before any question was answered (`policy.build_base`): what stands in for a
download DIR/texts.jsonl      the training questions without their images, for a first text-only stage: how questions
are answered DIR/instruct.jsonl   the training questions as a careless annotator answered them: what instruction tuning
gets, and RL mends
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingshu_rl.demo.careless import careless_text
from lingshu_rl.demo.model import save
from lingshu_rl.demo.policy import Recipe, build_base, training_rows
from lingshu_rl.storage.runfolder import write_text

_COMPLETION = re.compile(r"<think> (.*) </think><answer> (.*) </answer>")


def careless_row(row: Mapping[str, Any], rng: random.Random, share: float) -> dict[str, Any]:
    """The row with what a careless annotator thought and answered, wrong with probability `share`."""
    found = _COMPLETION.fullmatch(careless_text(row, rng, share))
    assert found is not None, row
    think, answer = found.groups()
    return {**row, "answer": answer, "meta": {**row["meta"], "think": think}}


def write_base(out: Path, recipe: Recipe, careless: float) -> None:
    rows, folder = training_rows()
    rng = random.Random(recipe.seed)
    located = [{**row, "images": [str(folder / image) for image in row["images"]]} for row in rows]
    write_text(out / "texts.jsonl", "".join(json.dumps({**row, "images": []}) + "\n" for row in rows))
    write_text(out / "instruct.jsonl", "".join(json.dumps(careless_row(row, rng, careless)) + "\n" for row in located))
    model, processor = build_base(recipe)
    save(model.to("cpu"), processor, out / "model")


def main() -> None:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lookup-steps", type=int, default=recipe.lookup_steps)
    parser.add_argument("--seeing-steps", type=int, default=recipe.seeing_steps)
    parser.add_argument("--pool-draws", type=int, default=recipe.pool_draws, help="draws of further images for seeing")
    parser.add_argument(
        "--careless", type=float, default=0.5, help="share of labels in instruct.jsonl that are off by a class"
    )
    parser.add_argument("--seed", type=int, default=recipe.seed)
    args = parser.parse_args()
    recipe = replace(
        recipe,
        lookup_steps=args.lookup_steps,
        seeing_steps=args.seeing_steps,
        pool_draws=args.pool_draws,
        seed=args.seed,
    )
    write_base(args.out, recipe, args.careless)


if __name__ == "__main__":
    main()
