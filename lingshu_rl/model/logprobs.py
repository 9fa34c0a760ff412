"""Log-probabilities of completions under a model: one forward through the model's own class, whatever wraps it.

The output head is replaced for the length of the call by one that scores tokens instead of returning logits. It runs as
the head module's forward, so that hooks of DeepSpeed and PEFT fire as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lingshu_rl.model.attention import attention_masks, use_shared_attention
from lingshu_rl.model.families import ModelSpec, model_spec, supports_sharing, unwrap
from lingshu_rl.model.packing import PackedRow
from lingshu_rl.model.vocab import LogitTransform, logprobs_of

__all__ = ["TokenScores", "completion_logprobs", "supports_sharing", "trains_vision", "with_image_features"]


@dataclass(frozen=True)
class TokenScores:
    """logprobs_T: nats, float32, with gradient. entropy_T: nats, without gradient; None unless asked for."""

    logprobs_T: Tensor
    entropy_T: Tensor | None


def completion_logprobs(
    model: Any,
    row: PackedRow,
    *,
    banned_ids: Sequence[int] = (),
    entropy: bool = False,
    temperature: float = 1.0,
    attention: str = "sdpa",
    chunk: int = 0,
) -> TokenScores:
    """log p(token | what precedes it) for the T completion tokens of `row`, in the order of `row.members`.

    model: a transformers model or its DeepSpeed, DDP or PEFT wrapper; the call goes through the wrapper.
    banned_ids: ids that sampling never returned; they are left out of the normalisation here as well.
    temperature: of sampling; log-probs are those of the distribution that was sampled from.
    attention: "sdpa", or "flex" (block masks, CUDA).
    chunk: places whose logits exist at once; 0 = bounded by memory.
    Raises ValueError when a completion holds a banned id.
    """
    base = unwrap(model)
    spec = model_spec(base)
    device = next(base.parameters()).device
    if not row.dense:
        use_shared_attention(base, spec)
    if banned_ids and (found := set(banned_ids).intersection(row.target_T.tolist())):
        raise ValueError(f"completions hold the banned token id {min(found)}; ban it in sampling too (logit_bias -100)")
    head = _linear_head(base.get_output_embeddings())
    # A placeholder may lie beyond the head (LLaVA); out_features, because under ZeRO-3 the weight is a shard here.
    within = [i for i in banned_ids if i < head.out_features]
    banned = torch.tensor(within, device=device) if within else None
    transform = LogitTransform.of(base.config, temperature)
    where = {"row_T": row.row_T.to(device), "target_T": row.target_T.to(device)}
    keep_U = row.outputs_U.to(device)
    last = _narrowable_layer(base) if not row.dense else None

    def score(hidden_BLH: Tensor) -> tuple[Tensor, Tensor | None]:
        return logprobs_of(
            hidden_BLH.flatten(0, 1)[keep_U],
            head.weight,
            head.bias,
            **where,
            transform=transform,
            banned=banned,
            entropy=entropy,
            chunk=chunk,
        )

    inputs = model_inputs(row, spec, device, attention, last_layer=-1 if last is None else last.self_attn.layer_idx)
    with _scoring_head(head, score) as result, _narrowed(last, keep_U), _flat_patches(base):
        model(**inputs, use_cache=False)
    return TokenScores(result["logprobs"], result["entropy"])


def trains_vision(model: Any) -> bool:
    """Whether anything outside the text model and its head gets a gradient: tower, projector, or adapters in them."""
    base = unwrap(model)
    text = {id(p) for module in (base.get_decoder(), base.get_output_embeddings()) for p in module.parameters()}
    return any(p.requires_grad and id(p) not in text for p in base.parameters())


@torch.no_grad()
def with_image_features(model: Any, row: PackedRow) -> PackedRow:
    """The row with its images encoded, so that its further passes do not run the vision tower. Not for one that trains.

    Everything but pixels stays in `vision`: grids give unshared rows their positions.
    """
    if not row.vision or row.features is not None:
        return row
    base = unwrap(model)
    device = next(base.parameters()).device
    images = {key: value.to(device) for key, value in row.vision.items()}
    with _flat_patches(base):
        output = base.get_image_features(**images, return_dict=True)
    kept = {key: output[key] for key in ("pooler_output", "deepstack_features") if output.get(key) is not None}
    rest = {key: value for key, value in row.vision.items() if not value.is_floating_point()}
    return replace(row, vision=rest, features=type(output)(**kept))


def model_inputs(
    row: PackedRow, spec: ModelSpec, device: torch.device, attention: str = "sdpa", last_layer: int = -1
) -> dict[str, Any]:
    """Arguments of the model's forward for one row."""
    inputs: dict[str, Any] = {"input_ids": row.batched(row.input_ids_1S[0]).to(device)}
    inputs |= {key: value.to(device) for key, value in row.vision.items()}
    if row.features is not None:
        inputs["mm_encoder_outputs"] = {"image": row.features}
    if row.dense:
        inputs["attention_mask"] = row.batched(torch.ones_like(row.image_S)).to(device)
        if spec.token_types == "mm_token_type_ids" or spec.image_blocks:
            inputs[str(spec.token_types)] = row.batched((row.image_S >= 0).long()).to(device)
        elif spec.prefix_blocks:
            inputs[str(spec.token_types)] = row.batched((row.branch_S >= 0).long(), fill=1).to(device)
        return inputs
    assert row.positions is not None
    inputs["position_ids"] = row.positions.to(device)
    inputs["attention_mask"] = attention_masks(row, spec, device, attention, last_layer)
    return inputs


def _linear_head(head: Any) -> nn.Linear:
    """The linear layer that computes the logits, inside PEFT's modules_to_save when it is trained that way."""
    if hasattr(head, "modules_to_save"):
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        head = head.modules_to_save[active[0]] if active and not head.disable_adapters else head.original_module
    if type(head) is not nn.Linear:
        raise TypeError(
            f"the output head is a {type(head).__name__}, not a linear layer; leave lm_head out of LoRA's "
            "target_modules (modules_to_save: [lm_head] trains it in full)"
        )
    return head


def _narrowable_layer(base: Any) -> Any:
    """The last decoder layer, when its parts may be run on a selection of tokens; else None.

    Nothing reads the last layer's output at prompt tokens but the last, so queries, output projection and MLP are
    skipped there. Not under gradient checkpointing, which runs the layer again after this module's patches are gone.
    """
    if base.is_gradient_checkpointing:
        return None
    layers = getattr(base.get_decoder(), "layers", None)
    last = layers[-1] if layers is not None and len(layers) else None
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    plain = all(hasattr(attention, name) for name in ("q_proj", "o_proj", "layer_idx")) and hasattr(mlp, "down_proj")
    return last if plain else None


@contextmanager
def _narrowed(layer: Any, keep_U: Tensor) -> Iterator[None]:
    """While open, the layer's token-wise parts compute the places `keep_U` only and return 0 elsewhere."""
    if layer is None:
        yield
        return
    with ExitStack() as stack:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
            stack.enter_context(_patched(module, _on_selection(module.forward, keep_U)))
        yield


def _on_selection(forward: Any, keep_U: Tensor) -> Any:
    def selected(x_1SH: Tensor) -> Tensor:
        y = forward(x_1SH[:, keep_U])
        return y.new_zeros(1, x_1SH.shape[1], y.shape[2]).index_copy(1, keep_U, y)

    return selected


@contextmanager
def _flat_patches(base: Any) -> Iterator[None]:
    """While open, a convolution over video patches that were cut out before (Qwen-VL) is the matrix product it amounts
    to. The 3-d convolution of torch takes several times as long for the same numbers."""
    with ExitStack() as stack:
        for module in base.modules():
            if type(module) is nn.Conv3d and module.stride == module.kernel_size and module.padding == (0, 0, 0):
                stack.enter_context(_patched(module, _as_product(module)))
        yield


def _as_product(convolution: nn.Conv3d) -> Any:
    plain = convolution.forward

    def product(x: Tensor) -> Tensor:
        if x.shape[2:] != convolution.kernel_size or convolution.groups != 1:
            return plain(x)
        y = nn.functional.linear(x.flatten(1), convolution.weight.flatten(1), convolution.bias)
        return y[..., None, None, None]

    return product


@contextmanager
def _patched(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace the module's forward, under its hooks."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _scoring_head(head: nn.Module, score: Any) -> Iterator[dict[str, Any]]:
    """While open, `head(hidden)` scores tokens and the scores land in the yielded dict.

    They are read in a forward hook rather than from the model's output: models scale or cap what the head returns, and
    DeepSpeed's own hooks, registered earlier, have by then tied the tensor to the fetching of the head's weights.
    """
    result: dict[str, Any] = {}

    def forward(hidden: Tensor) -> Tensor:
        logprobs, result["entropy"] = score(hidden)
        return logprobs[None, :, None]

    def catch(module: nn.Module, args: Any, output: Tensor) -> None:
        result["logprobs"] = output[0, :, 0]

    handle = head.register_forward_hook(catch)
    try:
        with _patched(head, forward):
            yield result
    finally:
        handle.remove()
