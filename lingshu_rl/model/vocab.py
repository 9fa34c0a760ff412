"""Log-probabilities over a large vocabulary without a tensor of all logits, nor a gradient of the head per chunk.

Shapes: U scored places, T (place, token) pairs, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits of one chunk, in numbers: 64 MiB of float32 on the CPU, 512 MiB on an accelerator, where short chunks waste it.
_CHUNK_NUMBERS = {"cpu": 2**24}
_CHUNK_NUMBERS_ELSEWHERE = 2**27
_SLAB = 2**15  # rows of the head whose gradient is added at once
_NEVER = -1e30  # a banned logit: far below any real one, yet finite, so that p * z stays 0 and not nan


@dataclass(frozen=True)
class LogitTransform:
    """From the head's product to the softmax: z = cap(scale * h W^T) / temperature, with cap(y) = c tanh(y / c)."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: Any, temperature: float) -> LogitTransform:
        """Read from a transformers config: Gemma softcaps, Cohere multiplies, Granite divides."""
        text = config.get_text_config()
        scale = getattr(text, "logit_scale", None)
        divisor = getattr(text, "logits_scaling", None)
        if scale is None:
            scale = getattr(text, "lm_head_multiplier", None)
        if scale is None:
            scale = 1.0 / divisor if divisor else 1.0
        softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
        return cls(float(scale), softcap, temperature)

    def apply(self, y: Tensor) -> Tensor:
        if self.scale != 1.0:
            y = y * self.scale
        if self.softcap:
            y = torch.tanh(y / self.softcap) * self.softcap
        return y / self.temperature if self.temperature != 1.0 else y

    def backward_(self, dz: Tensor, z: Tensor | None) -> Tensor:
        """dL/dz -> dL/d(h W^T), in place. z is needed for a softcap alone."""
        if self.softcap:
            assert z is not None
            # Clamped for banned logits, whose 0 gradient must not meet an infinity.
            dz *= 1 - (z * (self.temperature / self.softcap)).clamp_(-1, 1).square_()
        factor = self.scale / self.temperature
        return dz.mul_(factor) if factor != 1.0 else dz


def logprobs_of(
    hidden_UH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    row_T: Tensor,
    target_T: Tensor,
    *,
    transform: LogitTransform,
    banned: Tensor | None = None,
    entropy: bool = False,
    chunk: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z[row_T])[target_T] in nats, float32 (T,), and the entropy of those distributions (T,), no gradient.

    banned: ids left out of the normalisation. chunk: places projected at once; 0 = what fits a fixed amount of memory.
    The backward pass computes the logits again, chunk by chunk, unless all of them were one chunk.
    """
    logp_T, entropy_U = _ChunkedLogProbs.apply(
        hidden_UH, weight_VH, bias_V, row_T, target_T, transform, banned, entropy, chunk
    )
    return logp_T, entropy_U[row_T] if entropy else None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_UH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        row_T: Tensor,
        target_T: Tensor,
        transform: LogitTransform,
        banned: Tensor | None,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        device, places = hidden_UH.device, hidden_UH.shape[0]
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_UH.dtype
        if chunk <= 0:
            chunk = max(_CHUNK_NUMBERS.get(kind, _CHUNK_NUMBERS_ELSEWHERE) // weight_VH.shape[0], 1)
        with torch.autocast(kind, enabled=False):
            hidden, weight = hidden_UH.to(dtype), weight_VH.to(dtype)
            lse_U = torch.empty(places, device=device)
            entropy_U = torch.empty(places if entropy else 0, device=device)
            logp_T = torch.empty(len(target_T), device=device)
            keep = places <= chunk and any(ctx.needs_input_grad[:3])
            ctx.kept = None
            for start, stop, pairs in _chunks(places, chunk, row_T):
                z = _logits(hidden[start:stop], weight, bias_V, transform, banned)
                rows = row_T[pairs] - start
                if entropy or keep:
                    peak = z.amax(dim=-1, keepdim=True)
                    probs = torch.sub(z, peak).exp_()
                    total = probs.sum(dim=-1, keepdim=True)
                    probs.div_(total)
                    lse = (peak + total.log())[:, 0]
                else:
                    lse = torch.logsumexp(z, dim=-1)
                lse_U[start:stop] = lse
                logp_T[pairs] = z[rows, target_T[pairs]] - lse[rows]
                if entropy:
                    entropy_U[start:stop] = lse - (probs * z).sum(dim=-1)
                if keep:
                    ctx.kept = (probs, z if transform.softcap else None)
        ctx.save_for_backward(hidden_UH, weight_VH, bias_V, row_T, target_T, lse_U, banned)
        ctx.transform, ctx.dtype, ctx.chunk = transform, dtype, chunk
        ctx.mark_non_differentiable(entropy_U)
        return logp_T, entropy_U

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden_UH, weight_VH, bias_V, row_T, target_T, lse_U, banned = ctx.saved_tensors
        grad_T = grads[0].float()
        kept, ctx.kept = ctx.kept, None
        places = hidden_UH.shape[0]
        grad_U = torch.zeros(places, device=grad_T.device).index_add_(0, row_T, grad_T)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with _gathered(weight_VH, bias_V):
            hidden, weight = hidden_UH.to(ctx.dtype), weight_VH.to(ctx.dtype)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            # Sums over chunks in float32: rounding each chunk's product to bfloat16 first would bias the head.
            grad_weight = torch.zeros(weight_VH.shape, device=hidden.device) if need_weight else None
            grad_bias = torch.zeros(bias_V.shape, device=hidden.device) if need_bias else None
            for start, stop, pairs in _chunks(places, ctx.chunk, row_T):
                if kept is not None:
                    dz, z = kept
                else:
                    z = _logits(hidden[start:stop], weight, bias_V, ctx.transform, banned)
                    dz = torch.sub(z, lse_U[start:stop, None]).exp_()
                dz.mul_(-grad_U[start:stop, None])
                dz.index_put_((row_T[pairs] - start, target_T[pairs]), grad_T[pairs], accumulate=True)
                dz = ctx.transform.backward_(dz, z)
                if grad_bias is not None:
                    grad_bias += dz.sum(0)
                dz = dz.to(ctx.dtype)
                if grad_hidden is not None:
                    torch.mm(dz, weight, out=grad_hidden[start:stop])
                if grad_weight is not None:
                    _add_product(grad_weight, dz.t(), hidden[start:stop])
        return (
            None if grad_hidden is None else grad_hidden.to(hidden_UH.dtype),
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None else grad_bias.to(bias_V.dtype),
            *(None,) * 6,
        )


def _chunks(places: int, chunk: int, row_T: Tensor) -> Iterator[tuple[int, int, Tensor | slice]]:
    """(first place, last place + 1, which of the T pairs lie there)."""
    if places <= chunk:
        yield 0, places, slice(None)
        return
    for start in range(0, places, chunk):
        stop = min(start + chunk, places)
        yield start, stop, ((row_T >= start) & (row_T < stop)).nonzero()[:, 0]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, banned: Tensor | None
) -> Tensor:
    z = torch.mm(hidden, weight.t()).float()
    if bias is not None:
        z += bias
    z = transform.apply(z)
    if banned is not None:
        z[:, banned] = _NEVER
    return z


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with a float32 total."""
    if total.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        # addmm with a float32 total and half factors is refused by some releases; slabs keep what mm returns small.
        for rows, part in zip(a.split(_SLAB), total.split(_SLAB), strict=True):
            part += torch.mm(rows, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())


def _gathered(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """Under DeepSpeed ZeRO-3 the head is a shard outside its module's forward: fetch it for the recomputation."""
    shards: list[Any] = [p for p in parameters if getattr(p, "ds_status", None) is not None]
    if not shards:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    shards = [p for p in shards if p.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(shards) if shards else nullcontext()
