"""Checks on the first batch, before anything is learnt from it. They catch what else shows only after a day:

- engine: trainer and engine must give the sampled tokens the same log-probs;
- reference: the reference must be the model the run starts from;
- sight: with a blank image the trainer must NOT agree with the engine, or one of them never saw the image;
- sharing: rows that hold a prompt once must give what rows with a prompt for each completion give.

Where both sides compute in float32 every token counts; else mean, 99th percentile and far share do (gap.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingshu_rl.checks.agreement import CheckError, bfloat16_limits, exact_engine
from lingshu_rl.checks.gap import Gap, flat
from lingshu_rl.config import CheckConfig, Config
from lingshu_rl.types import TrainGroup

if TYPE_CHECKING:
    from lingshu_rl.run import Run

SAMPLE = 4  # groups that the two extra forwards (dense rows, blank images) look at
GREY = 1e-3  # of a normalised pixel; an image of zeros is padding to SmolVLM and Idefics3, and they leave it out
SIGHT = 1e-4  # nats that a blank image must change at the least
# A blank image's mean gap over the real one's, on the same tokens. Rounding is so small a part of it in float32, ...
CLEAR_EXACT = 10.0
CLEAR = 1.25  # ... but not in bfloat16, where a trainer that ignores the image has a ratio of 1


@dataclass(frozen=True)
class Measured:
    """What the first batch shows. None: not measured (no reference, dense rows, no images).

    seeing, blank: of the same tokens, with their images and with blank ones.
    """

    engine: Gap
    reference: Gap | None = None
    kl: float | None = None
    dense: Gap | None = None
    seeing: Gap | None = None
    blank: Gap | None = None

    def metrics(self) -> dict[str, float]:
        """For the summary, nats; `far` is a share."""
        found = {f"{name}_logprob_gap": getattr(self.engine, name) for name in ("mean", "p99", "max", "far")}
        if self.kl is not None:
            found["kl"] = self.kl
        if self.dense is not None:
            found |= {"dense_gap": self.dense.max, "mean_dense_gap": self.dense.mean}
        if self.seeing is not None and self.blank is not None:
            found |= {"seeing_gap": self.seeing.mean, "blank_gap": self.blank.mean}
        return {f"{name}_first_step": value for name, value in found.items()}


def check_first_batch(run: Run, groups: Sequence[TrainGroup]) -> None:
    """Measure, store in run.state.first_batch, and act on `check.on_failure`. All ranks call this. Raises
    CheckError."""
    measured = measure(run.policy, groups)
    run.state.first_batch = measured.metrics()
    run.progress.say(
        "first batch: "
        + ", ".join(f"{key.removesuffix('_first_step')} {v:.2g}" for key, v in run.state.first_batch.items())
    )
    found = faults(measured, run.config, run.policy.dtype)
    on_failure = run.config.check.on_failure
    if "sharing" in found and on_failure == "dense":
        run.progress.say(f"{found.pop('sharing')}; going on with dense rows")
        run.policy.layout = "dense"
    if found and on_failure != "warn":
        raise CheckError("the first batch failed its checks:\n- " + "\n- ".join(found.values()))
    for fault in found.values():
        run.progress.say(f"WARNING: {fault}")


def measure(policy: Any, groups: Sequence[TrainGroup]) -> Measured:
    """One forward of all groups, and two of a few: dense rows, and blank images."""
    own = policy.logprobs([g.tokens for g in groups])
    sampled = [g.rollout_logprobs for g in groups]
    found: dict[str, Any] = {"engine": Gap.of(own, sampled)}
    if groups[0].reference_logprobs is not None:
        reference = [g.reference_logprobs or () for g in groups]
        found |= {"reference": Gap.of(own, reference), "kl": mean_kl(own, reference)}
    if policy.layout == "shared":
        few = [g.tokens for g in groups[:SAMPLE]]
        found["dense"] = Gap.of(own[:SAMPLE], policy.logprobs(few, layout="dense"))
    if seeing := [i for i, g in enumerate(groups) if g.tokens.vision != {}][:SAMPLE]:
        blank = [replace(groups[i].tokens, vision=blank_vision(policy.vision(groups[i].tokens))) for i in seeing]
        found["seeing"] = Gap.of([own[i] for i in seeing], [sampled[i] for i in seeing])
        found["blank"] = Gap.of(policy.logprobs(blank), [sampled[i] for i in seeing])
    return Measured(**found)


def faults(measured: Measured, config: Config, dtype: torch.dtype) -> dict[str, str]:
    """What is wrong, by the name of the check. dtype: the policy's."""
    rules = {"engine": _engine, "reference": _reference, "sight": _sight, "sharing": _sharing}
    exact = dtype == torch.float32
    return {name: text for name, rule in rules.items() if (text := rule(measured, config, exact))}


def limits(check: CheckConfig, exact: bool, largest: float) -> dict[str, float]:
    """Measure of a gap -> its limit; `largest`: that of the maximum, where both sides compute in float32."""
    if exact:
        return {"max": largest}
    return bfloat16_limits(check)


def _engine(measured: Measured, config: Config, exact: bool) -> str:
    check = config.check
    beyond = measured.engine.beyond(limits(check, exact and exact_engine(config), check.max_logprob_gap))
    return beyond and (
        f"trainer and engine log-probs differ, nats: {beyond}: different weights, dtype, processor, chat template or "
        "sampling options"
    )


def _reference(measured: Measured, config: Config, exact: bool) -> str:
    if measured.reference is None or measured.kl is None or config.reference.model:
        return ""
    check = config.check
    if exact and config.reference.dtype != "bfloat16":
        beyond = "" if measured.kl <= check.max_kl else f"KL {measured.kl:.3g} (limit {check.max_kl:g})"
    else:
        beyond = measured.reference.beyond(limits(check, False, 0.0))
    return beyond and (
        f"policy and reference differ at the first step, nats: {beyond}: the reference is not the model the run "
        "starts from"
    )


def _sight(measured: Measured, config: Config, exact: bool) -> str:
    if measured.seeing is None or measured.blank is None:
        return ""
    clear = CLEAR_EXACT if exact and exact_engine(config) else CLEAR
    if measured.blank.mean >= clear * measured.seeing.mean + SIGHT:
        return ""
    return (
        f"with blank images the log-probs differ from the engine's by {measured.blank.mean:.3g} nats in the mean, "
        f"with the real ones by {measured.seeing.mean:.3g} on the same tokens: the image is lost somewhere"
    )


def _sharing(measured: Measured, config: Config, exact: bool) -> str:
    beyond = measured.dense.beyond(limits(config.check, exact, config.check.max_dense_gap)) if measured.dense else ""
    return beyond and f"shared rows differ from dense rows, nats: {beyond}; packing.layout=dense is exact"


def mean_kl(own: Any, reference: Any) -> float:
    """Mean over tokens of the k3 estimate exp(r - p) - (r - p) - 1 (Schulman 2020), nats."""
    delta_T = flat(reference) - flat(own)
    return float((delta_T.exp() - delta_T - 1).mean())


def blank_vision(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with every pixel about at the processor's mean; grids and sizes stay."""
    return {
        name: torch.full(v.shape, GREY, dtype=v.dtype) if v.is_floating_point() else v for name, v in vision.items()
    }
