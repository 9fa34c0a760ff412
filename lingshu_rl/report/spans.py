"""A completion with the places in it where its reward was earned or lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from lingshu_rl.report.text import signed

SHOWN, HEAD, TAIL = 600, 320, 240  # characters: of a longer piece that earned nothing, its two ends


class Piece(NamedTuple):
    """side: up (it earned), down (it cost), flat (neither), "" (no span). told: of what, and how much."""

    text: str
    side: str
    told: str


def coloured(row: Mapping[str, Any]) -> Iterator[Piece]:
    """The completion of a stored row, in pieces that the same spans hold."""
    text = str(row["completion"])
    spans = [(*span, name) for name, own in json.loads(row.get("spans") or "{}").items() for span in own]
    borders = {0, len(text), *(min(place, len(text)) for start, end, *_ in spans for place in (start, end))}
    for start, end in pairwise(sorted(borders)):
        held = [(points, name) for a, b, points, name in spans if a <= start and end <= b]
        total = sum(points for points, _ in held)
        side = ("up" if total > 0 else "down" if total < 0 else "flat") if held else ""
        piece = text[start:end]
        if not held and len(piece) > SHOWN:
            piece = f"{piece[:HEAD]} […] {piece[-TAIL:]}"
        yield Piece(piece, side, ", ".join(f"{name} {signed(points, 2)}" for points, name in held))
