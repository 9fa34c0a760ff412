"""`lingshu-rl data look FILE`: what a source holds, how it would be read, and what the trainer would see of it."""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any

from lingshu_rl.data.chats import images_of
from lingshu_rl.data.columns import at_path, is_missing
from lingshu_rl.data.load import DataError, Loaded, RefusedRow, load
from lingshu_rl.data.mapping import Mapper
from lingshu_rl.data.sources import (
    PICTURES,
    Source,
    SourceError,
    guess_preset,
    is_row,
    layout_of,
    open_records,
    open_rows,
    presets,
    sources_of,
)
from lingshu_rl.data.tables import Head
from lingshu_rl.rewarding import spread
from lingshu_rl.settings import read_words
from lingshu_rl.types import Prompt
from rewards.kinds import LETTERS
from rewards.rows import OTHER_NAMES

SAMPLE = 200  # records that are guessed by
COUNTED = 100  # rows whose tokens are counted, evenly taken
REASONS = 10  # of refusals that are shown
WIDE = 160  # characters of a line
# Columns, in small letters, that hold a report or a caption, and what then is the answer.
REPORTS = {
    "report": "report",
    "report_text": "report_text",
    "caption": "caption",
    "findings": "{findings}\n{impression}|findings|impression",
    "impression": "impression",
}
_OPTION_COLUMN = re.compile(r"(?:(?:option|choice|opt|op)[ _]?)?([a-jA-J])", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    look = parser.add_subparsers(required=True).add_parser(
        "look",
        help="what a source holds and how it would be read",
        epilog="keys of the source are given as key=value: where='q_lang == en' map.answer=label",
    )
    look.add_argument("path", help="as data.train: a file, a folder, a pattern of files, a Hub id, each with :SPLIT")
    look.add_argument("--format", default="", help="a preset (docs/data.md); default: guessed")
    look.add_argument("--rows", type=int, default=10, help="rows that are shown")
    look.add_argument("--limit", type=int, default=5000, help="rows that are looked at; 0 = all")
    look.add_argument("--model", default="", help="folder or Hub id: counts tokens, and says what this model refuses")
    look.add_argument("--instruction", default="full", help="last line of the prompts: full | short | your own text")
    look.add_argument("settings", nargs="*", metavar="key=value")


def run(arguments: argparse.Namespace) -> None:
    """Raises DataError and ConfigError."""
    told = {"path": arguments.path, "format": arguments.format, **read_words(arguments.settings)}
    (source,) = sources_of(told, "source")
    for line in look(source, arguments.rows, arguments.limit, arguments.model, arguments.instruction):
        print(line)


def records_of(path: str, words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Rows of a source with their places. words: its keys as key=value. Raises ConfigError and SourceError."""
    (source,) = sources_of({"path": path, **read_words(words)}, "source")
    rows = open_rows(source)
    for number, row in rows:
        yield rows.place(number), row


def look(source: Source, rows: int, limit: int, model: str, instruction: str) -> Iterator[str]:
    """The report line by line. Raises DataError where the source cannot be read, or no row of it be used."""
    try:
        found = [record for _, record in islice(open_records(source)[0], SAMPLE)]
    except SourceError as error:
        raise DataError(str(error)) from error
    if not found:
        raise DataError(f"{source.path}: no rows: the source is empty")
    records = [record for record in found if isinstance(record, Mapping)]
    yield f"# {source.path}: its columns, each with the first value in it"
    yield from (f"  {name}: {_short(value)}" for name, value in first_values(records).items())
    source = settled(source, records)
    yield from ("", "# how it is read; paste this, and change what is wrong", *pasted(source))
    encoder = None
    if model:
        from lingshu_rl.model.encoder import PromptEncoder

        encoder = PromptEncoder(model)
    try:
        loaded = _load(source, limit, instruction, encoder.fault if encoder else lambda prompt: None)
    except DataError as error:
        if not error.refused:
            raise
        yield from ("", *refusals(error.refused))
        lost = all(one.reason.startswith("image file not found") for one in error.refused)
        do = "say where the images are with image_dir=FOLDER" if lost else "begin with the mapping above (docs/data.md)"
        raise DataError(f"{source.path}: no row can be used so; {do}") from None
    for prompt in loaded.prompts[:rows]:
        yield from ("", *shown(prompt))
    yield from ("", *counts(loaded))
    if encoder and loaded.prompts:
        lengths = [len(encoder.encode(prompt)[0]) for prompt in spread(loaded.prompts, COUNTED)]
        yield f"tokens of a prompt: {_spread(lengths)} ({len(lengths)} rows evenly taken)"
    yield from refusals(loaded.refused)


def settled(source: Source, records: Sequence[Mapping[str, Any]]) -> Source:
    """The source with the preset that its records look like, or with a mapping guessed from the columns' names."""
    if source.format or source.map or not records or is_row(records[0]):
        return source
    if found := guess_preset(records[:3]):
        read = Mapper(presets()[found].layout).fields.get("images", lambda record: None)(records[0])
        picture = _other_picture(records[0], read)
        return replace(source, format=found, map={"images": picture} if picture else {})
    columns = guessed_map(records)
    names = {
        name.lower().replace(" ", "_"): name for name, value in first_values(records).items() if not is_missing(value)
    }
    wanted = next((text for column, text in REPORTS.items() if column in names), "")
    report = re.sub(r"\w+", lambda column: names.get(column[0], column[0]), wanted)
    if report and "answer" not in columns:
        return replace(
            source,
            map={**columns, "answer": report},
            values={"question": "Write the report.", "kind": "report", **source.values},
        )
    return replace(source, map=columns)


def first_values(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each column the first value that is there, in the order in which columns turn up."""
    found: dict[str, Any] = {}
    for record in records:
        found.update({name: value for name, value in record.items() if is_missing(found.get(name))})
    return found


def guessed_map(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A column for each field that has one of a usual name; options also from columns such as A, B, ... or option_a."""
    first = first_values(records)
    columns = {name.lower().replace(" ", "_"): name for name, value in first.items() if not is_missing(value)}
    usual = {name: (name, *others) for name, others in OTHER_NAMES.items() if name not in ("kind", "meta")}
    found: dict[str, Any] = {
        name: next(columns[other] for other in others if other in columns)
        for name, others in usual.items()
        if columns.keys() & set(others)
    }
    if picture := _other_picture(first, at_path(first, str(found.get("images")))):
        found["images"] = picture
    by_letter = {m[1].upper(): name for name in columns.values() if (m := _OPTION_COLUMN.fullmatch(name.strip()))}
    if "options" not in found and {"A", "B"} <= by_letter.keys():
        found["options"] = [by_letter[letter] for letter in LETTERS if letter in by_letter]
    if "options" in found and isinstance(at_path(first, str(found.get("answer"))), int):
        found["answer"] = {"from": found["answer"], "base": guessed_base(records, found["answer"])}
    return found


def _other_picture(record: Mapping[str, Any], read: Any) -> str:
    """The column that holds a picture, where what is read as images holds none; "" where it does, or no column does."""
    named = next((name for name, value in record.items() if _is_picture(value)), "")
    return "" if any(map(_is_picture, images_of(read))) else named


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, str) and value.lower().endswith(PICTURES))


def guessed_base(records: Sequence[Mapping[str, Any]], column: str) -> int:
    """From where the indices count, as far as the records tell: from 0 if there is one among them."""
    return 0 if any(at_path(record, column) == 0 for record in records) else 1


def pasted(source: Source) -> Iterator[str]:
    """The source as YAML, and the preset's own mapping as comments."""
    import yaml

    def written(value: Any) -> list[str]:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=WIDE).splitlines()

    told = {k: v for k, v in vars(source).items() if v not in ("", None, {}, [])}
    yield from ("data:", "  train:", *(f"    {line}" for line in written(told)))
    missing = [name for name in ("question", "answer") if not {name, "messages"} & {*source.map, *source.values}]
    if missing and not source.format and source.map:
        yield f"    # add {' and '.join(missing)}: a column under map, or what is the same for all rows under values"
    if source.format:
        layout = {k: v for k, v in vars(layout_of(source)).items() if v not in ("", {}, [], ())}
        yield f"    # {source.format}: {presets()[source.format].about}; it stands for"
        yield from (f"    #   {line}" for line in written(layout))


def _load(source: Source, limit: int, instruction: str, fault: Any) -> Loaded:
    logger = logging.getLogger("lingshu_rl.data.load")
    before = logger.level
    logger.setLevel(logging.ERROR)  # refusals are told in the report
    try:
        return load(Head(open_rows(source), limit), instruction=instruction, skip_bad_rows=True, fault=fault)
    except SourceError as error:
        raise DataError(str(error)) from error
    finally:
        logger.setLevel(before)


def shown(prompt: Prompt) -> Iterator[str]:
    sizes = ", ".join("{} x {}".format(*picture.size) for picture in prompt.images)
    yield f"# {prompt.id}: {prompt.kind}, {f'images of {sizes}' if sizes else 'no image'}"
    for message in prompt.messages:
        parts = (
            [{"type": "text", "text": message["content"]}]
            if isinstance(message["content"], str)
            else message["content"]
        )
        text = " ".join(part.get("text", "<image>") for part in parts)
        yield f"  {message['role']}: " + text.replace("\n", "\n    ")
    yield f"  gold: {prompt.gold!r}" + (f"   meta: {dict(prompt.meta)}" if prompt.meta else "")


def counts(loaded: Loaded) -> Iterator[str]:
    kinds: Counter[str] = Counter()
    images: Counter[int] = Counter()
    options: Counter[int] = Counter()
    golds: Counter[str] = Counter()
    pixels: list[int] = []
    for prompt in loaded.prompts:
        kinds[prompt.kind] += 1
        images[len(prompt.images)] += 1
        if prompt.options:
            options[len(prompt.options)] += 1
            golds[str(prompt.gold)] += 1
        pixels += [picture.size[0] * picture.size[1] for picture in prompt.images]
    yield f"# {len(loaded.prompts)} rows can be used, {len(loaded.refused)} would be refused"
    yield f"kinds: {_counted(kinds)}"
    yield f"images of a row: {_counted(images)}"
    if options:
        yield f"options of a row: {_counted(options)}; right ones: {_counted(golds)}"
    if pixels:
        yield f"pixels of an image, as the model gets it: {_spread(pixels)}"


def refusals(refused: Sequence[RefusedRow]) -> Iterator[str]:
    """The reasons, most frequent first, with an example of each."""
    by_reason: dict[str, list[RefusedRow]] = {}
    for one in refused:
        by_reason.setdefault(re.sub(r"'[^']*'|\d+|/\S+", "...", one.reason), []).append(one)
    for same in sorted(by_reason.values(), key=len, reverse=True)[:REASONS]:
        yield f"refused, {len(same)}: {same[0]}"


def _counted(found: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda pair: -pair[1])[:12])


def _spread(numbers: Sequence[int]) -> str:
    return f"median {median(numbers):.0f}, smallest {min(numbers)}, largest {max(numbers)}"


def _short(value: Any) -> str:
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= WIDE else f"{text[:WIDE]}..."
