"""Boxes, points and masks: the measures against other implementations, the forms that models write, the scales."""

from __future__ import annotations

import csv
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from rewards import RewardInput, build, default_reward
from rewards.grounding import BoxSet, MaskDice, PointSet, geometry
from rewards.grounding.forms import BOX_PLACE, MASK_PLACE, POINT_PLACE, Unread, read
from rewards.preflight import check
from rewards.rows import RowError, read_row

NIH = Path(__file__).parents[3] / "shared" / "data" / "nih_cxr"
PIXELS = {"box_scale": "pixel", "image_size": [640, 480]}


def sample(completion, gold, kind="box", **meta):
    return RewardInput(completion, gold, kind=kind, meta={**PIXELS, **meta})


def score(completion, gold, reward=None, **meta):
    return (reward or BoxSet()).score(sample(completion, gold, **meta))


def boxes(rng, count):
    corners = np.sort(rng.random((count, 2, 2)), axis=1)
    return corners.reshape(count, 4)


# ----------------------------------------------------------------------------------------------------------- measures


def test_iou_and_giou_are_torchvisions():
    ops, torch = pytest.importorskip("torchvision.ops"), pytest.importorskip("torch")
    a, b = boxes(np.random.default_rng(0), 40), boxes(np.random.default_rng(1), 30)
    for ours, theirs in ((geometry.box_iou, ops.box_iou), (geometry.box_giou, ops.generalized_box_iou)):
        assert np.allclose(ours(a, b), theirs(torch.tensor(a), torch.tensor(b)).numpy())


def test_overlap_is_the_same_in_every_scale():
    a, b = boxes(np.random.default_rng(0), 20), boxes(np.random.default_rng(1), 20)
    sides = np.array([640, 480, 640, 480])
    for measure in (geometry.box_iou, geometry.box_giou):
        assert np.allclose(measure(a, b), measure(a * sides, b * sides))


def test_matching_and_f1_are_the_best_of_all_assignments():
    rng = np.random.default_rng(2)
    for _ in range(30):
        iou = rng.random((4, 3)) * (rng.random((4, 3)) < 0.7)
        ways = [[iou[row, column] for column, row in enumerate(rows)] for rows in itertools.permutations(range(4), 3)]
        assert iou[geometry.matched(iou)].sum() == pytest.approx(max(map(sum, ways)))
        most = max(sum(v >= 0.5 for v in way) for way in ways)
        assert geometry.f1_at(iou, 0.5) == pytest.approx(2 * most / 7)


def test_polygons_are_filled_as_scikit_image_does():
    draw = pytest.importorskip("skimage.draw")
    rng = np.random.default_rng(3)
    for _ in range(40):
        corners = rng.random((int(rng.integers(3, 9)), 2))
        theirs = np.zeros((50, 70), bool)
        # Theirs asks about whole coordinates, ours about the middles of pixels.
        theirs[draw.polygon(corners[:, 1] * 50 - 0.5, corners[:, 0] * 70 - 0.5, theirs.shape)] = True
        assert (theirs != geometry.filled(corners, 50, 70)).sum() <= 1


def test_run_lengths_are_cocos():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(4)
    for share in (0.02, 0.5, 0.99):
        picture = rng.random((37, 53)) < share
        packed = mask.encode(np.asfortranarray(picture.astype(np.uint8)))
        counts = geometry.unpacked(packed["counts"].decode())
        assert (geometry.from_runs(counts, 37, 53) == picture).all()


def test_dice_is_that_of_the_masks():
    a, b = np.random.default_rng(5).random((2, 30, 30)) < 0.4
    assert geometry.dice(a, b) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


# -------------------------------------------------------------------------------------------------------------- forms

GOLD = [10, 20, 110, 220]
FORMS = [
    "<answer>[10, 20, 110, 220]</answer>",
    "<think>maybe [1, 2, 3, 4]</think><answer> [10,20,110,220] </answer>",
    "<answer>(10, 20, 110, 220)</answer>",
    "<answer>10, 20, 110, 220</answer>",
    "<answer>[10 20 110 220]</answer>",
    "<answer>[[10, 20, 110, 220],]</answer>",
    "<answer>(10, 20), (110, 220)</answer>",
    "(10,20)-(110,220)",
    "<answer>[[10, 20], [110, 220]]</answer>",
    '```json\n[\n\t{"bbox_2d": [10, 20, 110, 220], "label": "nodule"}\n]\n```',
    '{"bbox_2d": [10, 20, 110, 220]}',
    '{"answer": [10, 20, 110, 220]}',
    '{"answer": "[10, 20, 110, 220]"}',
    '{"nodule": [10.0, 20.0, 110.0, 220.0]}',
    "{'bbox': (10, 20, 110, 220), 'label': 'nodule'}",
    '<answer>{"x1": 10, "y1": 20, "x2": 110, "y2": 220}</answer>',
    '<answer>{"x": 10, "y": 20, "width": 100, "height": 200, "label": "nodule"}</answer>',
    "nodule: [10, 20, 110, 220]",
    "The nodule is at [10, 20, 110, 220].",
    "Bounding box: [10, 20, 110, 220]",
    "**Nodule**: [10, 20, 110, 220]",
    "Here is the box of the nodule that you asked for: [10, 20, 110, 220]",
    "The answer is the nodule: [10, 20, 110, 220]. <answer>[10, 20, 110, 220]</answer>",
    "The answer is [10.0, 20.0, 110.0, 220.0].",
    "\\boxed{[10, 20, 110, 220]}",
    "&lt;answer&gt;[10, 20, 110, 220]&lt;/answer&gt;",
]


@pytest.mark.parametrize("text", FORMS)
def test_a_box_in_the_scale_that_was_asked(text):
    result = score(text, [{"bbox": GOLD, "label": "nodule"}])
    assert (result.value, result.status) == (1.0, "ok"), result.reason


@pytest.mark.parametrize(
    "text",
    [
        "<ref>nodule</ref><box>[[250, 250, 750, 500]]</box>",
        "<box>[[250, 250, 750, 500]]</box>",
        "<|object_ref_start|>nodule<|object_ref_end|><|box_start|>(250,250),(750,500)<|box_end|>",
        "<loc0256><loc0256><loc0512><loc0768> nodule",
        "<loc_250><loc_250><loc_750><loc_500>",
        '[{"box_2d": [250, 250, 500, 750], "label": "nodule"}]',
    ],
)
def test_forms_with_a_scale_of_their_own(text):
    assert score(text, [{"box": [160, 120, 480, 240], "label": "nodule"}]).value == pytest.approx(1.0)
    assert score(text, [160, 120, 480, 240], seen_size=[64, 48]).value == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text, status",
    [
        ("<answer>[10, 20, 110, 220] or [1, 1, 9, 9]</answer>", "conflict"),
        ("<answer>[10, 20, 110, 220]</answer><answer>[1, 1, 9, 9]</answer>", "conflict"),
        ("<answer>not [10, 20, 110, 220]</answer>", "conflict"),
        ("Is it [10, 20, 110, 220]?", "conflict"),
        ("It is unlikely to be at [10, 20, 110, 220].", "conflict"),
        ("If it is a nodule, [10, 20, 110, 220].", "conflict"),
        ("[10, 20, 110, 220]. No, wait.", "conflict"),
        ("The answer is [1, 1, 9, 9]. <answer>[10, 20, 110, 220]</answer>", "conflict"),
        ("<answer>[10, 20, 110, 220", "unparsed"),
        ("<answer>[10, 20, 110]</answer>", "unparsed"),
        ("<answer>[10, 20, 110, 220, 5]</answer>", "unparsed"),
        ("<answer>[10, 20, 110, true]</answer>", "unparsed"),
        ('<answer>["10", "20", "110", "220"]</answer>', "unparsed"),
        ("<answer>[NaN, 20, 110, 220]</answer>", "unparsed"),
        ("<answer>[Infinity, 20, 1e999, 220]</answer>", "unparsed"),
        ("<answer>[10, 20, 110, 1e300]</answer>", "unparsed"),
        ("<answer>[10, 20, 110, " + "9" * 6000 + "]</answer>", "unparsed"),
        ("<answer>the left lower lobe</answer>", "unparsed"),
        ("<answer>{}{}</answer>", "unparsed"),
        ("", "unparsed"),
        ('{"bbox": [10, 20, 110, 220], "bbox": [1, 1, 9, 9]}', "unparsed"),
    ],
)
def test_what_is_no_answer_earns_nothing(text, status):
    result = score(text, GOLD)
    assert result.status == status and result.value == float(status == "ok")


def test_a_cut_answer_is_told_from_an_unread_one():
    cut = RewardInput("<answer>[10, 20, 1", GOLD, kind="box", truncated=True, meta=PIXELS)
    assert BoxSet().score(cut).status == "truncated"


def test_boxes_that_are_none_are_wrong_boxes():
    assert score("<answer>[110, 220, 10, 20]</answer>", GOLD).value == 0
    assert score("<answer>[-1e6, -1e6, 1e6, 1e6]</answer>", GOLD).value < 1e-6


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "<answer>" + "[[" * 50_000 + "]]" * 50_000 + "</answer>",
        "<answer>" + json.dumps([[1, 2, 3, 4]] * 10_000) + "</answer>",
        "<answer>" + "[1, 2, 3, 4], " * 10_000 + "</answer>",
        "<answer>" + "{'a':[]}" * 20_000 + "</answer>",
        "<answer>" + "()" * 80_000 + "</answer>",
        "<answer>" + " " * 190_000 + "1</answer>",
        "<answer>" + "<point " * 20_000 + "</answer>",
        "<answer>" + '<point x="1" ' + 'y="1" ' * 30_000 + "</answer>",
        "<answer>" + "<box>[[" * 20_000 + "</answer>",
        "<answer>" + "<loc0001>" * 20_000 + "</answer>",
        "<answer>" + "a " * 90_000 + "</answer>",
        "<answer>" + "1 " * 90_000 + "</answer>",
        "<answer>" + "x: " * 60_000 + "[1, 2, 3, 4]</answer>",
    ],
    ids=lambda text: f"{text[:24]} x {len(text)}",
)
def test_hostile_texts_end_soon_and_earn_nothing(text):
    for reward, gold in ((BoxSet(), GOLD), (PointSet(), GOLD), (MaskDice(), [[1, 1, 90, 1, 90, 90]])):
        start = time.perf_counter()
        result = reward.score(sample(text, gold))
        assert result.value is not None and result.value < 0.1 and time.perf_counter() - start < 2


def test_hostile_regions_are_bounded():
    runs = {"size": [4096, 4096], "counts": [0, 4096 * 4096]}
    for text in (
        json.dumps([runs] * 100),
        json.dumps([runs] * 60),
        json.dumps({"size": [9e9, 1], "counts": [1]}),
        json.dumps({"size": [4, 4], "counts": [-1, 17]}),
        json.dumps({"size": [4, 4], "counts": "\x7f\x7f"}),
        json.dumps({"size": [4, 4], "counts": "1"}),
        json.dumps([[1, 2] * 9000] * 2),
    ):
        start = time.perf_counter()
        result = MaskDice().score(sample(f"<answer>{text}</answer>", [[1, 1, 90, 1, 90, 90]], kind="mask"))
        assert result.value == 0 and result.status in ("unparsed", "conflict")
        assert time.perf_counter() - start < 2


def test_a_text_is_read_in_time_that_grows_with_it():
    def seconds(count):
        text = "[1, 2, 3, 4] and then " * 14 + "so it is, " * count
        start = time.perf_counter()
        read(text, BOX_PLACE)
        return time.perf_counter() - start

    seconds(10)
    assert seconds(16_000) < 40 * max(seconds(1_000), 1e-3)


def test_points_and_polygons_are_read_too():
    assert [p.numbers for p in read('<point x="50.0" y="25" alt="a">a</point>', POINT_PLACE)] == [(50.0, 25.0)]
    assert read('<points x1="1" y1="2" x2="3" y2="4" alt="a">a</points>', POINT_PLACE)[1].numbers == (3.0, 4.0)
    assert [p.numbers for p in read('[{"point_2d": [3, 4], "label": "a"}]', POINT_PLACE)] == [(3.0, 4.0)]
    assert [p.numbers for p in read("[[3, 4], [5, 6]]", POINT_PLACE)] == [(3.0, 4.0), (5.0, 6.0)]
    assert [p.numbers for p in read("[[1, 1], [9, 1], [9, 9]]", MASK_PLACE)] == [(1.0, 1.0, 9.0, 1.0, 9.0, 9.0)]
    assert len(read("[[1, 1, 9, 1, 9, 9], [2, 2, 3, 2, 3, 3]]", MASK_PLACE)) == 2
    with pytest.raises(Unread):
        read("[[1, 1], [9, 1]]", MASK_PLACE)


# ---------------------------------------------------------------------------------------------------------------- sets


def test_a_box_too_many_costs_as_much_as_one_missing():
    gold = [[0, 0, 100, 100], [200, 200, 300, 300], [400, 0, 500, 100]]
    assert score(json.dumps(gold[::-1]), gold).value == 1
    assert score(json.dumps(gold[:2]), gold).value == pytest.approx(4 / 5)
    assert score(json.dumps([*gold, [5, 300, 50, 400]]), gold).value == pytest.approx(6 / 7)
    twice = score(json.dumps([gold[0]] * 3), gold)
    assert twice.value == pytest.approx(2 / 6) and twice.components["extra"] == 2 and twice.components["missed"] == 2
    blanket = [[x, y, x + 40, y + 40] for x in range(0, 600, 40) for y in range(0, 440, 40)]
    assert score(json.dumps(blanket), gold).value < 0.05


def test_nothing_there_is_an_answer():
    for words in (
        "[]",
        "none",
        "No findings.",
        "<answer>none</answer>",
        "```json\n[]\n```",
        '{"boxes": []}',
        '{"bbox": null}',
        '["none"]',
    ):
        assert score(words, []).value == 1, words
        assert score(words, GOLD).value == 0, words
    for gold in ([], "none", "[]"):
        assert score("<answer>[1, 1, 9, 9]</answer>", gold).value == 0
    assert score("", []).value == 0


def test_names_must_be_right_where_there_are_several():
    gold = [{"bbox": [0, 0, 100, 100], "label": "left lung"}, {"bbox": [200, 0, 300, 100], "label": "heart"}]
    swapped = [{**gold[0], "label": "heart"}, {**gold[1], "label": "left lung"}]
    assert score(json.dumps(gold), gold).value == 1
    assert score(json.dumps(swapped), gold).value == 0
    assert score("[[0, 0, 100, 100], [200, 0, 300, 100]]", gold).value == 0
    assert score("left lung: [0, 0, 100, 100]; heart: [200, 0, 300, 100]", gold).value == 1
    one = [gold[1]]
    assert score("[200, 0, 300, 100]", one).value == 1
    assert score('{"bbox": [200, 0, 300, 100], "label": "liver"}', one).value == 0
    assert score("liver: [200, 0, 300, 100]", one).value == 0
    assert score("cor: [200, 0, 300, 100]", one, synonyms={"heart": ["cor"]}).value == 1


def test_what_is_paid_can_be_chosen():
    near, far = "[10, 20, 110, 120]", "[300, 300, 400, 400]"
    assert score(near, GOLD, BoxSet()).value == pytest.approx(0.5)
    assert score(near, GOLD, BoxSet(least=0.6)).value == 0
    assert score(near, GOLD, BoxSet("f1", thresholds=(0.4, 0.6))).value == pytest.approx(0.5)
    assert 0 < score(far, GOLD, BoxSet("giou")).value < score("[120, 230, 220, 330]", GOLD, BoxSet("giou")).value
    assert score(far, GOLD).value == 0
    for wrong in ({"pay": "dice"}, {"thresholds": ()}, {"thresholds": (2,)}, {"least": 1}):
        with pytest.raises(ValueError):
            BoxSet(**wrong)


def test_a_point_counts_once_and_in_its_region_only():
    gold = [[0, 0, 100, 100], [200, 200, 300, 300]]

    def points(said, gold=gold, **meta):
        return PointSet().score(sample(json.dumps(said), gold, kind="points", **meta)).value

    assert points([[50, 50], [250, 250]]) == 1
    assert points([[50, 50], [60, 60]]) == pytest.approx(0.5)
    assert points([50, 50]) == pytest.approx(2 / 3)
    assert points([150, 150]) == 0 and points([]) == 0 and points([], []) == 1
    triangle = [[0, 0, 100, 0, 0, 100]]
    assert points([20, 20], triangle) == 1 and points([90, 90], triangle) == 0 and points([-5, -5], triangle) == 0
    assert points([33, 30], [[30, 30]], radius=5) == 1 and points([37, 30], [[30, 30]], radius=5) == 0


def test_masks_earn_their_dice():
    rng = np.random.default_rng(6)
    coco = pytest.importorskip("pycocotools.mask")
    a, b = rng.random((2, 40, 60)) < 0.5
    packed = [coco.encode(np.asfortranarray(m.astype(np.uint8))) for m in (a, b)]
    said, gold = ({"size": [40, 60], "counts": p["counts"].decode()} for p in packed)
    result = MaskDice().score(sample(json.dumps([said]), [gold], kind="mask"))
    assert result.value == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert result.components["iou"] == pytest.approx((a & b).sum() / (a | b).sum())
    assert result.components["iou"] == pytest.approx(float(coco.iou([packed[0]], [packed[1]], [0])[0, 0]))
    left, right = [0, 0, 320, 0, 320, 480, 0, 480], [320, 0, 640, 0, 640, 480, 320, 480]
    assert MaskDice().score(sample(json.dumps([left]), [left], kind="mask")).value == 1
    assert MaskDice().score(sample(json.dumps([left]), [right], kind="mask")).value == 0
    assert MaskDice().score(sample(json.dumps([left]), [left, right], kind="mask")).value == pytest.approx(2 / 3)
    named = [{"polygon": left, "label": "left lung"}, {"polygon": right, "label": "right lung"}]
    assert MaskDice().score(sample(json.dumps(named), named, kind="mask")).value == 1
    assert MaskDice().score(sample(json.dumps(named[:1]), named, kind="mask")).value == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("scale", ["pixel", 1, 100, 1000, 1024])
@pytest.mark.parametrize("order", ["xyxy", "yxyx", "xywh", "cxcywh"])
@pytest.mark.parametrize("asked", [None, "pixel", 1, 1000])
def test_every_label_earns_1_in_every_scale_and_only_there(scale, order, asked):
    from rewards.grounding.scale import Frame
    from rewards.kinds import find

    frame = Frame((640.0, 480.0) if scale == "pixel" else (float(scale), float(scale)), order)
    gold = frame.from_unit(np.array([[0.1, 0.2, 0.35, 0.8]])).tolist()
    meta = {"box_scale": scale, "box_order": order, "image_size": [640, 480], "seen_size": [320, 240]}
    meta |= {} if asked is None else {"answer_scale": asked}
    row = RewardInput("", gold, kind="box", meta=meta)
    assert BoxSet().check_gold(row) is None
    (text,) = find("box").write(row)
    again = RewardInput(f"<answer>{text}</answer>", gold, kind="box", meta=meta)
    assert BoxSet().score(again).value == pytest.approx(1.0, abs=1e-9)
    other = {**meta, "answer_scale": 1000 if asked == 1 else 1}
    assert (
        BoxSet().score(RewardInput(f"<answer>{text}</answer>", gold, kind="box", meta=other)).value or 0
    ) < 0.5 or scale == 1


def test_pixels_are_those_of_the_image_that_the_model_saw():
    assert score("<answer>[5, 10, 55, 110]</answer>", GOLD, seen_size=[320, 240]).value == 1
    assert score("<answer>[10, 20, 110, 220]</answer>", GOLD, seen_size=[320, 240]).value < 0.4


@pytest.mark.parametrize(
    "gold, meta, said",
    [
        (GOLD, {"box_scale": None}, "box_scale"),
        (GOLD, {"box_scale": "pixels"}, "'pixel' or a number"),
        (GOLD, {"box_scale": float("nan")}, "'pixel' or a number"),
        (GOLD, {"image_size": None}, "meta.image_size"),
        (GOLD, {"image_size": [640]}, "meta.image_size"),
        (GOLD, {"box_order": "xyyx"}, "meta.box_order"),
        (GOLD, {"file_size": [480, 640]}, "the image 480 x 640"),
        ([10, 20, 110], {}, "a box has 4 numbers"),
        ([10, 20, 110, 480.0001 * 2], {}, "do not lie in the image"),
        ([300, 300, 200, 100], {}, "they would with box_order: xywh"),
        ([500, 100, 900, 400], {}, "they would with box_scale: 1000"),
        ([0.1, 0.2, 0.3, 640.9], {"box_scale": 1}, "they would with"),
        ([1, 1, 1.2, 1.2], {"answer_scale": 100}, "smaller than one step"),
        ({"label": "nodule"}, {}, "holds no box"),
        (7, {}, "is no box"),
    ],
)
def test_a_faulty_label_is_named_with_what_would_mend_it(gold, meta, said):
    meta = {key: value for key, value in {**PIXELS, **meta}.items() if value is not None}
    problem = BoxSet().check_gold(RewardInput("", gold, kind="box", meta=meta))
    assert problem is not None and said in problem
    if "file_size" not in meta:  # the image counts for the label alone
        assert BoxSet().score(RewardInput("<answer>[]</answer>", gold, kind="box", meta=meta)).value is None


def rows(count, box, **meta):
    rng = np.random.default_rng(7)
    return [RewardInput("", box(rng), prompt="Where?", kind="box", meta={**PIXELS, **meta}) for _ in range(count)]


def inside(width, height, decimals=0):
    """A box drawn anywhere in an image of this size."""

    def draw(rng):
        at = np.sort(rng.random((2, 2)), axis=0) * [width, height]
        return [*np.round(at[0], decimals).tolist(), *np.round(at[1] + 10**-decimals, decimals).tolist()]

    return draw


def test_the_preflight_names_labels_that_were_meant_in_another_scale():
    good = check(rows(60, inside(620, 460)), default_reward())
    assert good.ok and not good.doubts, good.text()
    shares = check(rows(60, inside(0.97, 0.97, 2), box_scale=1000), default_reward())
    assert any("box_scale: 1:" in doubt for doubt in shares.doubts), shares.text()
    pixels = check(rows(60, inside(620, 460), box_scale=1000), default_reward())
    assert any("box_scale: pixel" in doubt for doubt in pixels.doubts), pixels.text()
    per_mille = check(rows(60, inside(980, 980)), default_reward())
    assert per_mille.bad and "box_scale: 1000" in per_mille.text() and not per_mille.ok


def test_the_report_names_answers_in_another_scale():
    from rewards.kinds import find

    asked = rows(40, inside(620, 460))
    results = []
    for row in asked:
        x1, y1, x2, y2 = row.gold
        text = f"<answer>[{x1 / 0.64:.0f}, {y1 / 0.48:.0f}, {x2 / 0.64:.0f}, {y2 / 0.48:.0f}]</answer>"
        results.append(BoxSet().score(RewardInput(text, row.gold, kind="box", meta=row.meta)).parsed)
    (doubt,) = find("box").doubts(json.loads(json.dumps(results)))
    assert "box_scale: 1000, box_order: xyxy" in doubt
    right = [
        BoxSet().score(RewardInput(json.dumps(row.gold), row.gold, kind="box", meta=row.meta)).parsed for row in asked
    ]
    assert find("box").doubts(right) == []


# ---------------------------------------------------------------------------------------------------------------- rows


def row(**changes):
    return {
        "id": "1", "images": ["a.png"], "question": "Where is the nodule?", "answer": GOLD, "kind": "box", "meta": PIXELS, **changes
    }  # fmt: skip


def test_rows_of_these_kinds_are_read_like_any_other():
    assert read_row(row()).gold == GOLD
    assert read_row(row(answer=[])).gold == [] and read_row(row(answer="none")).gold == []
    assert read_row(row(kind="points")).kind == "points"
    assert read_row(row(kind="mask", answer=[[1, 1, 90, 1, 90, 90]])).kind == "mask"
    for changes, said in (
        ({"meta": {}}, "box_scale"),
        ({"answer": [1, 2, 3]}, "a box has 4 numbers"),
        ({"answer": "in the left lobe"}, "names no box"),
        ({"kind": "boxes"}, "did you mean 'box'"),
        ({"options": ["a", "b"]}, "options belong to kind 'option'"),
        ({"kind": "open", "answer": []}, "answer is empty"),
    ):
        with pytest.raises(RowError, match=said):
            read_row(row(**changes))


def test_a_spec_may_choose_what_a_kind_pays():
    reward = build(
        {"route": {"box": {"class": "rewards.grounding:BoxSet", "args": {"pay": "f1", "thresholds": [0.75]}}}}
    )
    assert reward.score(sample("[10, 20, 110, 180]", GOLD)).value == 1
    assert default_reward().score(sample("[10, 20, 110, 180]", GOLD)).value == pytest.approx(0.8)


@pytest.mark.skipif(not NIH.is_dir(), reason="needs the NIH boxes")
def test_real_boxes_pass_the_check_and_their_wrong_readings_do_not():
    with (NIH / "labels.csv").open() as file:
        found = [line for line in csv.DictReader(file) if line["bboxes_384(label:x,y,w,h)"]]
    samples = []
    for line in found:
        gold = []
        for text in line["bboxes_384(label:x,y,w,h)"].split(";"):
            label, numbers = text.rsplit(":", 1)
            gold.append({"bbox": [float(n) for n in numbers.split(",")], "label": label.strip()})
        meta = {"box_scale": "pixel", "box_order": "xywh", "image_size": [384, 384]}
        samples.append(RewardInput("", gold, prompt="Where is the finding?", kind="box", meta=meta))
    assert len(samples) >= 40
    report = check(samples, default_reward())
    assert report.ok and not report.doubts, report.text()
    as_corners = [RewardInput("", s.gold, kind="box", meta={**s.meta, "box_order": "xyxy"}) for s in samples]
    assert "box_order: xywh" in check(as_corners, default_reward()).text()


# ------------------------------------------------------------------------------------------------------ other trainers

ROWS = {
    "box": (GOLD, "[10, 20, 110, 220]", "[300, 300, 400, 400]"),
    "points": ([GOLD], "[60, 120]", "[300, 300]"),
    "mask": ([[0, 0, 320, 0, 320, 480, 0, 480]], "[[0, 0, 320, 0, 320, 480, 0, 480]]", "[[330, 0, 640, 0, 640, 480]]"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_other_trainers_get_these_rewards_too(kind):
    torch = pytest.importorskip("torch")
    from rewards.adapters import to_openrlhf, to_trl, to_verl

    gold, right, wrong = ROWS[kind]
    texts = [f"<answer>{right}</answer>", f"<answer>{wrong}</answer>"]
    fields = {"kind": kind, "meta": PIXELS}
    logged = {}
    trl = to_trl(default_reward())
    columns = {key: [value] * 2 for key, value in fields.items()}
    values = trl(prompts=["?"] * 2, completions=texts, answer=[gold] * 2, log_metric=logged.__setitem__, **columns)
    assert values == [1.0, 0.0] and logged[f"compose/answer/{kind}"] == 0.5
    verl = to_verl(default_reward())
    assert [verl("set", text, gold, fields)["score"] for text in texts] == [1.0, 0.0]
    openrlhf = to_openrlhf(default_reward())
    label = json.dumps({"answer": gold, **fields})
    found = openrlhf([f"Where? {text}" for text in texts], ["Where? "] * 2, [label] * 2)
    assert torch.equal(found["rewards"], torch.tensor([1.0, 0.0]))


def test_a_tables_arrays_are_boxes_too():
    gold = np.array([{"bbox": np.array([10, 20, 110, 220]), "label": None}], dtype=object)
    assert BoxSet().score(sample("[10, 20, 110, 220]", gold)).value == 1


def test_the_command_checks_rows_of_these_kinds(tmp_path, capsys):
    from rewards.preflight import main

    file = tmp_path / "rows.jsonl"
    rows = [
        {"id": f"{kind}{n}", "images": ["a.png"], "question": "Where?", "answer": gold, "kind": kind, "meta": PIXELS}
        for kind, (gold, *_) in ROWS.items()
        for n in range(2)
    ]
    rows.append({**rows[0], "id": "none", "answer": []})
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["check", str(file)]) == 0, capsys.readouterr().out
    file.write_text(json.dumps({**rows[0], "answer": [10, 20, 700, 220]}))
    assert main(["check", str(file)]) == 1
    assert "do not lie in the image" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- real masks


def test_nuclei_are_found_by_their_own_boxes_points_and_masks():
    """Stardist's labelled nuclei, as boxes, as points and as COCO's run lengths."""
    coco, measure = pytest.importorskip("pycocotools.mask"), pytest.importorskip("skimage.measure")
    from lingshu_rl.demo.read import nucleus_labels
    from rewards.kinds import find

    tile = nucleus_labels()[:128, :128]
    found = measure.regionprops(tile)
    meta = {"box_scale": "pixel", "box_order": "yxyx", "image_size": [128, 128]}
    packed = [coco.encode(np.asfortranarray((tile == region.label).astype(np.uint8))) for region in found]
    golds = {
        "box": [list(region.bbox) for region in found],
        "points": [{"size": [128, 128], "counts": p["counts"].decode()} for p in packed],
    }
    golds["mask"] = golds["points"]
    assert len(found) > 10
    for kind, gold in golds.items():
        row = RewardInput("", gold, kind=kind, meta=meta)
        (text,) = find(kind).write(row)
        assert default_reward().score(RewardInput(f"<answer>{text}</answer>", gold, kind=kind, meta=meta)).value == 1
    shifted = [[y1 + 3, x1, y2 + 3, x2] for y1, x1, y2, x2 in golds["box"]]
    moved = BoxSet().score(RewardInput(json.dumps(shifted), golds["box"], meta=meta))
    assert 0.5 < moved.value < 0.95 and moved.components["missed"] <= 3


def test_a_segmentation_of_dicom_is_a_label():
    """pydicom's liver segmentation: its box, and a polygon around it, against its run lengths."""
    pydicom, measure = pytest.importorskip("pydicom"), pytest.importorskip("skimage.measure")
    from lingshu_rl.demo.read import dicom_file

    mask = pydicom.dcmread(dicom_file("liver_1frame.dcm")).pixel_array > 0
    height, width = mask.shape
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel().astype(int), [0]]))), prepend=0).tolist()
    gold = {"size": [height, width], "counts": [*runs, height * width - sum(runs)]}
    largest = max(measure.find_contours(mask.astype(float), 0.5), key=len)
    polygon = (largest[:, ::-1] + 0.5).ravel().tolist()
    meta = {"box_scale": "pixel", "image_size": [width, height]}
    said = RewardInput(f"<answer>{json.dumps([polygon])}</answer>", [gold], kind="mask", meta=meta)
    assert MaskDice().score(said).value > 0.95
