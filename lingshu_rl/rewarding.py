"""The run's rewards: built from the config, run beside the event loop, tried on the labels before anything starts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lingshu_rl.config import Config, ConfigError
from lingshu_rl.data.rows import instruction_text
from lingshu_rl.data.sources import is_demo
from lingshu_rl.model.loading import DEMO_MODEL
from lingshu_rl.progress import Progress
from lingshu_rl.types import Prompt
from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import Compose, SpecError, build
from rewards.compose import default_spec as composition
from rewards.executor import Executor
from rewards.preflight import check

T = TypeVar("T")


class Rewards:
    """Grades training samples (counted against the failure budget) and evaluation samples (not counted)."""

    def __init__(self, executor: Executor, weights: Mapping[str, float]) -> None:
        """weights: of the composition's parts by name, which GDPO normalises one by one."""
        self.executor, self.weights = executor, weights

    async def score(self, samples: Sequence[RewardInput]) -> list[RewardResult]:
        """Raises RewardFailure when too many samples could not be judged."""
        return await asyncio.wrap_future(self.executor.submit(samples))

    async def grade(self, samples: Sequence[RewardInput]) -> list[RewardResult]:
        return await asyncio.wrap_future(self.executor.submit(samples, counted=False))

    def close(self) -> None:
        self.executor.close()


LABELS_TRIED = 20_000  # half a minute's work; so many rows of a larger set are tried


def spread(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of the items, evenly apart."""
    return items if len(items) <= count else [items[n * len(items) // count] for n in range(count)]


def build_rewards(config: Config, prompts: Sequence[Prompt], progress: Progress) -> Rewards:
    """Build the composition and, with rewards.preflight, try it on the labels. Raises ConfigError naming bad labels.

    A probe that earns what it should not (see rewards.preflight) is said, but is no reason to stop.
    """
    spec = config.rewards.spec or default_spec(config.data.train, config.data.test, read=read_of(config))
    try:
        reward = build(spec)
        weights = reward.weights if isinstance(reward, Compose) else {}
        if config.advantage.variant == "gdpo" and not weights:
            raise ConfigError(
                "advantage.variant=gdpo needs rewards.spec with `parts`: it normalises each part by itself"
            )
        executor = Executor(
            spec,
            mode=config.rewards.executor,
            workers=config.rewards.workers,
            timeout_s=config.rewards.timeout_s,
            max_failed_share=config.rewards.max_failed_share,
        )
    except SpecError as error:
        raise ConfigError(f"rewards.{error}") from None
    if config.rewards.preflight:
        tried = spread(prompts, LABELS_TRIED)
        report = check([p.reward_input() for p in tried], executor, ids=[p.id for p in tried])
        of = "" if len(tried) == len(prompts) else f" (evenly taken of {len(prompts)})"
        progress.say(f"rewards: {report.summary()}{of}")
        if report.bad:
            executor.close()
            raise ConfigError(
                f"the rewards cannot judge these labels; mend them, or go on with rewards.preflight=false, which masks "
                f"them:\n{report.text()}"
            )
    return Rewards(executor, weights)


def reward_of(given: Mapping[str, Any], *sources: Any, read: str = "prose") -> Reward:
    """The reward of a spec, or where none is given that of these sources (see `read_of`). Raises ConfigError for one that cannot be built."""
    try:
        return build(given or default_spec(*sources, read=read))
    except SpecError as error:
        raise ConfigError(f"rewards.{error}") from None


def default_spec(*sources: Any, read: str = "prose") -> Mapping[str, Any]:
    """By the rows' kinds, as the demo's rows have them if one of the sources is the demo."""
    if any(map(is_demo, sources)):
        from lingshu_rl.demo.reward import demo_spec

        return demo_spec()
    return composition(read)


def read_of(config: Config) -> str:
    """How much of a completion the run's default rewards read: closed answers only, where its prompts ask for tags."""
    if config.rewards.read != "auto":
        return config.rewards.read
    asked = instruction_text(instruction_of(config), "open") + config.data.system
    return "closed" if "<answer>" in asked else "prose"


def instruction_of(config: Config) -> str:
    """The run's data.instruction with "auto" made plain."""
    if config.data.instruction != "auto":
        return config.data.instruction
    return "short" if config.model == DEMO_MODEL else "full"
