"""Sources of rows: what `data.train`, a stage's data or a look names, opened as rows that lie where they are.

A source is a text (`demo:train`, a file, a folder, a pattern of files, a Hub id, each with :SPLIT) or a mapping with
`path` and how its records become rows. Several make a mixture.
"""

from __future__ import annotations

import glob
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from lingshu_rl.data.columns import MappingError, expression, is_missing
from lingshu_rl.data.mapping import ImageFinder, Layout, Mapper
from lingshu_rl.data.rows import FIELDS, RowError, refusing
from lingshu_rl.data.tables import (
    PACKED,
    SPLITS,
    Chain,
    RowList,
    Rows,
    TarShards,
    UnreadableSource,
    json_file,
    json_lines,
    parquet,
    table,
)
from lingshu_rl.failures import ConfigError
from lingshu_rl.imaging.files import full_path
from lingshu_rl.imaging.volumes import FILES as VOLUME_FILES
from lingshu_rl.imaging.volumes import as_volumes, is_volume
from rewards.imports import hint

DEMO_SPLITS = ("train", "validation", "test")
PRESETS_FILE = Path(__file__).with_name("presets.yaml")
# How a file is read is said by its ending; of a folder's files those of the first of these are its records.
DATA_ENDINGS = (".parquet", ".tar", ".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".txt")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMS = (
    "demo:train, a .jsonl, .json, .parquet, .csv, .tsv, .txt or .tar file (also packed as .gz), a folder of them or "
    "one made by save_to_disk, or a Hub id such as org/name:train"
)


Check = Callable[[int, int], None]


class SourceError(ConfigError):
    """A source that cannot be named so, or not be read; the text says what to write."""


@dataclass(frozen=True)
class SourceSpec:
    """Where records lie, and how they become rows; alike for training and curation."""

    path: str  # demo:SPLIT | file | folder | pattern of files (data/*.parquet) | Hub id, each with :SPLIT
    name: str = ""  # in messages, metrics and the ids of rows that have none; "" = the file's and its folder's name
    format: str = ""  # a preset: llava | easyr1 | verl | trl | slake | ... (docs/data.md); "" = rows of this library
    split: str = ""  # train | test | ..., as path:SPLIT
    subset: str = ""  # of a Hub data set: its configuration
    map: dict[str, Any] = field(default_factory=dict)  # row field -> column, over the preset's
    values: dict[str, Any] = field(default_factory=dict)  # row field -> constant, where the record has nothing
    where: str = ""  # only these records: q_lang == en and modality in [CT, MRI]
    each: list[str] = field(default_factory=list)  # paths of lists: a row for each of their items
    turns: str = ""  # each | last: the answers of a conversation that are asked for; "" = each
    image_dir: str = ""  # where names of images start; "" = the file's folder and the usual ones in it
    volume: dict[str, Any] = field(default_factory=dict)  # images are CT or MR volumes: {slices: 16, window: [40, 400]}
    columns: list[str] = field(default_factory=list)  # names for a table without a header
    delimiter: str = ""  # of a table; "" = as its header is split: comma, semicolon, tab or bar

    def check(self, more_formats: Sequence[str] = ()) -> None:
        """Raises SourceError naming the key."""
        formats = (*presets(), *more_formats)
        if self.format and self.format not in formats:
            raise SourceError(
                f"format: no preset {self.format!r}{hint(self.format, formats)}; they are {', '.join(formats)}"
            )
        for name, kind in {"map": dict, "values": dict, "volume": dict, "each": list, "columns": list}.items():
            if not isinstance(getattr(self, name), kind):
                told = "list" if kind is list else "mapping"
                raise SourceError(f"{name} must be a {told}, got {getattr(self, name)!r}")
        try:
            Mapper(layout_of(self))
        except (MappingError, TypeError) as error:
            raise SourceError(str(error)) from None

    @property
    def mapped(self) -> bool:
        """Whether records are other people's; else they are rows as they stand."""
        return bool(self.format or self.map or self.values or self.where or self.each or self.turns)

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        path = Path(self.path.partition("*")[0] or self.path)
        stem = path.name.partition(".")[0] or path.name
        return "/".join(part for part in (path.parent.name, stem, self.split) if part)


@dataclass(frozen=True)
class Source(SourceSpec):
    """What a run or a stage reads, and its part in a mixture."""

    epochs: float | None = None  # in a mixture: how often its rows come while all others come once
    share: float | None = None  # in a mixture: its part of what is drawn, in proportion to the other shares


@dataclass(frozen=True)
class Preset:
    """about: whose layout it is. signs: columns by which a file of it is known. columns, delimiter: of a table without
    a header."""

    about: str
    signs: Sequence[str]
    layout: Layout
    columns: Sequence[str] = ()
    delimiter: str = ""


@cache
def presets() -> Mapping[str, Preset]:
    import yaml

    told = yaml.safe_load(PRESETS_FILE.read_text(encoding="utf-8"))
    own = ("about", "signs", "columns", "delimiter")
    return {
        name: Preset(
            **{k: v for k, v in one.items() if k in own},
            layout=Layout(**{k: v for k, v in one.items() if k not in own}),
        )
        for name, one in told.items()
    }


# ------------------------------------------------------------------------------------------------------ what is written


def sources_of(given: Any, key: str = "data.train") -> tuple[Source, ...]:
    """One text or mapping, or a list of them. Raises SourceError naming the key."""
    several = isinstance(given, list | tuple)
    made = tuple(_source(one, f"{key}[{n}]" if several else key) for n, one in enumerate(given if several else [given]))
    if not made:
        raise SourceError(f"{key} is empty: name at least one source")
    weighed = [s for s in made if s.share is not None]
    if weighed and (len(weighed) < len(made) or any(s.epochs is not None for s in made)):
        raise SourceError(f"{key}: either every source has a share, or none (epochs are 1 where they are not given)")
    labels = [source.label for source in made]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise SourceError(f"{key}: two sources are called {twice!r}; give them a `name` each")
    return made


def is_row(record: Any) -> bool:
    """Whether a record has the form of a row of this library already."""
    return isinstance(record, Mapping) and {"images", "answer", "kind"} <= record.keys() <= set(FIELDS)


def paths_in(given: Any) -> list[str]:
    """The paths that a source or a list of them names, without a look at anything else in it."""
    several = given if isinstance(given, list | tuple) else [given]
    return [str(one.get("path", "")) if isinstance(one, Mapping) else str(one) for one in several]


def is_demo(given: Any) -> bool:
    """Whether the demo's rows are among them."""
    return any(path.startswith("demo:") for path in paths_in(given))


def _source(given: Any, key: str) -> Source:
    if isinstance(given, Source):
        return given
    if isinstance(given, str | Path):
        return _split(Source(str(given)), key)
    if not isinstance(given, Mapping):
        raise SourceError(f"{key}: a source is a text or a mapping with `path`, got {type(given).__name__}")
    known = [f.name for f in fields(Source)]
    for name in given:
        if name not in known:
            raise SourceError(f"{key}.{name}: unknown key{hint(str(name), known)}; a source has {', '.join(known)}")
    if not given.get("path"):
        raise SourceError(f"{key}: `path` is missing: {FORMS}")
    told: dict[str, Any] = {
        name: [v] if name in ("each", "columns") and isinstance(v, str) else v for name, v in given.items()
    }
    source = Source(**{name: v for name, v in told.items() if v is not None})
    for name in ("epochs", "share"):
        value = getattr(source, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise SourceError(f"{key}.{name}={value!r} must be a number above 0")
    try:
        source.check()
    except SourceError as error:
        raise SourceError(f"{key}.{error}") from None
    return _split(source, key)


def _dotted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{meta: {modality: column}} as {meta.modality: column}."""
    out: dict[str, Any] = {}
    for name, given in fields.items():
        inner = name in ("meta", "tolerance") and isinstance(given, Mapping)
        out |= {f"{name}.{key}": value for key, value in given.items()} if inner else {name: given}
    return out


def source_path(text: str, key: str = "path") -> Path:
    """Where a source says that something lies. Raises SourceError for what can be no file's name."""
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except FileNotFoundError:
        return path
    except (
        RuntimeError,
        ValueError,
        OSError,
    ) as error:  # no such user, a NUL, half a character, too long, a circle of links
        raise SourceError(
            f"{key}={text[:80]!r} cannot be a path: {getattr(error, 'strerror', None) or error}"
        ) from None
    return path


def _split(source: Source, key: str) -> Source:
    """`path:SPLIT` as path and split, for what is no file under its whole name."""
    whole = source_path(source.path, key)
    path, _, split = source.path.rpartition(":")
    if source.split or not path or path == "demo" or "/" in split or whole.exists():
        return source
    return replace(source, path=path, split=split)


def layout_of(source: SourceSpec) -> Layout:
    """The preset's with what the source says over it."""
    base = presets()[source.format].layout if source.format in presets() else Layout()
    wheres = [w for w in (base.where, source.where) if w]
    return Layout(
        map={**base.map, **_dotted(source.map)},
        values={**base.values, **source.values},
        where=" and ".join(wheres),
        each=source.each or base.each,
        turns=source.turns or base.turns,
    )


def usual_layout(source: SourceSpec) -> Layout:
    """The layout of a source that names no preset: the names that most sets use, but for columns that it uses itself.

    A field that has a constant is taken from the column of its own name alone.
    """
    layout, usual = layout_of(source), presets()["usual"].layout.map
    taken = {part.strip() for given in layout.map.values() if isinstance(given, str) for part in given.split("|")}
    columns = {
        name: "|".join(c for c in given.split("|") if c == name or (c not in taken and name not in layout.values))
        for name, given in usual.items()
    }
    return replace(layout, map={**{name: given for name, given in columns.items() if given}, **layout.map})


# ----------------------------------------------------------------------------------------------------------------- rows


class Mapped:
    """The rows that records become, by number: of each is kept which record it came from, and the how-manieth it was.

    label: what the ids of rows that have none begin with, "" to leave them without. check: told at the end of a reading
    how many records and rows there were.
    """

    def __init__(
        self, records: Rows, rows_of: Callable[[Any], list[Any]], label: str = "", check: Check = lambda *counts: None
    ) -> None:
        self.records, self.rows_of, self.label, self.check = records, rows_of, label, check
        self.record, self.part = array("q"), array("i")

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.record, self.part = array("q"), array("i")
        total = 0
        for number, record in self.records:
            total += 1
            for part, row in enumerate(self._rows(record)):
                self.record.append(number)
                self.part.append(part)
                yield len(self.record), self._with_id(row, len(self.record))
        self.check(total, len(self.record))

    def row(self, number: int) -> Any:
        rows = self._rows(self.records.row(self.record[number - 1]))
        return self._with_id(rows[self.part[number - 1]], number)

    def _rows(self, record: Any) -> list[Any]:
        """One record that nothing can be made of costs itself alone."""
        try:
            with refusing():
                return self.rows_of(record)
        except RowError as error:
            return [error]

    def place(self, number: int) -> str:
        part = self.part[number - 1]
        return self.records.place(self.record[number - 1]) + (f", question {part + 1}" if part else "")

    def _with_id(self, row: Any, number: int) -> Any:
        given = not self.label or isinstance(row, RowError) or "id" in row
        return row if given else {"id": f"{self.label}:{number}", **row}


def open_rows(source: Source, base_dir: str | Path | None = None, apart: bool = False) -> Rows:
    """The source's rows, the paths of their images in full.

    base_dir: where these start, by default the source's folder. apart: beside other sources: rows say in `meta.source`
    where they are from, and other people's ids get the source's name in front.
    """
    records, folders = open_records(source)
    if base_dir is not None:
        folders = [Path(base_dir)]
    elif source.image_dir:
        folders = [source_path(source.image_dir, "image_dir")]
    if not source.mapped:
        folder = folders[0] if folders else Path()
        return Mapped(records, lambda record: [_from(source, _anchored(record, folder), apart)])
    mapper = Mapper(layout_of(source), ImageFinder(folders))
    return Mapped(
        records,
        lambda record: [_from(source, row, apart) for row in mapper(record)],
        source.label,
        partial(check_mapping, source, mapper),
    )


def _from(source: Source, row: Any, apart: bool) -> Any:
    row = as_volumes(row, source.volume)
    if not apart or not isinstance(row, Mapping):
        return row
    told = {**row, "meta": {"source": source.label, **row["meta"]}} if isinstance(row.get("meta"), Mapping) else row
    if row.get("meta") is None:
        told = {**row, "meta": {"source": source.label}}
    return {**told, "id": f"{source.label}:{row['id']}"} if source.mapped and "id" in row else told


def _anchored(row: Any, folder: Path) -> Any:
    """A row of this library with the paths among its images in full."""
    images = row.get("images") if isinstance(row, Mapping) else None
    if not isinstance(images, list) or not images:
        return row
    return {**row, "images": [_path(image, folder) for image in images]}


def _path(image: Any, folder: Path) -> Any:
    if is_volume(image):
        return {key: _path(value, folder) if key in VOLUME_FILES else value for key, value in image.items()}
    if isinstance(image, Mapping) and not image.get("bytes"):
        image = image.get("path")
    if not isinstance(image, str) or not image.strip() or image.startswith(("http://", "https://", "data:")):
        return image
    return full_path(image, folder)


def check_mapping(source: SourceSpec, mapper: Mapper, records: int, rows: int) -> None:
    """Once all were read: `where` left something, and each field that the source itself maps was in some record."""
    if records and not rows:
        raise SourceError(f"{source.path}: `where: {mapper.layout.where}` keeps none of its {records} records")
    absent = [name for name in _dotted(source.map) if name not in mapper.seen]
    if rows and absent:
        raise SourceError(
            f"{source.path}: map.{absent[0]}: {_dotted(source.map)[absent[0]]!r} stands in no record; `lingshu-rl "
            "data look` shows the columns that there are"
        )


# ---------------------------------------------------------------------------------------------------------------- files


def open_records(source: SourceSpec) -> tuple[Rows, list[Path]]:
    """A source's records as the publisher has them, and the folders its images' names may start from. Raises
    SourceError."""
    try:
        if source.path.startswith("demo:"):
            return _demo(source.path)
        path = source_path(source.path)
        if path.is_dir():
            return _folder(path, source)
        if path.is_file():
            return _file(path, source), [path.parent]
        if matches := sorted(map(Path, glob.glob(str(path), recursive=True))):
            return _chain(matches, source, path.parent), [matches[0].parent]
        if _ending(path):
            raise SourceError(f"{path}: no such file")
        return _hub(source), []
    except UnreadableSource as error:
        raise SourceError(str(error)) from error


def _demo(text: str) -> tuple[Rows, list[Path]]:
    from lingshu_rl.demo.build import build_demo

    split = text.removeprefix("demo:")
    if split not in DEMO_SPLITS:
        raise SourceError(f"{text}: the demo has the splits {', '.join(DEMO_SPLITS)}")
    path = build_demo() / f"{split}.jsonl"
    return json_lines(path), [path.parent]


def _ending(path: Path) -> str:
    """The ending that says how a file is read, "" for none of them."""
    ending = (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()
    return ending if ending in DATA_ENDINGS else ""


def _file(path: Path, source: SourceSpec) -> Rows:
    ending = _ending(path)
    preset = presets().get(source.format)
    if ending in (".jsonl", ".ndjson"):
        return json_lines(path)
    if ending == ".json":
        return json_file(path, source.split)
    if ending == ".parquet":
        return parquet(path)
    if ending == ".tar":
        return TarShards(path)
    if ending in (".csv", ".tsv", ".txt"):
        columns = source.columns or (preset.columns if preset else ())
        return table(path, source.delimiter or (preset.delimiter if preset else ""), columns)
    if path.suffix in (".pkl", ".pickle"):
        raise SourceError(f"{path}: a pickle runs code when it is read; write its records as .jsonl or .parquet first")
    raise SourceError(f"{path}: a source is {FORMS}")


def _chain(files: Sequence[Path], source: SourceSpec, root: Path) -> Rows:
    """Several files in order; what no reader takes is left out."""
    parts = [
        (str(f.relative_to(root)) if f.is_relative_to(root) else f.name, _file(f, source)) for f in files if _ending(f)
    ]
    if not parts:
        raise SourceError(f"{source.path}: holds no file that can be read; a source is {FORMS}")
    return parts[0][1] if len(parts) == 1 else Chain(parts)


def _folder(path: Path, source: SourceSpec) -> tuple[Rows, list[Path]]:
    """What a folder holds: a saved data set, an image folder with its table, files of one split, or pictures by
    class."""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, source), [path]
    inner = path / source.split if source.split and (path / source.split).is_dir() else path
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        if (inner / name).is_file():
            return _file(inner / name, source), [inner]
    files = sorted(f for f in inner.rglob("*") if _ending(f) and not f.name.startswith("."))
    data = next((same for e in DATA_ENDINGS if (same := [f for f in files if _ending(f) == e])), [])
    if data:
        chosen = data if inner != path else _of_split(data, path, source)
        return _chain(chosen, source, path), list(dict.fromkeys([chosen[0].parent, path]))
    pictures = sorted(f for f in inner.rglob("*") if f.suffix.lower() in PICTURES)
    if not pictures:
        raise SourceError(f"{path}: holds no file that can be read; a source is {FORMS}")
    return RowList.of({"image": str(f.relative_to(inner)), "label": f.parent.name} for f in pictures), [inner]


def _of_split(files: Sequence[Path], root: Path, source: SourceSpec) -> list[Path]:
    """The files whose path names the split. Without one all are read, unless they are of several."""

    def names(file: Path, split: str) -> bool:
        return bool(re.search(rf"(?:^|[^a-z]){re.escape(split)}(?:[^a-z]|$)", str(file.relative_to(root)).lower()))

    if source.split:
        chosen = [f for f in files if names(f, source.split.lower())]
        if not chosen:
            raise SourceError(f"{root}: no file of split {source.split!r} among {', '.join(f.name for f in files[:5])}")
        return chosen
    found = [split for split in SPLITS if any(names(f, split) for f in files)]
    if len(found) > 1:
        raise SourceError(f"{root}: name one of its splits, {', '.join(found)}, after a colon: {root}:{found[0]}")
    return list(files)


def _saved(path: Path, source: SourceSpec) -> Rows:
    import datasets

    return _dataset(partial(datasets.load_from_disk, str(path)), source)


def _hub(source: SourceSpec) -> Rows:
    import datasets

    return _dataset(
        partial(datasets.load_dataset, source.path, source.subset or None, split=source.split or None), source
    )


def _dataset(read: Callable[[], Any], source: SourceSpec) -> Rows:
    import datasets

    told = f"{source.path}:{source.split}" if source.split else source.path
    try:
        data = read()
    except Exception as error:  # the hub's errors share no base class
        raise SourceError(f"{told}: cannot be loaded ({type(error).__name__}: {error}). A source is {FORMS}") from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            first = next(iter(data))
            raise SourceError(
                f"{told}: name one of its splits, {', '.join(data)}, after a colon: {source.path}:{first}"
            )
        data = data[source.split]
    return RowList.of_dataset(data)


# ------------------------------------------------------------------------------------------------------------- guessing


def guess_preset(records: Iterable[Mapping[str, Any]]) -> str:
    """The preset whose signs, the most of all, stand in every one of these records; "" where none is known."""
    seen = list(records)
    fitting = {
        name: len(preset.signs)
        for name, preset in presets().items()
        if seen and preset.signs and all(not is_missing(expression(s, name)(r)) for s in preset.signs for r in seen)
    }
    return max(fitting, key=lambda name: fitting[name]) if fitting else ""
