"""Policy losses over the completion tokens of a row. One formula a function; a variant is a name in a table.

Shapes: T = completion tokens of the row, one completion after another; N = its completions.
Notation: o_n completion n of |o_n| tokens, A_n its advantage, r_t = exp(logp_t - old_t) the ratio of a token,
cl(x) = min(max(x, 1 - clip_low), 1 + clip_high), and sums over the whole step (all rows, all ranks), so that the
contributions of rows add up to the same loss and gradient whatever the packing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingshu_rl.objective import LossConfig


@dataclass(frozen=True)
class Terms:
    """What a surrogate may use. log_ratio_T = logp - old, with gradient; length_T: tokens of the token's completion."""

    logprobs_T: Tensor
    log_ratio_T: Tensor
    advantage_T: Tensor
    sequence_T: Tensor
    length_T: Tensor
    sequences: int


def policy_loss(
    logprobs_T: Tensor,
    *,
    sequence_T: Tensor,
    advantages: Tensor,
    config: LossConfig,
    total_tokens: int,
    total_sequences: int,
    max_tokens: int,
    old_logprobs_T: Tensor | None = None,
    rollout_logprobs_T: Tensor | None = None,
    ref_logprobs_T: Tensor | None = None,
    entropy_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(this row's part of the step's loss, this row's parts of the step's metrics).

        loss = sum_t w_t * ( u_t * s_t + kl_coef * kl_t )

    s_t: the variant's surrogate. u_t: truncated importance weight, see `rollout_weights`. kl_t: see `KL`.
    w_t: grpo and gspo 1 / (sequences * |o_n|), dapo and cispo 1 / tokens, dr_grpo 1 / (sequences * max_tokens).

    logprobs_T: with gradient, nats. sequence_T: completion (0..N-1) of each token. advantages: (N,).
    total_tokens, total_sequences: of the whole step. max_tokens: the sampling limit, used by dr_grpo alone.
    old_logprobs_T: at the start of the batch; None = this step is the first on it, so they equal logprobs_T.
    rollout_logprobs_T: of the engine that sampled. ref_logprobs_T: of the reference, needed when kl_coef > 0.
    Metrics add up over rows and ranks.
    """
    surrogate, per_token = VARIANTS[config.variant]
    length_N = torch.bincount(sequence_T, minlength=len(advantages))
    length_T = length_N[sequence_T].to(logprobs_T.dtype)
    now_T = logprobs_T.detach()
    old_T = now_T if old_logprobs_T is None else old_logprobs_T
    terms = Terms(logprobs_T, logprobs_T - old_T, advantages[sequence_T], sequence_T, length_T, len(advantages))
    ratio_T, loss_T = surrogate(terms, config)

    metrics: dict[str, Tensor] = {}
    if rollout_logprobs_T is not None and config.importance_cap > 0:
        weight_T = rollout_weights(old_T - rollout_logprobs_T, config.importance_cap)
        loss_T = loss_T * weight_T
        metrics["importance_weight"] = weight_T.sum() / total_tokens
        metrics["importance_capped"] = (weight_T >= config.importance_cap).sum() / total_tokens
    if ref_logprobs_T is not None:
        kl_T = KL[config.kl_estimator](logprobs_T, ref_logprobs_T)
        metrics["kl"] = kl_T.detach().sum() / total_tokens
        if config.kl_coef > 0:
            # DeepSeek-V3.2, arXiv 2512.02556, equation 7: with the ratio, the gradient is that of the reverse KL.
            weight = ratio_T if config.kl_estimator == "k3_unbiased" else 1.0
            loss_T = loss_T + config.kl_coef * weight * kl_T
    elif config.kl_coef > 0:
        raise ValueError(f"loss.kl_coef={config.kl_coef} needs ref_logprobs_T")

    if per_token == "sequence":
        loss = (loss_T / length_T).sum() / total_sequences
    elif per_token == "token":
        loss = loss_T.sum() / total_tokens
    else:
        loss = loss_T.sum() / (total_sequences * max_tokens)

    ratio_T, advantage_T = ratio_T.detach(), terms.advantage_T
    metrics["loss"] = loss.detach()
    metrics["ratio"] = ratio_T.sum() / total_tokens
    if config.variant != "cispo":  # which has no lower bound
        metrics["clip_low"] = ((ratio_T < 1 - config.clip_low) & (advantage_T < 0)).sum() / total_tokens
    metrics["clip_high"] = ((ratio_T > 1 + config.clip_high) & (advantage_T > 0)).sum() / total_tokens
    if entropy_T is not None:
        metrics["entropy"] = entropy_T.sum() / total_tokens
    return loss, metrics


def clipped_surrogate(terms: Terms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """s_t = -min(r_t A_n, cl(r_t) A_n).

    With w_t = 1 / (sequences * |o_n|): GRPO, DeepSeekMath, arXiv 2402.03300, equation 3.
    With w_t = 1 / (sequences * max_tokens): Dr. GRPO, arXiv 2503.20783, which drops the length of the answer from the
    loss (and the standard deviation from the advantage: advantage.variant=no_std).
    With w_t = 1 / tokens and clip_high > clip_low: DAPO, arXiv 2503.14476, equation 8.
    """
    ratio_T = torch.exp(terms.log_ratio_T)
    return ratio_T, -_lower(ratio_T, terms.advantage_T, config)


def sequence_surrogate(terms: Terms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """GSPO: s_t = -min(q_n A_n, cl(q_n) A_n) with q_n = exp( sum_{t in o_n} (logp_t - old_t) / |o_n| ).

    One ratio a completion, its geometric mean. arXiv 2507.18071, equations 5 and 7. Clip ranges are far smaller there:
    clip_low = 3e-4, clip_high = 4e-4.
    """
    mean_T = terms.log_ratio_T / terms.length_T
    log_q_N = mean_T.new_zeros(terms.sequences).index_add(0, terms.sequence_T, mean_T)
    ratio_T = torch.exp(log_q_N)[terms.sequence_T]
    return ratio_T, -_lower(ratio_T, terms.advantage_T, config)


def cispo_surrogate(terms: Terms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """CISPO: s_t = -sg[min(r_t, 1 + clip_high)] A_n logp_t, sg = no gradient: clipped tokens still teach.

    MiniMax-M1, arXiv 2506.13585, equations 4 and 5, without a lower bound as there; ScaleRL, arXiv 2510.13786, caps
    at 5, i.e. clip_high = 4.
    """
    ratio_T = torch.exp(terms.log_ratio_T)
    capped_T = torch.clamp(ratio_T.detach(), max=1 + config.clip_high)
    return ratio_T, -capped_T * terms.advantage_T * terms.logprobs_T


# variant -> (surrogate, what a token's weight is one over: its sequence's length, all tokens, or the sampling limit)
VARIANTS: dict[str, tuple[Callable[[Terms, LossConfig], tuple[Tensor, Tensor]], str]] = {
    "grpo": (clipped_surrogate, "sequence"),
    "dr_grpo": (clipped_surrogate, "limit"),
    "dapo": (clipped_surrogate, "token"),
    "gspo": (sequence_surrogate, "sequence"),
    "cispo": (cispo_surrogate, "token"),
}


def _lower(ratio_T: Tensor, advantage_T: Tensor, config: LossConfig) -> Tensor:
    clipped_T = torch.clamp(ratio_T, 1 - config.clip_low, 1 + config.clip_high)
    return torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)


def rollout_weights(gap_T: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling for tokens that another engine sampled: u_t = min(exp(old_t - rollout_t), cap).

    gap_T: log-prob of the trainer minus that of the engine, at the weights that sampled. Ionides 2008, "Truncated
    Importance Sampling"; for rollout engines Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training".
    """
    return torch.exp(gap_T).clamp(max=cap)


def kl_k1(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """k1 = logp - ref. Unbiased and noisy; as a loss its gradient is 0 on average: it measures but does not hold."""
    return logprobs_T - ref_logprobs_T


def kl_k2(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """k2 = (logp - ref)^2 / 2. Biased as a value; its gradient is that of the reverse KL for on-policy samples."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def kl_k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """k3 = exp(ref - logp) - (ref - logp) - 1. Unbiased as a value, never negative; GRPO, equation 4.

    As a loss its gradient is not that of the reverse KL; k3_unbiased multiplies it by the ratio, which mends that.
    """
    delta_T = ref_logprobs_T - logprobs_T
    return torch.exp(delta_T) - delta_T - 1


# Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "k3_unbiased": kl_k3}
