"""Prompts from the demo, JSONL, parquet or a Hugging Face dataset. A bad row is refused, never dropped in silence."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingshu_rl.data.rows import RowError, row_to_prompt
from lingshu_rl.images import check_image
from lingshu_rl.types import Prompt
from rewards.rows import LabelCheck

log = logging.getLogger(__name__)

SHOWN = 20  # refused rows that a message lists
DEMO_SPLITS = ("train", "validation", "test")

Source = str | Path | Iterable[Mapping[str, Any]]
Placed = tuple[str, Any]  # where a row stands ("line 7"), and the row or the RowError that reading it gave


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used. place: "line 7" or "row 7", counted from 1. id: None when there is none."""

    place: str
    id: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.place}{f' (id {self.id})' if self.id is not None else ''}: {self.reason}"


@dataclass(frozen=True)
class Loaded:
    """prompts: the usable rows in file order. refused: the others, each with its place and reason."""

    prompts: tuple[Prompt, ...]
    refused: tuple[Refused, ...]


class DataError(ValueError):
    """A source that cannot be used. refused: every bad row, where rows are the matter."""

    def __init__(self, message: str, refused: tuple[Refused, ...] = ()):
        super().__init__(message)
        self.refused = refused


def load(
    source: Source,
    *,
    base_dir: str | Path | None = None,
    skip_bad_rows: bool = False,
    instruction: str = "full",
    system: str = "",
    fault: Callable[[Prompt], str | None] = lambda prompt: None,
    check: LabelCheck | None = None,
) -> Loaded:
    """Prompts of a source: "demo:train", a .jsonl or .parquet file, a `save_to_disk` folder, a hub id, or rows.

    A folder or hub id takes its split after a colon ("org/name:train"). base_dir: where relative image paths start,
    by default the file's folder. instruction: see `rows.instruction_text`. system: see `rows.row_to_prompt`.
    fault: why the model cannot be asked a prompt, or None (`PromptEncoder.fault`). check: the `check_gold` of the
    reward that will judge, by default that of each row's kind. Every image is decoded once.
    Raises DataError with up to 20 bad rows and their total; with `skip_bad_rows` they are logged and returned instead.
    """
    name = str(source) if isinstance(source, str | Path) else "rows"
    places, folder = _open(source)
    base = base_dir if base_dir is not None else folder
    kept: list[tuple[int, str, Prompt]] = []
    refused: list[tuple[int, Refused]] = []
    first_use: dict[str, str] = {}
    total = 0
    for total, (place, row) in enumerate(places, start=1):
        try:
            if isinstance(row, RowError):
                raise row
            prompt = row_to_prompt(row, base_dir=base, instruction=instruction, system=system, check=check)
            if prompt.id in first_use:
                raise RowError(f"duplicate id, first used at {first_use[prompt.id]}")
            if reason := fault(prompt):
                raise RowError(reason)
        except RowError as error:
            refused.append((total, Refused(place, _row_id(row), str(error))))
        else:
            first_use[prompt.id] = place
            kept.append((total, place, prompt))
    faults = _image_faults(prompt for _, _, prompt in kept)
    prompts = []
    for number, place, prompt in kept:
        reason = next((faults[image] for image in prompt.images if image in faults), None)
        if reason is None:
            prompts.append(prompt)
        else:
            refused.append((number, Refused(place, prompt.id, reason)))
    in_order = tuple(bad for _, bad in sorted(refused, key=lambda pair: pair[0]))
    return _judge(name, total, prompts, in_order, skip_bad_rows)


def _judge(name: str, total: int, prompts: list[Prompt], refused: tuple[Refused, ...], skip_bad_rows: bool) -> Loaded:
    if not total:
        raise DataError(f"{name}: no rows: the source is empty")
    if not refused:
        return Loaded(tuple(prompts), ())
    lines = [f"{name}: {len(refused)} of {total} rows cannot be used:", *(f"  {bad}" for bad in refused[:SHOWN])]
    if len(refused) > SHOWN:
        lines.append(f"  ... and {len(refused) - SHOWN} more")
    if not skip_bad_rows:
        lines.append("Correct these rows, or set data.skip_bad_rows=true to go on without them.")
    elif not prompts:
        lines.append("No usable row is left.")
    message = "\n".join(lines)
    if not skip_bad_rows or not prompts:
        raise DataError(message, refused)
    log.warning("%s", message)
    return Loaded(tuple(prompts), refused)


def _row_id(row: Any) -> str | None:
    return str(row["id"]) if isinstance(row, Mapping) and row.get("id") is not None else None


def _image_faults(prompts: Iterable[Prompt]) -> dict[str | bytes, str]:
    """Images that cannot be used and why; each distinct image is decoded once, on a few threads."""
    images = list(dict.fromkeys(image for prompt in prompts for image in prompt.images))
    with ThreadPoolExecutor(max_workers=4) as pool:
        return {image: fault for image, fault in zip(images, pool.map(check_image, images), strict=True) if fault}


def _open(source: Source) -> tuple[Iterator[Placed], Path | None]:
    """The rows of a source and the folder its relative image paths start from."""
    if not isinstance(source, str | Path):
        return _numbered(source), None
    text = str(source)
    if text.startswith("demo:"):
        from lingshu_rl.demo.build import build_demo

        split = text.removeprefix("demo:")
        if split not in DEMO_SPLITS:
            raise DataError(f"{text}: the demo has the splits {', '.join(DEMO_SPLITS)}")
        path = build_demo() / f"{split}.jsonl"
        return _jsonl(path), path.parent
    path = Path(text).expanduser()
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        return (_jsonl if path.suffix == ".jsonl" else _parquet)(path), path.parent
    if path.is_file():
        raise DataError(f"{path}: rows are read from .jsonl or .parquet files")
    return _hugging_face(text)


def _numbered(rows: Iterable[Any]) -> Iterator[Placed]:
    for number, row in enumerate(rows, start=1):
        usable = isinstance(row, Mapping)
        yield f"row {number}", row if usable else RowError(f"a row is a mapping, not {type(row).__name__}")


def _jsonl(path: Path) -> Iterator[Placed]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _json_row(line)


def _json_row(line: bytes) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return RowError(f"not JSON: {error}")
    return row if isinstance(row, dict) else RowError(f"a line holds one JSON object, this one a {type(row).__name__}")


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from _numbered(row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _hugging_face(text: str) -> tuple[Iterator[Placed], Path | None]:
    """A folder written by `save_to_disk`, else a dataset of the hub; images stay as stored bytes or paths."""
    import datasets

    name, _, split = text.rpartition(":") if ":" in text else (text, "", "")
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # the hub's errors share no base class
        raise DataError(
            f"{text}: cannot be loaded ({type(error).__name__}: {error}). A source is demo:train, a .jsonl or .parquet "
            'file, a folder made by save_to_disk, or a hub id such as "org/name:train".'
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(
                f"{text}: name one of its splits, {', '.join(data)}, after a colon: {name}:{next(iter(data))}"
            )
        data = data[split]
    column = data.features.get("images")
    if isinstance(getattr(column, "feature", None), datasets.Image):
        data = data.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return _numbered(data), folder if folder.is_dir() else None
