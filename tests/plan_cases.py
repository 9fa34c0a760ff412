"""Child of test_plan: what DeepSpeed really holds for every case of a JSON file (settings of a run), in one process a rank.

Before the step of one update: bytes of this rank's weights, gradients and optimiser (master weights and state); printed as
one JSON line a rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from policy_cases import make_groups

from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import Policy


def held(tensors: Iterable[Any]) -> int:
    """Bytes of the different memory blocks of these tensors and of those in these lists."""
    flat = [t for x in tensors if x is not None for t in (x if isinstance(x, list) else [x])]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in flat}.values())


def weights(policy: Policy) -> int:
    return held(getattr(p, "ds_tensor", p) for p in policy.module.parameters())


def gradients(policy: Policy) -> int:
    zero = policy.engine.optimizer
    if hasattr(zero, "grad_partitions_flat_buffer"):  # stage 3
        return held([zero.grad_partitions_flat_buffer])
    if policy.zero_stage == 2:
        return held(zero.averaged_gradients.values())
    return held(p.grad if p.grad is not None else getattr(p, "grad_accum", None) for p in policy.module.parameters())


def optimizer(policy: Policy) -> int:
    zero = policy.engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    master = getattr(zero, "single_partition_of_fp32_groups", None) or getattr(zero, "fp32_partitioned_groups_flat", [])
    state = [t for values in inner.state.values() for t in values.values() if torch.is_tensor(t) and t.numel() > 1]
    return held([*master, *state])


def run(settings: list[str], groups: Any) -> None:
    AcceleratorState._reset_state()  # the next Policy brings its own DeepSpeed settings
    policy = Policy(load_config(None, settings), on_gpu=False)
    policy.update(groups, 0)  # a first step, after which all state is there
    found: dict[str, int] = {}

    def capture() -> None:
        found.update(weights=weights(policy), gradients=gradients(policy), optimizer=optimizer(policy))

    policy.engine.step = capture
    policy.update(groups, 1)
    print(json.dumps({"case": settings, "rank": policy.rank, **found}), flush=True)


if __name__ == "__main__":
    all_groups = make_groups()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case, all_groups)
