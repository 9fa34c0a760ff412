"""The data row: what a question looks like in a file, and what is wrong with a bad one.

The loader, `rewards check`, curation and evaluation read rows here and nowhere else, so that all say the same of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from rewards.base import Reward, RewardInput
from rewards.choices import by_letter, own_labels, unlettered
from rewards.compose import label_check
from rewards.imports import hint
from rewards.kinds import LETTERS, Kind, KindError, find

FIELDS = ("id", "images", "question", "messages", "options", "answer", "kind", "unit", "tolerance", "meta")
REQUIRED = ("id", "images", "answer", "kind")  # and one of question, messages
TOLERANCES = ("rel", "abs", "lower", "upper", "exact")
# What other projects call the fields of a row.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("qid", "question_id", "uid", "index", "idx"),
    "images": tuple("image img imgs image_path image_paths img_path image_name image_file file_name".split()),
    "question": ("prompt", "query", "problem", "instruction", "input", "text"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "turns"),
    "options": ("choices", "choice", "candidates"),
    "answer": tuple("label labels gold target solution ground_truth gt_answer gt response output".split()),
    "kind": ("type", "question_type", "answer_type", "task"),
    "unit": ("units",),
    "tolerance": ("tol", "margin"),
    "meta": ("metadata", "extra_info", "extra", "info"),
}
_OURS = {other: name for name, others in OTHER_NAMES.items() for other in others}

LabelCheck = Callable[[RewardInput], "str | None"]


class RowError(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class Row:
    """A usable row. images: as the row has them. options: without letters. gold: as rewards get it. kind: its name.

    meta: the row's meta, with `unit` and `tolerance`. `gold` is a letter for option rows ("A,C" with `meta.multi`),
    "yes" or "no" for yesno rows, the answer as given for the others. turns: the conversation, {"role", "content"} each,
    content a list of text and image parts; question: the text of its last turn.
    """

    id: str
    images: tuple[Any, ...]
    question: str
    options: tuple[str, ...]
    gold: Any
    kind: str
    meta: Mapping[str, Any]
    turns: tuple[Mapping[str, Any], ...]

    @property
    def sample(self) -> RewardInput:
        """What a reward sees of it before there is a completion."""
        return RewardInput("", self.gold, self.options, self.question, self.images, kind=self.kind, meta=self.meta)


def read_row(row: Mapping[str, Any], check: LabelCheck | None = None) -> Row:
    """Check one row. Raises RowError with the first thing that is wrong. No image is opened.

    check: the `check_gold` of the reward that will judge; by default `compose.label_check` of the row's kind.
    """
    row = {key: plain(value) for key, value in row.items() if not _missing(value)}
    _check_fields(row)
    _check_texts({key: value for key, value in row.items() if key != "images"})
    kind = _kind(row["kind"])
    images = tuple(_sequence(row["images"], "images"))
    turns = _turns(row, len(images))
    question = "\n".join(part["text"] for part in turns[-1]["content"] if part["type"] == "text")
    meta = _meta(row, kind)
    options = _options(row, kind)
    answer = row["answer"].strip() if isinstance(row["answer"], str) else row["answer"]
    if isinstance(answer, str | list | Mapping) and not answer and not (kind.empty and answer == []):
        raise RowError("answer is empty")
    _check_letters(options, answer)
    for image in images:
        _check_image(image)
    given = Row(str(row["id"]).strip(), images, question, options, answer, row["kind"], meta, turns)
    try:
        read = Row(**{**vars(given), "gold": kind.read(given.sample)})
    except ValueError as error:
        raise RowError(str(error)) from None
    if problem := label_problem(read.sample, check or label_check(read.kind)):
        raise RowError(problem)
    return read


def _turns(row: Mapping[str, Any], images: int) -> tuple[Mapping[str, Any], ...]:
    """The turns of a row's question or messages, each content a list of parts.

    `messages` is a list of {"role", "content"}: at most one system turn, which comes first, then user and assistant
    turns by turns, the last of them the user's. Content is a text, or a list of {"type": "text", "text": ...} and
    {"type": "image"}, the images in the order of the row's `images`. Images that no turn places come before the text of
    the last turn, where a `question` has them.
    """
    if "question" in row and "messages" in row:
        raise RowError("a row has either a question or messages, this one has both")
    if "question" in row:
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise RowError("question must be a non-empty text")
        turns = [{"role": "user", "content": row["question"]}]
    elif "messages" in row:
        turns = _sequence(plain(row["messages"]), "messages")
    else:
        raise RowError("field 'question' is missing or empty (or give a conversation as 'messages')")
    messages = [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    roles = [m["role"] for m in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise RowError(
            f"messages are an optional system turn, then user and assistant by turns, ending with user; got "
            f"{', '.join(roles)}"
        )
    placed = sum(part["type"] == "image" for m in messages for part in m["content"])
    last = messages[-1]["content"]
    if not placed:
        last[:0] = [{"type": "image"} for _ in range(images)]
    elif placed != images:
        raise RowError(f"messages place {placed} images and the row has {images}")
    return tuple(messages)


def _turn(turn: Any, number: int) -> dict[str, Any]:
    """One turn of `messages`, its content as a list of parts with stripped texts."""
    where = f"messages, turn {number}"
    if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
        raise RowError(f"{where}: a turn is a mapping with role and content, got {turn!r}")
    if turn["role"] not in ("system", "user", "assistant"):
        raise RowError(f"{where}: role must be system, user or assistant, got {turn['role']!r}")
    content = turn["content"]
    parts = (
        [{"type": "text", "text": content}]
        if isinstance(content, str)
        else _sequence(plain(content), f"{where}: content")
    )
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


def _check_image(image: Any) -> None:
    """A path, encoded bytes, a PIL image, the {"bytes", "path"} of a Hugging Face image column, or the {"volume": path,
    ...} of slices; not what it holds.
    """
    held = (
        next(filter(None, map(image.get, ("bytes", "path", "volume"))), None) if isinstance(image, Mapping) else image
    )
    if isinstance(held, str) and held.startswith(("http://", "https://", "data:")):
        raise RowError(f"images are paths or bytes, not addresses: {held[:60]!r}; fetch it first")
    usable = str(held).strip() if isinstance(held, str | PathLike) else isinstance(held, bytes | bytearray)
    if not usable and not (hasattr(held, "save") and hasattr(held, "tobytes")):
        raise RowError(f"an image must be a path, bytes or a PIL image, got {type(held).__name__}")


def label_problem(sample: RewardInput, check: LabelCheck) -> str | None:
    """Why the reward cannot judge this label. An own check that raises has found one that it does not understand."""
    try:
        return check(sample)
    except Exception as error:
        owner = getattr(check, "__self__", None)
        name = owner.name if isinstance(owner, Reward) else "the reward"
        return f"{name} cannot check the label {sample.gold!r}: {type(error).__name__}: {error}"


def unchecked(sample: RewardInput) -> None:
    """For rows whose labels were checked before."""


def plain(value: Any) -> Any:
    """Arrays and scalars of numpy as builtin data, tuples as lists: a table's cell is what the same JSON would be."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _missing(value: Any) -> bool:
    """Tables fill absent cells with None or nan."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_fields(row: Mapping[str, Any]) -> None:
    for name in row:
        if name not in FIELDS:
            near = f" (did you mean {_OURS[name]!r}?)" if name in _OURS else hint(name, FIELDS)
            raise RowError(f"unknown field {name!r}{near}; other facts belong under 'meta'")
    for name in REQUIRED:
        if name not in row:
            more = "; use [] for a question without an image" if name == "images" else ""
            raise RowError(f"field {name!r} is missing or empty{more}")
    if not isinstance(row["id"], str | int) or isinstance(row["id"], bool) or not str(row["id"]).strip():
        raise RowError(f"id must be a non-empty text or an integer, got {row['id']!r}")


def _check_texts(row: Mapping[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"it holds half of a character, {error.object[error.start]!r}, which no UTF-8 text can"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"it cannot be written as JSON: {error}") from None


def _kind(name: Any) -> Kind:
    try:
        return find(name)
    except (KindError, TypeError) as error:
        raise RowError(str(error)) from None


def _meta(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    meta = row.get("meta", {})
    if not isinstance(meta, Mapping):
        raise RowError(f"meta must be a mapping, got {type(meta).__name__}")
    merged = {key: plain(value) for key, value in meta.items() if not _missing(value)}
    for name in ("unit", "tolerance"):
        if name not in row:
            continue
        if name not in kind.fields:
            raise RowError(f"{name!r} belongs to kind 'numeric', this row is {row['kind']!r}")
        if name in merged and merged[name] != row[name]:
            raise RowError(f"{name!r} stands in the row and, differently, in its meta")
        merged[name] = row[name]
    if not isinstance(merged.get("multi", False), bool):
        raise RowError(f"meta.multi is true or false, got {merged['multi']!r}")
    if "tolerance" in merged:
        merged["tolerance"] = _tolerance(merged["tolerance"])
    return merged


def _tolerance(tolerance: Any) -> dict[str, Any]:
    if not isinstance(tolerance, Mapping):
        raise RowError(f"tolerance must be a mapping such as {{'abs': 5}} or {{'rel': 0.05}}, got {tolerance!r}")
    kept = {key: value for key, value in tolerance.items() if not _missing(value)}
    for key, value in kept.items():
        if key not in TOLERANCES:
            raise RowError(f"unknown tolerance {key!r}; use one of {', '.join(TOLERANCES)}{hint(key, TOLERANCES)}")
        if key == "exact":
            valid = isinstance(value, bool)
        else:
            valid = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
            valid = valid and (value >= 0 or key in ("lower", "upper"))
        if not valid:
            raise RowError(f"tolerance {key!r} cannot be {value!r}")
    return kept


def _sequence(value: Any, name: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise RowError(f"{name} must be a list, got {type(value).__name__}")
    return list(value)


def _options(row: Mapping[str, Any], kind: Kind) -> tuple[str, ...]:
    given = row.get("options", [])
    try:
        options = by_letter(given) if isinstance(given, Mapping) else _sequence(given, "options")
    except ValueError as error:
        raise RowError(str(error)) from error
    if "options" not in kind.fields:
        if options:
            raise RowError(f"options belong to kind 'option', this row is {row['kind']!r}")
        return ()
    if len(options) < 2:
        raise RowError(f"kind {row['kind']!r} needs at least two options, got {len(options)}")
    if len(options) > len(LETTERS):
        raise RowError(f"at most {len(LETTERS)} options have a letter, got {len(options)}")
    for option in options:
        if not isinstance(option, str) or not option.strip():
            raise RowError(f"every option must be a non-empty text, got {option!r}")
    texts = unlettered(tuple(option.strip() for option in options))
    folded = [text.casefold() for text in texts]
    if twice := next((text for text in texts if folded.count(text.casefold()) > 1), None):
        raise RowError(f"option {twice!r} stands twice in the list")
    return texts


def _check_letters(options: tuple[str, ...], answer: Any) -> None:
    """A letter as the answer means a place; another option that carries this letter in its text would mean that one."""
    own = own_labels(options)
    for letter in answer if isinstance(answer, list) else [answer]:
        named = letter.strip(" ().:").upper() if isinstance(letter, str) else ""
        if named in LETTERS and named in own and own.index(named) != LETTERS.index(named):
            raise RowError(
                f"answer {letter!r} is the option at that place or {options[own.index(named)]!r}, whose own letter it "
                "is: write the options without letters, or the answer as a text"
            )
