"""The run's rewards: built from the config, run beside the event loop, tried on the labels before anything starts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lingshu_rl.config import Config
from lingshu_rl.data.rows import instruction_text
from lingshu_rl.data.sources import is_demo
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.loading import DEMO_MODEL
from lingshu_rl.objective import Noise
from lingshu_rl.processes.threads import in_thread
from lingshu_rl.progress import Progress
from lingshu_rl.storage.runfolder import write_text
from lingshu_rl.types import Prompt
from rewards import trust
from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import Compose, SpecError, build
from rewards.compose import default_spec as composition
from rewards.executor import Executor
from rewards.judge import Judge, judge_of, judges
from rewards.preflight import TIMED, TRIES, check, seconds_each

T = TypeVar("T")


class Rewards:
    """Grades training samples (counted against the failure budget) and evaluation samples (not counted)."""

    def __init__(
        self,
        executor: Executor,
        weights: Mapping[str, float],
        reward: Reward,
        judged: Sequence[RewardInput] = (),
        noise: Noise | None = None,
    ) -> None:
        """weights: of the composition's parts by name, which GDPO normalises one by one. reward: what the executor
        runs.

        judged: rows that a model judges. noise: how often it errs, where advantages are to be corrected for it.
        """
        self.executor, self.weights, self.reward, self.judged = executor, weights, reward, judged
        self.noise = noise
        self.judges = judges(reward)

    async def score(self, samples: Sequence[RewardInput]) -> list[RewardResult]:
        """Raises RewardFailure when too many samples could not be judged."""
        results = await asyncio.wrap_future(self.executor.submit(samples))
        return [in_place(sample, result) for sample, result in zip(samples, results, strict=True)]

    async def grade(self, samples: Sequence[RewardInput]) -> list[RewardResult]:
        return await asyncio.wrap_future(self.executor.submit(samples, counted=False))

    def serve(self, url: str, model: str, token: str) -> None:
        """The run's own judge answers at this address from now on."""
        for judge in self.own_judges:
            judge.serve_at(url, model=model, token=token)

    @property
    def own_judges(self) -> list[Judge]:
        """Those that the run serves."""
        return [judge for judge in self.judges if judge.own]

    def spent(self) -> dict[str, float]:
        """For the step's metrics: what was asked of judges so far, and what it cost."""
        opened = [judge.endpoint for judge in self.judges if judge.opened]
        if not opened:
            return {}
        return {
            "judge/requests": float(sum(endpoint.sent for endpoint in opened)),
            "judge/from_cache": float(sum(endpoint.from_cache for endpoint in opened)),
            "judge/cost": sum(judge.cost for judge in self.judges),
        }

    def close(self) -> None:
        self.executor.close()
        for judge in self.judges:
            judge.close()


def in_place(sample: RewardInput, result: RewardResult) -> RewardResult:
    """The result, if its spans lie in the completion; else one that masks the sample."""
    last, length = max((s.end for spans in result.spans.values() for s in spans), default=0), len(sample.completion)
    if last <= length:
        return result
    return RewardResult(None, "error", reason=f"its reward has a span that ends at {last} of {length} characters")


PREFLIGHT = "preflight"  # advantage.noise: as measured before the run
LABELS_TRIED = 20_000  # half a minute's work; so many rows of a larger set are tried
LABELS_S, LEAST_TRIED = 600.0, 200  # of a slow reward as many as fit into this time, and so many at the least


def spread(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of the items, evenly apart."""
    return items if len(items) <= count else [items[n * len(items) // count] for n in range(count)]


def build_rewards(config: Config, prompts: Sequence[Prompt], progress: Progress) -> Rewards:
    """Build the composition and, with rewards.preflight, try it on the labels. Raises ConfigError naming bad labels.

    A probe that earns what it should not (see rewards.preflight) is said, but is no reason to stop.
    """
    noise = read_noise(config.advantage.noise)
    spec = config.rewards.spec or default_spec(config.data.train, config.data.test, read=read_of(config))
    try:
        reward = build(spec)
        weights = reward.weights if isinstance(reward, Compose) else {}
        if config.advantage.variant == "gdpo" and not weights:
            raise ConfigError(
                "advantage.variant=gdpo needs rewards.spec with `parts`: it normalises each part by itself"
            )
        executor = Executor(
            reward if config.rewards.executor == "inline" else spec,
            mode=config.rewards.executor,
            workers=config.rewards.workers,
            timeout_s=config.rewards.timeout_s,
            max_failed_share=config.rewards.max_failed_share,
        )
    except SpecError as error:
        raise ConfigError(f"rewards.{error}") from None
    tried = spread(prompts, LABELS_TRIED)
    rewards = Rewards(executor, weights, reward, judged_rows(reward, tried), noise)
    try:
        check_judges(config, rewards)
    except ConfigError:
        executor.close()
        raise
    for line in judging_costs(config, rewards, len(rewards.judged) / max(1, len(tried))):
        progress.say(line)
    if config.rewards.preflight:
        timed = (sample for p in tried if judge_of(reward, sample := p.reward_input()) is None)
        each = seconds_each(list(islice(timed, TIMED)), executor)
        tried = spread(tried, max(LEAST_TRIED, int(LABELS_S / TRIES / max(each, 1e-9))))
        report = check(
            [p.reward_input() for p in tried],
            executor,
            ids=[p.id for p in tried],
            judged=lambda sample: judge_of(reward, sample) is not None,
            say=progress.say,
        )
        of = "" if len(tried) == len(prompts) else f" (evenly taken of {len(prompts)})"
        progress.say(f"rewards: {report.summary()}{of}")
        if report.bad:
            executor.close()
            raise ConfigError(
                "the rewards cannot judge these labels, or do not pay them in full; mend them or leave the rows out. "
                "With "
                "rewards.preflight=false the run goes on: a label that cannot be judged is masked, one that earns less "
                "than 1 "
                f"teaches that a right answer is wrong:\n{report.text()}"
            )
    return rewards


def read_noise(given: Any) -> Noise | None:
    """advantage.noise where it is known before the run: rates, or a file with them. Raises ConfigError."""
    if not given or given == PREFLIGHT:
        return None
    try:
        rates = given if isinstance(given, Mapping) else json.loads(Path(given).read_text())
        return Noise.read(rates, f"advantage.noise={given}")
    except OSError as error:
        raise ConfigError(
            f"advantage.noise={given!r} is no file ({error.strerror}); give rates, a run's judge.json or `preflight`"
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def judged_rows(reward: Reward, prompts: Sequence[Prompt]) -> list[RewardInput]:
    """The rows that a judge of this reward may be asked about."""
    if not reward.waits:
        return []
    return [sample for p in prompts if judge_of(reward, sample := p.reward_input()) is not None]


def check_judges(config: Config, rewards: Rewards) -> None:
    """Raises ConfigError for a judge that nobody serves, one served for nobody, and settings that cannot work with
    any."""
    own, waits = rewards.own_judges, rewards.reward.waits
    faults = {
        "rewards.spec has a judge without a url, and no judge.model that this run could serve; give one of them": (
            own and not config.judge.model
        ),
        f"judge.model={config.judge.model} would be served for nobody: rewards.spec has no judge without a url": (
            config.judge.model and not own
        ),
        "rewards.executor=isolated kills what takes long, as a judge may; it has limits of its own: use inline": (
            waits and config.rewards.executor != "inline"
        ),
        "advantage.noise corrects what a judge gave, and rewards.spec has none": config.advantage.noise and not waits,
        "advantage.noise=preflight needs rewards.preflight=true, which measures the judge": (
            config.advantage.noise == PREFLIGHT and not config.rewards.preflight
        ),
        "advantage.noise corrects a value that is the judge's; rewards.spec pays several weighted parts": (
            config.advantage.noise and len(rewards.weights) > 1
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(fault)


def judging_costs(config: Config, rewards: Rewards, share: float) -> list[str]:
    """What the judges will be asked at the most, in words: the trial, and all steps. share: of the rows that they
    judge."""
    if not rewards.judged:
        return []
    told = []
    for judge, calls, tokens in trust.estimate(rewards.judged, rewards.reward, rows=config.judge.probe_rows):
        if config.rewards.preflight:
            told.append(f"{judge}, its trial: {judge.told_cost(calls, tokens)}")
        own = [s for s in rewards.judged if judge_of(rewards.reward, s) is judge]
        some = [trust.with_label(s) for s in spread(own, 100)]
        calls, tokens = judge.estimate(some)
        completions = config.train.steps * config.train.prompts_per_step * config.train.group_size
        times = completions * share * len(own) / len(rewards.judged) / len(some)
        told.append(
            f"{judge}, all steps, at the most (evaluations not counted): "
            f"{judge.told_cost(times * calls, times * tokens)}"
        )
    return told


async def try_judges(config: Config, rewards: Rewards, file: Path, progress: Progress) -> None:
    """Measure the judges and write `file` (judge.json). Raises ConfigError when one errs more often than it may."""
    if not rewards.judged or not config.rewards.preflight:
        return
    rows = config.judge.probe_rows
    found = await in_thread(trust.measure, rewards.judged, rewards.reward, rows=rows, say=progress.say)
    pays, refusals = trust.pooled(found)
    rates = {"false_pay": pays.share, "false_refusal": refusals.share}
    write_text(file, json.dumps({**rates, "judges": [one.to_json() for one in found]}, indent=1, ensure_ascii=False))
    for line in (line for one in found for line in one.lines()):
        progress.say(line)
    limits = config.judge.max_false_pay, config.judge.max_false_refusal
    if problems := [problem for one in found for problem in one.problems(*limits)]:
        raise ConfigError(
            "the judge cannot be trusted with these rows (judge.max_false_pay, judge.max_false_refusal; all of its "
            "trial is "
            f"in {file}):\n  " + "\n  ".join(problems)
        )
    if config.advantage.noise == PREFLIGHT:
        try:
            rewards.noise = Noise.read(rates, str(file))
        except ValueError as error:
            raise ConfigError(str(error)) from None


def reward_of(given: Mapping[str, Any], *sources: Any, read: str = "prose") -> Reward:
    """The reward of a spec, or where none is given that of these sources (see `read_of`). Raises ConfigError for one
    that cannot be built."""
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
