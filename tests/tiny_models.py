"""Small random models of each family, and prompts for them, made by hand: no processor, no download."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from lingshu_rl.model.loading import loader_of, undoable
from lingshu_rl.types import TokenGroup

VOCAB = 160
IMAGE, VIDEO, VISION_START, VISION_END = 150, 151, 152, 153
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip

SIGLIP2_PATCHES = 16
WINDOW = 6  # shorter than every row, so that a wrong window shows


def config_of(family: str) -> transformers.PretrainedConfig:
    t = transformers
    if family == "qwen2_vl":
        vision = QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        return t.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": MROPE}, vision_config=vision, **QWEN_IDS)
    if family in ("qwen2_5_vl", "qwen2_5_vl_window"):
        vision = QWEN_VISION | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        text = TEXT | {"rope_parameters": MROPE}
        if family == "qwen2_5_vl_window":
            text |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    if family == "qwen3_vl":
        vision = QWEN_VISION | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        }  # fmt: skip
        text = TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True}}
        return t.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    if family in ("qwen3_5", "qwen3_5_moe"):
        vision = QWEN_VISION | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
        }  # fmt: skip
        rope = MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
        cls = t.Qwen3_5Config if family == "qwen3_5" else t.Qwen3_5MoeConfig
        return cls(text_config=TEXT | LINEAR | EXPERTS | {"rope_parameters": rope}, vision_config=vision, **QWEN_IDS)
    if family == "llava":
        return t.LlavaConfig(
            text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**CLIP), image_token_index=IMAGE
        )
    if family == "internvl":
        vision = t.InternVLVisionConfig(**CLIP)
        return t.InternVLConfig(text_config=t.Qwen2Config(**TEXT), vision_config=vision, image_token_id=IMAGE)
    if family == "gemma3":
        text = t.Gemma3TextConfig(
            **TEXT, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
        vision = t.SiglipVisionConfig(**CLIP)
        return t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE)
    if family == "paligemma":
        vision = t.SiglipVisionConfig(**CLIP, vision_use_head=False)
        text = t.GemmaConfig(**TEXT)
        return t.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=64, image_token_index=IMAGE)
    if family == "llama":
        return t.LlamaConfig(**TEXT)
    if family == "mistral_window":
        return t.MistralConfig(**TEXT, sliding_window=WINDOW)
    if family == "qwen2":
        return t.Qwen2Config(**TEXT)
    if family == "qwen2_window":
        return t.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    if family == "qwen3":
        return t.Qwen3Config(**TEXT)
    if family == "gemma2":
        return t.Gemma2Config(**TEXT | {"tie_word_embeddings": True})
    if family == "qwen3_moe":  # a layer's experts are one tensor in the model, and one each in checkpoints
        return t.Qwen3MoeConfig(**TEXT | ROUTED)
    if family == "qwen3_vl_moe":
        vision = QWEN_VISION | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        }  # fmt: skip
        text = TEXT | ROUTED | {"rope_parameters": MROPE | {"mrope_interleaved": True}}
        return t.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    if family == "llava_onevision":
        return t.LlavaOnevisionConfig(
            text_config=t.Qwen2Config(**TEXT), vision_config=t.SiglipVisionConfig(**CLIP, vision_use_head=False),
            image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[16, 16], [32, 32]],
        )  # fmt: skip
    if family in ("llava_pixtral", "mistral3"):
        vision = t.PixtralVisionConfig(**CLIP, head_dim=8)
        text = t.MistralConfig(**TEXT)
        if family == "mistral3":
            return t.Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
        layers = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        return t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, **layers)
    if family in ("idefics3", "smolvlm"):
        config = t.Idefics3Config if family == "idefics3" else t.SmolVLMConfig
        vision = CLIP | {"model_type": f"{family}_vision"}
        return config(
            text_config=t.LlamaConfig(**TEXT),
            vision_config=vision,
            image_token_id=IMAGE,
            pad_token_id=0,
            scale_factor=2,
        )
    if family == "glm4v":
        vision = QWEN_VISION | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 16}
        text = TEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
        ends = {"image_start_token_id": VISION_START, "image_end_token_id": VISION_END}
        return t.Glm4vConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
            video_start_token_id=154, video_end_token_id=155, **ends,
        )  # fmt: skip
    if family in ("gemma4", "gemma4_blocks"):
        text = t.Gemma4TextConfig(
            **TEXT, sliding_window=WINDOW, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
            num_kv_shared_layers=0, use_bidirectional_attention="vision" if family == "gemma4_blocks" else None,
        )  # fmt: skip
        vision = t.Gemma4VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            head_dim=8, patch_size=4, position_embedding_size=64, pooling_kernel_size=2,
        )  # fmt: skip
        return t.Gemma4Config(
            text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO,
            boi_token_id=VISION_START, eoi_token_id=VISION_END, audio_token_id=154,
        )  # fmt: skip
    if family == "qwen3_next":
        return t.Qwen3NextConfig(**TEXT, **LINEAR, **EXPERTS)
    if family == "olmo_hybrid":
        return t.OlmoHybridConfig(**TEXT, **LINEAR)
    if family == "bamba":
        return t.BambaConfig(**TEXT, **MAMBA, attn_layer_indices=[1])
    if family == "granitemoehybrid":
        layers = {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "rope"}
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32}
        return t.GraniteMoeHybridConfig(**TEXT, **MAMBA, **layers, **experts)
    if family in ("lfm2", "lfm2_vl", "lfm2_moe"):
        layers = {"layer_types": ["conv", "full_attention", "conv"]}
        if family == "lfm2_moe":
            return t.Lfm2MoeConfig(**TEXT, **layers, **EXPERTS, num_dense_layers=1)
        text = t.Lfm2Config(**TEXT, **layers, block_auto_adjust_ff_dim=False)
        vision = t.Siglip2VisionConfig(**CLIP, num_patches=SIGLIP2_PATCHES, vision_use_head=False)
        vl = {"vision_config": vision, "image_token_id": IMAGE, "projector_hidden_size": 32}
        return text if family == "lfm2" else t.Lfm2VlConfig(text_config=text, **vl)
    raise KeyError(family)


VISION_FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_vl_window",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "lfm2_vl",
    "llava",
    "internvl",
    "gemma3",
    "gemma4_blocks",
    "paligemma",
    "glm4v",
)
TEXT_FAMILIES = (
    "llama",
    "mistral_window",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_next",
    "olmo_hybrid",
    "lfm2",
    "lfm2_moe",
    "bamba",
    "granitemoehybrid",
)
# Known by name and weights here; no prompts are made for them.
OTHER_FAMILIES = (
    "gemma2",
    "qwen3_moe",
    "qwen3_vl_moe",
    "llava_onevision",
    "llava_pixtral",
    "mistral3",
    "idefics3",
    "smolvlm",
    "gemma4",
)


def build(family: str, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """A model in train mode whose attention is far from uniform.

    With transformers' own initialisation every score is near 0, attention averages what it sees, and a wrong mask
    hardly moves a log-prob. Weights are drawn again at 1/sqrt(fan-in), queries and keys at twice that.
    """
    torch.manual_seed(seed)
    config = config_of(family)
    config.get_text_config().update(changes)
    model = loader_of(config).from_config(config, attn_implementation="sdpa")
    redraw(model)
    return model.train()


def redraw(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
                continue
            fan_in = parameter[0].numel() if "embed" not in name else parameter.shape[-1]
            gain = 2.0 if any(key in name for key in ("q_proj", "k_proj", "qkv")) else 1.0
            parameter.normal_(0, gain * fan_in**-0.5)


def publish(model: transformers.PreTrainedModel, folder: Path) -> None:
    """The model's folder with the names that its makers would give, which transformers changes at loading."""
    model._weight_conversions = undoable(get_model_conversion_mapping(model, add_legacy=False))
    model.save_pretrained(folder)


def image_of(family: str, height: int = 4, width: int = 4) -> tuple[list[int], dict[str, Tensor]]:
    """The prompt ids of one random image and its tensors. height and width count merged patches (Qwen only)."""
    if family.startswith("qwen") or family == "glm4v":
        grid = torch.tensor([[1, 2 * height, 2 * width]])
        pixels = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4)
        ids = [VISION_START, *[IMAGE] * (height * width), VISION_END]
        return ids, {"pixel_values": pixels, "image_grid_thw": grid}
    if family == "gemma4_blocks":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)[None]
        pixels = {"pixel_values": torch.rand(1, 16, 3 * 4 * 4), "image_position_ids": places}
        return [VISION_START, *[IMAGE] * 4, VISION_END], pixels
    if family == "lfm2_vl":
        rows = min(2 * height - 2, 4)  # of four patches; the rest of the tensor is padding
        held = (torch.arange(SIGLIP2_PATCHES) < 4 * rows).long()[None]
        pixels = torch.randn(1, SIGLIP2_PATCHES, 3 * 4 * 4)
        sizes = {"spatial_shapes": torch.tensor([[rows, 4]]), "pixel_attention_mask": held}
        return [VISION_START, *[IMAGE] * rows, VISION_END], {"pixel_values": pixels} | sizes
    tokens = {"llava": 16, "internvl": 4, "gemma3": 4, "paligemma": 16}[family]
    return [VISION_START, *[IMAGE] * tokens, VISION_END], {"pixel_values": torch.randn(1, 3, 16, 16)}


def words(count: int) -> list[int]:
    return torch.randint(3, 140, (count,)).tolist()


def group(family: str, key: str, completions: list[int], images: int = 0, text: int = 9) -> TokenGroup:
    """A prompt with `images` images of different sizes and `text` words, and completions of the given lengths."""
    ids, vision = words(3), []
    for n in range(images):
        image_ids, tensors = image_of(family, 2 + n, 3)
        ids += image_ids + words(2)
        vision.append(tensors)
    ids += words(text)
    merged = {name: torch.cat([tensors[name] for tensors in vision]) for name in vision[0]} if vision else {}
    return TokenGroup(key, tuple(ids), tuple(tuple(words(length)) for length in completions), merged)
