"""The boxes of the grounding recipe: right, anywhere, and not to be guessed."""

from __future__ import annotations

import json

import numpy as np
import pytest
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
