"""Families that cannot share a prompt: batches of ordinary sequences, filled up, against the model's own forward on each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as t
from test_families import gradient_gap, logprob_gap, make_groups, own_forward, score, token_weights
from tiny_models import CLIP, IMAGE, MAMBA, QWEN_IDS, QWEN_VISION, TEXT, WINDOW, redraw, words

from lingshu_rl.model.packing import pack
from lingshu_rl.types import TokenGroup

SHORT = 16  # tokens up to which rotary angles are fixed; the groups have shorter sequences and longer ones
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def glm46v() -> t.PretrainedConfig:
    vision = QWEN_VISION | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return t.Glm46VConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **QWEN_IDS)


def paligemma2() -> t.PretrainedConfig:
    text = t.Gemma2Config(**TEXT, sliding_window=WINDOW, layer_types=KINDS, final_logit_softcapping=None)
    vision = t.SiglipVisionConfig(**CLIP, vision_use_head=False)
    return t.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=64, image_token_index=IMAGE)


# Whose prompts to take, and the config.
UNSHARED: dict[str, tuple[str, Callable[[], t.PretrainedConfig]]] = {
    "state in every layer": (
        "llama", lambda: t.FalconH1Config(**TEXT, mamba_d_ssm=64, **MAMBA | {"mamba_n_heads": 4}),
    ),
    "state and experts": (
        "llama",
        lambda: t.JambaConfig(
            **TEXT, attn_layer_period=3, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8, num_experts=2
        ),
    ),
    "recurrence and windows": ("llama", lambda: t.RecurrentGemmaConfig(**TEXT, attention_window_size=WINDOW)),
    "chunks": ("llama", lambda: t.Llama4TextConfig(**TEXT, attention_chunk_size=WINDOW, num_local_experts=2)),
    "sinks": (
        "llama",
        lambda: t.GptOssConfig(
            **TEXT, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1, layer_types=KINDS
        ),
    ),
    "dynamic": (
        "llama",
        lambda: t.LlamaConfig(**TEXT, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ),
    "longrope": (
        "llama",
        lambda: t.Phi3Config(
            **TEXT, original_max_position_embeddings=SHORT,
            rope_parameters=LONGROPE | {"original_max_position_embeddings": SHORT},
        ),
    ),
    "positions of its own": ("qwen2_5_vl", glm46v),
    "prefix and windows": ("paligemma", paligemma2),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSHARED)
def test_a_family_that_cannot_share_runs_in_exact_batches(case: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompts, config_for = UNSHARED[case]
    config = config_for()
    cls = t.AutoModelForImageTextToText if hasattr(config, "vision_config") else t.AutoModelForCausalLM
    model = cls.from_config(config, attn_implementation="eager" if case == "sinks" else "sdpa").train()
    redraw(model)
    groups = make_groups(prompts)
    weights = token_weights(groups)
    logprobs, gradients = own_forward(model, groups, weights)
    for budget in (4096, 100):
        rows = pack(groups, model, budget)
        assert all(row.dense for row in rows) and len(rows) < 6
        assert (len(rows) == 1) == (budget == 4096 and case != "longrope")
        found = score(model, rows, weights)
        assert logprob_gap(logprobs, found[0]) < 1e-4
        assert gradient_gap(gradients, found[1]) < 1e-4


def test_beyond_the_limit_of_its_rotary_angles_a_batch_has_one_length() -> None:
    """Angles follow the longest sequence of a batch there, so that another one beside it would have the wrong ones."""
    config = UNSHARED["longrope"][1]()
    groups = [
        TokenGroup(str(n), tuple(words(n)), tuple(tuple(words(length)) for length in (4, 4, 9, 1)), {})
        for n in (2, 5, SHORT - 3, SHORT, SHORT)
    ]
    rows = pack(groups, config, 4096)
    lengths = [[span.end - span.start for span in row.spans] for row in rows]
    long, short = lengths[:-1], lengths[-1]
    assert max(short) <= SHORT < min(map(min, long)) and all(len(set(one)) == 1 for one in long)
    assert len(short) == 4 + 4 + 3 + 2 and sorted(map(len, long)) == [1, 2, 4]
