"""A frozen base in 4 bits under LoRA adapters (QLoRA, Dettmers 2023), by bitsandbytes.

The policy computes with what the 4 bits stand for, so that is what leaves it as well: engines, the reference and
checkpoints get the weights written out ("dense"), never the ones that were rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lingshu_rl.model.optimizers import check_package

if TYPE_CHECKING:
    import torch

# Of a quantised weight: 4 bits, an 8-bit scale for 64 of them, a float32 scale for 256 of those.
BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def quantization(name: str, dtype: torch.dtype) -> Any:
    """transformers' settings for linear layers in nf4 or fp4, all but the output head. Raises ConfigError without the
    package.

    dtype: of the products. Products of the head stay in the model's own; log-probs are taken from its weights.
    """
    from transformers import BitsAndBytesConfig

    check_package("bitsandbytes", f"train.quantize={name}")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def as_unquantized(model: Any) -> Any:
    """The model without transformers' marks of quantisation, which forbid casts and would be written into
    checkpoints."""
    base = model.get_base_model()
    base.hf_quantizer, base.is_quantized = None, False
    del base.config.quantization_config
    return model


def dense(weight: torch.Tensor) -> torch.Tensor:
    """The matrix that a 4-bit weight stands for, in the type it was quantised from; any other tensor as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def dense_kind(weight: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and full shape of `dense`, without computing it; also of a tensor of which this rank holds a share."""
    kind = getattr(weight, "quant_state", None) or weight
    return kind.dtype, tuple(getattr(weight, "ds_shape", kind.shape))


def dense_class(module: Any) -> type:
    """The class that computes with dense weights what the module's class computes with 4-bit ones."""
    from torch import nn

    if type(module).__name__ != "Linear4bit":  # bitsandbytes' layer and peft's around it
        return type(module)
    if isinstance(module, nn.Linear):
        return nn.Linear
    from peft.tuners.lora import Linear

    return Linear
