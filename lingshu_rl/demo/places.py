"""Where is it? Rows of the kind `box`: the brain in MNI slices, from its mask; nothing in pictures of something else.

    python -m lingshu_rl.demo.places --out DIR      # DIR/train.jsonl, DIR/test.jsonl, DIR/images/

Made for a policy of 1.8 M parameters that sees a picture as 16 tokens and knows its places by rotary positions alone.
So a slice lies anywhere in its picture and in any size, which leaves no place that is often right; boxes are told in a
grid of 8 x 8 cells; and a graticule is drawn over the picture, whose colours tell column and row. Pictures of stained
nuclei have the same graticule and no brain: the answer there is [].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lingshu_rl.demo import brain, read
from lingshu_rl.demo.images import SIZE, vary
from lingshu_rl.demo.studies import CELLS
from lingshu_rl.storage.runfolder import write_text

GRID = 8  # cells a side; a cell is a patch of the policy, 14 pixels
SEED = 20261129
COUNTS = {"train": 2000, "test": 240}
EMPTY_EVERY = 8  # one picture in so many shows no brain
FIELD_MM = (230, 420)  # what a picture shows from edge to edge
NUCLEI_META = {"modality": "fluorescence", "organ": "cells", "patient_id": "stardist-img2d", "source": "stardist img2d"}


def rows(split: str, images: Path) -> Iterator[dict[str, Any]]:
    """The rows of one split; their pictures are written into the folder `images`."""
    rng = np.random.default_rng([SEED, sorted(COUNTS).index(split)])
    brains, nuclei = _brains(split, rng), _nuclei(split, rng)
    for n in range(COUNTS[split]):
        picture, box, meta = next(nuclei if n % EMPTY_EVERY == 0 else brains)
        name = f"place-{split}-{n:04d}"
        Image.fromarray(graticule(picture)).save(images / f"{name}.png")
        yield {
            "id": name,
            "images": [f"images/{name}.png"],
            "question": "Where is the brain?",
            "answer": box,
            "kind": "box",
            "meta": {**meta, "box_scale": GRID, "task": "brain box" if box else "no brain"},
        }


Found = Iterator[tuple[np.ndarray, list[int], Mapping[str, str]]]  # uint8 (SIZE, SIZE), its box in cells, meta


def _brains(split: str, rng: np.random.Generator) -> Found:
    volumes, origin = brain.volumes()
    area_cm2 = {
        plane: np.moveaxis(volumes["brain"] > 0, axis, 0).sum((1, 2)) / 100 for plane, axis in brain.AXES.items()
    }
    while True:
        for plane, axis in brain.AXES.items():
            index = brain.draw_slice(plane, split, area_cm2[plane], origin[axis], rng)
            shown = ("t1", "t1", "gm")[int(rng.integers(3))]
            cut, brain_cut = (np.flipud(np.moveaxis(volumes[key], axis, 0)[index].T) for key in (shown, "brain"))
            picture, mask = _placed(cut, brain_cut, rng)
            yield vary(picture, rng), cells_of(mask), brain.META


def _placed(slice_: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The brain of a slice (1 mm pixels) somewhere in a black field, and its mask, both (SIZE, SIZE) uint8."""
    across, down = (np.nonzero(mask.any(axis=axis))[0] for axis in (0, 1))
    cut = np.s_[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
    height, width = mask[cut].shape
    field = max(int(rng.integers(*FIELD_MM)), height, width)
    left, top = int(rng.integers(field - width + 1)), int(rng.integers(field - height + 1))

    def seen(pixels: np.ndarray) -> np.ndarray:
        canvas = np.zeros((field, field), np.uint8)
        canvas[top : top + height, left : left + width] = pixels[cut]
        return np.asarray(Image.fromarray(canvas).resize((SIZE, SIZE), Image.Resampling.BOX))

    return seen(slice_), seen(mask)


def _nuclei(split: str, rng: np.random.Generator) -> Found:
    ((tile, _),) = read.fluorescence()
    left, top, right, bottom = read.pixels_of(tile, CELLS[split])
    while True:
        side = int(rng.integers(60, min(right - left, bottom - top)))
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
        crop = Image.fromarray(tile[y : y + side, x : x + side]).resize((SIZE, SIZE), Image.Resampling.BOX)
        yield vary(np.asarray(crop), rng), [], NUCLEI_META


def cells_of(mask: np.ndarray) -> list[int]:
    """[x1, y1, x2, y2] of a mask in lines of the grid, the nearest ones, at least a cell wide and high."""
    spans = []
    for axis in (0, 1):
        filled = np.nonzero((mask > 127).any(axis=axis))[0]
        first = min(round(filled[0] * GRID / SIZE), GRID - 1)
        spans.append((first, max(round((filled[-1] + 1) * GRID / SIZE), first + 1)))
    (x1, x2), (y1, y2) = spans
    return [x1, y1, x2, y2]


def graticule(picture: np.ndarray) -> np.ndarray:
    """RGB with a line at the upper and the left edge of every cell; red tells the column, green the row."""
    drawn = np.repeat(picture[..., None], 3, axis=-1)
    step = SIZE // GRID
    for n in range(GRID):
        level = 255 * n // (GRID - 1)
        drawn[n * step, :, 1:] = (level, 255 - level)
        drawn[:, n * step, ::2] = (level, 255 - level)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    (out / "images").mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows(split, out / "images")))


if __name__ == "__main__":
    main()
