"""Staged supervised fine-tuning: TRL's SFTTrainer once a stage, each on other rows, other parts and other learning
rates.

    shallow alignment -> deep alignment -> instruction tuning, then RL (train.py)

A stage trains the parts that its `lr` names (vision, projector, language); the others are frozen. It starts from the
model of the stage before, ends with an ordinary Hugging Face folder, and is measured on held-out questions by the
rewards.

    DIR/<stage>/model/          the model after the stage          DIR/<stage>/metrics.jsonl   TRL's log
    DIR/<stage>/checkpoints/    while it runs                      DIR/eval/<stage>.jsonl      graded questions ("start"
    first) DIR/summary.json table.md   accuracy and gain by stage, with intervals
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from lingshu_rl.config import ConfigError, checked_sources, read_config, to_yaml
from lingshu_rl.data.sources import Source, is_demo, layout_of, paths_in, sources_of
from lingshu_rl.data.tables import json_rows
from lingshu_rl.eval.stats import gain_between, mean_ci
from lingshu_rl.examples import TARGETS, ExampleLengths, Examples, completion_fault
from lingshu_rl.fingerprint import Fingerprints, text_hash
from lingshu_rl.folders import own
from lingshu_rl.images import MAX_PIXELS, MIN_PIXELS, Budget
from lingshu_rl.markup import table_line
from lingshu_rl.optimizers import Place, build_optimizer, check_optimizer
from lingshu_rl.progress import Progress
from lingshu_rl.rewarding import reward_of
from lingshu_rl.runfolder import image_name, write_text

if TYPE_CHECKING:
    import torch

    from lingshu_rl.data.load import Fault, Loaded, Measure
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.lengths import Limit
    from lingshu_rl.types import Prompt
    from rewards.rows import LabelCheck

PARTS = ("vision", "projector", "language")
START = "start"  # the name under which the model before the first stage is measured

# Names of modules in transformers' vision-language models. The projector often lies inside the vision tower, so it is
# asked for first.
_PROJECTOR = set(
    "embed_vision merger deepstack_merger_list merger_list multi_modal_projector mm_projector connector aligner".split()
)
_VISION = {"visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "vpm"}
_LANGUAGE = {"language_model", "lm_head", "embed_tokens", "text_model"}


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
        checked_sources(config.test.data, "test.data")
    for name, stage in config.stages.items():
        _check_stage(name, stage, {**config.trainer, **stage.trainer})
    return config


def _check_stage(name: str, stage: StageConfig, trainer: Mapping[str, Any]) -> None:
    where = f"stages.{name}"
    if name == START or not name.replace("-", "_").isidentifier():
        raise ConfigError(f"{where}: a stage's name is letters, digits, - and _, and not {START!r}")
    checked_sources(stage.data, f"{where}.data")
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


def run_sft(config: SftConfig, only: str = "") -> dict[str, Any]:
    """All stages in order, or only the one named, which then starts from `config.model`. Returns the summary."""
    from accelerate import PartialState

    if only and only not in config.stages:
        raise ConfigError(f"--stage {only}: the stages are {', '.join(config.stages)}")
    state = PartialState()
    progress = Progress(quiet=not state.is_main_process)
    folder = Path(config.dir)
    stages = {only: config.stages[only]} if only else config.stages
    with contextlib.ExitStack() as closing:
        if state.is_main_process:
            closing.enter_context(own(folder, "fine-tuning", "dir", afresh=config.resume == "never"))
            write_text(folder / "config.yaml", to_yaml(config))
        state.wait_for_everyone()
        summary = _run_stages(config, stages, folder, progress)
        if state.is_main_process:
            write_text(folder / "summary.json", json.dumps(summary, indent=1))
            write_text(folder / "table.md", table(summary["rows"]))
            progress.say(f"the model after {summary['stages'][-1]}: {summary['model']}")
            if config.test.data:
                print(table(summary["rows"]))
    return summary


def _run_stages(
    config: SftConfig, stages: Mapping[str, StageConfig], folder: Path, progress: Progress
) -> dict[str, Any]:
    test = _test_prompts(config)
    model, before = config.model, _model_hash(config.model)
    if test:
        measure(config, START, model, before, test, folder, progress)
    for name, stage in stages.items():
        key = text_hash(
            [
                before,
                asdict(stage),
                config.trainer,
                config.optimizer,
                config.optimizer_args,
                config.seed,
                config.dtype,
                config.system,
                config.too_long,
                config.parts,
                asdict(config.budget),
                [_source_hash(s) for s in sources_of(stage.data)],
            ]
        )
        model = train_stage(config, name, stage, model, key, folder / name, progress)
        before = key
        if test:
            measure(config, name, model, before, test, folder, progress)
    if test and config.test.blank:
        measure(config, f"{name}_blank", model, before, _blank(test), folder, progress)
    return summarise(folder, list(stages)) | {"model": model, "stages": list(stages)}


def train_stage(
    config: SftConfig, name: str, stage: StageConfig, start: str, key: str, folder: Path, progress: Progress
) -> str:
    """Train one stage, or go on with it, or find it done. Returns the folder of its model."""
    from accelerate import PartialState

    from lingshu_rl.model.encoder import PromptEncoder

    state = PartialState()
    final = folder / "model"
    known = json.loads((folder / "stage.json").read_text()) if (folder / "stage.json").exists() else None
    if known is not None and known["key"] != key:
        raise ConfigError(
            f"{folder} holds this stage with another start, other data or other settings; give another dir, or "
            f"resume=never "
            "(the old folder is kept aside)"
        )
    if (folder / "done.json").exists():
        progress.say(f"{name}: done before, {final}")
        return str(final)
    if state.is_main_process:
        write_text(folder / "stage.json", json.dumps({"key": key, "start": start, **asdict(stage)}, indent=1))
    arguments = sft_arguments(config, stage, folder, state.device.type == "cuda")
    checkpoint = newest_checkpoint(folder / "checkpoints")
    # transformers' own resume leaves the weights of a vision-language model as they are, without a word: its checkpoint
    # names them otherwise than the module does. So the model is loaded from the checkpoint (DeepSpeed loads its own
    # form).
    begin = str(checkpoint) if checkpoint is not None and not arguments.deepspeed else start
    examples = stage_examples(config, name, stage, PromptEncoder(begin), begin)
    trainer = build_trainer(config, name, stage, begin, examples, arguments, progress)
    if checkpoint is not None:
        progress.say(f"{name}: goes on from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    part = folder / "model.part"
    if state.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    state.wait_for_everyone()
    trainer.save_model(str(part))
    state.wait_for_everyone()
    if state.is_main_process:
        (part / "training_args.bin").unlink(missing_ok=True)  # a pickle that names this run's paths
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        # Without what TRL counts from the start of the process, so that a resumed stage logs what a straight one does.
        log = [
            {k: v for k, v in line.items() if k != "num_tokens"} for line in trainer.state.log_history if "loss" in line
        ]
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line, sort_keys=True) + "\n" for line in log))
        write_text(
            folder / "done.json", json.dumps({"key": key, "steps": trainer.state.global_step, "rows": len(examples)})
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    state.wait_for_everyone()
    trainer.accelerator.free_memory()
    return str(final)


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


def part_of(name: str, given: Mapping[str, Sequence[str]] | None = None, sees: bool = True) -> str:
    """The part that a parameter belongs to; all of a model that does not see is language. Raises ConfigError."""
    for part, prefixes in (given or {}).items():
        if any(name.startswith(prefix) for prefix in prefixes):
            return part
    words = set(name.split("."))
    for part, known in (("projector", _PROJECTOR), ("vision", _VISION), ("language", _LANGUAGE)):
        if words & known:
            return part
    if not sees:
        return "language"
    raise ConfigError(
        f"the parameter {name} belongs to no known part; name its prefix under parts.vision, projector or language"
    )


def parameters_by_part(
    model: Any, given: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[tuple[str, Any]]]:
    names = [name for name, _ in model.named_parameters()]
    sees = bool(given) or any(set(name.split(".")) & (_PROJECTOR | _VISION) for name in names)
    found: dict[str, list[tuple[str, Any]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        found[part_of(name, given, sees)].append((name, parameter))
    return found


def parameter_groups(
    model: Any,
    lr: Mapping[str, float],
    weight_decay: float,
    decayed: set[str],
    given: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: each trained part with its learning rate, with and without weight decay."""
    groups = []
    for part, members in parameters_by_part(model, given).items():
        for decays in (True, False):
            chosen = [p for name, p in members if p.requires_grad and (name in decayed) is decays]
            if chosen:
                groups.append(
                    {"params": chosen, "lr": lr[part], "weight_decay": weight_decay if decays else 0.0, "part": part}
                )
    return groups


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

    sources = checked_sources(stage.data, f"stages.{name}.data")
    loaded = []
    for source in sources:
        lengths = ExampleLengths(pictures, limit, stage.kinds, stage.target)
        loaded.append((source, _load(config, source, stage.instruction, fault, lengths=lengths).prompts))
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
    )


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


def measure(
    config: SftConfig, name: str, model: str, key: str, prompts: Sequence[Prompt], folder: Path, progress: Progress
) -> None:
    """Answer the held-out questions greedily and grade them into eval/<name>.jsonl, once for each state of the
    model."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.loading import load_model

    state = PartialState()
    mark = folder / "eval" / f"{name}.key"
    told = text_hash([key, asdict(config.test)])
    if mark.exists() and mark.read_text() == told:
        return
    network = load_model(model, torch.bfloat16 if state.device.type == "cuda" else torch.float32).to(state.device)
    own = list(prompts)[state.process_index :: state.num_processes]
    answers = answer(network, PromptEncoder(model), own, config.test.batch, config.test.max_tokens)
    del network
    results = reward_of(config.test.rewards, config.test.data).score_batch(
        [p.reward_input(text, cut) for p, (text, cut) in zip(own, answers, strict=True)]
    )
    rows = [
        {
            "id": p.id,
            "kind": p.kind,
            "task": str(p.meta.get("task", "")),
            "modality": str(p.meta.get("modality", "")),
            "image": image_name(p.images),
            "question": p.text,
            "options": list(p.options),
            "gold": p.gold,
            "completion": text,
            "value": r.value,
            "status": r.status,
            "parsed": r.parsed,
            "reason": r.reason,
        }
        for p, (text, _), r in zip(own, answers, results, strict=True)
    ]
    if state.num_processes > 1:
        place = {p.id: n for n, p in enumerate(prompts)}
        rows = sorted(gather_object(rows), key=lambda row: place[row["id"]])
    if state.is_main_process:
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        write_text(folder / "eval" / f"{name}.jsonl", text)
        write_text(mark, told)
        score = mean_ci([r["value"] for r in rows], [r["image"] for r in rows])
        progress.say(f"{name}: held-out accuracy {_share(score)}")


def answer(
    model: Any, encoder: PromptEncoder, prompts: Sequence[Prompt], batch: int, max_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy completions and whether each was cut at the limit, in the prompts' order."""
    import torch
    from transformers import GenerationConfig

    from lingshu_rl.model.families import model_spec

    ends = encoder.eos_ids
    pad = encoder.tokenizer.pad_token_id
    # A fresh one: a model's own may hold a repetition penalty, which is no part of greedy decoding.
    plan = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends) if pad is None else pad,
        suppress_tokens=list(model_spec(model.config).placeholder_ids) or None,
    )
    out: dict[int, tuple[str, bool]] = {}
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].images))
    while order:
        seeing = bool(prompts[order[0]].images)
        chosen = [n for n in order[:batch] if bool(prompts[n].images) is seeing]
        order = order[len(chosen) :]
        texts = [encoder.render(prompts[n]) for n in chosen]
        plain = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
        if seeing:
            images = [[picture.pixels() for picture in prompts[n].images] for n in chosen]
            inputs = encoder.processor(text=texts, images=images, **plain)
        else:
            inputs = encoder.tokenizer(texts, **plain)
        inputs = {
            k: v.to(model.device, model.dtype) if v.is_floating_point() else v.to(model.device)
            for k, v in inputs.items()
        }
        with torch.no_grad():
            made = model.generate(**inputs, generation_config=plan)[:, inputs["input_ids"].shape[1] :]
        for n, row in zip(chosen, made.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            out[n] = (encoder.decode(row[:end]), end is None)
    return [out[n] for n in range(len(prompts))]


def summarise(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """One row a measured state: accuracy, and the paired gain over the state before it."""
    rows: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    for name in (START, *stages):
        path = folder / "eval" / f"{name}.jsonl"
        if not path.exists():
            continue
        graded = [row for _, row in json_rows(path)]
        rows.append(score_row(name, graded, before))
        before = graded
        blank = folder / "eval" / f"{name}_blank.jsonl"
        if blank.exists():
            seen = [row for _, row in json_rows(blank)]
            rows[-1]["blank_image"] = mean_ci([r["value"] for r in seen], [r["image"] for r in graded])
    return {"rows": rows}


def score_row(name: str, graded: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row = {"stage": name, **mean_ci([r["value"] for r in graded], [r.get("image") for r in graded])}
    return {**row, "gain": gain_between(before, graded)} if before else row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown for people."""
    lines = [
        "| stage | held-out accuracy (95 % interval) | gain over the stage before, points | blank image | questions |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row.get("gain")
        said = f"{gain['points']:+.1f} ({gain['ci95'][0]:+.1f} to {gain['ci95'][1]:+.1f})" if gain else ""
        blank = _share(row["blank_image"]) if row.get("blank_image") else ""
        lines.append(table_line([row["stage"], _share(row), said, blank, str(row["n"])]))
    return "\n".join(lines) + "\n"


def _share(score: Mapping[str, Any]) -> str:
    if score["accuracy"] is None:
        return "not judged"
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _test_prompts(config: SftConfig) -> list[Prompt]:
    from lingshu_rl.model.encoder import PromptEncoder

    if not config.test.data:
        return []
    test = config.test
    loaded = _load(
        config,
        test.data,
        test.instruction,
        PromptEncoder(config.model).fault,
        reward_of(test.rewards, test.data).check_gold,
    )
    return list(loaded.prompts)[: config.test.limit or None]


def _blank(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(p, images=tuple(picture.blank() for picture in p.images)) for p in prompts]


def _model_hash(model: str) -> str:
    from lingshu_rl.model.loading import model_path

    path = Path(model_path(model))
    return Fingerprints().of(path) if path.is_dir() else text_hash(model)


def _source_hash(source: Source) -> str:
    """Of a file's content; of a demo split, the code that makes it; of anything else, its name; and of how it is
    read."""
    path = Path(source.path).expanduser()
    if is_demo(source.path):
        from lingshu_rl.demo.build import version

        content = version()
    else:
        content = Fingerprints().of(path) if path.exists() else ""
    how = {k: v for k, v in asdict(source).items() if k != "path" or not path.exists()}
    return text_hash([how, asdict(layout_of(source)), content])
