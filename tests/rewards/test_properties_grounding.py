"""Whatever a model writes, the rewards for places give a result, and never pay a text that names no place for one."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import RewardInput
from rewards.grounding import BoxSet, MaskDice, PointSet

META = {"box_scale": "pixel", "image_size": [64, 48]}
PIECES = st.sampled_from(
    [
        *"[](){}<>,:;.\"'-+ \n0123456789eE", "NaN", "Infinity", "null", "true", "1e999", "[1, 2, 3, 4]", "[[1, 2], [3, 4]]",
        '{"bbox_2d": [1, 2, 3, 4], "label": "a"}', '"label"', '"counts"', '"size"', '{"size": [4, 4], "counts": "04"}',
        '{"size": [2, 2], "counts": [1, 2, 1]}', "<loc0001>", "<loc0001><loc0002><loc0300><loc0400>", "<box>", "</box>", "<ref>",
        "</ref>", "<|box_start|>", "<|box_end|>", "(1,2),(3,4)", '<point x="1" y="2">', "</point>", "<answer>", "</answer>", "<think>",
        "</think>", "\\boxed{", "}", "none", " or ", " not ", "nodule: ", "```json\n", "```", "The answer is ", "\u0664", "\u2028",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=60)
REWARDS = (
    (BoxSet(), [1, 2, 3, 4]),
    (PointSet(), [1, 2, 3, 4]),
    (MaskDice(), [[1, 1, 9, 1, 9, 9]]),
    (BoxSet("giou"), []),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_every_text_has_a_result(text):
    for reward, gold in REWARDS:
        result = reward.score(RewardInput(text, gold, meta=META))
        assert result.value is not None and 0 <= result.value <= 1
        json.dumps(result.parsed, allow_nan=False)
        if gold and not any(character.isdigit() for character in text):
            assert result.value == 0


NUMBERS = st.integers(-100, 200) | st.floats(allow_nan=True) | st.booleans() | st.text(max_size=3) | st.none()
LABELS = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["bbox", "label", "x1", "a"]), inner),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(LABELS, st.dictionaries(st.sampled_from(["box_scale", "box_order", "image_size", "radius", "synonyms"]), LABELS))
def test_every_label_is_checked_without_an_exception(label, meta):
    for reward, _ in REWARDS:
        sample = RewardInput("<answer>[1, 2, 3, 4]</answer>", label, meta={**META, **meta})
        problem = reward.check_gold(sample)
        assert (reward.score(sample).value is None) == (problem is not None)
