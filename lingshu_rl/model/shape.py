"""A model's sizes without its weights: counted on the meta device from its config alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingshu_rl.failures import ConfigError, LingshuError
from lingshu_rl.model.loading import loader_of, model_path
from rewards.imports import hint


class UnknownModelError(LingshuError, ValueError):
    """The model's config is neither here, nor among the published ones, nor can it be fetched."""


@dataclass(frozen=True)
class Stack:
    """Equal transformer layers. heads, kv_heads: of attention.

    gated: the MLP has three matrices, else two. normed_heads: queries and keys have a norm of their own.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    normed_heads: bool = False

    def saved_numbers(self, numbers: int, singles: int) -> int:
        """Bytes that one layer keeps of a token for its backward pass.

        numbers: bytes of a number in the compute dtype; singles: of the float32 copies that norms make.
        Kept are: of each norm the input in float32, the normalised and the scaled output; queries and keys before and
        after their rotation, values, the attention's output, and the pieces that a row's blocks put together; the MLP's
        gate, its activation, the other half and their product. Measured in tests/planning/test_plan.py.
        """
        heads = self.head_dim * (self.heads + self.kv_heads)
        norms = (2 * self.hidden + self.normed_heads * heads) * (singles + 2 * numbers)
        attention = 4 * heads * numbers
        mlp = (4 if self.gated else 2) * self.intermediate * numbers
        return norms + attention + mlp


@dataclass(frozen=True)
class Shape:
    """parameters: all of them; trained: those that get a gradient, by train.freeze and train.lora (adapters included).

    trains_vision, trains_head: whether any of those lie in the vision tower, or are the output head's.
    patches: tokens of the vision tower for one token of the text model. max_length: positions the model was made for.
    source: where the numbers are from, in words.
    """

    name: str
    source: str
    parameters: int
    trained: int
    largest: int
    text: Stack
    vision: Stack | None
    patches: int
    vocab: int
    max_length: int
    trains_vision: bool
    trains_head: bool

    def divides(self, parts: int) -> bool:
        """Whether vLLM can shard every layer's heads over `parts` GPUs."""
        kv = self.text.kv_heads
        heads_divide = self.text.heads % parts == 0 and (kv % parts == 0 or parts % kv == 0)
        return heads_divide and (self.vision is None or self.vision.heads % parts == 0)


def read_shape(name: str, freeze: Sequence[str] = (), lora: Mapping[str, Any] | None = None) -> Shape:
    """The sizes of a model folder or Hub id. Nothing is downloaded for one that is cached, or in published.json.

    Raises UnknownModelError, and ConfigError for LoRA settings that do not fit the model.
    """
    return _read_shape(name, tuple(freeze), json.dumps(dict(lora or {}), sort_keys=True))


def _check_freeze(prefixes: Sequence[str], names: Sequence[str]) -> None:
    """Raises ConfigError for a prefix that no parameter has, and where nothing is left to train."""
    starts = sorted({".".join(name.split(".")[:n]) for name in names for n in (1, 2, 3)})
    for prefix in prefixes:
        if not prefix or not any(name.startswith(prefix) for name in names):
            near = hint(prefix, starts) or f"; they begin with {', '.join(starts[:4])}"
            raise ConfigError(f"train.freeze: no parameter's name begins with {prefix!r}{near}")
    if prefixes and all(name.startswith(tuple(prefixes)) for name in names):
        raise ConfigError(f"train.freeze={list(prefixes)} leaves nothing to train")


@functools.cache
def _read_shape(name: str, freeze: tuple[str, ...], lora: str) -> Shape:
    import torch

    config, source = config_of(name)
    with torch.device("meta"):
        model: Any = loader_of(config).from_config(config)
        plain = list(model.named_parameters())
        _check_freeze(freeze, [parameter_name for parameter_name, _ in plain])
        for parameter_name, parameter in plain:
            parameter.requires_grad_(not parameter_name.startswith(freeze) if freeze else True)
        if settings := json.loads(lora):
            from peft import LoraConfig, get_peft_model

            try:
                model = get_peft_model(model, LoraConfig(**settings))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"train.lora={settings}: {error}") from None
    base = model.get_base_model() if json.loads(lora) else model
    text_ids = {id(p) for part in (base.get_decoder(), base.get_output_embeddings()) for p in part.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    vision = _vision_stack(config, [n for n, _ in plain])
    return Shape(
        name=name,
        source=source,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        largest=max(p.numel() for _, p in plain),
        text=_text_stack(config.get_text_config(), [n for n, _ in plain]),
        vision=vision,
        patches=_patches(config),
        vocab=config.get_text_config().vocab_size,
        max_length=config.get_text_config().max_position_embeddings,
        trains_vision=any(id(p) not in text_ids for p in trained),
        trains_head=base.get_output_embeddings().weight.requires_grad,
    )


def config_of(name: str) -> tuple[Any, str]:
    from transformers import AutoConfig

    path, table = model_path(name), published()
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True), "its config.json"
    except (OSError, ValueError):
        pass
    known = table["same_shape"].get(name, name)
    if known in table["models"]:
        return AutoConfig.for_model(**table["models"][known]["config"]), f"the published config of {known}"
    try:
        return AutoConfig.from_pretrained(path), "its config.json"
    except (OSError, ValueError) as error:
        raise UnknownModelError(
            f"the config of {name!r} is not on this machine and cannot be fetched ({str(error).splitlines()[0]})"
        ) from None


def is_published(name: str) -> bool:
    """Whether the model's sizes are known without its files."""
    table = published()
    return table["same_shape"].get(name, name) in table["models"]


def published() -> dict[str, Any]:
    """Published configs of some models, so that a plan needs no download."""
    table: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
    return table


def _patches(config: Any) -> int:
    """Tokens of the vision tower that become one of the text model; 1 where nothing says that they are merged."""
    vision: Any = getattr(config, "vision_config", None)
    if (tokens := getattr(config, "mm_tokens_per_image", None)) is not None:
        return int((vision.image_size // vision.patch_size) ** 2 // tokens)
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:
        return round(ratio**-2)
    return int(getattr(vision, "spatial_merge_size", 1) ** 2)


def _text_stack(text: Any, names: Sequence[str]) -> Stack:
    heads = text.num_attention_heads
    return Stack(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=text.intermediate_size,
        gated=True,
        normed_heads=any(name.endswith("q_norm.weight") for name in names),
    )


def _vision_stack(config: Any, names: Sequence[str]) -> Stack | None:
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None

    def first(*keys: str) -> int:
        return int(next(value for key in keys if (value := getattr(vision, key, None))))

    # Qwen2-VL calls the width of its layers embed_dim, and hidden_size that of what it hands over.
    width, heads = first("embed_dim", "hidden_size"), first("num_heads", "num_attention_heads")
    inner = getattr(vision, "intermediate_size", None) or width * getattr(vision, "mlp_ratio", 4)
    gated = any("visual" in name and "gate_proj" in name for name in names)
    return Stack(first("depth", "num_hidden_layers"), width, heads, heads, width // heads, int(inner), gated)
