"""What two sets share: pictures (exact copies and near duplicates), patients and texts. The same search
decontaminates."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lingshu_rl.curate.image_index import FeatureStore, ImageIndex, open_database
from lingshu_rl.curate.images import SCORE, Features
from lingshu_rl.curate.readers import Source, SourceError, read_rows
from lingshu_rl.curate.texts import TextIndex, words
from lingshu_rl.progress import Progress
from lingshu_rl.storage.disk import replacing
from lingshu_rl.storage.runfolder import write_text

SHOWN = 10  # examples a kind in the printed table
MIN_WORDS = 4  # a text of fewer words ("What is this?") says nothing


@dataclass(frozen=True)
class Limits:
    """distance, score: of near-duplicate pictures; threshold: Jaccard index of near-duplicate texts (see the
    indexes)."""

    distance: int = 7
    score: float = SCORE
    threshold: float = 0.6
    guard: bool = True


@dataclass(frozen=True)
class Hit:
    """kind: image | patient | text. what: the shared picture, patient or text. other: id of the row in the other set.

    certain: False for equal texts about different pictures, which a question asked of many pictures gives by itself.
    """

    kind: str
    what: str
    other: str
    detail: str
    certain: bool = True


def row_text(row: Mapping[str, Any]) -> str:
    """What the text comparison sees: a report or caption by itself, else question, options (in any order the same) and
    an open answer.
    """
    answer = str(row.get("answer") or "")
    if row.get("kind") == "report":
        return answer
    question, options = question_parts(row)
    parts = [question, *sorted(options)]
    return " ".join([*parts, answer] if row.get("kind") == "open" else parts).strip()


def question_parts(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The question, or all that a conversation says before the answer; and the options' texts."""
    question = row.get("question") or " ".join(_texts(row.get("messages") or ()))
    options = row.get("options") or ()
    return str(question), [str(text) for text in (options.values() if isinstance(options, Mapping) else options)]


def _texts(messages: Any) -> Iterator[str]:
    for turn in messages:
        content = turn.get("content", "")
        yield from [content] if isinstance(content, str) else [str(p.get("text", "")) for p in content]


class Reference:
    """A set that other rows are compared with, kept on disk under `folder`."""

    def __init__(self, folder: Path, store: FeatureStore, limits: Limits) -> None:
        self.store = store
        self.images = ImageIndex(folder / "images.sqlite", limits.distance, limits.score)
        self.texts = TextIndex(folder / "texts.sqlite", limits.threshold, limits.guard)
        self.facts = open_database(folder / "facts.sqlite", scratch=True)
        self.facts.execute(
            "CREATE TABLE facts (kind TEXT, value TEXT, owner TEXT, pictures INTEGER, PRIMARY KEY (kind, value)) "
            "WITHOUT ROWID"
        )

    def add(self, row: Mapping[str, Any], found: Iterable[tuple[str | bytes, Features | Exception]]) -> None:
        """found: the row's images with their features."""
        name = str(row["id"])
        pictures = 0
        for _, picture in found:
            pictures += 1
            if isinstance(picture, Features) and self._once("image", picture.sha, name, 1):
                self.images.add(picture, name)
        if (patient := _patient(row)) is not None:
            self._once("patient", patient, name, pictures)
        text = row_text(row)
        # The owner says whether its row has pictures; the same text with and without is two entries.
        group = "pictures" if pictures else ""
        key = f"{group}|{' '.join(words(text))}"
        if len(words(text)) >= MIN_WORDS and self._once("text", key, name, pictures):
            self.texts.add(text, name, group)

    def hits(
        self, row: Mapping[str, Any], found: Iterable[tuple[str | bytes, Features | Exception]], *, texts: bool = True
    ) -> Iterator[Hit]:
        pictures = 0
        for image, picture in found:
            pictures += 1
            if isinstance(picture, Features) and (match := self.images.find(picture)):
                how = "exact copy" if match.how == "exact" else f"{match.distance} bits, score {match.score:.3f}"
                name = image if isinstance(image, str) else picture.sha[:16]
                yield Hit("image", name, match.owner, how)
        if (patient := _patient(row)) is not None and (owner := self._owner("patient", patient)):
            yield Hit("patient", patient, owner, "")
        text = row_text(row)
        if texts and len(words(text)) >= MIN_WORDS:
            for group in ("", "pictures"):
                if match_text := self.texts.find(text, group):
                    certain = not (pictures and group)
                    yield Hit("text", text, match_text.owner, f"Jaccard {match_text.score:.2f}", certain)
                    break

    def _once(self, kind: str, value: str, owner: str, pictures: int) -> bool:
        """Whether it is new."""
        insert = "INSERT OR IGNORE INTO facts VALUES (?, ?, ?, ?)"
        return self.facts.execute(insert, (kind, value, owner, pictures)).rowcount > 0

    def _owner(self, kind: str, value: str) -> str | None:
        row = self.facts.execute("SELECT owner FROM facts WHERE kind = ? AND value = ?", (kind, value)).fetchone()
        return row[0] if row else None

    def close(self) -> None:
        for part in (self.images, self.texts, self.facts):
            part.close()


def _patient(row: Mapping[str, Any]) -> str | None:
    patient = (row.get("meta") or {}).get("patient_id")
    return None if patient is None or str(patient).strip() == "" else str(patient)


def with_features(
    rows: Iterable[dict[str, Any]], store: FeatureStore
) -> Iterator[tuple[dict[str, Any], list[tuple[str | bytes, Features | Exception]]]]:
    """Each row with its images' features; pictures of later rows are decoded meanwhile."""
    for row, found in store.prefetch((row, tuple(row.get("images") or ())) for row in rows):
        yield row, list(zip(row.get("images") or (), found, strict=True))


# --- the command ------------------------------------------------------------------------------------------------------


def find_leaks(
    train: Source, test: Source, folder: Path, limits: Limits, progress: Progress, clean: Path | None
) -> dict[str, Any]:
    """Compare both ways: how much of the test set is in the training set, and which training rows to leave out for it.

    Counts are of distinct test pictures, distinct patients and test rows. `clean`: the training rows without certain
    leaks. Raises SourceError.
    """
    with contextlib.closing(Comparison(train, test, folder, limits, progress)) as comparison:
        for side in SIDES:
            comparison.read(side)
        return comparison.of_test() | comparison.of_train(clean) | comparison.of_reading()


SIDES = ("train", "test")


class Comparison:
    """Two sets, each kept for the other's rows to be compared with."""

    def __init__(self, train: Source, test: Source, folder: Path, limits: Limits, progress: Progress) -> None:
        self.sources, self.limits, self.progress = {"train": train, "test": test}, limits, progress
        self.store = FeatureStore(folder / "features.sqlite")
        for side in SIDES:
            (folder / side).mkdir()
        self.references = {side: Reference(folder / side, self.store, limits) for side in SIDES}
        self.sizes = dict.fromkeys(SIDES, 0)
        self.faulty: dict[tuple[str, str], dict[str, str]] = {}  # by side and place
        self.unreadable: dict[str, str] = {}

    def _rows(self, side: str) -> Iterator[tuple[dict[str, Any], list[tuple[str | bytes, Features | Exception]]]]:
        return with_features(self._usable(side), self.store)

    def _usable(self, side: str) -> Iterator[dict[str, Any]]:
        for record in read_rows(self.sources[side], strict=False):
            if record.reason:
                told = {"set": side, "place": record.place, "reason": record.reason, "detail": record.detail}
                self.faulty.setdefault((side, record.place), told)
            if record.row is not None:
                yield record.row
                self.progress.advance()

    def read(self, side: str) -> None:
        self.progress.say(f"reading {self.sources[side].path}")
        for row, found in self._rows(side):
            self.references[side].add(row, found)
            self.sizes[side] += 1
            for image, picture in found:
                if isinstance(picture, Exception):
                    name = image if isinstance(image, str) else f"an image of row {row['id']}"
                    self.unreadable[name] = str(picture)
        if not self.sizes[side]:
            first = list(self.faulty.values())[:1]
            raise SourceError(f"{self.sources[side].path}: no usable row; the first problem: {first}")

    def of_test(self) -> dict[str, Any]:
        """What of the test set is in the training set."""
        self.progress.say("looking for the test set in the training set")
        images: dict[str, dict[str, Any]] = {}
        patients: dict[str, dict[str, Any]] = {}
        texts: list[dict[str, Any]] = []
        for row, found in self._rows("test"):
            shas = {_name(image, picture): getattr(picture, "sha", "") for image, picture in found}
            for hit in self.references["train"].hits(row, found):
                entry = {"test_row": str(row["id"]), "train_row": hit.other}
                if hit.kind == "image":
                    images.setdefault(shas[hit.what], {"image": hit.what, **entry, "how": hit.detail})
                elif hit.kind == "patient":
                    patients.setdefault(hit.what, {"patient": hit.what, **entry})
                else:
                    texts.append({**entry, "text": hit.what[:200], "how": hit.detail, "certain": hit.certain})
        return {
            "shared_images": len(images),
            "shared_patients": len(patients),
            "near_duplicate_texts": len(texts),
            "near_duplicate_texts_certain": sum(t["certain"] for t in texts),
            "images": list(images.values()),
            "patients": list(patients.values()),
            "texts": texts,
        }

    def of_train(self, clean: Path | None) -> dict[str, Any]:
        """Which training rows show the test set; the others are written to `clean`."""
        self.progress.say("looking for training rows that show the test set")
        reasons = {"image": 0, "patient": 0, "text": 0}
        kept = 0
        with contextlib.ExitStack() as closing:
            out = closing.enter_context(replacing(clean)) if clean else None
            for row, found in self._rows("train"):
                kinds = {hit.kind for hit in self.references["test"].hits(row, found) if hit.certain}
                for kind in kinds:
                    reasons[kind] += 1
                kept += not kinds
                if out and clean and not kinds:
                    out.write(json.dumps(_portable(row, clean), ensure_ascii=False) + "\n")
        leaking = self.sizes["train"] - kept
        return {"train_rows_leaking": leaking, "train_rows_leaking_by": reasons, "train_rows_clean": kept}

    def of_reading(self) -> dict[str, Any]:
        """What was read, and what could not be."""
        return {
            **{f"{side}_rows": self.sizes[side] for side in SIDES},
            "limits": asdict(self.limits),
            "faulty_rows": list(self.faulty.values()),
            "unreadable_images": self.unreadable,
        }

    def close(self) -> None:
        for reference in self.references.values():
            reference.close()
        self.store.close()


def _name(image: str | bytes, picture: Features | Exception) -> str:
    return image if isinstance(image, str) else getattr(picture, "sha", "")[:16]


def _portable(row: dict[str, Any], clean: Path) -> dict[str, Any]:
    """The row with image bytes as files beside the cleaned split, and paths that hold from everywhere."""
    from lingshu_rl.curate.readers import image_folder

    keep = image_folder(clean.parent / f"{clean.stem}_images")
    return {**row, "images": [keep(image) if isinstance(image, bytes) else image for image in row["images"]]}


def add_leaks_parser(commands: Any) -> None:
    """`eval leaks --train A --test B`."""
    parser = commands.add_parser("leaks", help="pictures, patients and texts that two sets share")
    parser.add_argument(
        "--train", required=True, help="JSONL, JSON, parquet, CSV or save_to_disk folder (FOLDER:split)"
    )
    parser.add_argument("--test", required=True, help="the same for the set that must not be seen in training")
    parser.add_argument(
        "--images", default="", help="where image names start (default: beside the file, or its images/)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and every shared thing")
    parser.add_argument(
        "--clean", type=Path, metavar="FILE", help="write the training rows that share nothing, as JSONL"
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=7,
        help="bits of 64 in which near-duplicate pictures' hashes may differ; 0: exact copies only (default: 7)",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.6, help="Jaccard index of near-duplicate texts (default: 0.6)"
    )
    parser.set_defaults(run=run_leaks)


def run_leaks(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    progress = Progress(quiet=False, console=Console(stderr=True, highlight=False, soft_wrap=True))
    try:
        limits = Limits(distance=arguments.distance, threshold=arguments.threshold)
        train, test = (_source(text, arguments.images) for text in (arguments.train, arguments.test))
        with tempfile.TemporaryDirectory(prefix="leaks-") as folder:
            report = find_leaks(train, test, Path(folder), limits, progress, arguments.clean)
    except ValueError as error:  # SourceError, and limits out of range
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        write_text(arguments.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(leaks_table(report))
    return 0


def _source(text: str, images: str) -> Source:
    """A path, for dataset folders with the split after a colon."""
    path, _, split = text.rpartition(":") if not Path(text).exists() and ":" in text else (text, "", "")
    return Source(path, split=split, image_dir=images)


def leaks_table(report: Mapping[str, Any]) -> str:
    lines = [
        f"shared images          {report['shared_images']:>8,}  (distinct pictures of the test set)",
        f"shared patients        {report['shared_patients']:>8,}",
        f"near-duplicate texts   {report['near_duplicate_texts']:>8,}  of {report['test_rows']:,} test rows; "
        f"{report['near_duplicate_texts_certain']:,} of them without pictures on one side",
        f"training rows to drop  {report['train_rows_leaking']:>8,}  of {report['train_rows']:,}  "
        + ", ".join(f"{kind} {n:,}" for kind, n in report["train_rows_leaking_by"].items()),
    ]
    if report["faulty_rows"]:
        first = report["faulty_rows"][0]
        lines.append(
            f"faulty rows            {len(report['faulty_rows']):>8,}  compared as far as they go, the first: "
            f"{first['set']} {first['place']}: {first['detail']}"
        )
    if report["unreadable_images"]:
        first_image = next(iter(report["unreadable_images"].items()))
        lines.append(
            f"unreadable images      {len(report['unreadable_images']):>8,}  the first: {': '.join(first_image)}"
        )
    for kind, key in (("images", "image"), ("patients", "patient"), ("texts", "text")):
        for entry in report[kind][:SHOWN]:
            lines.append(
                f"  {entry[key][-80:]}  test {entry['test_row']}  train {entry['train_row']}  {entry.get('how', '')}"
            )
        if len(report[kind]) > SHOWN:
            lines.append(f"  ... and {len(report[kind]) - SHOWN:,} more {kind} (--json FILE lists all)")
    return "\n".join(lines)
