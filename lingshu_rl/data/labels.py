"""Labels by their form: options, letters, indices and texts of any layout as the options and the answer of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lingshu_rl.data.columns import is_missing, literal
from lingshu_rl.data.rows import RowError
from rewards.kinds import LETTERS, guess
from rewards.rows import plain


def labelled(row: dict[str, Any], base: int | None) -> dict[str, Any]:
    """The row with its options as texts, its answer as a letter where it was an index, and a kind. Raises RowError."""
    given = row.pop("options", None)
    options = texts_of(given)
    answer = _bare(row.get("answer"))
    if row.get("kind", "option") == "option":
        row, options = _without_options(row, options, answer)
    kind = row.get("kind") or guess(answer, options, tuple(row))
    if kind == "open" and (group := next((g for g in SAME_ZH if answer in g), None)):
        row["meta"] = {"synonyms": [word for word in group if word != answer], **row.get("meta", {})}
    if options:
        answer = _choice(answer, options, base)
        if _by_letters(given):
            options, answer = at_own_letters(options, answer)
        if isinstance(answer, list):
            row["meta"] = {**row.get("meta", {}), "multi": True}
        row["options"] = options
    elif base is not None:
        raise RowError(
            "the answer is said to be an index (base), but this record has no options; map.options says where they are"
        )
    elif "kind" not in row and isinstance(answer, str) and re.fullmatch(r"[A-H]", answer):
        raise RowError(
            f"answer {answer!r} looks like the letter of an option, but the row has none: map.options says where they "
            "are, for example options: [A, B, C, D]; or give the kind under values"
        )
    if isinstance(answer, int | float) and not isinstance(answer, bool) and kind != "numeric":
        answer = f"{answer:g}" if isinstance(answer, float) else str(answer)
    return {**row, "answer": answer, "kind": kind} if answer is not None else {**row, "kind": kind}


# Yes and no in the words of Chinese sets: a label and every word of its group are one answer.
SAME_ZH = (
    ("是", "是的", "有", "包含", "存在", "可以", "能", "对", "yes"),
    ("否", "不是", "没有", "不包含", "不存在", "不可以", "不能", "不", "no"),
)


def _bare(answer: Any) -> Any:
    """A label without what is put around it: tags, a box, marks of a printed list; of {answer: score} the best."""
    if isinstance(answer, Mapping) and answer and all(isinstance(v, int | float) for v in answer.values()):
        answer = max(answer, key=lambda key: answer[key])
    if not isinstance(answer, str):
        return answer
    tagged = re.search(r"<answer>(.*?)</answer>\s*$", answer, re.DOTALL)
    text = (tagged[1] if tagged else answer).strip()
    if re.match(r"[\[(]['\"]", text) and not isinstance(printed := literal(text), str):
        return list(printed) if isinstance(printed, list) and len(printed) > 1 else " ".join(map(str, printed))
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


def _by_letters(options: Any) -> bool:
    """Whether the layout gives options their letters, so that a letter as the answer is no option's text."""
    if isinstance(options, str) and options.lstrip()[:1] in ("[", "{"):
        options = literal(options)
    options = plain(options)
    if isinstance(options, list) and options and isinstance(options[0], Mapping):
        options = options[0]
        return len(options) == 1 or bool({"letter", "label", "key"} & options.keys())
    return isinstance(options, Mapping)


def at_own_letters(options: list[str], answer: Any) -> tuple[list[str], Any]:
    """Options whose texts are letters ("which of the marked is it?") at those letters, the answer with them.

    In {"A": "D", "D": "B"} a reply "D" is one option's letter and another's text; where both are one, there is no
    doubt.
    """
    letters = LETTERS[: len(options)]
    own = {text: place for place, text in enumerate(options) if len(text) == 1 and text in letters}
    if len(set(options)) < len(options) or all(letters[place] == text for text, place in own.items()):
        return options, answer
    others = iter([place for place, text in enumerate(options) if text not in own])
    order = [own[letter] if letter in own else next(others) for letter in letters]
    moved = {letters[old]: letter for letter, old in zip(letters, order, strict=True)}
    told = [moved.get(a, a) for a in answer] if isinstance(answer, list) else moved.get(answer, answer)
    return [options[place] for place in order], told


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
    if text[:1] in "[{" and not isinstance(found := literal(text), str):
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

    What stands on lines after the last option tells how to answer, and is left out: the run's own instruction does
    that.
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
