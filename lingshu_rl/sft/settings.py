"""Settings of staged fine-tuning: the stages, what all share, how they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lingshu_rl.data.sources import sources_of
from lingshu_rl.failures import ConfigError
from lingshu_rl.imaging.images import MAX_PIXELS, MIN_PIXELS, Budget
from lingshu_rl.settings import read_config
from lingshu_rl.sft.examples import TARGETS

PARTS = ("vision", "projector", "language")
START = "start"  # the name under which the model before the first stage is measured


@dataclass
class StageConfig:
    data: list[Any] = field(default_factory=list)  # sources as data.train of a run, mixed by their epochs or share
    kinds: list[str] = field(default_factory=list)  # only rows of these kinds; empty = all
    limit: int = 0  # only the first rows; 0 = all
    instruction: str = "full"  # last line of the prompt: full | short | your own text, "" for none
    target: str = (
        "auto"  # think: chain and answer in tags | answer: in its tag | plain: bare | auto: think where there is one
    )
    lr: dict[str, float] = field(
        default_factory=dict
    )  # by part: vision, projector, language; a part not named is frozen
    packing: str = "auto"  # always | never | auto: where no row has an image and the model keeps packed rows apart
    trainer: dict[str, Any] = field(default_factory=dict)  # trl.SFTConfig arguments, over the ones of all stages


@dataclass
class HeldOutConfig:
    data: Any = ""  # source of held-out questions, as data.test of a run; "" = stages are not measured
    instruction: str = "full"
    limit: int = 0  # questions; 0 = all
    batch: int = 16
    max_tokens: int = 512
    blank: bool = True  # also with a blank image, for the last stage
    rewards: dict[str, Any] = field(default_factory=dict)  # spec; empty = by the row's kind


@dataclass
class SftConfig:
    model: str = MISSING  # what the first stage starts from: folder | Hub id | demo
    dir: str = "runs/sft"
    seed: int = 0
    resume: str = "auto"  # auto: go on with what is in `dir` | never: the old folder is kept aside
    skip_bad_rows: bool = False
    too_long: str = "refuse"  # rows over trainer.max_length or the model's context: refuse | drop, which lists them
    system: str = ""  # a system turn before every question, as data.system of a run
    max_pixels: int = MAX_PIXELS  # of an image, as data.max_pixels of a run
    min_pixels: int = MIN_PIXELS
    side_multiple: int = 1  # sides are brought to a multiple of it, as data.side_multiple of a run
    dtype: str = "auto"  # float32 | bfloat16 | auto: float32 with bf16 autocast on CUDA, bfloat16 under DeepSpeed
    attention: str = "sdpa"  # transformers' name: sdpa | flash_attention_2 | eager
    stages: dict[str, StageConfig] = field(default_factory=dict)  # in order
    test: HeldOutConfig = field(default_factory=HeldOutConfig)
    parts: dict[str, list[str]] = field(default_factory=dict)  # parameter name prefixes of a part, for unknown families
    optimizer: str = "adamw"  # as train.optimizer of a run
    optimizer_args: dict[str, Any] = field(default_factory=dict)  # over trainer.adam_beta1, adam_beta2, adam_epsilon
    trainer: dict[str, Any] = field(default_factory=dict)  # trl.SFTConfig arguments for all stages

    @property
    def budget(self) -> Budget:
        return Budget(self.max_pixels, self.min_pixels, self.side_multiple)


# What the stage decides itself.
OWN = set(
    "output_dir learning_rate seed packing optim optim_args save_strategy resume_from_checkpoint completion_only_loss "
    "remove_unused_columns dataset_kwargs".split()
)


DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "save_steps": 500,
    "save_total_limit": 2,
    "logging_steps": 10,
    "max_length": None,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_drop_last": False,
}


def load_sft_config(path: str | Path | None, overrides: Sequence[str] = ()) -> SftConfig:
    """Raises ConfigError naming the key."""
    config = read_config(SftConfig, path, overrides)
    if not config.stages:
        raise ConfigError("stages is empty: give at least one, for example stages.align.data=[captions.jsonl]")
    if config.too_long not in ("refuse", "drop"):
        raise ConfigError(f"too_long={config.too_long!r} must be refuse or drop")
    if config.resume not in ("auto", "never"):
        raise ConfigError(f"resume={config.resume!r} must be auto or never")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype={config.dtype!r} must be auto, float32 or bfloat16")
    if set(config.parts) - set(PARTS):
        raise ConfigError(
            f"parts names {', '.join(sorted(set(config.parts) - set(PARTS)))}; parts are {', '.join(PARTS)}"
        )
    if config.test.data:
        sources_of(config.test.data, "test.data")
    for name, stage in config.stages.items():
        _check_stage(name, stage, {**config.trainer, **stage.trainer})
    return config


def _check_stage(name: str, stage: StageConfig, trainer: Mapping[str, Any]) -> None:
    where = f"stages.{name}"
    if name == START or not name.replace("-", "_").isidentifier():
        raise ConfigError(f"{where}: a stage's name is letters, digits, - and _, and not {START!r}")
    sources_of(stage.data, f"{where}.data")
    if not stage.lr:
        raise ConfigError(f"{where}.lr is empty, so nothing would be trained: give e.g. lr: {{projector: 1.0e-5}}")
    for part, lr in stage.lr.items():
        if part not in PARTS:
            raise ConfigError(f"{where}.lr: unknown part {part!r}; parts are {', '.join(PARTS)}")
        if lr <= 0:
            raise ConfigError(f"{where}.lr.{part}={lr} must be above 0; to freeze the part, leave it out")
    for key, value, allowed in (
        ("target", stage.target, TARGETS),
        ("packing", stage.packing, ("auto", "always", "never")),
    ):
        if value not in allowed:
            raise ConfigError(f"{where}.{key}={value!r} must be one of {', '.join(allowed)}")
    if own := OWN & set(trainer):
        raise ConfigError(
            f"{where}.trainer.{min(own)} is set by the stage itself; see lr, packing, optimizer, seed and dir"
        )
    if int(trainer.get("save_total_limit", 2)) < 2:
        raise ConfigError(
            f"{where}.trainer.save_total_limit must be at least 2: a kill during a save needs the one before"
        )
    if stage.packing == "always" and not trainer.get("max_length"):
        raise ConfigError(f"{where}.packing=always needs trainer.max_length, the tokens of a packed row")
