"""Prompts from the demo, JSONL, parquet or a Hugging Face dataset. A bad row is refused, never dropped in silence."""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, overload

from lingshu_rl.data.rows import RowError, row_to_prompt
from lingshu_rl.data.tables import JsonLines, ParquetTable, RowList, Rows
from lingshu_rl.images import DEFAULT_BUDGET, Budget, Picture
from lingshu_rl.types import Prompt
from rewards.rows import LabelCheck

Fault = Callable[[Prompt], str | None]  # why the model cannot be asked a prompt

log = logging.getLogger(__name__)

SHOWN = 20  # refused rows that a message lists
DECODED_AT_LOAD = 1000  # images; of a larger set the headers are read at load, and `broken_rows` decodes beside the run
BATCH = 512  # rows whose images are looked at together
DEMO_SPLITS = ("train", "validation", "test")

Source = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used. place: "line 7" or "row 7", counted from 1. id: None when there is none."""

    place: str
    id: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.place}{f' (id {self.id})' if self.id is not None else ''}: {self.reason}"


class Prompts(Sequence[Prompt]):
    """The usable rows of a source in its order. A prompt is made when it is asked for; what is kept of a row is its id.

    ids: the row's number in its source by prompt id, in order.
    """

    def __init__(self, rows: Rows, ids: Mapping[str, int], make: Callable[[Any], Prompt], name: str) -> None:
        self.rows, self.ids, self.name = rows, ids, name
        self.numbers = array("q", ids.values())
        self._prompt = lru_cache(maxsize=256)(partial(_again, rows, make, name))  # a step asks for each more than once

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        """Raises DataError where the source no longer holds what was loaded."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._prompt(self.numbers[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def by_id(self, name: str) -> Prompt:
        """Raises KeyError."""
        return self._prompt(self.ids[name])

    def place(self, name: str) -> str:
        """Where a prompt's row stands: "line 7"."""
        return f"{self.rows.word} {self.ids[name]}"


def _again(rows: Rows, make: Callable[[Any], Prompt], name: str, number: int) -> Prompt:
    row = rows.row(number)
    try:
        if isinstance(row, RowError):
            raise row
        return make(row)
    except RowError as error:
        raise DataError(f"{name}: {rows.word} {number} has changed since it was loaded: {error}") from error


class ById(Mapping[str, Prompt]):
    """The prompts of several sets by id, without holding them."""

    def __init__(self, *sets: Prompts) -> None:
        self.sets = sets

    def __getitem__(self, name: str) -> Prompt:
        return next((prompts for prompts in self.sets if name in prompts.ids), self.sets[0]).by_id(name)

    def __contains__(self, name: object) -> bool:
        return any(name in prompts.ids for prompts in self.sets)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(prompts.ids for prompts in self.sets)

    def __len__(self) -> int:
        return sum(map(len, self.sets))


@dataclass(frozen=True)
class Loaded:
    """prompts: the usable rows in file order. refused: the others, each with its place and reason; too_long: those that
    were left out for their length alone.

    fingerprint: of the usable rows, their order and their images' names and sizes; equal rows give equal ones.
    """

    prompts: Prompts
    refused: tuple[Refused, ...]
    fingerprint: str
    too_long: tuple[Refused, ...] = ()


class Measure(Protocol):
    """Which prompts are too long, asked batch by batch: `lingshu_rl.model.lengths.Lengths`. advice: what to do about them."""

    advice: str

    def look(self, prompts: Sequence[Prompt]) -> None:
        """Read a batch. The images' headers are readable."""

    def of(self, prompt: Prompt) -> str | None:
        """Why a prompt of that batch cannot be asked, or None."""


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
    fault: Fault = lambda prompt: None,
    check: LabelCheck | None = None,
    budget: Budget = DEFAULT_BUDGET,
    lengths: Measure | None = None,
    drop_long: bool = False,
) -> Loaded:
    """Prompts of a source: "demo:train", a .jsonl or .parquet file, a `save_to_disk` folder, a hub id, or rows.

    A folder or hub id takes its split after a colon ("org/name:train"). base_dir: where relative image paths start,
    by default the file's folder. instruction: see `rows.instruction_text`. system: see `rows.row_to_prompt`.
    fault: why the model cannot be asked a prompt, or None (`PromptEncoder.fault`). check: the `check_gold` of the
    reward that will judge, by default that of each row's kind. budget: see `Picture`. lengths: what finds prompts that are too long; they are
    refused like other rows, or left out with drop_long. Every row is checked, and every image's header; up to
    DECODED_AT_LOAD images are decoded as well.
    Raises DataError with up to 20 bad rows and their total; with `skip_bad_rows` they are logged and returned instead.
    """
    name = str(source) if isinstance(source, str | Path) else "rows"
    rows, folder = _open(source)
    base = base_dir if base_dir is not None else folder
    make = partial(row_to_prompt, base_dir=base, instruction=instruction, system=system, check=check, budget=budget)
    ids: dict[str, int] = {}
    bad: list[tuple[int, Refused]] = []
    long: list[tuple[int, Refused]] = []
    unusable: set[str] = (
        set()
    )  # ids of rows with a bad image, or too long; another row with that id is a duplicate all the same
    headers = Faults(Picture.fault_in_header)
    hashed = hashlib.blake2b(digest_size=8)
    total = 0
    for batch in _batches(rows):
        total += len(batch)
        made = [(number, row, _made(rows, number, row, make, ids, fault)) for number, row in batch]
        headers.look(image for _, _, prompt in made if isinstance(prompt, Prompt) for image in prompt.images)
        if lengths is not None:
            lengths.look([p for _, _, p in made if isinstance(p, Prompt) and not headers.of(p)])
        for number, row, prompt in made:
            if isinstance(prompt, RowError):
                bad.append((number, Refused(f"{rows.word} {number}", _row_id(row), str(prompt))))
            elif reason := headers.of(prompt):
                bad.append((number, Refused(f"{rows.word} {number}", prompt.id, reason)))
                unusable.add(prompt.id)
            elif lengths is not None and (reason := lengths.of(prompt)):
                long.append((number, Refused(f"{rows.word} {number}", prompt.id, reason)))
                unusable.add(prompt.id)
            else:
                hashed.update(_facts(prompt))
        headers.forget_bytes()
    if 0 < headers.count <= DECODED_AT_LOAD:
        whole = Prompts(rows, {key: number for key, number in ids.items() if key not in unusable}, make, name)
        for one in broken_rows(whole):
            bad.append((ids[str(one.id)], one))
            unusable.add(str(one.id))
    prompts = Prompts(rows, {key: number for key, number in ids.items() if key not in unusable}, make, name)
    advice = lengths.advice if lengths is not None and long and not drop_long else ""
    refused = tuple(one for _, one in sorted([*bad, *([] if drop_long else long)], key=lambda pair: pair[0]))
    dropped = tuple(one for _, one in long) if drop_long else ()
    _judge(name, total, len(prompts), refused, skip_bad_rows, advice)
    _tell_dropped(name, total, len(prompts), dropped)
    return Loaded(prompts, refused, hashed.hexdigest(), dropped)


def broken_rows(prompts: Prompts) -> Iterator[Refused]:
    """Rows with an image that cannot be decoded, found one after another: decodes every image once, on a few threads.

    For a thread of its own beside the run; it reads files and takes no lock.
    """
    whole = Faults(Picture.fault)
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        whole.look(image for prompt in batch for image in prompt.images)
        for prompt in batch:
            if reason := whole.of(prompt):
                yield Refused(prompts.place(prompt.id), prompt.id, reason)
        whole.forget_bytes()


class Faults:
    """What a check says of images, each looked at once; those given as bytes are looked at again in another batch."""

    def __init__(self, check: Callable[[Picture], str | None]) -> None:
        self.check = check
        self.known: dict[Picture, str | None] = {}
        self.count = 0

    def look(self, images: Iterable[Picture]) -> None:
        new = [image for image in dict.fromkeys(images) if image not in self.known]
        self.count += len(new)
        with ThreadPoolExecutor(max_workers=4) as pool:
            self.known.update(zip(new, pool.map(self.check, new), strict=True))

    def of(self, prompt: Prompt) -> str | None:
        return next((fault for image in prompt.images if (fault := self.known[image])), None)

    def forget_bytes(self) -> None:
        self.known = {image: fault for image, fault in self.known.items() if isinstance(image.source, str)}


def _batches(rows: Rows) -> Iterator[list[tuple[int, Any]]]:
    numbered = iter(rows)
    while batch := list(islice(numbered, BATCH)):
        yield batch


def _made(
    rows: Rows, number: int, row: Any, make: Callable[[Any], Prompt], ids: dict[str, int], fault: Fault
) -> Prompt | RowError:
    """The prompt of a row, whose id goes into `ids`, or why there is none."""
    if isinstance(row, RowError):
        return row
    try:
        prompt = make(row)
    except RowError as error:
        return error
    if reason := fault(prompt):
        return RowError(reason)
    first = ids.setdefault(prompt.id, number)
    return prompt if first == number else RowError(f"duplicate id, first used at {rows.word} {first}")


def _facts(prompt: Prompt) -> bytes:
    """What the fingerprint covers. An image is its bytes, or its file's name and size: folders may move."""
    told = (prompt.id, prompt.messages, prompt.gold, prompt.options, prompt.kind, prompt.meta)
    images = [
        (os.path.basename(source), os.path.getsize(source))
        if isinstance(source, str)
        else hashlib.sha256(source).digest()
        for source in (picture.source for picture in prompt.images)
    ]
    return repr((told, images)).encode()


def _judge(
    name: str, total: int, usable: int, refused: tuple[Refused, ...], skip_bad_rows: bool, advice: str = ""
) -> None:
    if not total:
        raise DataError(f"{name}: no rows: the source is empty")
    if not refused:
        return
    lines = [f"{name}: {len(refused)} of {total} rows cannot be used:", *_listed(refused)]
    if advice:
        lines.append(advice)
    if not skip_bad_rows:
        lines.append("Correct these rows, or set data.skip_bad_rows=true to go on without them.")
    elif not usable:
        lines.append("No usable row is left.")
    message = "\n".join(lines)
    if not skip_bad_rows or not usable:
        raise DataError(message, refused)
    log.warning("%s", message)


def _tell_dropped(name: str, total: int, usable: int, long: tuple[Refused, ...]) -> None:
    if not long:
        return
    message = "\n".join([f"{name}: {len(long)} of {total} rows are left out as too long:", *_listed(long)])
    if not usable:
        raise DataError(f"{message}\nNo usable row is left.", long)
    log.warning("%s", message)


def _listed(refused: Sequence[Refused]) -> Iterator[str]:
    yield from (f"  {one}" for one in refused[:SHOWN])
    if len(refused) > SHOWN:
        yield f"  ... and {len(refused) - SHOWN} more"


def _row_id(row: Any) -> str | None:
    return str(row["id"]) if isinstance(row, Mapping) and row.get("id") is not None else None


def _open(source: Source) -> tuple[Rows, Path | None]:
    """The rows of a source and the folder its relative image paths start from."""
    if not isinstance(source, str | Path):
        return RowList.of(source), None
    text = str(source)
    if text.startswith("demo:"):
        from lingshu_rl.demo.build import build_demo

        split = text.removeprefix("demo:")
        if split not in DEMO_SPLITS:
            raise DataError(f"{text}: the demo has the splits {', '.join(DEMO_SPLITS)}")
        path = build_demo() / f"{split}.jsonl"
        return JsonLines(path), path.parent
    path = Path(text).expanduser()
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        return JsonLines(path) if path.suffix == ".jsonl" else _parquet(path), path.parent
    if path.is_file():
        raise DataError(f"{path}: rows are read from .jsonl or .parquet files")
    return _hugging_face(text)


def _parquet(path: Path) -> ParquetTable:
    import pyarrow

    try:
        return ParquetTable(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _hugging_face(text: str) -> tuple[RowList, Path | None]:
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
    return RowList(data), folder if folder.is_dir() else None
