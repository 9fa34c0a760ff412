"""The stages in order: each trained, gone on with or found done, and measured."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lingshu_rl.data.sources import Source, is_demo, layout_of, sources_of
from lingshu_rl.failures import ConfigError
from lingshu_rl.progress import Progress
from lingshu_rl.settings import to_yaml
from lingshu_rl.sft.held_out import measure, summarise, table
from lingshu_rl.sft.rows import blank, stage_examples, test_prompts
from lingshu_rl.sft.settings import START, SftConfig, StageConfig
from lingshu_rl.sft.trainer import build_trainer, newest_checkpoint, sft_arguments
from lingshu_rl.storage.fingerprint import Fingerprints, text_hash
from lingshu_rl.storage.folders import own
from lingshu_rl.storage.runfolder import write_text


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
    test = test_prompts(config)
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
        measure(config, f"{name}_blank", model, before, blank(test), folder, progress)
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
            "resume=never (the old folder is kept aside)"
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
