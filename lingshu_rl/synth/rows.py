"""What synthesis reads and writes: records in, training rows and refusals out, and the file that holds them.

A record is a training row, or less than one: `id`, `images`, and whatever a step needs of `caption`, `labels`
({name: value or [values]}), `masks` ([{path, names: {"1": "liver"}}]), `boxes` ([{name, xywh}]), `mm_per_px`, `meta`.
A row made here says in `meta.synth` how it came about and what the verifier found.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.data.rows import FIELDS, RowError, row_to_prompt
from lingshu_rl.data.sources import Source, SourceError, open_records, open_rows
from lingshu_rl.failures import LingshuError
from lingshu_rl.imaging.images import Picture
from lingshu_rl.storage.folders import own
from lingshu_rl.storage.runfolder import write_text
from lingshu_rl.types import Prompt

Record = Mapping[str, Any]


class SynthError(LingshuError, ValueError):
    """Synthesis cannot go on; the message names the file or option."""


@dataclass(frozen=True)
class Kept:
    row: dict[str, Any]


@dataclass(frozen=True)
class Dropped:
    """reason: a short fixed phrase, counted. detail: what exactly. record: what it was made from."""

    id: str
    reason: str
    detail: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


Outcome = Kept | Dropped


def read_records(given: Path | Source) -> Iterator[Record]:
    """The records of a file or a source, paths of images and masks in full. Raises SynthError with the record's place.

    Of other people's records (a preset, a mapping) one that becomes no row is a record with its `fault`.
    """
    source = given if isinstance(given, Source) else Source(str(given))
    path = Path(source.path)
    seen: dict[str, str] = {}
    try:
        records = open_rows(source) if source.mapped else open_records(source)[0]
        for number, record in records:
            place = f"{path}, {records.place(number)}"
            if source.mapped:
                record = _without_bytes(record, records.place(number))
            if isinstance(record, RowError):
                raise SynthError(f"{place}: {record}")
            if not (name := str(record.get("id") or "").strip()):
                raise SynthError(f"{place}: a record is an object with an id")
            if name in seen:
                raise SynthError(f"{place}: duplicate id {name!r}, first used in {seen[name]}")
            seen[name] = records.place(number)
            yield located(record, path.parent)
    except SourceError as error:
        raise SynthError(str(error)) from error


def _without_bytes(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, RowError):
        return {"id": place, "fault": str(row)}
    if any(isinstance(image, bytes) for image in row["images"]):
        return {**row, "images": [], "fault": "its images are bytes: `lingshu-rl curate` writes them as files"}
    return row


def located(record: dict[str, Any], base: Path) -> dict[str, Any]:
    """The record with absolute paths."""

    def absolute(name: str) -> str:
        return str((base / Path(name).expanduser()).resolve())

    record = {**record, "images": [absolute(image) for image in record.get("images") or []]}
    if record.get("masks"):
        record["masks"] = [{**mask, "path": absolute(mask["path"])} for mask in record["masks"]]
    return record


def training_row(record: Record, suffix: str, **fields: Any) -> dict[str, Any]:
    """A row about the record's images. `meta` of the record is kept; `fields["meta"]` is laid over it."""
    meta = {**record.get("meta", {}), **fields.pop("meta", {})}
    name = f"{record['id']}-{suffix}" if suffix else str(record["id"])
    return {"id": name, "images": list(record.get("images") or []), **fields, "meta": meta}


def provenance(step: str, record: Record, verdict: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """`meta.synth`: the step, the record it started from, what it used, the verdict. Earlier steps stand under
    `before`."""
    before = (record.get("meta") or {}).get("synth")
    return {
        "step": step,
        "from": str(record["id"]),
        **facts,
        "verdict": dict(verdict),
        **({"before": before} if before else {}),
    }


def image_fault(record: Record) -> tuple[str, str] | None:
    """(reason, detail) of a record that is none, or of the first image that no one could look at. Decodes them."""
    if record.get("fault"):
        return "not a usable row", str(record["fault"])
    for image in record.get("images") or ():
        if not Path(image).is_file():
            return "image not found", str(image)
        if told := Picture(str(image)).fault():
            return "unreadable image", told
    return None


def as_prompt(record: Record) -> Prompt:
    """The record's training row as a prompt; what only synthesis knows is left out. Raises RowError."""
    if record.get("fault"):
        raise RowError(str(record["fault"]))
    return row_to_prompt({key: record[key] for key in FIELDS if key in record}, base_dir="/")


def fault(row: Mapping[str, Any]) -> str | None:
    """Why a made row would be refused at load, or None."""
    try:
        row_to_prompt(row, base_dir="/")
    except RowError as error:
        return str(error)
    return None


@dataclass
class Tally:
    """What became of the records; the same for the same input, however often the command was stopped."""

    kept: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "kinds": dict(sorted(self.kinds.items())),
            "dropped": dict(sorted(self.dropped.items())),
        }


async def write_outcomes(outcomes: AsyncIterator[Outcome] | Iterable[Outcome], out: Path) -> Tally:
    """OUT.jsonl, OUT.dropped.jsonl and OUT.summary.json, each whole or not there. Image paths become relative to OUT.

    Raises InUse while another process writes them.
    """
    with own(out, "synthesis", "--out", file=True):
        return await _write(outcomes, out)


async def _write(outcomes: AsyncIterator[Outcome] | Iterable[Outcome], out: Path) -> Tally:
    aside = out.with_name(f"{out.stem}.dropped.jsonl")
    parts = [path.with_name(f"{path.name}.part") for path in (out, aside)]
    tally = Tally()
    used: set[str] = set()
    with parts[0].open("w", encoding="utf-8") as kept, parts[1].open("w", encoding="utf-8") as dropped:
        async for outcome in _as_async(outcomes):
            if isinstance(outcome, Kept) and (why := _row_fault(outcome.row, used)):
                outcome = Dropped(str(outcome.row["id"]), *why, outcome.row)
            if isinstance(outcome, Kept):
                used.add(outcome.row["id"])
                row = {**outcome.row, "images": [_relative(i, out.parent) for i in outcome.row["images"]]}
                kept.write(json.dumps(row, ensure_ascii=False) + "\n")
                tally.kept += 1
                tally.kinds[row["kind"]] += 1
            else:
                told = {"id": outcome.id, "reason": outcome.reason, "detail": outcome.detail, "row": dict(outcome.row)}
                dropped.write(json.dumps(told, ensure_ascii=False, default=str) + "\n")
                tally.dropped[outcome.reason] += 1
    for part, path in zip(parts, (out, aside), strict=True):
        os.replace(part, path)
    write_text(out.with_name(f"{out.stem}.summary.json"), json.dumps(tally.as_dict(), indent=1))
    return tally


def _row_fault(row: Mapping[str, Any], used: set[str]) -> tuple[str, str] | None:
    """(reason, detail) why a made row is not written, or None. Its images are looked for, not decoded."""
    if told := f"duplicate id {row['id']!r}" if row["id"] in used else fault(row):
        return "not a usable row", told
    missing = next((image for image in row["images"] if not Path(image).is_file()), None)
    return ("image not found", str(missing)) if missing else None


def _relative(image: str, folder: Path) -> str:
    return os.path.relpath(image, folder.resolve())


async def _as_async(outcomes: AsyncIterator[Outcome] | Iterable[Outcome]) -> AsyncIterator[Outcome]:
    if isinstance(outcomes, AsyncIterator):
        async for outcome in outcomes:
            yield outcome
    else:
        for outcome in outcomes:
            yield outcome
