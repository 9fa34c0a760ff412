"""What a model family needs for a shared-prefix row: mask form, positions, placeholder ids. Read from the model's config.

A family that is not named here works when its layers are plain causal attention; the first-batch check of a run
compares shared and dense log-probs, so a family that breaks the assumption is caught before it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn

FULL = "full_attention"
SLIDING = "sliding_attention"

# Rotary types whose angles depend on a token's position alone. `dynamic` and `longrope` also look at the row's length.
_PLAIN_ROPE = {"default", "linear", "llama3", "yarn", "proportional", "mrope"}
# State that runs along the row cannot be forked by a mask. Most families name such layers in `layer_types`; these do not.
_RECURRENT = {"recurrent_gemma", "rwkv", "xlstm", "lfm2_moe"}


@dataclass(frozen=True)
class ModelSpec:
    """How to lay out rows for one model.

    windows: layer type -> sliding window in tokens, None for full attention.
    image_blocks: image tokens of one image see each other (Gemma 3). prefix_blocks: the whole prompt does (PaliGemma).
    first_position: position of the first prompt token. rope_index: the family's own multi-axis positions, or None.
    token_types: name of the per-token type input that the model wants in an ordinary row, or None.
    """

    model_type: str
    placeholder_ids: tuple[int, ...]
    image_id: int | None
    windows: dict[str, int | None]
    image_blocks: bool
    prefix_blocks: bool
    first_position: int
    rope_index: Callable[..., Any] | None
    token_types: str | None
    shareable: bool
    reason: str  # why it is not shareable

    @property
    def mask_is_dict(self) -> bool:
        return len(self.windows) > 1


def unwrap(model: Any) -> Any:
    """The transformers model inside DeepSpeed, DDP, torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "module") and not hasattr(model, "get_output_embeddings"):
            model = model.module
        elif type(model).__name__ == "DeepSpeedEngine" or type(model).__name__ == "DistributedDataParallel":
            model = model.module
        else:
            return model


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Token ids that stand for image or video features. Never sample them: the forward would look for their pixels."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = {value for name in names if isinstance(value := getattr(config, name, None), int)}
    return tuple(sorted(found))


def supports_sharing(config: Any) -> tuple[bool, str]:
    """Whether completions can share a prompt's row in this family, and if not, why (for the one line a run prints)."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    families = {config.model_type, text.model_type, text.model_type.removesuffix("_text")}
    if recurrent := kinds - {FULL, SLIDING}:
        return False, f"{config.model_type}: layers of type {', '.join(sorted(recurrent))} carry state along the row"
    if families & _RECURRENT and not kinds:
        return False, f"{config.model_type}: its layers carry state along the row"
    for rope in _rope_types(getattr(text, "rope_parameters", None)):
        if rope not in _PLAIN_ROPE:
            return False, f"{config.model_type}: rotary type {rope!r} depends on the length of the row"
    if getattr(text, "attn_temperature_tuning", False):
        return False, f"{config.model_type}: attention temperature follows the place in the row, not the position"
    if config.model_type == "paligemma" and SLIDING in kinds:
        return False, "paligemma2: its sliding layers accept no mask of their own"
    if getattr(config, "is_encoder_decoder", False):
        return False, f"{config.model_type}: encoder-decoder models have no shared row"
    implementation = getattr(text, "_attn_implementation", None) or "sdpa"
    if implementation not in ("sdpa", "shared_prefix", "shared_flex"):
        return (
            False,
            f"{config.model_type}: attention {implementation!r} cannot take the mask; load with attn_implementation='sdpa'",
        )
    return True, ""


def _rope_types(parameters: Any) -> set[str]:
    """Rotary types in `rope_parameters`, which is flat or has one entry for each layer type."""
    if not isinstance(parameters, dict):
        return set()
    if any(isinstance(value, dict) for value in parameters.values()):
        return set().union(*(_rope_types(value) for value in parameters.values()))
    return {parameters.get("rope_type", "default")}


_SPECS: WeakKeyDictionary[nn.Module, ModelSpec] = WeakKeyDictionary()


def model_spec(model: Any) -> ModelSpec:
    """The spec of a model, wrapped or not. A ModelSpec is returned as it is."""
    if isinstance(model, ModelSpec):
        return model
    base = unwrap(model)
    if base not in _SPECS:
        _SPECS[base] = _read_spec(base)
    return _SPECS[base]


def _read_spec(base: Any) -> ModelSpec:
    config = base.config
    text = config.get_text_config()
    shareable, reason = supports_sharing(config)
    window = getattr(text, "sliding_window", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or []))
    if not kinds:  # one kind of layer; a window in such a config holds for all of them
        kinds = [SLIDING if window and getattr(text, "use_sliding_window", None) is not False else FULL]
    family = config.model_type
    image_id = getattr(config, "image_token_id", None)
    inner = getattr(base, "model", None)
    rope_index = getattr(inner, "get_rope_index", None)
    token_types = "mm_token_type_ids" if rope_index else "token_type_ids" if family in ("gemma3", "paligemma") else None
    return ModelSpec(
        model_type=family,
        placeholder_ids=placeholder_ids(config),
        image_id=image_id if image_id is not None else getattr(config, "image_token_index", None),
        windows={kind: window if kind == SLIDING else None for kind in kinds},
        image_blocks=family == "gemma3",
        prefix_blocks=family == "paligemma",
        first_position=1 if family == "paligemma" else 0,
        rope_index=rope_index,
        token_types=token_types,
        shareable=shareable,
        reason=reason,
    )
