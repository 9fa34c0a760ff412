"""Small pictures and sets for the curation tests."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lingshu_rl.curate.pipeline import Pipeline


def texture(seed: int, size: tuple[int, int] = (160, 128)) -> Image.Image:
    """A grey picture of soft blobs, another one for every seed."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(0, 255, (12, 14)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def png(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(number: int, **changes: Any) -> dict[str, Any]:
    base = {"id": f"q{number}", "images": [], "question": f"What is shown in picture number {number}?", "answer": "a lung", "kind": "open"}  # fmt: skip
    return {**base, **changes}


class Curated:
    """A finished run: its report, rows by file, and what each step dropped."""

    def __init__(self, pipeline: Pipeline, report: Mapping[str, Any]) -> None:
        self.out = Path(pipeline.out)
        self.report = report

    def rows(self, name: str = "rows") -> list[dict[str, Any]]:
        return read_rows(self.out / f"{name}.jsonl")

    def ids(self, name: str = "rows") -> list[str]:
        return [row["id"].split(":", 1)[1] for row in self.rows(name)]

    def dropped(self, step: str) -> dict[str, str]:
        """id (or place) -> reason."""
        (path,) = (self.out / "dropped").glob(f"*_{step}.jsonl")
        return {(d["id"] or d["place"]).split(":", 1)[-1]: d["reason"] for d in read_rows(path)}

    def details(self, step: str) -> dict[str, str]:
        (path,) = (self.out / "dropped").glob(f"*_{step}.jsonl")
        return {(d["id"] or d["place"]).split(":", 1)[-1]: d["detail"] for d in read_rows(path)}

    def notes(self, step: str) -> Mapping[str, Any]:
        return next(s["notes"] for s in self.report["steps"] if s["step"].endswith(step))
