"""Units of measurement: an own table and the algebra of their dimensions.

Symbols are case-sensitive (mg is not Mg, mM is not mm). A symbol in the wrong case is read only when a single unit of
the table could be meant (MEQ/L, mmhg, Kg); words are read in any case. Nothing here evaluates text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

MAX_UNIT_LENGTH = 80

_PREFIXES = {
    "f": (1e-15, ("f",), "femto"),
    "p": (1e-12, ("p",), "pico"),
    "n": (1e-9, ("n",), "nano"),
    "u": (1e-6, ("u", "µ", "μ", "mc"), "micro"),
    "m": (1e-3, ("m",), "milli"),
    "c": (1e-2, ("c",), "centi"),
    "d": (1e-1, ("d",), "deci"),
    "h": (1e2, ("h",), "hecto"),
    "k": (1e3, ("k",), "kilo"),
    "M": (1e6, ("M",), "mega"),
    "G": (1e9, ("G",), "giga"),
}
_COUNTS = {
    **dict.fromkeys(("K", "k", "thou", "thousand", "thousands", "Thousand", "thsd", "Tsd"), 3),
    **dict.fromkeys(("M", "million", "millions", "Million", "mill", "Mill", "mio", "Mio"), 6),
    **dict.fromkeys(("G", "Gpt", "billion", "billions", "Billion"), 9),
    **dict.fromkeys(("T", "Tpt"), 12),
}
# "x10^9/L", "10*9/L" (UCUM), "10E3/uL" (laboratory print-outs): a power of ten that belongs to the unit.
_POWER = re.compile(r"(?:[x×*·]\s?)?\(?10\s?(?:\^|\*{1,2}|[eE])\s?\(?([+-]?\d{1,2})\)?(?!\d)\)?\s?")
# "K/µL", "million/mm3": a count in thousands or millions, only before a volume (K/min would be kelvin).
_COUNT = re.compile(
    rf"({'|'.join(sorted(_COUNTS, key=len, reverse=True))})"
    r"(?=\s?(?:(?:cells?|platelets?)\s?)?(?:/|per\s)\s?(?:(?:[uµμmd]|mc)?[lL]\b|mm|c[um]|[Ll]it|micro|milli))\s?"
)
_PER = re.compile(r"\s?/\s?|\s?\bper\s(?!cent|mil(?:le)?s?\b)(?:each\s)?", re.I)
_PRODUCT = re.compile(r"\s?[·⋅∙•*×]\s?(?=[^\W\d_]|[°(]|1[.,]73)|\.(?=[^\W\d_])|-(?=[^\W\d_])")
_SPACED = re.compile(r"\s(?=[^\W\d_]{1,5}\s?\^?\s?\(?-\d)")
_EXPONENT = re.compile(
    r"\s?(?:\^|\*\*)\s?\(?([+-]?\d)\)?(?![\d.]\d|\w)|([2-6])(?![\w.]\w|\w)|(-[1235])(?![\w.]\w|\w)|(\ssquared)\b"
    r"|(\scubed)\b"
)
_POWER_WORD = re.compile(r"(sq(?:uare)?\.?|cubic|cu\.?)\s(?=\w)", re.I)
_SURFACE = r"1[.,]73\s?_?(?:m\s?\^?\s?2|m\*\*2|sq(?:uare)?\.?\s?m(?:et(?:er|re)s?)?)"
_BODY_SURFACE = re.compile(rf"\({_SURFACE}\)|{_SURFACE}(?!\w)", re.I)
_DAY = re.compile(r"24\s?-?\s?(?:hours?|hrs?|h)(?!\w)", re.I)
_HUNDREDS = re.compile(r"(100|1000)\s?(?=[^\W\d_])")
# What a laboratory writes after a unit to say of what: it does not change the unit.
_ANNOTATION = re.compile(
    r"\s(?:of\s)?(?:creatinine|creat|cr|hb|hgb|hemoglobin|haemoglobin|total hb|h2o|water|protein|feu|ddu|bsa|bw"
    r"|body weight)(?!\w)",
    re.I,
)
_ANNOTATION_BRACES = re.compile(r"\{(?!1\.73)[^{}]*\}")


@dataclass(frozen=True, slots=True)
class Unit:
    """`base value = factor * value + offset`; the base of a dimension is named in data/units.tsv.

    dims: sorted (dimension, exponent) pairs without zeros. power: a power of ten written as part of the unit
    (9 for 10^9/L), already inside `factor`.
    """

    factor: float = 1.0
    dims: tuple[tuple[str, int], ...] = ()
    offset: float = 0.0
    power: int = 0

    @property
    def is_plain(self) -> bool:
        """True for a bare number, score or count: no dimension and no hidden factor such as that of per cent."""
        return not self.dims and self.factor == 1.0


ONE = Unit()


def convert(value: float, source: Unit, target: Unit, *, difference: bool = False) -> float | None:
    """`value` in `target` units, or None when the dimensions differ. difference: no offset (1 °C is then 1.8 °F)."""
    if source.dims != target.dims:
        return None
    if source == target:
        return value
    if difference:
        return value * source.factor / target.factor
    return (value * source.factor + source.offset - target.offset) / target.factor


@lru_cache(maxsize=1024)
def parse_unit(text: str) -> Unit | None:
    """The unit that the whole of `text` names, or None. "", "1" and "dimensionless" are the number one."""
    text = " ".join(_ANNOTATION_BRACES.sub(" ", text).replace("{1.73_m2}", "1.73 m2").split())
    if text in ("", "1"):
        return ONE
    if len(text) > MAX_UNIT_LENGTH:
        return None
    found = match_unit(text, 0)
    return found[0] if found is not None and found[1] == len(text) else None


def match_unit(text: str, start: int) -> tuple[Unit, int] | None:
    """The longest unit that begins at `start` and where it ends. Single spaces only: clean the text first."""
    found = _expression(text, start)
    if found is None:
        return None
    unit, end = found
    note = _ANNOTATION.match(text, end)
    return unit, note.end() if note is not None else end


def _expression(text: str, start: int, depth: int = 0, above: dict[str, int] | None = None) -> tuple[Unit, int] | None:
    """above: inside brackets below a slash, the dimensions before that slash."""
    position, power, scale = start, 0, 1.0
    written = _POWER.match(text, position)
    if written is not None:
        power, position = int(written.group(1)), written.end()
    else:
        count = _COUNT.match(text, position)
        if count is not None:
            power, position = _COUNTS[count.group(1)], count.end()
    dims: dict[str, int] = {}
    factor, offset = 10.0**power, 0.0
    inverse = False
    parts = 0
    while parts < 12:
        per = _PER.match(text, position)
        if per is not None:
            inverse, at = True, per.end()
        elif parts == 0:
            at = position
        else:
            # Medicine writes mg/kg·min for mg/(kg·min): what follows a slash stays below the line.
            joint = _PRODUCT.match(text, position) or _SPACED.match(text, position)
            if joint is None:
                break
            at = joint.end()
            if joint.group() == " ":
                inverse = False
        found = _factor(text, at, depth, dims if inverse else above, first=parts == 0 and not inverse)
        if found is None:
            break
        unit, exponent, position = found
        exponent = -exponent if inverse else exponent
        scale *= unit.factor**exponent
        for name, degree in unit.dims:
            dims[name] = dims.get(name, 0) + degree * exponent
        offset = unit.offset if parts == 0 and exponent == 1 else 0.0
        parts += 1
    if parts == 0:
        return None
    kept = tuple(sorted((name, degree) for name, degree in dims.items() if degree))
    return Unit(factor * scale, kept, offset, power), position


def _factor(
    text: str, start: int, depth: int, above: dict[str, int] | None, *, first: bool
) -> tuple[Unit, int, int] | None:
    """One factor: (unit, exponent, end). above: the dimensions before the slash, None when not below one."""
    if above is not None:
        surface = _BODY_SURFACE.match(text, start)
        if surface is not None:
            return Unit(1.0, (("standard_body_surface", 1),)), 1, surface.end()
        day = _DAY.match(text, start)
        if day is not None:
            return Unit(86400.0, (("time", 1),)), 1, day.end()
        hundreds = _HUNDREDS.match(text, start)
        if hundreds is not None:
            atom = _atom(text, hundreds.end())
            # "120 mmHg / 100 mmHg" is a pair of numbers, "5 mg/100 mL" is one unit.
            if atom is None or dict(atom[0].dims) == above:
                return None
            return Unit(atom[0].factor * float(hundreds.group(1)), atom[0].dims), 1, atom[1]
    if depth < 3 and text.startswith("(", start):
        inner = _expression(text, start + 1, depth + 1, above)
        if inner is None or not text.startswith(")", inner[1]):
            return None
        return inner[0], 1, inner[1] + 1
    word = _POWER_WORD.match(text, start)
    if word is not None:
        atom = _atom(text, word.end())
        if atom is not None and atom[0].dims == (("length", 1),):
            return atom[0], 3 if word.group(1)[0] in "cC" else 2, atom[1]
        return None
    atom = _atom(text, start)
    if atom is None:
        return None
    unit, end = atom
    exponent = _EXPONENT.match(text, end)
    if exponent is not None:
        raised, attached, negative, squared, _ = exponent.groups()
        # "2 h-3 h" is a range: after the first unit of all only -1 is an exponent.
        if negative is None or negative == "-1" or not first:
            degree = int(raised or attached or negative or (2 if squared else 3))
            return unit, degree, exponent.end()
    # "B12" or "m20": digits that are no exponent make it another word. "1h30min" and 5'11" go on with the next number.
    runs_on = end < len(text) and text[end].isdigit() and unit.dims != (("time", 1),) and text[end - 1] != "'"
    return None if runs_on else (unit, 1, end)


def _atom(text: str, start: int) -> tuple[Unit, int] | None:
    if start >= len(text):
        return None
    exact, folded, lengths = _tables()
    for length in lengths.get(text[start].lower(), ()):
        end = start + length
        piece = text[start:end]
        if len(piece) < length:
            continue
        unit = exact.get(piece) or folded.get(piece.lower())
        if unit is not None and not _runs_on(text, end):
            return unit, end
    return None


def _runs_on(text: str, end: int) -> bool:
    """True when the word goes on after `end`. Chinese, Japanese and Korean write no space after a unit."""
    return (
        end < len(text)
        and text[end].isalpha()
        and text[end] < "⺀"
        and text[end - 1].isalpha()
        and text[end - 1] < "⺀"
    )


@cache
def _tables() -> tuple[dict[str, Unit], dict[str, Unit], dict[str, tuple[int, ...]]]:
    """Exact spellings, lower-cased spellings, and the lengths to try for each first letter, longest first."""
    exact: dict[str, Unit] = {}
    words: dict[str, Unit] = {}
    source = resources.files("rewards") / "data" / "units.tsv"
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        symbols, names, factor, dims, rest = line.split("\t")
        pairs = (term.partition("^") for term in dims.split())
        unit = Unit(
            float(factor),
            tuple(sorted((name, int(degree or 1)) for name, _, degree in pairs)),
            float(rest) if rest.startswith("+") else 0.0,
        )
        for prefix in ("", *([] if rest.startswith("+") else rest.split())):
            scale, marks, mark_word = _PREFIXES[prefix] if prefix else (1.0, ("",), "")
            scaled = Unit(unit.factor * scale, unit.dims, unit.offset)
            for symbol in symbols.split():
                for mark in marks:
                    exact.setdefault(mark + symbol, scaled)
            for name in names.split(";"):
                if name and (not prefix or (name.isascii() and " " not in name)):
                    words.setdefault(mark_word + name.lower(), scaled)
                    if name.isascii():
                        words.setdefault(f"{mark_word}{name.lower()}s", scaled)
    for percent, per_decilitre in (("mg%", "mg"), ("g%", "g")):
        mass = exact[per_decilitre]
        exact[percent] = Unit(mass.factor / 1e-4, (("length", -3), ("mass", 1)))
    folded = _fold(exact)
    folded.update(words)
    for symbol, unit in list(exact.items()):  # "mgs", "mLs", "kgs"
        if len(symbol) > 1 and symbol.isalpha():
            exact.setdefault(symbol + "s", unit)
    lengths: dict[str, set[int]] = {}
    for spelling in [*exact, *folded]:
        lengths.setdefault(spelling[0].lower(), set()).add(len(spelling))
    return exact, folded, {first: tuple(sorted(found, reverse=True)) for first, found in lengths.items()}


def _fold(exact: dict[str, Unit]) -> dict[str, Unit]:
    """Spellings that name one unit whatever their case. One letter alone is never safe (m, M; g, G; s, S)."""
    seen: dict[str, set[Unit]] = {}
    for symbol, unit in exact.items():
        seen.setdefault(symbol.lower(), set()).add(unit)
    return {symbol: units.pop() for symbol, units in seen.items() if len(units) == 1 and len(symbol) > 1}
