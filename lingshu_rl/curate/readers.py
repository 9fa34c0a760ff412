"""Records of JSONL, JSON, parquet, CSV, Hugging Face folders, DICOM and NIfTI, one at a time, renamed into data rows."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.curate.scans import ScanError, ScanOptions, read_scan, scan_files, scan_kind, windowed
from lingshu_rl.data.rows import FIELDS, RowError, row_to_prompt
from rewards.kinds import KINDS, guess

FORMATS = ("auto", "jsonl", "json", "parquet", "csv", "tsv", "hf", "dicom", "nifti")
# What public sets call the fields of a row; used for a field that `fields` does not name and the record does not have.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "id": ("qid", "question_id", "uid", "Unique ID"),
    "images": ("image", "image_name", "img_name", "image_path", "img_path", "image_file", "file_name"),
    "question": ("query", "prompt", "Question"),
    "answer": ("gt_answer", "label", "report", "caption", "text", "Answer"),
    "options": ("choices",),
    "meta.patient_id": ("patient_id", "patient", "subject_id", "PatientID"),
    "meta.modality": ("modality", "modality_type"),
    "meta.organ": ("organ", "image_organ", "location", "body_part"),
}
META_NAMES = tuple(name for name in ALIASES if name.startswith("meta."))
ImageSink = Callable[[bytes], "str | bytes"]
Looked = Callable[[Path], object]


class SourceError(ValueError):
    """A source that cannot be read at all."""


@dataclass(frozen=True)
class Source:
    """One set of raw records.

    path: file or folder. trust: of two duplicates the one from the source with more trust stays. fields: row field
    ("question", "meta.patient_id", ...) -> column; values: row field -> constant, where the record has nothing.
    image_dir: where image names start (default: the file's folder, then its `images`). split: of a dataset dictionary.
    scan: how DICOM and NIfTI become pictures.
    """

    path: str
    name: str = ""
    format: str = "auto"
    trust: int = 0
    image_dir: str = ""
    split: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    scan: ScanOptions = field(default_factory=ScanOptions)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SourceError(f"source {self.path}: format {self.format!r} is not one of {', '.join(FORMATS)}")
        for name in (*self.fields, *self.values):
            if name not in FIELDS and not name.startswith("meta."):
                raise SourceError(
                    f"source {self.path}: {name!r} is no field of a row; use {', '.join(FIELDS)} or meta.NAME"
                )

    @property
    def label(self) -> str:
        return self.name or Path(self.path).stem


@dataclass(frozen=True)
class Record:
    """place: where it stands ("line 7"). row: the data row, or None with `reason` and `detail`."""

    place: str
    row: dict[str, Any] | None
    reason: str = ""
    detail: str = ""


def read_rows(
    source: Source,
    keep_image: ImageSink = lambda data: data,
    *,
    label: bool = False,
    strict: bool = True,
    looked: Looked = lambda path: None,
) -> Iterator[Record]:
    """The source's records as data rows in file order; a record that is no usable row comes with its reason.

    keep_image: what becomes of pictures that are bytes or scans (a path to store in the row, or the bytes themselves).
    label: put the source's name in front of the ids and into meta.source. strict: rows must be fit to train on; otherwise
    (to compare sets) whatever a record has is taken, and a row without some of its pictures comes with the reason too.
    looked: told of every place where an image was looked for.
    Raises SourceError for the source as a whole.
    """
    folder = Path(source.path).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    for place, record in _records(source):
        if isinstance(record, Record):
            yield record
            continue
        try:
            row = _row(record, source)
            row.setdefault("id", place.replace(" ", "-"))
            if label:
                row["id"] = f"{source.label}:{row['id']}"
                row.setdefault("meta", {}).setdefault("source", source.label)
            images, facts, missing = _images(row.get("images", []), source, folder, keep_image, looked)
            row["images"] = images
            if facts:
                row["meta"] = {**facts, **row.get("meta", {})}
            if missing and strict:
                yield Record(place, None, "missing_image", missing[0])
                continue
            if strict:
                row_to_prompt(row)
        except (RowError, ScanError) as error:
            yield Record(place, None, getattr(error, "reason", "bad_row"), str(error))
        else:
            yield Record(place, row, "missing_image" if missing else "", "; ".join(missing))


# --- files to records -------------------------------------------------------------------------------------------------


def _records(source: Source) -> Iterator[tuple[str, Any]]:
    path = Path(source.path).expanduser()
    if not path.exists():
        raise SourceError(f"source {source.path}: no such file or folder")
    kind = source.format if source.format != "auto" else _format(path)
    if kind == "jsonl":
        return _jsonl(path)
    if kind == "json":
        return _numbered(_json_array(path))
    if kind == "parquet":
        return _numbered(_parquet(path))
    if kind in ("csv", "tsv"):
        return _numbered(_csv(path, "\t" if kind == "tsv" else ","))
    if kind == "hf":
        return _numbered(_hugging_face(path, source.split))
    return _scans(path, kind, source.scan)


def _format(path: Path) -> str:
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return "hf"
        for kind in ("dicom", "nifti"):
            if next(iter(scan_files(path, kind)), None) is not None:
                return kind
        raise SourceError(f"{path}: a folder is read as a save_to_disk dataset, DICOM or NIfTI files, it holds neither")
    kind = path.suffix.lower().removeprefix(".")
    if kind in FORMATS[1:]:
        return kind
    if not (scan := scan_kind(path)):
        raise SourceError(f"{path}: what is it? Say format: one of {', '.join(FORMATS[1:])}")
    return scan


def _numbered(records: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(records, start=1):
        yield f"row {number}", record


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                record = Record(place, None, "bad_row", f"not JSON: {error}")
            yield place, record


def _json_array(path: Path) -> Iterator[Any]:
    """The objects of one JSON array, of an object of objects, or of lines (some .json files are JSONL), as they come."""
    decoder, buffer = json.JSONDecoder(), ""
    with path.open(encoding="utf-8-sig") as file:

        def more() -> bool:
            nonlocal buffer
            piece = file.read(1 << 20)
            buffer += piece
            return bool(piece)

        def value() -> Any:
            nonlocal buffer
            while True:
                try:
                    found, end = decoder.raw_decode(buffer)
                    if end < len(buffer) or not more():
                        buffer = buffer[end:]
                        return found
                except json.JSONDecodeError as error:
                    if not more():
                        raise SourceError(f"{path}: not JSON: {error}") from error

        def skip(characters: str) -> str:
            """Drop leading blanks and `characters`; the next character, or "" at the end."""
            nonlocal buffer
            while not (buffer := buffer.lstrip(characters + " \t\r\n")):
                if not more():
                    return ""
            return buffer[0]

        if (first := skip("")) == "[":
            buffer = buffer[1:]
            while skip(",") not in ("]", ""):
                yield value()
        elif first:
            whole = value()
            if not skip(""):
                # one object: {"id": record, ...} is a common layout, a single record the other
                nested = isinstance(whole, dict) and whole and all(isinstance(v, dict) for v in whole.values())
                yield from ({"id": key, **record} for key, record in whole.items()) if nested else iter([whole])
                return
            yield whole
            while skip(","):
                yield value()


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not a readable parquet file: {error}") from error


def _csv(path: Path, delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(newline="", encoding="utf-8-sig") as file:
        for record in csv.DictReader(file, delimiter=delimiter):
            yield {key: value for key, value in record.items() if key is not None and value not in ("", None)}


def _hugging_face(path: Path, split: str) -> Iterator[Any]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # its errors share no base class
        raise SourceError(f"{path}: not a save_to_disk folder: {type(error).__name__}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise SourceError(f"{path}: name one of its splits with `split`: {', '.join(data)}")
        data = data[split]
    for name, column in data.features.items():
        if isinstance(column, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(column, "feature", None), datasets.Image):
            data = data.cast_column(name, datasets.List(datasets.Image(decode=False)))
    yield from data


def _scans(path: Path, kind: str, options: ScanOptions) -> Iterator[tuple[str, Any]]:
    found_any = False
    for file in scan_files(path, kind):
        found_any = True
        place = file.relative_to(path).as_posix() if file != path else file.name
        try:
            for picture in read_scan(file, options, place):
                yield f"{place}{picture.place}", {**picture.fields, "images": [picture.png], "meta": picture.facts}
        except ScanError as error:
            yield place, Record(place, None, error.reason, str(error))
    if not found_any:
        raise SourceError(f"{path}: no {kind} files")


# --- records to rows --------------------------------------------------------------------------------------------------


def _row(record: Any, source: Source) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise RowError(f"a record is a mapping, not {type(record).__name__}")
    row: dict[str, Any] = {}
    meta = record.get("meta")
    if meta is not None and not isinstance(meta, Mapping):
        raise RowError(f"meta must be a mapping, got {type(meta).__name__}")
    meta = {key: value for key, value in (meta or {}).items() if value is not None}
    for name in dict.fromkeys((*FIELDS, *META_NAMES, *source.fields, *source.values)):
        if name == "meta":
            continue
        value = _value(record, name, source)
        if value is None:
            continue
        if name.startswith("meta."):
            meta.setdefault(name.removeprefix("meta."), value)
        else:
            row[name] = value
    if isinstance(row.get("options"), str):
        row["options"] = _listed(row["options"], "|")
    if "kind" not in row and "answer" in row:
        row["kind"] = guess(row["answer"], row.get("options"), tuple(row))
    if isinstance(row.get("answer"), int | float) and row.get("kind") in set(KINDS) - {"numeric"}:
        row["answer"] = str(row["answer"])
    if meta:
        row["meta"] = meta
    return row


def _value(record: Mapping[str, Any], name: str, source: Source) -> Any:
    if name in source.fields:
        found = record.get(source.fields[name])
    else:
        aliases = ALIASES.get(name, ()) if name not in source.values else ()
        columns = aliases if name.startswith("meta.") else (name, *aliases)
        taken = set(source.fields.values())
        found = next((record[c] for c in columns if record.get(c) is not None and (c == name or c not in taken)), None)
    if found is None or found != found:  # NaN of a table
        found = source.values.get(name)
    return found


def _listed(text: str, separator: str) -> list[Any]:
    """A list written into one table cell: JSON, or parts between separators."""
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise RowError(f"{text[:60]!r} begins like a JSON list but is none: {error}") from None
    return [part.strip() for part in text.split(separator) if part.strip()]


def _images(
    value: Any, source: Source, folder: Path, keep_image: ImageSink, looked: Looked
) -> tuple[list[str | bytes], dict[str, Any], list[str]]:
    """The row's pictures as paths or what `keep_image` made of their bytes, facts of a scan among them, what is missing."""
    if isinstance(value, str):
        value = _listed(value, "|")
    elif isinstance(value, bytes | Mapping) or hasattr(value, "save"):
        value = [value]
    if value is None:
        value = []
    if not isinstance(value, list | tuple):
        raise RowError(f"images must be a list, got {type(value).__name__}")
    found: list[str | bytes] = []
    facts: dict[str, Any] = {}
    missing: list[str] = []
    for image in value:
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            found.append(keep_image(image))
        elif isinstance(image, str) and image.strip():
            if image.startswith(("http://", "https://", "data:")):
                raise RowError(f"images are files or bytes, not addresses: {image[:60]!r}; fetch it first")
            path = _locate(image, source, folder, missing, looked)
            if path is None:
                continue
            if scan_kind(path):
                for picture in read_scan(path, source.scan, image):
                    found.append(keep_image(picture.png))
                    facts |= picture.facts
            else:
                png = windowed(path, source.scan.window)
                found.append(keep_image(png) if png else str(path))
        else:
            raise RowError(f"an image must be a path or bytes, got {type(image).__name__}")
    return found, facts, missing


def _locate(image: str, source: Source, folder: Path, missing: list[str], looked: Looked) -> Path | None:
    places = [Path(source.image_dir).expanduser()] if source.image_dir else [folder, folder / "images"]
    for place in places:
        path = place / Path(image).expanduser()
        looked(path)
        if path.is_file():
            return path.resolve()
    missing.append(f"image file not found: {image} (looked in {', '.join(map(str, places))})")
    return None


def image_folder(out: Path) -> ImageSink:
    """Stores bytes under their hash in `out`; the same picture is stored once."""

    def keep(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        kind = ".jpg" if data[:2] == b"\xff\xd8" else ".png" if data[:4] == b"\x89PNG" else ".img"
        path = out / digest[:2] / f"{digest[:32]}{kind}"
        if not path.is_file() or path.stat().st_size != len(data):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(data)
            part.replace(path)
        return str(path.resolve())

    return keep
