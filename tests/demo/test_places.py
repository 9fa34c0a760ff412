"""The boxes of the grounding recipe: right, anywhere, and not to be guessed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from launching import ROOT
from PIL import Image

from lingshu_rl.demo import places
from rewards import default_reward
from rewards.preflight import check
from rewards.rows import read_row


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "images").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "COUNTS", {"train": 80, "test": 40})
        return folder, {split: list(places.rows(split, folder / "images")) for split in places.COUNTS}


def test_rows_are_usable_and_no_constant_answer_pays_much(made):
    _, rows = made
    for split, count in (("train", 80), ("test", 40)):
        assert (
            len(rows[split]) == count and sum(row["answer"] == [] for row in rows[split]) == count // places.EMPTY_EVERY
        )
        report = check([read_row(json.loads(json.dumps(row))).sample for row in rows[split]], default_reward())
        assert report.ok and not report.doubts, report.text()
        always = [probe.mean for probe in report.probes if probe.name.startswith("always")]
        assert len(always) >= 3 and max(always) < 0.4


def test_a_box_holds_the_brain_and_little_else(made):
    folder, rows = made
    step = 112 // places.GRID
    inside, outside = [], []
    for row in rows["train"]:
        if row["answer"]:
            x1, y1, x2, y2 = (step * line for line in row["answer"])
            blue = np.asarray(Image.open(folder / row["images"][0]))[..., 2].astype(float)
            cells = blue.reshape(places.GRID, step, places.GRID, step)[:, 1:, :, 1:].mean(
                (1, 3)
            )  # without the graticule
            box = np.zeros(cells.shape, bool)
            box[y1 // step : y2 // step, x1 // step : x2 // step] = True
            inside.append(cells[box].mean())
            outside.append(cells[~box].mean())
    assert np.mean(inside) > 2 * np.mean(outside)


def test_the_same_pictures_come_again(made, tmp_path):
    folder, rows = made
    (tmp_path / "images").mkdir()
    again = [row for row, _ in zip(places.rows("train", tmp_path / "images"), range(5), strict=False)]
    assert again == rows["train"][:5]
    for row in again:
        assert (tmp_path / row["images"][0]).read_bytes() == (folder / row["images"][0]).read_bytes()


def test_a_mask_in_cells():
    mask = np.zeros((112, 112), np.uint8)
    mask[30:58, 14:70] = 255
    assert places.cells_of(mask) == [1, 2, 5, 4]
    mask[:] = 0
    mask[111, 111] = 255
    assert places.cells_of(mask) == [7, 7, 8, 8]


def test_the_recipes_settings_are_those_of_a_tuning_and_a_run(monkeypatch, tmp_path):
    from lingshu_rl.pipeline.steps import load_pipeline
    from lingshu_rl.planning.given import load_config
    from lingshu_rl.sft.settings import load_sft_config

    monkeypatch.chdir(ROOT)
    for split in places.COUNTS:
        (tmp_path / f"{split}.jsonl").write_text("{}")
    values = {"sft_steps": "4", "rl_steps": "2", "limit": "0"}
    steps = load_pipeline(ROOT / "recipes" / "grounding.yaml").steps
    words = {
        name: re.sub(r"{(\w+)}", lambda field: values.get(field[1], str(tmp_path)), step.run).replace("'", "").split()
        for name, step in steps.items()
    }
    sft = load_sft_config("recipes/configs/sft_boxes.yaml", [word for word in words["sft"] if "=" in word])
    assert sft.stages["boxes"].trainer["max_steps"] == 4 and sft.test.data == str(tmp_path / "test.jsonl")
    assert load_config(None, [word for word in words["rl"] if "=" in word]).train.steps == 2


@pytest.mark.endurance
def test_the_recipe_learns(tmp_path):
    """Data, SFT and RL as they are: boxes overlap more after RL, and not without the image."""
    command = [sys.executable, "-m", "lingshu_rl.cli", "pipeline", "recipes/grounding.yaml", f"dir={tmp_path}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    _, tuned, trained = json.loads((tmp_path / "table.json").read_text())
    assert trained["gain"]["ci95"][0] > 0 and trained["accuracy"] > tuned["accuracy"]
    summary = json.loads(next(tmp_path.glob("rl-*/summary.json")).read_text())
    assert summary["blank_image"]["accuracy"] < summary["before"]["accuracy"]
