"""The run's configuration: dataclasses, a YAML file, `key=value` overrides. Unknown keys fail with the nearest known
one.

Units stand in the names (`timeout_s`). What belongs to an engine is passed through under the engine's own names
(`rollout.vllm`, `deepspeed`), not declared again here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lingshu_rl.data.sources import Source, SourceError, is_demo, paths_in, sources_of
from lingshu_rl.failures import ConfigError
from lingshu_rl.imaging.images import MAX_PIXELS, MIN_PIXELS, Budget
from lingshu_rl.names import known_elsewhere
from lingshu_rl.objective import AdvantageConfig, LossConfig, PackingConfig
from lingshu_rl.text.hiding import setting_shown, shown_beside, without_secrets

T = TypeVar("T")


@dataclass
class RunConfig:
    dir: str = "runs/demo"  # everything the run writes
    trackers: list[str] = field(
        default_factory=lambda: ["tensorboard"]
    )  # accelerate's names: wandb, trackio, mlflow ...
    stop_timeout_s: float = 10.0  # how long child processes may take to stop before they are killed
    max_restarts: int = 3  # times a server process that died is started again; then the run ends with a checkpoint


@dataclass
class DataConfig:
    # demo:SPLIT | a file, a folder or a Hub id, with :SPLIT | {path: ..., format: llava, ...} | a list of these, mixed
    # by their epochs or share (docs/data.md)
    train: Any = "demo:train"
    test: Any = "demo:test"  # as data.train; must be given beside a train of your own
    instruction: str = "auto"  # auto (short for the demo model, full else) | short | full | your own text
    system: str = ""  # the system turn of every prompt whose row has none of its own; empty = none
    curriculum: str = (
        "none"  # none | pass_rate: prompts that are sometimes right first (meta.pass_rate, kept up to date)
    )
    max_pixels: int = MAX_PIXELS  # a larger image is reduced to so many, for everyone who sees it
    min_pixels: int = MIN_PIXELS  # a smaller one is enlarged
    side_multiple: int = 1  # sides are brought to a multiple of it: 28 for Qwen2.5-VL, whose boxes are in such pixels
    too_long: str = (
        "refuse"  # prompts over the engine's context: refuse (the run does not start) | drop: leave them out
    )
    max_refused_share: float = 0.05  # above this share of drawn prompts that engine or reference refuse the run stops
    skip_bad_rows: bool = False  # go on without refused rows; they are listed in the run folder either way

    @property
    def budget(self) -> Budget:
        return Budget(self.max_pixels, self.min_pixels, self.side_multiple)


@dataclass
class TrainConfig:
    steps: int = 50  # updates of the whole run; epochs x rows / prompts_per_step
    prompts_per_step: int = 48  # questions drawn for an update, over all ranks; each gets group_size completions
    group_size: int = 8  # completions sampled for each prompt (G)
    max_refills: int = 0  # times a step may draw further prompts for groups that teach nothing (dynamic sampling)
    lr: float = 4e-4  # learning rate after the warm-up
    warmup_steps: int = 10  # steps over which the learning rate rises from 0
    lr_schedule: str = "linear"  # constant | linear | cosine, after the warm-up
    weight_decay: float = 0.0  # of the optimiser, decoupled
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 = never
    optimizer: str = "adamw"  # adamw | adamw_8bit | paged_adamw | paged_adamw_8bit | muon (docs/optimizers.md)
    optimizer_args: dict[str, Any] = field(default_factory=lambda: {"betas": [0.9, 0.95]})  # by its package's names
    max_staleness: int = 0  # 1: the next step's rollouts run during the update, on weights one step old
    optimizer_steps: int = 1  # optimiser steps a batch; above 1 the old log-probs are kept and the ratio is clipped
    dtype: str = "auto"  # float32 | bfloat16 | auto: bfloat16 on CUDA, float32 on CPU
    gradient_checkpointing: Any = "auto"  # compute activations again in the backward pass | auto: on CUDA
    freeze: list[str] = field(default_factory=list)  # parameter name prefixes, e.g. [model.visual]
    lora: dict[str, Any] = field(default_factory=dict)  # peft.LoraConfig arguments; empty = all weights are trained
    quantize: str = ""  # nf4 | fp4: the base under train.lora in 4 bits (QLoRA)

    def computes_in(self, on_gpu: bool) -> str:
        """`dtype`, decided: of policy, engines and, unless it has its own, reference."""
        return ("bfloat16" if on_gpu else "float32") if self.dtype == "auto" else self.dtype

    def recomputes(self, on_gpu: bool) -> bool:
        """`gradient_checkpointing`, decided."""
        return on_gpu if self.gradient_checkpointing == "auto" else bool(self.gradient_checkpointing)


@dataclass
class RolloutConfig:
    temperature: float = 1.0  # the trained distribution is scaled alike
    max_tokens: int = 40  # completion tokens
    urls: list[str] = field(default_factory=list)  # running vLLM servers; empty = started by the run
    placement: str = "auto"  # servers: on GPUs of their own | colocate: in the policy's processes | auto: what fits
    servers: int = 0  # how many share devices.rollout; 0 = one a GPU, or as few GPUs each as the weights need
    # Without progress of its server (its count of tokens) for this long a request is given up; also the limit of one
    # control call, such as a part of the weights.
    request_timeout_s: float = 300.0
    retries: int = 2  # a request that fails is sent again with the same seed
    start_timeout_s: float = 300.0  # until a server that was started must answer
    # Completions under way at once on one server; more wait in the run. Twice the server's max_num_seqs is enough: a
    # group keeps its place until its longest completion ends.
    concurrency: int = 1024
    weight_transfer: str = "auto"  # auto | file | nccl: whole weights | adapter: train.lora's adapters alone
    vllm: dict[str, Any] = field(default_factory=dict)  # vLLM's own options: {max_model_len: 4096, ...}
    env: dict[str, str] = field(default_factory=dict)  # environment of the vLLM processes
    ray: dict[str, Any] = field(default_factory=dict)  # with cluster=ray: Ray's actor options, {resources: {big: 1}}


@dataclass
class ReferenceConfig:
    urls: list[str] = field(default_factory=list)  # running reference servers; empty = started by the run
    replicas: int = 0  # how many share devices.reference; 0 = one for every tensor_parallel GPUs, one on CPU
    tensor_parallel: int = 1  # GPUs (on CPU: processes) that one replica is sharded over
    refresh_every: int = 0  # steps after which the reference becomes the policy of that moment; 0 = never
    model: str = ""  # "" = the model the run starts from
    dtype: str = "auto"  # float32 | bfloat16 | auto: as train.dtype
    ray: dict[str, Any] = field(default_factory=dict)  # with cluster=ray: Ray's actor options
    request_timeout_s: float = 300.0  # without progress of its server (layers computed) a request is given up
    retries: int = 2  # as rollout.retries
    start_timeout_s: float = 300.0  # until a server that was started must answer


@dataclass
class DevicesConfig:
    """Each group: "auto", "cpu", "cpu:0-3" (those cores), or a list of GPU numbers: places in CUDA_VISIBLE_DEVICES."""

    policy: Any = "auto"  # where the trained model and its optimiser lie
    rollout: Any = "auto"  # where vLLM runs
    reference: Any = "auto"  # or "policy": beside the policy, on its GPUs
    judge: Any = "auto"  # where judge.model runs
    assume: dict[str, Any] = field(default_factory=dict)  # {count: 8, memory_gb: 80, nodes: 1}: --dry-run without a GPU


@dataclass
class RewardsConfig:
    spec: dict[str, Any] = field(default_factory=dict)  # rewards.build; empty = the default composition
    # of the default: closed (tag, box, JSON, or nothing but the answer) | prose | auto (closed where the instruction
    # asks for tags)
    read: str = "auto"
    executor: str = "inline"  # inline | isolated (killable worker processes)
    timeout_s: float = 10.0  # a sample's limit in isolated workers
    workers: int = 1  # isolated processes that judge
    max_failed_share: float = 0.05  # above this share of unjudged samples the run stops
    preflight: bool = True  # try training labels before the engines start: all, or 20,000 evenly taken of more


@dataclass
class JudgeConfig:
    """The model behind rewards that judge: the one that this run serves for those without a url, and how far it is
    trusted."""

    model: str = (
        ""  # folder or Hub id of the judge that the run starts on devices.judge; empty = none, rewards name a url
    )
    vllm: dict[str, Any] = field(default_factory=dict)  # its server's own options, as rollout.vllm
    start_timeout_s: float = 600.0  # until it must answer
    probe_rows: int = 40  # rows on which any judge is tried before the run (rewards.preflight)
    max_false_pay: float = (
        0.1  # above this share of wrong answers, or of one kind of attack, that it pays the run stops
    )
    max_false_refusal: float = 0.2  # above this share of right answers that it refuses the run stops


@dataclass
class EvalConfig:
    every: int = 0  # steps between evaluations during training; 0 = only before and after
    limit: int = 0  # questions; 0 = all
    controls: list[str] = field(default_factory=lambda: ["blank", "shuffled", "majority"])  # also text_only


@dataclass
class CheckpointConfig:
    every: int = 50  # steps; 0 = only at the end
    keep_last: int = 2  # so many of the newest stay
    keep_best: bool = True  # keep also the one with the highest held-out accuracy (by the last evaluation before it)


@dataclass
class CheckConfig:
    """Limits of the checks on the first batch (firstbatch.py). The largest gap counts in float32 alone: see gap.py."""

    max_kl: float = 1e-5  # nats a token, float32
    max_logprob_gap: float = 1e-3  # nats, largest trainer/engine difference, float32
    max_dense_gap: float = 1e-4  # nats, largest difference of shared rows and padded batches, float32
    mean_gap_bf16: float = (
        0.1  # nats, mean over tokens, where a side computes in bfloat16; the same for all comparisons
    )
    p99_gap_bf16: float = 0.6  # nats, 99th percentile
    far_share_bf16: float = 1e-3  # share of tokens that differ by more than 1 nat
    on_failure: str = "stop"  # stop | dense: dense rows if only sharing is off | warn: say so and go on


@dataclass
class Config:
    model: str = "demo"  # demo | folder | Hub id
    seed: int = 0  # of the order of prompts, of sampling and of adapters
    cluster: str = "local"  # local: servers on this host (or by URL) | ray: on the nodes of a Ray cluster
    resume: str = "auto"  # auto: go on from the newest checkpoint in run.dir | never | a checkpoint folder
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(kl_coef=1e-3))
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    deepspeed: dict[str, Any] = field(
        default_factory=lambda: {"zero_optimization": {"stage": 2}}
    )  # DeepSpeed's own settings: ZeRO stage, offload


# What another model than the demo's changes in the defaults, which are the demo's: a real model, on rows that ask for
# thoughts.
REAL_RUN: Mapping[str, Any] = {
    "train.steps": 300,
    "train.prompts_per_step": 32,
    "train.lr": 1e-6,
    "train.lr_schedule": "constant",
    "rollout.max_tokens": 1024,
    "eval.every": 50,
    "eval.limit": 500,
}
WITH_LORA: Mapping[str, Any] = {"train.lr": 1e-5}  # adapters start at 0 and take a higher rate
SHORT_ANSWERS: Mapping[str, Any] = {"rollout.max_tokens": 64}  # data.instruction=short


@dataclass(frozen=True)
class Change:
    """Settings that somebody gave, and where: `in FILE`, `in override 'key=value'`."""

    values: DictConfig
    where: str


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, the model's (`defaults_for`), the YAML file, the overrides. Raises ConfigError for an unknown key or an
    impossible value, and for rows of one's own to train or to test on without the other."""
    changes = list(_changes(path, overrides))
    given = _given(changes)
    result = _built(Config, [Change(_nested(defaults_for(given)), "in the model's defaults"), *changes])
    _check_sources(given)
    from lingshu_rl.planning.validation import validate

    validate(result)
    return result


def defaults_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that differ from the demo's, by dotted key, for the settings that were given."""
    model = str(given.get("model", Config.model))
    if model == Config.model:
        return {}
    own: dict[str, Any] = {"run.dir": f"runs/{Path(model).name}", **REAL_RUN}
    if any(key.startswith("train.lora.") and value for key, value in given.items()):
        own |= WITH_LORA
    if given.get("data.instruction") == "short":
        own |= SHORT_ANSWERS
    return own


def origins(path: str | Path | None = None, overrides: Sequence[str] = ()) -> list[str]:
    """Where the settings of `load_config` come from, a line a place; all others are the demo's."""
    changes = list(_changes(path, overrides))
    given = _given(changes)
    ours = {key: value for key, value in defaults_for(given).items() if key not in given}
    lines = [f"defaults of a real run: {' '.join(f'{key}={value}' for key, value in ours.items())}"] if ours else []
    by_file = _given(changes[: path is not None])
    by_hand = _given(changes[path is not None :])
    if by_file:
        lines.append(f"from {path}: {' '.join(key for key in by_file if key not in by_hand)}")
    if by_hand:
        lines.append(f"from the command: {' '.join(by_hand)}")
    return lines


def _check_sources(given: Mapping[str, Any]) -> None:
    """Rows of one's own beside the demo's are a slip unless both are named: the one would say nothing of the other."""
    for key, other in (("data.train", "data.test"), ("data.test", "data.train")):
        source = _under(given, key)
        if source is not None and not is_demo(source) and _under(given, other) is None:
            raise ConfigError(
                f"{key}={', '.join(paths_in(source))[:200]} needs a {other} of yours beside it (the default is the "
                f"demo's): questions of the same kind, "
                "with other images and patients. docs/curation.md splits one set into both"
            )


def _under(given: Mapping[str, Any], key: str) -> Any:
    """The value of a key, also where it is a mapping, whose own keys are given one by one."""
    inner = {name.removeprefix(f"{key}."): value for name, value in given.items() if name.startswith(f"{key}.")}
    return given.get(key, inner or None)


def checked_sources(given: Any, key: str) -> tuple[Source, ...]:
    """`sources_of`. Raises ConfigError."""
    try:
        return sources_of(given, key)
    except SourceError as error:
        raise ConfigError(str(error)) from None


def read_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """`load_config` for any dataclass, without the checks and the defaults that belong to one."""
    return _built(schema, _changes(path, overrides))


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Settings given as key=value, nested. Raises ConfigError."""
    found: Any = OmegaConf.to_container(OmegaConf.merge({}, *(change.values for change in _changes(None, words))))
    return dict(found)


def _built(schema: type[T], changes: Iterable[Change]) -> T:
    config = OmegaConf.structured(schema)
    for change in changes:
        config = _merge(config, change.values, change.where)
    try:
        result = OmegaConf.to_object(config)
    except ValueError as error:  # the option classes check themselves when built
        raise ConfigError(str(error)) from None
    assert isinstance(result, schema)
    return result


def _changes(path: str | Path | None, overrides: Sequence[str]) -> Iterator[Change]:
    if path is not None:
        try:
            loaded = OmegaConf.load(path)
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist") from None
        except Exception as error:
            raise ConfigError(f"config file {path} is not readable YAML: {_problem(error)}") from None
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"config file {path} must hold keys and values at its top level")
        yield Change(loaded, f"in {path}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"override {setting_shown(override)!r} is not of the form key=value, for example train.lr=5e-7"
            )
        try:
            change = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise ConfigError(f"override {setting_shown(override)!r} cannot be read: {_problem(error)}") from None
        yield Change(change, f"in override {setting_shown(override)!r}")


def _problem(error: Exception) -> str:
    """What YAML says of a text and where, without the text, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return str(getattr(error, "problem", None) or type(error).__name__) + where


def _given(changes: Sequence[Change]) -> dict[str, Any]:
    """The values by dotted key, later ones over earlier ones."""
    return {key: value for change in changes for key, value in flat(OmegaConf.to_container(change.values)).items()}


def _nested(values: Mapping[str, Any]) -> DictConfig:
    config = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return config


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def to_yaml(config: Any) -> str:
    """To be read, by people and by `RunFolder`: without secrets."""
    return OmegaConf.to_yaml(without_secrets(OmegaConf.to_container(OmegaConf.structured(config), resolve=True)))


def _merge(config: DictConfig, change: DictConfig, where: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(config, change)
    except ConfigKeyError as error:
        unknown = str(error.full_key or "")
        meant = [known_elsewhere(key) for key in flat(OmegaConf.to_container(change)) if key.startswith(unknown)]
        hint = next(filter(None, meant), "") or _nearest(unknown, config)
        raise ConfigError(f"unknown key {unknown!r} {where}{hint}") from None
    except OmegaConfBaseException as error:
        if shapes := _misshapen(config, change):
            raise ConfigError(f"{shapes} {where}") from None
        key = getattr(error, "full_key", None)
        told = shown_beside(str(error).splitlines()[0], OmegaConf.to_container(change))
        raise ConfigError(f"bad value for {key!r} {where}: {told}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _misshapen(config: Any, change: Any, key: str = "") -> str:
    """The first key that is given a list for a mapping or a mapping for a list, in words, or ""."""
    if isinstance(config, DictConfig) and isinstance(change, DictConfig):
        both = [str(name) for name in change if name in config]
        found = (_misshapen(config._get_node(n), change._get_node(n), f"{key}.{n}".lstrip(".")) for n in both)
        return next(filter(None, found), "")
    words: dict[Any, str] = {DictConfig: "keys and values", ListConfig: "a list"}
    takes, given = words.get(type(config)), words.get(type(change))
    return f"{key} takes {takes}, not {given}" if takes and given and takes != given else ""


OTHER_WORDS = dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval", "holdout"), "test"
)  # for what is asked at the end


def _nearest(key: str, config: DictConfig) -> str:
    known = list(_keys(config))
    section, _, leaf = key.lower().rpartition(".")
    match = difflib.get_close_matches(f"{section}.{OTHER_WORDS.get(leaf, leaf)}".strip("."), known, n=1, cutoff=0.5)
    if not match:
        # A right leaf under a wrong parent, e.g. lr for train.lr.
        match = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"; did you mean {match[0]!r}?" if match else "; see `lingshu-rl train --help`"


def _keys(node: DictConfig, prefix: str = "") -> Any:
    for name in node:
        child = node._get_node(name)
        yield f"{prefix}{name!s}"
        if isinstance(child, DictConfig):
            yield from _keys(child, f"{prefix}{name!s}.")


# Settings of train.lora that leave the adapters as vLLM applies them: two matrices a module, beside the base.
PLAIN_LORA = set(
    "r lora_alpha use_rslora rank_pattern alpha_pattern lora_dropout target_modules exclude_modules "
    "layers_to_transform layers_pattern init_lora_weights task_type".split()
)
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights; others change the base as well
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for


def more_than_adapters(lora: dict[str, Any]) -> str:
    """The setting of train.lora that vLLM's adapters cannot hold, as `train.lora.use_dora=True`, or ""."""
    for key, value in lora.items():
        plain = key in PLAIN_LORA or value in (False, None, "none", [], {})
        if not plain or (key == "init_lora_weights" and value not in PLAIN_STARTS):
            return f"train.lora.{key}={value}"
    rank = lora_rank(lora)
    return f"a rank of {rank} in train.lora (above {LORA_RANKS[-1]})" if rank > LORA_RANKS[-1] else ""


def lora_rank(lora: dict[str, Any]) -> int:
    """The largest rank of any adapter."""
    return max([int(lora.get("r", 8)), *map(int, (lora.get("rank_pattern") or {}).values())])
