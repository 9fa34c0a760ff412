"""What a short text asserts in quantities.

`read` drops what is denied ("not 5"), what is commentary ("(normal 3-5)"), the formula before a result
("70/1.75^2 = 22.9") and premises of another dimension ("for a weight of 70 kg"). It evaluates nothing: an unfinished
calculation is a problem, not a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rewards.numbers import clean, spell_digits
from rewards.quantity import OPERATORS, Quantity, quantity_at
from rewards.tokens import Token, tokenise
from rewards.units import ONE, match_unit

MAX_LENGTH = 2000

_ENDS = re.compile(r"\s?(?:$|[.,;:)])")
_CALCULATION = "an unfinished calculation"
_NAMED = ("stage", "grade", "class", "type", "category", "phase", "step", "figure", "table")
_EQUALS = ("=", "≈", "→", "->", "=>")
_ONLY_A_NUMBER = re.compile(
    r"(?:(?:the|a|an|my|final|total|score|value|is|of|about|approximately|exactly|minus|negative|[:=])\s?)*"
    r"\d+(?:\s[^\W\d_]+){0,2}(?:,?\s(?:and\s)?\d+(?:\s[^\W\d_]+)?|\s?(?:to|out of|of|/)\s?\d+(?:\s[^\W\d_]+)?)*[.!]?",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Quantities:
    """items: the asserted quantities in order. problem: why nothing may be read, else "". text: the cleaned text."""

    items: tuple[Quantity, ...] = ()
    problem: str = ""
    text: str = ""


def read(text: str) -> Quantities:
    """Every quantity that `text` (raw model or label text) asserts. Linear in the length; never raises on text."""
    cleaned = clean(text[: MAX_LENGTH * 2])
    if len(cleaned) > MAX_LENGTH or len(text) > MAX_LENGTH * 2:
        return Quantities(problem="too long to be an answer", text=cleaned[:80])
    if not any(character.isdigit() for character in cleaned):
        # Number words count only where nothing else is said: "three", "a score of three", "three weeks and two days".
        spelled = spell_digits(cleaned)
        if spelled == cleaned or _ONLY_A_NUMBER.fullmatch(spelled) is None:
            return Quantities(problem="no number", text=cleaned)
        cleaned = spelled
    tokens = tokenise(cleaned)
    if tokens is None:
        return Quantities(problem="a malformed number", text=cleaned)
    if any(token.kind == "wrong" for token in tokens):
        return Quantities(problem="the text calls a value wrong", text=cleaned)
    items, problem = _asserted(tokens)
    return Quantities(tuple(items), problem or ("" if items else "no number"), cleaned)


def unit_behind(text: str) -> str:
    """The unit that follows a closed answer, as in "\\boxed{5} mg": cleaned, or "" when anything else stands there."""
    line = clean(text.split("\n", 1)[0])
    found = match_unit(line, 0) if line else None
    return line[: found[1]] if found is not None and _ENDS.match(line, found[1]) is not None else ""


def _asserted(tokens: list[Token]) -> tuple[list[Quantity], str]:
    """Equal signs cut the text; a formula before the last of them says nothing, any other value must agree."""
    segments: list[list[Token]] = [[]]
    for token in tokens:
        if token.kind == "op" and token.text in _EQUALS:
            segments.append([])
        else:
            segments[-1].append(token)
    filled = [segment for segment in segments if any(token.kind == "num" for token in segment)]
    asserted: list[Quantity] = []
    for segment in filled:
        if segment is not filled[-1] and _is_formula(segment):
            continue
        items, problem = _items(segment)
        if problem:
            return [], problem
        asserted += items
    return asserted, ""


def _is_formula(segment: list[Token]) -> bool:
    marks = [token.text for token in segment if token.kind == "op" and token.text in OPERATORS]
    if any(token.kind == "call" for token in segment):
        return True
    return bool(marks) and (sum(token.kind == "num" for token in segment) > 1 or set(marks) - {"-", "+"} != set())


@dataclass(slots=True)
class _Clause:
    """What holds for the next number: a denial, a comparison, "between", or a premise ("for a weight of ...")."""

    denied: bool = False
    bound: str = ""
    words_since: int = 0  # "at least about 5" still binds, "above the usual level of 5" does not
    between: bool = False
    premise: bool = False
    leading: bool = False  # the premise opened the sentence: the verb after its comma ends it
    comma: bool = False


def _items(tokens: list[Token]) -> tuple[list[Quantity], str]:
    items: list[tuple[Quantity, bool]] = []  # with: stated in a premise
    clause = _Clause()
    sentence = 0  # index of the first item of this sentence
    is_first = True
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if token.kind == "num":
            previous = tokens[index - 1].text.lower() if index else ""
            item, index = quantity_at(tokens, index, clause.between)
            if item is None:
                return [], _CALCULATION
            if clause.bound:
                if item.form != "number":
                    return [], "a comparison with more than a number"
                item = replace(item, form="bound", sign=clause.bound)
            if not clause.denied and not _denied_after(tokens, index):
                items.append((item, clause.premise or _is_name(token, previous)))
            clause.bound, clause.between, is_first = "", False, False
            continue
        if token.kind == "break" or token.text in (".", ";"):
            clause, sentence, is_first = _Clause(), len(items), True
        elif token.kind == "call" or token.text in ("√", "^"):
            return [], _CALCULATION
        elif token.kind == "word" and token.text.lower() == "or" and items and _left_open(tokens[index + 1 :]):
            return [], "an alternative is left open"
        elif token.kind == "so":
            items[sentence:] = [(item, True) for item, _ in items[sentence:]]
            clause = _Clause(denied=clause.denied)
        else:
            _step(clause, token, is_first, len(items) > sentence)
            is_first = is_first and token.kind == "op"
        index += 1
    return _without_premises(items), ""


def _left_open(behind: list[Token]) -> bool:
    """After "5 or": words that name no other quantity ("or whatever is right"), rather than "or so"."""
    if not behind or behind[0].text.lower() in ("so", "thereabouts", "approximately", "about", "nearly"):
        return False
    return not any(token.kind in ("num", "break") for token in behind[:6])


def _step(clause: _Clause, token: Token, is_first: bool, has_item: bool) -> None:
    if token.kind == "not":
        clause.denied = True
    elif token.kind == "reset":
        clause.denied, clause.bound, clause.between = False, "", False
    elif token.kind == "cmp":
        clause.bound, clause.words_since = token.text, 0
    elif token.text in ("±", "+-", "+/-"):
        clause.bound, clause.words_since = "±", 0  # a spread without a centre
    elif token.kind == "between":
        clause.between = True
    elif token.text == ",":
        clause.bound, clause.comma = "", True
    elif token.kind == "is" and clause.leading and clause.comma:
        clause.premise = clause.leading = False
    elif token.kind == "lead" or token.text == "over":
        clause.premise = clause.premise or is_first or has_item
        clause.leading = clause.leading or is_first
    if token.kind in ("word", "lead", "is") and clause.bound:
        clause.words_since += 1
        if clause.words_since > 2:
            clause.bound = ""


def _without_premises(items: list[tuple[Quantity, bool]]) -> list[Quantity]:
    """Premises go when all else has a unit and theirs is of another dimension: they cannot be a second answer."""
    stated = [item for item, is_premise in items if not is_premise]
    dims = {item.unit.dims if item.unit is not None else None for item in stated}
    if not stated or None in dims:
        return [item for item, _ in items]
    return [item for item, is_premise in items if not is_premise or (item.unit or ONE).dims in dims]


def _is_name(token: Token, previous: str) -> bool:
    """ "stage 3", "grade 2": a name beside a quantity with a unit, the answer where nothing else is said."""
    return previous in _NAMED and token.unit is None


def _denied_after(tokens: list[Token], index: int) -> bool:
    """ "5 mg is not the dose": a denial right after the quantity and no other number behind it."""
    for offset, token in enumerate(tokens[index : index + 2]):
        if token.kind == "not" and (offset == 0 or tokens[index].kind == "is" or tokens[index].text == "would"):
            for after in tokens[index + offset :]:
                if after.kind == "num":
                    return False
                if after.kind in ("break", "reset") or after.text in (".", ";", ","):
                    break
            return True
    return False
