"""Places in a text or a label, in the forms that models and data sets write them.

form                                                    numbers
[x1, y1, x2, y2], also several, (x, y) or bare          as asked
{"bbox_2d": [...], "label": "nodule"} (Qwen-VL), "bbox", "point_2d", {"x1": ...}, {"nodule": [...]}      as asked
{"box_2d": [...]} (Gemini)                              0 to 1000, y first
<ref>nodule</ref><box>[[...]]</box> (InternVL)          0 to 1000
<|object_ref_start|>nodule<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|> (Qwen2-VL)           0 to 1000
<loc0012><loc0034><loc0056><loc0078> nodule (PaliGemma) 0 to 1024, y first
<loc_12><loc_34><loc_56><loc_78> (Florence-2)           0 to 1000
<point x="10.5" y="20.0">nodule</point> (Molmo)         0 to 100
polygons as flat lists or pairs, COCO's {"size": [h, w], "counts": ...}     as asked; run lengths have a grid of their
own
nothing: [], "none", "no finding"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from rewards.claims import is_conditional, is_disowned, stances
from rewards.text import table, text_key

BOX_PLACE, POINT_PLACE, MASK_PLACE, ANY = "box", "point", "mask", "place"

MOST_PLACES = 300  # nobody marks more, and matching grows with the cube
MOST_NUMBERS = 20_000  # of all polygons and run lengths together
MOST_PIXELS = 1 << 27  # of all run lengths together
LONGEST = 200_000  # characters
LARGEST = 1e7  # of a coordinate
DEEPEST = 6  # nested lists


class Unread(ValueError):
    """Why a text or label names no places. status: as of a RewardResult."""

    def __init__(self, reason: str, status: str = "unparsed") -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Place:
    """numbers: 4 of a box, 2 of a point, x and y by turns of a polygon; or runs: (counts, height, width).

    lead: the words before it, where they look like a name. scale, order: where the form has its own, whatever was
    asked.
    """

    numbers: tuple[float, ...] = ()
    label: str = ""
    runs: tuple[Any, int, int] | None = None
    scale: float | None = None
    order: str | None = None
    lead: str = ""


# ------------------------------------------------------------------------------------------------- structured values

_SORTS = {
    BOX_PLACE: "a box has 4 numbers",
    POINT_PLACE: "a point has 2 numbers",
    MASK_PLACE: "a polygon has 3 corners or more",
    ANY: "a point has 2 numbers, a box 4, a polygon 6 or more",
}
_NAME_KEYS = ("label", "name", "class", "category", "finding", "object", "phrase")
# Keys that hold places: what stands under another key has that key as its label.
_PLACE_WORDS = (
    "bbox_2d bbox bboxes box boxes bounding_box bounding_boxes coordinates point_2d point points polygon polygons "
    "segmentation mask masks answer objects detections findings regions annotations result results"
)
_PLACE_KEYS = frozenset(_PLACE_WORDS.split())
_OWN_CONVENTIONS: Mapping[str, Mapping[str, Any]] = {"box_2d": {"scale": 1000.0, "order": "yxyx"}}
_CORNER_KEYS: Sequence[tuple[tuple[str, ...], str | None]] = (
    (("x1", "y1", "x2", "y2"), "xyxy"),
    (("xmin", "ymin", "xmax", "ymax"), "xyxy"),
    (("x_min", "y_min", "x_max", "y_max"), "xyxy"),
    (("left", "top", "right", "bottom"), "xyxy"),
    (("x", "y", "width", "height"), "xywh"),
    (("x", "y", "w", "h"), "xywh"),
    (("x", "y"), "xyxy"),
)


def places_in(value: Any, want: str) -> list[Place]:
    """The places of a label or of parsed JSON. Raises Unread."""
    found: list[Place] = []
    numbers = pixels = 0
    for place in _walk(value, want, Place(), 0):
        found.append(place)
        numbers += len(place.numbers)
        pixels += place.runs[1] * place.runs[2] if place.runs else 0
        if len(found) > MOST_PLACES or numbers > MOST_NUMBERS or pixels > MOST_PIXELS:
            raise Unread(f"more than {MOST_PLACES} places, {MOST_NUMBERS} numbers or {MOST_PIXELS} pixels", "conflict")
    return found


def _walk(value: Any, want: str, within: Place, depth: int) -> Iterator[Place]:
    """within: a label and conventions that hold for all inside."""
    if depth > DEEPEST:
        raise Unread(f"lists nested more than {DEEPEST} deep")
    value = _plain(value)
    if isinstance(value, Mapping):
        yield from _of_mapping({str(key).lower(): _plain(item) for key, item in value.items()}, want, within, depth)
    elif isinstance(value, list | tuple):
        numbers = _shape(value, want)
        if numbers is not None:
            yield replace(within, numbers=numbers)
        else:
            for item in value:
                yield from _walk(item, want, within, depth + 1)
    elif depth and _is_none(value):
        return
    else:
        raise Unread(f"{_short(value)} is no {want}")


def _plain(value: Any) -> Any:
    """A table's cell as the JSON that it was."""
    return value.tolist() if hasattr(value, "tolist") else value


def _of_mapping(value: Mapping[str, Any], want: str, within: Place, depth: int) -> Iterator[Place]:
    name = next((value[key] for key in _NAME_KEYS if isinstance(value.get(key), str)), within.label)
    within = replace(within, label=name)
    if {"counts", "size"} <= value.keys():
        yield replace(within, runs=_runs(value["counts"], value["size"], want))
        return
    for keys, order in _CORNER_KEYS:
        if set(keys) <= value.keys():
            yield replace(within, numbers=_numbers([value[key] for key in keys], want), order=order)
            return
    if any(key in value and (value[key] is None or _is_none(value[key])) for key in _PLACE_KEYS):
        return
    lists = {key: item for key, item in value.items() if isinstance(item, list | tuple | Mapping)}
    if not lists:
        raise Unread(f"{_short(dict(value))} holds no {want}")
    for key, item in lists.items():
        known = key in _PLACE_KEYS or key in _OWN_CONVENTIONS
        inner = replace(within, label=name if known else name or key, **_OWN_CONVENTIONS.get(key, {}))
        yield from _walk(item, want, inner, depth + 1)


def _shape(value: Sequence[Any], want: str) -> tuple[float, ...] | None:
    """The numbers of a list that is one place; None for a list of places."""
    if value and all(isinstance(item, int | float) for item in value):
        return _numbers(value, want)
    pairs = bool(value) and all(isinstance(item, list | tuple) and len(item) == 2 for item in value)
    if pairs and (want == MASK_PLACE or (want == BOX_PLACE and len(value) == 2)):
        return _numbers([number for pair in value for number in pair], want)
    return None


def _numbers(given: Sequence[Any], want: str) -> tuple[float, ...]:
    """Raises Unread for what is no finite number, and for another amount of numbers than such a place has."""
    for number in given:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST:
            raise Unread(f"{_short(number)} is no coordinate")
    sort = {4: BOX_PLACE, 2: POINT_PLACE}.get(len(given), MASK_PLACE if len(given) >= 6 and len(given) % 2 == 0 else "")
    if not sort or want not in (sort, ANY):
        raise Unread(f"{_SORTS[want]}, got {len(given)} numbers")
    return tuple(map(float, given))


def _runs(counts: Any, size: Any, want: str) -> tuple[Any, int, int]:
    whole = (
        isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(s, int) and 0 < s <= 4096 for s in size)
    )
    listed = isinstance(counts, list) and all(isinstance(run, int) and not isinstance(run, bool) for run in counts)
    if want not in (MASK_PLACE, ANY) or not whole or not (listed or isinstance(counts, str)):
        raise Unread(
            'run lengths are {"size": [height, width], "counts": [...]} of at most 4096 pixels a side, and of masks'
        )
    if len(counts) > MOST_NUMBERS:
        raise Unread(f"more than {MOST_NUMBERS} run lengths", "conflict")
    return (counts if isinstance(counts, str) else tuple(counts)), size[0], size[1]


# -------------------------------------------------------------------------------------------------------------- texts

_NUMBER = r"[-+]?\d{1,12}(?:\.\d{0,12})?"
_FENCE = re.compile(r"```\w{0,10}")
_NEXT = rf"(?:\s{{0,9}}[,;]\s{{0,9}}|\s{{1,9}}){_NUMBER}"
_BARE = re.compile(rf"{_NUMBER}(?:{_NEXT}){{1,3}}\.?")
_START = re.compile(r"[\[({]|<(?=loc|box>|ref>|points?[ >]|\|(?:object_ref|box)_start)")
_LOCATED = re.compile(r"((?:<loc\d{4}>){4})[ \t]*([^;<\n.]{0,80})")
_INTERNVL = re.compile(r"(?:<ref>([^<]{0,200})</ref>\s{0,9})?<box>([^<]{0,20000})</box>")
_QWEN2 = re.compile(
    r"(?:<\|object_ref_start\|>([^<]{0,200})<\|object_ref_end\|>\s{0,9})?<\|box_start\|>([\d\s(),.]{7,80})<\|box_end\|>"
)
_MOLMO = re.compile(r"<points?((?:\s{1,9}\w{1,9}=\"[^\"<>]{0,200}\"){2,600})\s{0,9}>([^<]{0,200})</points?>")
_MOLMO_XY = re.compile(rf"\b[xy]\d{{0,3}}=\"({_NUMBER})\"")
_FLORENCE = re.compile(r"((?:<loc_\d{1,3}>){4})")
_GROUPED = re.compile(rf"[\[(]\s{{0,9}}{_NUMBER}(?:{_NEXT}){{1,600}}\s{{0,9}}[\])]")
_PAIRED = re.compile(rf"\({_NUMBER}{_NEXT}\)\s{{0,3}}[,;-]?\s{{0,3}}\({_NUMBER}{_NEXT}\)")
_NAMED = re.compile(r"(?:^|[\n,;.])[\s\d.)*-]{0,12}([^\W\d_][^\n,;:=()\[\]]{0,80}?)\s{0,4}[:=]\s{0,4}$")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


_LAST_COMMA = re.compile(r",(?=\s{0,9}[\]}])")
_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def read(text: str, want: str) -> list[Place]:
    """The places that an answer's text names; [] where it says that there is none. Linear in the text. Raises Unread.

    What stands between the places may name or introduce them. Where it denies, doubts, asks or offers another, nothing
    is read.
    """
    if len(text) > LONGEST:
        raise Unread(f"longer than {LONGEST} characters")
    text = _FENCE.sub(" ", text).strip()
    if _says_nothing(text):
        return []
    if _BARE.fullmatch(text):
        return places_in(_floats(text), want)
    found: list[Place] = []
    position = forms = 0
    while (start := _START.search(text, position)) is not None:
        forms += 1
        lead = _led_up(text[position : start.start()])
        places, position = _form(text, start.start(), want)
        found += [replace(place, lead=lead) for place in places]
        if max(forms, len(found)) > MOST_PLACES:
            raise Unread(f"more than {MOST_PLACES} places", "conflict")
    if not position:
        raise Unread(f"the answer names no {want}")
    _led_up(text[position:])
    return found


def _led_up(words: str) -> str:
    """The name that words before a place give it. Raises Unread where they take the place back, or leave it open."""
    if not any(map(str.isalpha, words)) and "?" not in words:
        return ""
    if stances().alternative.search(words):
        raise Unread("alternatives are offered", "conflict")
    if "?" in words or is_disowned(words) or is_conditional(words) or stances().takes_back.search(words):
        raise Unread("the answer is doubted, denied, conditional or taken back", "conflict")
    named = _NAMED.search(words[-120:])
    return named[1].strip(" *_`\"'") if named else ""


def introduces(words: str) -> bool:
    """Whether words before a place only say what follows: "Bounding box: [...]"."""
    return words.lower().replace(" ", "_").rstrip("s") in {key.rstrip("s") for key in _PLACE_KEYS}


def _form(text: str, start: int, want: str) -> tuple[list[Place], int]:
    """The places of the form that begins there, and where it ends."""
    for pattern, made in _TAGGED.items():
        if found := pattern.match(text, start):
            return made(found, want), found.end()
    paired = _PAIRED.match(text, start) if want == BOX_PLACE else None  # the corners of a box
    if grouped := paired or _GROUPED.match(text, start):
        return places_in(_floats(grouped[0]), want), grouped.end()
    if text[start] == "(":
        return [], start + 1  # words in brackets
    value, end = _json(text, start)
    return places_in(value, want), end


def _floats(text: str) -> list[float]:
    return [float(number) for number in re.findall(_NUMBER, text)]


def _located(found: re.Match[str], want: str) -> list[Place]:
    numbers = [int(number) for number in re.findall(r"\d{4}", found[1])]
    label = found[2].strip()
    _led_up(label)
    return [replace(place, label=label, scale=1024.0, order="yxyx") for place in places_in(numbers, want)]


def _thousandths(found: re.Match[str], want: str) -> list[Place]:
    return [replace(place, scale=1000.0, order="xyxy") for place in places_in(_floats(found[1]), want)]


def _per_mille(found: re.Match[str], want: str) -> list[Place]:
    value, _ = _json(f"[{found[2].replace('(', '[').replace(')', ']')}]", 0)
    return [
        replace(place, label=(found[1] or "").strip(), scale=1000.0, order="xyxy") for place in places_in(value, want)
    ]


def _percent(found: re.Match[str], want: str) -> list[Place]:
    numbers = [float(number) for number in _MOLMO_XY.findall(found[1])]
    if len(numbers) % 2:
        raise Unread("a point has 2 numbers")
    pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
    return [replace(place, label=found[2].strip(), scale=100.0, order="xyxy") for place in places_in(pairs, want)]


_TAGGED = {_LOCATED: _located, _FLORENCE: _thousandths, _INTERNVL: _per_mille, _QWEN2: _per_mille, _MOLMO: _percent}


def _json(text: str, start: int) -> tuple[Any, int]:
    """A JSON value, with the round brackets, single quotes and last commas of other languages."""
    for spelt in (str, _respelt):
        try:
            return _DECODER.raw_decode(spelt(text), start)
        except (ValueError, RecursionError):
            continue
    raise Unread("a list, a mapping or a tag that cannot be read, or that never ends")


@lru_cache(maxsize=4)  # a text is asked for at each of its lists
def _respelt(text: str) -> str:
    return _LAST_COMMA.sub(" ", text.replace("'", '"').replace("(", "[").replace(")", "]"))


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and _says_nothing(value)


def _says_nothing(text: str) -> bool:
    return text_key(text.strip().rstrip(".")) in table("answers")["nothing"]


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:57]}..."
