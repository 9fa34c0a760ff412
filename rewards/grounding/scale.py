"""What the numbers of a place mean: which number stands for the far edge of the image, and in what order they come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.imports import hint

PIXEL = "pixel"
USUAL = (PIXEL, 1, 100, 1000, 1024)  # that models and data sets use
# Rows of a matrix that takes the four numbers of a box to its corners x1, y1, x2, y2.
ORDERS: Mapping[str, np.ndarray] = {
    "xyxy": np.eye(4),
    "yxyx": np.eye(4)[[1, 0, 3, 2]],
    "xywh": np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1.0]]),
    "cxcywh": np.array([[1, 0, -0.5, 0], [0, 1, 0, -0.5], [1, 0, 0.5, 0], [0, 1, 0, 0.5]]),
}
_FROM_CORNERS = {order: np.linalg.inv(matrix) for order, matrix in ORDERS.items()}
WRITTEN = {
    "xyxy": "[x1, y1, x2, y2]",
    "yxyx": "[y1, x1, y2, x2]",
    "xywh": "[x, y, width, height]",
    "cxcywh": "[x of the middle, y of the middle, width, height]",
}


class ScaleError(ValueError):
    """A scale, an order or a size that a row leaves out or that cannot be one."""


@dataclass(frozen=True)
class Frame:
    """A way to write places. full: the numbers that stand for the right and for the lower edge of the image."""

    full: tuple[float, float]
    order: str = "xyxy"

    def to_unit(self, numbers: np.ndarray) -> np.ndarray:
        """(n, 4) numbers of boxes, or (n, 2) of points, as x, y in shares of the image's sides."""
        if numbers.shape[-1] == 4:
            return numbers @ ORDERS[self.order].T / np.array(self.full * 2)
        return (numbers[:, ::-1] if self.order[0] == "y" else numbers) / np.array(self.full)

    def from_unit(self, shares: np.ndarray) -> np.ndarray:
        """The way back."""
        if shares.shape[-1] == 4:
            return shares * np.array(self.full * 2) @ _FROM_CORNERS[self.order].T
        numbers = shares * np.array(self.full)
        return numbers[:, ::-1] if self.order[0] == "y" else numbers

    def rounded(self, numbers: np.ndarray) -> np.ndarray:
        """To the numbers that are written in this frame: whole ones, or thousandths in a scale of 1."""
        return np.round(numbers, 0 if min(self.full) > 1 else 3)


def label_frame(meta: Mapping[str, Any]) -> Frame:
    """How the row's label is written: `meta.box_scale` and `meta.box_order`. Raises ScaleError."""
    if "box_scale" not in meta:
        raise ScaleError(
            "say in meta.box_scale what the numbers are: 'pixel' (with meta.image_size), or the number that stands "
            "for the far edge, such as 1 or 1000"
        )
    scale, size = meta["box_scale"], size_in(meta, "image_size")
    if scale == PIXEL and size is None:
        raise ScaleError("a label in pixels needs meta.image_size, [width, height] of the image that was measured")
    return frame_of("box_scale", scale, "box_order", meta.get("box_order", "xyxy"), size)


def answer_frame(meta: Mapping[str, Any]) -> Frame:
    """How an answer is asked for: as the label, or by `meta.answer_scale` and `meta.answer_order`. Raises ScaleError.

    Pixels are those of the image that the model sees: `meta.seen_size`, which a run fills in, else `meta.image_size`.
    """
    scale = meta.get("answer_scale", meta.get("box_scale"))
    size = size_in(meta, "seen_size") or size_in(meta, "image_size")
    if scale == PIXEL and size is None:
        raise ScaleError("answers in pixels need meta.seen_size, [width, height] of the image that the model sees")
    order = meta.get("answer_order", meta.get("box_order", "xyxy"))
    return frame_of("answer_scale", scale, "answer_order", order, size)


def frame_of(scale_key: str, scale: Any, order_key: str, order: Any, size: tuple[float, float] | None) -> Frame:
    if str(order) not in ORDERS:
        raise ScaleError(f"meta.{order_key} is one of {', '.join(ORDERS)}, got {order!r}{hint(order, ORDERS)}")
    if scale == PIXEL and size is not None:
        return Frame(size, order)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ScaleError(f"meta.{scale_key} is 'pixel' or a number such as 1 or 1000, got {scale!r}")
    return Frame((float(scale), float(scale)), order)


def size_in(meta: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """[width, height] under a key of meta, or None. Raises ScaleError."""
    size = meta.get(key)
    if size is None:
        return None
    sides = list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 2 or not all(isinstance(side, int | float) and 0 < side < math.inf for side in sides):
        raise ScaleError(f"meta.{key} is [width, height] in pixels, got {size!r}")
    return float(sides[0]), float(sides[1])


def told(meta: Mapping[str, Any]) -> dict[str, str]:
    """The scale and the order that an answer is asked in, in words for a prompt."""
    scale = meta.get("answer_scale", meta.get("box_scale"))
    order = str(meta.get("answer_order", meta.get("box_order", "xyxy")))
    far = f"{scale:g}" if isinstance(scale, int | float) else scale
    return {
        "scale": "pixels of the image" if scale == PIXEL else f"numbers from 0 to {far}",
        "box": WRITTEN.get(order, order),
        "point": "[y, x]" if order.startswith("y") else "[x, y]",
    }


def other_readings(meta: Mapping[str, Any]) -> list[tuple[str, Frame]]:
    """What the row's numbers could mean instead: another scale or order, as the key of meta that would say so."""
    size, scale, order = size_in(meta, "image_size"), meta.get("box_scale"), meta.get("box_order", "xyxy")
    scales = [other for other in USUAL if other != scale and (other != PIXEL or size)]
    return [
        (f"box_order: {other}", frame_of("box_scale", scale, "box_order", other, size))
        for other in ORDERS
        if other != order
    ] + [(f"box_scale: {other}", frame_of("box_scale", other, "box_order", order, size)) for other in scales]
