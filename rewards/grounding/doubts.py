"""Whether numbers were meant in another scale or order than the one they are read in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.grounding import geometry
from rewards.grounding.scale import ORDERS, PIXEL, USUAL, Frame

ENOUGH = 20  # answers or labels before anything is said of them
TRIED = 500
RISE = 0.1  # mean overlap that another reading must add
NEAR = 0.1  # shares of a side within which a point counts as right here
SPREAD = 0.8  # of a smaller scale that labels fill where they were written in it


def doubts(parsed: Sequence[Any]) -> list[str]:
    """One line each, from many results' `parsed`: labels that fill a smaller scale, answers that fit another one."""
    told = [p for p in parsed if isinstance(p, Mapping) and p.get("frame") and p.get("gold")][-TRIED:]
    return [line for line in (_smaller(told), _other(told)) if line]


def _smaller(told: Sequence[Mapping[str, Any]]) -> str:
    """Labels of 0 to 1000 that never go beyond 256, on images of 256 pixels, say."""
    for scale in USUAL:
        with_size = [p for p in told if scale != PIXEL or p["size"]]
        # The farthest number of each label, in shares of the scale that it may have been written in.
        far = [_farthest(p) * np.array(p["frame"][:2]) / _full(scale, p) for p in with_size]
        room = [min(np.array(p["frame"][:2]) / _full(scale, p)) for p in with_size]
        enough = len(far) >= ENOUGH and len(far) == len(told) and min(room) >= 1 / SPREAD
        if enough and np.max(far) <= 1.01 and np.max(far, axis=0).min() >= SPREAD:
            reach = max(float(_farthest(p).max()) for p in told)
            return (
                f"no label of {len(told)} goes beyond {100 * reach:.3g} % of the image, and all fill the scale of "
                f"box_scale: {scale}: is that what their numbers are?"
            )
    return ""


def _farthest(parsed: Mapping[str, Any]) -> np.ndarray:
    """(2,): the largest x and y of the label, in shares."""
    return np.max([np.reshape(place["outline"], (-1, 2)).max(0) for place in parsed["gold"]], axis=0)


def _full(scale: Any, parsed: Mapping[str, Any]) -> np.ndarray:
    return np.array(parsed["size"] if scale == PIXEL else [scale, scale], float)


def _other(told: Sequence[Mapping[str, Any]]) -> str:
    """Answers that would earn more if their numbers were read otherwise."""
    answered = [p for p in told if p.get("said") and all(place.get("numbers") for place in p["said"])]
    if len(answered) < ENOUGH:
        return ""
    asked = float(np.mean([_overlap(p, Frame(tuple(p["frame"][:2]), p["frame"][2])) for p in answered]))
    name, best = max(
        ((name, _mean(answered, scale, order)) for name, scale, order in _readings()), key=lambda pair: pair[1]
    )
    if best < asked + RISE:
        return ""
    return (
        f"{len(answered)} answers agree with their labels by {asked:.2f} as they are read, by {best:.2f} as {name}: "
        "the model writes another scale than it is asked for, or the labels are in another one than their rows say"
    )


def _readings() -> Iterator[tuple[str, Any, str]]:
    for scale in USUAL:
        for order in ORDERS:
            yield f"box_scale: {scale}, box_order: {order}", scale, order


def _mean(answered: Sequence[Mapping[str, Any]], scale: Any, order: str) -> float:
    """The mean overlap under a reading; answers of images without a size count as none in pixels."""
    return float(
        np.mean(
            [
                _overlap(p, Frame(tuple(_full(scale, p)), order)) if scale != PIXEL or p["size"] else 0.0
                for p in answered
            ]
        )
    )


def _overlap(parsed: Mapping[str, Any], frame: Frame) -> float:
    """How well the answer's numbers, read in this frame, agree with the label: by IoU, or by points that are near."""
    said = frame.to_unit(np.array([place["numbers"] for place in parsed["said"]], float))
    gold = np.array([place["outline"] for place in parsed["gold"]], float)
    if said.shape[-1] == 4:
        worth = geometry.box_iou(said, gold)
    else:
        worth = (np.abs(said[:, None] - gold).max(-1) <= NEAR).astype(float)
    return geometry.f1(float(worth[geometry.matched(worth)].sum()), *worth.shape)
