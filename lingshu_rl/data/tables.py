"""Rows where they lie: each source can be read through once and asked for a single row later, by its number."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lingshu_rl.data.rows import RowError


class Rows(Protocol):
    """word: what a row's number counts ("line", "row"), from 1. Iterating gives numbers with rows, or what reading gave."""

    word: str

    def __iter__(self) -> Iterator[tuple[int, Any]]: ...

    def row(self, number: int) -> Any: ...


class JsonLines:
    """A file of one JSON object a line. Only where lines begin is kept, and the file open: one put in its place is not seen."""

    word = "line"

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.starts = array("q", [0])

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.file.seek(0)
        self.starts = array("q", [0])
        for number, line in enumerate(self.file, start=1):
            self.starts.append(self.starts[-1] + len(line))
            if line.strip():
                yield number, json_row(line)

    def row(self, number: int) -> Any:
        start, end = self.starts[number - 1 : number + 1]
        return json_row(os.pread(self.file.fileno(), end - start, start))


class ParquetTable:
    """Columns in Arrow's memory, which is near the file's uncompressed size; images in bytes count in full."""

    word = "row"

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.table = pyarrow.parquet.read_table(path, memory_map=True)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        number = 0
        for batch in self.table.to_batches(max_chunksize=256):
            for row in batch.to_pylist():
                yield (number := number + 1), row

    def row(self, number: int) -> Any:
        return self.table.slice(number - 1, 1).to_pylist()[0]


class RowList:
    """Rows in memory, or a `datasets.Dataset`, which reads each row from its own files."""

    word = "row"

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    @classmethod
    def of(cls, rows: Iterable[Any]) -> RowList:
        return cls(list(rows))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, row in enumerate(self.rows, start=1):
            usable = isinstance(row, Mapping)
            yield number, row if usable else RowError(f"a row is a mapping, not {type(row).__name__}")

    def row(self, number: int) -> Any:
        return self.rows[number - 1]


def json_row(line: bytes) -> Any:
    """The object of a line, or the RowError that says why there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return RowError(f"not JSON: {error}")
    return row if isinstance(row, dict) else RowError(f"a line holds one JSON object, this one a {type(row).__name__}")
