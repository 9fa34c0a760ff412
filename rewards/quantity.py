"""The grammar of quantities: what a short text says in numbers and units.

`read` finds every quantity that a text asserts: numbers, ranges, bounds, pairs, ratios, scores, compound durations. It
drops what is denied ("not 5"), what is commentary ("(normal 3-5)") and the formula before a result ("70/1.75^2 = 22.9").
It evaluates nothing: an unfinished calculation is a problem, not a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from rewards.numbers import Literal, clean, match_number, spell_digits
from rewards.units import Unit, match_unit

MAX_LENGTH = 2000


@dataclass(frozen=True, slots=True)
class Quantity:
    """One asserted quantity.

    form: number | range | bound | over (120/80) | of (3 out of 5) | ratio (1:320) | list ([5, 10]) | spread (7 ± 2).
    values: as written, in `unit` (None when no unit is written). decimals: printed digits after the point, a value each.
    sign: the comparison of a bound, or the word of a range ("-" or "to"). foreign: a word stands where a unit should
    ("5 tablets" of an unknown kind). power: the exponent of an explicit "× 10^n".
    """

    form: str
    values: tuple[float, ...]
    unit: Unit | None = None
    decimals: tuple[int, ...] = ()
    sign: str = ""
    foreign: bool = False
    power: int = 0
    start: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """items: the asserted quantities in order. problem: why nothing may be read, else "". text: the cleaned text."""

    items: tuple[Quantity, ...] = ()
    problem: str = ""
    text: str = ""


@dataclass(slots=True)
class _Token:
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


_AT_LEAST = (
    r"at least|(?:no|not) (?:less|fewer|lower|younger|smaller|shorter) than|not (?:under|below)|equal to or (?:greater|more"
    r"|higher|above)(?: than)?|(?:greater|more|higher|larger|older|longer) than or equal(?: to)?|(?:a )?minimum of"
)
_AT_MOST = (
    r"at most|(?:no|not) (?:more|greater|higher|older|larger|longer) than|not (?:over|above|exceeding|to exceed|exceed)"
    r"|equal to or (?:less|lower|fewer|below)(?: than)?|(?:less|lower|fewer|smaller|younger|shorter) than or equal(?: to)?"
    r"|up to|(?:a )?maximum of"
)
_ABOVE = r"(?:more|greater|higher|older|larger|longer|later) than|over|above|exceed(?:s|ing)|in excess of|beyond"
_BELOW = r"(?:less|lower|fewer|smaller|younger|shorter|earlier) than|under|below"
_AFTER_MORE = r"(?:or|and) (?:more|older|greater|above|higher|over|up|upwards?|longer|later|beyond|larger)"
_AFTER_LESS = r"(?:or|and) (?:less|younger|below|lower|under|fewer|shorter|earlier|smaller)"
_NEGATIVE = (
    r"not|never|neither|nor|without|excluding|except|rather than|instead of|other than|no|cannot"
    r"|(?:is|are|was|were|do|does|did|ca|could|should|would|wo|has|have|had)n't"
)
_PHRASE = re.compile(
    rf"(?P<ge>{_AT_LEAST})|(?P<le>{_AT_MOST})|(?P<gt>{_ABOVE})|(?P<lt>{_BELOW})|(?P<more>{_AFTER_MORE})|(?P<less>{_AFTER_LESS})"
    rf"|(?P<not>{_NEGATIVE})|(?P<reset>but|instead)|(?P<wrong>incorrect|wrong|false)|(?P<between>between)|(?P<to>to|through"
    r"|until)|(?P<of>out of|of)|(?P<and>and)|(?P<minus>minus|negative)",
    re.I,
)
_WORD = re.compile(r"[^\W\d_]\w*(?:[-'^]\w+)*")
_LETTERS = re.compile(r"[^\W\d_]+")
_COMPARISON = re.compile(r"<\s?=|=\s?<|>\s?=|[<>]\s?or\s?(?:equal to|=)|[≤≥<>]")
_SYMBOL = re.compile(r"\+\s?/\s?-|\+-|±|->|=>|→|\.\.+|[-+/:×*^=≈~(),;.\[\]—√]")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.I)
_UNKNOWN_DENOMINATOR = re.compile(r"\s?[/·*]\s?[^\W\d_]|\sper\s[^\W\d_]")
_COMMENT = re.compile(
    r"\([^()\n]{0,120}?\b(?:normal|reference|ref|range|ci|confidence|iqr|target|sd|limit|cut-?off|threshold)\b[^()\n]{0,120}\)",
    re.I,
)
_NOUN_END = re.compile(r"\s?(?:$|[\n.,;:!?()\]]|(\w+))")
# After a number these words are no unit and no counted thing: the number simply has no unit.
_FUNCTION_WORDS = frozenset(
    "is are was were be been being am can could may might should would will shall must has have had do does did because"
    " since so as if then thus hence therefore and or nor but yet for from by with without within in on at of to into onto"
    " over under above below between per than that which who whom whose where when while after before during until given"
    " based using according assuming via about around approximately roughly nearly almost it its this these those the a an"
    " not no i we he she they you indicates indicating suggests suggesting means meaning only total each daily once twice"
    " today ago respectively overall now exactly again long old out x".split()
)
_TIME = (("time", 1),)
_LENGTH = (("length", 1),)
_MASS = (("mass", 1),)
_FOOT, _INCH, _HOUR, _WEEK, _POUND, _OUNCE, _STONE = 0.3048, 0.0254, 3600.0, 604800.0, 453.59237, 28.349523125, 6350.29318
_ARITHMETIC = ("+", "*", "×", "^", "√")
_OPERATORS = ("-", "/", *_ARITHMETIC)


def read(text: str) -> Reading:
    """Every quantity that `text` (raw model or label text) asserts. Linear in the length; never raises on text."""
    cleaned = clean(text[: MAX_LENGTH * 2])
    if len(cleaned) > MAX_LENGTH or len(text) > MAX_LENGTH * 2:
        return Reading(problem="too long to be an answer", text=cleaned[:80])
    reading = _read_clean(cleaned)
    if not reading.items and not any(character.isdigit() for character in cleaned):
        spelled = spell_digits(cleaned)
        if spelled != cleaned and _is_only_a_number(spelled):
            return _read_clean(spelled)
    return reading


def _is_only_a_number(spelled: str) -> bool:
    """Number words count only where nothing else is said: "three", "a score of three", "three weeks and two days"."""
    return (
        re.fullmatch(
            r"(?:(?:the|a|an|my|final|total|score|value|is|of|about|approximately|exactly|minus|negative|[:=])\s?)*"
            r"\d+(?:\s[^\W\d_]+){0,2}(?:,?\s(?:and\s)?\d+(?:\s[^\W\d_]+)?|\s?(?:to|out of|of|/)\s?\d+(?:\s[^\W\d_]+)?)*[.!]?",
            spelled,
            re.I,
        )
        is not None
    )


def _read_clean(text: str) -> Reading:
    tokens = _tokens(text)
    if tokens is None:
        return Reading(problem="a malformed number", text=text)
    if any(token.kind == "wrong" for token in tokens):
        return Reading(problem="the text calls a value wrong", text=text)
    items, problem = _asserted(tokens)
    return (
        Reading(tuple(items), "" if items else problem or "no number", text)
        if not problem
        else Reading((), problem, text)
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


def _tokens(text: str) -> list[_Token] | None:
    """Tokens of cleaned text, or None when something looks like a number and is none."""
    tokens: list[_Token] = []
    position = 0
    while position < len(text):
        character = text[position]
        if character == " ":
            position += 1
        elif character == "\n":
            tokens.append(_Token("break", position))
            position += 1
        elif character.isdigit() or (character == "." and text[position + 1 : position + 2].isdigit()):
            end = _number_token(text, position, tokens)
            if end is None:
                return None
            position = end
        elif character.isalpha():
            position = _word_token(text, position, tokens)
        elif character in "<>≤≥=" and (match := _COMPARISON.match(text, position)) is not None:
            tokens.append(_Token("cmp", position, _comparison(match.group())))
            position = match.end()
        elif (match := _SYMBOL.match(text, position)) is not None:
            if character == "(" and (comment := _COMMENT.match(text, position)) is not None:
                position = comment.end()
                continue
            symbol = match.group()
            if character == "-" and (sign := _sign(text, position, tokens)) != "operator":
                if sign == "unclear":
                    return None
                position += 1
                continue
            tokens.append(_Token("op", position, symbol))
            position = match.end()
            if symbol in ")]+":
                position = _unit_behind(text, position, tokens)
        else:
            position += 1
    return tokens


def _comparison(symbol: str) -> str:
    is_strict = symbol in "<>"
    return ("<" if symbol[0] in "<≤" or symbol.startswith("=<") else ">") + ("" if is_strict else "=")


def _sign(text: str, position: int, tokens: list[_Token]) -> str:
    """What a hyphen is: "operator", "sign" of the number right after it, or "unclear" ("- 5": a bullet or a minus?)."""
    before = tokens[-1] if tokens else None
    is_operand = before is not None and (before.kind == "num" or before.text in (")", "]"))
    following = text[position + 1 : position + 3]
    if following[:1].isdigit() or (following[:1] == "." and following[1:2].isdigit()):
        return "operator" if is_operand else "sign"
    if following[:1] == " " and following[1:2].isdigit() and not is_operand:
        return "sign" if before is not None and before.text == "=" else "unclear"
    return "operator"


def _word_token(text: str, position: int, tokens: list[_Token]) -> int:
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
            tokens.append(_Token("op", position, "over"))
        elif comparison is not None:
            tokens.append(_Token("cmp", position, comparison))
        elif kind in ("more", "less"):
            tokens.append(_Token("after", position, ">=" if kind == "more" else "<="))
        else:
            tokens.append(_Token(kind, position, phrase.group().lower()))
        return phrase.end()
    if (
        text[position:end] in ("x", "X")
        and tokens
        and tokens[-1].kind == "num"
        and re.match(r"\s?\d", text[end : end + 2])
    ):
        tokens.append(_Token("op", position, "×"))
    else:
        tokens.append(_Token("word", position, text[position:end]))
    return end


def _number_token(text: str, start: int, tokens: list[_Token]) -> int | None:
    """Append the number at `start` with its unit and return where it ends; None when it is malformed."""
    literal = match_number(text, start)
    if literal is None:
        return None
    end = literal.end
    negative = text[start - 1 : start] == "-" and (not tokens or tokens[-1].start != start - 1)
    if tokens and tokens[-1].kind == "minus":
        tokens.pop()
        if tokens and tokens[-1].kind == "num":
            tokens.append(_Token("op", start, "+"))  # "10 minus 5" is a calculation
        else:
            negative = not negative
    if text[end : end + 1] in (".", ",") and text[end + 1 : end + 2].isdigit():
        return None
    token = _Token("num", start, literal=literal, negative=negative)
    found = _unit_after(text, end, tokens)
    if found is not None:
        token.unit, end = found
        token.foreign = _UNKNOWN_DENOMINATOR.match(text, end) is not None
    elif text[end : end + 1].isalpha():
        ordinal = _ORDINAL.match(text, end)
        if ordinal is None:
            return None
        tokens.append(_Token("word", start))
        return ordinal.end()
    elif text[end : end + 1] == "-" and text[end + 1 : end + 2].isalpha():
        word = _WORD.match(text, end + 1)  # "25-hydroxyvitamin" is a name
        tokens.append(_Token("word", start))
        return word.end() if word is not None else end + 1
    else:
        token.foreign = _is_noun(text, end)
    token.end = end
    tokens.append(token)
    return end


def _unit_after(text: str, end: int, tokens: list[_Token]) -> tuple[Unit, int] | None:
    mark = text[end : end + 1]
    if mark == "'":
        is_feet = re.match(r"'\s?(?:\d|$|[.,;)\n])", text[end : end + 3]) is not None and "'" not in text[:end]
        return match_unit(text, end) if is_feet else None
    if mark == '"':
        after_feet = bool(tokens) and tokens[-1].unit is not None and tokens[-1].unit.factor == _FOOT
        return match_unit(text, end) if after_feet else None
    if mark in (" ", "-"):
        if mark == " " and text[end + 1 : end + 2] in ("'", '"'):
            return None
        if mark == "-" and not text[end + 1 : end + 2].isalpha():
            return None
        if mark == " " and text[end + 1 : end + 2] in ("(", "["):
            close = ")" if text[end + 1] == "(" else "]"
            found = match_unit(text, end + 2)
            return (found[0], found[1] + 1) if found is not None and text.startswith(close, found[1]) else None
        if mark == " " and re.match(r"in\b(?! *(?:$|[.,;:)\n\d]))", text[end + 1 : end + 6], re.I):
            return None
        return match_unit(text, end + 1)
    return match_unit(text, end) if mark else None


def _unit_behind(text: str, end: int, tokens: list[_Token]) -> int:
    """ "[5, 10] mg", "(5) mg" and "65+ years": the unit belongs to the numbers before the mark."""
    if len(tokens) < 2 or tokens[-2].kind != "num" or tokens[-2].unit is not None:
        return end
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
    if text[end : end + 1] != " ":
        return False
    word = _LETTERS.match(text, end + 1)
    if word is None or word.group().lower() in _FUNCTION_WORDS:
        return False
    following = _NOUN_END.match(text, word.end())
    return following is not None and (following.group(1) is None or following.group(1).lower() in _FUNCTION_WORDS)


# --- grammar ---------------------------------------------------------------------------------------------------------


def _asserted(tokens: list[_Token]) -> tuple[list[Quantity], str]:
    """The asserted quantities and a problem. Equal signs cut the text: what stands before the last may be a formula."""
    segments: list[list[_Token]] = [[]]
    for token in tokens:
        if token.text in ("=", "≈", "→", "->", "=>") and token.kind == "op":
            segments.append([])
        else:
            segments[-1].append(token)
    filled = [segment for segment in segments if any(token.kind == "num" for token in segment)]
    kept: list[Quantity] = []
    for segment in filled:
        numbers = sum(token.kind == "num" for token in segment)
        if segment is not filled[-1] and (
            any(token.kind == "op" and token.text in _OPERATORS for token in segment)
            and (numbers > 1 or _has_power(segment))
        ):
            continue
        found, problem = _items(segment)
        if problem:
            return [], problem
        kept += found
    return kept, ""


def _has_power(segment: list[_Token]) -> bool:
    return any(token.kind == "op" and token.text in ("^", "√", "×", "*", "/") for token in segment)


def _items(tokens: list[_Token]) -> tuple[list[Quantity], str]:
    items: list[Quantity] = []
    denied = False
    bound = ""
    age = 0  # words since the comparison: "at least about 5" still binds, "above the usual level of 5" does not
    between = False
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if token.kind == "num":
            item, index = _quantity(tokens, index, between)
            if item is None:
                return [], "an unfinished calculation"
            if bound:
                if item.form != "number":
                    return [], "a comparison with more than a number"
                item = replace(item, form="bound", sign=bound)
            if not denied and not _denied_after(tokens, index):
                items.append(item)
            bound, between = "", False
            continue
        if token.kind == "not":
            denied = True
        elif token.kind in ("reset", "break") or token.text in (".", ";"):
            denied, bound, between = False, "", False
        elif token.kind == "cmp":
            bound, age = token.text, 0
        elif token.kind == "between":
            between = True
        elif token.kind == "word" and bound:
            age += 1
            if age > 2:
                bound = ""
        elif token.text == "," and bound:
            bound = ""
        elif token.text in ("√", "^"):
            return [], "an unfinished calculation"
        index += 1
    return items, ""


def _denied_after(tokens: list[_Token], index: int) -> bool:
    """ "5 mg is not the dose": a denial right after the quantity and no other number behind it."""
    for offset, token in enumerate(tokens[index : index + 2]):
        if token.kind == "not" and (
            offset == 0 or tokens[index].text.lower() in ("is", "was", "are", "would", "can", "could")
        ):
            rest = tokens[index + offset :]
            stop = next(
                (
                    i
                    for i, after in enumerate(rest)
                    if after.kind in ("break", "reset") or after.text in (".", ";", ",")
                ),
                len(rest),
            )
            return not any(after.kind == "num" for after in rest[:stop])
    return False


def _quantity(tokens: list[_Token], index: int, between: bool) -> tuple[Quantity | None, int]:
    """The quantity that begins at the number `tokens[index]` and the index behind it; None for a calculation."""
    first, after = _compound(tokens, index)
    operator = _at(tokens, after)
    second = _at(tokens, after + 1)
    if (
        operator is not None
        and operator.kind in ("op", "to", "and", "of")
        and second is not None
        and second.kind == "num"
    ):
        bracket = _at(tokens, index - 1)
        close = _at(tokens, after + 2)
        in_bracket = (
            bracket is not None and bracket.text in ("(", "[") and close is not None and close.text in (")", "]")
        )
        form = _form(operator, between, in_bracket)
        if form == "sum":
            return _weeks_and_days(first, tokens, after)
        if form:
            other, end = _compound(tokens, after + 1)
            following = _at(tokens, end)
            if following is not None and following.text in _OPERATORS and _is_number(_at(tokens, end + 1)):
                return None, end
            if form == "ratio" and following is not None and following.text == ":" and _is_number(_at(tokens, end + 1)):
                return None, end
            return _join(form, first, other, operator), end
    if operator is not None and operator.kind == "op":
        if operator.text == "+" and not _is_number(second):
            return replace(first, form="bound", sign=">="), after + 1
        if operator.text in _ARITHMETIC and (_is_number(second) or operator.text == "^"):
            return None, after
        if operator.text in ("/", "-", *_ARITHMETIC) and second is not None and second.text in ("(", "["):
            return None, after
        if operator.text in (")", "]"):
            outside, operand = second, _at(tokens, after + 2)
            if (
                outside is not None
                and outside.text in ("^", "/", "×", "*", "+", "-")
                and (outside.text == "^" or _is_number(operand) or (operand is not None and operand.text in ("(", "[")))
            ):
                return None, after
    if operator is not None and operator.kind == "after":
        return replace(first, form="bound", sign=operator.text), after + 1
    if operator is not None and operator.kind == "cmp":
        if _is_number(second):
            return None, after  # "5 < x < 10" or "5 > 3"
        flipped = {">": "<", "<": ">"}[operator.text[0]] + operator.text[1:]
        return replace(first, form="bound", sign=flipped), after + 1
    return first, after


def _form(operator: _Token, between: bool, in_bracket: bool) -> str:
    if operator.kind == "to":
        return "range"
    if operator.kind == "and":
        return "range" if between else ""
    if operator.kind == "of":
        return "of"
    if operator.text in ("-", "~", "—", "..", "..."):
        return "range"
    if operator.text in ("/", "over"):
        return "over"
    if operator.text in (",", ";"):
        return "list" if in_bracket else ""
    return {":": "ratio", "±": "spread", "+-": "spread", "+": "sum"}.get(
        operator.text, "spread" if "/" in operator.text else ""
    )


def _compound(tokens: list[_Token], index: int) -> tuple[Quantity, int]:
    """A number, or numbers whose units count down: 3 weeks 2 days, 1 h 30 min, 5 ft 11 in, 6 lb 3 oz."""
    token = tokens[index]
    assert token.literal is not None
    item = Quantity(
        "number",
        (token.value,),
        token.unit,
        (token.literal.decimals,),
        foreign=token.foreign,
        power=token.literal.power,
        start=token.start,
    )
    end = index + 1
    unit = token.unit
    if unit is None or unit.dims not in (_TIME, _LENGTH, _MASS) or token.negative:
        return item, end
    smallest = unit
    total = token.value
    while True:
        skip = end
        while (joint := _at(tokens, skip)) is not None and (joint.kind == "and" or joint.text == ","):
            skip += 1
        part = _at(tokens, skip)
        if part is None or part.kind != "num" or part.negative or skip - end > 2:
            break
        part_unit = part.unit
        if part_unit is None and smallest.factor == _FOOT and skip == end and part.value < 12:
            part_unit = Unit(_INCH, _LENGTH)
        if part_unit is None and smallest.factor == _HOUR and part.start == tokens[end - 1].end and part.value < 60:
            part_unit = Unit(60.0, _TIME)  # 1h30
        if part_unit is None or part_unit.dims != unit.dims or not _counts_down(smallest, part_unit):
            break
        total += part.value * part_unit.factor / unit.factor
        smallest, end = part_unit, skip + 1
    return (replace(item, values=(total,), decimals=(6,)) if end > index + 1 else item), end


def _counts_down(larger: Unit, smaller: Unit) -> bool:
    if larger.dims == _TIME:
        return smaller.factor < larger.factor
    return (larger.factor, smaller.factor) in ((_FOOT, _INCH), (_POUND, _OUNCE), (_STONE, _POUND))


def _weeks_and_days(first: Quantity, tokens: list[_Token], after: int) -> tuple[Quantity | None, int]:
    """Obstetric "32+4 weeks" is 32 weeks and 4 days. Any other sum is a calculation."""
    days = tokens[after + 1]
    end = after + 2
    unit = days.unit or first.unit
    is_week = unit is not None and unit.dims == _TIME and unit.factor == _WEEK
    if (
        not is_week
        or not 0 <= days.value <= 6
        or days.value != int(days.value)
        or first.values[0] != int(first.values[0])
    ):
        return None, end
    return replace(first, values=(first.values[0] + days.value / 7,), unit=unit, decimals=(6,)), end


def _join(form: str, first: Quantity, second: Quantity, operator: _Token) -> Quantity | None:
    """Two numbers as one quantity in the unit of the second; a unit on one of them holds for both."""
    unit = second.unit or first.unit
    left = first.values[0]
    if first.unit is not None and second.unit is not None and first.unit != second.unit:
        if first.unit.dims != second.unit.dims or first.unit.offset != second.unit.offset:
            return None
        left *= first.unit.factor / second.unit.factor
    return Quantity(
        form,
        (left, second.values[0]),
        unit,
        first.decimals + second.decimals,
        sign="to" if operator.kind == "to" else operator.text,
        foreign=second.foreign or (first.foreign and second.unit is None),
        power=max(first.power, second.power, key=abs),
        start=first.start,
    )


def _at(tokens: list[_Token], index: int) -> _Token | None:
    return tokens[index] if 0 <= index < len(tokens) else None


def _is_number(token: _Token | None) -> bool:
    return token is not None and token.kind == "num"
