"""A stage's rows and the held-out questions, checked against the model as a run's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lingshu_rl.data.sources import paths_in, sources_of
from lingshu_rl.failures import ConfigError
from lingshu_rl.rewarding import reward_of
from lingshu_rl.sft.examples import ExampleLengths, Examples, completion_fault
from lingshu_rl.sft.settings import SftConfig, StageConfig

if TYPE_CHECKING:
    from lingshu_rl.data.load import Fault, Loaded, Measure
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.lengths import Limit
    from lingshu_rl.types import Prompt
    from rewards.rows import LabelCheck


def stage_examples(
    config: SftConfig, name: str, stage: StageConfig, encoder: PromptEncoder, model: str = ""
) -> Examples:
    """The stage's rows, each checked against the model as a run's are, and that it is trained on whole.

    Raises ConfigError where nothing is left, DataError for rows that cannot be used.
    """
    from lingshu_rl.model.lengths import PictureTokens

    pictures, limit = PictureTokens(encoder), length_limit(config, stage, model or config.model, encoder)

    def fault(prompt: Prompt) -> str | None:
        if stage.kinds and prompt.kind not in stage.kinds:
            return None
        return encoder.fault(prompt) or completion_fault(encoder, prompt, stage.target)

    sources = sources_of(stage.data, f"stages.{name}.data")
    loaded = []
    for source in sources:
        lengths = ExampleLengths(pictures, limit, stage.kinds, stage.target)
        read = _load(config, source, f"stages.{name}.data", stage.instruction, fault, lengths=lengths)
        loaded.append((source, read.prompts))
    examples = Examples(encoder, loaded, stage.kinds, stage.limit, stage.target, config.seed)
    if not examples:
        named = ", ".join(paths_in(stage.data))
        raise ConfigError(f"stages.{name}: no row of {named} is of kind {', '.join(stage.kinds)}")
    return examples


def length_limit(config: SftConfig, stage: StageConfig, model: str, encoder: PromptEncoder) -> Limit | None:
    """Most tokens of an example: trainer.max_length, and what the model takes at all."""
    from lingshu_rl.model.lengths import Limit
    from lingshu_rl.model.loading import model_context

    given = {**config.trainer, **stage.trainer}.get("max_length")
    most = model_context(model, encoder.tokenizer)
    limits = [Limit(int(given), f"trainer.max_length={given} keeps")] if given else []
    limits += [Limit(most, "the model takes")] if most else []
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _load(
    config: SftConfig,
    source: Any,
    key: str,
    instruction: str,
    fault: Fault,
    check: LabelCheck | None = None,
    lengths: Measure | None = None,
) -> Loaded:
    from lingshu_rl.data.load import load

    return load(
        source,
        instruction=instruction,
        system=config.system,
        skip_bad_rows=config.skip_bad_rows,
        budget=config.budget,
        fault=fault,
        check=check,
        lengths=lengths,
        drop_long=config.too_long == "drop",
        key=key,
        skip_key="skip_bad_rows",
    )


def test_prompts(config: SftConfig) -> list[Prompt]:
    from lingshu_rl.model.encoder import PromptEncoder

    if not config.test.data:
        return []
    test = config.test
    loaded = _load(
        config,
        test.data,
        "test.data",
        test.instruction,
        PromptEncoder(config.model).fault,
        reward_of(test.rewards, test.data).check_gold,
    )
    return list(loaded.prompts)[: config.test.limit or None]


def blank(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(p, images=tuple(picture.blank() for picture in p.images)) for p in prompts]
