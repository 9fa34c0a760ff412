"""Options of the objective, as plain dataclasses. Loads no torch, so that reading a config stays cheap."""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased")
ADVANTAGES = ("group", "no_std", "leave_one_out", "gdpo")
LAYOUTS = ("shared", "dense")
ATTENTION = ("sdpa", "flex")


def _one_of(owner: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{key}={value!r} is not one of {', '.join(allowed)}")


@dataclass
class LossConfig:
    """The policy loss; equations and papers stand in `lingshu_rl.losses`."""

    variant: str = "grpo"  # grpo | dr_grpo | dapo | gspo | cispo
    clip_low: float = 0.2  # the ratio is clipped from below at 1 - clip_low
    clip_high: float = (
        0.2  # and from above at 1 + clip_high (DAPO: 0.28; GSPO: 3e-4 and 4e-4; CISPO uses only this one)
    )
    kl_coef: float = 0.0  # weight of the KL to the reference; 0 = no reference is run
    kl_estimator: str = "k3"  # k1 | k2 | k3 | k3_unbiased
    importance_cap: float = 2.0  # cap of trainer/rollout weights (truncated importance sampling); 0 = no correction
    mask_truncated: bool = False  # leave completions that hit max_tokens out of the loss

    def __post_init__(self) -> None:
        _one_of("loss", "variant", self.variant, LOSSES)
        _one_of("loss", "kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"loss.clip_low={self.clip_low} must be in [0, 1]")
        for key in ("clip_high", "kl_coef", "importance_cap"):
            if getattr(self, key) < 0:
                raise ValueError(f"loss.{key}={getattr(self, key)} must not be negative")


@dataclass
class AdvantageConfig:
    """How rewards become advantages; equations and papers stand in `lingshu_rl.advantages`."""

    variant: str = "group"  # group | no_std | leave_one_out | gdpo
    overlong_buffer: int = 0  # tokens before max_tokens over which the reward falls (DAPO); 0 = off
    overlong_penalty: float = 1.0  # what a completion of max_tokens loses, in reward

    def __post_init__(self) -> None:
        _one_of("advantage", "variant", self.variant, ADVANTAGES)
        for key in ("overlong_buffer", "overlong_penalty"):
            if getattr(self, key) < 0:
                raise ValueError(f"advantage.{key}={getattr(self, key)} must not be negative")


@dataclass
class PackingConfig:
    """How groups become rows for the model."""

    layout: str = "shared"  # shared: each prompt once | dense: padded batches, each completion with its prompt
    token_budget: int = 4096  # tokens of a row; more needs more memory
    attention: str = "sdpa"  # sdpa | flex (block masks, CUDA only)

    def __post_init__(self) -> None:
        _one_of("packing", "layout", self.layout, LAYOUTS)
        _one_of("packing", "attention", self.attention, ATTENTION)
        if self.token_budget < 1:
            raise ValueError(f"packing.token_budget={self.token_budget} must be at least 1")
