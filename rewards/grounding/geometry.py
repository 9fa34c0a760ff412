"""Overlap of boxes and regions, and who is whose. All places are in shares of the image's sides.

That changes no overlap: a scale along an axis is a factor of every area.
Sources: IoU (Jaccard index); GIoU, Rezatofighi et al. 2019, arXiv 1902.09630, equation in algorithm 1; matching of
sets, Kuhn 1955, here scipy's; Dice 1945; run lengths as the COCO API writes them (column by column, first run of
zeros).
"""

from __future__ import annotations

import numpy as np


def areas(boxes_N4: np.ndarray) -> np.ndarray:
    """(N,); 0 for a box whose corners are not in order."""
    return np.clip(boxes_N4[:, 2:] - boxes_N4[:, :2], 0, None).prod(-1)


def box_iou(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """(N, M): intersection over union of every pair, in [0, 1]."""
    shared = areas(_shared(a_N4, b_M4).reshape(-1, 4)).reshape(len(a_N4), len(b_M4))
    return _share(shared, areas(a_N4)[:, None] + areas(b_M4) - shared)


def box_giou(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """(N, M): IoU less the share of the smallest box around both that neither fills, in (-1, 1]."""
    shared = areas(_shared(a_N4, b_M4).reshape(-1, 4)).reshape(len(a_N4), len(b_M4))
    union = areas(a_N4)[:, None] + areas(b_M4) - shared
    around = np.concatenate(
        [np.minimum(a_N4[:, None, :2], b_M4[:, :2]), np.maximum(a_N4[:, None, 2:], b_M4[:, 2:])], axis=-1
    )
    whole = areas(around.reshape(-1, 4)).reshape(union.shape)
    return _share(shared, union) - _share(whole - union, whole)


def _shared(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.maximum(a_N4[:, None, :2], b_M4[:, :2]), np.minimum(a_N4[:, None, 2:], b_M4[:, 2:])], axis=-1
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def matched(worth_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs with the largest sum, each used once; pairs worth nothing are left out."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(worth_NM, maximize=True)
    kept = worth_NM[rows, columns] > 0
    return rows[kept], columns[kept]


def f1(hits: float, said: int, gold: int) -> float:
    """2 hits / (said + gold); 1 where nothing was to be said and nothing was."""
    return 2 * hits / (said + gold) if said + gold else 1.0


def f1_at(iou_NM: np.ndarray, threshold: float) -> float:
    """F1 of the largest set of pairs that overlap by at least the threshold."""
    rows, _ = matched((iou_NM >= threshold).astype(float))
    return f1(len(rows), *iou_NM.shape)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two boolean pictures of one shape; 1 for two empty ones."""
    return f1(float((a & b).sum()), int(a.sum()), int(b.sum()))


def filled(polygon_P2: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width): which pixels have their middle inside of a polygon in shares of the sides (even-odd rule)."""
    x, y = polygon_P2[:, 0] * width, polygon_P2[:, 1] * height
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    middle_H = np.arange(height)[:, None] + 0.5
    crossed_HP = (y <= middle_H) != (y2 <= middle_H)
    rows, edges = np.nonzero(crossed_HP)
    at = x[edges] + (rows + 0.5 - y[edges]) * (x2[edges] - x[edges]) / (y2[edges] - y[edges])
    # From each crossing on to the right a pixel is on the other side.
    turns = np.zeros((height, width + 1), np.int64)
    np.add.at(turns, (rows, np.clip(np.ceil(at - 0.5), 0, width).astype(int)), 1)
    return turns.cumsum(1)[:, :width] % 2 == 1


def from_runs(counts: list[int], height: int, width: int) -> np.ndarray:
    """(height, width) of uncompressed run lengths. Raises ValueError where they are not height x width long."""
    runs = np.asarray(counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths must be whole numbers that sum to {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def unpacked(text: str) -> list[int]:
    """The run lengths of COCO's compressed text: five bits a character, from the fourth on less the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"{character!r} is no part of compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end in the middle of a number")
    return counts


def sampled(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture at the middles of another grid's pixels."""
    rows, columns = (
        ((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip((height, width), mask.shape, strict=True)
    )
    return mask[rows][:, columns]
