"""Child of test_lora: adapters trained for three updates by every rank, then sent and saved; one folder a ZeRO stage.

Arguments: a JSON of {folder, transfer, file, adapter}, the last two being the URLs of servers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from launching import TOKEN
from policy_cases import make_groups

from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.weights import gathered
from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import Policy
from lingshu_rl.rollout.client import RolloutClient
from lingshu_rl.rollout.transfer import make_transfer
from lingshu_rl.types import TokenGroup

SETTINGS = ["train.lora={r: 4, lora_alpha: 16, target_modules: [q_proj, v_proj]}", "train.lr=1e-2", "loss.kl_coef=0.01",
            "train.warmup_steps=0"]  # fmt: skip
TOKENS = TokenGroup("scored", tuple(range(20, 40)), (tuple(range(50, 75)), tuple(range(90, 75, -1))), {})
VERSION = 3


def own(model: Any) -> Any:
    return group_logprobs(model, [TOKENS], token_budget=4096, layout="dense", banned_ids=(), temperature=1.0)


async def of_engine(client: RolloutClient) -> list[list[torch.Tensor]]:
    """The server's log-probs of the same tokens under the weights it was sent."""
    found = []
    for completion in TOKENS.completions:
        body = {"model": client.sampling["model"], "prompt": [*TOKENS.prompt_ids, *completion], "max_tokens": 1}
        answer = await client.pool.http.post(
            f"{client.pool.servers[0].url}/v1/completions", json={**body, "prompt_logprobs": 0}
        )
        assert answer.status_code == 200, answer.text
        places = answer.json()["choices"][0]["prompt_logprobs"][len(TOKENS.prompt_ids) :]
        found.append(
            torch.tensor([place[str(token)]["logprob"] for token, place in zip(completion, places, strict=True)])
        )
    return [found]


async def send(policy: Policy, kind: str, url: str, folder: Path) -> Any:
    main = policy.rank == 0
    client = RolloutClient([url], token=TOKEN, decode=str, banned_ids=[], seed=0, temperature=1.0, max_tokens=4,
                           timeout_s=60, retries=0, concurrency=4) if main else None  # fmt: skip
    transfer = make_transfer(kind, client, folder=folder if main else None, timeout_s=60, dead=lambda: "")
    await transfer.start()
    for version in range(1, VERSION + 1):
        await transfer.send(policy, version)
    if client is None:
        return None
    assert client.weight_version == VERSION
    try:
        return await of_engine(client)
    finally:
        await client.close()


def base_weights(policy: Policy) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in policy.module.get_base_model().named_parameters():
        if "lora_" not in name:
            with gathered([parameter]):
                found[name.replace(".base_layer.", ".")] = parameter.detach().clone()
    return found


def run(stage: int, where: dict[str, str]) -> None:
    AcceleratorState._reset_state()  # the next Policy brings its own DeepSpeed settings
    policy = Policy(load_config(None, [*SETTINGS, f"deepspeed.zero_optimization.stage={stage}"]), on_gpu=False)
    groups = make_groups()
    for step in range(3):
        policy.update(groups, step)
    folder = Path(where["folder"], str(stage))
    folder.mkdir(exist_ok=True)
    trained = own(policy.engine)
    engines = {k: asyncio.run(send(policy, k, where[k], Path(where["transfer"]))) for k in ("file", "adapter")}
    policy.save_hf(folder / "hf")
    policy.save_adapter(folder / "adapter" if policy.rank == 0 else None)
    base = base_weights(policy)
    if policy.rank == 0:
        # Saved folders are loaded by the parent: here transformers would share a model out among the ranks.
        torch.save({"trained": trained, "base": base, **engines}, folder / "found.pt")


if __name__ == "__main__":
    for stage in (2, 3):
        run(stage, json.loads(sys.argv[1]))
