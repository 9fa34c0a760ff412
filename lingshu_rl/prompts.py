"""A run's prompts before anything starts: loaded, held against what model and engine can take, their lengths known.

What the engine is started with follows from them: its `max_model_len` is the longest prompt and a completion.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from lingshu_rl.config import Config
from lingshu_rl.data.load import Loaded, load
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.lengths import Length, Lengths, Limit, PictureTokens
from lingshu_rl.model.loading import has_tokenizer, model_context
from lingshu_rl.model.shape import UnknownModelError, is_published, read_shape
from lingshu_rl.planning.plan import planned_for, rows_told, with_budget
from lingshu_rl.policy import check_choices
from lingshu_rl.processes.placement import this_machine
from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.rewarding import instruction_of, read_of, reward_of
from lingshu_rl.rollout.client import SilentServer, served_context
from lingshu_rl.rollout.sampler import RolloutError
from lingshu_rl.storage.runfolder import RunFolder

SETS = ("train", "test")
NOTHING: Mapping[str, Lengths] = MappingProxyType({})
SWAPPED = "shuffled"  # the control that puts one question's images before another's text


@dataclass(frozen=True)
class Context:
    """Most tokens of prompt and completion together. by: who says so, for messages."""

    tokens: int
    by: str


@dataclass(frozen=True)
class RunPrompts:
    """sets: "train" and "test". lengths: theirs; empty where nothing was counted. context: None where nothing limits
    it."""

    sets: Mapping[str, Loaded]
    lengths: Mapping[str, Lengths]
    context: Context | None

    def longest(self) -> tuple[str, Length]:
        """The longest prompt and its set."""
        found = {name: length for name, lengths in self.lengths.items() if (length := lengths.longest()) is not None}
        name = max(found, key=lambda name: found[name].total)
        return name, found[name]

    def needed(self, config: Config) -> int:
        """Tokens of context that every request of the run fits in."""
        longest = max(self.longest()[1].total, *(lengths.bound for lengths in self.lengths.values()))
        if SWAPPED in config.eval.controls:
            longest = max(longest, self.lengths["test"].most_text + self.lengths["test"].most_images)
        needed = longest + config.rollout.max_tokens
        return min(needed, self.context.tokens) if self.context is not None else needed


def count_prompts(
    config: Config, encoder: PromptEncoder, context: Context | None, folder: RunFolder | None = None
) -> RunPrompts:
    """The run's prompts, each within the context. folder: where rows that are left out are listed.

    Raises DataError for rows that cannot be used, and ConfigError.
    """
    limit = prompt_limit(config, context)
    pictures = PictureTokens(encoder)
    lengths = {name: Lengths(pictures, limit) for name in SETS}
    return RunPrompts(load_prompts(config, encoder, lengths, folder), lengths, context)


def load_prompts(
    config: Config, encoder: PromptEncoder, lengths: Mapping[str, Lengths] = NOTHING, folder: RunFolder | None = None
) -> dict[str, Loaded]:
    """Training and held-out prompts, as "train" and "test", counted by `lengths` of the same names, if any.

    Refused rows are listed in the run folder, or end the run.
    """
    instruction, sets = instruction_of(config), {}
    check = reward_of(config.rewards.spec, config.data.train, config.data.test, read=read_of(config)).check_gold
    for name, source in zip(SETS, (config.data.train, config.data.test), strict=True):
        counting = lengths.get(name)
        one = sets[name] = load(
            source,
            instruction=instruction,
            system=config.data.system,
            skip_bad_rows=config.data.skip_bad_rows,
            fault=encoder.fault if counting is None else counting.fault,
            check=check,
            budget=config.data.budget,
            lengths=counting,
            drop_long=config.data.too_long == "drop",
            key=f"data.{name}",
        )
        if folder is not None and (left_out := [*one.refused, *one.too_long]):
            folder.write_eval(f"refused_{name}", [asdict(r) for r in left_out])
    shared = sets["train"].prompts.ids.keys() & sets["test"].prompts.ids.keys()
    if shared:
        raise ConfigError(f"data.train and data.test share {len(shared)} row ids, for example {sorted(shared)[0]!r}")
    return sets


async def awaited_context(config: Config, encoder: PromptEncoder, token: str) -> Context | None:
    """`engine_context`; given servers may take rollout.start_timeout_s to answer."""
    deadline = time.monotonic() + config.rollout.start_timeout_s
    while True:
        try:
            return engine_context(config, encoder, token)
        except SilentServer:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(1.0)


def engine_context(config: Config, encoder: PromptEncoder, token: str) -> Context | None:
    """What the engine takes of prompt and completion together: the given servers' own, as set, or the model's most.

    token: of the given servers. Raises RolloutError for what they answer, or that they do not.
    """
    if config.rollout.urls:
        tokens = served_context(config.rollout.urls, token)
        return Context(tokens, f"max_model_len={tokens} of the servers in rollout.urls")
    given = config.rollout.vllm.get("max_model_len")
    if isinstance(given, int) and given > 0:
        return Context(given, f"rollout.vllm.max_model_len={given}")
    most = model_context(config.model, encoder.tokenizer)
    return Context(most, f"the model's context of {most:,} tokens") if most else None


def prompt_limit(config: Config, context: Context | None) -> Limit | None:
    """Raises ConfigError when a completion would leave nothing to the prompt."""
    if context is None:
        return None
    completion = config.rollout.max_tokens
    if context.tokens <= completion:
        raise ConfigError(f"rollout.max_tokens={completion} leaves nothing to the prompt of {context.by}: lower it")
    return Limit(context.tokens - completion, f"{context.by} leaves beside rollout.max_tokens={completion}")


def with_context(config: Config, tokens: int) -> Config:
    """The config with the engine's max_model_len, unless it is given or the servers run already."""
    if config.rollout.urls or "max_model_len" in config.rollout.vllm:
        return config
    return replace(config, rollout=replace(config.rollout, vllm={**config.rollout.vllm, "max_model_len": tokens}))


def told(config: Config, found: RunPrompts) -> Iterator[str]:
    """For a reader: pixels, rows, the longest prompt with its row, and what the engine is started with."""
    yield _pixels(config)
    rows = ", ".join(f"{len(one.prompts):,} to {name} on" for name, one in found.sets.items())
    yield f"prompts: {rows}"
    for name, one in found.sets.items():
        if one.too_long:
            yield (
                f"data.{name}: {len(one.too_long):,} rows are left out as too long (data.too_long=drop), the first: "
                f"{one.too_long[0]}"
            )
    name, longest = found.longest()
    at_most = max(lengths.bound for lengths in found.lengths.values())
    unread = f"; those that were not read have at most {at_most:,}" if at_most > longest.total else ""
    prompts = found.sets[name].prompts
    place = prompts.place(longest.id) if longest.id in prompts.ids else "refused for its image"
    yield f"longest prompt: {longest}, {place} (id {longest.id}) of data.{name}{unread}"
    yield f"context: {_context_told(config, found)}"


def _pixels(config: Config) -> str:
    data = config.data
    return f"images: {data.min_pixels:,} to {data.max_pixels:,} pixels each (data.min_pixels, data.max_pixels)"


def _context_told(config: Config, found: RunPrompts) -> str:
    if config.rollout.urls:
        return found.context.by if found.context is not None else "that of the servers in rollout.urls"
    tokens = with_context(config, found.needed(config)).rollout.vllm["max_model_len"]
    why = (
        "as given" if "max_model_len" in config.rollout.vllm else f"with rollout.max_tokens={config.rollout.max_tokens}"
    )
    return f"the engine starts with max_model_len={tokens}, {why}"


def foreseen(config: Config) -> tuple[Config, list[str]]:
    """For `--dry-run`: the config as the engine is started with, and what `told` says. Loads no model.

    A model that is here by its published sizes alone is planned for without its prompts. Raises ConfigError for one
    that cannot be read, DataError, and what else would end the run before its engines start.
    """
    check_choices(config)
    if config.reference.model:
        try:
            read_shape(config.reference.model)
        except UnknownModelError as error:
            raise ConfigError(f"reference.model={config.reference.model}: {error}") from None
    if is_published(config.model) and not has_tokenizer(config.model):
        return config, [
            _pixels(config),
            f"prompts: not counted, as the files of {config.model} are not on this machine",
        ]
    encoder = PromptEncoder(config.model)
    lines = []
    try:
        context = engine_context(config, encoder, os.environ.get(TOKEN_ENV, ""))
    except RolloutError as error:
        context = None
        lines.append(f"no prompt is held against the servers' max_model_len: {error}")
    found = count_prompts(config, encoder, context)
    longest = found.longest()[1].total
    sized = with_context(config, found.needed(config))
    sized = with_budget(sized, longest, *planned_for(config, this_machine()))
    return sized, [*told(config, found), *rows_told(sized, longest), *lines]
