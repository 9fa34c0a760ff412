"""Number literals in running text: cleaning, locales, scientific notation, number words. Linear; evaluates nothing.

Reading rules for separators: "1.234,5" and "1,234.5" by the last mark; "1,234" is grouped (English), "1,5" and "0,123"
are decimal commas, "1.234" is a decimal point, "1.234.567" and "12,34,567" are groups. Anything else ("1,2,3",
"1,200.5.3") is no number at all.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rewards.text import normalise, table

MAX_EXPONENT = 400

_MARKS = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–﹣", "-"),
        "―": "—",
        **dict.fromkeys("’‘′ʹʼ´＇", "'"),
        **dict.fromkeys("“”„″˝", '"'),
        **dict.fromkeys("✕✖⨯╳", "×"),
        **dict.fromkeys("⋅∙•・", "·"),
        **dict.fromkeys("⩽≦", "≤"),
        **dict.fromkeys("⩾≧", "≥"),
        **dict.fromkeys("≅≃≒∼", "≈"),
        **dict.fromkeys("⟶⇒⟹", "→"),
        "÷": "/",
        "∕": "/",
        "∶": ":",
        "µ": "μ",
        "٫": ".",
        "٬": ",",
        "、": ",",
        "。": ".",
    }
)
_MINUS_SPACE = re.compile(r"(?:^|(?<=[=:≈] )|(?<=is ))− (?=[\d.])")  # a true minus sign, where nothing is subtracted
_DIGIT = re.compile(r"[^\x00-\x7f]")
_TAG = re.compile(r"<sup>\s?|</?[A-Za-z][A-Za-z0-9]{0,9}\s?/?>")
_SPACE = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\s*\n\s*")
_STARS = re.compile(r"(?<=\d)\s?\*\*\s?(?=[-+(]?\d)|(?<=m)\*\*(?=[23]\b(?!\*))")  # 5**2, kg/m**2
_DEGREE = re.compile(r"\s?\u030a\s?|°\s(?=[CFcf]\b)|(?<=\d)\s?º|(?<=\d)\s?\^?[oO](?=[CF]\b)")

_BODY_SURFACE = re.compile(r"\s?[·⋅*.×]?\s?\(?1[.,]73\)?\s?m\^?\(?[-−⁻]\s?2\)?")  # mL·min⁻¹·1.73 m⁻²
_DELTA = re.compile(r"(?:delta|Δ)\s?(?=°|deg\b|degree|[KCF]\b)")  # "1.8 Δ°F": the row says that it is a difference

_LATEX_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|boldsymbol"
    r"|bm"
    r"|operatorname|emph|underline|unit|si|num|boxed|fbox|ce|bf|rm|left|right|big|Big|displaystyle)(?![A-Za-z])\*?\s?"
)
_LATEX_PAIR = re.compile(r"\\(?:SI|qty)\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]*)\}\s?\{([^{}]*)\}|(\d)\s?(\d)(?!\d))")
_LATEX_DEGREE = re.compile(r"\^\s?\{?\s?\\(?:circ|degree)(?![A-Za-z])\s?\}?|\\(?:degree|textdegree|circ)(?![A-Za-z])")
_LATEX_COMMAND = re.compile(r"\\([A-Za-z]+|.)\s?", re.S)
_TABLE = table("numbers")

_RUN = re.compile(r"\d+(?:[.,]\d+|'\d{3}(?!\d))*|\.\d+")
_SPACED_GROUPS = re.compile(r"\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?(?![.,']?\d)")
_MIXED = re.compile(r" (\d{1,4})/(\d{1,4})(?![\d.,/]?\d|\s?/\s?\d)")
_TIMES_TEN = re.compile(
    r"\s?(?:[x×*·X]|times|by)\s?(?:10|ten)\s?(?:\^\s?|[eE]|\*\s?|to the (?:power (?:of )?)?|(?=\(\d{1,2}\)))"
    r"\(?\s?([+-]?)\s?(\d+)\)?(?:st|nd|rd|th)?(?: power)?"
)
_TEN_TO_THE = re.compile(
    r"(?:\s?\^\s?|\*(?=\d{1,2}\s?/)|\sto the (?:power (?:of )?)?)\(?\s?([+-]?)(\d+)\)?(?:th)?(?: power)?"
)
_EXPONENT = re.compile(r"\s?[eE]([+-]?)(\d+)(?!\w)")
_SCALE = re.compile(
    r"\s?(thousand|million|billion|trillion|lakh|crore|mn|bn)\b(?!\s?(?:/|per\b))|(?-i:k)(?![\w%°])", re.I
)
_SCALES = {"thousand": 3, "k": 3, "lakh": 5, "million": 6, "mn": 6, "crore": 7, "billion": 9, "bn": 9, "trillion": 12}


@dataclass(frozen=True, slots=True)
class Literal:
    """A number as written. power: an explicit power of ten ("× 10^9": 9, "million": 6), already in the value."""

    value: float
    end: int
    power: int = 0


def clean(text: str) -> str:
    """One spelling for marks, digits, LaTeX, markdown and spaces. Lines are kept apart by single newlines."""
    text = normalise(text)
    if "1.73" in text or "1,73" in text:
        text = _BODY_SURFACE.sub("/1.73m2", text)
    if "half" in text:
        text = _AND_A_HALF.sub(_with_half, text)
    if not text.isascii():
        text = _MINUS_SPACE.sub("-", text)
        text = _DIGIT.sub(_ascii_digit, text).translate(_MARKS)
        text = _DEGREE.sub("°", text)
    if "<" in text:
        text = _TAG.sub(lambda match: "^" if match.group().startswith("<sup") else " ", text)
    if "\\" in text or "$" in text or "{" in text:
        text = _without_latex(text)
    text = text.replace("''", '"')
    if "*" in text or "`" in text or "__" in text:
        text = _STARS.sub("^", text).replace("**", " ").replace("`", " ").replace("__", " ")
    if "^o" in text or "oC" in text or "oF" in text or "° " in text:
        text = _DEGREE.sub("°", text)
    if "Δ" in text or "delta" in text:
        text = _DELTA.sub("", text)
    text = _SPACE.sub(" ", text)
    return _BLANK_LINES.sub("\n", text).strip()


def _ascii_digit(match: re.Match[str]) -> str:
    character = match.group()
    return str(int(character)) if character.isdecimal() else character


def _without_latex(text: str) -> str:
    text = text.replace("{,}", ",").replace("{.}", ".").replace("\\\\", " ").replace("---", "—").replace("--", "-")
    text = _LATEX_DEGREE.sub("°", text)
    text = text[:1] + text[1:].replace("~", " ")
    for _ in range(4):  # fonts may be nested: \text{\mathrm{mg}}
        unwrapped = _LATEX_FONT.sub("", _LATEX_PAIR.sub(r"\1 \2", text))
        unwrapped = _LATEX_FRACTION.sub(_plain_fraction, unwrapped)
        if unwrapped == text:
            break
        text = re.sub(r"(?<![\^_\w}])\{([^{}]*)\}", r"\1", unwrapped)
    text = _LATEX_COMMAND.sub(lambda match: _TABLE["latex"].get(match.group(1), f" {match.group(1)} "), text)
    return text.replace("$", "").replace("{", "").replace("}", "")


def _plain_fraction(match: re.Match[str]) -> str:
    above, below = (match.group(1) or match.group(3) or "").strip(), (match.group(2) or match.group(4) or "").strip()
    if above.isdigit() and below.isdigit():
        return f" {above}/{below} "
    return f"{above}/({below})"


def match_number(text: str, start: int) -> Literal | None:
    """The number that begins at `start` of cleaned text (no sign).

    None when what stands there is no number, looks like one but is malformed, or is too large or too small.
    """
    run = _SPACED_GROUPS.match(text, start) or _RUN.match(text, start)
    if run is None:
        return None
    raw, end = run.group(), run.end()
    plain = _resolve(raw.replace(" ", ""))
    if plain is None or (text.startswith("_", end) and text[end + 1 : end + 2].isdigit()):
        return None
    value = float(plain)
    if not math.isfinite(value):
        return None
    mixed = _MIXED.match(text, end) if plain.isdigit() and len(plain) < 7 else None
    if mixed is not None and 0 < int(mixed.group(1)) < int(mixed.group(2)):
        return Literal(value + int(mixed.group(1)) / int(mixed.group(2)), mixed.end())
    if plain == "10":
        power = _TEN_TO_THE.match(text, end)
        if power is not None:
            return _powered(1.0, power, text)
    power = _TIMES_TEN.match(text, end) or _EXPONENT.match(text, end)
    if power is not None:
        return _powered(value, power, text)
    scale = _SCALE.match(text, end)
    if scale is not None:
        exponent = _SCALES[(scale.group(1) or "k").lower()]
        return Literal(value * 10.0**exponent, scale.end(), exponent)
    return Literal(value, end)


def _resolve(raw: str) -> str | None:
    """The digits of a run with a point as decimal mark, or None when the separators make no sense."""
    marks = [character for character in raw if not character.isdigit()]
    if not marks:
        return raw
    parts = re.split(r"[.,']", raw)
    last = marks[-1]
    if len(set(marks)) == 1:
        if len(marks) == 1:
            if last == ".":
                return raw
            grouped = len(parts[1]) == 3 and len(parts[0]) <= 3 and parts[0] != "0"
            if last == "'":
                return "".join(parts) if grouped else None
            return "".join(parts) if grouped else f"{parts[0]}.{parts[1]}"
        return "".join(parts) if _are_groups(parts, last) else None
    if marks.count(last) == 1 and len(set(marks[:-1])) == 1 and last != "'" and _are_groups(parts[:-1], marks[0]):
        return "".join(parts[:-1]) + "." + parts[-1]
    return None


def _are_groups(parts: list[str], mark: str) -> bool:
    if not 1 <= len(parts[0]) <= 3 or parts[0][0] == "0" or len(parts[-1]) != 3:
        return False
    if all(len(part) == 3 for part in parts[1:]):
        return True
    return mark == "," and len(parts[0]) <= 2 and all(len(part) == 2 for part in parts[1:-1])


def _powered(value: float, power: re.Match[str], text: str) -> Literal | None:
    sign, digits = power.groups()
    exponent = min(int(digits[:5]), MAX_EXPONENT)  # which is no float
    exponent = -exponent if sign == "-" else exponent
    try:
        scaled = float(f"{value!r}e{exponent}") if "e" not in repr(value) else value * 10.0**exponent
    except OverflowError:
        return None
    if not math.isfinite(scaled) or (scaled == 0.0 and value != 0.0):
        return None
    return Literal(scaled, power.end(), exponent)


_ONES = {word: value for value, word in enumerate(_TABLE["ones"])}
_TENS = {word: value for value, word in zip(range(20, 100, 10), _TABLE["tens"], strict=True)}
_WORDS = "|".join([*_TENS, *sorted(_ONES, key=len, reverse=True)])
_WORD_RUN = re.compile(
    rf"\b(?:{_WORDS})(?:(?:[ -]|(?<=hundred) and )(?:{_WORDS}|hundred|thousand))*\b",
    re.I,
)


_AND_A_HALF = re.compile(rf"(?<![\w.,])(\d{{1,4}}|{'|'.join(_ONES)}) and (?:a|one)[ -]half\b", re.IGNORECASE)


def _with_half(match: re.Match[str]) -> str:
    whole = match.group(1).lower()
    return f"{_ONES.get(whole, whole)}.5"


def spell_digits(text: str) -> str:
    """Number words as digits: "three weeks and two days" becomes "3 weeks and 2 days". English, up to 999,999."""
    return _WORD_RUN.sub(lambda match: _word_value(match.group()) or match.group(), text)


def _word_value(phrase: str) -> str | None:
    total = current = 0
    last = 10**9
    for word in re.split(r"[ -]+", phrase.lower()):
        if word == "and":
            continue
        if word == "hundred":
            if not 1 <= current <= 9:
                return None
            current, last = current * 100, 100
        elif word == "thousand":
            if current == 0 or total:
                return None
            total, current, last = current * 1000, 0, 10**9
        else:
            value = _TENS.get(word, _ONES.get(word, 0))
            size = 10 if word in _TENS else 1
            if last <= size or (last == 10 and not 1 <= value <= 9):
                return None  # "five six" is a list
            current, last = current + value, size
    return str(total + current)
