"""Blocks and flex masks against the whole (S, S) mask, which only this test builds, and what building them takes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, build, config_of, group
from torch import Tensor

from lingshu_rl.model import attention
from lingshu_rl.model.attention import Blocks, RowMask, attention_masks
from lingshu_rl.model.families import STATEFUL, ModelSpec, model_spec
from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import PackedRow, pack
from lingshu_rl.types import TokenGroup

CPU = torch.device("cpu")


def whole_mask(row: PackedRow, spec: ModelSpec, kind: str) -> Tensor:
    """(S, S) bool, [query, key], written from the definition."""
    group_S, branch_S, logical_S = row.group_S, row.branch_S, row.logical_S
    distance = logical_S[:, None] - logical_S[None, :]
    may = distance >= 0
    if kind in spec.image_blocks:
        may |= (row.image_S[:, None] == row.image_S[None, :]) & (row.image_S[:, None] >= 0)
    if spec.prefix_blocks:
        may |= (branch_S[:, None] < 0) & (branch_S[None, :] < 0)
    if (window := spec.windows[kind]) is not None:
        may &= distance < window
    may &= (branch_S[None, :] < 0) | (branch_S[None, :] == branch_S[:, None])
    return may & (group_S[None, :] == group_S[:, None])


def by_kind(masks: object, spec: ModelSpec) -> dict[str, object]:
    return masks if spec.mask_is_dict else {next(iter(spec.windows)): masks}  # type: ignore[return-value]


def drawn(blocks: Blocks, tokens: int, which: str) -> tuple[Tensor, Tensor]:
    """The (S, S) mask that the blocks amount to, and how often each query is computed."""
    mask, times = torch.zeros(tokens, tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.long)
    for block in getattr(blocks, which):
        keys = torch.cat([torch.arange(*r) for r in block.keys])
        queries = block.stop - block.start
        if block.mask is None:
            assert torch.equal(keys[-queries:], torch.arange(block.start, block.stop))
            seen = torch.ones(len(keys), len(keys), dtype=torch.bool).tril()[-queries:]
        else:
            seen = block.mask[0, 0]
        mask[block.start : block.stop, keys] = seen
        times[block.start : block.stop] += 1
    return mask, times


def random_row(family: str, seed: int) -> PackedRow:
    torch.manual_seed(seed)
    sees = int(family in VISION_FAMILIES)
    groups = []
    for g in range(3):
        lengths = torch.randint(1, (8, 20, 90)[g], (int(torch.randint(1, 9, ())),)).tolist()
        groups.append(group(family, str(g), lengths, images=sees * g, text=int(torch.randint(3, 60, ()))))
    (row,) = pack(groups, config_of(family), 1 << 20)
    return row


@pytest.mark.parametrize("largest", [1024, 16])
@pytest.mark.parametrize("family", [*VISION_FAMILIES, *TEXT_FAMILIES])
def test_blocks_allow_what_the_whole_mask_does(family: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LARGEST_BLOCK", largest)
    spec = model_spec(config_of(family))
    for seed in range(8):
        row = random_row(family, seed)
        masks = by_kind(attention_masks(row, spec, CPU, "sdpa", last_layer=2), spec)
        assert set(masks) == set(spec.windows)
        for kind in spec.windows.keys() - STATEFUL:
            carrier = masks[kind]
            assert isinstance(carrier, RowMask) and carrier.shape == (1, 1, row.tokens, row.tokens)
            expected = whole_mask(row, spec, kind)
            every, times = drawn(carrier.blocks, row.tokens, "every")
            assert torch.equal(every, expected) and (times == 1).all()
            last, times = drawn(carrier.blocks, row.tokens, "last")
            assert (times[row.keep_U] == 1).all() and (times <= 1).all()
            assert torch.equal(last[row.keep_U], expected[row.keep_U])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_window", "gemma3", "paligemma"])
def test_flex_masks_are_those_of_create_block_mask(family: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    spec = model_spec(config_of(family))
    for seed in range(4):
        row = random_row(family, seed)
        masks = by_kind(attention_masks(row, spec, CPU, "flex", last_layer=-1), spec)
        assert set(masks) == set(spec.windows)
        places = torch.arange(row.tokens)
        for kind, mask in masks.items():
            whole = whole_mask(row, spec, kind)
            assert torch.equal(mask.mask_mod(0, 0, places[:, None], places[None, :]), whole)
            expected = create_block_mask(lambda b, h, q, k, w=whole: w[q, k], 1, None, *whole.shape, device="cpu")
            assert mask.shape == expected.shape and mask.seq_lengths == expected.seq_lengths
            for table in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
                ours, theirs = getattr(mask, table), getattr(expected, table)
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), table


def peak_bytes(work: object) -> int:
    """Most bytes of tensors alive at once during `work`, from torch's own record of allocations on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()  # type: ignore[operator]
    del kept
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def test_the_record_of_allocations_shows_a_whole_mask() -> None:
    """Else the next test could not fail."""
    assert 4e6 <= peak_bytes(lambda: torch.zeros(2000, 1, dtype=torch.bool) | torch.zeros(1, 2000, dtype=torch.bool)) < 5e6  # fmt: skip


LONG = {  # 16k tokens in one row: (prompt tokens, completions, tokens of each)
    "usual groups": [(1152, 16, 128)] * 5,
    "one long answer": [(300, 1, 16_000)],
    "few long answers": [(1200, 4, 3700)],
    "a long prompt": [(15_000, 16, 64)],
    "half and half": [(8000, 80, 100)],
}


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("family", ["qwen3", "mistral_window"])
@pytest.mark.parametrize("shape", LONG)
def test_building_the_masks_of_a_long_row_takes_little_memory(shape: str, family: str, backend: str) -> None:
    """The whole mask took 11 bytes x S²: 2.8 GB here, at 16k tokens, and 10.7 GB at 32k."""
    config = config_of(family)
    config.sliding_window = 4096 if family == "mistral_window" else None
    spec = model_spec(config)
    groups = [
        TokenGroup(str(g), tuple([5] * prompt), tuple(tuple([6 + m] * length) for m in range(count)), {})
        for g, (prompt, count, length) in enumerate(LONG[shape])
    ]
    (row,) = pack(groups, config, 1 << 20)
    assert 15_500 < row.tokens < 17_000
    peak = peak_bytes(lambda: attention_masks(row, spec, CPU, backend, last_layer=2))
    assert peak < 150e6, f"{peak / 1e6:.0f} MB"


def test_a_model_that_reads_the_mask_fails_by_name() -> None:
    """Attention without this library's function, as in a family that builds its own mask from the one it gets."""
    model = build("qwen2")
    (row,) = pack([group("qwen2", "a", [6, 3])], model, 512)
    mask = attention_masks(row, model_spec(model), CPU, "sdpa", -1)
    for read in (
        lambda: mask.any(),
        lambda: mask[:, :, :2],
        lambda: ~mask,
        lambda: mask.float(),
    ):
        with pytest.raises(TypeError, match=r"packing\.layout=dense"):
            read()
    assert mask.to(CPU) is mask and mask.ndim == 4  # moving and measuring it is no reading
    completion_logprobs(model, row)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(TypeError, match="instead of handing it to its attention"):
        model(input_ids=row.input_ids_1S, position_ids=row.positions, attention_mask=mask)


def test_attention_dropout_is_applied_in_training_alone() -> None:
    plain, dropping = build("qwen3"), build("qwen3", attention_dropout=0.5)
    (row,) = pack([group("qwen3", "a", [6, 3])], plain, 512)
    with torch.no_grad():
        expected = completion_logprobs(plain, row).logprobs_T
        assert (completion_logprobs(dropping, row).logprobs_T - expected).abs().max() > 0.01
        assert torch.equal(completion_logprobs(dropping.eval(), row).logprobs_T, expected)
