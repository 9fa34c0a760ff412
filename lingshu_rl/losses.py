"""Policy losses over the completion tokens of a row. One formula a function; a variant is a name in a table.

Shapes: T = completion tokens of the row, one completion after another; N = its completions.
Notation: o_n completion n of |o_n| tokens, A_n its advantage, r_t = exp(logp_t - old_t) the ratio of a token,
cl(x) = min(max(x, 1 - clip_low), 1 + clip_high), and sums over the whole step (all rows, all ranks), so that the
contributions of rows add up to the same loss and gradient whatever the packing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lingshu_rl.objective import LossConfig
from rewards.imports import imported


@dataclass(frozen=True)
class Terms:
    """What a surrogate may use. log_ratio_T = logp - old, with gradient; length_T: tokens of the token's completion."""

    logprobs_T: Tensor
    log_ratio_T: Tensor
    advantage_T: Tensor
    sequence_T: Tensor
    length_T: Tensor
    sequences: int

    def sequence_sum(self, values_T: Tensor) -> Tensor:
        """Of a token's completion, for each of its tokens."""
        sums_N = values_T.new_zeros(self.sequences).index_add(0, self.sequence_T, values_T)
        return sums_N[self.sequence_T]

    def sequence_mean(self, values_T: Tensor) -> Tensor:
        return self.sequence_sum(values_T / self.length_T)


@dataclass(frozen=True)
class LossVariant:
    """A loss of this library or, named as `loss.variant=module:NAME`, of another.

    surrogate: (r_t, s_t) for every token, of which the ratio goes to the metrics and to the KL.
    per: what a token's weight w_t is one over: "sequence" (sequences * |o_n|), "token" (tokens) or "limit" (sequences *
    max_tokens). bounds: which sides `clip_low` and `clip_high` bound a ratio on, for the metrics. anchor: whose
    log-probs the ratio is against, those of the trainer at the start of the batch ("old") or of the engine that sampled
    ("rollout"), which then need no importance weight. by_token: s_t takes no other token's ratio, so that tokens of one
    completion may have advantages of their own (advantage.spans).
    """

    surrogate: Callable[[Terms, LossConfig], tuple[Tensor, Tensor]]
    per: str = "sequence"
    bounds: tuple[str, ...] = ("low", "high")
    anchor: str = "old"
    by_token: bool = True


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
    credit_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(this row's part of the step's loss, this row's parts of the step's metrics).

        loss = sum_t w_t * ( u_t * s_t + kl_coef * kl_t )

    s_t, w_t: the variant's, see `VARIANTS`. u_t: importance weight, see `rollout_weights`. kl_t: see `KL`.

    logprobs_T: with gradient, nats. sequence_T: completion (0..N-1) of each token. advantages: (N,).
    total_tokens, total_sequences: of the whole step. max_tokens: the sampling limit, used by dr_grpo alone.
    old_logprobs_T: at the start of the batch; None = this step is the first on it, so they equal logprobs_T.
    rollout_logprobs_T: of the engine that sampled. ref_logprobs_T: of the reference, needed when kl_coef > 0.
    credit_T: what is added to A_n for each token, see `advantages.span_credit`.
    Metrics add up over rows and ranks.
    """
    variant = variant_of(config.variant)
    length_N = torch.bincount(sequence_T, minlength=len(advantages))
    length_T = length_N[sequence_T].to(logprobs_T.dtype)
    now_T = logprobs_T.detach()
    old_T = now_T if old_logprobs_T is None else old_logprobs_T
    before_T = old_T
    if variant.anchor == "rollout" and rollout_logprobs_T is not None:
        before_T = rollout_logprobs_T
    advantage_T = advantages[sequence_T] if credit_T is None else advantages[sequence_T] + credit_T
    terms = Terms(logprobs_T, logprobs_T - before_T, advantage_T, sequence_T, length_T, len(advantages))
    ratio_T, loss_T = variant.surrogate(terms, config)

    metrics: dict[str, Tensor] = {}
    if rollout_logprobs_T is not None and config.importance_cap > 0 and before_T is old_T:
        weight_T, outside_T = rollout_weights(terms, old_T - rollout_logprobs_T, config)
        loss_T = loss_T * weight_T
        metrics["importance_weight"] = weight_T.sum() / total_tokens
        metrics["importance_capped"] = outside_T.sum() / total_tokens
    if ref_logprobs_T is not None:
        kl_T = KL[config.kl_estimator](logprobs_T, ref_logprobs_T)
        metrics["kl"] = kl_T.detach().sum() / total_tokens
        if config.kl_coef > 0:
            # DeepSeek-V3.2, arXiv 2512.02556, equation 7: with the ratio, the gradient is that of the reverse KL.
            weight = ratio_T if config.kl_estimator == "k3_unbiased" else 1.0
            loss_T = loss_T + config.kl_coef * weight * kl_T
    elif config.kl_coef > 0:
        raise ValueError(f"loss.kl_coef={config.kl_coef} needs ref_logprobs_T")

    if variant.per == "sequence":
        loss = (loss_T / length_T).sum() / total_sequences
    elif variant.per == "token":
        loss = loss_T.sum() / total_tokens
    else:
        loss = loss_T.sum() / (total_sequences * max_tokens)

    ratio_T = ratio_T.detach()
    metrics["loss"] = loss.detach()
    metrics["ratio"] = ratio_T.sum() / total_tokens
    if "low" in variant.bounds:
        metrics["clip_low"] = ((ratio_T < 1 - config.clip_low) & (advantage_T < 0)).sum() / total_tokens
    if "high" in variant.bounds:
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
    ratio_T = torch.exp(terms.sequence_mean(terms.log_ratio_T))
    return ratio_T, -_lower(ratio_T, terms.advantage_T, config)


def cispo_surrogate(terms: Terms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """CISPO: s_t = -sg[min(r_t, 1 + clip_high)] A_n logp_t, sg = no gradient: clipped tokens still teach.

    MiniMax-M1, arXiv 2506.13585, equations 4 and 5, without a lower bound as there; ScaleRL, arXiv 2510.13786, caps
    at 5, i.e. clip_high = 4.
    """
    ratio_T = torch.exp(terms.log_ratio_T)
    capped_T = torch.clamp(ratio_T.detach(), max=1 + config.clip_high)
    return ratio_T, -capped_T * terms.advantage_T * terms.logprobs_T


def geometric_surrogate(terms: Terms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """GMPO: s_t = -A_n exp( sum_{t in o_n} m_t / |o_n| ), m_t = sgn(A_n) min(sgn(A_n) log r_t, sgn(A_n) log cl(r_t)).

    The geometric mean of what GRPO takes the arithmetic one of, so one outlying token moves it little. arXiv
    2507.20673, equation 4; its range (e^-0.4, e^0.4) is clip_low = 0.33, clip_high = 0.49.
    """
    sign_T, floor = terms.advantage_T.sign(), max(1 - config.clip_low, 1e-8)
    clipped_T = terms.log_ratio_T.clamp(math.log(floor), math.log(1 + config.clip_high))
    kept_T = sign_T * torch.minimum(sign_T * terms.log_ratio_T, sign_T * clipped_T)
    mean_T = torch.exp(terms.sequence_mean(kept_T))
    return torch.exp(terms.log_ratio_T), -mean_T * terms.advantage_T


def soft_surrogate(terms: Terms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """SAPO: s_t = -A_n sigmoid(tau (r_t - 1)) 4 / tau, tau = soft_up for A_n > 0, else soft_down.

    A slope that falls off smoothly on both sides of r_t = 1 in place of a clip. arXiv 2511.20347, equations 5 and 6.
    """
    ratio_T = torch.exp(terms.log_ratio_T)
    tau_T = torch.where(terms.advantage_T > 0, config.soft_up, config.soft_down)
    return ratio_T, -terms.advantage_T * torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T


def divergence_surrogate(terms: Terms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """DPPO with the binary total variation: s_t = -M_t r_t A_n, r_t against the engine that sampled.

    With p_t and p'_t the sampled token's probability now and then: M_t = 0 where A_n > 0 and p_t - p'_t > clip_high, or
    A_n < 0 and p'_t - p_t > clip_low. A rare token may so change by a large factor, a frequent one may not.
    arXiv 2602.04879, section 4.
    """
    ratio_T = torch.exp(terms.log_ratio_T)
    now_T = torch.exp(terms.logprobs_T.detach())
    rise_T = now_T - now_T / ratio_T.detach()
    inside_T = torch.where(terms.advantage_T > 0, rise_T <= config.clip_high, rise_T >= -config.clip_low)
    return ratio_T, -ratio_T * terms.advantage_T * inside_T


VARIANTS: dict[str, LossVariant] = {
    "grpo": LossVariant(clipped_surrogate),
    "dr_grpo": LossVariant(clipped_surrogate, per="limit"),
    "dapo": LossVariant(clipped_surrogate, per="token"),
    "gspo": LossVariant(sequence_surrogate, by_token=False),
    "cispo": LossVariant(cispo_surrogate, per="token", bounds=("high",)),
    "gmpo": LossVariant(geometric_surrogate, by_token=False),
    "sapo": LossVariant(soft_surrogate, bounds=()),
    "dppo": LossVariant(divergence_surrogate, per="token", bounds=(), anchor="rollout"),
}


@cache
def variant_of(name: str) -> LossVariant:
    """By its name here, or by the import path of a `LossVariant`. Raises ValueError for a path that leads to none."""
    if name in VARIANTS:
        return VARIANTS[name]
    found = imported(name, LossVariant)
    if not isinstance(found, LossVariant):
        raise ValueError(f"loss.variant={name} is a {type(found).__name__}, not a lingshu_rl.losses.Variant")
    return found


def _lower(ratio_T: Tensor, advantage_T: Tensor, config: LossConfig) -> Tensor:
    clipped_T = torch.clamp(ratio_T, 1 - config.clip_low, 1 + config.clip_high)
    return torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)


def rollout_weights(terms: Terms, gap_T: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """(u_t, whether it was outside of its range) for tokens that another engine sampled, from g_t = old_t - rollout_t.

        e_t = exp(g_t) by token, exp(sum g_t over o_n) by sequence, exp(mean of g_t over o_n) geometric
        truncate: u_t = min(max(e_t, importance_floor), importance_cap)
        mask:     u_t = e_t where it is in [importance_floor, importance_cap], else 0

    gap_T: log-prob of the trainer minus that of the engine, at the weights that sampled. Truncation: Ionides 2008,
    "Truncated Importance Sampling"; for rollout engines Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training". Masks by token: IcePop (Ling team 2025, arXiv 2510.18855) with 0.5 and 5; by sequence:
    Liu et al. 2025, "When speed kills stability".
    """
    levels = {"sequence": terms.sequence_sum, "geometric": terms.sequence_mean}
    over = levels.get(config.importance_level, lambda by_token_T: by_token_T)
    weight_T = torch.exp(over(gap_T))
    outside_T = (weight_T < config.importance_floor) | (weight_T > config.importance_cap)
    if config.importance_rule == "mask":
        return weight_T.masked_fill(outside_T, 0.0), outside_T
    return weight_T.clamp(config.importance_floor, config.importance_cap), outside_T


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
