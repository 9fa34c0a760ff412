"""Families that cannot share a prompt: batches of ordinary sequences, filled up, against the model's own forward on each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as t
from test_families import gradient_gap, logprob_gap, make_groups, own_forward, score, token_weights
from tiny_models import CLIP, IMAGE, QWEN_IDS, QWEN_VISION, TEXT, WINDOW, build, config_of, redraw, words

from lingshu_rl.model.families import model_spec
from lingshu_rl.model.packing import pack
from lingshu_rl.types import TokenGroup

SHORT = 16  # tokens up to which rotary angles are fixed; the groups have shorter sequences and longer ones
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def glm4v() -> t.PretrainedConfig:
    vision = QWEN_VISION | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return t.Glm4vConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **QWEN_IDS)


def paligemma2() -> t.PretrainedConfig:
    text = t.Gemma2Config(**TEXT, sliding_window=WINDOW, layer_types=KINDS)
    vision = t.SiglipVisionConfig(**CLIP, vision_use_head=False)
    return t.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=64, image_token_index=IMAGE)


# Whose prompts to take, and the config.
UNSHARED: dict[str, tuple[str, Callable[[], t.PretrainedConfig]]] = {
    "state in every layer": (
        "llama", lambda: t.FalconH1Config(**TEXT, mamba_d_ssm=64, **MAMBA | {"mamba_n_heads": 4}),
    ),
    "state in some layers": ("llama", lambda: t.BambaConfig(**TEXT, attn_layer_indices=[1], **MAMBA)),
    "state and experts": (
        "llama",
        lambda: t.JambaConfig(
            **TEXT, attn_layer_period=3, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8, num_experts=2
        ),
    ),
    "recurrence and windows": ("llama", lambda: t.RecurrentGemmaConfig(**TEXT, attention_window_size=WINDOW)),
    "chunks": ("llama", lambda: t.Llama4TextConfig(**TEXT, attention_chunk_size=WINDOW, num_local_experts=2)),
    "sinks": ("llama", lambda: t.GptOssConfig(**TEXT, sliding_window=WINDOW, num_local_experts=2, layer_types=KINDS)),
    "dynamic": (
        "llama",
        lambda: t.LlamaConfig(
            **TEXT | {"max_position_embeddings": SHORT},
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
    ),
    "longrope": (
        "llama",
        lambda: t.Phi3Config(
            **TEXT, original_max_position_embeddings=SHORT,
            rope_parameters=LONGROPE | {"original_max_position_embeddings": SHORT},
        ),
    ),
    "positions of its own": ("qwen2_5_vl", glm4v),
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
        assert all(row.dense for row in rows) and 6 > len(rows)
        assert (len(rows) == 1) == (budget == 4096 and model_spec(model).rope_limit is None)
        found = score(model, rows, weights)
        assert logprob_gap(logprobs, found[0]) < 1e-4
        assert gradient_gap(gradients, found[1]) < 1e-4
