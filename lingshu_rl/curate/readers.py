"""Records of any source and of DICOM and NIfTI files, one at a time, as data rows with their pictures stored."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_rl.data.chats import images_of
from lingshu_rl.data.mapping import Mapper
from lingshu_rl.data.rows import RowError, refusing, row_to_prompt
from lingshu_rl.data.sources import (
    DATA_ENDINGS,
    SourceError,
    SourceSpec,
    check_mapping,
    is_row,
    layout_of,
    open_records,
    presets,
    source_path,
    usual_layout,
)
from lingshu_rl.imaging.files import full_path
from lingshu_rl.imaging.pixels import ScanError, ScanOptions, encoded, scan_files, scan_kind, windowed
from lingshu_rl.imaging.scans import read_scan
from lingshu_rl.imaging.volumes import View, VolumeError, as_volumes, unfold
from lingshu_rl.text.markup import encodable

SCANS = ("dicom", "nifti")
ImageSink = Callable[[bytes], "str | bytes"]
Looked = Callable[[Path], object]


@dataclass(frozen=True)
class Source(SourceSpec):
    """One set of raw records, read as any source (`data.sources.SourceSpec`), by the usual names where no `format` is
    given.

    trust: of two duplicates the one from the source with more trust stays. format: dicom and nifti too. scan: how these
    become pictures.
    """

    trust: int = 0
    scan: ScanOptions = field(default_factory=ScanOptions)

    def __post_init__(self) -> None:
        self.check(SCANS)

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
    label: put the source's name in front of the ids and into meta.source. strict: rows must be fit to train on;
    otherwise (to compare sets) whatever a record has is taken, and a row without some of its pictures comes with the
    reason too.
    looked: told of every place where an image was looked for.
    Raises SourceError for the source as a whole.
    """
    folder = source_path(source.path)
    folder = folder if folder.is_dir() else folder.parent
    layout = layout_of(source) if source.format in presets() else usual_layout(source)
    mapper = Mapper(layout, strict=strict)
    records = rows = 0
    for place, record in _records(source):
        records += 1
        if isinstance(record, Record):
            rows += 1
            yield record
            continue
        try:
            with refusing():
                made = _rows(record, source, mapper)
        except RowError as error:
            made = [error]
        for part, row in enumerate(made, start=1):
            rows += 1
            where = place if part == 1 else f"{place}, question {part}"
            yield _finished(where, row, source, folder, keep_image, label=label, strict=strict, looked=looked)
    check_mapping(source, mapper, records, rows)


def _rows(record: Any, source: Source, mapper: Mapper) -> Sequence[dict[str, Any] | RowError]:
    """A row of this library as it stands, where the source says nothing else; else what the mapping makes of it."""
    if source.mapped or not is_row(record):
        return mapper(record)
    return [{**record, "images": images_of(record["images"])}]


def _finished(
    place: str,
    row: dict[str, Any] | RowError,
    source: Source,
    folder: Path,
    keep_image: ImageSink,
    *,
    label: bool,
    strict: bool,
    looked: Looked,
) -> Record:
    """The row with its pictures stored, or why there is none."""
    try:
        if isinstance(row, RowError):
            raise row
        with refusing(ScanError, VolumeError):
            row.setdefault("id", re.sub(r"[ ,]+", "-", place))
            if label:
                row["id"] = f"{source.label}:{row['id']}"
                row.setdefault("meta", {}).setdefault("source", source.label)
            row = dict(unfold(as_volumes(row, source.volume), source.image_dir or folder))
            row["images"], facts, missing = _images(row["images"], source, folder, keep_image, looked)
            if facts:
                row["meta"] = {**facts, **row.get("meta", {})}
            if missing and strict:
                return Record(place, None, "missing_image", missing[0])
            if strict:
                row_to_prompt(row)
    except (RowError, ScanError, VolumeError) as error:
        return Record(place, None, getattr(error, "reason", "bad_row"), str(error))
    return Record(place, row, "missing_image" if missing else "", "; ".join(missing))


# --- files to records -------------------------------------------------------------------------------------------------


def _records(source: Source) -> Iterator[tuple[str, Any]]:
    path = source_path(source.path)
    kind = source.format if source.format in SCANS else _scan_format(path)
    if kind:
        yield from _scans(path, kind, source.scan)
        return
    records, _ = open_records(source)
    for number, record in records:
        yield records.place(number), record


def _scan_format(path: Path) -> str:
    """Which scans a folder or file holds, "" for none: what has an ending of its own is no scan."""
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        kinds = () if saved else SCANS
        return next((kind for kind in kinds if next(iter(scan_files(path, kind)), None) is not None), "")
    return (scan_kind(path) or "") if path.is_file() and path.suffix.lower() not in DATA_ENDINGS else ""


def _scans(path: Path, kind: str, options: ScanOptions) -> Iterator[tuple[str, Any]]:
    found_any = False
    for file in scan_files(path, kind):
        found_any = True
        place = encodable(file.relative_to(path).as_posix() if file != path else file.name)
        try:
            for picture in read_scan(file, options, place):
                yield f"{place}{picture.place}", {**picture.fields, "images": [picture.png], "meta": picture.facts}
        except ScanError as error:
            yield place, Record(place, None, error.reason, encodable(str(error)))
    if not found_any:
        raise SourceError(f"{path}: no {kind} files")


# --- pictures ---------------------------------------------------------------------------------------------------------


def _images(
    images: Sequence[Any], source: Source, folder: Path, keep_image: ImageSink, looked: Looked
) -> tuple[list[str | bytes], dict[str, Any], list[str]]:
    """The row's pictures as paths or what `keep_image` made of their bytes, facts of a scan among them, what is
    missing."""
    found: list[str | bytes] = []
    facts: dict[str, Any] = {}
    missing: list[str] = []
    for image in images:
        if isinstance(image, bytes):
            found.append(keep_image(image))
        elif isinstance(image, str) and image.strip():
            if image.startswith(("http://", "https://", "data:")):
                raise RowError(f"images are files or bytes, not addresses: {image[:60]!r}; fetch it first")
            if (view := View.of(image)) is not None:
                looked(Path(view.file))
                found.append(keep_image(encoded(np.asarray(view.image()))))
                continue
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
    places = [source_path(source.image_dir, "image_dir")] if source.image_dir else [folder, folder / "images"]
    for place in places:
        path = full_path(image, place)
        looked(place / Path(image).expanduser())  # a link may lead elsewhere later
        if os.path.isfile(path):
            return Path(path)
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
