"""The miniature plan's starting point: a network that finds words and sees, but has never tied one to the other.

    python -m lingshu_rl.demo.base --out DIR

DIR/model          the embedded policy before any question was answered (`policy.build_base`): what stands in for a
download DIR/texts.jsonl    the training questions without their images, for a first text-only stage: how questions are
answered
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from lingshu_rl.demo.model import save
from lingshu_rl.demo.policy import Recipe, build_base, training_rows
from lingshu_rl.runfolder import write_text


def write_base(out: Path, recipe: Recipe) -> None:
    rows, _ = training_rows()
    write_text(out / "texts.jsonl", "".join(json.dumps({**row, "images": []}) + "\n" for row in rows))
    model, processor = build_base(recipe)
    save(model.to("cpu"), processor, out / "model")


def main() -> None:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lookup-steps", type=int, default=recipe.lookup_steps)
    parser.add_argument("--seeing-steps", type=int, default=recipe.seeing_steps)
    parser.add_argument("--pool-draws", type=int, default=recipe.pool_draws, help="draws of further images for seeing")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    args = vars(parser.parse_args())
    write_base(args.pop("out"), replace(recipe, **args))


if __name__ == "__main__":
    main()
