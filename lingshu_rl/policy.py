"""The trained model: DeepSpeed through accelerate. One `update` is one batch of groups, whatever the ranks and rows.

Shapes: T = the completion tokens of one packed row, one after another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.config import Config, ConfigError
from lingshu_rl.model.loading import load_model, resolve_dtype
from lingshu_rl.types import TrainGroup

if TYPE_CHECKING:
    import torch

    from lingshu_rl.model.families import ModelSpec
    from lingshu_rl.model.packing import PackedRow
    from lingshu_rl.types import TokenGroup


@dataclass(frozen=True)
class Batch:
    """What one optimiser step computes. rows: this rank's (row, whether it counts, log-probs before the first step).

    total_rows: of all ranks, without repeated ones. The old log-probs are None when this step is the batch's only one.
    """

    groups: Sequence[TrainGroup]
    total_rows: int
    rows: Sequence[tuple[PackedRow, bool, torch.Tensor | None]]


ADAPTER = "default"  # peft's name of the adapters that are trained


class Policy:
    """All ranks hold one and call the same methods with the same arguments in the same order."""

    def __init__(self, config: Config, *, on_gpu: bool) -> None:
        import torch

        from lingshu_rl.model.families import model_spec

        self.config = config
        self.accelerator = make_accelerator(config, on_gpu)
        # The same start on every rank; sampling happens in the engines, so ranks need no seeds of their own.
        torch.manual_seed(config.seed)
        model = load_model(config.model, torch.float32 if not on_gpu else resolve_dtype(config.train.dtype, on_gpu))
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
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(**config.train.lora), ADAPTER)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=config.train.lr, weight_decay=config.train.weight_decay, betas=(0.9, 0.95)
        )
        self.engine, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())

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

    def update(self, groups: Sequence[TrainGroup], step: int) -> dict[str, float]:
        """One batch: `train.optimizer_steps` optimiser steps, each over its share of the groups. Returns metrics.

        A batch without groups (all of one opinion) changes nothing. Only a batch of several steps is scored beforehand.
        The gradient of a step is that of sum over all tokens / global count, equal for any packing and any ranks.
        """
        if not groups:
            return {}
        count = min(self.config.train.optimizer_steps, len(groups))
        batches = [self._deal(groups[i::count]) for i in range(count)]
        if count > 1:
            batches = [self._before_any_step(batch) for batch in batches]
        lr = self.lr_at(step)
        totals: dict[str, float] = {}
        for batch in batches:
            self._set_lr(lr)
            for key, value in self._optimizer_step(batch).items():
                before = totals.get(key, 0.0)
                totals[key] = max(before, value) if key.endswith("_max") else before + value / count
        return {**totals, "lr": lr}

    def logprobs(self, groups: Sequence[TokenGroup], layout: str | None = None) -> list[tuple[torch.Tensor, ...]]:
        """Per group, per completion, float32 log-probs without gradient. Every rank computes every row.

        Without `layout` they come about as in the update; the dense layout goes from the pixels, as the oracle.
        """
        from lingshu_rl.model.groups import group_logprobs

        return group_logprobs(
            self.engine,
            groups,
            token_budget=self.config.packing.token_budget,
            layout=layout or self.layout,
            features=layout is None and self.keeps_features,
            **self.scoring,
        )

    @property
    def keeps_features(self) -> bool:
        """Whether images are encoded once for all passes of a batch: several optimiser steps, no gradient to the tower."""
        from lingshu_rl.model.logprobs import trains_vision

        return self.config.train.optimizer_steps > 1 and not trains_vision(self.engine)

    def _deal(self, groups: Sequence[TrainGroup]) -> Batch:
        """One optimiser step's groups packed, and the rows of this rank."""
        from lingshu_rl.model.packing import pack

        rows = pack([g.tokens for g in groups], self.engine, self.config.packing.token_budget, self.layout)
        mine = share_rows(rows, self.rank, self.ranks)
        return Batch(groups, len(rows), [(row, counts, None) for row, counts in mine])

    def _before_any_step(self, batch: Batch) -> Batch:
        """The batch with what its rows keep from before the first of several optimiser steps.

        That is the old log-probs, computed by the rank and in the row that will compute the new ones (in bfloat16
        another packing would give slightly others), and the features of images whose encoder is not trained.
        """
        import torch

        from lingshu_rl.model.logprobs import completion_logprobs, with_image_features

        rows = []
        keep = self.keeps_features
        for row, counts, _ in batch.rows:
            row = with_image_features(self.engine, row) if keep else row
            with torch.no_grad():
                old_T = completion_logprobs(self.engine, row, **self.scoring).logprobs_T
            rows.append((row, counts, old_T))
        return Batch(batch.groups, batch.total_rows, rows)

    def _optimizer_step(self, batch: Batch) -> dict[str, float]:
        import torch

        from lingshu_rl.losses import policy_loss
        from lingshu_rl.model.logprobs import completion_logprobs

        tokens = sum(len(c) for g in batch.groups for c in g.tokens.completions)
        sequences = sum(len(g.tokens.completions) for g in batch.groups)
        sums: dict[str, torch.Tensor] = {}
        for i, (row, counts, old_T) in enumerate(batch.rows):
            last = i == len(batch.rows) - 1
            self.engine.set_gradient_accumulation_boundary(is_boundary=last)
            scores = completion_logprobs(self.engine, row, entropy=True, **self.scoring)
            fields = row_tensors(row, batch.groups, scores.logprobs_T.device)
            loss, metrics = policy_loss(
                scores.logprobs_T,
                entropy_T=scores.entropy_T,
                old_logprobs_T=old_T,
                config=self.config.loss,
                total_tokens=tokens,
                total_sequences=sequences,
                max_tokens=self.config.rollout.max_tokens,
                **fields,
            )
            # DeepSpeed averages gradients over ranks; the loss is already divided by the global count.
            self.accelerator.deepspeed_engine_wrapped.backward(
                loss * (self.ranks if counts else 0.0), sync_gradients=last
            )
            if counts:
                for key, value in metrics.items():
                    value = value.detach().float()
                    sums[key] = (
                        torch.maximum(sums.get(key, value), value) if key.endswith("_max") else sums.get(key, 0) + value
                    )
        result = self._reduce(sums)
        result["grad_norm"] = float(self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0)
        result["rows"] = float(batch.total_rows)
        if not all(math.isfinite(v) for v in result.values()):
            raise FloatingPointError(
                f"the update gave a number that is not finite: { {k: v for k, v in result.items() if not math.isfinite(v)} }; "
                "lower train.lr or look at the last rollouts"
            )
        return result

    def _reduce(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sum (or take the maximum of `_max` keys) over the ranks."""
        import torch

        every: list[dict[str, float]] = [{} for _ in range(self.ranks)]
        mine = {key: float(value) for key, value in sums.items()}
        if self.ranks == 1:
            every = [mine]
        else:
            torch.distributed.all_gather_object(every, mine)
        keys = sorted({key for one in every for key in one})
        return {
            key: (max if key.endswith("_max") else sum)(one[key] for one in every if key in one)  # type: ignore[operator]
            for key in keys
        }

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then the schedule over `train.steps`."""
        t = self.config.train
        if step < t.warmup_steps:
            return t.lr * (step + 1) / t.warmup_steps
        done = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return t.lr * factor[t.lr_schedule]

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the Hugging Face checkpoint, full tensor), one after another; a collective under ZeRO-3.

        Tied output heads are left out, adapters are merged.
        """
        import torch

        with merged_adapters(self.module) as model, torch.no_grad():
            for name, tensor in checkpoint_tensors(model):
                with gathered(tensor):
                    yield name, tensor.detach()

    def adapter(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """peft's configuration of the LoRA adapters and copies of their weights on the CPU, named as in its files.

        A collective under ZeRO-3.
        """
        import torch

        weights = {}
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if "lora_" in name:
                    with gathered(parameter):
                        weights[name.replace(f".{ADAPTER}.", ".")] = parameter.detach().cpu().clone()
        return self.module.peft_config[ADAPTER].to_dict(), weights

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What `weights` will yield, without gathering anything."""
        with merged_adapters(self.module, compute=False) as model:
            return [(n, t.dtype, tuple(getattr(t, "ds_shape", t.shape))) for n, t in checkpoint_tensors(model)]

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face form (all ranks call this; the main one writes)."""
        state = {name: tensor.cpu().clone() for name, tensor in self.weights()}
        if self.accelerator.is_main_process:
            base = self.module.get_base_model() if self.config.train.lora else self.module
            base.save_pretrained(folder, state_dict=state)
        self.accelerator.wait_for_everyone()

    def save_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder), safe_serialization=True)

    def load_state(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))

    def start_trackers(self, folder: Path) -> None:
        """Open accelerate's trackers; tensorboard writes into the run folder."""
        self.accelerator.init_trackers(folder.name)

    def share(self, value: Any) -> Any:
        """The main rank's value on every rank."""
        import torch

        if self.ranks == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def use_device(self) -> None:
        """Make this rank's GPU the current one of the calling thread; nothing on CPU."""
        import torch

        if self.accelerator.device.type == "cuda":
            torch.cuda.set_device(self.accelerator.device)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


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

    On a CPU it would be compiled at the start, a minute the first time; a compilation that is killed leaves a lock for which
    every later start waits without end. Only DeepSpeed's inference layers use it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_accelerator(config: Config, on_gpu: bool) -> Any:
    """accelerate with DeepSpeed, also when launched plainly or without a launcher at all."""
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    from lingshu_rl.processes.workers import free_port

    if not on_gpu:
        skip_shared_memory_build()
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, default)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    bf16 = on_gpu and config.train.dtype != "float32"
    settings = {
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": bf16},
        # The number of rows differs from step to step, so the boundary is set by hand and nothing is divided by it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        **config.deepspeed,
    }
    handlers = [] if on_gpu else [InitProcessGroupKwargs(backend="gloo")]
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
    except ValueError as error:
        if "accelerate config" not in str(error):
            raise
        raise ConfigError(
            "the accelerate config file sets mixed_precision or DeepSpeed settings, which would not be used; leave them out "
            "(`deepspeed_config: {}`) and give train.dtype and deepspeed.zero_optimization.stage to the run"
        ) from None
    return Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="bf16" if bf16 else "no",
        kwargs_handlers=handlers,
        log_with=available_trackers(config.run.trackers),
        project_dir=config.run.dir,
    )


def row_layout(config: Config, spec: ModelSpec, on_gpu: bool) -> tuple[str, str]:
    """The layout of rows, and what to tell the user about it ("" for nothing). Raises ConfigError for flex on a CPU."""
    if config.packing.attention == "flex" and not on_gpu:
        raise ConfigError("packing.attention=flex has no gradient on a CPU; use sdpa there")
    if config.packing.layout == "shared" and not spec.shareable:
        return "dense", f"prompts cannot be shared, so each completion gets a row of its own: {spec.reason}"
    return config.packing.layout, ""


def share_rows(rows: Sequence[PackedRow], rank: int, ranks: int) -> list[tuple[PackedRow, bool]]:
    """This rank's rows, largest first dealt to the least loaded rank. Deterministic, alike on every rank.

    Rows with and without images are dealt apart, and each rank gets equally many of either, in the same order: a rank
    that is short repeats a row that does not count (False). All ranks then run the vision tower in the same forwards.
    If not, a ZeRO-3 rank would wait for weights that another never fetches, and a ZeRO-2 rank would add up a bucket of
    gradients that another lacks. Rows with images come last, as what is reduced is what the last backward reached.
    """
    mine: list[tuple[PackedRow, bool]] = []
    for seeing in (False, True):
        kind = [row for row in rows if bool(row.vision) == seeing]
        if not kind:
            continue
        loads = [0] * ranks
        shares: list[list[PackedRow]] = [[] for _ in range(ranks)]
        most = -(-len(kind) // ranks)
        for row in sorted(kind, key=lambda r: -r.tokens):
            target = min(range(ranks), key=lambda r: (len(shares[r]) >= most, loads[r]))
            shares[target].append(row)
            loads[target] += row.tokens
        smallest = min(kind, key=lambda r: r.tokens)
        mine += [(row, True) for row in shares[rank]] + [(smallest, False)] * (most - len(shares[rank]))
    return mine


def row_tensors(row: PackedRow, groups: Sequence[TrainGroup], device: Any) -> dict[str, Any]:
    """The row's per-token and per-sequence fields, in the order of its completion tokens."""
    import torch

    members = [(groups[g], m) for g, m, _ in row.members]
    rollout_T = torch.tensor([x for g, m in members for x in g.rollout_logprobs[m]], device=device)
    with_reference = members[0][0].reference_logprobs is not None
    return {
        "sequence_T": row.sequence_T.to(device),
        "advantages": torch.tensor([g.advantages[m] for g, m in members], device=device),
        "rollout_logprobs_T": rollout_T,
        "ref_logprobs_T": torch.cat([g.reference_logprobs[m] for g, m in members]).to(device)  # type: ignore[index]
        if with_reference
        else None,
    }


def checkpoint_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under their checkpoint names, without a tied output head."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for name, parameter in model.named_parameters():
        if not (tied and name.endswith("lm_head.weight")):
            yield name, parameter
    persistent = set(model.state_dict().keys())
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer


@contextmanager
def gathered(tensor: Any) -> Iterator[None]:
    """Makes one ZeRO-3 partitioned parameter whole inside the block; nothing else is gathered at the same time."""
    if not hasattr(tensor, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        yield


@contextmanager
def merged_adapters(model: Any, compute: bool = True) -> Iterator[Any]:
    """The base model with LoRA adapters merged in for the block's duration; plain models pass through."""
    if not hasattr(model, "merge_adapter"):
        yield model
        return
    if compute:
        model.merge_adapter()
    try:
        yield _PlainNames(model.get_base_model())
    finally:
        if compute:
            model.unmerge_adapter()


class _PlainNames:
    """A LoRA-wrapped base model that lists its parameters under the names the unwrapped one has."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name:
                yield name.replace(".base_layer.", "."), parameter

    def named_buffers(self) -> Iterator[tuple[str, Any]]:
        return self.model.named_buffers()

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()
