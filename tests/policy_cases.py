"""Child of test_policy: one update of the policy for every case of a JSON file, in one process a rank.

A case: `settings` of a run; `out`, where the tensors go; `kept`: "gradient" or, after the step, "weights", by the names of the model. Marks:
`encode_always`: images go through the tower in every pass; `pixels`: they come with the groups, in place of being read by the
rank that needs them; `late`: the main rank keeps the others waiting for twice as long as collectives may take; `again`: an
update goes before; `refused`: one that is given up before its step; `text`: of the groups without images alone; `saved`: the state is, in a folder beside `out`.
The figures of each are printed as one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_grad
from torch.distributed.distributed_c10d import _set_pg_timeout

from lingshu_rl.checks.agreement import Agreement
from lingshu_rl.data.load import load
from lingshu_rl.model import logprobs
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.weights import model_tensors
from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import Policy
from lingshu_rl.types import TokenGroup, TrainGroup

PROMPTS = load("demo:validation", instruction="short").prompts[:5]
LIMIT_S = 2.0
MARKS = ("encode_always", "pixels", "late", "again", "refused", "text", "saved")


def make_groups(encoder: PromptEncoder | None = None) -> list[TrainGroup]:
    encoder = encoder or PromptEncoder("demo")
    random = torch.Generator().manual_seed(0)
    groups = []
    for prompt in PROMPTS:
        ids, vision = encoder.encode(prompt)
        lengths = torch.randint(1, 12, (4,), generator=random).tolist()
        completions = tuple(tuple(torch.randint(20, 300, (n,), generator=random).tolist()) for n in lengths)
        old = [torch.randn(n, generator=random) - 5 for n in lengths]
        advantages = tuple(torch.randn(4, generator=random).tolist())
        tokens = TokenGroup(prompt.id, ids, completions, vision)
        credit = tuple(tuple(torch.randn(n, generator=random).tolist()) for n in lengths)
        groups.append(TrainGroup(tokens, advantages, tuple(tuple(part.tolist()) for part in old), tuple(old), credit))
    # And two without an image: under ZeRO, ranks must agree on when the vision tower runs.
    first = groups[0]
    for n in (9, 95):
        tokens = TokenGroup(f"text {n}", tuple(range(20, 20 + n)), first.tokens.completions, {})
        groups.append(replace(first, tokens=tokens))
    return groups


def keep_waiting(policy: Policy) -> None:
    """As a long rollout does, then a long save."""
    limit = torch.distributed.distributed_c10d._get_default_timeout("gloo")
    _set_pg_timeout(timedelta(seconds=LIMIT_S))
    for wait in (lambda: policy.share("landed"), policy.barrier):
        time.sleep(0 if policy.rank else 2 * LIMIT_S)
        assert wait() in ("landed", None)
    _set_pg_timeout(limit)


class Refused(Exception):
    pass


def refuse(agreement: Agreement) -> None:
    raise Refused


def run(case: dict[str, Any], encoder: PromptEncoder, groups: list[TrainGroup]) -> None:
    case = {**dict.fromkeys(MARKS, False), **case}
    AcceleratorState._reset_state()  # the next Policy brings its own DeepSpeed settings
    policy = Policy(load_config(None, case["settings"]), on_gpu=False)
    policy.know({prompt.id: prompt for prompt in PROMPTS}, encoder)
    if case["late"]:
        keep_waiting(policy)
    if not case["pixels"]:
        groups = [replace(g, tokens=replace(g.tokens, vision=None)) if g.tokens.vision else g for g in groups]
    if case["again"]:
        policy.update(groups, 0)
    if case["refused"]:
        with contextlib.suppress(Refused):
            policy.update(groups, 0, refuse)
    if case["text"]:
        groups = [group for group in groups if group.tokens.vision == {}]
    message = len(policy.control.pack(groups))
    groups = policy.share(groups if policy.rank == 0 else None)
    weights = case["kept"] == "weights"
    before = {name: tensor.clone() for name, tensor in model_tensors(policy.module)} if weights else {}
    found: dict[str, torch.Tensor] = {}
    tower_passes: list[int] = []

    def capture() -> None:
        for name, parameter in policy.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            found[name] = gradient.clone() if gradient is not None else torch.zeros(1)

    if not weights:
        policy.engine.step = capture
    policy.module.model.visual.register_forward_hook(lambda *_: tower_passes.append(1))
    original = logprobs.with_image_features
    if case["encode_always"]:
        logprobs.with_image_features = lambda model, row: row
    metrics = policy.update(groups, 0)
    logprobs.with_image_features = original
    if case["saved"]:
        policy.save_state(Path(case["out"]).with_suffix(""))
    moved = 0.0
    if weights:
        found = {name: tensor.clone() for name, tensor in model_tensors(policy.module)}
        moved = max(float((tensor - before[name]).abs().max()) for name, tensor in found.items())
    if policy.rank == 0:
        torch.save(found, case["out"])
        told = {key: metrics[key] for key in ("loss", "rows", "ratio", "grad_norm") if key in metrics}
        told["zero_stage"] = policy.zero_stage
        print(
            json.dumps({"case": case["out"], "tower": len(tower_passes), "moved": moved, "message": message, **told}),
            flush=True,
        )


if __name__ == "__main__":
    encoder = PromptEncoder("demo")
    groups = make_groups(encoder)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case, encoder, groups)
