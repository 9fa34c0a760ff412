"""The steps that look at rows: quality, duplicates, length, tags, contamination. Each is its parameters and one pass.

Rows arrive from the most trusted source to the least, so "the first stays" keeps the more trusted copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

from lingshu_rl.curate.benchmarks import benchmark_rows
from lingshu_rl.curate.image_index import ImageIndex, open_database
from lingshu_rl.curate.images import SCORE, Features, ImageError
from lingshu_rl.curate.items import Context, Dropped, Item, group_of
from lingshu_rl.curate.leaks import Limits, Reference, question_parts, row_text, with_features
from lingshu_rl.curate.readers import Source, image_folder, read_rows
from lingshu_rl.curate.tags import modality_of, organ_of
from lingshu_rl.curate.texts import TextIndex, asked, stated, words
from lingshu_rl.data.rows import LETTERS
from lingshu_rl.failures import LingshuError
from lingshu_rl.text.scrub import PLACEHOLDER, scrub
from rewards.rows import read_row

Result = Item | Dropped


class StepError(LingshuError, ValueError):
    """A step that cannot run as it is set; the message names the key."""


class Step(Protocol):
    """A step's parameters are the dataclass fields of its class, its YAML name is `name`."""

    name: ClassVar[str]

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        """One result for every row, in order. `rows` can be iterated several times."""
        ...


def with_pictures(rows: Iterable[Item], context: Context) -> Iterator[tuple[Item, list[Features | ImageError]]]:
    """Rows with their pictures' features; later pictures are decoded meanwhile."""
    yield from context.store.prefetch((item, tuple(item.row.get("images") or ())) for item in rows)


@dataclass(frozen=True)
class Quality:
    """Drop rows with a picture that is unreadable, too small, too long and thin, blank or (if asked) blurred.

    min_side: pixels. max_ratio: longer to shorter side. min_contrast: standard deviation in grey levels. min_sharpness:
    variance of the Laplacian of the 256-pixel picture, 0 = any.
    """

    name: ClassVar[str] = "quality"
    min_side: int = 64
    max_ratio: float = 8.0
    min_contrast: float = 2.0
    min_sharpness: float = 0.0

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        for item, pictures in with_pictures(rows, context):
            fault = next((f for picture in pictures if (f := self.fault(picture))), None)
            yield Dropped.item(item, *fault) if fault else item

    def fault(self, picture: Features | ImageError) -> tuple[str, str] | None:
        if isinstance(picture, ImageError):
            return "unreadable_image", str(picture)
        size = f"{picture.width} x {picture.height}"
        if min(picture.width, picture.height) < self.min_side:
            return "small_image", f"{size}, a side must have {self.min_side}"
        if max(picture.width, picture.height) > self.max_ratio * min(picture.width, picture.height):
            return "long_image", f"{size}, the ratio may be {self.max_ratio:g}"
        if picture.std < self.min_contrast:
            return "blank_image", f"contrast {picture.std:.2f} grey levels, {self.min_contrast:g} wanted"
        if picture.sharpness < self.min_sharpness:
            return "blurred_image", f"sharpness {picture.sharpness:.1f}, {self.min_sharpness:g} wanted"
        return None


@dataclass(frozen=True)
class DedupImages:
    """Find pictures that are one (also resized, re-compressed, slightly turned) and drop what they repeat.

    by: "question": rows that ask the same about the same pictures; "image": every row whose pictures all came before
    (captions, one row a picture). distance: bits of 64 in which hashes may differ, 0 for exact copies only. score: see
    curate.images. Sets meta.image_group, by which split and dedup_text know the picture again.
    """

    name: ClassVar[str] = "dedup_images"
    by: str = "question"
    distance: int = 7
    score: float = SCORE

    def __post_init__(self) -> None:
        if self.by not in ("question", "image"):
            raise StepError(f"dedup_images.by={self.by!r} is neither question nor image")

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        index = ImageIndex(context.folder / "images.sqlite", self.distance, self.score)
        seen = open_database(context.folder / "seen.sqlite", scratch=True)
        seen.execute("CREATE TABLE seen (key TEXT PRIMARY KEY, id TEXT, answer TEXT) WITHOUT ROWID")
        for item, pictures in with_pictures(rows, context):
            groups, old, how = [], [], []
            fault = next((p for p in pictures if isinstance(p, ImageError)), None)
            if fault:
                yield Dropped.item(item, "unreadable_image", str(fault))
                continue
            for picture in pictures:
                assert isinstance(picture, Features)
                match = index.find(picture)
                if match is None:
                    index.add(picture, picture.sha[:16])
                elif match.how == "near":
                    context.count("near_duplicate_pictures_seen")
                    how.append(f"{match.distance} bits, score {match.score:.3f}")
                groups.append(match.owner if match else picture.sha[:16])
                old.append(match is not None)
            name = str(item.row["id"])
            group = "+".join(groups)
            if self.by == "image":
                for one in groups:
                    seen.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, '')", (one, name))
                if groups and all(old):
                    (first,) = seen.execute("SELECT id FROM seen WHERE key = ?", (groups[0],)).fetchone()
                    yield Dropped.item(item, "duplicate_image", f"first in {first}; {', '.join(how) or 'exact copy'}")
                    continue
            else:
                text, options = question_parts(item.row)
                asks = "|".join(" ".join(words(part)) for part in (text, *sorted(options)))
                key, answer = f"{group}|{asks}", " ".join(words(answer_text(item.row)))
                if item.row["kind"] == "report":
                    key += f"|{answer}"  # several reports of one picture are no conflict
                row = seen.execute("SELECT id, answer FROM seen WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    reason = "duplicate_question" if row[1] == answer else "conflicting_answer"
                    yield Dropped.item(item, reason, f"first in {row[0]}{'; ' + ', '.join(how) if how else ''}")
                    continue
                seen.execute("INSERT INTO seen VALUES (?, ?, ?)", (key, name, answer))
            yield item.with_meta(image_group=group) if groups else item
        index.close()
        seen.close()


@dataclass(frozen=True)
class DedupText:
    """Drop rows whose text an earlier row has nearly word for word.

    threshold: Jaccard index of words and word pairs. guard: what is asked, and the answer, must be the same too: "Is
    there a mass?" is no duplicate of "Is there a nodule?"; a report must state the same findings. across_images: also
    compare rows about different pictures (captions); otherwise a question that is asked of many pictures is no
    duplicate. Closed questions with different answers are never duplicates.
    """

    name: ClassVar[str] = "dedup_text"
    threshold: float = 0.6
    guard: bool = True
    across_images: bool = False

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        # Only texts of one group are compared, and what a row means is part of its group: the index need not guard.
        index = TextIndex(context.folder / "texts.sqlite", self.threshold, guard=False)
        for item in rows:
            text = row_text(item.row)
            group = "|".join(["" if self.across_images else group_of(item), *self._meaning(item.row)])
            match = index.find_or_add(text, str(item.row["id"]), group) if words(text) else None
            yield (
                Dropped.item(item, "near_duplicate_text", f"{match.owner}, Jaccard {match.score:.2f}")
                if match
                else item
            )
        index.close()

    def _meaning(self, row: Mapping[str, Any]) -> Iterator[str]:
        """What two rows must have in common, however alike their texts are."""
        if row["kind"] in ("option", "yesno", "numeric"):
            yield answer_text(row)
        if self.guard and row["kind"] == "report":
            yield stated(str(row["answer"]))
        elif self.guard:
            yield asked(*question_parts(row))
            yield asked(str(row["answer"])) if row["kind"] == "open" else ""


def answer_text(row: Mapping[str, Any]) -> str:
    """The answer in words: of a choice, the text of the right option, which keeps its meaning when options move."""
    if row["kind"] != "option":
        return str(row["answer"])
    read = read_row(row)
    return "|".join(sorted(read.options[LETTERS.index(letter)] for letter in str(read.gold)))


@dataclass(frozen=True)
class CaptionLength:
    """Keep answers of the given kinds with min to max tokens.

    tokenizer: "words" (words and punctuation marks) or a folder or hub id that transformers knows.
    """

    name: ClassVar[str] = "caption_length"
    min: int = 10
    max: int = 1024
    kinds: tuple[str, ...] = ("report",)
    tokenizer: str = "words"

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        for item in rows:
            if item.row["kind"] not in self.kinds:
                yield item
                continue
            n = token_count(str(item.row["answer"]), self.tokenizer)
            if n < self.min:
                yield Dropped.item(item, "short_text", f"{n} tokens, {self.min} wanted")
            elif n > self.max:
                yield Dropped.item(item, "long_text", f"{n} tokens, {self.max} allowed")
            else:
                yield item


def token_count(text: str, tokenizer: str) -> int:
    if tokenizer == "words":
        return len(re.findall(r"\w+|[^\w\s]", text))
    return len(_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"])


@cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise StepError(f"caption_length.tokenizer={name!r} cannot be loaded: {error}") from error


@dataclass(frozen=True)
class Deidentify:
    """Replace dates, record numbers, telephone numbers, addresses and titled names in question, conversation and
    answer.

    Rows of kind numeric stay as they are: their dates and numbers are what is computed with. So do the options of a
    choice, and an answer that is one of them. A row whose answer is nothing but an identifier is dropped.
    """

    name: ClassVar[str] = "deidentify"

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        for item in rows:
            changed = {key: new for key, new in self._clean(item.row) if new != item.row[key]}
            if "answer" in changed and not words(PLACEHOLDER.sub("", changed["answer"])):
                yield Dropped.item(item, "identifying_answer", changed["answer"])
                continue
            if changed:
                context.count("rows_changed")
                item = item.with_row(**changed)
            yield item

    def _clean(self, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        if row["kind"] == "numeric":
            return
        if isinstance(row.get("question"), str):
            yield "question", scrub(row["question"])
        if row.get("messages"):
            yield "messages", [{**turn, "content": _clean_content(turn["content"])} for turn in row["messages"]]
        if isinstance(row["answer"], str) and row["kind"] != "option":
            yield "answer", scrub(row["answer"])


def _clean_content(content: Any) -> Any:
    """What a turn says: a text, or parts of which some are texts."""
    if isinstance(content, str):
        return scrub(content)
    return [{**part, "text": scrub(part["text"])} if "text" in part else part for part in content]


@dataclass(frozen=True)
class Tag:
    """Set meta.modality and meta.organ from rules over question, answer and the words already in meta.

    What is there already is brought to one spelling ("x ray" -> "X-ray"), never overruled. require: drop rows that stay
    without one of these ("modality", "organ").
    """

    name: ClassVar[str] = "tag"
    require: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.require) - {"modality", "organ"}:
            raise StepError(f"tag.require names {', '.join(sorted(unknown))}; it may name modality and organ")

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        for item in rows:
            tags = {}
            for name, rule in (("modality", modality_of), ("organ", organ_of)):
                told = str(item.meta.get(name) or "")
                found = rule(told) or told or rule(_telling_text(item))
                if found and found != told:
                    tags[name] = found
                    context.count(f"{name}_{'respelt' if told else 'found'}")
            item = item.with_meta(**tags) if tags else item
            missing = [name for name in self.require if not item.meta.get(name)]
            yield Dropped.item(item, "untagged", f"no {' and no '.join(missing)}") if missing else item


def _telling_text(item: Item) -> str:
    """Options say what the picture may be, not what it is; a yes/no question names things that may be absent."""
    row = item.row
    if row["kind"] == "report" or row["kind"] == "open":
        return f"{row['question']} {row['answer']}"
    return str(row["question"]) if str(row["answer"]).strip().lower() != "no" else ""


@dataclass(frozen=True)
class Decontaminate:
    """Drop rows that share a picture or patient with a benchmark, or a text where one of both has no picture.

    against: sources as under `sources`. benchmarks: names of the evaluation kit ("vqa_rad,slake" or "all"), read from
    `data`. The other limits are those of dedup_images and dedup_text.
    """

    name: ClassVar[str] = "decontaminate"
    against: tuple[Source, ...] = ()
    benchmarks: str = ""
    data: str = ""
    distance: int = 7
    score: float = SCORE
    threshold: float = 0.6
    guard: bool = True

    def __post_init__(self) -> None:
        if not self.against and not self.benchmarks:
            raise StepError("decontaminate: name `against` (sources) or `benchmarks` (of the evaluation kit)")

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Result]:
        limits = Limits(self.distance, self.score, self.threshold, self.guard)
        reference = Reference(context.folder, context.store, limits)
        removed: dict[str, dict[str, int]] = {}
        missing: dict[str, str] = {}
        for name, records in self._benchmarks(context):
            if isinstance(records, str):
                missing[name] = records
                context.progress.say(f"{self.name}: {name} is not compared with: {records}")
                continue
            counts = removed.setdefault(name, {"rows": 0})
            for row, found in with_features(records, context.store):
                reference.add({**row, "id": f"{name}/{row['id']}"}, found)
                counts["rows"] += 1
        for item in rows:
            images = item.row.get("images") or ()
            found = [(image, context.store.get(image)) for image in images]
            hit = next((h for h in reference.hits(item.row, found) if h.certain), None)
            if hit is None:
                yield item
                continue
            told = removed[hit.other.split("/", 1)[0]]
            told[hit.kind] = told.get(hit.kind, 0) + 1
            yield Dropped.item(item, f"benchmark_{hit.kind}", f"{hit.other}: {hit.detail or hit.what[:200]}")
        context.notes["benchmarks"] = removed
        if missing:
            context.notes["not_compared_with"] = missing
        reference.close()

    def _benchmarks(self, context: Context) -> Iterator[tuple[str, Iterable[dict[str, Any]] | str]]:
        """(name, rows), or why there are none."""
        keep = image_folder(context.cache / "benchmark_images")

        def rows(source: Source) -> Iterator[dict[str, Any]]:
            for record in read_rows(source, keep, strict=False, looked=context.looked):
                if record.reason:
                    context.count(f"faulty_rows_of_{source.label}")
                if record.row is not None:
                    yield record.row

        for source in self.against:
            yield source.label, rows(source)
        if self.benchmarks:
            yield from benchmark_rows(self.benchmarks, self.data)
