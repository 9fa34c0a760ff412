"""Rewards for places: boxes, points and masks, compared in shares of the image's sides."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rewards.answer import extract
from rewards.base import Reward, RewardInput, RewardResult
from rewards.grounding import geometry
from rewards.grounding.forms import ANY, BOX_PLACE, MASK_PLACE, POINT_PLACE, Place, Unread, introduces, places_in, read
from rewards.grounding.scale import Frame, ScaleError, answer_frame, label_frame, other_readings, size_in
from rewards.open_answers import texts_of
from rewards.wording import answer_key

Meta = Mapping[str, Any]

OUTSIDE = 0.01  # shares of a side by which a label may stand over the edge, as measured ones do
GRID = 512  # pixels a side on which polygons are compared, where the row tells no size
LARGEST_GRID = 1024
MOST_REGIONS = 64  # of a mask
LONGEST_NAME = 3  # words before a place that are taken for a name, right or wrong
FOUND = 0.5  # IoU from which a box counts as found, in components


class Located(Reward):
    """What the rewards for places share.

    gold: places in any form of `rewards.grounding.forms`; [] or "none" where there is nothing to find, which is then
    the right answer. meta: box_scale, box_order, image_size of the label; answer_scale, answer_order, seen_size of the
    answer, by default as the label (`rewards.grounding.scale`); file_size, which a run knows, is held against
    image_size.
    `meta["synonyms"]` maps a label to other names. An answer needs no names where the label has at most one.
    """

    want = BOX_PLACE  # what an answer holds
    labelled = BOX_PLACE  # what a label holds

    def score(self, sample: RewardInput) -> RewardResult:
        if problem := self._faulty(sample):
            return RewardResult(None, "gold_invalid", reason=problem)
        try:
            said = said_in(sample.completion, self.want)
            return self.compare(said, places_of(sample.gold, self.labelled), sample.meta)
        except Unread as error:
            cut = sample.truncated and not extract(sample.completion).closed
            return RewardResult(0.0, "truncated" if cut else error.status, reason=str(error))

    def check_gold(self, sample: RewardInput) -> str | None:
        # The image counts for a label alone: a control may show another one than was measured.
        return self._faulty(sample) or _other_file(sample.meta)

    def _faulty(self, sample: RewardInput) -> str | None:
        try:
            gold = places_of(sample.gold, self.labelled)
            fault = _no_synonyms(sample.meta) or _misplaced(gold, sample.meta) or self.fault(gold, sample.meta)
        except (Unread, ScaleError) as error:
            fault = str(error)
        return f"label {_short(sample.gold)}: {fault}" if fault else None

    def fault(self, gold: Sequence[Place], meta: Meta) -> str | None:
        """What is wrong with a label that lies in the image. Raises Unread, ScaleError."""
        raise NotImplementedError

    def compare(self, said: Sequence[Place], gold: Sequence[Place], meta: Meta) -> RewardResult:
        """Raises Unread for an answer that cannot be compared."""
        raise NotImplementedError


class BoxSet(Located):
    """Boxes against the label's boxes, one to one; a box too many costs as much as one that is missing.

    pay: "iou": 2 x (sum of the pairs' IoU) / (boxes said + boxes of the label), for one box each its IoU; "f1": F1 at
    the IoU `thresholds`, their mean; "giou": as "iou" with (1 + GIoU) / 2, which also tells apart boxes that do not
    touch, and pays every box something. least: pairs that overlap by less are no pairs ("iou" alone).
    A label in another scale than the answer's is first rounded to numbers of that scale: no answer could come nearer.
    components: iou and giou (means over the label's boxes), f1 (mean over thresholds), missed and extra (boxes without
    a partner at IoU 0.5).
    """

    name = "boxes"

    def __init__(self, pay: str = "iou", thresholds: Sequence[float] = (FOUND,), least: float = 0.0) -> None:
        if pay not in ("iou", "f1", "giou"):
            raise ValueError(f"pay is iou, f1 or giou, got {pay!r}")
        if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
            raise ValueError(f"thresholds are IoUs in (0, 1], got {thresholds!r}")
        if not 0 <= least < 1:
            raise ValueError(f"least must be in [0, 1), got {least}")
        self.pay, self.thresholds, self.least = pay, tuple(thresholds), least

    def fault(self, gold: Sequence[Place], meta: Meta) -> str | None:
        if not geometry.areas(reachable(gold, meta)).all():
            return "has a box smaller than one step of the scale that answers are asked in"
        return None

    def compare(self, said: Sequence[Place], gold: Sequence[Place], meta: Meta) -> RewardResult:
        at, right, kin = shares(said, answer_frame(meta)), reachable(gold, meta), alike(said, gold, meta)
        iou, giou = geometry.box_iou(at, right) * kin, np.where(kin, geometry.box_giou(at, right), -1.0)
        pairs = geometry.matched(np.where(iou >= self.least, iou, 0.0))
        overlap, found = float(iou[pairs].sum()), int((iou[pairs] >= FOUND).sum())
        f1 = float(np.mean([geometry.f1_at(iou, threshold) for threshold in self.thresholds]))
        halves = (1 + giou) / 2
        near = float(halves[geometry.matched(halves)].sum())
        pays = {"iou": geometry.f1(overlap, *iou.shape), "f1": f1, "giou": geometry.f1(near, *iou.shape)}
        value = min(1.0, pays[self.pay])
        full = float(not said)  # where nothing was to be found
        return RewardResult(
            value,
            parsed=_drawn(said, at, gold, right, pairs, iou, meta),
            reason=_reason(value, f"{found} of {len(gold)} boxes found by {len(said)}, IoU {overlap:.2f} in all"),
            components={
                "iou": overlap / len(gold) if gold else full,
                "giou": (2 * near - len(gold)) / len(gold) if gold else full,
                "f1": f1,
                "missed": len(gold) - found,
                "extra": len(said) - found,
            },
        )


class PointSet(Located):
    """Points in the label's regions (the pointing game): F1 of points that hit a region, each region counted once.

    The label's regions are boxes, polygons, run lengths, or points, which are hit within `meta.radius` (in the label's
    own numbers). components: hits, missed, extra.
    """

    name = "points"
    want, labelled = POINT_PLACE, ANY

    def fault(self, gold: Sequence[Place], meta: Meta) -> str | None:
        radius = meta.get("radius")
        if any(len(place.numbers) == 2 for place in gold) and not (isinstance(radius, int | float) and radius > 0):
            return "points need meta.radius, how far off an answer may be"
        for place in gold:
            if place.runs is not None:
                _picture(place)
        return None

    def compare(self, said: Sequence[Place], gold: Sequence[Place], meta: Meta) -> RewardResult:
        at = shares(said, answer_frame(meta), 2)
        inside = np.array([hits(at, place, meta) for place in gold], bool).reshape(len(gold), len(said)).T
        hit = (inside & alike(said, gold, meta)).astype(float)
        pairs = geometry.matched(hit)
        count = len(pairs[0])
        value = geometry.f1(count, *hit.shape)
        right = np.array([middle(place, meta) for place in gold]).reshape(-1, 2)
        return RewardResult(
            value,
            parsed=_drawn(said, at, gold, right, pairs, hit, meta),
            reason=_reason(value, f"{count} of {len(gold)} regions hit by {len(said)} points"),
            components={"hits": count, "missed": len(gold) - count, "extra": len(said) - count},
        )


class MaskDice(Located):
    """Dice of the regions under each label (2 |A and B| / (|A| + |B|)), the mean over all labels that either side
    names.

    Regions are polygons or run lengths; those of one label are united. They are compared on the grid of the label's run
    lengths, else on the image's (at most 1024 pixels a side), else on 512 x 512; a pixel belongs to a polygon that
    holds its middle. components: dice, iou.
    """

    name = "mask"
    want = labelled = MASK_PLACE

    def fault(self, gold: Sequence[Place], meta: Meta) -> str | None:
        masks = united(gold, _named(gold, gold, meta), label_frame(meta), grid_of(gold, meta))
        return None if all(mask.any() for mask in masks.values()) else "a region covers no pixel"

    def compare(self, said: Sequence[Place], gold: Sequence[Place], meta: Meta) -> RewardResult:
        grid = grid_of(gold, meta)
        right = united(gold, _named(gold, gold, meta), label_frame(meta), grid)
        told = united(said, _named(said, gold, meta), answer_frame(meta), grid)
        empty = np.zeros(grid, bool)
        labels = sorted({*right, *told})
        scores = [geometry.dice(told.get(label, empty), right.get(label, empty)) for label in labels] or [1.0]
        value = float(np.mean(scores))
        worth = dict(zip(labels, scores, strict=False))
        return RewardResult(
            value,
            parsed={
                "said": [_item(label, outline(mask), worth[label]) for label, mask in told.items()],
                "gold": [_item(label, outline(mask), worth[label]) for label, mask in right.items()],
            },
            reason=_reason(value, f"Dice {value:.2f}"),
            components={"dice": value, "iou": float(np.mean([score / (2 - score) for score in scores]))},
        )


# ------------------------------------------------------------------------------------------------------------ reading


def places_of(gold: Any, want: str) -> list[Place]:
    """The places of a label, given as values or as text. Raises Unread."""
    return read(gold, want) if isinstance(gold, str) else places_in(gold, want)


def said_in(completion: str, want: str) -> list[Place]:
    """The places that a completion gives as its answer. Raises Unread."""
    answer = extract(completion)
    if answer.status != "ok":
        raise Unread(answer.reason, answer.status)
    texts = [answer.body[c.start : c.end] for c in answer.candidates] or [answer.body]
    first, *others = [read(text, want) for text in texts]
    others += _beside([answer.body[c.start : c.end] for c in answer.lower], want)
    if any(_spots(places) != _spots(first) for places in others):
        raise Unread("several different answers", "conflict")
    return first


def _spots(places: Sequence[Place]) -> list[str]:
    """Places without their names, in an order of their own."""
    return sorted(repr(replace(place, label="", lead="")) for place in places)


def _beside(texts: Iterable[str], want: str) -> list[list[Place]]:
    """The places named beside the answer, which may veto it; words that name none do not."""
    found = []
    for text in texts:
        try:
            found.append(read(text, want))
        except Unread:
            continue
    return [places for places in found if places]


def own_frame(place: Place, frame: Frame) -> Frame:
    """The frame of a place: a form's own scale and order go before those asked for."""
    return Frame((place.scale, place.scale) if place.scale else frame.full, place.order or frame.order)


def shares(places: Sequence[Place], frame: Frame, width: int = 4) -> np.ndarray:
    """(n, 4) corners of boxes, or (n, 2) points with a width of 2, in shares of the image's sides."""
    return np.array([own_frame(p, frame).to_unit(np.array([p.numbers]))[0] for p in places]).reshape(-1, width)


def reachable(gold: Sequence[Place], meta: Meta) -> np.ndarray:
    """The label's boxes in shares, as near as the numbers of an answer can come to them."""
    label, answer = label_frame(meta), answer_frame(meta)
    at = shares(gold, label)
    exact = np.array([own_frame(place, label).full == answer.full for place in gold], bool)
    if exact.all():
        return at
    return np.where(exact[:, None], at, answer.to_unit(answer.rounded(answer.from_unit(at))))


def corners(place: Place, frame: Frame) -> np.ndarray:
    """(n, 2): the corners of a box or polygon, or a point, in shares of the sides."""
    numbers = np.array(place.numbers)
    if len(numbers) == 4:
        x1, y1, x2, y2 = own_frame(place, frame).to_unit(numbers[None])[0]
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    return own_frame(place, frame).to_unit(numbers.reshape(-1, 2))


# ------------------------------------------------------------------------------------------------------------- labels


def _keys(places: Sequence[Place], meta: Meta) -> list[str]:
    """The names of places as they are compared; "" for none."""
    synonyms = meta.get("synonyms") or {}
    names = {
        answer_key(other): answer_key(str(name)) for name, others in synonyms.items() for other in texts_of(others)
    }
    return [names.get(key, key) for key in (answer_key(place.label) for place in places)]


def alike(said: Sequence[Place], gold: Sequence[Place], meta: Meta) -> np.ndarray:
    """(said, gold): whether the names of two places allow them to be one."""
    told, wanted = _named(said, gold, meta), _named(gold, gold, meta)
    return np.array([[a == b for b in wanted] for a in told], bool).reshape(len(said), len(gold))


def _named(places: Sequence[Place], gold: Sequence[Place], meta: Meta) -> list[str]:
    """Names by which places are held against the label: where it has at most one, none and the label's own are one."""
    if not any(place.label for place in gold):
        return [""] * len(places)
    wanted = set(_keys(gold, meta))
    only = next(iter(wanted)) if len(wanted) == 1 else ""
    keys = _keys([p if p.label else replace(p, label=_name_in(p.lead, wanted)) for p in places], meta)
    return [key or only for key in keys]


def _name_in(lead: str, wanted: Collection[str]) -> str:
    """What words before a place name: a right name, or a few words that would be one; other words introduce it."""
    known = answer_key(lead) in wanted
    return lead if known or (len(lead.split()) <= LONGEST_NAME and not introduces(lead)) else ""


# ------------------------------------------------------------------------------------------------------------ regions


def hits(points_N2: np.ndarray, place: Place, meta: Meta) -> np.ndarray:
    """(n,): which points lie in a region of the label."""
    inside = ((points_N2 >= 0) & (points_N2 < 1)).all(-1)
    frame = label_frame(meta)
    if place.runs is not None or len(place.numbers) > 4:
        picture = _picture(place, frame, grid_of([place], meta))
        rows, columns = (np.clip(points_N2[:, ::-1], 0, 1 - 1e-9) * picture.shape).astype(int).T
        return picture[rows, columns] & inside
    around = corners(place, frame)
    if len(place.numbers) == 4:
        return ((points_N2 >= around[0]) & (points_N2 <= around[2])).all(-1)
    away = (points_N2 - around[0]) * np.array(frame.full) / float(meta["radius"])
    return (away**2).sum(-1) <= 1


def middle(place: Place, meta: Meta) -> np.ndarray:
    """(2,): a point inside of a region, in shares: of a box its middle, of a mask the pixel deepest in it."""
    frame = label_frame(meta)
    if place.runs is None and len(place.numbers) <= 4:
        return corners(place, frame).mean(0)
    from scipy.ndimage import distance_transform_edt

    picture = np.pad(_picture(place, frame, grid_of([place], meta)), 1)
    row, column = np.unravel_index(distance_transform_edt(picture).argmax(), picture.shape)
    return np.array([column - 0.5, row - 0.5]) / np.array(picture.shape)[::-1]


def grid_of(gold: Sequence[Place], meta: Meta) -> tuple[int, int]:
    """Height and width of the pictures on which regions are compared."""
    for place in gold:
        if place.runs is not None:
            return place.runs[1], place.runs[2]
    size = size_in(meta, "image_size")
    if size is None:
        return GRID, GRID
    shrunk = min(1.0, LARGEST_GRID / max(size))
    return max(1, round(size[1] * shrunk)), max(1, round(size[0] * shrunk))


def united(places: Sequence[Place], names: Sequence[str], frame: Frame, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Boolean pictures of the regions under each name. Raises Unread."""
    if len(places) > MOST_REGIONS:
        raise Unread(f"more than {MOST_REGIONS} regions", "conflict")
    found: dict[str, np.ndarray] = {}
    for place, name in zip(places, names, strict=True):
        found[name] = found.get(name, False) | _picture(place, frame, grid)
    return found


def _picture(place: Place, frame: Frame | None = None, grid: tuple[int, int] | None = None) -> np.ndarray:
    """A region as a boolean picture: of its own size without a grid, which polygons need. Raises Unread."""
    if place.runs is None:
        assert frame is not None and grid is not None
        return geometry.filled(corners(place, frame), *grid)
    counts, height, width = place.runs
    try:
        picture = geometry.from_runs(geometry.unpacked(counts) if isinstance(counts, str) else counts, height, width)
    except (ValueError, OverflowError) as error:
        raise Unread(str(error)) from None
    return picture if grid in (None, picture.shape) else geometry.sampled(picture, *grid)


# ------------------------------------------------------------------------------------------------------ faulty labels


def _other_file(meta: Meta) -> str | None:
    said, found = size_in(meta, "image_size"), size_in(meta, "file_size")
    if said and found and said != found:
        return f"meta.image_size is {said[0]:g} x {said[1]:g}, the image {found[0]:g} x {found[1]:g}"
    return None


def _no_synonyms(meta: Meta) -> str | None:
    synonyms = meta.get("synonyms") or {}
    if isinstance(synonyms, Mapping) and all(
        isinstance(names, str | list | tuple | None) for names in synonyms.values()
    ):
        return None
    return f"meta.synonyms maps a name to others, got {_short(synonyms)}"


def _misplaced(gold: Sequence[Place], meta: Meta) -> str | None:
    """Why the label's places do not lie in the image, and the reading of the row's numbers under which they would."""
    frame, _ = label_frame(meta), answer_frame(meta)
    told = [place for place in gold if place.runs is None]
    if _lie_inside(told, frame):
        return None
    fitting = [name for name, other in other_readings(meta) if _lie_inside(told, other)]
    hint = f"; they would with {' or '.join(fitting[:2])}" if fitting else ""
    edges = " x ".join(f"{edge:g}" for edge in frame.full)
    return f"its numbers do not lie in the image as {frame.order} of {edges}{hint}"


def _lie_inside(places: Sequence[Place], frame: Frame) -> bool:
    """Whether places have an area and stay in the image, but for a hair's breadth."""
    for place in places:
        at = corners(place, frame)
        if at.min() < -OUTSIDE or at.max() > 1 + OUTSIDE:
            return False
        if len(place.numbers) == 4 and not (at[0] < at[2]).all():
            return False
    return True


# ------------------------------------------------------------------------------------------------------------ drawing


def _item(label: str, outline: Any, worth: float | None = None) -> dict[str, Any]:
    return {"label": label, "outline": outline, **({} if worth is None else {"worth": round(worth, 3)})}


def _drawn(
    said: Sequence[Place],
    at: np.ndarray,
    gold: Sequence[Place],
    right: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    worth: np.ndarray,
    meta: Meta,
) -> dict[str, Any]:
    """What was said and what is right, outlined in shares of the image's sides, with the numbers as written."""
    best = dict(zip(pairs[0].tolist(), worth[pairs].tolist(), strict=True))
    frame = answer_frame(meta)
    size = size_in(meta, "seen_size") or size_in(meta, "image_size")
    return {
        "said": [
            _item(p.label, np.round(a, 4).tolist(), best.get(i, 0.0)) | _as_asked(p)
            for i, (p, a) in enumerate(zip(said, at, strict=True))
        ],
        "gold": [_item(p.label, np.round(a, 4).tolist()) for p, a in zip(gold, right, strict=True)],
        "frame": [*frame.full, frame.order],
        "size": list(size) if size else None,
    }


def _as_asked(place: Place) -> dict[str, Any]:
    """The numbers of a form that follows the question; those of one with a scale of its own say nothing about it."""
    return {} if place.scale or place.order else {"numbers": list(place.numbers)}


def outline(mask: np.ndarray, side: int = 64) -> list[list[float]]:
    """A region as rows of boxes, in shares, on a grid of at most `side` cells: enough to see it."""
    height, width = (min(side, n) for n in mask.shape)
    small = np.pad(geometry.sampled(mask, height, width), ((0, 0), (1, 1))).astype(np.int8)
    rows, starts = np.nonzero(np.diff(small) == 1)
    _, ends = np.nonzero(np.diff(small) == -1)
    boxes = np.stack([starts / width, rows / height, ends / width, (rows + 1) / height], -1)
    return np.round(boxes, 4).tolist()


def _reason(value: float, told: str) -> str:
    return "" if value >= 1 - 1e-9 else told


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:77]}..."
