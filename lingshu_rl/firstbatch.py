"""Checks on the first batch, before anything is learnt from it. They catch what else shows only after a day:

- KL: the reference must be the model the run starts from;
- gap: trainer and engine must give the sampled tokens the same log-probs;
- sight: with a blank image the trainer must NOT agree with the engine, or one of them never saw the image;
- sharing: rows that hold a prompt once must give what one row a completion gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingshu_rl.failures import RunStopped
from lingshu_rl.types import TrainGroup

if TYPE_CHECKING:
    from lingshu_rl.run import Run

SAMPLE = 4  # groups that the two extra forwards (dense rows, blank images) look at
SIGHT = 1e-4  # nats that a blank image must change at the least


class CheckError(RunStopped):
    """The first batch shows that the run would learn from wrong numbers; the message holds the figures."""


def check_first_batch(run: Run, groups: Sequence[TrainGroup]) -> None:
    """Measure, store in run.state.first_batch, and act on `check.on_failure`. All ranks call this. Raises CheckError."""
    limits, policy = run.config.check, run.policy
    own = policy.logprobs([g.tokens for g in groups])
    sampled = [[torch.tensor(x) for x in g.rollout_logprobs] for g in groups]
    found = {"max_logprob_gap_first_step": largest_gap(own, sampled), "kl_first_step": 0.0}
    if groups[0].reference_logprobs is not None:
        found["kl_first_step"] = mean_kl(own, [g.reference_logprobs or () for g in groups])
    few = [g.tokens for g in groups[:SAMPLE]]
    if policy.layout == "shared":
        found["dense_gap_first_step"] = largest_gap(own[:SAMPLE], policy.logprobs(few, layout="dense"))
    seeing = [i for i, g in enumerate(groups) if g.tokens.vision][:SAMPLE]
    if seeing:
        blank = [replace(groups[i].tokens, vision=blank_vision(groups[i].tokens.vision)) for i in seeing]
        found["blank_gap_first_step"] = largest_gap(policy.logprobs(blank), [sampled[i] for i in seeing])
    run.state.first_batch = found
    run.progress.say(
        "first batch: " + ", ".join(f"{key.removesuffix('_first_step')} {v:.2g}" for key, v in found.items())
    )

    exact = policy.dtype == torch.float32
    gap_limit = limits.max_logprob_gap if exact else limits.max_logprob_gap_bf16
    faults = []
    if found["max_logprob_gap_first_step"] > gap_limit:
        faults.append(
            f"trainer and engine log-probs differ by up to {found['max_logprob_gap_first_step']:.3g} nats (limit "
            f"{gap_limit:g}): different weights, dtype, processor or sampling options"
        )
    if exact and not run.config.reference.model and found["kl_first_step"] > limits.max_kl:
        faults.append(
            f"the KL to the reference is {found['kl_first_step']:.3g} at the first step (limit {limits.max_kl:g}): "
            "the reference is not the model the run starts from"
        )
    if seeing and found["blank_gap_first_step"] < 10 * found["max_logprob_gap_first_step"] + SIGHT:
        faults.append(
            f"blank images change the log-probs by only {found['blank_gap_first_step']:.3g} nats, real ones differ from "
            f"the engine's by {found['max_logprob_gap_first_step']:.3g}: the image is lost somewhere"
        )
    dense_gap = found.get("dense_gap_first_step", 0.0)
    if dense_gap > (limits.max_dense_gap if exact else limits.max_logprob_gap_bf16):
        if limits.on_failure == "dense":
            run.progress.say(f"shared rows differ from dense rows by {dense_gap:.3g} nats; going on with dense rows")
            policy.layout = "dense"
        else:
            faults.append(f"shared rows differ from dense rows by {dense_gap:.3g} nats; packing.layout=dense is exact")
    if faults and limits.on_failure != "warn":
        raise CheckError("the first batch failed its checks:\n- " + "\n- ".join(faults))
    for fault in faults:
        run.progress.say(f"WARNING: {fault}")


def largest_gap(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> float:
    """Largest absolute difference over all completion tokens, nats."""
    return max(float((x - y).abs().max()) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


def mean_kl(own: Sequence[Sequence[Tensor]], reference: Sequence[Sequence[Tensor]]) -> float:
    """Mean over tokens of the k3 estimate exp(r - p) - (r - p) - 1 (Schulman 2020), nats."""
    delta = torch.cat([r - p for ps, rs in zip(own, reference, strict=True) for p, r in zip(ps, rs, strict=True)])
    return float((delta.double().exp() - delta.double() - 1).mean())


def blank_vision(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with every pixel at the processor's mean; grids and sizes stay."""
    return {name: torch.zeros(v.shape, dtype=v.dtype) if v.is_floating_point() else v for name, v in vision.items()}
