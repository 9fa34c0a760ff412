"""GRPO with verifiable rewards, from prompts to a better policy. This file is the algorithm; the parts are in `run.py`.

prompts -> rollouts (vLLM) -> rewards -> advantages -> reference log-probs -> one update (DeepSpeed) -> new weights
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lingshu_rl.advantages import denoised, gdpo_advantages, group_advantages, overlong_penalty, span_credit
from lingshu_rl.checks.firstbatch import check_first_batch
from lingshu_rl.config import Config
from lingshu_rl.credit import placed
from lingshu_rl.eval.heldout import evaluate
from lingshu_rl.failures import PromptRefused
from lingshu_rl.model.encoder import TemplateError
from lingshu_rl.objective import Noise
from lingshu_rl.overlap import Ahead
from lingshu_rl.processes.threads import in_thread, while_well
from lingshu_rl.results import finish, log_step
from lingshu_rl.run import Run, open_run
from lingshu_rl.types import Experience, Group, Prompt, Rollout, Scored, TokenGroup, TrainGroup

# The advantages of a group's members, and what the update needs of it: None when it has nothing to teach, why when the
# reference would not have it.
Prepared = tuple[tuple[float | None, ...], TrainGroup | str | None]


async def train(config: Config) -> dict[str, Any]:
    """Run `config.train.steps` steps with evaluation before and after; returns what summary.json holds."""
    async with open_run(config) as run:
        if run.state.step == 0:
            with run.timeline.of("evaluation"):
                await run.on_main(partial(evaluate, run, "before", config.eval.controls))
        run.progress.start("training", config.train.steps, done=run.state.step)
        ahead = Ahead(run, collect)
        for step in run.steps():
            batch = await ahead.batch(step)
            run.hand_device_to_policy()
            if batch.train and not run.state.first_batch:
                check_first_batch(run, batch.train)
            run.note_draw(batch)
            async with ahead.during(step):
                update = await run.update(batch.train, step)
            try:
                with run.timeline.of("weight_sync", step):
                    await run.send_weights()
            finally:  # the step is whole also when an engine could not take its weights: a checkpoint keeps it
                run.stream.observe(batch.groups, run.state.cursor)
                run.state.step = step + 1
                await run.main.agree(partial(log_step, run, step, batch, update))
            if due(config.reference.refresh_every, step + 1):
                await run.refresh_reference()
            if due(config.eval.every, step + 1) and step + 1 < config.train.steps:
                await run.on_main(partial(evaluate, run, f"step-{step + 1:06d}"))
            if due(config.checkpoint.every, step + 1):
                run.save_checkpoint()
        run.progress.stop()
        if run.saved_step < config.train.steps:
            run.save_checkpoint()
        return await run.on_main(partial(finish, run))


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0 = never) happens after this one."""
    return every > 0 and step % every == 0


async def collect(run: Run, step: int) -> Experience:
    """The step's groups. Up to train.max_refills times, those that teach nothing are made up for by the next prompts'.

    Dynamic sampling of DAPO, arXiv 2503.14476, section 3.2, with a bound. A refill passes over a prompt that this step
    has sampled already (the epoch turned over): it would give the same completions again.
    """
    wanted = run.config.train.prompts_per_step
    batch = await sample(run, step, run.stream.take(run.state.cursor, wanted))
    for _ in range(run.config.train.max_refills):
        if len(batch.train) == wanted:
            break
        sampled = {group.prompt.id for group in batch.groups}
        drawn = run.stream.take(run.state.cursor + batch.drawn, wanted - len(batch.train))
        more = await sample(run, step, [p for p in drawn if p.id not in sampled])
        batch += replace(more, drawn=len(drawn))
    return batch


async def sample(run: Run, step: int, prompts: Sequence[Prompt]) -> Experience:
    """Sample every prompt's group; each goes to the rewards and the reference as soon as it has landed.

    GDPO compares reward components over all groups, so there the reference has to wait for the last one.
    """
    config = run.config
    scoring: dict[str, asyncio.Task[Group]] = {}
    preparing: dict[str, asyncio.Task[Prepared]] = {}
    with run.timeline.of("rollout", step):
        landing = run.rollout.groups(prompts, config.train.group_size, step)
        async for rollouts in while_well(landing, lambda: [*scoring.values(), *preparing.values()]):
            name = rollouts[0].prompt.id
            scoring[name] = asyncio.create_task(score(run, rollouts, step))
            if config.advantage.variant != "gdpo":
                preparing[name] = asyncio.create_task(prepare(run, scoring[name], step))
    await asyncio.gather(*scoring.values(), *preparing.values())  # the first failure of any, whichever comes first
    answered = [p for p in prompts if p.id in scoring]
    refused = {p.id: run.rollout.refused[p.id] for p in prompts if p.id not in scoring}
    groups = [await scoring[p.id] for p in answered]
    if config.advantage.variant == "gdpo":
        found = gdpo_advantages([[components(m) for m in group.members] for group in groups], run.rewards.weights)
        for p, own in zip(answered, found, strict=True):
            preparing[p.id] = asyncio.create_task(prepare(run, scoring[p.id], step, tuple(own)))
    await asyncio.gather(*preparing.values())
    prepared = [await preparing[p.id] for p in answered]
    return Experience(
        groups=tuple(groups),
        advantages=tuple(advantages for advantages, _ in prepared),
        train=tuple(ready for _, ready in prepared if isinstance(ready, TrainGroup)),
        drawn=len(prompts),
        refused=refused | {p.id: r for p, (_, r) in zip(answered, prepared, strict=True) if isinstance(r, str)},
    )


async def score(run: Run, rollouts: Sequence[Rollout], step: int) -> Group:
    """One group with its rewards."""
    with run.timeline.of("reward", step):
        results = await run.rewards.score([rollout.reward_input() for rollout in rollouts])
    members = tuple(Scored(rollout, result) for rollout, result in zip(rollouts, results, strict=True))
    return Group(rollouts[0].prompt, members)


async def prepare(
    run: Run, scored: asyncio.Task[Group], step: int, advantages: tuple[float | None, ...] = ()
) -> Prepared:
    """Advantages (made here unless given) and reference log-probs of one group: what the update needs.

    A member whose reward failed is masked: out of the group's mean and of the update. A group whose advantages are all
    zero teaches nothing and goes neither to the reference nor to the update.
    """
    group = await scored
    advantages = mask_truncated(group, advantages or advantages_of(group, run.config, run.rewards.noise), run.config)
    kept = [(m.rollout, a) for m, a in zip(group.members, advantages, strict=True) if a is not None]
    if not any(a for _, a in kept):
        return advantages, None
    prompt, prompt_ids = group.prompt, kept[0][0].prompt_ids
    try:
        inputs = await in_thread(run.inputs, prompt, prompt_ids)
    except (OSError, TemplateError) as error:  # its image was readable when the engine was asked
        return advantages, f"the trainer cannot read prompt {prompt.id!r} any more: {error}"
    # Its images are left out: the reference processes them, and each rank those of the rows that it updates on.
    tokens = TokenGroup(prompt.id, prompt_ids, tuple(r.token_ids for r, _ in kept), None if prompt.images else {})
    reference = None
    if run.reference is not None:
        try:
            with run.timeline.of("reference", step):
                reference = (await run.reference.logprobs([tokens], [inputs]))[0]
        except PromptRefused as refusal:
            return advantages, str(refusal)
    logprobs = tuple(rollout.logprobs for rollout, _ in kept)
    credit = await in_thread(credit_of, run, group, advantages) if run.config.advantage.spans else None
    return advantages, TrainGroup(tokens, tuple(a for _, a in kept), logprobs, reference, credit)


def advantages_of(group: Group, config: Config, noise: Noise | None = None) -> tuple[float | None, ...]:
    """One a member from the group's own rewards; None for a member whose reward failed. noise: of what a judge gave."""
    return tuple(group_advantages(rewards_of(group, config, noise), config.advantage))


def rewards_of(group: Group, config: Config, noise: Noise | None = None) -> list[float | None]:
    """What the group's advantages are made of."""
    limit = config.rollout.max_tokens
    values = [m.result.value for m in group.members]
    if noise is not None:
        values = denoised(values, [bool(m.result.verdict) for m in group.members], noise, config.advantage.correction)
    return [
        None if value is None else value + overlong_penalty(len(m.rollout.token_ids), limit, config.advantage)
        for m, value in zip(group.members, values, strict=True)
    ]


def credit_of(run: Run, group: Group, advantages: Sequence[float | None]) -> tuple[tuple[float, ...], ...]:
    """What the tokens of each member that is kept have beside its advantage, from the spans of its reward."""
    rewards = rewards_of(group, run.config, run.rewards.noise)
    places = [placed(member, run.encoder.decode) for member in group.members]
    plain = group_advantages(rewards, run.config.advantage)
    found = span_credit(rewards, plain, places, run.config.advantage.spans)
    return tuple(credit for credit, a in zip(found, advantages, strict=True) if a is not None)


def mask_truncated(group: Group, advantages: Sequence[float | None], config: Config) -> tuple[float | None, ...]:
    """With loss.mask_truncated, completions cut at the limit count in the mean but not in the loss (DAPO,
    2503.14476)."""
    hide = config.loss.mask_truncated
    return tuple(None if hide and m.rollout.truncated else a for m, a in zip(group.members, advantages, strict=True))


def components(member: Scored) -> dict[str, float] | None:
    return dict(member.result.components) if member.result.value is not None else None
