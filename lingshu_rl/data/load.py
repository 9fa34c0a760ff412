"""Prompts of one source of rows or of several. A bad row is refused, never dropped in silence."""

from __future__ import annotations

import hashlib
import logging
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Protocol, overload

from lingshu_rl.data.mixing import Part
from lingshu_rl.data.rows import RowError, refusing, row_to_prompt
from lingshu_rl.data.sources import FORMS, Source, SourceError, guess_preset, open_rows, sources_of
from lingshu_rl.data.tables import Chain, Head, RowList, Rows
from lingshu_rl.failures import LingshuError
from lingshu_rl.imaging.images import DEFAULT_BUDGET, Budget, Picture
from lingshu_rl.types import Prompt
from rewards.rows import LabelCheck

Fault = Callable[[Prompt], str | None]  # why the model cannot be asked a prompt

log = logging.getLogger(__name__)

SHOWN = 20  # refused rows that a message lists
DECODED_AT_LOAD = 1000  # images; of a larger set the headers are read at load, and `broken_rows` decodes beside the run
BATCH = 512  # rows whose images are looked at together

# What `data.train` may be: a source's text or mapping, a list of those; or rows in memory.
Given = str | Path | Source | Head | Mapping[str, Any] | Sequence[Any] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class RefusedRow:
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
        self._prompt = lru_cache(maxsize=256)(
            partial(_again, rows, ids, make, name)
        )  # a step asks for each more than once

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
        """Raises KeyError, else as `__getitem__`."""
        return self._prompt(self.ids[name])

    def place(self, name: str) -> str:
        """Where a prompt's row stands: "line 7"."""
        return self.rows.place(self.ids[name])


def _again(rows: Rows, ids: Mapping[str, int], make: Callable[[Any], Prompt], name: str, number: int) -> Prompt:
    """The prompt of a row that was loaded. Raises DataError where the row is another one by now."""
    changed = f"{name}: {rows.place(number)} has changed since it was loaded"
    row = rows.row(number)
    try:
        if isinstance(row, RowError):
            raise row
        prompt = make(row)
    except RowError as error:
        raise DataError(f"{changed}: {error}") from error
    if ids.get(prompt.id) != number:
        was = next(known for known, place in ids.items() if place == number)
        raise DataError(f"{changed}: its id is {prompt.id!r}, and was {was!r}")
    return prompt


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
    parts: of a mixture, its sources in order.
    """

    prompts: Prompts
    refused: tuple[RefusedRow, ...]
    fingerprint: str
    too_long: tuple[RefusedRow, ...] = ()
    parts: tuple[Part, ...] = ()

    def source_of(self, name: str) -> str:
        """The source that a prompt of a mixture is from, by its id; "" where there is one source."""
        rows = self.prompts.rows
        return rows.part_of(self.prompts.ids[name]) if self.parts and isinstance(rows, Chain) else ""


class Measure(Protocol):
    """Which prompts are too long, asked batch by batch: `lingshu_rl.model.lengths.Lengths`. advice: what to do about
    them."""

    advice: str

    def look(self, prompts: Sequence[Prompt]) -> None:
        """Read a batch. The images' headers are readable."""

    def of(self, prompt: Prompt) -> str | None:
        """Why a prompt of that batch cannot be asked, or None."""


class DataError(LingshuError, ValueError):
    """A source that cannot be used. refused: every bad row, where rows are the matter."""

    def __init__(self, message: str, refused: tuple[RefusedRow, ...] = ()):
        super().__init__(message)
        self.refused = refused


def load(
    source: Given,
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
    key: str = "data.train",
    skip_key: str = "data.skip_bad_rows",
) -> Loaded:
    """Prompts of a source, of several, or of rows in memory; see `sources.Source` for what a source may be.

    base_dir: where relative image paths start, by default the file's folder. instruction: see `rows.instruction_text`.
    system: see `rows.row_to_prompt`.
    fault: why the model cannot be asked a prompt, or None (`PromptEncoder.fault`). check: the `check_gold` of the
    reward that will judge, by default that of each row's kind. budget: see `Picture`. lengths: what finds prompts that
    are too long; they are refused like other rows, or left out with drop_long. key, skip_key: the settings that hold
    the source and `skip_bad_rows`, for messages. Every row is checked, and every image's
    header; up to DECODED_AT_LOAD images are decoded as well. Raises DataError with up to 20 bad rows and their total;
    with `skip_bad_rows` they are logged and returned instead.
    """
    name, sources, rows = _open(source, base_dir)
    make = partial(row_to_prompt, base_dir=base_dir, instruction=instruction, system=system, check=check, budget=budget)
    try:
        read = _read(rows, make, fault, lengths, name)
    except SourceError as error:
        raise DataError(str(error)) from error
    prompts = Prompts(rows, read.ids, make, name)
    refused = in_order([*read.bad, *([] if drop_long else read.long)])
    dropped = in_order(read.long) if drop_long else ()
    advice = lengths.advice if lengths is not None and read.long and not drop_long else ""
    if not prompts and not read.long:
        advice = "\n".join(filter(None, [advice, _look_alike(sources, rows, key)]))
    _judge(name, read.total, len(prompts), refused, "" if skip_bad_rows else skip_key, advice)
    _tell_dropped(name, read.total, len(prompts), dropped)
    return Loaded(prompts, refused, read.fingerprint, dropped, parts_of(sources, rows, prompts))


@dataclass(frozen=True)
class Checked:
    """What one reading of all rows found. ids: the usable ones' numbers. bad, long: refused rows and too long ones, by
    number."""

    ids: Mapping[str, int]
    total: int
    bad: Sequence[tuple[int, RefusedRow]]
    long: Sequence[tuple[int, RefusedRow]]
    fingerprint: str


def in_order(found: Iterable[tuple[int, RefusedRow]]) -> tuple[RefusedRow, ...]:
    return tuple(one for _, one in sorted(found, key=lambda pair: pair[0]))


def _read(rows: Rows, make: Callable[[Any], Prompt], fault: Fault, lengths: Measure | None, name: str) -> Checked:
    ids: dict[str, int] = {}
    bad: list[tuple[int, RefusedRow]] = []
    long: list[tuple[int, RefusedRow]] = []
    # Ids of rows with a bad image, or too long; another row with that id is a duplicate all the same.
    unusable: set[str] = set()
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
                bad.append((number, RefusedRow(rows.place(number), _row_id(row), str(prompt))))
            elif reason := headers.of(prompt):
                bad.append((number, RefusedRow(rows.place(number), prompt.id, reason)))
                unusable.add(prompt.id)
            elif lengths is not None and (reason := lengths.of(prompt)):
                long.append((number, RefusedRow(rows.place(number), prompt.id, reason)))
                unusable.add(prompt.id)
            else:
                hashed.update(_facts(prompt))
        headers.forget_bytes()
    if 0 < headers.count <= DECODED_AT_LOAD:
        whole = Prompts(rows, {key: number for key, number in ids.items() if key not in unusable}, make, name)
        for one in broken_rows(whole):
            bad.append((ids[str(one.id)], one))
            unusable.add(str(one.id))
    usable = {key: number for key, number in ids.items() if key not in unusable}
    return Checked(usable, total, bad, long, hashed.hexdigest())


def parts_of(sources: Sequence[Source], rows: Rows, prompts: Prompts) -> tuple[Part, ...]:
    """Where the prompts of each of several sources stand."""
    if not isinstance(rows, Chain) or len(sources) < 2:
        return ()
    spans = [range(*pair) for pair in pairwise(bisect_right(prompts.numbers, end) for end in rows.ends)]
    for source, span in zip(sources, spans, strict=True):
        if not span:
            raise DataError(f"{_told(source)}: no usable row is left of this source; leave it out")
    return tuple(Part(s.label, span, s.epochs, s.share) for s, span in zip(sources, spans, strict=True))


def broken_rows(prompts: Prompts) -> Iterator[RefusedRow]:
    """Rows with an image that cannot be decoded, found one after another: decodes every image once, on a few threads.

    For a thread of its own beside the run; it reads files and takes no lock.
    """
    whole = Faults(Picture.fault)
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        whole.look(image for prompt in batch for image in prompt.images)
        for prompt in batch:
            if reason := whole.of(prompt):
                yield RefusedRow(prompts.place(prompt.id), prompt.id, reason)
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
        with refusing():
            prompt = make(row)
    except RowError as error:
        return error
    if reason := fault(prompt):
        return RowError(reason)
    first = ids.setdefault(prompt.id, number)
    return prompt if first == number else RowError(f"duplicate id, first used at {rows.place(first)}")


def _facts(prompt: Prompt) -> bytes:
    """What the fingerprint covers. An image is its bytes, or its file's name and size: folders may move."""
    told = (prompt.id, prompt.messages, prompt.gold, prompt.options, prompt.kind, prompt.meta)
    return repr((told, [picture.content for picture in prompt.images])).encode()


def _judge(name: str, total: int, usable: int, refused: tuple[RefusedRow, ...], skip_key: str, advice: str) -> None:
    """skip_key: the setting that would go on, "" where it is set."""
    if not total:
        raise DataError(f"{name}: no rows: the source is empty")
    if not refused:
        return
    lines = [f"{name}: {len(refused)} of {total} rows cannot be used:", *_listed(refused)]
    if advice:
        lines.append(advice)
    if skip_key:
        lines.append(f"Correct these rows, or set {skip_key}=true to go on without them.")
    elif not usable:
        lines.append("No usable row is left.")
    message = "\n".join(lines)
    if skip_key or not usable:
        raise DataError(message, refused)
    log.warning("%s", message)


def _tell_dropped(name: str, total: int, usable: int, long: tuple[RefusedRow, ...]) -> None:
    if not long:
        return
    message = "\n".join([f"{name}: {len(long)} of {total} rows are left out as too long:", *_listed(long)])
    if not usable:
        raise DataError(f"{message}\nNo usable row is left.", long)
    log.warning("%s", message)


def _listed(refused: Sequence[RefusedRow]) -> Iterator[str]:
    yield from (f"  {one}" for one in refused[:SHOWN])
    if len(refused) > SHOWN:
        yield f"  ... and {len(refused) - SHOWN} more"


def _row_id(row: Any) -> str | None:
    return str(row["id"]) if isinstance(row, Mapping) and row.get("id") is not None else None


def _open(given: Given, base_dir: str | Path | None) -> tuple[str, tuple[Source, ...], Rows]:
    """What is loaded in a word, its sources and their rows one after another. Rows in memory have no source."""
    if isinstance(given, Head):
        return "rows", (), given
    if not isinstance(given, str | Path | Mapping | Source) and not _names_sources(given):
        if not isinstance(given, Iterable):
            raise DataError(f"a source is {FORMS}; or a mapping with `path`, or rows; got {given!r}")
        return "rows", (), RowList.of(given)
    try:
        sources = sources_of(given, "source")
        if len(sources) == 1:
            return _told(sources[0]), sources, open_rows(sources[0], base_dir)
        return (
            ", ".join(map(_told, sources)),
            sources,
            Chain([(s.label, open_rows(s, base_dir, apart=True)) for s in sources]),
        )
    except SourceError as error:
        raise DataError(str(error)) from error


def _names_sources(given: Any) -> bool:
    """Whether a list is one of sources, not of rows."""
    if not isinstance(given, list | tuple) or not given:
        return False
    return all(isinstance(g, str | Path | Source) or (isinstance(g, Mapping) and "path" in g) for g in given)


def _told(source: Source) -> str:
    return f"{source.path}:{source.split}" if source.split else source.path


def _look_alike(sources: Sequence[Source], rows: Rows, key: str) -> str:
    """The preset that would read rows which are none of this library, in a sentence, or ""."""
    if len(sources) != 1 or sources[0].mapped:
        return ""
    records = [record for _, record in islice(rows, 3) if isinstance(record, Mapping)]
    found = guess_preset(records)
    return (
        f"They look like {found}: {key}=[{{path: {_told(sources[0])}, format: {found}}}] reads such records; "
        f"`lingshu-rl data look {_told(sources[0])}` shows what becomes of them."
        if found
        else ""
    )
