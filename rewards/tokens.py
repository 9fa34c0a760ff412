"""Tokens of a short text about quantities: numbers with their units, comparisons, denials, marks and words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.numbers import Literal, match_number
from rewards.text import table
from rewards.units import Unit, match_unit


@dataclass(slots=True)
class Token:
    """kind: num, op, cmp, after, not, reset, wrong, between, to, of, and, minus, so, is, lead, call, word or break.

    text: the mark or word, or the comparison it stands for. A num carries its literal, sign and the unit behind it;
    foreign: a word that is no known unit stands there.
    """

    kind: str
    start: int
    text: str = ""
    end: int = 0
    literal: Literal | None = None
    negative: bool = False
    unit: Unit | None = None
    foreign: bool = False

    @property
    def value(self) -> float:
        assert self.literal is not None
        return -self.literal.value if self.negative else self.literal.value


_PHRASE = re.compile(
    "|".join(rf"(?P<{kind}>{'|'.join(said)})" for kind, said in table("numbers")["phrases"].items()), re.IGNORECASE
)
_WORD = re.compile(r"[^\W\d_]\w*(?:[-'^]\w+)*")
_COMPARISON = re.compile(r"<\s?=|=\s?<|>\s?=|[<>]\s?or\s?(?:equal to|=)|[≤≥<>]")
_SYMBOL = re.compile(r"\+\s?/\s?-|\+-|±|->|=>|→|\.\.+|[-+/:×*^=≈~(),;.\[\]—√]")
_TIMES = re.compile(r"[xX]\s?\d")
_CALL = re.compile(r"\([^()\n\d]{0,40}\d")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.I)
_UNKNOWN_DENOMINATOR = re.compile(r"\s?[/·*]\s?[^\W\d_]|\sper\s[^\W\d_]")
_COMMENT = re.compile(
    r"\([^()\n]{0,120}?\b(?:normal|reference|ref|range|ci|confidence|iqr|target|sd|limit|cut-?off|threshold)\b"
    r"[^()\n]{0,120}\)",
    re.I,
)
# "22.9, a normal weight (18.5-24.9)": a range in brackets behind a value is what it is compared with.
_COMPARED = re.compile(r"\(\s?\d[\d.,]*\s?(?:-|to)\s?\d[\d.,]*(?:\s?[^()\d\n]{1,20})?\)")
_NOUN_END = re.compile(r"\s?(?:$|[^\w\s]|\n|(\w+))")
# After a number these words are no unit and no counted thing: the number simply has no unit.
_FUNCTION_WORDS = frozenset(table("numbers")["function_words"])
FOOT = 0.3048


def tokenise(text: str) -> list[Token] | None:
    """Tokens of cleaned text, or None when something looks like a number and is none."""
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        character = text[position]
        if character == " ":
            position += 1
        elif character == "\n":
            tokens.append(Token("break", position))
            position += 1
        elif character.isdigit() or (character == "." and text[position + 1 : position + 2].isdigit()):
            end = _number_token(text, position, tokens)
            if end is None:
                return None
            position = end
        elif character.isalpha():
            position = _word_token(text, position, tokens)
        elif character in "<>≤≥=" and (match := _COMPARISON.match(text, position)) is not None:
            tokens.append(Token("cmp", position, _comparison(match.group())))
            position = match.end()
        elif (match := _SYMBOL.match(text, position)) is not None:
            if character == "(" and (comment := _COMMENT.match(text, position)) is not None:
                position = comment.end()
                continue
            if (
                character == "("
                and any(token.kind == "num" for token in tokens)
                and tokens[-1].kind == "word"
                and (comment := _COMPARED.match(text, position)) is not None
            ):
                position = comment.end()
                continue
            symbol = match.group()
            if character == "-" and (sign := _sign(text, position, tokens)) != "operator":
                if sign == "unclear":
                    return None
                position += 1
                continue
            tokens.append(Token("op", position, symbol))
            position = match.end()
            if symbol in ")]+":
                position = _unit_behind(text, position, tokens)
        else:
            position += 1
    return tokens


def _comparison(symbol: str) -> str:
    is_strict = symbol in "<>"
    return ("<" if symbol[0] in "<≤" or symbol.startswith("=<") else ">") + ("" if is_strict else "=")


def _sign(text: str, position: int, tokens: list[Token]) -> str:
    """What a hyphen is: "operator", "sign" of the number right after it, or "unclear" ("- 5": a bullet or a minus?)."""
    before = tokens[-1] if tokens else None
    is_operand = before is not None and (before.kind == "num" or before.text in (")", "]"))
    following = text[position + 1 : position + 3]
    if following[:1].isdigit() or (following[:1] == "." and following[1:2].isdigit()):
        return "operator" if is_operand else "sign"
    if following[:1] == " " and following[1:2].isdigit() and not is_operand:
        return "sign" if before is not None and before.text == "=" else "unclear"
    return "operator"


def _word_token(text: str, position: int, tokens: list[Token]) -> int:
    phrase = _PHRASE.match(text, position)
    word = _WORD.match(text, position)
    end = word.end() if word is not None else position + 1
    if (
        phrase is not None
        and phrase.end() >= (end if " " not in phrase.group() else 0)
        and not text[phrase.end() : phrase.end() + 1].isalnum()
    ):
        kind = str(phrase.lastgroup)
        comparison = {"ge": ">=", "le": "<=", "gt": ">", "lt": "<"}.get(kind)
        before_is_number = bool(tokens) and tokens[-1].kind == "num"
        if comparison is not None and phrase.group().lower() == "over" and before_is_number:
            tokens.append(Token("op", position, "over"))
        elif comparison is not None:
            if phrase.group().lower() == "over":
                tokens.append(Token("lead", position, "over"))  # "5 mg IV over 30 min"
            tokens.append(Token("cmp", position, comparison))
        elif kind in ("more", "less"):
            tokens.append(Token("after", position, ">=" if kind == "more" else "<="))
        elif kind == "plus":
            tokens.append(Token("op", position, "+"))
        else:
            tokens.append(Token(kind, position, phrase.group().lower()))
        return phrase.end()
    after_number = bool(tokens) and tokens[-1].kind == "num"
    if after_number and _TIMES.match(text, position) is not None:
        tokens.append(Token("op", position, "×"))
        return position + 1
    # "f(5)" and "exec('5')" are calls, "5 mL(s)" is not.
    kind = "call" if text.startswith("(", end) and _CALL.match(text, end) is not None else "word"
    tokens.append(Token(kind, position, text[position:end]))
    return end


def _number_token(text: str, start: int, tokens: list[Token]) -> int | None:
    """Append the number at `start` with its unit and return where it ends; None when it is malformed."""
    literal = match_number(text, start)
    if literal is None:
        return None
    end = literal.end
    sign = start - 2 if text[start - 1 : start] == " " else start - 1  # "= - 5"
    negative = sign >= 0 and text[sign] == "-" and (not tokens or tokens[-1].start != sign)
    if tokens and tokens[-1].kind == "minus":
        tokens.pop()
        if tokens and tokens[-1].kind == "num":
            tokens.append(Token("op", start, "+"))  # "10 minus 5" is a calculation
        else:
            negative = not negative
    if text[end : end + 1] in (".", ",") and text[end + 1 : end + 2].isdigit():
        return None
    token = Token("num", start, literal=literal, negative=negative)
    found = _unit_after(text, end, tokens)
    if found is not None:
        token.unit, end = found
        token.foreign = _UNKNOWN_DENOMINATOR.match(text, end) is not None
    elif text[end : end + 1].isalpha():
        ordinal = _ORDINAL.match(text, end)
        if ordinal is None:
            return None
        tokens.append(Token("word", start))
        return ordinal.end()
    elif text[end : end + 1] == "-" and text[end + 1 : end + 2].isalpha():
        word = _WORD.match(text, end + 1)  # "25-hydroxyvitamin" is a name
        tokens.append(Token("word", start))
        assert word is not None  # it begins with a letter
        return word.end()
    else:
        token.foreign = _is_noun(text, end)
    token.end = end
    tokens.append(token)
    return end


def _unit_after(text: str, end: int, tokens: list[Token]) -> tuple[Unit, int] | None:
    mark = text[end : end + 1]
    if mark == "'":
        is_feet = re.match(r"'\s?(?:\d|$|[.,;)\n])", text[end : end + 3]) is not None and "'" not in text[:end]
        return match_unit(text, end) if is_feet else None
    if mark == '"':
        return None  # inches behind feet are known without it
    if mark in (" ", "-"):
        if mark == " " and text[end + 1 : end + 2] in ("'", '"'):
            return None
        if mark == " " and text[end + 1 : end + 2] in ("(", "["):
            close = ")" if text[end + 1] == "(" else "]"
            found = match_unit(text, end + 2)
            return (found[0], found[1] + 1) if found is not None and text.startswith(close, found[1]) else None
        if mark == " " and re.match(r"in\b(?! *(?:$|[.,;:)\n\d]))", text[end + 1 : end + 6], re.I):
            return None
        return match_unit(text, end + 1)
    return match_unit(text, end) if mark else None


def _unit_behind(text: str, end: int, tokens: list[Token]) -> int:
    """ "[5, 10] mg", "(5) mg" and "65+ years": the unit belongs to the numbers before the mark."""
    found = _unit_after(text, end, tokens)
    if found is None:
        return end
    index = len(tokens) - 2
    while index >= 0 and (tokens[index].kind == "num" or tokens[index].text in (",", ";", "-")):
        if tokens[index].kind == "num" and tokens[index].unit is None:
            tokens[index].unit, tokens[index].foreign = found[0], False
        index -= 1
    return found[1]


def _is_noun(text: str, end: int) -> bool:
    """True when a single unknown word ends the phrase after a number: it stands where the unit should."""
    if _UNKNOWN_DENOMINATOR.match(text, end) is not None:
        return True
    word = _WORD.match(text, end + 1) if text.startswith(" ", end) else None
    if word is None or word.group().lower() in _FUNCTION_WORDS:
        return False
    if any(character.isdigit() for character in word.group()):
        return True  # "5 mg10"
    following = _NOUN_END.match(text, word.end())
    return following is not None and (following.group(1) is None or following.group(1).lower() in _FUNCTION_WORDS)
