"""Tables as spreadsheets and scripts write them: their delimiter, and quotes that swallow nothing."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

CELL = 1 << 30  # characters a cell may hold: base64 images
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # of a header, the first that stands in it
UTF16 = b"\xff\xfe", b"\xfe\xff"  # how such a file begins
_EXCELS = re.compile(r'"?sep=(.)"?\s*')  # the line by which Excel is told the delimiter


def records(file: Iterable[str], usual: str, delimiter: str = "", header: bool = True) -> Iterator[list[str] | str]:
    """The cells of each record, its header's as well, or why there are none. A blank line is no record.

    usual: the delimiters that it may have; without a delimiter it is what Excel's line sep=; says, or the first of them
    that stands in the header. Without a header cells have no quotes around them. Raises ValueError where a quote never
    closes: everything behind it would be one cell.
    """
    csv.field_size_limit(CELL)
    lines = iter(file)
    start = _start(lines)
    if told := header and _EXCELS.fullmatch(start[-1]):
        delimiter, start[-1] = delimiter or told[1], "\n"
    delimiter = delimiter or (_delimiter(start[-1], usual) if header else usual[0])
    quoted: Any = csv.QUOTE_MINIMAL if header else csv.QUOTE_NONE
    reader = csv.reader(chain(start, lines), delimiter=delimiter, quoting=quoted, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ValueError(
                    f"a quote opens in the record of line {begin} and never closes; close it, or double it "
                    "where it belongs to the text"
                ) from error
            where = f"line {begin}" + (f" to {reader.line_num}" if reader.line_num > begin else "")
            yield f"{where}: {error}: a quote inside of a cell is written twice, and a cell that opens one closes it"
        else:
            yield from [cells] if cells else []


def _start(lines: Iterable[str]) -> list[str]:
    """The lines up to the first that is not blank."""
    found = []
    for line in lines:
        found.append(line)
        if line.strip():
            return found
    return [*found, ""]


def _delimiter(header: str, usual: str) -> str:
    """The first of the usual delimiters that stands in the header outside of quotes, else the first."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((sign for sign in usual if sign in bare), usual[0])
