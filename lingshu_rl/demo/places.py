"""Where is it? Rows of the kind `box` from masks that ship inside packages: the brain and its ventricles in MNI slices.

    python -m lingshu_rl.demo.places --out DIR      # DIR/train.jsonl, DIR/test.jsonl, DIR/careless.jsonl, DIR/images/

A slice lies anywhere in its picture, in any size, so that no one place is often right. Boxes are told in a grid of GRID
cells a side: a policy of 1.8 M parameters that sees 16 image tokens can learn that in minutes, pixels it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from lingshu_rl.demo import brain
from lingshu_rl.demo.images import SIZE, vary

GRID = 8  # cells a side; a cell is a patch of 14 pixels
SEED = 20260611
COUNTS = {"train": 2400, "test": 320}
FIELD_MM = (230, 420)  # what a picture shows from edge to edge
FAINTEST = 4  # pixels of 112: less of a structure does not show
TARGETS = {"brain": "Where is the brain?", "ventricle": "Where are the ventricles?"}


def slices(split: str, count: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], Mapping[str, str]]]:
    """uint8 pictures (SIZE, SIZE), the masks of their structures, and the plane."""
    volumes, origin = brain.volumes()
    area_cm2 = {plane: np.moveaxis(volumes["brain"] > 0, axis, 0).sum((1, 2)) / 100 for plane, axis in brain.AXES.items()}
    for n in range(count):
        plane = tuple(brain.AXES)[n % 3]
        axis = brain.AXES[plane]
        index = brain.draw_slice(plane, split, area_cm2[plane], origin[axis], rng)
        cut = {key: np.moveaxis(volume, axis, 0)[index] for key, volume in volumes.items()}
        yield *_placed(cut, rng), {**brain.META, "plane": plane}


def _placed(cut, rng):
    upright = {key: np.flipud(value.T) for key, value in cut.items() if key in ("t1", *TARGETS)}
    rows, columns = (np.nonzero(upright["brain"].any(axis=axis))[0] for axis in (1, 0))
    upright = {key: value[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] for key, value in upright.items()}
    height, width = upright["t1"].shape
    field = max(int(rng.integers(*FIELD_MM)), height + 2, width + 2)
    left, top = int(rng.integers(0, field - width + 1)), int(rng.integers(0, field - height + 1))

    def place(key):
        canvas = np.zeros((field, field), np.uint8)
        canvas[top : top + height, left : left + width] = upright[key]
        return np.asarray(Image.fromarray(canvas).resize((SIZE, SIZE), Image.Resampling.BOX))

    return vary(place("t1"), rng, bool(rng.random() < 0.15)), {key: place(key) > 127 for key in TARGETS}
