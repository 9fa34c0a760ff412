"""From a benchmark's files (or the Hub) to prompts: find, read, draw the sample, check the images.

Every raw row ends as a prompt or in `excluded` with its reason; none is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lingshu_rl.data.columns import expression, is_missing
from lingshu_rl.data.mapping import ImageFinder, Mapper
from lingshu_rl.data.rows import RowError, row_to_prompt
from lingshu_rl.data.sources import Source, SourceError, layout_of, open_records, presets
from lingshu_rl.data.tables import UnreadableSource
from lingshu_rl.eval.archives import unpacked_zip
from lingshu_rl.eval.benchmarks import Benchmark, EvalError, instruction_named
from lingshu_rl.types import Prompt

Row = dict[str, Any]
SHOWN = 10
MAX_EXCLUDED = 0.05  # share of rows that may be unusable before the data itself must be wrong
HELD_OUT_FIFTHS = 5
LOST_IMAGES = "put the images into an `images` folder beside the questions, or ask without any: --no-images"


class Skip(RowError):
    """A row without an answer, as publishers keep some back; not counted as a fault of the data."""


@dataclass(frozen=True)
class Loaded:
    """prompts: the chosen questions in file order. excluded: (place, reason). total: rows of this benchmark's split."""

    prompts: tuple[Prompt, ...]
    excluded: tuple[tuple[str, str], ...]
    total: int
    source: str
    data_hash: str


def load_benchmark(
    benchmark: Benchmark, data: str | Path | None, *, limit: int = 0, prompt: str = "auto", images: bool = True
) -> Loaded:
    """The benchmark's questions. limit: that many, drawn by the hash of their ids (the same for every model and run).

    prompt: a name for `benchmarks.instruction_named`, "auto" for the entry's own. images: False asks without any.
    Raises EvalError when the files are missing, or over 5 % of the rows (images of them included) cannot be used.
    """
    files = _find(benchmark, data, images)
    wanted = prompt if prompt != "auto" else benchmark.prompt
    kept: dict[str, tuple[str, Prompt]] = {}
    excluded: list[tuple[str, str]] = []
    skipped = total = 0
    for place, row in _rows(benchmark, files):
        total += 1
        try:
            made = _prompt(benchmark, row, wanted, images)
            if made.id in kept:
                raise RowError("its id stands on an earlier row too")
            if lost := next((i.file for i in made.images if i.file and not Path(i.file).exists()), ""):
                raise RowError(f"image file not found: {lost}")
        except RowError as error:
            excluded.append((f"{place} (id {row['id']})" if isinstance(row, dict) else place, str(error)))
            skipped += isinstance(error, Skip)
            continue
        kept[made.id] = place, made
    if not total:
        raise EvalError(f"{benchmark.name}: {files.told} holds no row of this benchmark")
    chosen = sorted(kept, key=_digest)[: limit or None]
    for name in chosen if images else ():
        if fault := next((fault for picture in kept[name][1].images if (fault := picture.fault())), None):
            excluded.append((f"{kept.pop(name)[0]} (id {name})", fault))
    _judge(benchmark, files.told, total, excluded, len(excluded) - skipped)
    drawn = set(chosen)
    prompts = tuple(made for name, (_, made) in kept.items() if name in drawn)
    return Loaded(prompts, tuple(excluded), total, files.told, _data_hash(prompts))


def _judge(benchmark: Benchmark, told: str, total: int, excluded: Sequence[tuple[str, str]], faults: int) -> None:
    if faults <= max(MAX_EXCLUDED * total, 1) and len(excluded) < total:
        return
    lines = "\n".join(f"  {place}: {reason}" for place, reason in excluded[:SHOWN])
    lost = all(reason.startswith("image file not found") for _, reason in excluded)
    do = LOST_IMAGES if lost else "is it the file that `lingshu-rl eval --list` describes?"
    raise EvalError(f"{benchmark.name}: {len(excluded)} of {total} rows of {told} cannot be used; {do}\n{lines}")


def _prompt(benchmark: Benchmark, row: Row | RowError, wanted: str, images: bool) -> Prompt:
    if isinstance(row, RowError):
        raise row
    answer = row.get("answer")
    if is_missing(answer) or answer == (benchmark.unanswered or None):
        raise Skip("its answer is not published")
    if not images:
        row = {**row, "images": []}
    meta = row.get("meta", {})
    if row["kind"] == "rubric":
        return _rubric(row)
    if row["kind"] not in benchmark.kinds and not (row["kind"] == "yesno" and "open" in benchmark.kinds):
        raise RowError(f"it reads as a question of kind {row['kind']}, which this benchmark has none of")
    line = "direct_zh" if wanted == "direct" and meta.get("language") == "zh" else wanted
    return row_to_prompt(row, instruction=instruction_named(line, row["kind"], meta))


def _rubric(row: Row) -> Prompt:
    """A conversation whose reply a judge scores; no reward reads it."""
    rubrics = [{"criterion": str(r["criterion"]), "points": float(r["points"])} for r in row["answer"]]
    if not any(float(r["points"]) > 0 for r in row["answer"]):
        raise RowError("no criterion of its rubric gives points")
    turns = row.get("messages") or [{"role": "user", "content": [{"type": "text", "text": row["question"]}]}]
    messages = tuple({"role": t["role"], "content": "\n".join(part["text"] for part in t["content"])} for t in turns)
    return Prompt(str(row["id"]), messages, (), rubrics, (), "rubric", row.get("meta", {}))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def is_held_out(name: str) -> bool:
    """Whether an image's file or a study is held out: a fifth, by the hash of its name, so that no list is kept."""
    return int.from_bytes(_digest(Path(name).stem), "big") % HELD_OUT_FIFTHS == 0


def _data_hash(prompts: Sequence[Prompt]) -> str:
    """Over ids, wording, options, labels and image bytes of the chosen questions."""
    digest = hashlib.sha256()
    for p in prompts:
        told = [p.id, p.messages, p.options, p.gold, p.kind, dict(p.meta)]
        digest.update(json.dumps(told, default=str, ensure_ascii=False, sort_keys=True).encode())
        for picture in p.images:
            # A slice is no file of its own: which one it is counts, and its volume is not read for it.
            is_file = isinstance(picture.source, str) and picture.source == picture.file
            digest.update(Path(picture.file).read_bytes() if is_file else repr(picture.content).encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Files:
    """files: by the name that begins the ids of their rows, or "". joined: they belong together by `second`.

    folders: where names of images may start. told: what is read, for people.
    """

    files: Sequence[tuple[str, Path]]
    preset: str
    joined: bool
    folders: Sequence[Path]
    told: str


def where_from(benchmark: Benchmark, data: str | Path | None) -> str:
    """What a benchmark's rows would be read from; nothing is fetched. Raises EvalError where there is nothing."""
    if data is None and benchmark.hub:
        return f"{benchmark.hub} (Hugging Face Hub)"
    return _find(benchmark, data, images=False).told


def _find(benchmark: Benchmark, data: str | Path | None, images: bool) -> Files:
    if data is None:
        root = fetched(benchmark, images)
        found = _matched(benchmark, root, images)
        if found is None:
            raise EvalError(
                f"{benchmark.name}: {benchmark.hub} holds none of {', '.join(benchmark.files)}; {_by_hand(benchmark)}"
            )
        return found.of(f"{benchmark.hub} (Hugging Face Hub)")
    root = Path(data).expanduser()
    if not root.is_dir():
        raise EvalError(f"--data {root}: no such folder")
    names = dict.fromkeys(name for name in (benchmark.name, benchmark.folder) if name)
    names |= dict.fromkeys(p.name for p in root.iterdir() if _plain(p.name) in {_plain(n) for n in names})
    own = [root / name for name in names if (root / name).is_dir()]
    for folder in [*own, root]:
        # A file of the wrong benchmark in a shared folder: its columns say so.
        if found := _matched(benchmark, folder, images, only_fitting=folder == root):
            return found.of(f"{found.shown(root)} in {root}")
    looked = "; ".join(f"{f}/{{{','.join(benchmark.files)}}}" for f in [*own, root])
    raise EvalError(
        f"{benchmark.name}: no data found. Looked for {looked}. Put the publisher's files into {root / benchmark.name}"
        + (f", or leave --data out to read {benchmark.hub} from the Hub" if benchmark.hub else "")
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class _Matched:
    files: Sequence[Path]
    named: bool  # their names stand in the ids of their rows
    preset: str
    joined: bool
    folders: Sequence[Path]

    def shown(self, root: Path) -> str:
        names = [str(f.relative_to(root)) if f.is_relative_to(root) else f.name for f in self.files[:3]]
        return ", ".join(names) + (" ..." if len(self.files) > 3 else "")

    def of(self, told: str) -> Files:
        stems = [file.stem for file in self.files]
        names = [f.stem if stems.count(f.stem) == 1 else f"{f.parent.name}/{f.stem}" for f in self.files]
        named = [(name if self.named else "", file) for name, file in zip(names, self.files, strict=True)]
        return Files(named, self.preset, self.joined, self.folders, told)


def _matched(benchmark: Benchmark, folder: Path, images: bool, only_fitting: bool = False) -> _Matched | None:
    """The files in a folder, or in archives there, which are unpacked for images or where the questions are in them."""
    found = _in_folder(benchmark, [folder], only_fitting)
    if found is not None and not images:
        return found
    return _in_folder(benchmark, [folder, *_unpacked(benchmark, folder)], only_fitting)


def _in_folder(benchmark: Benchmark, folders: Sequence[Path], only_fitting: bool = False) -> _Matched | None:
    """The files of the first pattern that finds some in any of these folders."""
    for pattern, formats in benchmark.files.items():
        for folder in folders:
            groups = [
                [f for one in _filled(part, benchmark) for f in sorted(folder.glob(one))] for part in pattern.split("+")
            ]
            if not all(groups):
                continue
            joined, several = len(groups) > 1, "{part}" in pattern or benchmark.all_files
            files = [file for group in groups for file in group]
            if not joined and not several:
                files = [f for f in files if f.suffix == ".parquet"] or files[:1]  # shards belong together
            preset = _fitting(files[0], formats)
            if preset or not only_fitting:
                named = several or (joined and benchmark.second == "rows")
                images = dict.fromkeys([*folders, files[0].parent])
                return _Matched(files, named, preset or formats.split("|")[0], joined, list(images))
    return None


def _filled(pattern: str, benchmark: Benchmark) -> list[str]:
    return [pattern.replace("{part}", part) for part in benchmark.parts] if "{part}" in pattern else [pattern]


def _fitting(file: Path, formats: str) -> str:
    """The preset, of "a|b", whose signs the file's first record has; "" for none. Raises EvalError."""
    first = next((record for _, record in _records(file) if isinstance(record, Mapping)), {})
    signs = {name: presets()[name].signs for name in formats.split("|")}
    return next(
        (name for name, own in signs.items() if all(not is_missing(expression(s, name)(first)) for s in own)), ""
    )


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file, of a JSON file by splits those of "test"."""
    try:
        records, _ = open_records(Source(str(file), split="test"))
        for number, record in records:
            yield records.place(number), record
    except (SourceError, UnreadableSource) as error:
        raise EvalError(f"{file} cannot be read: {error}") from error


def _rows(benchmark: Benchmark, files: Files) -> Iterator[tuple[str, Row | RowError]]:
    """Rows with an id each, and where they stand."""
    mapper = Mapper(layout_of(benchmark.source("", files.preset)), ImageFinder(files.folders))
    count = 0
    for name, place, record in _joined(benchmark, files):
        for row in mapper(record):
            count += 1
            where = f"{name}, {place}" if name else place
            if isinstance(row, dict):
                own = row.get("id") or (place.rpartition(" ")[2] if name else f"{count:06d}")
                row["id"] = f"{name}/{own}" if name else str(own)
            yield where, row


def _joined(benchmark: Benchmark, files: Files) -> Iterable[tuple[str, str, Any]]:
    records = [
        (name, place, {"subject": file.stem, **record} if name and isinstance(record, Mapping) else record)
        for name, file in (files.files[:1] if files.joined and benchmark.second != "rows" else files.files)
        for place, record in _records(file)
    ]
    if not files.joined:
        return records
    column = benchmark.held_out
    kept = [r for r in records if not column or (isinstance(r[2], Mapping) and is_held_out(str(r[2].get(column))))]
    return SECONDS[benchmark.second](kept, files.files[-1][1])


def _with_answers(records: Sequence[tuple[str, str, Any]], file: Path) -> Iterator[tuple[str, str, Any]]:
    """Those questions whose id has an answer in a file beside them: the others are no test questions."""
    answers: dict[str, Any] = {}
    for _, record in _records(file):
        answers |= {str(record["id"]): record["answer"]} if {"id", "answer"} <= record.keys() else record
    for name, place, record in records:
        if isinstance(record, Mapping) and str(record.get("id")) in answers:
            yield name, place, {**record, "answer": answers[str(record["id"])]}


def _with_views(records: Sequence[tuple[str, str, Any]], file: Path) -> Iterator[tuple[str, str, Any]]:
    """Open-i's studies with the images that a second table names."""
    views: dict[str, list[str]] = {}
    for _, view in _records(file):
        views.setdefault(view["uid"], []).append(view["filename"])
    for name, place, record in records:
        yield name, place, {**record, "image": views.get(record["uid"], [])}


SECONDS: Mapping[str, Callable[..., Iterable[tuple[str, str, Any]]]] = {
    "rows": lambda records, file: records,
    "answers": _with_answers,
    "views": _with_views,
}


# ----------------------------------------------------------------------------------------------------------------- Hub


def fetched(benchmark: Benchmark, images: bool) -> Path:
    """A folder with what the Hub has of a benchmark: its split's files alone, and the archives of its pictures.

    Without a connection, what was fetched before. Raises EvalError with where to put the files by hand.
    """
    from huggingface_hub import HfApi, snapshot_download

    if not benchmark.hub:
        raise EvalError(f"{benchmark.name} is not on the Hub as one data set: {_by_hand(benchmark)}")
    common: dict[str, Any] = {"repo_id": benchmark.hub, "repo_type": "dataset"}
    try:
        names: list[str] | None = HfApi().list_repo_files(**common)
    except Exception as error:  # the Hub's errors share no base class
        names, problem = None, error
    try:
        if names is None:
            # No pattern: all of the data set is never there, and the parts that are will be looked for.
            return Path(snapshot_download(**common, local_files_only=True, allow_patterns=[]))
        return Path(snapshot_download(**common, allow_patterns=_needed(benchmark, names, images)))
    except Exception as error:
        cause = error if names is not None else problem
        raise EvalError(
            f"{benchmark.name}: {benchmark.hub} cannot be fetched ({type(cause).__name__}: {cause}); "
            f"{_by_hand(benchmark)}"
        ) from error


def _needed(benchmark: Benchmark, names: Sequence[str], images: bool) -> list[str]:
    """Of a data set's files those of the first pattern that finds some, and the archives."""
    packed = [name for name in names for pattern in benchmark.archives if _matches(name, pattern)]
    for pattern in benchmark.files:
        parts = [
            [n for one in _filled(part, benchmark) for n in names if _matches(n, one)] for part in pattern.split("+")
        ]
        if all(parts):
            return [name for part in parts for name in part] + (packed if images else [])
    return packed


def _matches(name: str, pattern: str) -> bool:
    """As a glob: a star stays within its folder."""
    own, wanted = name.split("/"), pattern.split("/")
    return len(own) == len(wanted) and all(map(fnmatch, own, wanted))


def _unpacked(benchmark: Benchmark, folder: Path) -> list[Path]:
    return [
        unpacked_zip(file, benchmark.name) for pattern in benchmark.archives for file in sorted(folder.glob(pattern))
    ]


def _by_hand(benchmark: Benchmark) -> str:
    packed = f" and {', '.join(benchmark.archives)}" if benchmark.archives else ""
    folder = benchmark.folder or benchmark.name
    return f"put its {next(iter(benchmark.files))}{packed} into DIR/{folder} and give --data DIR"
