"""Tiny models of real families as folders: real configuration and processor classes with their published settings, random
weights under published names. The vocabulary is the demo's byte-level BPE with the family's own special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tiny_models import publish

from lingshu_rl.model.loading import loader_of, model_path

Ids = Callable[[str], int]  # id of a special token
# 32 is the smallest head that vLLM's CPU attention knows.
TEXT = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 8192, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_TOWER = {"depth": 2, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN3_TOWER = QWEN_TOWER | {
    "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 128, "patch_size": 16, "num_position_embeddings": 2304,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ IMAGE if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As text models write it (SmolLM2, Llama): a list of parts cannot be joined to text.
CONCATENATING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How to build one.

    title: as people know it. config: of the vocabulary's size and its ids. processor: around (tokenizer, chat template), None for text.
    names: the tokenizer's special tokens by their name in its files. more: others. text: tokens that are words.
    image: what stands for an image in the template.
    """

    title: str
    config: Callable[[int, Ids], t.PretrainedConfig]
    processor: Callable[[Any, str], Any] | None = None
    image: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    text: tuple[str, ...] = ()

    @property
    def sees(self) -> bool:
        return self.processor is not None


def make(name: str, folder: Path) -> Path:
    """The family's folder, as its makers would publish it."""
    family = FAMILIES[name]
    tokenizer = t.AutoTokenizer.from_pretrained(model_path("demo"), **family.names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.more)}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(list(family.text))
    template = CHATML.replace("IMAGE", repr(family.image)) if family.sees else CONCATENATING
    tokenizer.chat_template, tokenizer.model_max_length = template, 8192
    made = family.processor(tokenizer, template) if family.processor else tokenizer
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = family.config(-(-len(tokenizer) // 64) * 64, tokenizer.convert_tokens_to_ids)
    config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model = loader_of(config).from_config(config)
    draw(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    publish(model, folder)
    return folder


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Weights with which attention tells tokens apart, so that a wrong mask or image shows in every log-prob, and norms and
    biases that are not all alike, so that one in another's place does."""
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if parameter.ndim > 1:
            gain = 2.0 if any(part in key for part in ("q_proj", "k_proj", "qkv")) else 1.0
            fan_in = parameter.shape[-1] if "embed" in key else parameter[0].numel()
            parameter.normal_(0, gain * fan_in**-0.5)


def _text(cls: Any, size: int, ids: Ids, **more: Any) -> Any:
    return cls(**TEXT | more, vocab_size=size)


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


def _onevision(size: int, ids: Ids) -> Any:
    vision = t.SiglipVisionConfig(**TOWER, image_size=384, patch_size=14, vision_use_head=False)
    return t.LlavaOnevisionConfig(
        text_config=_text(t.Qwen2Config, size, ids), vision_config=vision, image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
    )  # fmt: skip


def _onevision_processor(tokenizer: Any, template: str) -> Any:
    return t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(**HALF), tokenizer, t.LlavaOnevisionVideoProcessor(**HALF), num_image_tokens=729,
        vision_feature_select_strategy="full", chat_template=template,
    )  # fmt: skip


def _gemma3(size: int, ids: Ids) -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _text(t.Gemma3TextConfig, size, ids, sliding_window=512, layer_types=kinds, query_pre_attn_scalar=32)
    vision = t.SiglipVisionConfig(**TOWER, image_size=896, patch_size=14, vision_use_head=False)
    return t.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=256, image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
    )  # fmt: skip


def _gemma3_processor(tokenizer: Any, template: str) -> Any:
    images = t.Gemma3ImageProcessor(size={"height": 896, "width": 896}, **HALF, do_pan_and_scan=False)
    return t.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=256)


def _gemma4(size: int, ids: Ids, blocks: bool = False) -> Any:
    """blocks: as the large ones, whose image tokens see each other; else as the small ones, whose last layers keep no keys."""
    parts = (0, 0, "vision") if blocks else (16, 2, None)
    names = ("hidden_size_per_layer_input", "num_kv_shared_layers", "use_bidirectional_attention")
    text = _text(
        t.Gemma4TextConfig, size, ids, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=512, global_head_dim=32, vocab_size_per_layer_input=size, **dict(zip(names, parts, strict=True)),
    )  # fmt: skip
    vision = t.Gemma4VisionConfig(**TOWER, num_key_value_heads=4, head_dim=8, default_output_length=280)
    return t.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"), boi_token_id=ids("<|image>"), eoi_token_id=ids("<image|>"),
        audio_token_id=ids("<|audio|>"),
    )  # fmt: skip


def _gemma4_processor(tokenizer: Any, template: str) -> Any:
    return t.Gemma4Processor(
        t.Gemma4AudioFeatureExtractor(),
        t.Gemma4ImageProcessor(),
        tokenizer,
        t.Gemma4VideoProcessor(),
        chat_template=template,
    )


def _qwen2_vl(size: int, ids: Ids) -> Any:
    vision = QWEN_TOWER | {"embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2, "patch_size": 14}
    text = TEXT | {"vocab_size": size, "rope_parameters": MROPE}
    return t.Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_ids(ids))


def _qwen2_5_vl(size: int, ids: Ids) -> Any:
    vision = QWEN_TOWER | {
        "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 128, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = TEXT | {"vocab_size": size, "rope_parameters": MROPE}
    return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(ids))


def _qwen3_vl(cls: Any, size: int, ids: Ids, **more: Any) -> Any:
    text = TEXT | {"vocab_size": size, "rope_parameters": MROPE | {"mrope_interleaved": True}} | more
    vision = QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]}
    return cls(text_config=text, vision_config=vision, **_qwen_ids(ids))


def _qwen3_5(size: int, ids: Ids) -> Any:
    text = TEXT | {
        "vocab_size": size, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    return t.Qwen3_5Config(text_config=text, vision_config=QWEN3_TOWER, **_qwen_ids(ids))


def _qwen_ids(ids: Ids) -> dict[str, int]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ends = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    return {f"{key}_token_id": ids(token) for key, token in {**names, **ends}.items()}


def _qwen_processor(cls: Any, tokenizer: Any, template: str) -> Any:
    sizes = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
    videos = t.Qwen2VLVideoProcessor(**sizes)
    return cls(t.Qwen2VLImageProcessor(**sizes), tokenizer, videos, chat_template=template)


def _qwen3_processor(tokenizer: Any, template: str) -> Any:
    images = t.Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16, **HALF)
    return t.Qwen3VLProcessor(images, tokenizer, t.Qwen3VLVideoProcessor(), chat_template=template)


def _internvl(size: int, ids: Ids) -> Any:
    vision = t.InternVLVisionConfig(**TOWER, image_size=[448, 448], patch_size=[14, 14])
    text = _text(t.Qwen2Config, size, ids)
    return t.InternVLConfig(text_config=text, vision_config=vision, image_token_id=ids("<IMG_CONTEXT>"))


def _internvl_processor(tokenizer: Any, template: str) -> Any:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = t.GotOcr2ImageProcessor(size={"height": 448, "width": 448}, image_mean=mean, image_std=std)
    return t.InternVLProcessor(images, tokenizer, t.InternVLVideoProcessor(), chat_template=template)


def _smolvlm(size: int, ids: Ids) -> Any:
    vision = t.SmolVLMVisionConfig(**TOWER, image_size=512, patch_size=16)
    text = _text(t.LlamaConfig, size, ids)
    return t.SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=ids("<image>"), scale_factor=4, pad_token_id=0
    )


def _smolvlm_processor(tokenizer: Any, template: str) -> Any:
    images = t.SmolVLMImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    videos = t.SmolVLMVideoProcessor(size={"longest_edge": 512}, max_image_size={"longest_edge": 512})
    return t.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=64, chat_template=template)


def _idefics3(size: int, ids: Ids) -> Any:
    vision = t.models.idefics3.Idefics3VisionConfig(**TOWER, image_size=364, patch_size=14)
    text = _text(t.LlamaConfig, size, ids)
    return t.Idefics3Config(
        text_config=text, vision_config=vision, image_token_id=ids("<image>"), scale_factor=2, pad_token_id=0
    )


def _idefics3_processor(tokenizer: Any, template: str) -> Any:
    return t.Idefics3Processor(t.Idefics3ImageProcessor(), tokenizer, image_seq_len=169, chat_template=template)


def _glm4v(size: int, ids: Ids) -> Any:
    vision = QWEN_TOWER | {
        "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 128, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    rope = MROPE | {"partial_rotary_factor": 1.0}
    text = TEXT | {"vocab_size": size, "rope_parameters": rope, "attention_bias": True}
    marks = {
        f"{kind}_{end}_token_id": ids(f"<|{word}_of_{kind}|>")
        for kind in ("image", "video")
        for end, word in (("start", "begin"), ("end", "end"))
    }
    return t.Glm4vConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        **marks,
    )


def _glm4v_processor(tokenizer: Any, template: str) -> Any:
    return t.Glm4vProcessor(t.Glm4vImageProcessor(), tokenizer, t.Glm4vVideoProcessor(), chat_template=template)


def _paligemma(size: int, ids: Ids) -> Any:
    vision = t.SiglipVisionConfig(**TOWER, image_size=224, patch_size=14, vision_use_head=False)
    return t.PaliGemmaConfig(
        text_config=_text(t.GemmaConfig, size, ids),
        vision_config=vision,
        image_token_index=ids("<image>"),
        projection_dim=128,
    )


def _paligemma_processor(tokenizer: Any, template: str) -> Any:
    images = t.SiglipImageProcessor(size={"height": 224, "width": 224}, **HALF)
    images.image_seq_length = 256
    return t.PaliGemmaProcessor(images, tokenizer, chat_template=template)


NEWLINES = tuple("\n" * n for n in range(1, 5))  # tokens of Gemma's vocabulary that its processors name
GEMMA3 = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "bos_token": "<bos>",
}
GEMMA4 = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "bos_token": "<bos>",
}
INTERNVL = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
IDEFICS = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip
GLM = tuple(f"<|{part}|>" for part in (
    "image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video"
))  # fmt: skip
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = {
    "llama": Family("Llama", partial(_text, t.LlamaConfig)),
    "smollm": Family("SmolLM2", partial(_text, t.LlamaConfig, tie_word_embeddings=True)),
    "qwen2": Family("Qwen2, Qwen2.5", partial(_text, t.Qwen2Config)),
    "qwen3": Family("Qwen3", partial(_text, t.Qwen3Config)),
    "qwen2_vl": Family("Qwen2-VL", _qwen2_vl, partial(_qwen_processor, t.Qwen2VLProcessor), QWEN_IMAGE),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL, Lingshu", _qwen2_5_vl, partial(_qwen_processor, t.Qwen2_5_VLProcessor), QWEN_IMAGE
    ),
    "qwen3_vl": Family("Qwen3-VL", partial(_qwen3_vl, t.Qwen3VLConfig), _qwen3_processor, QWEN_IMAGE),
    "qwen3_vl_moe": Family(
        "Qwen3-VL, experts", partial(_qwen3_vl, t.Qwen3VLMoeConfig, **EXPERTS), _qwen3_processor, QWEN_IMAGE
    ),
    "qwen3_5": Family("Qwen3.5", _qwen3_5, _qwen3_processor, QWEN_IMAGE),
    "internvl": Family("InternVL 3", _internvl, _internvl_processor, "<IMG_CONTEXT>\n", INTERNVL),
    "llava": Family("LLaVA 1.5", _llava, _llava_processor, "<image>\n", more=("<image>",)),
    "llava_onevision": Family(
        "LLaVA-OneVision", _onevision, _onevision_processor, "<image>\n", more=("<image>", "<video>")
    ),
    "gemma3": Family("Gemma 3, MedGemma", _gemma3, _gemma3_processor, "<start_of_image>", GEMMA3, text=NEWLINES),
    "gemma4": Family(
        "Gemma 4, small", _gemma4, _gemma4_processor, "<|image|>", GEMMA4, more=("<|video|>",), text=NEWLINES
    ),
    "gemma4_blocks": Family(
        "Gemma 4, image tokens see each other",
        partial(_gemma4, blocks=True),
        _gemma4_processor,
        "<|image|>",
        GEMMA4,
        more=("<|video|>",),
        text=NEWLINES,
    ),
    "paligemma": Family(
        "PaliGemma",
        _paligemma,
        _paligemma_processor,
        "<image>",
        {"bos_token": "<bos>"},
        more=("<image>",),
        text=NEWLINES,
    ),
    "smolvlm": Family("SmolVLM", _smolvlm, _smolvlm_processor, "<image>", more=IDEFICS),
    "idefics3": Family("Idefics3", _idefics3, _idefics3_processor, "<image>", more=IDEFICS),
    "glm4v": Family("GLM-4V", _glm4v, _glm4v_processor, "<|begin_of_image|><|image|><|end_of_image|>", more=GLM),
}
