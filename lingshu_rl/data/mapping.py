"""Records of other people's layouts as data rows: one language for every file that holds questions.

A layout says which column (or path into one) holds which field of a row; what a value then means (a letter, an index, an
option's text, a conversation, an image in base64) is read here by its form, the same for every layout.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.data.rows import FIELDS, RowError
from rewards.imports import hint
from rewards.kinds import LETTERS, guess
from rewards.rows import plain

Record = Mapping[str, Any]
GROUPS = ("meta.", "tolerance.")  # fields of the row's mappings, one by one
CHANGES = ("from", "as", "base", "split", "names")
TURNS = ("each", "last")
IMAGE_FOLDERS = ("", "images", "imgs", "Images", "img", "figures", "images/images_normalized", "files")
IMAGE_ENDINGS = ("", ".jpg", ".png", ".jpeg")


class MappingError(ValueError):
    """A mapping that says nothing sensible; the text names the key and what to write."""


# --------------------------------------------------------------------------------------------------- columns and paths


def is_missing(value: Any) -> bool:
    """Tables fill what they do not have with None, nan or nothing."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def at_path(value: Any, path: str) -> Any:
    """What stands at "column", "column.key.0" or "column.*.key" (all of a list), or None. JSON in a cell is looked into."""
    if isinstance(value, dict) and path in value:
        return value[path]
    head, _, rest = path.partition(".")
    if isinstance(value, str) and value[:1] in "[{":
        value = _literal(value)
    value = plain(value)
    if head == "*" and isinstance(value, list):
        return [at_path(item, rest) if rest else item for item in value]
    if isinstance(value, Mapping):
        found = value.get(head)
    elif isinstance(value, list) and re.fullmatch(r"-?\d+", head) and -len(value) <= int(head) < len(value):
        found = value[int(head)]
    else:
        return None
    return at_path(found, rest) if rest else found


def _literal(text: str) -> Any:
    """A list or mapping written into a cell, as JSON or as Python prints it, or the text where it is neither."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text


Expression = Callable[[Record], Any]
_HOLE = re.compile(r"\{([^{}]+)\}")


def expression(given: Any, key: str) -> Expression:
    """What `map` says of a field: a path, paths between "|" of which the first that has something counts, a text with
    {path} in it, a list of those (their values together), or {from: one of these, as, base, split, names}: see `changed`.
    """
    if isinstance(given, str) and given.strip():
        return _first([_one(part.strip()) for part in given.split("|")])
    if isinstance(given, list) and given:
        return _together([expression(part, key) for part in given])
    if isinstance(given, Mapping) and "from" in given:
        if unknown := set(map(str, given)) - set(CHANGES):
            raise MappingError(f"{key}: unknown {min(unknown)!r}; beside `from` stand {', '.join(CHANGES[1:])}")
        return _changed(expression(given["from"], key), given)
    raise MappingError(
        f"{key}: {given!r} is neither a column, a list of columns, nor {{from: column, ...}}; constants belong under values"
    )


def _one(part: str) -> Expression:
    if not _HOLE.search(part):
        return lambda record: at_path(record, part)

    def filled(record: Record) -> Any:
        found = {path: at_path(record, path) for path in _HOLE.findall(part)}
        if any(map(is_missing, found.values())):
            return None
        return _HOLE.sub(lambda hole: _told(found[hole[1]]), part)

    return filled


def _told(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _first(parts: Sequence[Expression]) -> Expression:
    def found(record: Record) -> Any:
        return next((value for part in parts if not is_missing(value := part(record))), None)

    return parts[0] if len(parts) == 1 else found


def _together(parts: Sequence[Expression]) -> Expression:
    def found(record: Record) -> Any:
        values = [part(record) for part in parts]
        while values and is_missing(values[-1]):
            values.pop()
        return values or None

    return found


def _changed(source: Expression, change: Mapping[str, Any]) -> Expression:
    """as: what a value stands for, by the value. split: the text's parts between these. base: from where an index counts.

    names: true for {name: truth} columns, of which the true ones' names are meant.
    """
    told = {_key(key): value for key, value in (change.get("as") or {}).items()}
    split = change.get("split")

    def found(record: Record) -> Any:
        value = plain(source(record))
        if is_missing(value):
            return None
        if split:
            value = [part.strip() for part in str(value).split(split) if part.strip()]
        if change.get("names"):
            value = [name for name, true in value.items() if true]
        return _looked_up(value, told) if told else value

    return found


def _looked_up(value: Any, told: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_looked_up(item, told) for item in value]
    if _key(value) not in told:
        raise RowError(f"{value!r} has no meaning: `as` names {', '.join(told)}; leave such records out with `where`")
    return told[_key(value)]


def _key(value: Any) -> str:
    """By what values are compared: 1, "1" and "1.0" are one."""
    text = str(value).strip()
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


# ----------------------------------------------------------------------------------------------------------- conditions

_CONDITION = re.compile(r"\s*(.+?)\s*(==|!=|>=|<=|>|<|\bnot in\b|\bin\b)\s*(.+?)\s*")
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: _key(a) == _key(b),
    "!=": lambda a, b: _key(a) != _key(b),
    "in": lambda a, b: _key(a) in map(_key, b),
    "not in": lambda a, b: _key(a) not in map(_key, b),
    ">": lambda a, b: float(a) > float(b),
    "<": lambda a, b: float(a) < float(b),
    ">=": lambda a, b: float(a) >= float(b),
    "<=": lambda a, b: float(a) <= float(b),
}


def condition(text: str) -> Callable[[Record], bool]:
    """Which records are meant: `q_lang == en and modality in [CT, MRI]`. Raises MappingError.

    A missing value is equal to nothing, and above and below nothing.
    """
    import yaml

    tests = []
    for part in re.split(r"\s+and\s+", text.strip()) if text.strip() else ():
        match = _CONDITION.fullmatch(part)
        value = yaml.safe_load(match[3]) if match else None
        if match is None or isinstance(value, list) != match[2].endswith("in"):
            raise MappingError(
                f"where: {part!r} is not COLUMN == VALUE (or !=, <, <=, >, >=) or COLUMN in [VALUE, ...]"
            )
        tests.append((match[1], match[2], value))

    def meant(record: Record) -> bool:
        return all(_holds(at_path(record, path), word, value) for path, word, value in tests)

    return meant


def _holds(found: Any, word: str, value: Any) -> bool:
    if is_missing(found):
        return word in ("!=", "not in")
    try:
        return _COMPARE[word](found, value)
    except ValueError:
        raise RowError(f"where: {found!r} {word} {value!r} compares no numbers") from None


# -------------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """How records become rows.

    map: a row's field ("question", "meta.modality") -> what holds it, see `expression`. A field that it does not name is
    taken from the column of that name. values: field -> constant, where the record has nothing. where: see `condition`.
    each: paths of lists, a row for each of their items (several lists go side by side). turns: of a conversation, a row
    for `each` answer in it or for the `last`.
    """

    map: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    each: Sequence[str] = ()
    turns: str = "each"

    def __post_init__(self) -> None:
        for key, names in (("map", self.map), ("values", self.values)):
            for name in names:
                if name not in FIELDS and not str(name).startswith(GROUPS):
                    raise MappingError(
                        f"{key}: {name!r} is no field of a row{hint(str(name), FIELDS)}; fields are {', '.join(FIELDS)} and meta.NAME"
                    )
        if self.turns not in TURNS:
            raise MappingError(f"turns: {self.turns!r} is not one of {', '.join(TURNS)}")


class Mapper:
    """Makes rows of records.

    find_image: the path that an image's name means. strict: a label must make sense; else the row goes without being
    read further. seen: fields that some record had.
    """

    def __init__(self, layout: Layout, find_image: Callable[[str], str] = str, strict: bool = True) -> None:
        self.layout, self.find_image, self.strict = layout, find_image, strict
        asked = {"question", "messages"} & layout.map.keys()  # a row has one of them
        own = [name for name in FIELDS if not asked or name not in ("question", "messages")]
        fields = {name: name for name in own} | dict(layout.map)
        self.fields = {name: expression(given, f"map.{name}") for name, given in fields.items()}
        self.meant = condition(layout.where)
        answer = layout.map.get("answer")
        self.base = answer.get("base") if isinstance(answer, Mapping) else None
        if self.base not in (None, 0, 1) or isinstance(self.base, bool):
            raise MappingError(f"map.answer.base: {self.base!r} is not where an index may start: 0 or 1")
        self.seen: set[str] = set()

    def __call__(self, record: Any) -> list[Any]:
        """The rows of a record, or RowErrors in their place; none where `where` leaves it out."""
        if isinstance(record, RowError):
            return [record]
        try:
            parts = list(self._parts(record)) if self.meant(record) else []
        except RowError as error:
            return [error]
        rows = [row for part in parts for row in self._rows(part)]
        known: Counter[str] = Counter()
        for row in rows:
            if isinstance(row, dict) and "id" in row:  # the record's id is that of its first row
                known[row["id"]] += 1
                row["id"] += f"/{known[row['id']]}" if known[row["id"]] > 1 else ""
        return rows

    def _parts(self, record: Record) -> Iterator[Record]:
        if not self.layout.each:
            yield record
            return
        lists = {path: at_path(record, path) for path in self.layout.each}
        for path, items in lists.items():
            if not isinstance(plain(items), list):
                raise RowError(f"each: {path!r} is no list in this record")
        if len({len(items) for items in lists.values()}) > 1:
            raise RowError(f"each: {', '.join(lists)} are lists of unequal length")
        for items in zip(*map(plain, lists.values()), strict=True):
            yield {**record, **dict(zip(lists, items, strict=True))}

    def _rows(self, record: Record) -> list[dict[str, Any] | RowError]:
        """One row, or one for each answer of a conversation, of which some may be faulty."""
        try:
            row = self._fields(record)
            conversation = row.pop("messages", None)
            asked = [row]
            if conversation is not None:
                asked = [row | one for one in _asked(conversation, row["images"], self.layout.turns, "answer" in row)]
        except RowError as error:
            return [error]
        return [self._row(one) for one in asked]

    def _fields(self, record: Record) -> dict[str, Any]:
        found = {}
        for name, get in self.fields.items():
            value = get(record)
            if not is_missing(value) and (name not in ("meta", "tolerance") or isinstance(value, Mapping)):
                found[name] = value
                self.seen.add(name)
        row = {**self.layout.values, **found}
        return {**row, "images": images_of(row.get("images"))}

    def _row(self, row: dict[str, Any]) -> dict[str, Any] | RowError:
        images = row["images"]
        if "question" in row:
            row |= _placed(_told(row.pop("question")), len(images))
        row |= groups_of(row)
        try:
            row = labelled(dict(row), self.base)
        except RowError as error:
            if self.strict:
                return error
        if "id" in row:
            row["id"] = str(row["id"])
        row["images"] = [self.find_image(image) if isinstance(image, str) else image for image in images]
        return row


def groups_of(row: dict[str, Any]) -> dict[str, Any]:
    """Takes "meta.NAME" and "tolerance.NAME" out of the row: the row's mappings with them."""
    made: dict[str, dict[str, Any]] = {}
    for name in [n for n in row if n.startswith(GROUPS)]:
        group, _, key = name.partition(".")
        value = row.pop(name)
        held = made.setdefault(group, dict(row.get(group) or {}))
        held.setdefault(key, _number(value) if group == "tolerance" else value)
    return made


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# --------------------------------------------------------------------------------------------------------------- labels


def labelled(row: dict[str, Any], base: int | None) -> dict[str, Any]:
    """The row with its options as texts, its answer as a letter where it was an index, and a kind. Raises RowError."""
    options = texts_of(row.pop("options", None))
    answer = _bare(row.get("answer"))
    if row.get("kind", "option") == "option":
        row, options = _without_options(row, options, answer)
    kind = row.get("kind") or guess(answer, options, tuple(row))
    if options:
        answer = _choice(answer, options, base)
        if isinstance(answer, list):
            row["meta"] = {**row.get("meta", {}), "multi": True}
        row["options"] = options
    elif base is not None:
        raise RowError(
            "the answer is said to be an index (base), but this record has no options; map.options says where they are"
        )
    elif "kind" not in row and isinstance(answer, str) and re.fullmatch(r"[A-H]", answer):
        raise RowError(
            f"answer {answer!r} looks like the letter of an option, but the row has none: map.options says where they are, "
            "for example options: [A, B, C, D]; or give the kind under values"
        )
    if isinstance(answer, int | float) and not isinstance(answer, bool) and kind != "numeric":
        answer = f"{answer:g}" if isinstance(answer, float) else str(answer)
    return {**row, "answer": answer, "kind": kind} if answer is not None else {**row, "kind": kind}


def _bare(answer: Any) -> Any:
    """A label without what training formats put around it: tags, a box; of soft labels {answer: score} the best."""
    if isinstance(answer, Mapping) and answer and all(isinstance(v, int | float) for v in answer.values()):
        answer = max(answer, key=lambda key: answer[key])
    if not isinstance(answer, str):
        return answer
    tagged = re.search(r"<answer>(.*?)</answer>\s*$", answer, re.DOTALL)
    text = (tagged[1] if tagged else answer).strip()
    boxed = re.fullmatch(r"\$*\\boxed\{(?:\\text\{)?(.*?)\}?\}\$*", text, re.DOTALL)
    return boxed[1].strip() if boxed else text


def _choice(answer: Any, options: Sequence[str], base: int | None) -> Any:
    """The letter that an index means; what is no index stays as it is, several letters become a list."""
    if isinstance(answer, list):
        found = [_choice(item, options, base) for item in answer]
        return found if len(found) > 1 else found[0] if found else None
    number = int(answer) if isinstance(answer, float) and answer == int(answer) else answer
    if isinstance(number, str) and re.fullmatch(r"\d+", number) and (base is not None or number not in options):
        number = int(number)
    if (
        isinstance(number, int)
        and not isinstance(number, bool)
        and str(number) not in (options if base is None else ())
    ):
        if base is None:
            raise RowError(
                f"answer {answer!r} is an index, and the mapping does not say from where it counts: "
                "answer: {from: COLUMN, base: 0} (or 1)"
            )
        if not 0 <= number - base < len(options):
            raise RowError(f"answer {answer!r} is outside the {len(options)} options when they are counted from {base}")
        return LETTERS[number - base]
    letters = LETTERS[: len(options)]
    if isinstance(number, str) and len(number) > 1 and number not in options:
        picked = re.sub(r"[,;\s]", "", number)
        apart = picked != number or sorted(picked) == list(picked)
        if apart and len(picked) > 1 and set(picked) <= set(letters) and len(set(picked)) == len(picked):
            return list(picked)
    return number


_MARK = r"^\(?{}(?:\s*[.:、)．：]\s*|\s+(?=\S))"  # all options must carry theirs: "A vitamin" may be an option's text


def texts_of(options: Any) -> list[str]:
    """Options from a list of texts or of {{letter, text}} mappings, a mapping by letter, or one of these in a cell."""
    options = plain(options)
    if isinstance(options, str):
        options = _listed(options.strip())
    if isinstance(options, list) and len(options) == 1 and isinstance(options[0], list | Mapping):
        options = options[0]
    if isinstance(options, Mapping):
        options = _by_key(options)
    texts = [_option_text(option) for option in options or ()]
    while texts and not texts[-1]:
        texts.pop()
    marks = [re.match(_MARK.format(letter), text, re.IGNORECASE) for letter, text in zip(LETTERS, texts, strict=False)]
    bare = [text[m.end() :].strip() for text, m in zip(texts, marks, strict=False) if m]
    return bare if len(set(bare)) == len(texts) else texts  # "A wave", "B wave": no marks


def _listed(text: str) -> Any:
    """Options in one cell: JSON or Python, parts with their marks, between "|", or a line each."""
    if text[:1] in "[{" and not isinstance(found := _literal(text), str):
        return found
    parts = inline_options("\n" + text)[1] or re.split(r"\s*\|\s*" if "|" in text else "\n", text)
    if len(parts) < 2:
        raise RowError("options are a text without A, B, ... marks; say at what to split it: {from: COLUMN, split: ;}")
    return parts


def _by_key(options: Mapping[Any, Any]) -> list[Any]:
    """In the order of their letters, or of their numbers."""
    kept = {str(key).strip(): value for key, value in options.items() if not is_missing(value)}
    if all(re.fullmatch(r"\d+", key) for key in kept):
        return [kept[key] for key in sorted(kept, key=int)]
    if sorted(map(str.upper, kept)) != list(LETTERS[: len(kept)]):
        raise RowError(f"options by letter must be A, B, ... without a gap, got {', '.join(map(str, options))}")
    return [kept[key] for key in sorted(kept, key=str.upper)]


def _option_text(option: Any) -> str:
    if isinstance(option, Mapping):
        option = next(
            (option[k] for k in ("text", "content", "value", "label_text") if not is_missing(option.get(k))), ""
        )
    return "" if is_missing(option) else str(option).strip()


_STARTS = re.compile(r"(?:^|(?<=[\s,;(?.:]))\(?([A-J])\s?[).:、．：]\s*(?=\S)", re.MULTILINE)
_ASKS = re.compile(r"\s*(?:answer\s+)?(?:choices|options|选项)\s*[:：]?\s*$", re.IGNORECASE)


def inline_options(question: str) -> tuple[str, list[str]]:
    """A question and the options written into its text ("Which? A) x, B) y"); no options where there are no such marks.

    What stands on lines after the last option tells how to answer, and is left out: the run's own instruction does that.
    """
    marks = list(_STARTS.finditer(question))
    for first in (n for n in reversed(range(len(marks))) if marks[n][1] == "A"):
        run = marks[first:]
        if len(run) >= 2 and [m[1] for m in run] == list(LETTERS[: len(run)]):
            ends = [*(m.start() for m in run[1:]), len(question)]
            texts = [question[m.end() : end] for m, end in zip(run, ends, strict=True)]
            texts[-1] = texts[-1].strip().split("\n")[0]
            return _ASKS.sub("", question[: run[0].start()]).strip(), [t.strip().rstrip(",;").strip() for t in texts]
    return question, []


def _without_options(row: dict[str, Any], options: list[str], answer: Any) -> tuple[dict[str, Any], list[str]]:
    """Options stand in their field alone: taken out of the question that repeats them, or that alone has them."""
    last = row["messages"][-1]["content"][-1] if "messages" in row else {"text": row.get("question")}
    question = last.get("text") or ""
    stem, inline = inline_options(question)
    if not inline or not stem:
        return row, options
    letters = LETTERS[: len(inline)]
    means = isinstance(answer, str) and (answer in letters or answer in inline or _leads(answer, inline))
    if [t.casefold() for t in inline] != [t.casefold() for t in options] if options else not means:
        return row, options
    if "messages" in row:
        last["text"] = stem
        return row, inline
    return {**row, "question": stem}, inline


def _leads(answer: str, options: Sequence[str]) -> bool:
    """ "B. left": a letter with the text of that option."""
    match = re.match(r"\(?([A-J])\s*[.:)]\s*", answer)
    return match is not None and answer[match.end() :].strip() in options[LETTERS.index(match[1]) :][:1]


# -------------------------------------------------------------------------------------------------------- conversations

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "system": "system"}  # fmt: skip
_PLACE = re.compile(r"\s*(?:<image>|<image_\d+>|<\|image_\d+\|>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>)\s*")


def _asked(conversation: Any, images: list[Any], turns: str, labelled: bool) -> list[dict[str, Any]]:
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
        conversation = _literal(conversation)
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


def _placed(question: str, images: int) -> dict[str, Any]:
    """A question without placeholders where they stand in front, as a turn with its images in place where they do not."""
    parts = _parts(question, [], own=False)
    if sum(part["type"] == "image" for part in parts) not in (0, images) or not parts:
        return {"question": question}
    return _question_of([{"role": "user", "content": parts}])


# --------------------------------------------------------------------------------------------------------------- images


def images_of(value: Any) -> list[Any]:
    """A list of paths and bytes from a path, bytes, base64, {bytes, path}, {placeholder: path}, or lists of these."""
    value = plain(value)
    if isinstance(value, str):
        text = value.strip()
        if text[:1] == "[":
            return images_of(_literal(text)) if _literal(text) != text else [text]
        if "|" in text and not text.startswith("data:"):
            return [image for part in text.split("|") for image in images_of(part)]
        return [_decoded(text)] if text else []
    if isinstance(value, list):
        return [image for item in value for image in images_of(item)]
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


class ImageFinder:
    """The file that an image's name means: in the folders given, in their usual image folders, with the usual endings.

    A name that is nowhere is taken as standing in the first folder.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.places = [(folder / inner, ending) for folder in folders for inner in IMAGE_FOLDERS for ending in IMAGE_ENDINGS]  # fmt: skip
        self.first = folders[0] if folders else Path()

    def __call__(self, name: str) -> str:
        path = Path(name).expanduser()
        if path.is_absolute() or name.startswith(("http://", "https://")):
            return name
        found = (folder / f"{name}{ending}" for folder, ending in self.places)
        return str(next((file for file in found if file.is_file()), self.first / path).resolve())
