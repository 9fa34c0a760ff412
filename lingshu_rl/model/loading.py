"""Loading a vision-language model, alike in policy and reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEMO_MODEL = "demo"
NO_END = 10**12  # tokenizers without a limit tell 10**30


def model_path(name: str) -> str:
    """The embedded policy's folder for "demo", else the name itself (a folder or a Hub id)."""
    return str(Path(__file__).parent.parent / "demo" / "weights") if name == DEMO_MODEL else name


@contextmanager
def reading_model(name: str) -> Iterator[None]:
    """Around what transformers reads of a model's files. Raises ConfigError where they are not there, not such files,
    or need a package that is not installed (num2words for SmolVLM)."""
    from lingshu_rl.failures import ConfigError  # here: what computes log-probs needs torch and transformers alone

    try:
        yield
    except ImportError as error:
        raise ConfigError(f"model {name!r} needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name!r} cannot be read: {error}\nGive a folder with config.json, weights and tokenizer, or a Hub "
            f"id that can "
            "be fetched (with HF_HUB_OFFLINE=1: one that was)"
        ) from error


def load_model(name: str, dtype: torch.dtype, tensor_parallel: int = 1, quantize: str = "") -> Any:
    """The causal language model with its vision tower if it has one, in SDPA attention, on CPU, in eval mode.

    tensor_parallel: processes of the default group that it is sharded over, by the plan that transformers has for it
    (on CUDA the shards are on the devices then). Raises ValueError for a model without one.
    quantize: nf4 or fp4 for its linear layers (`quantized`); then it is on the current device. Raises ConfigError.
    """
    from lingshu_rl.model.quantized import quantization

    loader, config = _loader(name)
    sharding = {"distributed_config": _sharding(loader, config, tensor_parallel)} if tensor_parallel > 1 else {}
    bits = {"quantization_config": quantization(quantize, dtype)} if quantize else {}
    with reading_model(name):
        model = loader.from_pretrained(model_path(name), dtype=dtype, attn_implementation="sdpa", **sharding, **bits)
    model._weight_conversions = undoable([used for used in model._weight_conversions or [] if used.was_used()])
    return model.eval()


def undoable(conversions: list[Any]) -> list[Any]:
    """What transformers changed at loading, so that undoing it gives the published tensors; `weights` does when they
    leave.

    Only those that were used: under ZeRO-3 transformers notes what could have been, too. A transposition that looks at
    the shape first (experts of Qwen3-VL-MoE) finds the model's own one right on the way out, and would leave it as it
    is.
    """
    from transformers.core_model_loading import Transpose

    for conversion in conversions:
        for operation in getattr(conversion, "operations", []):
            if isinstance(operation, Transpose):
                operation.check_dims = False
    return conversions


def empty_model(name: str) -> Any:
    """The same model on torch's meta device: its modules and shapes, without reading or holding weights.

    Any rank may call this alone: transformers would share a model out among all ranks once a ZeRO-3 policy exists.
    """
    import torch
    from transformers.integrations import deepspeed

    loader, config = _loader(name)
    sharing = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with torch.device("meta"):
            return loader.from_config(config)
    finally:
        if sharing is not None and sharing() is not None:
            deepspeed.set_hf_deepspeed_config(sharing())


def has_tokenizer(name: str) -> bool:
    """Whether the model's tokenizer is on this machine."""
    from transformers.utils.hub import cached_file

    kept = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    kept["_raise_exceptions_for_connection_errors"] = False
    return cached_file(model_path(name), "tokenizer_config.json", **kept) is not None


def model_context(name: str, tokenizer: Any) -> int:
    """Most tokens that vLLM lets the model have, by its configuration and tokenizer; 0 where neither says so.

    Scaled positions may count once too often here, never too rarely: vLLM has the last word.
    """
    _, config = _loader(name)
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or 0
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    scale = max([1.0, *(float(kind.get("factor") or 1.0) for kind in kinds)])
    return int(min(most * scale or NO_END, tokenizer.model_max_length, NO_END)) % NO_END


def _loader(name: str) -> tuple[Any, Any]:
    """transformers' class for the model, and its configuration."""
    from transformers import AutoConfig

    with reading_model(name):
        config = AutoConfig.from_pretrained(model_path(name))
    return loader_of(config), config


def loader_of(config: Any) -> Any:
    """transformers' class for models of this configuration: with a vision tower, if it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _sharding(loader: Any, config: Any, size: int) -> Any:
    """Attention and MLP are sharded; embedding and head stay whole, because log-probs are taken from the head's
    weights."""
    import torch
    from transformers.distributed.configuration_utils import DistributedConfig

    with torch.device("meta"):
        plan = dict(loader.from_config(config).tp_plan)
    whole = {k: "replicated_with_grad_allreduce" for k in plan if k.endswith(("embed_tokens", "lm_head"))}
    if len(whole) == len(plan):
        raise ValueError(
            f"transformers has no tensor-parallel plan for {config.model_type}; reference.tensor_parallel must be 1"
        )
    return DistributedConfig(tp_size=size, tp_plan=whole or "auto")


def resolve_dtype(name: str, on_gpu: bool) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.bfloat16 if on_gpu else torch.float32}[
        name
    ]
