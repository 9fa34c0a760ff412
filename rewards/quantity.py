"""The grammar of one quantity: number, range, bound, pair, ratio, score or compound duration, from tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewards.tokens import FOOT, Token
from rewards.units import Unit


@dataclass(frozen=True, slots=True)
class Quantity:
    """One quantity as written.

    form: number | range | bound | over (120/80) | of (3 out of 5) | ratio (1:320) | list ([5, 10]) | spread (7 ± 2).
    values: in `unit` (None when no unit is written). sign: the comparison of a bound, or the word of a range.
    foreign: a word that is no known unit stands where the unit should. power: the exponent of an explicit "× 10^n".
    """

    form: str
    values: tuple[float, ...]
    unit: Unit | None = None
    sign: str = ""
    foreign: bool = False
    power: int = 0


_TIME = (("time", 1),)
_LENGTH = (("length", 1),)
_MASS = (("mass", 1),)
_INCH, _HOUR, _WEEK, _POUND, _OUNCE, _STONE = 0.0254, 3600.0, 604800.0, 453.59237, 28.349523125, 6350.29318
_ARITHMETIC = ("+", "*", "×", "^", "√")
OPERATORS = ("-", "/", *_ARITHMETIC)
_FORM_OF = {
    **dict.fromkeys(("-", "~", "—", "..", "..."), "range"),
    **dict.fromkeys(("/", "over"), "over"),
    **dict.fromkeys(("±", "+-", "+/-", "+ /-", "+/ -", "+ / -"), "spread"),
    ":": "ratio",
    "+": "sum",
}


def quantity_at(tokens: list[Token], index: int, between: bool) -> tuple[Quantity | None, int]:
    """The quantity that begins at the number `tokens[index]` and the index behind it; None for a calculation.

    between: the word "between" stands before it, so that "and" joins a range.
    """
    first, after = _compound(tokens, index)
    operator = _at(tokens, after)
    if operator is None:
        return first, after
    if _is_number(_at(tokens, after + 1)):
        form = _form(operator, between, _in_brackets(tokens, index, after + 2))
        if form == "sum":
            return _weeks_and_days(first, tokens, after)
        if form:
            second, end = _compound(tokens, after + 1)
            if _goes_on(tokens, end, form):
                return None, end
            joined = _join(form, first, second, operator)
            if joined is None and operator.text == "over":  # "5 mg over 2 hours"
                return first, after
            return joined, end
        if operator.kind == "cmp":
            return None, after  # "5 < x < 10" or "5 > 3"
    elif operator.text == "+":
        return replace(first, form="bound", sign=">="), after + 1
    if operator.kind == "op" and _is_calculation(tokens, after):
        return None, after
    if operator.kind == "after":
        return replace(first, form="bound", sign=operator.text), after + 1
    if operator.kind == "cmp":  # "65 <= age"
        flipped = {">": "<", "<": ">"}[operator.text[0]] + operator.text[1:]
        return replace(first, form="bound", sign=flipped), after + 1
    return first, after


def _in_brackets(tokens: list[Token], before: int, behind: int) -> bool:
    left, right = _at(tokens, before - 1), _at(tokens, behind)
    return left is not None and left.text in ("(", "[") and right is not None and right.text in (")", "]")


def _form(operator: Token, between: bool, in_brackets: bool) -> str:
    if operator.kind == "to":
        return "range"
    if operator.kind == "and":
        return "range" if between else ""
    if operator.kind == "of":
        return "of"
    if operator.text in (",", ";"):
        return "list" if in_brackets else ""
    return _FORM_OF.get(operator.text, "")


def _goes_on(tokens: list[Token], end: int, form: str) -> bool:
    """True for 5-10-15, 1/2/3, 10:30:00: more than two numbers in a row are no quantity."""
    mark = _at(tokens, end)
    if mark is None or not _is_number(_at(tokens, end + 1)):
        return False
    return mark.text in OPERATORS or (form == "ratio" and mark.text == ":")


def _is_calculation(tokens: list[Token], at: int) -> bool:
    """Whether the mark at `at`, behind a number, goes on with arithmetic: 3 × 5, 5 - (2), (70)/(1.75)^2."""
    mark = tokens[at]
    operand = _at(tokens, at + 1)
    if mark.text in (")", "]"):
        if operand is None or operand.text not in OPERATORS:
            return False
        mark, operand = operand, _at(tokens, at + 2)
    opens = operand is not None and operand.text in ("(", "[")
    if mark.text in ("/", "-"):
        return opens or (tokens[at].text in (")", "]") and _is_number(operand))
    return mark.text in _ARITHMETIC and (opens or _is_number(operand))


def _compound(tokens: list[Token], index: int) -> tuple[Quantity, int]:
    """A number, or numbers whose units count down: 3 weeks 2 days, 1 h 30 min, 5 ft 11 in, 6 lb 3 oz."""
    token = tokens[index]
    assert token.literal is not None
    item = Quantity(
        "number",
        (token.value,),
        token.unit,
        foreign=token.foreign,
        power=token.literal.power,
    )
    end = index + 1
    unit = token.unit
    if unit is None or unit.dims not in (_TIME, _LENGTH, _MASS) or token.negative:
        return item, end
    smallest = unit
    total = token.value
    while True:
        skip = end
        while (joint := _at(tokens, skip)) is not None and (joint.kind == "and" or joint.text in (",", "+")):
            skip += 1
        part = _at(tokens, skip)
        if part is None or part.kind != "num" or part.negative or skip - end > 2:
            break
        part_unit = part.unit
        if part_unit is None and smallest.factor == FOOT and skip == end and part.value < 12:
            part_unit = Unit(_INCH, _LENGTH)
        if part_unit is None and smallest.factor == _HOUR and part.start == tokens[end - 1].end and part.value < 60:
            part_unit = Unit(60.0, _TIME)  # 1h30
        if part_unit is None or part_unit.dims != unit.dims or not _counts_down(smallest, part_unit):
            break
        total += part.value * part_unit.factor / unit.factor
        smallest, end = part_unit, skip + 1
    return (replace(item, values=(total,)) if end > index + 1 else item), end


def _counts_down(larger: Unit, smaller: Unit) -> bool:
    if larger.dims == _TIME:
        return smaller.factor < larger.factor
    return (larger.factor, smaller.factor) in ((FOOT, _INCH), (_POUND, _OUNCE), (_STONE, _POUND))


def _weeks_and_days(first: Quantity, tokens: list[Token], after: int) -> tuple[Quantity | None, int]:
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
    return replace(first, values=(first.values[0] + days.value / 7,), unit=unit), end


def _join(form: str, first: Quantity, second: Quantity, operator: Token) -> Quantity | None:
    """Two numbers as one quantity in the unit of the second; a unit on one of them holds for both."""
    unit = second.unit or first.unit
    left = first.values[0]
    if first.unit is not None and second.unit is not None and first.unit != second.unit:
        if first.unit.dims != second.unit.dims or first.unit.offset != second.unit.offset:
            return None
        left *= first.unit.factor / second.unit.factor
    sign = operator.text
    if form == "over" and first.unit is not None:
        sign = "over"  # "2 mg/1 mg" are two quantities, "1/4 mg" is one
    if form == "range" and second.power and not first.power:
        left *= 10.0**second.power  # "1-2 × 10^9"
    return Quantity(
        form,
        (left, second.values[0]),
        unit,
        sign=sign,
        foreign=second.foreign or (first.foreign and second.unit is None),
        power=max(first.power, second.power, key=abs),
    )


def _at(tokens: list[Token], index: int) -> Token | None:
    return tokens[index] if 0 <= index < len(tokens) else None


def _is_number(token: Token | None) -> bool:
    return token is not None and token.kind == "num"
