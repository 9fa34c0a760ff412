"""GRPO with verifiable rewards, from prompts to a better policy. This file is the algorithm; the parts are in `run.py`.

prompts -> rollouts (vLLM) -> rewards -> advantages -> reference log-probs -> one update (DeepSpeed) -> new weights
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lingshu_rl.advantages import group_advantages, overlong_penalty
from lingshu_rl.config import Config
from lingshu_rl.evaluation import evaluate
from lingshu_rl.firstbatch import check_first_batch
from lingshu_rl.results import finish, log_step
from lingshu_rl.run import Run, open_run
from lingshu_rl.types import Group, Rollout, Scored, TokenGroup, TrainGroup


@dataclass(frozen=True)
class Experience:
    """One step's completions: `groups` and their advantages for the log, `train` for the update."""

    groups: tuple[Group, ...]
    advantages: tuple[tuple[float | None, ...], ...]
    train: tuple[TrainGroup, ...]
    seconds: dict[str, float]


async def train(config: Config) -> dict[str, Any]:
    """Run `config.train.steps` steps with evaluation before and after; returns what summary.json holds."""
    async with open_run(config) as run:
        if run.first_step == 0:
            with run.phase("evaluation"):
                await run.on_main(partial(evaluate, run, "before", config.eval.controls))
        run.progress.start("training", config.train.steps, done=run.first_step)
        for step in range(run.first_step, config.train.steps):
            began = time.monotonic()
            batch = await run.on_main(partial(collect, run, step))
            if batch.train and not run.first_batch:
                check_first_batch(run, batch.train)
            with run.phase("update"):
                update = run.policy.update(batch.train, step)
            with run.phase("weight_sync"):
                await run.transfer.send(run.policy, version=step + 1)
            run.cursor += config.train.prompts_per_step
            log_step(run, step + 1, batch, update, time.monotonic() - began)
            if config.eval.every and (step + 1) % config.eval.every == 0 and step + 1 < config.train.steps:
                await run.on_main(partial(evaluate, run, f"step-{step + 1:06d}"))
            if config.checkpoint.every and (step + 1) % config.checkpoint.every == 0:
                run.save_checkpoint(step + 1)
        run.progress.stop()
        if run.first_step < config.train.steps:
            run.save_checkpoint(config.train.steps)
        return await run.on_main(partial(finish, run))


async def collect(run: Run, step: int) -> Experience:
    """Sample every prompt's group; each goes to the rewards and the reference as soon as it has landed."""
    config = run.config.train
    prompts = run.stream.take(run.cursor, config.prompts_per_step)
    began = time.monotonic()
    tasks: dict[str, asyncio.Task[Any]] = {}
    assert run.rollout is not None
    async for rollouts in run.rollout.groups(prompts, config.group_size, step):
        tasks[rollouts[0].prompt.id] = asyncio.create_task(judge(run, rollouts))
    landed = time.monotonic()
    judged = [await tasks[p.id] for p in prompts]
    seconds = {"rollout": landed - began, "reference": time.monotonic() - landed, "reward": sum(j[3] for j in judged)}
    for name, value in seconds.items():
        run.add_seconds(name, value)
    return Experience(
        groups=tuple(j[0] for j in judged),
        advantages=tuple(j[1] for j in judged),
        train=tuple(j[2] for j in judged if j[2] is not None),
        seconds=seconds,
    )


async def judge(
    run: Run, rollouts: Sequence[Rollout]
) -> tuple[Group, tuple[float | None, ...], TrainGroup | None, float]:
    """Rewards, advantages and reference log-probs of one group, and the seconds its rewards took.

    A member whose reward failed is masked: out of the group's mean and of the update. A group whose advantages are all
    zero teaches nothing and goes neither to the reference nor to the update.
    """
    began = time.monotonic()
    results = await run.rewards.score([rollout.reward_input() for rollout in rollouts])
    seconds = time.monotonic() - began
    group = Group(rollouts[0].prompt, tuple(Scored(r, result) for r, result in zip(rollouts, results, strict=True)))
    advantages = advantages_of(group, run.config)
    kept = [(m.rollout, a) for m, a in zip(group.members, advantages, strict=True) if a is not None]
    if not any(a for _, a in kept):
        return group, advantages, None, seconds
    prompt_ids, vision = await asyncio.to_thread(run.encoder.encode, group.prompt)
    if prompt_ids != rollouts[0].prompt_ids:
        raise RuntimeError(
            f"prompt {group.prompt.id!r}: the engine read {len(rollouts[0].prompt_ids)} tokens, the trainer's processor "
            f"makes {len(prompt_ids)}; both must use the same processor files and pixel limits"
        )
    tokens = TokenGroup(group.prompt.id, prompt_ids, tuple(r.token_ids for r, _ in kept), vision)
    reference = (await run.reference.logprobs([tokens]))[0] if run.reference is not None else None
    ready = TrainGroup(tokens, tuple(a for _, a in kept), tuple(r.logprobs for r, _ in kept), reference)
    return group, advantages, ready, seconds


def advantages_of(group: Group, config: Config) -> tuple[float | None, ...]:
    """One a member; None for a member whose reward failed, and for a truncated one with loss.mask_truncated."""
    limit = config.rollout.max_tokens
    rewards = [
        None
        if m.result.value is None
        else m.result.value + overlong_penalty(len(m.rollout.token_ids), limit, config.advantage)
        for m in group.members
    ]
    masked = [config.loss.mask_truncated and m.rollout.truncated for m in group.members]
    found = group_advantages(rewards, config.advantage)
    return tuple(None if mask else a for a, mask in zip(found, masked, strict=True))
