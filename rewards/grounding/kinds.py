"""The records of the kinds `box`, `points` and `mask`: what their prompts ask for, how a label is written and drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from rewards.base import RewardInput
from rewards.grounding.doubts import doubts
from rewards.grounding.forms import ANY, BOX_PLACE, MASK_PLACE, Place, Unread
from rewards.grounding.scale import Frame, answer_frame, label_frame, told
from rewards.grounding.score import corners, middle, places_of, reachable, shares
from rewards.kinds import Kind, KindError


def _read(want: str) -> Callable[[RewardInput], Any]:
    """A label that says in words that there is nothing is []."""

    def read(sample: RewardInput) -> Any:
        if not isinstance(sample.gold, str):
            return sample.gold
        try:
            return sample.gold if places_of(sample.gold, want) else []
        except Unread as error:
            raise KindError(f"answer {sample.gold[:80]!r}: {error}") from None

    return read


def _value(place: Place, numbers: list[float], key: str = "bbox_2d") -> Any:
    """A place as JSON holds it: numbers alone, or under a key beside its label; run lengths as they are."""
    if place.runs is not None:
        counts, height, width = place.runs
        held: dict[str, Any] = {"size": [height, width], "counts": counts if isinstance(counts, str) else list(counts)}
        return {**held, "label": place.label} if place.label else held
    written = [int(number) if float(number).is_integer() else float(number) for number in numbers]
    return {key: written, "label": place.label} if place.label else written


def _text(values: list[Any]) -> list[str]:
    """A label as a model would write it; one place without a name is no list of places."""
    return [json.dumps(values[0] if len(values) == 1 and isinstance(values[0], list) else values, ensure_ascii=False)]


def _boxes(sample: RewardInput) -> list[str]:
    gold = places_of(sample.gold, BOX_PLACE)
    answer = answer_frame(sample.meta)
    as_given = label_frame(sample.meta) == answer and not any(place.scale or place.order for place in gold)
    numbers = [p.numbers for p in gold] if as_given else answer.from_unit(reachable(gold, sample.meta)).round(10)
    return _text([_value(place, list(n)) for place, n in zip(gold, numbers, strict=True)])


def _points(sample: RewardInput) -> list[str]:
    gold, answer = places_of(sample.gold, ANY), answer_frame(sample.meta)
    points = [answer.rounded(answer.from_unit(middle(place, sample.meta)[None]))[0] for place in gold]
    named = [Place(label=place.label) for place in gold]
    return _text([_value(place, list(point), "point_2d") for place, point in zip(named, points, strict=True)])


def _masks(sample: RewardInput) -> list[str]:
    label, answer = label_frame(sample.meta), answer_frame(sample.meta)
    values = []
    for place in places_of(sample.gold, MASK_PLACE):
        numbers = place.numbers if label == answer else answer.from_unit(corners(place, label)).ravel()
        values.append(_value(place, list(numbers), "polygon"))
    return [json.dumps(values)]


def _whole(frame: Frame) -> str:
    numbers = frame.rounded(frame.from_unit(np.array([[0.0, 0.0, 1.0, 1.0]])))[0]
    return json.dumps([int(number) for number in numbers])


def _blind_boxes(samples: Sequence[RewardInput], labels: Sequence[str]) -> list[str]:
    """What can be said of every image without looking: the commonest label, the whole image, the mean place."""
    frames = {answer_frame(sample.meta) for sample in samples}
    constants = [label for label, _ in Counter(labels).most_common(1)]
    if len(frames) != 1:
        return constants
    frame = frames.pop()
    boxes = [shares(gold, label_frame(s.meta)) for s in samples if (gold := places_of(s.gold, BOX_PLACE))]
    if boxes:
        mean = frame.rounded(frame.from_unit(np.concatenate(boxes).mean(0, keepdims=True)))[0]
        constants += [_whole(frame), json.dumps([float(n) for n in mean])]
    return list(dict.fromkeys(constants))


def _other_presence(whole: bool) -> Callable[[RewardInput, str], Mapping[str, str]]:
    """That nothing is there where something is; and a box over all where nothing is."""

    def answers(sample: RewardInput, label: str) -> Mapping[str, str]:
        if label != "[]":
            return {"nothing is there": "[]"}
        return {"the whole image": _whole(answer_frame(sample.meta))} if whole else {}

    return answers


def _drawn(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    parsed = row["parsed"]
    if not isinstance(parsed, Mapping) or not {"said", "gold"} <= parsed.keys():  # of a reward of one's own
        return []
    return [*_items(parsed["said"], "answer"), *_items(parsed["gold"], "label")]


def _items(places: Iterable[Mapping[str, Any]], side: str) -> list[dict[str, Any]]:
    found = []
    for place in places:
        outline = place["outline"]
        outlines = outline if outline and isinstance(outline[0], list) else [outline]
        numbers = ", ".join(f"{number:g}" for number in place.get("numbers") or ())
        worth = place.get("worth")
        found.append(
            {
                "text": " ".join(filter(None, (side, place["label"], numbers and f"[{numbers}]"))),
                "verdict": "right" if worth is None or worth >= 0.5 else "wrong",
                "points": worth,
                "side": side,
                "outlines": outlines,
            }
        )
    return found


_placed = partial(Kind, draw=_drawn, empty=True, sized=True, words=told)

BOX = _placed(
    "box",
    "rewards.grounding:BoxSet",
    {
        "short": "Answer: box, {scale}.",
        "full": 'a JSON list of {"bbox_2d": {box}, "label": name} in {scale}, [] if there is none',
        "direct": 'Answer with a JSON list of {"bbox_2d": {box}, "label": name} in {scale} only; [] if there is none.',
    },
    read=_read(BOX_PLACE),
    write=_boxes,
    undeserving=_other_presence(whole=True),
    constants=_blind_boxes,
    doubts=doubts,
)
POINTS = _placed(
    "points",
    "rewards.grounding:PointSet",
    {
        "short": "Answer: point, {scale}.",
        "full": 'a JSON list of {"point_2d": {point}, "label": name} in {scale}, [] if there is none',
        "direct": 'Answer with a JSON list of {"point_2d": {point}, "label": name} in {scale} only, [] for none.',
    },
    read=_read(ANY),
    write=_points,
    undeserving=_other_presence(whole=False),
    doubts=doubts,
)
MASK = _placed(
    "mask",
    "rewards.grounding:MaskDice",
    {
        "short": "Answer: polygon, {scale}.",
        "full": 'a JSON list of {"polygon": [{point}, ...], "label": name} in {scale}, [] if there is none',
        "direct": 'Answer with a JSON list of {"polygon": [{point}, ...], "label": name} in {scale} only, [] for none.',
    },
    read=_read(MASK_PLACE),
    write=_masks,
    undeserving=_other_presence(whole=False),
)
