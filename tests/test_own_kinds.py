"""A run on kinds that the library does not know by name, as recipes/custom_reward.py has one, and on its own places."""

from __future__ import annotations

import json
import os

import pytest
from launching import ROOT, launch
from PIL import Image
from short_runs import SHORT, metrics_of

pytestmark = pytest.mark.slow


def test_rows_of_own_kinds_go_through_a_whole_run(servers, tmp_path):
    Image.new("L", (224, 112), 90).save(tmp_path / "a.png")
    pixels = {"box_scale": "pixel", "image_size": [224, 112]}
    kinds = {
        "custom_reward:BOX": ([60, 30, 90, 50], {}),
        "box": ([60, 30, 90, 50], pixels),
        "points": ([60, 30, 90, 50], pixels),
        "mask": ([[10, 10, 90, 10, 90, 90]], pixels),
    }
    for split in ("train", "test"):
        rows = [
            {
                "id": f"{split}-{kind}-{n}",
                "images": ["a.png"],
                "question": "Where is it?",
                "kind": kind,
                "answer": answer,
                "meta": meta,
            }
            for kind, (answer, meta) in kinds.items()
            for n in range(2)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    env = {**servers.env, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")])}
    data = [*(f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "test")), "data.max_pixels=12544"]
    done = launch([*SHORT, *servers.settings, *data, "data.curriculum=none", f"run.dir={folder}"], env=env)
    assert done.returncode == 0, done.stdout
    assert "8 rows (2 custom_reward:BOX, 2 box, 2 points, 2 mask): all labels earn 1" in done.stdout
    asked = {
        key.removeprefix("reward/kind/") for row in metrics_of(folder) for key in row if key.startswith("reward/kind/")
    }
    assert asked == set(kinds)
    after = [json.loads(line) for line in (folder / "eval" / "after.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in after} == set(kinds) and all(row["value"] is not None for row in after)
    assert (folder / "report.html").is_file()
