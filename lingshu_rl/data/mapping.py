"""Records of other people's layouts as data rows: one language for every file that holds questions.

A layout says which column (or path into one) holds which field of a row (`columns`); what a value then means is read by
its form, the same for every layout: `labels` for options and answers, `chats` for conversations and images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.data.chats import asked_of, images_of, placed
from lingshu_rl.data.columns import MappingError, Record, as_text, at_path, condition, expression, is_missing
from lingshu_rl.data.labels import labelled
from lingshu_rl.data.rows import FIELDS, RowError
from lingshu_rl.imaging.files import full_path
from lingshu_rl.imaging.volumes import FILES as VOLUME_FILES
from lingshu_rl.imaging.volumes import is_volume
from rewards.imports import hint
from rewards.rows import plain

GROUPS = ("meta.", "tolerance.")  # fields of the row's mappings, one by one
TURNS = ("each", "last")
IMAGE_FOLDERS = ("", "images", "imgs", "Images", "img", "figures", "images/images_normalized", "files")
IMAGE_ENDINGS = ("", ".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class Layout:
    """How records become rows.

    map: a row's field ("question", "meta.modality") -> what holds it, see `expression`. A field that it does not name
    is taken from the column of that name. values: field -> constant, where the record has nothing. where: see
    `condition`.
    each: paths of lists, a row for each of their items (several lists go side by side). turns: of a conversation, a row
    for `each` answer in it or for the `last`.
    """

    map: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    each: Sequence[str] = ()
    turns: str = "each"

    def __post_init__(self) -> None:
        for key, names in (("map", self.map), ("values", self.values)):
            for name in names:
                if name not in FIELDS and not str(name).startswith(GROUPS):
                    raise MappingError(
                        f"{key}: {name!r} is no field of a row{hint(str(name), FIELDS)}; fields are "
                        f"{', '.join(FIELDS)} and meta.NAME"
                    )
        if self.turns not in TURNS:
            raise MappingError(f"turns: {self.turns!r} is not one of {', '.join(TURNS)}")


class Mapper:
    """Makes rows of records.

    find_image: the path that an image's name means. strict: a label must make sense; else the row goes without being
    read further. seen: fields that some record had.
    """

    def __init__(self, layout: Layout, find_image: Callable[[str], str] = str, strict: bool = True) -> None:
        self.layout, self.find_image, self.strict = layout, find_image, strict
        asked = {"question", "messages"} & layout.map.keys()  # a row has one of them
        own = [name for name in FIELDS if not asked or name not in ("question", "messages")]
        fields = {name: name for name in own} | dict(layout.map)
        self.fields = {name: expression(given, f"map.{name}") for name, given in fields.items()}
        self.meant = condition(layout.where)
        answer = layout.map.get("answer")
        self.base = answer.get("base") if isinstance(answer, Mapping) else None
        if self.base not in (None, 0, 1) or isinstance(self.base, bool):
            raise MappingError(f"map.answer.base: {self.base!r} is not where an index may start: 0 or 1")
        self.seen: set[str] = set()

    def __call__(self, record: Any) -> list[Any]:
        """The rows of a record, or RowErrors in their place; none where `where` leaves it out."""
        if isinstance(record, RowError):
            return [record]
        try:
            parts = list(self._parts(record)) if self.meant(record) else []
        except RowError as error:
            return [error]
        rows = [row for part in parts for row in self._rows(part)]
        known: Counter[str] = Counter()
        for row in rows:
            if isinstance(row, dict) and "id" in row:  # the record's id is that of its first row
                known[row["id"]] += 1
                row["id"] += f"/{known[row['id']]}" if known[row["id"]] > 1 else ""
        return rows

    def _parts(self, record: Record) -> Iterator[Record]:
        if not self.layout.each:
            yield record
            return
        lists = {path: at_path(record, path) for path in self.layout.each}
        for path, items in lists.items():
            if not isinstance(plain(items), list):
                raise RowError(f"each: {path!r} is no list in this record")
        if len({len(items) for items in lists.values()}) > 1:
            raise RowError(f"each: {', '.join(lists)} are lists of unequal length")
        for items in zip(*map(plain, lists.values()), strict=True):
            yield {**record, **dict(zip(lists, items, strict=True))}

    def _rows(self, record: Record) -> list[dict[str, Any] | RowError]:
        """One row, or one for each answer of a conversation, of which some may be faulty."""
        try:
            row = self._fields(record)
            conversation = row.pop("messages", None)
            asked = [row]
            if conversation is not None:
                asked = [row | one for one in asked_of(conversation, row["images"], self.layout.turns, "answer" in row)]
        except RowError as error:
            return [error]
        return [self._row(one) for one in asked]

    def _fields(self, record: Record) -> dict[str, Any]:
        found = {}
        for name, get in self.fields.items():
            value = get(record)
            if not is_missing(value) and (name not in ("meta", "tolerance") or isinstance(value, Mapping)):
                found[name] = value
                self.seen.add(name)
        row = {**self.layout.values, **found}
        return {**row, "images": images_of(row.get("images"))}

    def _row(self, row: dict[str, Any]) -> dict[str, Any] | RowError:
        images = row["images"]
        if "question" in row:
            row |= placed(as_text(row.pop("question")), len(images))
        row |= groups_of(row)
        try:
            row = labelled(dict(row), self.base)
        except RowError as error:
            if self.strict:
                return error
        if "id" in row:
            row["id"] = str(row["id"])
        row["images"] = [self._found(image) for image in images]
        return row

    def _found(self, image: Any) -> Any:
        if is_volume(image):
            return {key: self._found(value) if key in VOLUME_FILES else value for key, value in image.items()}
        return self.find_image(image) if isinstance(image, str) else image


def groups_of(row: dict[str, Any]) -> dict[str, Any]:
    """Takes "meta.NAME" and "tolerance.NAME" out of the row: the row's mappings with them."""
    made: dict[str, dict[str, Any]] = {}
    for name in [n for n in row if n.startswith(GROUPS)]:
        group, _, key = name.partition(".")
        value = row.pop(name)
        held = made.setdefault(group, dict(row.get(group) or {}))
        if group == "tolerance":
            value = _limit(value)
        if value is not None:
            held.setdefault(key, value)
    limits = made.get("tolerance", {})
    if {"lower", "upper"} <= limits.keys():  # of negative values some sets write the nearer to 0 first
        limits["lower"], limits["upper"] = sorted((limits["lower"], limits["upper"]))
    return {group: held for group, held in made.items() if held or group != "tolerance"}


def _limit(value: Any) -> Any:
    """A limit as a number; None for a text that is none, which tables have beside labels that are dates or spans."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None


class ImageFinder:
    """The file that an image's name means: in the folders given, in their usual image folders, with the usual endings.

    A name that is nowhere is taken as standing in the first folder.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.places = [
            (folder / inner, ending) for folder in folders for inner in IMAGE_FOLDERS for ending in IMAGE_ENDINGS
        ]
        self.first = folders[0] if folders else Path()

    def __call__(self, name: str) -> str:
        if name.startswith(("http://", "https://", "/")):
            return name
        path = full_path(name, self.first)
        found = (folder / f"{name}{ending}" for folder, ending in self.places)
        try:
            return next((str(file.resolve()) for file in found if file.is_file()), path)
        except OSError:  # a name that is too long for a file's
            return path
