"""What a model family needs for a shared-prefix row: mask form, positions, placeholders. Read from its config alone.

A family that is not named here works when its layers are plain causal attention; the first-batch check of a run
compares shared and dense log-probs, so a family that breaks the assumption is caught before it trains.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FULL = "full_attention"
SLIDING = "sliding_attention"
STATEFUL = frozenset({"linear_attention", "conv"})  # layers that carry state along the row

# Rotary types whose angles depend on a token's position alone. `dynamic` and `longrope` also look at the row's length.
_PLAIN_ROPE = {"default", "linear", "llama3", "yarn", "proportional", "mrope"}
# Text models that take a mask for each layer type, and whose stateful layers go on from a cache by several tokens.
_FORKED = {
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "lfm2", "lfm2_moe"),
    *("bamba", "granitemoehybrid"),
}
# State that runs along the row cannot be forked by a mask. Most families name such layers in `layer_types`; not these.
_RECURRENT = {"recurrent_gemma", "rwkv", "xlstm"}
# Multi-axis positions as in Qwen2-VL: an image spans rows and columns, text goes on after the longer side.
_MROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v"}
# Models whose ordinary forward wants to be told which tokens are image (Gemma) or answer (PaliGemma).
_TOKEN_TYPES = {"gemma3": "token_type_ids", "paligemma": "token_type_ids", "gemma4": "mm_token_type_ids"}
_SHARED_ATTENTION = ("sdpa", "shared_prefix", "shared_flex")


@dataclass(frozen=True)
class ModelSpec:
    """How to lay out rows for one model.

    placeholder_ids: stand for image, video or audio features, whatever text they are in; image_id: the one for images.
    windows: layer type -> sliding window in tokens, None for full attention.
    image_blocks: layer types in which tokens of one image see each other (Gemma 3 and 4).
    prefix_blocks: the whole prompt does (PaliGemma).
    first_position: position of the first prompt token.
    mrope_merge: patches merged along a side of the image in multi-axis positions, 0 for ordinary positions.
    token_types: name of the per-token type input that the model wants in an ordinary row, "" for none.
    rope_limit: length in tokens up to which rotary angles do not depend on it; None where they never do.
    shareable: whether completions can share the prompt's row; reason: why not.
    """

    model_type: str
    placeholder_ids: tuple[int, ...]
    image_id: int | None
    windows: dict[str, int | None]
    image_blocks: frozenset[str]
    prefix_blocks: bool
    first_position: int
    mrope_merge: int
    token_types: str
    rope_limit: int | None
    shareable: bool
    reason: str

    @property
    def mask_is_dict(self) -> bool:
        """Models with layers of several types take a mask for each type, all others one tensor."""
        return len(self.windows) > 1


def unwrap(model: Any) -> Any:
    """The transformers model inside DeepSpeed, DDP, torch.compile and PEFT wrappers."""
    # DeepSpeed's engine answers for its module's attributes, so it is told by holding a child of that name.
    while _is_wrapper(model) or not hasattr(model, "get_output_embeddings") or hasattr(model, "get_base_model"):
        if _is_wrapper(model):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            raise TypeError(f"{type(model).__name__} is not a transformers model, nor a wrapper of one")
    return model


def _is_wrapper(model: Any) -> bool:
    return "module" in getattr(model, "_modules", {})


def model_spec(model: Any) -> ModelSpec:
    """The spec of a model (wrapped or not) or of its config."""
    config = model if hasattr(model, "get_text_config") else unwrap(model).config
    text = config.get_text_config()
    family = config.model_type
    shareable, reason = supports_sharing(config)
    window = getattr(text, "sliding_window", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or []))
    if not kinds:  # all layers are alike, so a window in the config holds for all of them
        kinds = [SLIDING if window and getattr(text, "use_sliding_window", None) is not False else FULL]
    image_id = _first(config, "image_token_id", "image_token_index")
    others = [_first(config, f"{kind}_token_id", f"{kind}_token_index") for kind in ("video", "audio")]
    return ModelSpec(
        model_type=family,
        placeholder_ids=tuple(i for i in (image_id, *others) if i is not None),
        image_id=image_id,
        windows={kind: window if kind == SLIDING else None for kind in kinds},
        image_blocks=_image_blocks(config),
        prefix_blocks=family == "paligemma",
        first_position=1 if family == "paligemma" else 0,
        mrope_merge=config.vision_config.spatial_merge_size if family in _MROPE else 0,
        token_types=_token_types(config),
        rope_limit=_rope_limit(text),
        shareable=shareable,
        reason=reason,
    )


def supports_sharing(config: Any) -> tuple[bool, str]:
    """Whether completions can share a prompt's row in this family, and if not, why (for the one line a run prints)."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    families = {config.model_type, text.model_type}
    ropes = _rope_parameters(text)
    if getattr(config, "is_encoder_decoder", False):
        reason = "the prompt is read by an encoder"
    elif other := kinds - {FULL, SLIDING} - (STATEFUL if text.model_type in _FORKED else set()):
        reason = f"no mask can keep completions apart in layers of type {', '.join(sorted(other))}"
    elif families & _RECURRENT and not kinds:
        reason = "its layers carry state along the row"
    elif odd := {rope.get("rope_type", "default") for rope in ropes} - _PLAIN_ROPE:
        reason = f"rotary type {min(odd)!r} depends on the length of the row"
    elif config.model_type not in _MROPE and _has_own_positions(config):
        reason = "its multi-axis positions are not known here"
    elif getattr(text, "attn_temperature_tuning", False):
        reason = "its attention temperature follows the place in the row, not the position"
    elif config.model_type == "paligemma" and SLIDING in kinds:
        reason = "its sliding layers accept no mask of their own"
    elif (attention := getattr(text, "_attn_implementation", None) or "sdpa") not in _SHARED_ATTENTION:
        reason = f"attention {attention!r} cannot take the mask (load it with attn_implementation='sdpa')"
    else:
        return True, ""
    return False, f"{config.model_type}: {reason}"


@functools.cache
def cpu_options(model: str) -> dict[str, Any]:
    """vLLM options that its CPU build asks of this model: linear attention is there in bfloat16 alone, prompts in
    pieces.

    Nothing for a model whose config is not on this machine: vLLM says then what it misses.
    """
    from lingshu_rl.model.shape import UnknownModelError, config_of

    try:
        kinds = getattr(config_of(model)[0].get_text_config(), "layer_types", None) or ()
    except UnknownModelError:
        return {}
    return {"dtype": "bfloat16", "enable_chunked_prefill": True} if "linear_attention" in kinds else {}


def mrope_positions(
    is_image: Sequence[bool], grids: Sequence[Sequence[int]], merge: int
) -> tuple[list[list[int]], int]:
    """Positions of a prompt on the (time, row, column) axes, and the position of the token after it.

    is_image: one a token. grids: (frames, rows, columns) in patches, one an image. Source: Qwen2-VL, arXiv 2409.12191,
    section 2.1. Raises ValueError when the placeholders and the grids do not match.
    """
    axes: list[list[int]] = [[], [], []]
    place = position = 0
    for frames, rows, columns in grids:
        while place < len(is_image) and not is_image[place]:
            for axis in axes:
                axis.append(position)
            place, position = place + 1, position + 1
        rows, columns = rows // merge, columns // merge
        size = frames * rows * columns
        if not all(is_image[place : place + size]) or place + size > len(is_image):
            raise ValueError(
                f"an image needs {size} placeholder tokens in a row, the prompt has fewer at token {place}"
            )
        for f in range(frames):
            for r in range(rows):
                axes[0] += [position + f] * columns
                axes[1] += [position + r] * columns
                axes[2] += range(position, position + columns)
        place, position = place + size, position + max(rows, columns)
    if any(is_image[place:]):
        raise ValueError(f"{sum(is_image[place:])} image placeholder tokens are left over after {len(grids)} images")
    rest = range(position, position + len(is_image) - place)
    return [axis + list(rest) for axis in axes], position + len(rest)


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _image_blocks(config: Any) -> frozenset[str]:
    """In Gemma 4 some sizes have them, and not in layers that see everything."""
    if config.model_type == "gemma3":
        return frozenset({FULL, SLIDING})
    sees = getattr(config.get_text_config(), "use_bidirectional_attention", None)
    return frozenset({SLIDING} if config.model_type == "gemma4" and sees == "vision" else ())


def _token_types(config: Any) -> str:
    return "mm_token_type_ids" if _has_own_positions(config) else _TOKEN_TYPES.get(config.model_type, "")


def _has_own_positions(config: Any) -> bool:
    """Whether the model's class derives positions from the images, as Qwen-VL does."""
    from transformers import AutoModel

    return hasattr(AutoModel._model_mapping.get(type(config), None), "get_rope_index")


def _rope_limit(text: Any) -> int | None:
    odd = [rope for rope in _rope_parameters(text) if rope.get("rope_type", "default") not in _PLAIN_ROPE]
    return min((r.get("original_max_position_embeddings", text.max_position_embeddings) for r in odd), default=None)


def _rope_parameters(text: Any) -> list[dict[str, Any]]:
    """`rope_parameters` is flat, or holds one dict for each layer type."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
