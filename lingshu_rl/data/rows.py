"""The prompt that a data row becomes; what a row may be is said in `rewards.rows`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingshu_rl.imaging.files import FORMATS, full_path
from lingshu_rl.imaging.images import DEFAULT_BUDGET, PHONE, Budget, Picture, upright
from lingshu_rl.imaging.volumes import VolumeError, unfold
from lingshu_rl.types import Prompt
from rewards.kinds import LETTERS, find
from rewards.rows import FIELDS, LabelCheck, RowError, read_row

__all__ = ["FIELDS", "LETTERS", "RowError", "instruction_text", "refusing", "row_to_prompt"]

# The "full" prompt by language, with and without an image to think about.
FRAMES = {
    "en": "Think step by step about {about} inside <think> and </think>, "
    "then give the final answer inside <answer> and </answer>. The final answer is {form}.",
    "zh": "请在 <think> 和 </think> 之间针对{about}逐步思考，然后在 <answer> 和 </answer> 之间给出最终答案。最终答案是{form}。",
}
ABOUT = {
    "en": {True: "the image and the question", False: "the question"},
    "zh": {True: "图像和问题", False: "问题"},
}
_HAN, _WORD = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[A-Za-z]+")
CHINESE_FORMS = {"short": "direct_zh", "full": "full_zh"}  # names of a kind's lines


@contextmanager
def refusing(*told: type[Exception]) -> Iterator[None]:
    """Around what is done with one record: whatever its content leads to is a RowError, and costs this record alone.

    told: refusals of other kinds, which stay what they are; so do errors of the system (a full disk).
    """
    try:
        yield
    except Exception as error:  # content of any form: wrong types, endless numbers, brackets in brackets
        if isinstance(error, (RowError, OSError, *told)):
            raise
        raise RowError(f"it cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error


def instruction_text(
    instruction: str, kind: str, meta: Mapping[str, Any] = {}, *, images: bool = True, language: str = "en"
) -> str:
    """The last line of a row's prompt: "short" or "full" by kind, anything else word for word (empty for none).

    language: en | zh; a kind that has no Chinese line asks in English.
    """
    if instruction not in CHINESE_FORMS:
        return instruction
    record = find(kind)
    if language == "zh" and CHINESE_FORMS[instruction] not in record.prompts:
        language = "en"
    form = record.prompt(CHINESE_FORMS[instruction] if language == "zh" else instruction, meta)
    return form if instruction == "short" else FRAMES[language].format(about=ABOUT[language][images], form=form)


def language_of(question: str, meta: Mapping[str, Any]) -> str:
    """zh for a question that is said to be Chinese (meta.language), or has more Chinese characters than Latin words."""
    if told := meta.get("language"):
        return "zh" if str(told).lower().startswith(("zh", "chinese", "中")) else "en"
    return "zh" if len(_HAN.findall(question)) > len(_WORD.findall(question)) else "en"


def row_to_prompt(
    row: Mapping[str, Any],
    *,
    base_dir: str | Path | None = None,
    instruction: str = "full",
    system: str = "",
    check: LabelCheck | None = None,
    budget: Budget = DEFAULT_BUDGET,
) -> Prompt:
    """Check one row and make its prompt. Raises RowError with the first thing that is wrong; check: see `read_row`.

    Relative image paths are taken from `base_dir`; whether the files exist and can be read is `Picture.fault`'s task.
    system: the first turn of every prompt whose row brings no system turn; "" for none. budget: of every image.
    """
    try:
        row = unfold(row, base_dir)
    except VolumeError as error:
        raise RowError(str(error)) from None
    read = read_row(row, check)
    lines = [f"{LETTERS[i]}. {text}" for i, text in enumerate(read.options)]
    language = language_of("\n".join([read.question, *read.options]), read.meta)
    if last := instruction_text(instruction, read.kind, read.meta, images=bool(read.images), language=language):
        lines.append(last)
    images = tuple(Picture(_image(image, base_dir), budget) for image in read.images)
    return Prompt(
        id=read.id,
        messages=_messages(read.turns, lines, system),
        images=images,
        gold=read.gold,
        options=read.options,
        kind=read.kind,
        meta=read.meta,
    )


def _messages(turns: Sequence[Mapping[str, Any]], lines: Sequence[str], system: str) -> tuple[dict[str, Any], ...]:
    """The turns with `lines` (options, instruction) at the end of the last; content without an image becomes a text."""
    *before, last = turns
    parts = list(last["content"])
    if parts[-1]["type"] == "text":
        lines = [parts.pop()["text"], *lines]
    if lines:
        parts.append({"type": "text", "text": "\n".join(lines)})
    told = [{"role": "system", "content": system}] if system and turns[0]["role"] != "system" else []
    return (
        *told,
        *({"role": t["role"], "content": _plain_text(t["content"])} for t in [*before, {**last, "content": parts}]),
    )


def _plain_text(content: Any) -> Any:
    texts = [part.get("text") for part in content]
    return content if None in texts else "\n".join(texts)


def _image(image: Any, base_dir: str | Path | None) -> str | bytes:
    """A path (str), encoded bytes, a PIL image, or the {"bytes", "path"} of a Hugging Face image column."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | Path) and str(image).strip():
        return full_path(image, base_dir or ".")
    if hasattr(image, "save") and hasattr(image, "tobytes"):
        return _kept(image)
    raise RowError(f"an image must be a path, bytes or a PIL image, got {type(image).__name__}")


def _kept(image: Any) -> bytes:
    """A PIL image as a file of the same pixels, turned upright."""
    if getattr(image, "format", None) not in (None, PHONE, *FORMATS):
        raise RowError(f"an image of format {image.format}: it must be one of {', '.join(FORMATS)}")
    if getattr(image, "n_frames", 1) > 1:
        raise RowError(f"an image of {image.n_frames} frames: choose one")
    buffer = io.BytesIO()
    try:
        image = upright(image)
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        image.save(buffer, format="PNG")
    except Exception as error:  # a truncated file, no pixels, floating-point pixels: Pillow's own reasons
        raise RowError(f"an image cannot be read: {type(error).__name__}: {error}") from None
    return buffer.getvalue()
