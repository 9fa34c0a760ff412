"""Tiny models of real families as folders: real configuration and processor classes with their published settings, random
weights under published names. The vocabulary is the demo's byte-level BPE with the family's own special tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as t
from transformers.conversion_mapping import get_model_conversion_mapping

from lingshu_rl.model.loading import loader_of, model_path

Ids = Callable[[str], int]  # id of a special token
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 8192, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ IMAGE if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How to build one.

    config: of the vocabulary's size and ids. processor: around a tokenizer, None for text. tokens: special ones beyond
    ChatML's. image: what stands for an image in the template.
    """

    config: Callable[[int, Ids], t.PretrainedConfig]
    processor: Callable[[Any, str], Any] | None = None
    tokens: tuple[str, ...] = ()
    image: str = ""


def make(name: str, folder: Path) -> Path:
    """The family's folder, as its makers would publish it."""
    family = FAMILIES[name]
    tokenizer = t.AutoTokenizer.from_pretrained(model_path("demo"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)}, replace_extra_special_tokens=False)
    template = CHATML.replace("IMAGE", repr(family.image))
    tokenizer.chat_template = template
    size = -(-len(tokenizer) // 64) * 64
    torch.manual_seed(0)
    config = family.config(size, tokenizer.convert_tokens_to_ids)
    config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model = loader_of(config).from_config(config)
    with torch.no_grad():  # attention that tells tokens apart, so that a wrong mask or image shows in every log-prob
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                gain = 2.0 if any(part in key for part in ("q_proj", "k_proj", "qkv")) else 1.0
                fan_in = parameter.shape[-1] if "embed" in key else parameter[0].numel()
                parameter.normal_(0, gain * fan_in**-0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(folder)
    made = family.processor(tokenizer, template) if family.processor else tokenizer
    made.save_pretrained(folder)
    return folder


def _text(cls: Any, size: int, ids: Ids, **more: Any) -> Any:
    return cls(**TEXT, vocab_size=size, **more)


def _llava(size: int, ids: Ids) -> Any:
    vision = t.CLIPVisionConfig(**TOWER, image_size=336, patch_size=14)
    text = _text(t.LlamaConfig, size, ids)
    return t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=ids("<image>"))


def _llava_processor(tokenizer: Any, template: str) -> Any:
    images = t.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return t.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip


def _gemma3(size: int, ids: Ids) -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _text(t.Gemma3TextConfig, size, ids, sliding_window=512, layer_types=kinds, query_pre_attn_scalar=16)
    vision = t.SiglipVisionConfig(**TOWER, image_size=896, patch_size=14, vision_use_head=False)
    return t.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=256, image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
    )  # fmt: skip


def _gemma3_processor(tokenizer: Any, template: str) -> Any:
    tokenizer.boi_token, tokenizer.eoi_token, tokenizer.image_token = GEMMA
    for key, token in zip(("boi_token", "eoi_token", "image_token"), GEMMA, strict=True):
        tokenizer.init_kwargs[key] = token
        setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.init_kwargs["extra_special_tokens"] = {k: v for k, v in zip(("boi_token", "eoi_token", "image_token"), GEMMA, strict=True)}
    images = t.Gemma3ImageProcessor(
        size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pan_and_scan=False
    )
    return t.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=256)


GEMMA = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
FAMILIES = {
    "llama": Family(partial(_text, t.LlamaConfig)),
    "qwen2": Family(partial(_text, t.Qwen2Config)),
    "qwen3": Family(partial(_text, t.Qwen3Config)),
    "llava": Family(_llava, _llava_processor, ("<image>",), "<image>\n"),
    "gemma3": Family(_gemma3, _gemma3_processor, GEMMA, "<start_of_image>"),
}
