"""The trained model: DeepSpeed through accelerate. One `update` is one batch of groups, whatever the ranks and rows.

Shapes: T = the completion tokens of one packed row, one after another.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lingshu_rl.checks.agreement import Agreement
from lingshu_rl.config import Config
from lingshu_rl.failures import ConfigError
from lingshu_rl.model import weights
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.loading import load_model, resolve_dtype
from lingshu_rl.model.optimizers import Place, build_optimizer, check_arguments
from lingshu_rl.model.quantized import as_unquantized, dense_kind
from lingshu_rl.planning.memory import row_tokens, zero_settings
from lingshu_rl.processes.control import PATIENCE, Control, use_route_to_main
from lingshu_rl.types import Prompt, TrainGroup

if TYPE_CHECKING:
    import torch

    from lingshu_rl.model.families import ModelSpec
    from lingshu_rl.model.packing import PackedRow, RowPlan
    from lingshu_rl.types import TokenGroup

Item = TypeVar("Item")
Compared = tuple[str, "torch.Tensor", "torch.Tensor"]
Judge = Callable[[Agreement], None]
Made = TypeVar("Made")


class Dealt(Protocol):
    """A row, or its plan."""

    @property
    def tokens(self) -> int: ...
    @property
    def vision(self) -> Collection[str] | bool: ...


Row = TypeVar("Row", bound=Dealt)


@dataclass(frozen=True)
class Share:
    """A row of this rank. counts: False for one that keeps the rank busy beside the others.

    own_T: log-probs before the first optimiser step, or of the only one once it is scored. row: with its images
    encoded, where it is kept from pass to pass; else it is made when its turn comes.
    """

    plan: RowPlan
    counts: bool
    own_T: torch.Tensor | None = None
    row: PackedRow | None = None


@dataclass(frozen=True)
class Batch:
    """What one optimiser step computes. shares: this rank's. total_rows: of all ranks, without repeated ones."""

    groups: Sequence[TrainGroup]
    total_rows: int
    shares: Sequence[Share]

    def against_engine(self) -> list[Compared]:
        """(prompt id, the trainer's log-probs, the engine's) of each completion in the rows that count, on the CPU."""
        import torch

        found = []
        for share in self.shares:
            if share.counts and share.own_T is not None:
                members = share.plan.members([group.tokens for group in self.groups])
                for (g, m, _), part in zip(members, share.own_T.cpu().split([n for *_, n in members]), strict=True):
                    group = self.groups[g]
                    found.append((group.tokens.key, part, torch.tensor(group.rollout_logprobs[m])))
        return found


class Policy:
    """All ranks hold one and call the same methods with the same arguments in the same order."""

    def __init__(self, config: Config, *, on_gpu: bool) -> None:
        import torch

        from lingshu_rl.model.families import model_spec

        self.config = config
        self.token_budget = row_tokens(config, on_gpu)
        self.accelerator = make_accelerator(config, on_gpu)
        self.control = Control(self.rank, self.ranks)
        self.steps_taken = 0  # by the optimiser, the one under way among them
        self.encoder: PromptEncoder  # from `know`
        # The same start on every rank; sampling happens in the engines, so ranks need no seeds of their own.
        torch.manual_seed(config.seed)
        model = load_model(config.model, resolve_dtype(config.train.dtype, on_gpu), quantize=config.train.quantize)
        spec = model_spec(model.config)
        self.banned = spec.placeholder_ids
        self.layout, self.layout_note = row_layout(config, spec, on_gpu)
        self.scoring: dict[str, Any] = {
            "banned_ids": self.banned,
            "temperature": config.rollout.temperature,
            "attention": config.packing.attention,
        }
        if config.train.recomputes(on_gpu):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, parameter in model.named_parameters():
            if any(name.startswith(prefix) for prefix in config.train.freeze):
                parameter.requires_grad_(False)
        if config.train.lora:
            model = weights.add_adapters(model, config.train.lora)
        if config.train.quantize:
            model = as_unquantized(model)
        model.train()
        self.barrier()  # a host may take long to read the model
        self.engine, self.optimizer = self.accelerator.prepare(model, make_optimizer(config, model, on_gpu))
        if self.zero_stage == 0:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients to and fro, of one rank alone
        # A group keeps its relation to train.lr through the schedule (muon's `adam_lr`).
        self.lr_shares = [group["lr"] / config.train.lr for group in self.optimizer.param_groups]
        self.parameters = sum(math.prod(dense_kind(p)[1]) for p in self.module.parameters())

    @property
    def module(self) -> Any:
        return self.accelerator.unwrap_model(self.engine)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def zero_stage(self) -> int:
        return int(self.accelerator.state.deepspeed_plugin.zero_stage)

    def know(self, prompts: Mapping[str, Prompt], encoder: PromptEncoder) -> None:
        """The prompts by id that every rank has loaded by itself, so that neither prompts nor pixels travel between
        ranks."""
        self.encoder = encoder
        self.control.know(prompts)

    def vision(self, group: TokenGroup) -> Mapping[str, torch.Tensor]:
        """The group's image tensors; where they were left out, from this rank's own prompt of that key.

        Raises RuntimeError when that prompt is another one.
        """
        if group.vision is not None:
            return group.vision
        prompt_ids, vision = self.encoder.encode(self.control.own(group.key))
        if prompt_ids != group.prompt_ids:
            raise RuntimeError(
                f"prompt {group.key!r} has {len(prompt_ids)} tokens on rank {self.rank} and {len(group.prompt_ids)} "
                "where it was sampled: the data or processor files differ between the nodes"
            )
        return vision

    def update(self, groups: Sequence[TrainGroup], step: int, judge: Judge = lambda _: None) -> dict[str, float]:
        """One batch: `train.optimizer_steps` optimiser steps, each over its share of the groups. Returns metrics.

        Groups may come without their images: a rank processes those of the rows it computes.
        A batch without groups (all of one opinion) changes nothing. Only a batch of several steps is scored beforehand.
        The gradient of a step is that of sum over all tokens / global count, equal for any packing and any ranks.
        judge: is shown, on every rank, how trainer and engine agree on the batch; what it raises leaves the policy as
        it was.
        """
        if not groups:
            return {}
        count = min(self.config.train.optimizer_steps, len(groups))
        batches = [self._deal(groups[i::count]) for i in range(count)]
        if count > 1:
            batches = [self._before_any_step(batch) for batch in batches]
            agreed = self._agree([pair for batch in batches for pair in batch.against_engine()], judge)
        lr = self.lr_at(step)
        totals: dict[str, float] = {}
        for batch in batches:
            self._set_lr(lr)
            scored, metrics = self._gradient(batch)
            finite(metrics)
            if count == 1:
                agreed = self._agree(scored.against_engine(), judge)
            self.steps_taken += 1
            metrics["grad_norm"] = self._step()
            for key, value in finite(metrics).items():
                totals[key] = totals.get(key, 0.0) + value / count
        return {**totals, **agreed, "lr": lr}

    def _agree(self, mine: list[Compared], judge: Judge) -> dict[str, float]:
        """Every rank's share of the batch, trainer against engine, judged on every rank; as metrics."""
        found = Agreement.of(pair for share in self.control.gather(mine) for pair in share)
        judge(found)
        return found.metrics()

    def logprobs(self, groups: Sequence[TokenGroup], layout: str | None = None) -> list[tuple[torch.Tensor, ...]]:
        """Per group, per completion, float32 log-probs without gradient. Every rank computes every row.

        Without `layout` they come about as in the update; the dense layout goes from the pixels, as the oracle.
        """
        from lingshu_rl.model.groups import group_logprobs

        return group_logprobs(
            self.engine,
            groups,
            token_budget=self.token_budget,
            layout=layout or self.layout,
            features=layout is None and self.keeps_features,
            vision=self.vision,
            **self.scoring,
        )

    @property
    def keeps_features(self) -> bool:
        """Whether images are encoded once for all passes of a batch: several optimiser steps, no gradient to the
        tower."""
        from lingshu_rl.model.logprobs import trains_vision

        return self.config.train.optimizer_steps > 1 and not trains_vision(self.engine)

    def _deal(self, groups: Sequence[TrainGroup]) -> Batch:
        """One optimiser step's groups packed, and the rows of this rank."""
        from lingshu_rl.model.packing import plan_rows

        plans = plan_rows([g.tokens for g in groups], self.engine, self.token_budget, self.layout)
        mine = share_rows(plans, self.rank, self.ranks)
        return Batch(groups, len(plans), [Share(plan, counts) for plan, counts in mine])

    def _before_any_step(self, batch: Batch) -> Batch:
        """The batch with what its rows keep from before the first of several optimiser steps.

        That is the old log-probs, computed by the rank and in the row that will compute the new ones (in bfloat16
        another packing would give slightly others), and the features of images whose encoder is not trained.
        """
        import torch

        from lingshu_rl.model.logprobs import completion_logprobs, with_image_features

        shares = []
        for share, row in zip(batch.shares, self._rows(batch), strict=True):
            if self.keeps_features:
                row = with_image_features(self.engine, row)
            with torch.no_grad():
                old_T = completion_logprobs(self.engine, row, **self.scoring).logprobs_T
            shares.append(replace(share, own_T=old_T, row=row if self.keeps_features else None))
        return replace(batch, shares=shares)

    def _rows(self, batch: Batch) -> Iterator[PackedRow]:
        """The rows with their images, each made while the row before it is computed; none is kept here.

        Parts of one group often stand in rows that follow each other: its images are processed once for these.
        """
        from lingshu_rl.model.packing import build_row

        groups = [group.tokens for group in batch.groups]
        last: dict[str, Mapping[str, torch.Tensor]] = {}

        def make(share: Share) -> PackedRow:
            nonlocal last
            if share.row is not None:
                return share.row
            here = [groups[g] for g in sorted(share.plan.groups)]
            last = {group.key: last.get(group.key) or self.vision(group) for group in here}
            return build_row(share.plan, groups, self.engine, lambda group: last[group.key])

        return one_ahead(make, batch.shares)

    def _gradient(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """One optimiser step's gradient, which waits for `engine.step`; the batch as it was scored, and metrics."""
        from lingshu_rl.losses import policy_loss
        from lingshu_rl.model.logprobs import completion_logprobs

        tokens = sum(len(c) for g in batch.groups for c in g.tokens.completions)
        sequences = sum(len(g.tokens.completions) for g in batch.groups)
        sums: dict[str, torch.Tensor] = {}
        scored = []
        forget_gradients(self.engine)
        for i, (share, row) in enumerate(zip(batch.shares, self._rows(batch), strict=True)):
            self.engine.set_gradient_accumulation_boundary(is_boundary=i == len(batch.shares) - 1)
            scores = completion_logprobs(self.engine, row, entropy=True, **self.scoring)
            fields = row_tensors(row, batch.groups, scores.logprobs_T.device)
            loss, metrics = policy_loss(
                scores.logprobs_T,
                entropy_T=scores.entropy_T,
                old_logprobs_T=share.own_T,
                config=self.config.loss,
                total_tokens=tokens,
                total_sequences=sequences,
                max_tokens=self.config.rollout.max_tokens,
                **fields,
            )
            # DeepSpeed averages gradients over ranks; the loss is already divided by the global count.
            self.engine.backward(loss * (self.ranks if share.counts else 0.0))
            scored.append(replace(share, own_T=scores.logprobs_T.detach()))
            if share.counts:
                for key, value in metrics.items():
                    sums[key] = sums.get(key, 0) + value.detach().float()
        return replace(batch, shares=scored), {**self._sum(sums), "rows": float(batch.total_rows)}

    def _step(self) -> float:
        """The optimiser's step; the norm of its gradient, before that is clipped."""
        import torch

        norm = None
        if self.zero_stage == 0:  # where DeepSpeed tells no norm, and the optimiser leaves out what no row reached
            trained = [p for p in self.module.parameters() if p.requires_grad]
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        self.engine.step()
        return float(norm if norm is not None else self.engine.get_global_grad_norm() or 0.0)

    def _sum(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Over the ranks."""
        total: Counter[str] = Counter()
        for share in self.control.gather({key: float(value) for key, value in sums.items()}):
            total.update(share)
        return dict(total)

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then the schedule over `train.steps`."""
        t = self.config.train
        if step < t.warmup_steps:
            return t.lr * (step + 1) / t.warmup_steps
        done = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return t.lr * factor[t.lr_schedule]

    def _set_lr(self, lr: float) -> None:
        for group, share in zip(self.optimizer.param_groups, self.lr_shares, strict=True):
            group["lr"] = lr * share

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the model, full tensor), one after another, adapters merged; a collective under ZeRO-3."""
        return weights.weights(self.module)

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What `weights` will yield, without gathering anything."""
        return weights.weight_shapes(self.module)

    def save_adapter(self, folder: Path | None) -> None:
        """Write the adapters alone in peft's form. All ranks call this, with a folder on the main one."""
        weights.save_adapter(self.module, folder)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face form, adapters merged (all ranks call this; the main one writes)."""
        weights.save(self.module, folder, main=self.accelerator.is_main_process)
        self.barrier()

    def save_state(self, folder: Path) -> None:
        # A base in 4 bits is not written: torch would not read it back, and it is made again from the model.
        without_base = bool(self.config.train.quantize)
        self.accelerator.save_state(str(folder), safe_serialization=True, exclude_frozen_parameters=without_base)

    def load_state(self, folder: Path) -> None:
        require_ranks(folder, self.ranks)
        self.accelerator.load_state(str(folder), load_module_strict=not self.config.train.quantize)

    def start_trackers(self, folder: Path) -> None:
        """Open accelerate's trackers; tensorboard writes into the run folder."""
        self.accelerator.init_trackers(folder.name)

    def share(self, value: Any) -> Any:
        """The main rank's value on every rank, whatever time that takes it."""
        return self.control.share(value)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        return self.control.gather(value)

    def use_device(self) -> None:
        """Make this rank's GPU the current one of the calling thread; nothing on CPU."""
        import torch

        if self.accelerator.device.type == "cuda":
            torch.cuda.set_device(self.accelerator.device)

    def barrier(self) -> None:
        """Returns when every rank is here, whatever time that takes; before a collective on the devices, whose time is
        limited."""
        self.control.barrier()


def check_choices(config: Config) -> None:
    """The optimiser's arguments and the loss, before anything is loaded. Raises ConfigError."""
    from lingshu_rl.losses import variant_of

    check_arguments("train.optimizer", config.train.optimizer, config.train.optimizer_args)
    try:
        variant = variant_of(config.loss.variant)
    except ValueError as error:
        raise ConfigError(f"loss.variant: {error}") from None
    if config.advantage.spans and not variant.by_token:
        raise ConfigError(
            "advantage.spans gives tokens of one completion advantages of their own, and "
            f"loss.variant={config.loss.variant} has one ratio for all of them; use a loss by token, as grpo or dapo"
        )


def available_trackers(names: Sequence[str]) -> list[str]:
    """The named trackers; tensorboard, the default, is left out quietly where it is not installed.

    Raises ConfigError for another one that is not installed, which accelerate would leave out without a word.
    """
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    for name in missing:
        if name != "tensorboard":
            raise ConfigError(f"run.trackers names {name!r}, which is not installed: pip install {name}")
    return [name for name in names if name not in missing]


def skip_shared_memory_build() -> None:
    """Tell DeepSpeed that its shared-memory all-reduce is not there.

    On a CPU it would be compiled at the start, a minute the first time; a compilation that is killed leaves a lock for
    which every later start waits without end. Only DeepSpeed's inference layers use it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_settings(config: Config, on_gpu: bool, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what the update relies on, and the run's own keys over it."""
    bf16 = config.train.computes_in(on_gpu) == "bfloat16"
    return {
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": bf16},
        # A sum in bfloat16 is off by 0.8 % after 64 rows and by 2 % after 256.
        "data_types": {"grad_accum_dtype": "fp32"},
        # The number of rows differs from step to step, so the boundary is set by hand and nothing is divided by it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        **config.deepspeed,
        "zero_optimization": zero_settings(config, ranks, on_gpu),
    }


def make_accelerator(config: Config, on_gpu: bool) -> Any:
    """accelerate with DeepSpeed, also when launched plainly or without a launcher at all."""
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    from lingshu_rl.processes.workers import free_port

    if not on_gpu:
        skip_shared_memory_build()
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, default)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    use_route_to_main()
    settings = deepspeed_settings(config, on_gpu, int(os.environ["WORLD_SIZE"]))
    # Of the default group: ranks wait there for the main one to load data and check labels, and in DeepSpeed's saving
    # for the slowest disk. Training goes over groups that DeepSpeed makes, with the back end's own limit.
    waits = InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
    except ValueError as error:
        if "accelerate config" not in str(error):
            raise
        raise ConfigError(
            "the accelerate config file sets mixed_precision or DeepSpeed settings, which would not be used; leave "
            "them out (`deepspeed_config: {}`) and give train.dtype and deepspeed.zero_optimization.stage to the run"
        ) from None
    return Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="bf16" if settings["bf16"]["enabled"] else "no",
        kwargs_handlers=[waits],
        log_with=available_trackers(config.run.trackers),
        project_dir=config.run.dir,
    )


def make_optimizer(config: Config, model: Any, on_gpu: bool) -> Any:
    """`train.optimizer` over all that is trained. Raises ConfigError for one that would not be right here."""
    t = config.train
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "lr": t.lr, "weight_decay": t.weight_decay}]
    place = Place.of(config.deepspeed, on_gpu=on_gpu, max_grad_norm=t.max_grad_norm)
    return build_optimizer("train.optimizer", t.optimizer, t.optimizer_args, place, model=model, groups=groups)


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics, if all are numbers. Raises FloatingPointError."""
    if wrong := {key: value for key, value in metrics.items() if not math.isfinite(value)}:
        raise FloatingPointError(
            f"the update gave a number that is not finite: {wrong}; lower train.lr or look at the last rollouts"
        )
    return metrics


def forget_gradients(engine: Any) -> None:
    """Zero what DeepSpeed keeps of the last step's gradients. All ranks call this before a step's first row.

    The parameters have theirs still where that step was given up. And its optimiser overwrites those it holds by the
    first row's and adds the others', so a parameter that the first row does not reach (the vision tower, by a row of
    text) would keep the last step's: under ZeRO-3, and with an offloaded optimiser.
    """
    engine.zero_grad()
    optimizer = engine.optimizer
    kept = [
        getattr(optimizer, "grad_partitions_flat_buffer", None),
        *getattr(optimizer, "accumulated_grads_in_cpu", {}).values(),
        *(partition.grad for partition in getattr(optimizer, "single_partition_of_fp32_groups", ())),
        *(partition.grad for partition in getattr(optimizer, "fp32_partitioned_groups_flat", ())),
    ]
    for gradient in kept:
        if gradient is not None:
            gradient.zero_()


def require_ranks(state: Path, ranks: int) -> None:
    """Raises ConfigError when `Policy.save_state` wrote this folder with another number of ranks."""
    from accelerate.utils.constants import RNG_STATE_NAME

    saved = len(list(state.glob(f"{RNG_STATE_NAME}_*.pkl")))  # accelerate writes one a rank
    if saved != ranks:
        raise ConfigError(
            f"checkpoint {state.parent} was saved by {saved} policy rank(s) and this launch has {ranks}; ZeRO keeps a "
            f"shard of the optimiser for each and cannot deal them anew. Launch with --num_processes {saved}, or "
            f"start another run from its weights alone: model={state.parent / 'hf'} and a new run.dir"
        )


def row_layout(config: Config, spec: ModelSpec, on_gpu: bool) -> tuple[str, str]:
    """The layout of rows, and what to tell the user about it ("" for nothing). Raises ConfigError for flex on a CPU."""
    if config.packing.attention == "flex" and not on_gpu:
        raise ConfigError("packing.attention=flex has no gradient on a CPU; use sdpa there")
    if config.packing.layout == "shared" and not spec.shareable:
        return (
            "dense",
            f"prompts cannot be shared, so completions run in padded batches, each with its prompt: {spec.reason}",
        )
    return config.packing.layout, ""


def share_rows(rows: Sequence[Row], rank: int, ranks: int) -> list[tuple[Row, bool]]:
    """This rank's rows, largest first dealt to the least loaded rank. Deterministic, alike on every rank.

    Rows with and without images are dealt apart, and each rank gets equally many of either, in the same order: a rank
    that is short repeats a row that does not count (False). All ranks then run the vision tower in the same forwards.
    If not, a ZeRO-3 rank would wait for weights that another never fetches, and a ZeRO-2 rank would add up a bucket of
    gradients that another lacks. Rows with images come last, as what is reduced is what the last backward reached.
    """
    mine: list[tuple[Row, bool]] = []
    for seeing in (False, True):
        kind = [row for row in rows if bool(row.vision) == seeing]
        if not kind:
            continue
        loads = [0] * ranks
        shares: list[list[Row]] = [[] for _ in range(ranks)]
        most = -(-len(kind) // ranks)
        for row in sorted(kind, key=lambda r: -r.tokens):
            target = min(range(ranks), key=lambda r: (len(shares[r]) >= most, loads[r]))
            shares[target].append(row)
            loads[target] += row.tokens
        smallest = min(kind, key=lambda r: r.tokens)
        mine += [(row, True) for row in shares[rank]] + [(smallest, False)] * (most - len(shares[rank]))
    return mine


def one_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`make` of every item in turn, in a thread that is one item ahead of the reader."""
    made: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1) as maker:
        for item in items:
            made.append(maker.submit(make, item))
            if len(made) > 1:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


def row_tensors(row: PackedRow, groups: Sequence[TrainGroup], device: Any) -> dict[str, Any]:
    """The row's per-token and per-sequence fields, in the order of its completion tokens."""
    import torch

    members = [(groups[g], m) for g, m, _ in row.members]
    rollout_T = torch.tensor([x for g, m in members for x in g.rollout_logprobs[m]], device=device)
    with_reference = members[0][0].reference_logprobs is not None
    credit = [x for g, m in members if g.credit is not None for x in g.credit[m]]
    return {
        "sequence_T": row.sequence_T.to(device),
        "advantages": torch.tensor([g.advantages[m] for g, m in members], device=device),
        "rollout_logprobs_T": rollout_T,
        "credit_T": torch.tensor(credit, device=device) if credit else None,
        "ref_logprobs_T": torch.cat([g.reference_logprobs[m] for g, m in members]).to(device)  # type: ignore[index]
        if with_reference
        else None,
    }
