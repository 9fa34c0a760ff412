"""The data row: what a question looks like in a file, what is wrong with a bad one, and the prompt it becomes."""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_rl.types import Prompt

KINDS = ("option", "yesno", "open", "numeric", "report")
FIELDS = ("id", "images", "question", "messages", "options", "answer", "kind", "unit", "tolerance", "meta")
REQUIRED = ("id", "images", "answer", "kind")  # and one of question, messages
TOLERANCES = ("rel", "abs", "lower", "upper", "exact")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What the prompt says about the answer's form. "short" is for the demo's tiny model, "full" for real ones.
INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "short": {
        "option": "Answer: letter.",
        "yesno": "Answer: yes or no.",
        "open": "Answer: words.",
        "numeric": "Answer: number and unit.",
        "report": "Answer: report.",
    },
    "full": {
        "option": "the letter of the correct option",
        "multi": "the letters of all correct options, separated by commas",
        "yesno": "yes or no",
        "open": "a short phrase",
        "numeric": "a number with its unit",
        "report": "the report as plain sentences",
    },
}
FULL_FRAME = (
    "Think step by step about the image and the question inside <think> and </think>, "
    "then give the final answer inside <answer> and </answer>. The final answer is {form}."
)


class RowError(ValueError):
    """Why a row cannot be used."""


def instruction_text(instruction: str, kind: str, multi: bool = False) -> str:
    """The last line of a prompt: "short" or "full" by kind, anything else word for word (empty for none)."""
    if instruction == "short":
        return INSTRUCTIONS["short"][kind]
    if instruction == "full":
        return FULL_FRAME.format(form=INSTRUCTIONS["full"]["multi" if multi and kind == "option" else kind])
    return instruction


def row_to_prompt(
    row: Mapping[str, Any], *, base_dir: str | Path | None = None, instruction: str = "full", system: str = ""
) -> Prompt:
    """Check one row and make its prompt. Raises RowError with the first thing that is wrong.

    Relative image paths are taken from `base_dir`; whether the files exist and can be read is `check_image`'s task.
    `Prompt.meta` is the row's meta plus `unit` and `tolerance`; `gold` is a letter for option rows ("A,C" with
    `meta.multi`), "yes" or "no" for yesno rows, the answer as given for the others.
    A row has a `question`, which becomes one user turn, or the `messages` of a conversation (`_conversation`).
    system: the first turn of every prompt whose row brings no system turn; "" for none.
    """
    row = {key: value for key, value in row.items() if not _missing(value)}
    _check_fields(row)
    kind = row["kind"]
    if kind not in KINDS:
        raise RowError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}{_nearest(kind, KINDS)}")
    meta = _meta(row)
    options = _options(row)
    gold = _gold(row, options, multi=meta.get("multi") is True)
    lines = [f"{LETTERS[i]}. {text}" for i, text in enumerate(options)]
    if last := instruction_text(instruction, kind, multi=meta.get("multi") is True):
        lines.append(last)
    images = tuple(_image(image, base_dir) for image in _sequence(row["images"], "images"))
    messages = _conversation(row, images=len(images), lines=lines)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(
        id=str(row["id"]),
        messages=tuple(messages),
        images=images,
        gold=gold,
        options=options,
        kind=kind,
        meta=meta,
    )


def _conversation(row: Mapping[str, Any], images: int, lines: Sequence[str]) -> list[dict[str, Any]]:
    """The turns of a row; `lines` (options, instruction) end the last user turn.

    `messages` is a list of {"role", "content"}: at most one system turn, which comes first, then user and assistant turns
    by turns, the last of them the user's. Content is a text, or a list of {"type": "text", "text": ...} and
    {"type": "image"}, the images in the order of the row's `images`. Images that no turn places come before the text
    of the last turn, where a `question` has them.
    """
    if "question" in row and "messages" in row:
        raise RowError("a row has either a question or messages, this one has both")
    if "question" in row:
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise RowError("question must be a non-empty text")
        turns = [{"role": "user", "content": row["question"]}]
    elif "messages" in row:
        turns = _sequence(row["messages"], "messages")
    else:
        raise RowError("field 'question' is missing or empty (or give a conversation as 'messages')")
    messages = [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    roles = [m["role"] for m in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise RowError(
            f"messages are an optional system turn, then user and assistant by turns, ending with user; got {', '.join(roles)}"
        )
    placed = sum(part["type"] == "image" for m in messages for part in m["content"])
    last = messages[-1]["content"]
    if not placed:
        last[:0] = [{"type": "image"} for _ in range(images)]
    elif placed != images:
        raise RowError(f"messages place {placed} images and the row has {images}")
    if last[-1]["type"] == "text":
        lines = [last.pop()["text"], *lines]
    last.append({"type": "text", "text": "\n".join(lines)})
    for message in messages:
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "\n".join(part["text"] for part in message["content"])
    return messages


def _turn(turn: Any, number: int) -> dict[str, Any]:
    """One turn of `messages`, its content as a list of parts with stripped texts."""
    where = f"messages, turn {number}"
    if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
        raise RowError(f"{where}: a turn is a mapping with role and content, got {turn!r}")
    if turn["role"] not in ("system", "user", "assistant"):
        raise RowError(f"{where}: role must be system, user or assistant, got {turn['role']!r}")
    content = turn["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _sequence(content, f"{where}: content")
    made = [_part(part, where) for part in parts]
    if not made or all(part.get("text") == "" for part in made):
        raise RowError(f"{where}: content is empty")
    if turn["role"] != "user" and any(part["type"] == "image" for part in made):
        raise RowError(f"{where}: images belong into user turns")
    return {"role": turn["role"], "content": made}


def _part(part: Any, where: str) -> dict[str, Any]:
    part = {k: v for k, v in part.items() if not _missing(v)} if isinstance(part, Mapping) else {}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"].strip()}
    if part == {"type": "image"}:
        return part
    raise RowError(
        f'{where}: a part is {{"type": "text", "text": ...}} or {{"type": "image"}} for the next of the row\'s images'
    )


def _missing(value: Any) -> bool:
    """Tables fill absent cells with None or nan."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _nearest(word: Any, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _check_fields(row: Mapping[str, Any]) -> None:
    for name in REQUIRED:
        if name not in row:
            hint = "; use [] for a question without an image" if name == "images" else ""
            raise RowError(f"field {name!r} is missing or empty{hint}")
    for name in row:
        if name not in FIELDS:
            raise RowError(f"unknown field {name!r}{_nearest(name, FIELDS)}; other facts belong under 'meta'")
    if not isinstance(row["id"], str | int) or isinstance(row["id"], bool) or not str(row["id"]).strip():
        raise RowError(f"id must be a non-empty text or an integer, got {row['id']!r}")


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = row.get("meta", {})
    if not isinstance(meta, Mapping):
        raise RowError(f"meta must be a mapping, got {type(meta).__name__}")
    merged = {key: value for key, value in meta.items() if not _missing(value)}
    for name in ("unit", "tolerance"):
        if name not in row:
            continue
        if row["kind"] != "numeric":
            raise RowError(f"{name!r} belongs to kind 'numeric', this row is {row['kind']!r}")
        if name in merged and merged[name] != row[name]:
            raise RowError(f"{name!r} stands in the row and, differently, in its meta")
        merged[name] = row[name]
    if "tolerance" in merged:
        merged["tolerance"] = _tolerance(merged["tolerance"])
    return merged


def _tolerance(tolerance: Any) -> dict[str, Any]:
    if not isinstance(tolerance, Mapping):
        raise RowError(f"tolerance must be a mapping such as {{'abs': 5}} or {{'rel': 0.05}}, got {tolerance!r}")
    kept = {key: value for key, value in tolerance.items() if not _missing(value)}
    for key, value in kept.items():
        if key not in TOLERANCES:
            raise RowError(f"unknown tolerance {key!r}; use one of {', '.join(TOLERANCES)}{_nearest(key, TOLERANCES)}")
        if key == "exact":
            valid = isinstance(value, bool)
        else:
            valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            valid = valid and (value >= 0 or key in ("lower", "upper"))
        if not valid:
            raise RowError(f"tolerance {key!r} cannot be {value!r}")
    return kept


def _sequence(value: Any, name: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise RowError(f"{name} must be a list, got {type(value).__name__}")
    return list(value)


def _options(row: Mapping[str, Any]) -> tuple[str, ...]:
    options = _sequence(row.get("options", []), "options")
    if row["kind"] != "option":
        if options:
            raise RowError(f"options belong to kind 'option', this row is {row['kind']!r}")
        return ()
    if len(options) < 2:
        raise RowError(f"kind 'option' needs at least two options, got {len(options)}")
    if len(options) > len(LETTERS):
        raise RowError(f"at most {len(LETTERS)} options have a letter, got {len(options)}")
    for option in options:
        if not isinstance(option, str) or not option.strip():
            raise RowError(f"every option must be a non-empty text, got {option!r}")
    texts = tuple(option.strip() for option in options)
    folded = [text.casefold() for text in texts]
    if twice := next((text for text in texts if folded.count(text.casefold()) > 1), None):
        raise RowError(f"option {twice!r} stands twice in the list")
    return texts


def _gold(row: Mapping[str, Any], options: tuple[str, ...], multi: bool) -> Any:
    answer, kind = row["answer"], row["kind"]
    if isinstance(answer, str):
        answer = answer.strip()
    if answer == "" or (isinstance(answer, list | tuple | Mapping) and not answer):
        raise RowError("answer is empty")
    if kind == "option":
        if not multi:
            return _letter(answer, options)
        parts = answer.split(",") if isinstance(answer, str) else _sequence(answer, "answer")
        return ",".join(sorted({_letter(part, options) for part in parts}))
    if kind == "yesno":
        words = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
        word = words.get(str(answer).lower())
        if word is None:
            raise RowError(f"a yesno answer must be yes or no, got {answer!r}")
        return word
    if kind == "numeric":
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise RowError(f"a numeric answer must be a number or a text such as '140 mm', got {answer!r}")
    elif not isinstance(answer, str):
        raise RowError(f"an answer of kind {kind!r} must be a text, got {answer!r}")
    return answer


def _letter(answer: Any, options: tuple[str, ...]) -> str:
    """The letter an option answer names, by letter or by the option's text."""
    if not isinstance(answer, str):
        raise RowError(f"an option answer must be a letter or an option's text, got {answer!r}")
    answer = answer.strip()
    by_text = [LETTERS[i] for i, text in enumerate(options) if text.casefold() == answer.casefold()]
    by_letter = [answer.upper()] if len(answer) == 1 and answer.upper() in LETTERS[: len(options)] else []
    named = {*by_text, *by_letter}
    if not named:
        raise RowError(f"answer {answer!r} is none of the {len(options)} options")
    if len(named) > 1:
        raise RowError(f"answer {answer!r} is the letter of one option and the text of another")
    return named.pop()


def _image(image: Any, base_dir: str | Path | None) -> str | bytes:
    """A path (str), encoded bytes, a PIL image, or the {"bytes", "path"} of a Hugging Face image column."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | Path) and str(image).strip():
        if str(image).startswith(("http://", "https://", "data:")):
            raise RowError(f"images are paths or bytes, not addresses: {str(image)[:60]!r}; fetch it first")
        return str(Path(base_dir or ".").joinpath(Path(image).expanduser()).resolve())
    if hasattr(image, "save") and hasattr(image, "tobytes"):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()
    raise RowError(f"an image must be a path, bytes or a PIL image, got {type(image).__name__}")
