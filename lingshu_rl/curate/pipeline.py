"""The curation pipeline: a YAML file of sources and steps, run as one pass over files a step.

Every step reads the file that the step before it wrote and writes its own, first aside and renamed when whole. A step
whose parameters, code and input (pictures too) are those of a finished one is not run again, so a killed run goes on at
the step it was in, and gives the same files. Memory holds one row, the picture in work and bounded caches, whatever the
number of rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lingshu_rl.curate.burned import BurnedText
from lingshu_rl.curate.difficulty import Difficulty
from lingshu_rl.curate.funnel import draw_funnel, funnel_table, report_text
from lingshu_rl.curate.image_index import FeatureStore, open_database
from lingshu_rl.curate.items import REASONS, SPLIT_KEY, SPLITS, Context, Dropped, Item, Stage
from lingshu_rl.curate.readers import Source, image_folder, read_rows
from lingshu_rl.curate.rewrite import Rewrite
from lingshu_rl.curate.shares import Balance, ShuffleOptions, Split
from lingshu_rl.curate.steps import (
    CaptionLength,
    Decontaminate,
    DedupImages,
    DedupText,
    Deidentify,
    Quality,
    Step,
    StepError,
    Tag,
)
from lingshu_rl.curate.watch import Watch, digest
from lingshu_rl.data.rows import row_to_prompt
from lingshu_rl.exits import exit_code
from lingshu_rl.failures import ConfigError
from lingshu_rl.imaging.pixels import pseudonym
from lingshu_rl.progress import Progress
from lingshu_rl.settings import read_yaml
from lingshu_rl.storage.folders import own
from lingshu_rl.storage.runfolder import write_text
from rewards.chat import EndpointError
from rewards.imports import hint

VERSION = 2  # of the steps' behaviour: a change makes older stage files stale
SAY_EVERY = 50_000  # rows between two lines of a step in a log

STEPS: Mapping[str, type] = {
    step.name: step
    for step in (
        Quality,
        BurnedText,
        DedupImages,
        CaptionLength,
        DedupText,
        Deidentify,
        Tag,
        Rewrite,
        Decontaminate,
        Balance,
        ShuffleOptions,
        Difficulty,
        Split,
    )
}


@dataclass(frozen=True)
class Pipeline:
    """out: folder of everything that is written. copy_images: also copy pictures that lie elsewhere into it."""

    out: str
    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    seed: int = 0
    copy_images: bool = False


# --- the file ---------------------------------------------------------------------------------------------------------


def load_pipeline(path: str | Path, out: str | None = None) -> Pipeline:
    """Paths in the file start where the command runs. Raises ConfigError naming the key."""
    told: Any = OmegaConf.to_container(read_yaml(path, "pipeline file", resolved=True))
    found = told | ({"out": out} if out else {})
    try:
        return parse_pipeline(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_pipeline(found: Mapping[str, Any]) -> Pipeline:
    steps = []
    for number, entry in enumerate(found.get("steps") or [], start=1):
        where = f"steps, number {number}"
        name, settings = (entry, {}) if isinstance(entry, str) else _only_pair(entry, where)
        if name not in STEPS:
            raise ConfigError(f"{where}: unknown step {name!r}{hint(name, STEPS)}; there are {', '.join(STEPS)}")
        steps.append(_build(STEPS[name], settings or {}, f"{where} ({name})"))
    sources = found.get("sources") or []
    if not isinstance(sources, list) or not sources:
        told = "it is a list, one source an entry beginning with -" if sources else _unknown(found)
        raise ConfigError(f"`sources` must list at least one source; {told}")
    read = tuple(_build(Source, source, f"sources, number {i}") for i, source in enumerate(sources, start=1))
    labels = [source.label for source in read]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"two sources are called {twice!r}; give each its own `name`")
    rest = {key: value for key, value in found.items() if key not in ("sources", "steps")}
    if not rest.get("out"):
        raise ConfigError("`out` is missing: the folder to write")
    return _build(Pipeline, {**rest, "sources": read, "steps": tuple(steps)}, "the pipeline")


def _unknown(found: Mapping[str, Any]) -> str:
    """What stands in the file in place of its sources."""
    keys = [field.name for field in dataclasses.fields(Pipeline)]
    other = [f"unknown key {key!r}{hint(key, keys)}" for key in found if key not in keys]
    return ", ".join(other) or f"the file has {', '.join(map(str, found)) or 'nothing in it'}"


def _only_pair(entry: Any, where: str) -> tuple[str, Any]:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"{where}: a step is a name, or a name with its settings, got {entry!r}")
    ((name, settings),) = entry.items()
    return str(name), settings


def _build(kind: Any, values: Any, where: str) -> Any:
    """A dataclass of a mapping, with types checked and unknown keys refused."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: settings are keys and values, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{hint(key, fields)}; there are {', '.join(fields)}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} is missing")
    typed = {key: _typed(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**typed)
    except ValueError as error:  # the classes check themselves when built
        raise ConfigError(f"{where}: {error}") from None


def _typed(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _build(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_typed(arguments[0], one, where) for one in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be keys and values, got {value!r}")
        return {str(key): _typed(arguments[1], one, f"{where}.{key}") for key, one in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and kind in (str, int, float, bool) and type(value) is not kind:
        raise ConfigError(f"{where} must be {kind.__name__}, got {value!r}")
    return value


# --- the run ----------------------------------------------------------------------------------------------------------


def run_pipeline(pipeline: Pipeline, progress: Progress) -> dict[str, Any]:
    """Write rows, dropped rows, report.json, report.md and funnel.png under `out`; returns the report.

    Raises ConfigError, SourceError, StepError, EndpointError; what is finished stays for the next start.
    """
    out = Path(pipeline.out)
    work, side = out / "work", out / "dropped"
    for folder in (work, side):
        folder.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(work / "features.sqlite")
    reports: list[dict[str, Any]] = []
    try:
        # Most trusted first: every later step may keep the first of two duplicates.
        ordered = sorted(pipeline.sources, key=lambda source: -source.trust)
        key = _digest(
            "read", VERSION, pipeline.seed, pseudonym("curate"), [(asdict(s), _state(s.path)) for s in ordered]
        )
        names = ["00_read", *(f"{i:02d}_{step.name}" for i, step in enumerate(pipeline.steps, start=1))]
        for name, step in zip(names, (None, *pipeline.steps), strict=True):
            if step is not None:
                key = _digest(key, step.name, asdict(step), *_inputs(step))  # type: ignore[call-overload]
            files = Files(
                work / f"{name}.jsonl", side / f"{name}.jsonl", work / f"{name}.json", work / f"{name}.looked"
            )
            seen = digest(files.looked)
            report = files.finished(key, seen)
            if report is not None:
                progress.say(f"{name}: finished before")
            else:
                looked = Watch(files.looked)
                if step is None:
                    results: Iterable[Item | Dropped] = _read(ordered, work, image_folder(out / "images"), looked)
                    report = _write(name, results, files, {}, None, progress)
                else:
                    before = Stage(work / f"{names[names.index(name) - 1]}.jsonl")
                    scratch = work / "scratch"
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir()
                    notes: dict[str, Any] = {}
                    context = Context(store, scratch, work, pipeline.seed, progress, notes, looked)
                    report = _write(name, step.run(before, context), files, notes, reports[-1]["kept"], progress)
                    shutil.rmtree(scratch)
                seen = looked.close()
                write_text(files.done, json.dumps({"key": key, "looked": seen, **report}))
            key = _digest(key, seen)
            reports.append(report)
        _forget_others(names, work, side)
        return _finish(pipeline, Stage(work / f"{names[-1]}.jsonl"), work / "00_read.jsonl", reports, out)
    finally:
        store.close()


@dataclass(frozen=True)
class Files:
    """What a step leaves: kept rows, dropped rows, its report, and which files it looked at beside its input."""

    stage: Path
    dropped: Path
    done: Path
    looked: Path

    def finished(self, key: str, seen: str) -> dict[str, Any] | None:
        """The report of the step that ran with this key, if all that it read and wrote stands as it left it. seen: the
        digest of what it looked at, as it is now.
        """
        try:
            found = json.loads(self.done.read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = self.stage.is_file() and self.dropped.is_file()
        same = found.pop("key", None) == key and found.pop("looked", None) == seen
        return found if whole and same else None


def _read(sources: Iterable[Source], work: Path, keep: Any, looked: Watch) -> Iterator[Item | Dropped]:
    path = work / "ids.sqlite"
    ids = open_database(path, scratch=True)
    ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def kept(data: bytes) -> str:
        looked(path := keep(data))
        return path

    for source in sources:
        for record in read_rows(source, kept, label=True, looked=looked):
            if record.row is None:
                yield Dropped(source.label, record.place, None, record.reason, record.detail)
                continue
            (record.row.get("meta") or {}).pop(SPLIT_KEY, None)  # only the split step may decide about file names
            item = Item(record.row, source.label, record.place)
            if ids.execute("INSERT OR IGNORE INTO ids VALUES (?)", (str(item.row["id"]),)).rowcount == 0:
                yield Dropped.item(item, "duplicate_id")
                continue
            yield item
    ids.close()
    path.unlink()


def _write(
    name: str,
    results: Iterable[Item | Dropped],
    files: Files,
    notes: dict[str, Any],
    total: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Run a step into its files; they appear together with their final names when it is whole."""
    kept = gone = 0
    reasons: dict[str, int] = {}
    sources: dict[str, list[int]] = {}
    parts = [path.with_name(path.name + ".part") for path in (files.stage, files.dropped)]
    progress.start(name, total or 0)
    begun = time.monotonic()
    with parts[0].open("w", encoding="utf-8") as rows, parts[1].open("w", encoding="utf-8") as side:
        for result in results:
            counts = sources.setdefault(result.source, [0, 0])
            counts[0] += 1
            if isinstance(result, Item):
                kept += 1
                counts[1] += 1
                rows.write(result.line())
            else:
                if result.reason not in REASONS:
                    raise AssertionError(f"step {name} used the unknown reason code {result.reason!r}")
                gone += 1
                reasons[result.reason] = reasons.get(result.reason, 0) + 1
                side.write(result.line())
            progress.advance()
            if (kept + gone) % SAY_EVERY == 0:
                progress.say(f"{name}: {kept + gone:,}{f' of {total:,}' if total else ''} rows")
    progress.stop()
    for part, path in zip(parts, (files.stage, files.dropped), strict=True):
        part.replace(path)
    told = ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())
    progress.say(f"{name}: {kept + gone:,} rows, {kept:,} kept{f'; {told}' if told else ''}")
    return {
        "step": name,
        "in": kept + gone,
        "kept": kept,
        "dropped": gone,
        "reasons": reasons,
        "notes": notes,
        "sources": sources,
        "seconds": round(time.monotonic() - begun, 3),
    }


def _finish(pipeline: Pipeline, last: Stage, first: Path, reports: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """The final rows in the contract's form, one file a split, and the reports."""
    files: dict[str, Any] = {}
    counts: dict[str, int] = {}
    keep = image_folder(out / "images")
    for item in last:
        row = dict(item.row)
        meta = dict(item.meta)
        name = f"{meta.pop(SPLIT_KEY, 'rows')}.jsonl"
        row["meta"] = meta
        row["images"] = [_final_path(image, out, keep if pipeline.copy_images else None) for image in row["images"]]
        row_to_prompt(row)
        if name not in files:
            files[name] = (out / f"{name}.part").open("w", encoding="utf-8")
        files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        counts[name] = counts.get(name, 0) + 1
    for name, file in files.items():
        file.close()
        (out / f"{name}.part").replace(out / name)
    for name in (f"{split}.jsonl" for split in ("rows", *SPLITS)):
        if name not in counts:
            (out / name).unlink(missing_ok=True)
    steps = [{key: value for key, value in report.items() if key != "sources"} for report in reports]
    read, left = reports[0]["sources"], reports[-1]["sources"]
    sources = {name: {"read": counts_in[0], "left": left.get(name, [0, 0])[1]} for name, counts_in in read.items()}
    report = {"steps": steps, "sources": sources, "files": dict(sorted(counts.items()))}
    write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", report_text(report))
    draw_funnel(steps, out / "funnel.png")
    return report


def _final_path(image: str, out: Path, keep: Any) -> str:
    """Relative to the file's folder for pictures in it, else absolute."""
    path = Path(image)
    if keep is not None and not path.is_relative_to(out.resolve()):
        path = Path(keep(path.read_bytes()))
    return str(path.relative_to(out.resolve())) if path.is_relative_to(out.resolve()) else str(path)


def _forget_others(names: list[str], work: Path, side: Path) -> None:
    """Files of steps that the pipeline no longer has."""
    for folder in (work, side):
        for path in folder.glob("[0-9][0-9]_*"):
            if path.name.split(".")[0] not in names:
                path.unlink()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _state(path: str) -> list[Any]:
    """Size and time of change of a file, or of all files of a folder."""
    root = Path(path).expanduser()
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else []
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _inputs(step: Any) -> list[Any]:
    """The state of files that a step reads beside its rows."""
    if not isinstance(step, Decontaminate):
        return []
    return [_state(path) for path in (*(source.path for source in step.against), step.data) if path]


def main(path: str, *, out: str | None = None, dry_run: bool = False) -> int:
    """`lingshu-rl curate`. Exit code 2: the file is wrong; 1: the run stopped and can go on; 130: interrupted."""
    progress = Progress(quiet=False)

    def curate() -> None:
        pipeline = load_pipeline(path, out)
        if dry_run:
            print(describe(pipeline))
            return
        try:
            with own(Path(pipeline.out), "curation", "out"):
                report = run_pipeline(pipeline, progress)
        finally:
            progress.stop()
        print(funnel_table(report["steps"]))
        files = [f"{Path(pipeline.out) / name}: {n:,} rows" for name, n in report["files"].items()]
        print(", ".join(files) or "no row is left")

    return exit_code(curate, "curation", wrong=(ConfigError,), stops=(StepError, EndpointError, ValueError))


def describe(pipeline: Pipeline) -> str:
    lines = [f"out: {pipeline.out}"]
    lines += [
        f"source: {s.label} (trust {s.trust}): {s.path}" for s in sorted(pipeline.sources, key=lambda s: -s.trust)
    ]
    for step in pipeline.steps:
        known: Any = step
        settings = ", ".join(f"{f.name}={getattr(step, f.name)!r}" for f in dataclasses.fields(known))
        lines.append(f"step: {step.name}({settings})")
    return "\n".join(lines)
