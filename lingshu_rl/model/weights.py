"""The policy's weights as its published checkpoint has them: by name, whole, adapters merged, one after another.

Under ZeRO-3 each rank holds a share of every tensor, so reading one is a collective: all ranks go through the same
names in the same order. Nothing here writes to the model. LoRA adapters are merged in a float32 copy of their one
layer, because merging in place would round a bfloat16 base a little further at every send, and finds only shards under
ZeRO-3.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.failures import ConfigError
from lingshu_rl.model.quantized import dense, dense_class, dense_kind

if TYPE_CHECKING:
    import torch

    Shape = tuple[str, torch.dtype, tuple[int, ...]]  # name, type and full shape of one tensor

ADAPTER = "default"  # peft's name of the adapters that are trained
SHARD_BYTES = 2 << 30  # of a saved file; the main rank holds one at a time
# Modules of a decoder layer whose adapters vLLM applies. It passes over those of other modules with a warning at most.
_ADAPTED_ALONE = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


@dataclass(frozen=True)
class Plain:
    """A parameter or persistent buffer that is stored as it is."""

    name: str
    tensor: torch.Tensor

    @property
    def parts(self) -> list[torch.Tensor]:
        return [self.tensor]

    def shapes(self) -> list[Shape]:
        return [(self.name, *dense_kind(self.tensor))]

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield self.name, dense(self.tensor).detach()


@dataclass(frozen=True)
class Adapted:
    """A layer with adapters, stored as W + scale * BA (or what else peft merges: DoRA, biases, patterns of ranks)."""

    prefix: str
    layer: Any

    @property
    def parts(self) -> list[torch.Tensor]:
        return list(self.layer.parameters())

    def shapes(self) -> list[Shape]:
        return [(self._name(n), *dense_kind(p)) for n, p in self._base(self.layer)]

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        twin = float32_twin(self.layer)
        for module in twin.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge(adapter_names=[ADAPTER])
        for (name, merged), (_, base) in zip(self._base(twin), self._base(self.layer), strict=True):
            yield self._name(name), merged.detach().to(dense_kind(base)[0])

    def _name(self, name: str) -> str:
        return self.prefix + name.replace("base_layer.", "")

    @staticmethod
    def _base(layer: Any) -> list[tuple[str, torch.Tensor]]:
        return list(layer.get_base_layer().named_parameters())


def pieces(model: Any) -> Iterator[Plain | Adapted]:
    """What a checkpoint of the model (wrapped by peft or not) is made of; a tied output head comes once, as the
    embedding."""
    seen: set[int] = set()
    adapters = hasattr(model, "peft_config")
    for piece in _walk(model.get_base_model() if adapters else model, "", adapters):
        new = [tensor for tensor in piece.parts if id(tensor) not in seen]
        seen.update(map(id, new))
        if new:
            yield piece


def _walk(module: Any, prefix: str, adapters: bool) -> Iterator[Plain | Adapted]:
    if adapters:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(module, BaseTunerLayer):
            yield Adapted(prefix, module)
            return
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[ADAPTER]
    for name, parameter in module.named_parameters(recurse=False):
        yield Plain(prefix + name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield Plain(prefix + name, buffer)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", adapters)


def float32_twin(module: Any) -> Any:
    """A copy of a module with float32 copies of its tensors, whatever its class; the two share nothing that changes."""
    import torch

    def own(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        tensor = dense(tensor)
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False)

    twin = copy.copy(module)
    twin.__class__ = dense_class(module)
    twin.__dict__.update({k: copy.copy(v) for k, v in module.__dict__.items() if isinstance(v, (list, dict))})
    twin.__dict__["_parameters"] = {name: own(tensor) for name, tensor in module._parameters.items()}
    twin.__dict__["_modules"] = {
        name: float32_twin(child) for name, child in module._modules.items() if child is not None
    }
    return twin


@contextmanager
def gathered(tensors: list[Any]) -> Iterator[None]:
    """Makes ZeRO-3 partitioned tensors whole inside the block."""
    shares = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not shares:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shares):
        yield


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the published checkpoint, full tensor on its device) of every tensor. A collective under ZeRO-3.

    Only the latest tensor is whole; one that is kept must be copied.
    """
    yield from _published(_base(model), _names(model), model_tensors(model))


def weight_shapes(model: Any) -> list[Shape]:
    """What `weights` will yield, without gathering or merging anything."""
    import torch

    own = [shape for piece in pieces(model) for shape in piece.shapes()]
    empty = ((name, torch.empty(shape, dtype=dtype, device="meta")) for name, dtype, shape in own)
    published = _published(_base(model), _names(model), empty)
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in published]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _names(model: Any) -> list[str]:
    return [name for piece in pieces(model) for name, _, _ in piece.shapes()]


def model_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the model, full tensor), one after another; else as `weights`."""
    for piece in pieces(model):
        with gathered(piece.parts):
            yield from piece.read()


def _published(
    base: Any, names: list[str], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as the checkpoint that the model was loaded from has them: what transformers does at loading, undone.

    It renames most, and joins or divides some (experts). vLLM knows published names alone. names: of all `tensors`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    together = _together(base, names)
    missing = Counter(together.values())
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        joined = together[name]
        missing[joined] -= 1
        if missing[joined]:
            waiting.setdefault(joined, {})[name] = tensor.clone()
        else:
            yield from revert_weight_conversion(base, {**waiting.pop(joined, {}), name: tensor}).items()


def _together(base: Any, names: list[str]) -> dict[str, str]:
    """What tensors that make one published tensor have in common, by name in the model."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    back = [conversion.reverse_transform() for conversion in reversed(getattr(base, "_weight_conversions", None) or [])]
    joins = [conversion for conversion in back if isinstance(conversion, WeightConverter)]
    renames = [conversion for conversion in back if not isinstance(conversion, WeightConverter)]
    return {name: rename_source_key(name, renames, joins, reverse=True)[0] for name in names}


def save(model: Any, folder: Path, *, main: bool, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint in Hugging Face form, file by file. All ranks call this; the main one writes and holds one
    file."""
    files = shard_files(weight_shapes(model), shard_bytes)
    waiting: dict[
        str, dict[str, torch.Tensor]
    ] = {}  # by file: a tensor that is too large for a shared one gets its own
    left = Counter(files.values())
    total = 0
    for name, tensor in weights(model):
        left[files[name]] -= 1
        if not main:
            continue
        waiting.setdefault(files[name], {})[name] = tensor.to("cpu", copy=True)
        total += tensor.numel() * tensor.element_size()
        if not left[files[name]]:
            _save_shard(_base(model), folder, files[name], waiting.pop(files[name]))
    if main and len(left) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def shard_files(shapes: list[Shape], shard_bytes: int) -> dict[str, str]:
    """The file of every tensor, named as transformers names them."""
    import math

    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        {name: math.prod(shape) * dtype.itemsize for name, dtype, shape in shapes},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    return dict(split.tensor_to_filename)


def _save_shard(base: Any, folder: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write one file of published tensors, with the configuration beside it."""
    aside = folder / "writing"
    base.save_pretrained(aside, state_dict=tensors, save_original_format=False, max_shard_size=1 << 62)
    (aside / "model.safetensors").rename(folder / file)
    for other in aside.iterdir():
        other.replace(folder / other.name)
    aside.rmdir()


def save_adapter(model: Any, folder: Path | None) -> None:
    """Write the adapters, and whatever else is trained beside them, as peft does. All ranks call this.

    folder: on the main rank, None on the others.
    """
    trained = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            with gathered([parameter]):
                if folder is not None:
                    trained[name] = parameter.detach().to("cpu", copy=True)
    if folder is not None:
        model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)


def add_adapters(model: Any, lora: dict[str, Any]) -> Any:
    """The model with adapters by peft's settings. Raises ConfigError for what no checkpoint of the model could hold."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = None not in ends and ends[0].weight is ends[1].weight
    adapted = get_peft_model(model, LoraConfig(**lora), ADAPTER)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tied and any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in ends):
        raise ConfigError(
            "train.lora reaches the embedding or the output head, which are one tensor in this model and would drift "
            "apart; leave embed_tokens and lm_head out of train.lora.target_modules and modules_to_save"
        )
    if any(isinstance(module, TrainableTokensWrapper) for module in adapted.modules()):
        raise ConfigError("train.lora.trainable_token_indices is not supported; use modules_to_save=[embed_tokens]")
    return adapted


@lru_cache
def _reach(model: str, lora: str) -> tuple[str, ...]:
    """Modules that get adapters, relative to the decoder where they are in it; asked of the model without its
    weights."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lingshu_rl.model.loading import empty_model

    with torch.device("meta"):
        base = empty_model(model)
        decoder = next(name for name, module in base.named_modules() if module is base.get_decoder())
        adapted = add_adapters(base, json.loads(lora)).get_base_model()
    found = [name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    return tuple(name.removeprefix(f"{decoder}.") for name in found)


def unfit_for_adapters_alone(model: str, lora: dict[str, Any]) -> str:
    """Why vLLM could not apply these adapters beside the base, or "" when it can."""
    beyond = [name for name in _reach(model, json.dumps(lora, sort_keys=True)) if not _ADAPTED_ALONE.fullmatch(name)]
    if not beyond:
        return ""
    return (
        f"train.lora reaches {len(beyond)} module(s) such as {beyond[0]} that vLLM's adapters leave out (it takes the "
        "attention and MLP projections of the language model)"
    )
