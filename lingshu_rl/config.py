"""What can be set for a run, and to what by default. `planning/given.py` reads what a user gave.

Units stand in the names (`timeout_s`). What belongs to an engine is passed through under the engine's own names
(`rollout.vllm`, `deepspeed`), not declared again here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lingshu_rl.imaging.images import MAX_PIXELS, MIN_PIXELS, Budget
from lingshu_rl.objective import AdvantageConfig, LossConfig, PackingConfig


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
