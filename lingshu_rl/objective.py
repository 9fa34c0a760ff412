"""Options of the objective, as plain dataclasses. Loads no torch, so that reading a config stays cheap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "gmpo", "sapo", "dppo")
IMPORTANCE_LEVELS = ("token", "sequence", "geometric")
IMPORTANCE_RULES = ("truncate", "mask")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased")
ADVANTAGES = ("group", "no_std", "leave_one_out", "gdpo")
CORRECTIONS = ("backward", "forward")
LAYOUTS = ("shared", "dense")
ATTENTION = ("sdpa", "flex")


def _one_of(owner: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{key}={value!r} is not one of {', '.join(allowed)}")


@dataclass
class LossConfig:
    """The policy loss; equations and papers stand in `lingshu_rl.losses`."""

    variant: str = (
        "grpo"  # grpo | dr_grpo | dapo | gspo | cispo | gmpo | sapo | dppo | module:NAME of a losses.LossVariant
    )
    clip_low: float = 0.2  # the ratio is clipped from below at 1 - clip_low
    # and from above at 1 + clip_high (DAPO: 0.28; GSPO: 3e-4 and 4e-4; CISPO uses only this one; DPPO: of the
    # probability)
    clip_high: float = 0.2
    soft_up: float = 1.0  # SAPO: how fast the slope of a rewarded token falls off
    soft_down: float = 1.05  # and that of a punished one
    kl_coef: float = 0.0  # weight of the KL to the reference; 0 = no reference is run
    kl_estimator: str = "k3"  # k1 | k2 | k3 | k3_unbiased
    importance_cap: float = 2.0  # largest weight trainer/rollout (importance sampling); 0 = no correction
    importance_floor: float = 0.0  # and the smallest (IcePop: 0.5, with a cap of 5 and the rule mask)
    importance_level: str = "token"  # token | sequence | geometric: a weight for each token, or one for a completion
    importance_rule: str = "truncate"  # truncate: weights outside are cut to the range | mask: they become 0
    mask_truncated: bool = False  # leave completions that hit max_tokens out of the loss

    def __post_init__(self) -> None:
        if ":" not in self.variant:
            _one_of("loss", "variant", self.variant, LOSSES)
        _one_of("loss", "importance_level", self.importance_level, IMPORTANCE_LEVELS)
        _one_of("loss", "importance_rule", self.importance_rule, IMPORTANCE_RULES)
        _one_of("loss", "kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"loss.clip_low={self.clip_low} must be in [0, 1]")
        for key in ("clip_high", "kl_coef", "importance_cap", "importance_floor"):
            if getattr(self, key) < 0:
                raise ValueError(f"loss.{key}={getattr(self, key)} must not be negative")
        if min(self.soft_up, self.soft_down) <= 0:
            raise ValueError(f"loss.soft_up={self.soft_up} and loss.soft_down={self.soft_down} must be above 0")
        if self.importance_cap and self.importance_floor > self.importance_cap:
            raise ValueError(
                f"loss.importance_floor={self.importance_floor} is above loss.importance_cap={self.importance_cap}"
            )


@dataclass(frozen=True)
class Noise:
    """How often a judge errs: shares of wrong answers that it pays, and of right ones that it refuses."""

    false_pay: float = 0.0
    false_refusal: float = 0.0

    def __post_init__(self) -> None:
        for key in ("false_pay", "false_refusal"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)} must be in [0, 1]")
        if self.signal <= 0:
            raise ValueError(
                f"false_pay={self.false_pay} and false_refusal={self.false_refusal} sum up to 1 or more: such a judge "
                "pays wrong answers as often as right ones, and no correction makes a reward of it"
            )

    @property
    def signal(self) -> float:
        """What is left of the difference between right and wrong answers, on average: 1 = all of it."""
        return 1.0 - self.false_pay - self.false_refusal

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> Noise:
        """From a mapping with both rates, others beside them. Raises ValueError naming `where`."""
        try:
            return cls(float(given["false_pay"]), float(given["false_refusal"]))
        except KeyError as error:
            raise ValueError(f"{where} lacks {error}; give {{false_pay: 0.1, false_refusal: 0.05}}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


@dataclass
class AdvantageConfig:
    """How rewards become advantages; equations and papers stand in `lingshu_rl.advantages`."""

    variant: str = "group"  # group | no_std | leave_one_out | gdpo
    overlong_buffer: int = 0  # tokens before max_tokens over which the reward falls (DAPO); 0 = off
    overlong_penalty: float = 1.0  # what a completion of max_tokens loses, in reward
    # How often the judge errs, which is taken out of what it judged: {false_pay: 0.1, false_refusal: 0.05} | a file
    # with these two, as a run's judge.json | preflight: as measured before this run; empty = its verdicts are taken as
    # they are
    noise: Any = ""
    correction: str = "backward"  # backward | forward: how (`advantages.denoised`)
    # How much of what a reward placed in the completion goes to its tokens there: from 0 = none to 1 = all
    spans: float = 0.0  # (`advantages.span_credit`)

    def __post_init__(self) -> None:
        _one_of("advantage", "variant", self.variant, ADVANTAGES)
        _one_of("advantage", "correction", self.correction, CORRECTIONS)
        if isinstance(self.noise, Mapping):
            Noise.read(self.noise, "advantage.noise")
        elif not isinstance(self.noise, str):
            raise ValueError(f"advantage.noise={self.noise!r} is {{false_pay, false_refusal}}, a file or `preflight`")
        if self.noise and self.variant == "gdpo":
            raise ValueError("advantage.variant=gdpo normalises parts one by one; advantage.noise corrects their sum")
        if self.spans and self.variant == "gdpo":
            raise ValueError(
                "advantage.variant=gdpo normalises parts one by one; advantage.spans places parts of their sum"
            )
        if not 0 <= self.spans <= 1:
            raise ValueError(f"advantage.spans={self.spans} is a share, from 0 to 1")
        for key in ("overlong_buffer", "overlong_penalty"):
            if getattr(self, key) < 0:
                raise ValueError(f"advantage.{key}={getattr(self, key)} must not be negative")


@dataclass
class PackingConfig:
    """How groups become rows for the model."""

    layout: str = "shared"  # shared: each prompt once | dense: padded batches, each completion with its prompt
    token_budget: int = 0  # tokens of a row; 0 = chosen by the longest prompt, its completions and memory
    attention: str = "sdpa"  # sdpa | flex (block masks, CUDA only)

    def __post_init__(self) -> None:
        _one_of("packing", "layout", self.layout, LAYOUTS)
        _one_of("packing", "attention", self.attention, ATTENTION)
        if self.token_budget < 0:
            raise ValueError(f"packing.token_budget={self.token_budget} must not be negative")
