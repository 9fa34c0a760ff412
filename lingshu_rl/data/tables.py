"""Records where they lie: each source can be read through once and asked for a single record later, by its number.

Text that has no lines to jump to (JSON arrays, tables, what is packed) is laid out as JSON lines in a temporary file
first.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

from lingshu_rl.apart import Apart, Ended, NoAnswer
from lingshu_rl.data.rows import RowError, refusing
from rewards.sheets import DELIMITERS, UTF16, records

PACKED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what packed files raise as well
NOT_UTF8 = "is not UTF-8 (byte 0x{:02x}); write the file anew, for example iconv -f latin1 -t utf-8 (gbk for Chinese)"
_BYTE = re.compile("[\udc80-\udcff]")  # how "surrogateescape" holds a byte that is no UTF-8
_INDEX = re.compile(r"__index_level_\d+__")  # pandas' names for an index without one
IN_MEMORY = (
    4 << 30
)  # bytes of parquet, unpacked; more goes through the cache of `datasets`, which all ranks share on disk
BATCH = 64 << 20  # bytes of parquet, as they are encoded, that are unfolded at once
# Keys of a JSON object under which its records stand, beside the splits' names.
CONTAINERS = ("data", "samples", "logs", "rows", "examples", "instances", "questions", "annotations")
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


class UnreadableSource(ValueError):
    """A file or folder that holds no records; the text says what it could be."""


class Rows(Protocol):
    """Numbers count from 1. Iterating gives them with what stands there: a record, or the RowError of an unreadable
    one."""

    def __iter__(self) -> Iterator[tuple[int, Any]]: ...

    def row(self, number: int) -> Any: ...

    def place(self, number: int) -> str:
        """Where it stands, for people: "line 7"."""
        ...


class JsonLines:
    """A file of one JSON object a line, whichever way lines end. Only where they begin is kept, and the file open: one
    put in its place is not seen. parse: what a line becomes.
    """

    def __init__(self, file: IO[bytes], word: str = "line", parse: Callable[[bytes], Any] | None = None) -> None:
        self.file, self.word, self.parse = file, word, parse or json_row
        self.starts = array("q", [0])

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.file.seek(0)
        self.starts = array("q", [0])
        lines = (line for piece in self.file for line in piece.splitlines(keepends=True))
        for number, line in enumerate(lines, start=1):
            self.starts.append(self.starts[-1] + len(line))
            if line.strip():
                yield number, self.parse(line)

    def row(self, number: int) -> Any:
        start, end = self.starts[number - 1 : number + 1]
        return self.parse(os.pread(self.file.fileno(), end - start, start))

    def place(self, number: int) -> str:
        return f"{self.word} {number}"


class ParquetTable:
    """Columns in Arrow's memory; what the file holds once for many rows is there once as well."""

    def __init__(self, path: Path) -> None:
        table = _read_parquet(path)
        self.table = table.drop_columns(index_columns(table.column_names))
        told = json.loads((self.table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = (told.get("info") or {}).get("features") or {}
        self.names = {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
        }

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for start in range(0, len(self.table), 256):
            try:
                rows = self._rows(start, 256)
            except RowError:  # one of them: the others are usable
                rows = [self.row(number) for number in range(start + 1, min(start + 256, len(self.table)) + 1)]
            yield from enumerate(rows, start=start + 1)

    def row(self, number: int) -> Any:
        try:
            return self._rows(number - 1, 1)[0]
        except RowError as error:
            return error

    def _rows(self, start: int, count: int) -> list[Any]:
        """Raises RowError for a cell that is no value: bad UTF-8, a date of no calendar, a class without a name."""
        with refusing():
            found = self.table.slice(start, count).to_pylist(maps_as_pydicts="strict")
            return [named(row, self.names) for row in found]

    def place(self, number: int) -> str:
        return f"row {number}"


def _read_parquet(path: Path) -> Any:
    """Its pyarrow.Table, in which a text that many rows share is held once. Raises ValueError where rows and lists
    unfold to more than IN_MEMORY: a file of a few KB can say a value a million times.
    """
    import pyarrow.parquet

    told = pyarrow.parquet.read_metadata(path)
    values, encoded = _counted(path)
    leaves = [told.schema.column(n) for n in range(told.num_columns)]
    flat = [leaf.name for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path == leaf.name]
    size = values  # a byte each at the least
    rows = told.num_rows * BATCH // max(1, encoded)
    file = pyarrow.parquet.ParquetFile(path, memory_map=True, read_dictionary=flat)
    batches: list[Any] = []
    for batch in file.iter_batches(min(max(rows, 16), 1 << 14)) if size <= IN_MEMORY else ():
        batches.append(batch)
        if (size := size + sum(map(_unfolded, batch.columns))) > IN_MEMORY:
            break
    if size > IN_MEMORY:
        raise ValueError(f"it unfolds to more than {IN_MEMORY >> 20:,} MiB; write it as several files, or as .jsonl")
    return pyarrow.Table.from_batches(batches, batches[0].schema if batches else file.schema_arrow)


COUNTER = Apart("lingshu_rl.data.parquet_child")


def _counted(path: Path) -> list[int]:
    """See `parquet_child`. Raises ValueError."""
    try:
        return list(json.loads(COUNTER.ask(str(path.absolute()))))
    except Ended:
        raise ValueError("its footer ends whoever reads it column by column: the file is damaged") from None
    except NoAnswer as why:
        raise ValueError(str(why)) from None


def _unfolded(array: Any) -> int:
    """Bytes of an Arrow array when each of its values is held for itself."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        lengths = compute.cast(compute.binary_length(array.dictionary), "int64")
        return int(compute.sum(lengths.take(array.indices)).as_py() or 0)
    if types.is_struct(kind):
        return sum(map(_unfolded, array.flatten()))
    if types.is_map(kind):
        return _unfolded(array.keys) + _unfolded(array.items)
    return _unfolded(array.flatten()) if types.is_nested(kind) else int(array.nbytes)


class RowList:
    """Rows in memory, or a `datasets.Dataset`, which reads each row from its own files."""

    def __init__(self, rows: Any, names: Mapping[str, Sequence[str]] | None = None) -> None:
        self.rows, self.names = rows, names or {}

    @classmethod
    def of(cls, rows: Iterable[Any]) -> RowList:
        return cls(list(rows))

    @classmethod
    def of_dataset(cls, data: Any) -> RowList:
        """Images stay as stored bytes or paths, class labels become their names."""
        import datasets

        whole = datasets.Image(decode=False)
        data = data.remove_columns(index_columns(data.column_names))
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, whole)
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                data = data.cast_column(column, datasets.List(whole))
        names = {c: f.names for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
        return cls(data, names)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, row in enumerate(self.rows, start=1):
            usable = isinstance(row, Mapping)
            yield (
                number,
                named(row, self.names) if usable else RowError(f"a row is a mapping, not {type(row).__name__}"),
            )

    def row(self, number: int) -> Any:
        return named(self.rows[number - 1], self.names)

    def place(self, number: int) -> str:
        return f"row {number}"


def index_columns(names: Iterable[str]) -> list[str]:
    """The columns that say only where a row stood in a data frame."""
    return [name for name in names if _INDEX.fullmatch(name)]


def named(row: Any, names: Mapping[str, Sequence[str]]) -> Any:
    """A record with the names of its class labels; -1 is the publisher's "not told"."""
    if not names:
        return row
    told = {c: names[c][row[c]] if row[c] >= 0 else None for c in names if isinstance(row.get(c), int)}
    return {**row, **told}


@dataclass
class TarShards:
    """WebDataset: files of one base name are a sample, keyed by their endings; only where they lie is kept.

    A sample is {"__key__": base name, "jpg": bytes, "json": parsed, "txt": text, ...}.
    """

    path: Path

    def __post_init__(self) -> None:
        self.file = unpacked(self.path) if self.path.suffix in PACKED else self.path.open("rb")
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(fileobj=self.file, mode="r:") as shard:
                for member in filter(tarfile.TarInfo.isfile, shard):
                    folder, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    sample = samples.setdefault(f"{folder}/{key}".lstrip("/"), {})
                    sample[ending.lower()] = member.offset_data, member.size
        except Exception as error:  # a damaged header shows as errors of tarfile and of Python itself
            raise UnreadableSource(f"{self.path}: is no whole tar file: {error}") from error
        self.samples = list(samples.items())
        self.size = os.fstat(self.file.fileno()).st_size

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number in range(1, len(self.samples) + 1):
            yield number, self.row(number)

    def row(self, number: int) -> Any:
        key, parts = self.samples[number - 1]
        record: dict[str, Any] = {"__key__": key}
        for ending, (start, size) in parts.items():
            if start + size > self.size:  # a sparse member is shorter in the file than it says
                return RowError(f"{key}.{ending} says that it has {size} bytes, which are not there")
            data = os.pread(self.file.fileno(), size, start)
            try:
                record[ending] = _MEMBERS.get(ending, bytes)(data)
            except (ValueError, RecursionError) as error:
                return RowError(f"{key}.{ending} cannot be read: {error}")
        return record

    def place(self, number: int) -> str:
        return f"sample {self.samples[number - 1][0]}"


_MEMBERS: Mapping[str, Callable[[bytes], Any]] = {
    "json": json.loads,
    "txt": lambda data: data.decode("utf-8-sig").strip(),
    "cls": lambda data: int(data),
}


class Chain:
    """Several files as one, in order. A place names its file."""

    def __init__(self, parts: Sequence[tuple[str, Rows]]) -> None:
        self.parts = parts
        self.ends = [0]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.ends = [0]
        for _, rows in self.parts:
            last = 0
            for number, record in rows:
                last = number
                yield self.ends[-1] + number, record
            self.ends.append(self.ends[-1] + last)

    def row(self, number: int) -> Any:
        part, own = self._find(number)
        return self.parts[part][1].row(own)

    def place(self, number: int) -> str:
        part, own = self._find(number)
        return f"{self.parts[part][0]}, {self.parts[part][1].place(own)}"

    def part_of(self, number: int) -> str:
        return self.parts[self._find(number)[0]][0]

    def _find(self, number: int) -> tuple[int, int]:
        """Its part, also while that is still being read, and its number there."""
        part = min(bisect_right(self.ends, number - 1), len(self.parts)) - 1
        return part, number - self.ends[part]


@dataclass
class Head:
    """The first rows of others."""

    rows: Rows
    count: int

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return islice(self.rows, self.count) if self.count else iter(self.rows)

    def row(self, number: int) -> Any:
        return self.rows.row(number)

    def place(self, number: int) -> str:
        return self.rows.place(number)


def json_row(line: bytes) -> Any:
    """The object of a line, or the RowError that says why there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits is a ValueError too
        return RowError(f"not JSON: {error}")
    return row if isinstance(row, dict) else RowError(f"a line holds one JSON object, this one a {type(row).__name__}")


# --------------------------------------------------------------------------------------------------------------- files


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start[:2] in UTF16:
        raise UnreadableSource(f"{path}: is UTF-16; write it anew: iconv -f utf-16 -t utf-8")


def json_lines(path: Path) -> JsonLines:
    """Raises UnreadableSource for UTF-16 and for an array over several lines, which would give a fault a line."""
    file = unpacked(path) if path.suffix in PACKED else path.open("rb")
    start = file.readline(1 << 12)
    _refuse_utf16(path, start)
    if start.decode("utf-8-sig", "replace").strip() == "[":
        raise UnreadableSource(f"{path}: holds an array, not a record a line; name it .json")
    return JsonLines(file)


def json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """All objects of a JSON lines file with their places. Lines end where files' lines do, not at U+2028 in a text.

    Raises UnreadableSource naming a line that holds none.
    """
    lines = json_lines(path)
    found = [(f"{path}, {lines.place(number)}", row) for number, row in lines]
    if broken := next(((place, row) for place, row in found if isinstance(row, RowError)), None):
        raise UnreadableSource(f"{broken[0]}: {broken[1]}")
    return found


def parquet(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        told = pyarrow.parquet.read_metadata(path)
        size = sum(told.row_group(n).total_byte_size for n in range(told.num_row_groups))
        if told.num_rows > path.stat().st_size:  # rows that differ take a byte each, however they are packed
            raise ValueError(f"it says that it has {told.num_rows:,} rows")
        if size <= IN_MEMORY:
            return ParquetTable(path)
    except Exception as error:  # damage shows as errors of Arrow, of the header's JSON and of Python itself
        raise UnreadableSource(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from error
    import datasets

    return RowList.of_dataset(datasets.Dataset.from_parquet(str(path)))


def json_file(path: Path, split: str = "") -> JsonLines:
    """A .json file: an array, an object of objects by id, of arrays by split or of one array, one object, or lines."""
    with _text(path) as file:
        return spooled(_objects(file, path, split))


def table(path: Path, delimiter: str = "", columns: Sequence[str] = ()) -> JsonLines:
    """A .csv, .tsv or .txt file. columns: of a file without a header, whose cells have no quotes around them then.

    Empty cells and NaN are left out, and so are columns without a name: pandas writes its index so. A line with more
    cells than columns, and one with text behind a closing quote, is an unreadable record. Without a delimiter it is
    what Excel's line sep=; says, or the first of the ending's that stands in the header.
    """
    ending = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    if ending == ".txt" and not columns:
        raise UnreadableSource(
            f"{path}: name its columns, columns: [image, question, answer], and the delimiter if it is no tab"
        )
    if delimiter and len(delimiter) != 1:
        raise UnreadableSource(f"{path}: a delimiter is one character, not {delimiter!r}")
    with _text(path) as file:
        lines = records(file, DELIMITERS.get(ending, "\t"), delimiter, header=not columns)
        try:
            return spooled(_cells(lines, path, columns))
        except UnreadableSource:
            raise
        except ValueError as error:
            raise UnreadableSource(f"{path}: {error}") from error


def _cells(lines: Iterator[list[str] | str], path: Path, columns: Sequence[str]) -> Iterator[Any]:
    names: list[str] | str = list(columns)
    names = names or next(lines, names)
    if isinstance(names, str):
        raise UnreadableSource(f"{path}: its header: {names}")
    if byte := _BYTE.search("".join(names)):
        raise UnreadableSource(f"{path}: its header {NOT_UTF8.format(ord(byte[0]) & 0xFF)}")
    if len(set(names)) < len(names):
        raise UnreadableSource(f"{path}: two columns have one name; its header is {', '.join(names)}")
    for cells in lines:
        if isinstance(cells, str):
            yield cells
        elif len(cells) > len(names):
            yield f"it has {len(cells)} cells and the table {len(names)} columns, {', '.join(names)}"
        else:
            told = {n: c.strip() for n, c in zip(names, cells, strict=False) if n.strip()}
            yield {n: c for n, c in told.items() if c.lower() not in ("", "nan")}


def spooled(records: Iterable[Any]) -> JsonLines:
    """Records as lines of a temporary file that nobody else sees. A text stands for a record that could not be read."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as its rows
    for record in records:
        file.write(_line(record).encode("utf-8", "surrogatepass") + b"\n")
    file.flush()
    return JsonLines(file, "row", _spooled_row)


def _line(record: Any) -> str:
    try:
        line = json.dumps(record, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        return json.dumps(f"it cannot be kept: {error}")
    byte = _BYTE.search(line)
    return json.dumps(f"it {NOT_UTF8.format(ord(byte[0]) & 0xFF)}") if byte else line


def _spooled_row(line: bytes) -> Any:
    try:
        record = json.loads(line.decode("utf-8", "surrogatepass"))
    except RecursionError as error:
        return RowError(f"it cannot be kept: {error}")
    return record if isinstance(record, dict) else RowError(record)


def unpacked(path: Path) -> IO[bytes]:
    """The content of a packed file in a temporary one, which can be read at any place."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with PACKED[path.suffix](path, "rb") as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
    except UNREADABLE as error:
        raise UnreadableSource(f"{path}: cannot be unpacked: {error}") from error
    file.seek(0)
    return file


@contextmanager
def _text(path: Path) -> Iterator[Any]:
    """The file's text; what is no UTF-8 costs the record where it stands. Raises UnreadableSource."""
    options: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    try:
        opened = PACKED.get(path.suffix, open)
        with opened(path, "rb") as file:
            _refuse_utf16(path, file.read(2))
        with opened(path, "rt", **options) as file:
            yield file
    except UNREADABLE as error:
        raise UnreadableSource(f"{path}: cannot be read: {error}") from error


def _objects(file: Any, path: Path, split: str) -> Iterator[Any]:
    """The records of JSON text, piece by piece where it is an array or lines."""
    text = _Scanner(file, path)
    if (first := text.skip("")) == "[":
        text.at += 1
        while (following := text.skip(",")) not in ("]", ""):
            yield _object(text.value())
        text.at += 1
        if not following or text.skip(""):
            raise UnreadableSource(f"{path}: " + ("text follows its array" if following else "its array never closes"))
    elif first:
        whole = text.value()
        if not text.skip(""):
            yield from map(_object, _records_in(whole, path, split))
            return
        yield _object(whole)
        while text.skip(","):
            yield _object(text.value())


def _object(value: Any) -> Any:
    """A record, or why there is none: in the words of what could not read it, where that is known."""
    if isinstance(value, dict | _Unmade):
        return value
    return f"a record is a JSON object, this one a {type(value).__name__}"


def _records_in(whole: Any, path: Path, split: str) -> Iterable[Any]:
    """The records of a file that is one JSON object."""
    if isinstance(whole, _Unmade):
        raise UnreadableSource(f"{path}: not JSON that can be read: {whole}")
    if not isinstance(whole, dict):
        return [whole]
    lists = {key: v for key, v in whole.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)}
    parts = {key: v for key, v in lists.items() if split and key == split} or {
        key: v for key, v in lists.items() if key in (*SPLITS, *CONTAINERS)
    }
    if len(parts) == 1:
        return next(iter(parts.values()))
    if parts:
        raise UnreadableSource(
            f"{path}: name one of its splits, {', '.join(parts)}, with split: or {path}:{min(parts)}"
        )
    if whole and all(isinstance(v, dict) for v in whole.values()):
        return ({"id": key, **record} for key, record in whole.items())
    return [whole]


class _Unmade(str):
    """Why a JSON value could not be made."""


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]|[^][{}",\s]+')


@dataclass
class _Scanner:
    """JSON values from a file, read as far as they reach. What lies before `at` is done with."""

    file: Any
    path: Path
    buffer: str = ""
    at: int = 0

    def more(self) -> bool:
        rest = self.buffer[self.at :]
        piece = self.file.read(max(1 << 20, len(rest)))
        self.buffer, self.at = rest + piece, 0
        return bool(piece)

    def value(self) -> Any:
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self.buffer, self.at)
                if end < len(self.buffer):
                    self.at = end
                    return found
                if not self.more():  # what ends with the text is whole; a number before more text might not be
                    self.at = len(self.buffer)
                    return found
            except json.JSONDecodeError as error:
                if not self.more():
                    raise UnreadableSource(f"{self.path}: not JSON: {error}") from error
            except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, brackets in brackets
                self._go_over()
                return _Unmade(error)

    def _go_over(self) -> None:
        """Move behind a value that cannot be made."""
        depth, at = 0, self.at
        while True:
            for found in _TOKEN.finditer(self.buffer, at):
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
                if depth == 0:
                    self.at = found.end()
                    return
            depth, at = 0, 0
            if not self.more():
                raise UnreadableSource(f"{self.path}: not JSON: it ends inside a value")

    def skip(self, characters: str) -> str:
        """Go over blanks and `characters`; the next character, or "" at the end."""
        while True:
            while self.at < len(self.buffer):
                if (found := self.buffer[self.at]) not in characters + " \t\r\n":
                    return found
                self.at += 1
            if not self.more():
                return ""
