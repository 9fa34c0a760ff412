"""Groups -> rows: every completion once, prompts not repeated without need, budgets kept, bad input refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import gradient_gap, logprob_gap, score
from tiny_models import IMAGE, VIDEO, build, config_of, group, words

from lingshu_rl.model.families import model_spec, mrope_positions
from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.packing import build_row, pack, plan_rows
from lingshu_rl.types import TokenGroup

TEXT_CONFIG = config_of("qwen2")
QWEN_CONFIG = config_of("qwen2_5_vl")

group_shapes = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=6)), min_size=1, max_size=6
)


def groups_of(shapes: list[tuple[int, list[int]]]) -> list[TokenGroup]:
    """Distinct ids throughout, so that a misplaced token shows."""
    counter = iter(range(3, 100_000))
    return [
        TokenGroup(
            str(n),
            tuple(next(counter) for _ in range(prompt)),
            tuple(tuple(next(counter) for _ in range(length)) for length in lengths),
            {},
        )
        for n, (prompt, lengths) in enumerate(shapes)
    ]


@given(group_shapes, st.integers(1, 60), st.sampled_from(["shared", "dense"]))
@settings(max_examples=150, deadline=None)
def test_every_completion_is_scored_once_after_its_own_prompt(shapes, budget: int, layout: str) -> None:
    groups = groups_of(shapes)
    rows = pack(groups, TEXT_CONFIG, budget, layout)
    seen = [(g, m) for row in rows for g, m, _ in row.members]
    assert sorted(seen) == [(g, m) for g, one in enumerate(groups) for m in range(len(one.completions))]
    for row in rows:
        ids = row.input_ids_1S[0]
        targets = row.target_T.split([n for *_, n in row.members])
        places = row.row_T.split([n for *_, n in row.members])
        for (g, m, _), target, place in zip(row.members, targets, places, strict=True):
            assert tuple(target.tolist()) == groups[g].completions[m]
            # What each token is predicted from: the token before it in the unshared sequence, at its position.
            before = row.keep_U[place]
            sequence = groups[g].prompt_ids + groups[g].completions[m]
            start = len(groups[g].prompt_ids) - 1
            assert tuple(ids[before].tolist()) == sequence[start:-1]
            assert row.logical_S[before].tolist() == list(range(start, len(sequence) - 1))
            if not row.dense:
                assert row.positions[0, before].tolist() == list(range(start, len(sequence) - 1))
        assert row.keep_U.unique(sorted=True).equal(row.keep_U)
        assert row.sequence_T.bincount(minlength=len(row.members)).tolist() == [n for *_, n in row.members]


@given(group_shapes, st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_rows_keep_the_budget_and_split_no_group_that_fits(shapes, budget: int) -> None:
    groups = groups_of(shapes)
    rows = pack(groups, TEXT_CONFIG, budget)
    for row in rows:
        assert row.tokens <= budget or len(row.members) == 1
    for g, one in enumerate(groups):
        size = len(one.prompt_ids) + sum(len(c) - 1 for c in one.completions)
        holders = sum(any(index == g for index, *_ in row.members) for row in rows)
        assert holders == 1 or size > budget
    # No two rows could have been one: first fit leaves at most one row under half full.
    assert sum(row.tokens * 2 <= budget for row in rows) <= 1


@given(group_shapes, st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_batches_keep_the_budget_and_read_no_more_than_one_batch_filled_up_would(shapes, budget: int) -> None:
    groups = groups_of(shapes)
    rows = pack(groups, TEXT_CONFIG, budget, "dense")
    lengths = [len(one.prompt_ids) + len(c) - 1 for one in groups for c in one.completions]
    assert sorted(span.end - span.start for row in rows for span in row.spans) == sorted(lengths)
    assert all(row.tokens <= budget or len(row.spans) == 1 for row in rows)
    assert sum(lengths) <= sum(row.tokens for row in rows) <= len(lengths) * max(lengths)


def test_groups_fill_a_row_and_share_their_prompt() -> None:
    groups = groups_of([(10, [5, 5, 5]), (8, [4, 4]), (30, [2])])
    rows = pack(groups, TEXT_CONFIG, 40)
    assert [row.tokens for row in rows] == [10 + 12 + 8 + 6, 31]
    assert rows[0].group_S.unique().tolist() == [0, 1]
    assert rows[0].branch_S[:10].eq(-1).all()


def test_equal_completions_stand_in_the_row_once_and_are_scored_each() -> None:
    """Also where the budget splits the group, whose second row must hold the completion again."""
    model = build("qwen3")
    one, two = tuple(words(6)), tuple(words(4))
    groups = [TokenGroup("a", tuple(words(9)), (one, two, one, one, two, (5,), (5,)), {})]
    (row,) = pack(groups, model, 512)
    assert row.tokens == 9 + 5 + 3 and row.spans[0].branches == (5, 3, 0)
    assert [n for *_, n in row.members] == [6, 4, 6, 6, 4, 1, 1] and len(row.target_T) == 28
    assert sorted(m for r in pack(groups, model, 15) for _, m, _ in r.members) == list(range(7))
    assert all(r.tokens <= 15 for r in pack(groups, model, 15))
    weights = [[torch.randn(len(c)) for c in groups[0].completions]]
    dense = score(model, pack(groups, model, 1, "dense"), weights)
    for budget in (512, 15):
        shared = score(model, pack(groups, model, budget), weights)
        assert logprob_gap(dense[0], shared[0]) < 1e-5 and gradient_gap(dense[1], shared[1]) < 1e-4


def test_images_go_with_their_prompt_once() -> None:
    groups = [group("qwen2_5_vl", str(n), [4, 4], images=n) for n in range(3)]
    (row,) = pack(groups, QWEN_CONFIG, 512)
    assert len(row.vision["image_grid_thw"]) == 3
    assert (row.input_ids_1S == IMAGE).sum() == (row.vision["image_grid_thw"].prod(1) // 4).sum()
    split = pack(groups, QWEN_CONFIG, 25)
    images = [len(r.vision.get("image_grid_thw", [])) for r in split]
    prompts = [{g for g, *_ in r.members} for r in split]
    assert images == [sum(index for index in held) for held in prompts]  # group n has n images


def test_pixtral_style_images_are_padded_to_one_size() -> None:
    config = config_of("llava")
    sizes = (4, 8)
    vision = [{"pixel_values": torch.ones(1, 3, n, 8), "image_sizes": torch.tensor([[n, 8]])} for n in sizes]
    groups = [TokenGroup(str(n), (5, *[IMAGE] * 4, 6), ((7, 8),), one) for n, one in enumerate(vision)]
    (row,) = pack(groups, config, 512)
    assert row.vision["pixel_values"].shape == (2, 3, 8, 8)
    assert row.vision["pixel_values"][0, :, :4].eq(1).all() and row.vision["pixel_values"][0, :, 4:].eq(0).all()
    assert row.vision["image_sizes"].tolist() == [[4, 8], [8, 8]]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("layout", ["shared", "dense"])
def test_rows_are_planned_without_images_and_made_with_those_of_their_own_groups(family: str, layout: str) -> None:
    """LLaVA's images carry no integer that would say that they are there."""
    model = build(family)
    groups = [group(family, str(n), [4, 2], images=n) for n in range(3)]
    light = [replace(one, vision=None) if one.vision else one for one in groups]
    asked: list[str] = []

    def vision_of(one: TokenGroup) -> Mapping[str, torch.Tensor]:
        asked.append(one.key)
        return groups[int(one.key)].vision or {}

    whole, plans = pack(groups, model, 40, layout), plan_rows(light, model, 40, layout)
    assert [bool(plan.vision) for plan in plans] == [bool(row.vision) for row in whole]
    assert [plan.tokens for plan in plans] == [row.tokens for row in whole]
    assert [plan.members(light) for plan in plans] == [list(row.members) for row in whole] and not asked
    for expected, plan in zip(whole, plans, strict=True):
        asked.clear()
        made = build_row(plan, light, model, vision_of)
        assert sorted(asked) == sorted({str(g) for g, *_ in made.members})
        assert made.vision.keys() == expected.vision.keys() and made.spans == expected.spans
        assert all(made.vision[name].equal(tensor) for name, tensor in expected.vision.items())
        assert (made.positions is None) == (expected.positions is None) == (layout == "dense")
        assert made.positions is None or made.positions.equal(expected.positions)
    with pytest.raises(ValueError, match=r"group '[12]' came without its images"):
        pack(light, model, 40, layout)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(0, 4),
)
@settings(max_examples=25, deadline=None)
def test_image_positions_are_those_of_transformers(family: str, images, tail: int) -> None:
    model = MODELS.setdefault(family, build(family))
    is_image, grids = [], []
    for text, rows, columns in images:
        is_image += [False] * (text + 1) + [True] * (rows * columns)
        grids.append([1, 2 * rows, 2 * columns])
    is_image += [False] * tail
    positions, following = mrope_positions(is_image, grids, 2)
    expected, _ = model.model.get_rope_index(
        torch.tensor([[IMAGE if i else 5 for i in is_image]]),
        mm_token_type_ids=torch.tensor([is_image]).int(),
        image_grid_thw=torch.tensor(grids),
    )
    assert positions == expected[:, 0].tolist()
    assert following == max(max(axis) for axis in positions) + 1


MODELS: dict[str, transformers.PreTrainedModel] = {}


def test_scores_come_back_in_the_order_of_the_groups() -> None:
    model = build("qwen3")
    groups = [group("qwen3", str(n), [3, 6, 2]) for n in range(4)]

    def scores(some: list[TokenGroup], budget: int) -> torch.Tensor:
        found = group_logprobs(model, some, token_budget=budget, layout="shared", banned_ids=(), temperature=1.0)
        return torch.cat([part for one in found for part in one])

    alone = torch.cat([scores([g], 512) for g in groups])
    for budget in (30, 70, 4096):
        assert (scores(groups, budget) - alone).abs().max() < 1e-5


def test_bad_groups_are_refused_by_name() -> None:
    good = words(4)
    pixels = {"pixel_values": torch.zeros(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}

    def refused(match: str, prompt, completion=(7, 8), vision=None) -> None:
        with pytest.raises(ValueError, match=match):
            pack([TokenGroup("row 17", tuple(prompt), (tuple(completion),), vision or {})], QWEN_CONFIG, 512)

    refused(r"row 17.*empty prompt", [])
    refused(rf"row 17.*completion 0: token {IMAGE}.*ban", good, completion=(5, IMAGE))
    refused(rf"row 17.*completion 0: token {VIDEO}", good, completion=(VIDEO,))
    refused(r"row 17.*no tensors", [*good, *[IMAGE] * 4])
    refused(r"row 17.*needs 4 placeholder", [*good, *[IMAGE] * 3], vision=pixels)
    refused(r"row 17.*1 image placeholder.*left over", [*good, *[IMAGE] * 5], vision=pixels)
    refused(r"row 17.*needs 4 placeholder", good, vision=pixels)
    with pytest.raises(ValueError, match="layout='padded'"):
        pack([], QWEN_CONFIG, 512, "padded")


def test_specs_read_windows_by_layer_type() -> None:
    assert model_spec(config_of("gemma3")).windows == {"full_attention": None, "sliding_attention": 6}
    assert model_spec(config_of("mistral_window")).windows == {"sliding_attention": 6}
    assert model_spec(config_of("qwen2")).windows == {"full_attention": None}
    assert model_spec(config_of("llama")).windows == {"full_attention": None}
    unused = transformers.Qwen2Config(use_sliding_window=False, sliding_window=6)
    assert model_spec(unused).windows == {"full_attention": None}
