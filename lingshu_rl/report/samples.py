"""A few of a step's completions with their images, as tables in the run's trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from lingshu_rl.imaging.files import UnreadablePicture
from lingshu_rl.imaging.images import Picture
from lingshu_rl.report.html import widest
from lingshu_rl.text.markup import table_line

EVERY = 10  # steps
PIXELS = 256  # longest side of an image
COLUMNS = ("question", "label", "completion", "reward", "advantage", "status", "reason")

Row = Mapping[str, Any]
Pixels = Any  # a PIL image


def shows_samples(step: int, steps: int) -> bool:
    """Whether the trackers get samples of this step, counted from 1."""
    return step in (1, steps) or step % EVERY == 0


def show_samples(trackers: Sequence[Any], step: int, rows: Sequence[Row], images: Mapping[str, Picture]) -> None:
    """Give each tracker that takes tables the completions of the questions whose rewards are spread the widest.

    trackers: accelerate's. rows: as `RunFolder.write_rollouts` returns them. images: the first one of a question, by
    its id.
    """
    able = [(tracker, TABLES[tracker.name]) for tracker in trackers if tracker.name in TABLES]
    if not able:
        return
    names = widest(rows)
    pixels = {name: image for name in names if name in images and (image := _thumbnail(images[name])) is not None}
    shown = [row for name in names for row in rows if row["prompt_id"] == name]
    for tracker, table in able:
        table(tracker, step, shown, pixels)


def _thumbnail(picture: Picture) -> Pixels | None:
    try:
        small = picture.pixels().convert("RGB")
    except UnreadablePicture:  # it was readable when the engine was asked
        return None
    small.thumbnail((PIXELS, PIXELS))
    return small


def _cells(row: Row) -> list[Any]:
    return [row[{"label": "gold", "reward": "value"}.get(name, name)] for name in COLUMNS]


def _table_object(tracker: Any, step: int, rows: Sequence[Row], pixels: Mapping[str, Pixels]) -> None:
    """wandb's and trackio's: one interface."""
    made = import_module(tracker.name)
    data = [[*_cells(r), made.Image(pixels[r["prompt_id"]]) if r["prompt_id"] in pixels else None] for r in rows]
    tracker.log({"samples": made.Table(columns=[*COLUMNS, "image"], data=data)}, step=step)


def _text_and_images(tracker: Any, step: int, rows: Sequence[Row], pixels: Mapping[str, Pixels]) -> None:
    """TensorBoard has texts and images, but no tables: one of each a question."""
    for n, name in enumerate(dict.fromkeys(row["prompt_id"] for row in rows)):
        lines = [table_line(map(str, _cells(row))) for row in rows if row["prompt_id"] == name]
        head = [table_line(COLUMNS), "|" + "---|" * len(COLUMNS)]
        tracker.writer.add_text(f"samples/{n}", "\n".join([*head, *lines]), step)
        if name in pixels:
            tracker.writer.add_image(f"samples/{n}", np.asarray(pixels[name]), step, dataformats="HWC")


TABLES: Mapping[str, Callable[[Any, int, Sequence[Row], Mapping[str, Pixels]], None]] = {
    "tensorboard": _text_and_images,
    "wandb": _table_object,
    "trackio": _table_object,
}
