"""The prompt that a data row becomes; what a row may be is said in `rewards.rows`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingshu_rl.types import Prompt
from rewards.kinds import LETTERS, find
from rewards.rows import FIELDS, LabelCheck, RowError, read_row

__all__ = ["FIELDS", "FULL_FRAME", "LETTERS", "RowError", "instruction_text", "row_to_prompt"]

FULL_FRAME = (
    "Think step by step about the image and the question inside <think> and </think>, "
    "then give the final answer inside <answer> and </answer>. The final answer is {form}."
)


def instruction_text(instruction: str, kind: str, multi: bool = False) -> str:
    """The last line of a prompt: "short" or "full" by kind, anything else word for word (empty for none)."""
    if instruction == "full":
        return FULL_FRAME.format(form=find(kind).prompt("full", multi))
    return find(kind).prompt("short", multi) if instruction == "short" else instruction


def row_to_prompt(
    row: Mapping[str, Any],
    *,
    base_dir: str | Path | None = None,
    instruction: str = "full",
    check: LabelCheck | None = None,
) -> Prompt:
    """Check one row and make its prompt. Raises RowError with the first thing that is wrong; check: see `read_row`.

    Relative image paths are taken from `base_dir`; whether the files exist and can be read is `check_image`'s task.
    """
    read = read_row(row, check)
    multi = read.meta.get("multi") is True
    lines = [read.question, *(f"{LETTERS[i]}. {text}" for i, text in enumerate(read.options))]
    if last := instruction_text(instruction, read.kind, multi):
        lines.append(last)
    images = tuple(_image(image, base_dir) for image in read.images)
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "\n".join(lines)}]
    return Prompt(
        id=read.id,
        messages=({"role": "user", "content": content},),
        images=images,
        gold=read.gold,
        options=read.options,
        kind=read.kind,
        meta=read.meta,
    )


def _image(image: Any, base_dir: str | Path | None) -> str | bytes:
    """A path (str), encoded bytes, a PIL image, or the {"bytes", "path"} of a Hugging Face image column."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | Path) and str(image).strip():
        return str(Path(base_dir or ".").joinpath(Path(image).expanduser()).resolve())
    if hasattr(image, "save") and hasattr(image, "tobytes"):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()
    raise RowError(f"an image must be a path, bytes or a PIL image, got {type(image).__name__}")
