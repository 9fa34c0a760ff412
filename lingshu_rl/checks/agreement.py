"""Trainer and engine give the sampled tokens the same log-probs, in every step: the limits, and which prompts deviate.

It costs nothing: the update computes the trainer's side anyway, and is compared before the optimiser moves. An engine
that kept old weights, or sees another image, shows in the batch that it sampled; nothing is learnt from that batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lingshu_rl.checks.gap import Gap
from lingshu_rl.config import CheckConfig, Config
from lingshu_rl.failures import RunStopped
from lingshu_rl.model.families import cpu_options

SHOWN = 3  # deviating prompts that a message names
# In bfloat16 a prompt deviates at so many times the batch's limit of the mean: it has few tokens to average over.
ROW = 2.0


class CheckError(RunStopped):
    """Log-probs show that the run would learn from wrong numbers; the message holds the figures."""


@dataclass(frozen=True)
class Agreement:
    """Trainer against engine over one batch, and by prompt id."""

    whole: Gap
    prompts: Mapping[str, Gap]

    @classmethod
    def of(cls, compared: Iterable[tuple[str, Tensor, Tensor]]) -> Agreement:
        """compared: (prompt id, the trainer's log-probs, the engine's), nats, one entry a completion, at least one."""
        by_prompt: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, own_T, sampled_T in compared:
            by_prompt.setdefault(name, []).append((own_T, sampled_T))
        pairs = {name: tuple(map(torch.cat, zip(*found, strict=True))) for name, found in by_prompt.items()}
        whole = Gap.of(*(torch.cat(side) for side in zip(*pairs.values(), strict=True)))
        return cls(whole, {name: Gap.of(*pair) for name, pair in pairs.items()})

    def metrics(self) -> dict[str, float]:
        """Nats; `far` is a share of tokens."""
        return {f"rollout_gap{suffix}": getattr(self.whole, name) for name, suffix in SUFFIXES.items()}

    def deviating(self, limits: Limits) -> list[str]:
        """The prompts beyond the limit for one prompt, furthest first."""
        beyond = [name for name, gap in self.prompts.items() if gap.beyond(limits.prompt)]
        return sorted(beyond, key=lambda name: -self.prompts[name].mean)


SUFFIXES = {"mean": "", "p99": "_p99", "max": "_max", "far": "_far"}


@dataclass(frozen=True)
class Limits:
    """Measure of a gap -> its limit. stop: ends the run. alarm: is told. prompt: of one prompt's tokens alone."""

    stop: Mapping[str, float]
    alarm: Mapping[str, float]
    prompt: Mapping[str, float]

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype) -> Limits:
        """dtype: the policy's. In float32 one token in a hundred beyond the largest gap means other weights or inputs.

        With train.max_staleness the policy has moved on by one update since the engine sampled: that is told, not
        stopped.
        """
        check = config.check
        if config.train.max_staleness:
            rounding = bfloat16_limits(check)
            return cls({}, rounding, {"mean": ROW * check.mean_gap_bf16})
        if dtype == torch.float32 and exact_engine(config):
            largest = check.max_logprob_gap
            return cls({"p99": largest}, {"max": largest}, {"max": largest})
        return cls({"mean": check.mean_gap_bf16}, bfloat16_limits(check), {"mean": ROW * check.mean_gap_bf16})


def judge(found: Agreement, config: Config, dtype: torch.dtype, step: int) -> str:
    """What to tell about the batch, "" when trainer and engine agree. Raises CheckError unless
    check.on_failure=warn."""
    limits = Limits.of(config, dtype)
    beyond, wrong = found.whole.beyond({**limits.alarm, **limits.stop}), found.whole.beyond(limits.stop)
    prompts = found.deviating(limits)
    if not beyond and not prompts:
        return ""
    named = ", ".join(f"{name!r} (mean {found.prompts[name].mean:.2g})" for name in prompts[:SHOWN])
    text = (
        f"trainer and engine log-probs differ in step {step + 1}, nats: {beyond or 'not in the batch as a whole'}"
        + (f"; {len(prompts)} of {len(found.prompts)} prompts deviate: {named}" if prompts else "")
    )
    if wrong and config.check.on_failure != "warn":
        raise CheckError(
            f"{text}. An engine holds other weights than the policy, or reads prompts differently; nothing was learnt "
            "from this batch"
        )
    return text


def bfloat16_limits(check: CheckConfig) -> dict[str, float]:
    """Where a side computes in bfloat16, for all comparisons."""
    return {"mean": check.mean_gap_bf16, "p99": check.p99_gap_bf16, "far": check.far_share_bf16}


def exact_engine(config: Config) -> bool:
    """Whether the engine computes in float32 where the policy does."""
    options = {**cpu_options(config.model), **config.rollout.vllm}
    return bool(options.get("dtype", "float32") == "float32")
