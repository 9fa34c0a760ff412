"""Conversations and images by their form: LLaVA's, ShareGPT's, OpenAI's and TRL's turns as questions or messages of
rows."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lingshu_rl.data.columns import is_missing, literal
from lingshu_rl.data.rows import RowError
from lingshu_rl.imaging.volumes import is_volume
from rewards.rows import plain

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
_PLACE = re.compile(r"\s*(?:<image>|<image_\d+>|<\|image_\d+\|>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>)\s*")


def asked_of(conversation: Any, images: list[Any], turns: str, labelled: bool) -> list[dict[str, Any]]:
    """A question (or messages) with its answer for each answer of a conversation, or for the last.

    labelled: the record has its label elsewhere, so that the conversation is asked as a whole, without its last answer.
    """
    told = _turns(conversation, images)
    if not told:
        raise RowError("the conversation is empty")
    ends = [n for n, turn in enumerate(told) if turn["role"] == "assistant"]
    if labelled:
        whole = told[:-1] if ends and ends[-1] == len(told) - 1 else told
        return [{**_question_of(whole), "images": images}]
    if not ends:
        raise RowError("the conversation has no answer; map.answer says where the label is")
    chosen = ends if turns == "each" else ends[-1:]
    return [
        {**_question_of(told[:n]), "images": images[: _images_in(told[:n])], "answer": _text(told[n])} for n in chosen
    ]


def _turns(conversation: Any, images: list[Any]) -> list[dict[str, Any]]:
    """Turns of role and parts. Images that stand in the turns themselves are added to `images`."""
    own = not images
    told = [_turn(turn, number, images, own) for number, turn in enumerate(_spoken(conversation))]
    if not _images_in(told):
        for turn in [turn for turn in told if turn["role"] == "user"][:1]:
            turn["content"][:0] = [{"type": "image"} for _ in images]
    return told


def _spoken(conversation: Any) -> list[Any]:
    """The turns of a list of them, of JSON that holds one, or of several of these: prompt and completion."""
    if isinstance(conversation, str) and conversation.lstrip()[:1] == "[":
        conversation = literal(conversation)
    conversation = plain(conversation)
    if not isinstance(conversation, list):
        return [conversation]
    return [turn for part in conversation for turn in (_spoken(part) if isinstance(part, list | str) else [part])]


def _turn(turn: Any, number: int, images: list[Any], own: bool) -> dict[str, Any]:
    """One turn; a bare text is the user's and the assistant's by turns. own: take the images that stand in it."""
    if isinstance(turn, str):
        turn = {"role": "assistant" if number % 2 else "user", "content": turn}
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number + 1} of the conversation is a {type(turn).__name__}")
    role = next((turn[k] for k in ("role", "from") if not is_missing(turn.get(k))), "")
    content = next((turn[k] for k in ("content", "value", "text") if not is_missing(turn.get(k))), "")
    if role not in _ROLES:
        raise RowError(f"turn {number + 1} of the conversation is by {role!r}, not one of {', '.join(_ROLES)}")
    pieces = plain(content) if isinstance(plain(content), list) else [content]
    return {"role": _ROLES[role], "content": [made for piece in pieces for made in _parts(piece, images, own)]}


def _parts(piece: Any, images: list[Any], own: bool) -> list[dict[str, Any]]:
    """Text and image parts of a text with placeholders, or of one part of another's content."""
    if isinstance(piece, Mapping):
        held = next((piece[k] for k in ("image", "image_url") if not is_missing(piece.get(k))), None)
        if held is not None or piece.get("type") in ("image", "image_url"):
            if own:
                images += images_of(held)
            return [{"type": "image"}]
        piece = piece.get("text") or ""
    made: list[dict[str, Any]] = []
    for number, text in enumerate(_PLACE.split(str(piece))):
        made += [{"type": "image"}] if number else []
        made += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return made


def _images_in(turns: Sequence[Mapping[str, Any]]) -> int:
    return sum(part["type"] == "image" for turn in turns for part in turn["content"])


def _text(turn: Mapping[str, Any]) -> str:
    return "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _question_of(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One turn with its images in front is a question; anything else stays a conversation."""
    content = turns[-1]["content"] if turns else []
    leading = [part["type"] for part in content] == ["image"] * (len(content) - 1) + ["text"]
    if len(turns) == 1 and leading:
        return {"question": content[-1]["text"]}
    return {"messages": [{"role": t["role"], "content": list(t["content"])} for t in turns]}


def placed(question: str, images: int) -> dict[str, Any]:
    """A question without placeholders where they stand in front, as a turn with its images in place where they do
    not."""
    parts = _parts(question, [], own=False)
    if sum(part["type"] == "image" for part in parts) not in (0, images) or not parts:
        return {"question": question}
    return _question_of([{"role": "user", "content": parts}])


# -------------------------------------------------------------------------------------------------------------- images


def images_of(value: Any) -> list[Any]:
    """A list of paths, bytes and volumes from a path, bytes, base64, {bytes, path}, {volume, ...}, {placeholder: path},
    or lists of these.
    """
    value = plain(value)
    if isinstance(value, str):
        text = value.strip()
        if text[:1] == "[":
            return images_of(literal(text)) if literal(text) != text else [text]
        if "|" in text and not text.startswith("data:"):
            return [image for part in text.split("|") for image in images_of(part)]
        return [_decoded(text)] if text else []
    if isinstance(value, list):
        return [image for item in value for image in images_of(item)]
    if is_volume(value):
        return [value]
    if isinstance(value, Mapping):
        held = next((value[k] for k in ("bytes", "path", "image_path", "image", "url") if value.get(k)), None)
        if held is None and value and all(str(key).startswith("<") for key in value):
            return [image for item in value.values() for image in images_of(item)]
        return images_of(held)
    return [] if is_missing(value) else [value]


_MAGIC = ("/9j/", "iVBOR", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0A")  # JPEG, PNG, GIF, WebP, BMP, TIFF in base64


def _decoded(text: str) -> str | bytes:
    """The bytes of an image in base64 or of a data address; else the path."""
    head, _, rest = text.partition(";base64,")
    data = rest if head.startswith("data:") and rest else text if len(text) > 260 and text.startswith(_MAGIC) else ""
    if not data:
        return text.removeprefix("file://")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"an image in base64 cannot be decoded: {error}") from None
