"""A stage's trainer: TRL's, with a learning rate a part, checkpoints that are whole, and packing where it is safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.failures import ConfigError
from lingshu_rl.model.optimizers import Place, build_optimizer, check_optimizer
from lingshu_rl.progress import Progress
from lingshu_rl.sft.examples import Examples
from lingshu_rl.sft.parts import parameter_groups, parameters_by_part
from lingshu_rl.sft.settings import DEFAULTS, PARTS, SftConfig, StageConfig

if TYPE_CHECKING:
    import torch


def build_trainer(
    config: SftConfig,
    name: str,
    stage: StageConfig,
    start: str,
    examples: Examples,
    arguments: Any,
    progress: Progress,
) -> Any:
    """TRL's SFTTrainer with a learning rate a part. The arguments come first: ZeRO-3 loads the model by them."""
    from transformers import PrinterCallback

    from lingshu_rl.model.loading import load_model

    place = optimizer_place(arguments)
    check_optimizer("optimizer", config.optimizer, config.optimizer_args, place)
    model = load_model(start, stage_dtype(config, arguments))
    if config.attention != "sdpa":
        model.set_attn_implementation(config.attention)
    by_part = parameters_by_part(model, config.parts)
    if missing := [part for part in stage.lr if not by_part[part]]:
        raise ConfigError(f"stages.{name}.lr.{missing[0]}: {start} has no {missing[0]} part")
    for part, members in by_part.items():
        for _, parameter in members:
            parameter.requires_grad_(part in stage.lr)
    progress.say(f"{name}: {len(examples)} rows; {_trained(by_part, stage)}")
    arguments.packing = decide_packing(name, stage, examples.sees, model, arguments, progress)
    arguments.dataset_kwargs = {
        "skip_prepare_dataset": not arguments.packing
    }  # tokens, or rows that TRL makes tokens of
    trainer = _trainer_kind(config, stage, place)(
        model=model,
        args=arguments,
        train_dataset=examples.as_dataset(packed_in=Path(arguments.output_dir) / "rows" if arguments.packing else None),
        processing_class=examples.encoder.processor or examples.encoder.tokenizer,
    )
    trainer.add_callback(_marks(name, trainer.accelerator, progress))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trained(by_part: Mapping[str, Sequence[tuple[str, Any]]], stage: StageConfig) -> str:
    millions = {part: sum(x.numel() for _, x in members) / 1e6 for part, members in by_part.items()}
    trained = ", ".join(f"{part} {millions[part]:.1f} M at lr {lr:g}" for part, lr in stage.lr.items())
    frozen = ", ".join(part for part in PARTS if by_part[part] and part not in stage.lr)
    return f"trains {trained}{f'; frozen: {frozen}' if frozen else ''}"


def _trainer_kind(config: SftConfig, stage: StageConfig, place: Place) -> Any:
    """TRL's trainer with the stage's optimiser."""
    from trl import SFTTrainer

    class StageTrainer(SFTTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                of: Any = self.model if model is None else model
                decayed = set(self.get_decay_parameter_names(of))
                groups = parameter_groups(of, stage.lr, self.args.weight_decay, decayed, config.parts)
                adam = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
                options = {**adam, **config.optimizer_args}
                self.optimizer = build_optimizer("optimizer", config.optimizer, options, place, model=of, groups=groups)
            return self.optimizer

    return StageTrainer


def _marks(name: str, accelerator: Any, progress: Progress) -> Any:
    """Says the loss, and marks a checkpoint as whole when every rank has written its part."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            accelerator.wait_for_everyone()
            if state.is_world_process_zero:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                progress.say(f"{name}: step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}")

    return Marks()


COMPLETE = "complete"  # a file in a checkpoint whose every part is written


def newest_checkpoint(folder: Path) -> Path | None:
    found = [p for p in folder.glob("checkpoint-*") if (p / COMPLETE).exists()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def sft_arguments(config: SftConfig, stage: StageConfig, folder: Path, on_gpu: bool) -> Any:
    """trl.SFTConfig: ours, under the user's for all stages, under the stage's own. Raises ConfigError for an unknown
    name."""
    from trl import SFTConfig

    given = {**DEFAULTS, "bf16": on_gpu, "use_cpu": not on_gpu, **config.trainer, **stage.trainer}
    own = {
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": max(stage.lr.values()),
        "seed": config.seed,
        "save_strategy": "steps",
        "completion_only_loss": True,
        "remove_unused_columns": False,
    }
    try:
        return SFTConfig(**{**given, **own})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from None


def optimizer_place(arguments: Any) -> Place:
    plugin = arguments.deepspeed_plugin
    deepspeed = plugin.hf_ds_config.config if plugin else None
    return Place.of(deepspeed, on_gpu=arguments.device.type == "cuda", max_grad_norm=arguments.max_grad_norm)


def stage_dtype(config: SftConfig, arguments: Any) -> torch.dtype:
    import torch

    if config.dtype == "auto":
        return torch.bfloat16 if arguments.deepspeed and arguments.bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def decide_packing(name: str, stage: StageConfig, sees: bool, model: Any, arguments: Any, progress: Progress) -> bool:
    """Whether rows are packed. `always` where it would mix rows is an error, `auto` then says why it does not."""
    if stage.packing == "never":
        return False
    if sees:
        reason = "rows have images"
    elif not arguments.max_length:
        reason = "trainer.max_length is not set"
    else:
        reason = packing_fault(model)
    if reason and stage.packing == "always":
        raise ConfigError(f"stages.{name}.packing=always is not safe: {reason}; use packing=auto")
    progress.say(f"{name}: rows are {'not packed: ' + reason if reason else 'packed'}")
    return not reason


def packing_fault(model: Any) -> str:
    """Why rows packed into one would see each other, or "". Tried out: the second of two rows alone and behind the
    first."""
    import torch

    attention = model.config._attn_implementation or ""
    if attention.startswith("flash"):  # its kernels are told where rows begin; it does not run on a CPU to be tried
        return ""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, min(vocabulary, 1000) - 1, (1, 24), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    first = 11
    restart = torch.cat((torch.arange(first), torch.arange(24 - first)))[None].to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=ids[:, first:], use_cache=False).logits.log_softmax(-1)
        packed = model(input_ids=ids, position_ids=restart, use_cache=False).logits[:, first:].log_softmax(-1)
        joined = model(input_ids=ids, use_cache=False).logits[:, first:].log_softmax(-1)
    model.train(was_training)
    gap, leak = float((packed - alone).abs().max()), float((joined - alone).abs().max())
    if gap > 0.05 * leak:
        return f"with {attention} attention a packed row sees the one before it (log-probs off by {gap:.2g} nats)"
    return ""
