"""What travels between the steps: a row with where it came from, or why it was dropped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lingshu_rl.curate.image_index import FeatureStore
from lingshu_rl.progress import Progress
from rewards.chat import Endpoint

# Every reason code and what it means; a step may use no other.
REASONS: Mapping[str, str] = {
    "bad_row": "is no data row",
    "missing_image": "names an image file that does not exist",
    "unreadable_scan": "DICOM or NIfTI file that cannot be read",
    "missing_codec": "DICOM file whose compression no installed decoder reads",
    "no_patient": "the pattern for patients finds nothing in the file's path",
    "no_pixels": "scan file without a picture",
    "empty_scan": "volume without a slice of enough tissue",
    "burned_in_text": "text is burnt into the picture",
    "duplicate_id": "id used before in the same source",
    "unreadable_image": "image that cannot be decoded",
    "small_image": "a side is shorter than allowed",
    "long_image": "the sides differ by more than allowed",
    "blank_image": "too little contrast",
    "blurred_image": "too little sharpness",
    "duplicate_image": "all its pictures stand in earlier rows",
    "duplicate_question": "same pictures, question and answer as an earlier row",
    "conflicting_answer": "same pictures and question as an earlier row, another answer",
    "short_text": "fewer tokens than allowed",
    "long_text": "more tokens than allowed",
    "near_duplicate_text": "text of an earlier row, nearly word for word",
    "benchmark_image": "shows a picture of a benchmark",
    "benchmark_patient": "about a patient of a benchmark",
    "benchmark_text": "text of a benchmark, nearly word for word",
    "identifying_answer": "the answer is a date, number or name and nothing else",
    "untagged": "no rule tells its modality or organ",
    "surplus": "over the share that its class may have",
    "writer_failed": "the writer model gave no usable reply",
    "rewrite_unsafe": "still claims an identity, a firm diagnosis or a prescription after rewriting",
    "label_invalid": "the rewards cannot judge its label",
    "unjudged": "no rollout could be judged",
    "too_easy": "solved by more rollouts than allowed",
    "too_hard": "solved by fewer rollouts than allowed",
}


SPLIT_KEY = "_split"  # where the split step leaves its word in a row's meta, for the last pass
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Item:
    """row: a data row with image paths. source, place: where it was read."""

    row: dict[str, Any]
    source: str
    place: str

    def with_row(self, **changes: Any) -> Item:
        return replace(self, row={**self.row, **changes})

    def with_meta(self, **changes: Any) -> Item:
        return self.with_row(meta={**(self.row.get("meta") or {}), **changes})

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.row.get("meta") or {}

    def line(self) -> str:
        return json.dumps({"source": self.source, "place": self.place, "row": self.row}, ensure_ascii=False) + "\n"

    @classmethod
    def of(cls, line: str) -> Item:
        found = json.loads(line)
        return cls(found["row"], found["source"], found["place"])


@dataclass(frozen=True)
class Dropped:
    """row: None for a record that never became one."""

    source: str
    place: str
    row: dict[str, Any] | None
    reason: str
    detail: str = ""

    @classmethod
    def item(cls, item: Item, reason: str, detail: str = "") -> Dropped:
        return cls(item.source, item.place, item.row, reason, detail)

    def line(self) -> str:
        told = {
            "id": (self.row or {}).get("id"),
            "source": self.source,
            "place": self.place,
            "reason": self.reason,
            "detail": self.detail,
            "row": self.row,
        }
        return json.dumps(told, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Stage:
    """The rows that a step left, as a file; can be read as often as a step needs."""

    path: Path

    def __iter__(self) -> Iterator[Item]:
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                yield Item.of(line)


@dataclass
class Context:
    """What steps may use. folder: the step's own scratch folder, emptied before it runs. cache: survives kills.

    notes: what the step wants to report beside its counts. looked: to be told of every file that the step reads beside
    its rows and their pictures; when one changes, or appears, the step runs again.
    """

    store: FeatureStore
    folder: Path
    cache: Path
    seed: int
    progress: Progress
    notes: dict[str, Any]
    looked: Callable[[Path | str], object] = lambda path: None

    def endpoint(self, step: Any) -> Endpoint:
        """The server that a step asks, by its url, key_env, timeout_s and concurrency; answers are kept over kills."""
        return Endpoint(
            step.url,
            self.cache / "answers.sqlite",
            key_env=step.key_env,
            timeout_s=step.timeout_s,
            concurrency=step.concurrency,
        )

    def count(self, name: str, by: int = 1) -> None:
        self.notes[name] = self.notes.get(name, 0) + by


def rank(seed: int, *parts: str) -> int:
    """A 63-bit number that depends on nothing but its arguments: a draw that stays when other rows come or go."""
    return int.from_bytes(hashlib.blake2b("/".join((str(seed), *parts)).encode(), digest_size=8).digest(), "big") >> 1


def group_of(item: Item) -> str:
    """Identity of the row's pictures: set by dedup_images, else from the paths."""
    if group := item.meta.get("image_group"):
        return str(group)
    return "+".join(map(str, item.row.get("images") or ()))
