"""Tables to lines "label: value". A column (or row) that is a side gives its side to the cell's label."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rewards.report.lexicon import Lexicon
from rewards.report.terms import find

_CELLS = re.compile(r"[^\S\n]*(?:[|;]|\t|(?<=\S) {2,}(?=\S))[^\S\n]*")
_TABLE = re.compile(r"[|;\t]|\S  +\S")
_RULE = re.compile(r"[\s|:+=-]*")
_WIDEST = 12  # cells
_SIDES = {"left", "right"}

Row = tuple[str, ...]


def unfold(text: str, lexicon: Lexicon) -> str:
    """The text with its tables as lines; text without any comes back as it is."""
    if not any(sign in text for sign in ("|", ";", "\t", "  ")):
        return text
    out: list[str] = []
    block: list[str] = []
    for line in [*text.split("\n"), ""]:
        if _TABLE.search(line):
            block.append(line)
            continue
        out += _lines(block, lexicon)
        block = []
        out.append(line)
    return "\n".join(out)


def _lines(block: list[str], lexicon: Lexicon) -> list[str]:
    """The lines of a block in which every one has cells; those of no table as they are."""
    rows = [tuple(_CELLS.split(line.strip().strip("|").strip(" "))) for line in block if not _RULE.fullmatch(line)]
    width = len(rows[0]) if rows else 0
    if len(rows) < 2 or not 2 <= width <= _WIDEST or any(len(row) != width for row in rows):
        return block
    for table in (rows, list(zip(*rows, strict=True))):
        sides = [_side(cell, lexicon) for cell in table[0]]
        if _SIDES.issubset(sides):
            return list(_by_side(sides, table[1:]))
    answers = {word for _, words in lexicon.answers for word in words}
    if width == 2 and all(value.lower().rstrip(".") in answers for _, value in rows):
        return [f"{label}: {value}" for label, value in rows]
    return block


def _by_side(sides: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        for side, cell in zip(sides, row, strict=True):
            if side and cell:  # a first column without a side holds what the answers are about
                yield f"{side} {cell.rstrip('.')}." if sides[0] else f"{side} {row[0]}: {cell.rstrip('.')}."


def _side(cell: str, lexicon: Lexicon) -> str:
    """The one side that a heading cell names, with nothing but an organ beside it."""
    marks = find(tuple(lexicon.stem(word) for word in re.findall(r"[^\W_]+", cell.lower())), lexicon)
    sides = {str(m.value) for m in marks.modifiers if m.kind == "side"}
    return sides.pop() if len(sides) == 1 and not marks.heads else ""
